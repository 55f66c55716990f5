#pragma once

// TIP of sparse prefill (ops/tile.h): the softmaxes of a tile's queries, added up for every cell and list.
//
//   rows   the queries' dominant values in 8 bits with one scale each, as they are read back, in f16: a matrix a pair
//   sums   by the tensor cores, the logits of all rows and cells: every row's sum of exponentials
//   norms  what these parts add up to
//   pool   the logits once more: every cell's exponentials, divided by their rows' sums, over all rows
//
// No score is ever in memory. The tensor cores make the logits, with an offset of the row as what their sums begin at,
// and add up the exponentials, which come from the logits' bits in three instructions for two (cuda/tile-exp.cuh).
// Equal cells have equal scores: nothing depends on the column that a cell is in.
//
// Thread (g, c) = (lane/4, lane%4) has dimensions c*KS*4 to c*KS*4 + KS*4 - 1 of rows g and g + 8 and of cells; KS:
// steps of 16 dimensions.
//
//   sums   products of 16 rows and 8 cells: cells 2c and 2c + 1 of rows g and g + 8. Those of 16 cells are an operand A
//          [rows, cells] as they are.
//   pool   products of 16 cells and 8 rows: rows 2c and 2c + 1, and of another 8 rows 2c + 8 and 2c + 9. Line g of a
//          product is cell 2g, line g + 8 is cell 2g + 1. Both together are an operand A [cells, rows] as they are.

#include "cuda/tile-exp.cuh"
#include "cuda/tile-logits.cuh"

// ---- sums: a warp has MT*16 rows and a part of the cells ----

static constexpr float SUMS_BASE = 30000.0f; // of a row before its first cell: every logit is above the window
static constexpr float SUMS_ROOM = 8.0f;     // octaves of the window above the largest logit, as it is moved

template <int KS, bool CAP>
struct fasa_tile_sums {
    static constexpr int MT = KS <= 2 ? 4 : KS <= 4 ? 2 : 1, NT = 4, CELLS = 8 * NT;
    uint32_t rows[MT][KS][4];
    fasa_tile_key<KS> cells[NT];
    float base[MT][4]; // of rows g (twice) and g + 8 (twice): what a logit is raised by, as products begin
    float sum[MT][2];  // of rows g and g + 8: of 2^(t - TILE_EXP_SHIFT)

    __device__ __forceinline__ void load(const half * from) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int s = 0; s < KS; ++s) {
                const uint4 x = ((const uint4 *) from)[(m * KS + s) * 32 + threadIdx.x % 32];
                rows[m][s][0] = x.x, rows[m][s][1] = x.z, rows[m][s][2] = x.y, rows[m][s][3] = x.w;
            }
            base[m][0] = base[m][1] = base[m][2] = base[m][3] = SUMS_BASE; // also of rows that do not exist, all 0
            sum[m][0] = sum[m][1] = 0.0f;
        }
    }

    // t of the n-th 8 cells and the m-th 16 rows
    template <bool ALL>
    __device__ __forceinline__ void logits(const fasa_tile_tip_args & a, const fasa_tile_hides<ALL> & hides, int m,
        int n, int cell0, float (&t)[4]) const {
        if constexpr (CAP) {
            fasa_tile_dot<KS>(t, { 0.0f, 0.0f, 0.0f, 0.0f }, rows[m], cells[n].x);
            fasa_tile_cap(a.soft_cap, t);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                t[i] += base[m][i];
            }
        } else {
            fasa_tile_dot<KS>(t, base[m], rows[m], cells[n].x);
        }
        hides.add(cell0 + 8 * n + threadIdx.x % 4 * 2, a.n_kv, t);
    }

    // part: the cells' sums; beyond: a bit of TILE_BEYOND is set where a logit was above its window
    template <bool ALL>
    __device__ __forceinline__ void exponentials(const fasa_tile_tip_args & a, const fasa_tile_hides<ALL> & hides,
        int m, int cell0, float (&part)[2], uint32_t & beyond) const {
        float c[4] = {};
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            uint32_t steps[4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float t[4];
                logits<ALL>(a, hides, m, n + i, cell0, t);
#pragma unroll
                for (int u = 0; u < 2; ++u) {
                    steps[2 * i + u] = fasa_tile_steps(t[2 * u], t[2 * u + 1]);
                    beyond |= fasa_tile_beyond(steps[2 * i + u]);
                }
            }
            fasa_tile_sum(c, steps);
        }
        part[0] = c[0], part[1] = c[2];
    }

    // windows that are SUMS_ROOM above the cells' largest logits, where that is higher
    template <bool ALL>
    __device__ __forceinline__ void raise(
        const fasa_tile_tip_args & a, const fasa_tile_hides<ALL> & hides, int m, int cell0) {
        float top[2] = { -INFINITY, -INFINITY };
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float t[4];
            logits<ALL>(a, hides, m, n, cell0, t);
            top[0] = fmaxf(top[0], fmaxf(t[0], t[1]));
            top[1] = fmaxf(top[1], fmaxf(t[2], t[3]));
        }
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            top[u]         = fmaxf(top[u], __shfl_xor_sync(0xffffffff, top[u], 1));
            top[u]         = fmaxf(top[u], __shfl_xor_sync(0xffffffff, top[u], 2));
            const float by = fmaxf(0.0f, ceilf(top[u] - (TILE_WINDOW - SUMS_ROOM)));
            base[m][2 * u] -= by;
            base[m][2 * u + 1] -=
                __shfl_xor_sync(0xffffffff, by, 1); // the same, but the compiler makes no copies of it
            sum[m][u] *= fasa_exp2(-by);
        }
    }

    // ALL: they exist
    template <bool ALL>
    __device__ __forceinline__ void load_cells(const half * keys, int cell0, int n_cell) {
        const int first = cell0 + threadIdx.x % 32 / 4;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int64_t cell = ALL ? first : min(first + 8 * n, n_cell - 1);
            cells[n].load(keys + cell * (16 * KS) + (ALL ? n * 8 * 16 * KS : 0));
        }
    }

    // CELLS cells from cell0 on that all rows see
    __device__ __forceinline__ void add_all(
        const fasa_tile_tip_args & a, const fasa_tile_pair & at, int row0, int cell0, const half * keys) {
        const fasa_tile_hides<true> hides(a, at, row0);
        float part[MT][2];
        uint32_t beyond[MT] = {}, any = 0;
        load_cells<true>(keys, cell0, a.n_cell);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            exponentials<true>(a, hides, m, cell0, part[m], beyond[m]);
            any |= beyond[m];
        }
        if (__any_sync(0xffffffff, any & TILE_BEYOND)) {
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                if (__any_sync(0xffffffff, beyond[m] & TILE_BEYOND)) {
                    raise<true>(a, hides, m, cell0);
                    exponentials<true>(a, hides, m, cell0, part[m], beyond[m]);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            sum[m][0] += part[m][0], sum[m][1] += part[m][1];
        }
    }

    // the same of cells that some rows see
    __device__ __forceinline__ void add_some(
        const fasa_tile_tip_args & a, const fasa_tile_pair & at, int row0, int cell0, const half * keys) {
        load_cells<false>(keys, cell0, a.n_cell);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const fasa_tile_hides<false> hides(a, at, row0 + 16 * m + threadIdx.x % 32 / 4);
            float part[2];
            uint32_t beyond = 0;
            raise<false>(a, hides, m, cell0);
            exponentials<false>(a, hides, m, cell0, part, beyond);
            sum[m][0] += part[0], sum[m][1] += part[1];
        }
    }

    // the chunks [first, last) of CELLS cells
    __device__ __forceinline__ void run(const fasa_tile_tip_args & a, const fasa_tile_pair & at, int row0, int first,
        int last, const half * keys, const int8_t * view) {
#pragma unroll 1
        for (int i = first; i < last; ++i) {
            const fasa_tile_seen seen(view, i * CELLS, CELLS);
            if (seen.all) {
                add_all(a, at, row0, i * CELLS, keys);
            } else if (seen.any) {
                add_some(a, at, row0, i * CELLS, keys);
            }
        }
    }

    __device__ __forceinline__ void end(float2 * part) const {
        if (threadIdx.x % 4 == 0) {
#pragma unroll
            for (int m = 0; m < MT; ++m) {
#pragma unroll
                for (int u = 0; u < 2; ++u) {
                    part[16 * m + 8 * u + threadIdx.x % 32 / 4] =
                        make_float2(sum[m][u] > 0.0f ? TILE_EXP_SHIFT - base[m][2 * u] : -INFINITY, sum[m][u]);
                }
            }
        }
    }
};

template <int KS, bool CAP>
static __global__ void __launch_bounds__(32 * TILE_WARPS, KS <= 6 ? 2 : 1) fasa_tile_sums_kernel(
    const fasa_tile_tip_args a) {
    typedef fasa_tile_sums<KS, CAP> sums;
    const int n_rows = a.n_row / (16 * sums::MT), unit = blockIdx.y * TILE_WARPS + threadIdx.x / 32;
    const int row0 = unit % n_rows * (16 * sums::MT), part = unit / n_rows, pair = blockIdx.x;
    const fasa_tile_pair at(a, pair);
    if (part >= a.n_part || row0 >= at.n) {
        return;
    }
    const half * keys   = (const half *) (a.keys + at.h * a.keys_nb2 + at.stream * a.keys_nb3);
    const int8_t * view = a.view + at.tile * a.n_view;
    const int n_chunk = (a.n_kv + sums::CELLS - 1) / sums::CELLS, per = (n_chunk + a.n_part - 1) / a.n_part;
    const int first = part * per, last = min(n_chunk, first + per);
    sums x;
    x.load(a.rows + ((int64_t) pair * a.n_row + row0) * (16 * KS));
    x.run(a, at, row0, first, last, keys, view);
    x.end(a.part + ((int64_t) pair * a.n_part + part) * a.n_row + row0);
}

// ---- norms: a thread has a row ----

static constexpr int NORM_THREADS  = 64;
static constexpr float POOL_WINDOW = 30.0f; // t of a logit that is as large as its row's sum, or half of it

static __global__ void __launch_bounds__(NORM_THREADS) fasa_tile_norms_kernel(const fasa_tile_tip_args a) {
    const int r = blockIdx.x * NORM_THREADS + threadIdx.x, pair = blockIdx.y;
    float top = -INFINITY, sum = 0.0f;
    if (r < a.tiles.count(pair / a.n_list) * a.n_group) {
        const float2 * part = a.part + (int64_t) pair * a.n_part * a.n_row + r;
        for (int i = 0; i < a.n_part; ++i) {
            top = fmaxf(top, part[(int64_t) i * a.n_row].x);
        }
        for (int i = 0; i < a.n_part && top > -INFINITY; ++i) {
            const float2 x = part[(int64_t) i * a.n_row];
            sum += x.y * fasa_exp2(x.x - top);
        }
    }
    const bool is   = sum > 0.0f; // there is such a row, and it sees a cell
    const float log = log2f(sum), up = ceilf(log);
    const float base = is ? POOL_WINDOW - top - up : -0x1p16f;
    const int64_t at = (int64_t) pair * a.n_row + r / 16 * 16;
    float * base_to  = a.base + 2 * at + fasa_tile_base_at(r % 16);
    base_to[0] = base_to[2]                    = base;
    a.factor[at + fasa_tile_factor_at(r % 16)] = __float2half_rn(is ? fasa_exp2(up - log) : 0.0f);
}

// ---- pool: a warp has MT*16 cells and all rows ----

template <int KS, bool CAP>
struct fasa_tile_pool {
    static constexpr int MT = KS <= 2 ? 4 : 2, CELLS = 16 * MT;
    uint32_t cells[MT][KS][4];
    float score[MT][4]; // of lines g (twice) and g + 8 (twice): four threads have the same

    // 16 rows as a thread has them
    struct fragment {
        uint2 x[2][KS];
        float4 base[2];
        uint2 factor;

        __device__ __forceinline__ void load(const uint4 * rows, const float4 * bases, const uint2 * factors) {
#pragma unroll
            for (int s = 0; s < KS; ++s) {
                const uint4 v = rows[s * 32];
                x[0][s] = make_uint2(v.x, v.y), x[1][s] = make_uint2(v.z, v.w);
            }
            base[0] = bases[0], base[1] = bases[4], factor = *factors;
        }
    };

    // rows row0 to row0 + 15
    template <bool ALL>
    __device__ __forceinline__ void add(
        const fasa_tile_tip_args & a, const fasa_tile_pair & at, int row0, int cell0, const fragment & f) {
        const int lane = threadIdx.x % 32, row = row0 + lane % 4 * 2;
        const fasa_tile_hides<ALL> hides[2] = { { a, at, row }, { a, at, row + 1 } };
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            float t[2][4]; // [rows 2c and 2c + 1, or 8 more][2 * cell + row]
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const float4 from = CAP ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : f.base[u];
                fasa_tile_dot<KS>(t[u], { from.x, from.y, from.z, from.w }, cells[m], f.x[u]);
                if constexpr (CAP) {
                    fasa_tile_cap(a.soft_cap, t[u]);
                    t[u][0] += f.base[u].x, t[u][1] += f.base[u].y, t[u][2] += f.base[u].z, t[u][3] += f.base[u].w;
                }
            }
            if constexpr (!ALL) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float y[4] = { t[0][i], t[0][2 + i], t[1][i], t[1][2 + i] };
                    hides[i].add(cell0 + 16 * m + lane / 4 * 2, a.n_kv, y);
                    t[0][i] = y[0], t[0][2 + i] = y[1], t[1][i] = y[2], t[1][2 + i] = y[3];
                }
            }
            uint32_t e[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float (&y)[4] = t[i / 2];
                e[i]                = fasa_tile_exp(fasa_tile_steps(y[i % 2 * 2], y[i % 2 * 2 + 1]));
            }
            fasa_mma(score[m], e, f.factor.x, f.factor.y);
        }
    }

    template <bool ALL>
    __device__ __forceinline__ void run(const fasa_tile_tip_args & a, const fasa_tile_pair & at, int cell0,
        const half * rows, const float * base, const half * factor) {
        const uint4 * row_at    = (const uint4 *) rows + threadIdx.x % 32;
        const float4 * base_at  = (const float4 *) base + threadIdx.x % 4;
        const uint2 * factor_at = (const uint2 *) factor + threadIdx.x % 4;
        if constexpr (!ALL || KS > 4) { // as few registers as that takes
#pragma unroll 1
            for (int row0 = 0; row0 < at.n; row0 += 16, row_at += 32 * KS, base_at += 8, factor_at += 4) {
                fragment f;
                f.load(row_at, base_at, factor_at);
                add<ALL>(a, at, row0, cell0, f);
            }
            return;
        }
        fragment f[2]; // there are whole ROWS_STEPs
        f[0].load(row_at, base_at, factor_at);
#pragma unroll 1
        for (int row0 = 0; row0 < at.n; row0 += 32) {
            f[1].load(row_at + 32 * KS, base_at + 8, factor_at + 4);
            add<ALL>(a, at, row0, cell0, f[0]);
            if (row0 + 32 < at.n) {
                row_at += 64 * KS, base_at += 16, factor_at += 8;
                f[0].load(row_at, base_at, factor_at);
            }
            add<ALL>(a, at, row0 + 16, cell0, f[1]);
        }
    }

    __device__ __forceinline__ void load(const half * keys, int cell0, int n_cell) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            fasa_tile_key<KS> x[2];
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const int cell = cell0 + 16 * m + threadIdx.x % 32 / 4 * 2 + u;
                x[u].load(keys + (int64_t) min(cell, n_cell - 1) * (16 * KS));
            }
#pragma unroll
            for (int s = 0; s < KS; ++s) {
                cells[m][s][0] = x[0].x[s].x, cells[m][s][1] = x[1].x[s].x;
                cells[m][s][2] = x[0].x[s].y, cells[m][s][3] = x[1].x[s].y;
            }
        }
    }

    __device__ __forceinline__ void end(int n_kv, int cell0, float * dst) const {
        constexpr float BY = 1ull << (FASA_SCORE_EXP + int(TILE_EXP_SHIFT) - int(POOL_WINDOW));
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const int cell = cell0 + 16 * m + threadIdx.x % 32 / 4 * 2 + u;
                if (threadIdx.x % 4 == 0 && cell < n_kv) {
                    dst[cell] = score[m][2 * u] * BY;
                }
            }
        }
    }
};

template <int KS, bool CAP>
static __global__ void __launch_bounds__(32 * TILE_WARPS, KS <= 4 ? 2 : 1) fasa_tile_pool_kernel(
    const fasa_tile_tip_args a) {
    typedef fasa_tile_pool<KS, CAP> pool;
    const int pair = blockIdx.x, cell0 = (blockIdx.y * TILE_WARPS + threadIdx.x / 32) * pool::CELLS;
    if (cell0 >= a.n_kv) {
        return;
    }
    const fasa_tile_pair at(a, pair);
    const int64_t first = (int64_t) pair * a.n_row;
    const half *rows = a.rows + first * (16 * KS), *factor = a.factor + first;
    const float * base = a.base + 2 * first;
    pool x             = {};
    const fasa_tile_seen seen(a.view + at.tile * a.n_view, cell0, pool::CELLS);
    if (seen.any) {
        x.load((const half *) (a.keys + at.h * a.keys_nb2 + at.stream * a.keys_nb3), cell0, a.n_cell);
        if (seen.all) {
            x.template run<true>(a, at, cell0, rows, base, factor);
        } else {
            x.template run<false>(a, at, cell0, rows, base, factor);
        }
    }
    x.end(a.n_kv, cell0, a.dst + (int64_t) pair * a.n_kv);
}

// ---- launches ----

template <int KS, bool CAP>
static void fasa_tile_tip_launch(ggml_backend_cuda_context & ctx, fasa_tile_tip_args a, int n_pair) {
    typedef fasa_tile_sums<KS, CAP> sums;
    typedef fasa_tile_pool<KS, CAP> pool;
    a.n_row          = (a.n_row + ROWS_STEP - 1) / ROWS_STEP * ROWS_STEP;
    const int n_rows = a.n_row / (16 * sums::MT), n_chunk = (a.n_kv + sums::CELLS - 1) / sums::CELLS;
    const int warps = ggml_cuda_info().devices[ggml_cuda_get_device()].nsm * 2 * TILE_WARPS * 4; // four rounds
    const int parts = std::max(1, warps / std::max(1, n_pair * n_rows));
    const int per   = std::max(16, (n_chunk + parts - 1) / parts);
    a.n_part        = (n_chunk + per - 1) / per;

    ggml_cuda_pool_alloc<half> rows(ctx.pool(), (size_t) n_pair * a.n_row * 16 * KS);
    ggml_cuda_pool_alloc<float2> part(ctx.pool(), (size_t) n_pair * a.n_row * a.n_part);
    ggml_cuda_pool_alloc<float> base(ctx.pool(), (size_t) n_pair * a.n_row * 2);
    ggml_cuda_pool_alloc<half> factor(ctx.pool(), (size_t) n_pair * a.n_row);
    a.rows = rows.get(), a.part = part.get(), a.base = base.get(), a.factor = factor.get();

    const auto stream = ctx.stream();
    fasa_tile_rows_kernel<<<dim3((a.n_row + TILE_WARPS - 1) / TILE_WARPS, n_pair), 32 * TILE_WARPS,
        TILE_WARPS * a.d * sizeof(float), stream>>>(a, 16 * KS);
    fasa_tile_sums_kernel<KS, CAP>
        <<<dim3(n_pair, (n_rows * a.n_part + TILE_WARPS - 1) / TILE_WARPS), 32 * TILE_WARPS, 0, stream>>>(a);
    fasa_tile_norms_kernel<<<dim3(a.n_row / NORM_THREADS, n_pair), NORM_THREADS, 0, stream>>>(a);
    constexpr int CELLS = TILE_WARPS * pool::CELLS;
    fasa_tile_pool_kernel<KS, CAP><<<dim3(n_pair, (a.n_kv + CELLS - 1) / CELLS), 32 * TILE_WARPS, 0, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
}

template <int KS>
static void fasa_tile_tip_run(ggml_backend_cuda_context & ctx, const fasa_tile_tip_args & a, int n_pair) {
    if (a.soft_cap > 0.0f) {
        fasa_tile_tip_launch<KS, true>(ctx, a, n_pair);
    } else {
        fasa_tile_tip_launch<KS, false>(ctx, a, n_pair);
    }
}

// steps of 16 dimensions that cuda/tile-tip.cu has no kernels for, because they take long to compile
void fasa_tile_tip_wide(ggml_backend_cuda_context & ctx, const fasa_tile_tip_args & a, int n_step, int n_pair);
