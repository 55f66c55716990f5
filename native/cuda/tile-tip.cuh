#pragma once

// TIP of sparse prefill (ops/tile.h): the softmaxes of a tile's queries, added up for every cell and list.
//
//   rows   the queries' dominant values in 8 bits with one scale each, as they are read back, in f16: a matrix a pair
//   sums   by the tensor cores, the logits of all rows and cells: every row's largest and its sum of exponentials
//   norms  what these parts add up to
//   pool   the logits once more: every cell's exponentials, by their norms, over all rows
//
// No score is ever in memory. What takes the time is the exponentials: 16 a clock and SM. So nothing else is done with
// a logit, as long as its row's logits are not so large that they must be set against the largest; and some rows have
// their exponentials from a polynomial, on the pipes that are idle: always the same rows, so that equal cells have
// equal scores.
//
// Thread (g, c) = (lane/4, lane%4) has dimensions c*KS*4 to c*KS*4 + KS*4 - 1 of rows g and g + 8 and of cell g; KS:
// steps of 16 dimensions. Of the logits it has cells 2c and 2c + 1 of rows g and g + 8.

#include "cuda/tile-logits.cuh"

// ---- sums: a warp has MT*16 rows and a part of the cells ----

// FAST: logits are not set against the largest of their row; that is right as long as no sum leaves FAST_LEAST to
// FAST_MOST
static constexpr float FAST_LEAST = 1e-20f, FAST_MOST = 1e30f;

template <int KS, bool CAP>
struct fasa_tile_sums {
    static constexpr int MT = KS <= 2 ? 4 : KS <= 4 ? 2 : 1, NT = 4, CELLS = 8 * NT;
    fasa_tile_16<KS> rows[MT];
    float most[MT][2], sum[MT][2];

    __device__ __forceinline__ void load(const half * from) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            rows[m].load(from + m * 16 * 16 * KS);
        }
    }

    // exponentials of NT*8 cells and rows g and g + 8 of the m-th 16
    __device__ __forceinline__ void add_fast(int m, const float (&y)[NT][4]) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) { // which of them is known to the compiler
                const bool poly = i < 2 ? m + 4 < POLY_SUMS : m < POLY_SUMS;
                sum[m][i / 2] += poly ? fasa_exp2_poly(y[n][i], 127.0f / 255) : fasa_exp2(y[n][i]);
            }
        }
    }

    // the same, less what is the largest so far, or near it
    __device__ __forceinline__ void add_slow(int m, float (&y)[NT][4]) {
        float top[2] = { -INFINITY, -INFINITY };
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            top[0] = fmaxf(top[0], fmaxf(y[n][0], y[n][1]));
            top[1] = fmaxf(top[1], fmaxf(y[n][2], y[n][3]));
        }
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            if (top[u] > (sum[m][u] == 0.0f ? -INFINITY : most[m][u] + 16.0f)) {
                sum[m][u]  = sum[m][u] == 0.0f ? 0.0f : sum[m][u] * fasa_exp2(most[m][u] - top[u]);
                most[m][u] = top[u];
            }
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sum[m][i / 2] += fasa_exp2(y[n][i] - most[m][i / 2]);
            }
        }
    }

    // CELLS cells from cell0 on
    template <bool ALL, bool FAST>
    __device__ __forceinline__ void add(
        const fasa_tile_tip_args & a, const fasa_tile_pair & at, int row0, int cell0, const half * keys) {
        fasa_tile_key<KS> cells[NT];
        const int g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            cells[n].load(keys + (int64_t) min(cell0 + 8 * n + g, a.n_cell - 1) * (16 * KS));
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const fasa_tile_hides<ALL> hides(a, at, row0 + 16 * m + g);
            float y[NT][4];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                rows[m].dot(y[n], cells[n]);
                if constexpr (CAP) {
                    fasa_tile_cap(a.soft_cap, y[n]);
                }
                hides.add(cell0 + 8 * n + threadIdx.x % 4 * 2, a.n_kv, y[n]);
            }
            if constexpr (FAST) {
                add_fast(m, y);
            } else {
                add_slow(m, y);
            }
        }
    }

    // the chunks [first, last) of CELLS cells
    template <bool FAST>
    __device__ __forceinline__ void run(const fasa_tile_tip_args & a, const fasa_tile_pair & at, int row0, int first,
        int last, const half * keys, const int8_t * view) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            most[m][0] = most[m][1] = sum[m][0] = sum[m][1] = 0.0f;
        }
#pragma unroll 1
        for (int i = first; i < last; ++i) {
            const fasa_tile_seen seen(view, i * CELLS, CELLS);
            if (seen.all) {
                add<true, FAST>(a, at, row0, i * CELLS, keys);
            } else if (seen.any) {
                add<false, FAST>(a, at, row0, i * CELLS, keys);
            }
        }
    }

    // whether a fast run was right; n: rows from row0 on that there are
    __device__ __forceinline__ bool is_right(int n) const {
        bool right = true;
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const float s = fasa_warp_sum<4>(sum[m][u]);
                right =
                    right && ((s > FAST_LEAST && s < FAST_MOST) || 16 * m + 8 * u + (int) threadIdx.x % 32 / 4 >= n);
            }
        }
        return __all_sync(0xffffffff, right);
    }

    // the four threads of a row put theirs together
    __device__ __forceinline__ void end(float2 * part) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                float x       = sum[m][u] > 0.0f ? most[m][u] : -INFINITY;
                float top     = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
                top           = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
                const float s = fasa_warp_sum<4>(x == -INFINITY ? 0.0f : sum[m][u] * fasa_exp2(x - top));
                if (threadIdx.x % 4 == 0) {
                    part[16 * m + 8 * u + threadIdx.x % 32 / 4] = make_float2(top, s);
                }
            }
        }
    }
};

template <int KS, bool CAP>
static __global__ void __launch_bounds__(32 * TILE_WARPS, 2) fasa_tile_sums_kernel(const fasa_tile_tip_args a) {
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
    x.template run<true>(a, at, row0, first, last, keys, view);
    if (!x.is_right(at.n - row0)) {
        x.template run<false>(a, at, row0, first, last, keys, view);
    }
    x.end(a.part + ((int64_t) pair * a.n_part + part) * a.n_row + row0);
}

// ---- norms: a thread has a row ----

static constexpr int NORM_THREADS = 64;

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
    const float by                       = sum > 0.0f ? FASA_SCORE_EXP - top - log2f(sum) : -INFINITY;
    a.norm[(int64_t) pair * a.n_row + r] = make_float2(by, fasa_exp2(by));
    // then 2^logit, and times 2^by, are numbers
    const int fast = __syncthreads_and(by == -INFINITY || fabsf(by - FASA_SCORE_EXP) < FASA_SCORE_EXP);
    if (threadIdx.x == 0) {
        a.fast[pair * gridDim.x + blockIdx.x] = fast;
    }
}

// ---- pool: a warp has NT*8 cells and all rows ----

template <int KS, bool CAP>
struct fasa_tile_pool {
    static constexpr int NT = KS <= 2 ? 8 : 4, CELLS = 8 * NT;
    fasa_tile_key<KS> cells[NT];
    float pool[NT][2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            pool[n][0] = pool[n][1] = 0.0f;
        }
    }

    // PART: which 16 of every ROWS_STEP rows these are
    template <int PART, bool ALL, bool FAST>
    __device__ __forceinline__ void add(const fasa_tile_tip_args & a, const fasa_tile_pair & at, int row0, int cell0,
        const half * rows, const float2 * norm) {
        row0 += 16 * PART;
        const int g = threadIdx.x % 32 / 4;
        fasa_tile_16<KS> x;
        x.load(rows + row0 * (16 * KS));
        const float2 by[2]   = { norm[row0 + g], norm[row0 + g + 8] };
        const float shift[2] = { (127.0f + by[0].x) * (1.0f / 255), (127.0f + by[1].x) * (1.0f / 255) };
        const fasa_tile_hides<ALL> hides(a, at, row0 + g);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float y[4];
            x.dot(y, cells[n]);
            if constexpr (CAP) {
                fasa_tile_cap(a.soft_cap, y);
            }
            hides.add(cell0 + 8 * n + threadIdx.x % 4 * 2, a.n_kv, y);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int u     = i / 2;
                const bool poly = u == 0 ? PART + 4 < POLY_POOL : PART < POLY_POOL; // known to the compiler
                pool[n][i % 2] += !FAST ? fasa_exp2(y[i] + by[u].x) :
                    poly                ? fasa_exp2_poly(y[i], shift[u]) :
                                          fasa_exp2(y[i]) * by[u].y;
            }
        }
    }

    template <bool ALL, bool FAST>
    __device__ __forceinline__ void run(
        const fasa_tile_tip_args & a, const fasa_tile_pair & at, int cell0, const half * rows, const float2 * norm) {
#pragma unroll 1
        for (int row0 = 0; row0 < at.n; row0 += ROWS_STEP) {
            add<0, ALL, FAST>(a, at, row0, cell0, rows, norm);
            add<1, ALL, FAST>(a, at, row0, cell0, rows, norm);
            add<2, ALL, FAST>(a, at, row0, cell0, rows, norm);
            add<3, ALL, FAST>(a, at, row0, cell0, rows, norm);
        }
    }

    __device__ __forceinline__ void load(const half * keys, int cell0, int n_cell) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            cells[n].load(keys + (int64_t) min(cell0 + 8 * n + (int) threadIdx.x % 32 / 4, n_cell - 1) * (16 * KS));
        }
    }

    __device__ __forceinline__ void end(int n_kv, int cell0, float * dst) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float x = pool[n][i];
#pragma unroll
                for (int by = 16; by >= 4; by /= 2) {
                    x += __shfl_xor_sync(0xffffffff, x, by);
                }
                const int cell = cell0 + 8 * n + threadIdx.x % 4 * 2 + i;
                if (threadIdx.x % 32 < 4 && cell < n_kv) {
                    dst[cell] = x;
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
    const half * rows   = a.rows + (int64_t) pair * a.n_row * (16 * KS);
    const float2 * norm = a.norm + (int64_t) pair * a.n_row;
    pool x;
    x.clear();
    const fasa_tile_seen seen(a.view + at.tile * a.n_view, cell0, pool::CELLS);
    if (seen.any) {
        const int n_fast = a.n_row / NORM_THREADS;
        bool fast        = true;
        for (int i = threadIdx.x % 32; i < n_fast; i += 32) {
            fast = fast && a.fast[pair * n_fast + i];
        }
        fast = __all_sync(0xffffffff, fast);
        x.load((const half *) (a.keys + at.h * a.keys_nb2 + at.stream * a.keys_nb3), cell0, a.n_cell);
        if (fast && seen.all) {
            x.template run<true, true>(a, at, cell0, rows, norm);
        } else if (fast) {
            x.template run<false, true>(a, at, cell0, rows, norm);
        } else {
            x.template run<false, false>(a, at, cell0, rows, norm);
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
    ggml_cuda_pool_alloc<float2> norm(ctx.pool(), (size_t) n_pair * a.n_row);
    ggml_cuda_pool_alloc<int> fast(ctx.pool(), (size_t) n_pair * a.n_row / NORM_THREADS);
    a.rows = rows.get(), a.part = part.get(), a.norm = norm.get(), a.fast = fast.get();

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
