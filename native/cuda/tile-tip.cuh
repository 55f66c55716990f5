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

#include "cuda/k-dom.cuh"
#include "cuda/nodes.cuh"
#include "cuda/tile.cuh"

static constexpr int TILE_WARPS = 8;
#ifndef FASA_TILE_POLY_SUMS
#    define FASA_TILE_POLY_SUMS 2
#endif
#ifndef FASA_TILE_POLY_POOL
#    define FASA_TILE_POLY_POOL 2
#endif
static constexpr int POLY_SUMS = FASA_TILE_POLY_SUMS, POLY_POOL = FASA_TILE_POLY_POOL; // of eight rows, by polynomial
static constexpr int ROWS_STEP = 64; // of which there are whole ones in memory

struct fasa_tile_tip_args {
    const char * keys; // REFRESH: f16 [n_pad, cells, n_head_kv, n_stream]
    int64_t keys_nb2, keys_nb3;
    const char * q;
    int64_t q_nb1, q_nb2;
    const int32_t * dims;
    const float * weight;
    const int8_t * view;
    int64_t n_view;
    fasa_tile_mask mask;
    fasa_tiles_ref tiles;
    half * rows;   // [pair][n_row/16][16*n_pad], as fasa_tile_row_at says
    float2 * part; // [pair][n_part][n_row] largest logit (to base 2), sum
    float2 * norm; // [pair][n_row] what a logit is raised by, and 2 to that; -inf: no such row
    int * fast;    // [pair][n_row/NORM_THREADS] whether 2^logit is a number in all of these rows
    float * dst;   // [pair][n_kv]
    int n_kv, n_cell, n_list, n_group, n_per_kv, d, n_dom, n_hadamard, n_row, n_part;
    float scale, soft_cap;
};

// a pair
struct fasa_tile_pair {
    int tile, list, h, stream, n; // n: rows that there are

    __device__ fasa_tile_pair(const fasa_tile_tip_args & a, int pair) {
        tile = pair / a.n_list, list = pair % a.n_list, h = list / a.n_per_kv;
        stream = a.tiles.stream(tile), n = a.tiles.count(tile) * a.n_group;
    }
};

// ---- rows: a warp makes one ----

// Rows lie as threads have them, 16 rows and a step after the other: [step][lane][8]. Where dimension j of row r is
static __device__ __forceinline__ int fasa_tile_row_at(int r, int j, int n_step) {
    const int c = j / (4 * n_step), s = j % (4 * n_step) / 4, lane = r % 8 * 4 + c;
    return (s * 32 + lane) * 8 + j % 4 / 2 * 4 + r / 8 * 2 + j % 2;
}

static __global__ void __launch_bounds__(32 * TILE_WARPS) fasa_tile_rows_kernel(const fasa_tile_tip_args a, int n_pad) {
    extern __shared__ float smem[]; // [TILE_WARPS][d]
    ggml_cuda_pdl_sync();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = blockIdx.x * TILE_WARPS + warp, pair = blockIdx.y;
    if (r >= a.n_row) {
        return;
    }
    const fasa_tile_pair at(a, pair);
    float * row = smem + warp * a.d;
    half * out  = a.rows + ((int64_t) pair * a.n_row + r / 16 * 16) * n_pad;
    float x[MAX_DIM / 32], most = 0.0f;
    if (r < at.n) {
        const int head  = at.list * a.n_group + r % a.n_group;
        const float * q = (const float *) (a.q + a.tiles.token(at.tile, r / a.n_group) * a.q_nb2 + head * a.q_nb1);
        for (int i = lane; i < a.d; i += 32) {
            row[i] = q[i];
        }
        __syncwarp();
        if (a.n_hadamard > 0) {
            fasa_hadamard(row, a.d, a.n_hadamard);
        }
    }
#pragma unroll
    for (int i = 0; i < MAX_DIM / 32; ++i) {
        const int j   = lane + 32 * i;
        const int dim = r < at.n && j < a.n_dom ? a.dims[at.h * a.n_dom + j] : -1;
        x[i]          = dim < 0 ? 0.0f : row[dim] * a.weight[at.h * a.n_dom + j] * a.scale;
        most          = fmaxf(most, fabsf(x[i]));
    }
    most             = fasa_warp_max(most);
    const float step = __fdiv_rn(most, 127.0f), inv = step > 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
    const float by = a.soft_cap > 0.0f ? step : step * LOG2E; // a capped logit is made one to base 2 afterwards
#pragma unroll
    for (int i = 0; i < MAX_DIM / 32; ++i) {
        if (lane + 32 * i < n_pad) {
            out[fasa_tile_row_at(r % 16, lane + 32 * i, n_pad / 16)] = __float2half_rn(rintf(x[i] * inv) * by);
        }
    }
}

// ---- logits ----

// a cell as a thread has it: 4 dimensions a step
template <int KS>
struct fasa_tile_key {
    uint2 x[KS];

    __device__ __forceinline__ void load(const half * key) {
        const half * at = key + threadIdx.x % 4 * (4 * KS);
        if constexpr (KS % 2 == 0) {
#pragma unroll
            for (int i = 0; i < KS / 2; ++i) {
                const uint4 v = ((const uint4 *) at)[i];
                x[2 * i] = make_uint2(v.x, v.y), x[2 * i + 1] = make_uint2(v.z, v.w);
            }
        } else {
#pragma unroll
            for (int i = 0; i < KS; ++i) {
                x[i] = ((const uint2 *) at)[i];
            }
        }
    }
};

// 16 rows
template <int KS>
struct fasa_tile_16 {
    uint4 x[KS];

    __device__ __forceinline__ void load(const half * rows) {
#pragma unroll
        for (int s = 0; s < KS; ++s) {
            x[s] = ((const uint4 *) rows)[s * 32 + threadIdx.x % 32];
        }
    }
    // y: the products
    __device__ __forceinline__ void dot(float (&y)[4], const fasa_tile_key<KS> & cell) const {
        fasa_mma_first(y, x[0], cell.x[0]);
#pragma unroll
        for (int s = 1; s < KS; ++s) {
            fasa_mma(y, { x[s].x, x[s].y, x[s].z, x[s].w }, cell.x[s].x, cell.x[s].y);
        }
    }
};

// 2^(x + by) for -127 < x + by < 128, 0 below and inf above; shift: (127 + by)/255. In 2^n * (1 + f), 1 + f is put
// right by a polynomial; relative error below 0.0035
static __device__ __forceinline__ float fasa_exp2_poly(float x, float shift) {
    float t, m;
    asm("fma.rn.ftz.sat.f32 %0, %1, %2, %3;" : "=f"(t) : "f"(x), "f"(1.0f / 255), "f"(shift));
    const uint32_t z = __float_as_uint(t * (255 * 0x1p14f) + 0x1p23f) << 9;
    asm("lop3.b32 %0, %1, 0x007fffff, %2, 0xea;" : "=f"(m) : "r"(z), "f"(1.0f)); // the mantissa, with 1's exponent
    return __uint_as_float(z) * ((m * 0.23369418f - 0.69417286f) * m + 1.45702398f);
}

// What a warp's cells [first, first + n) are in the eyes of a tile; n: a multiple of 32
struct fasa_tile_seen {
    bool any, all;

    __device__ __forceinline__ fasa_tile_seen(const int8_t * view, int first, int n) {
        any = false, all = true;
        for (int i = 0; i < n; i += 32) {
            const int8_t x = view[first + i + threadIdx.x % 32];
            any            = __any_sync(0xffffffff, x != FASA_SEEN_BY_NONE) || any;
            all            = __all_sync(0xffffffff, x == FASA_SEEN_BY_ALL) && all;
        }
    }
};

// What the mask adds to the logits of rows r and r + 8. ALL: nothing
template <bool ALL>
struct fasa_tile_hides {
    const half * row[2]; // nullptr: there is no such row

    __device__ __forceinline__ fasa_tile_hides(const fasa_tile_tip_args & a, const fasa_tile_pair & at, int r) {
        if constexpr (!ALL) {
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                row[u] =
                    r + 8 * u < at.n ? a.mask.row(a.tiles.token(at.tile, (r + 8 * u) / a.n_group), at.stream) : nullptr;
            }
        }
    }

    // cells `cell` and `cell` + 1
    __device__ __forceinline__ void add(int cell, int n_kv, float (&y)[4]) const {
        if constexpr (!ALL) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float x = row[i / 2] && cell + i % 2 < n_kv ? __half2float(row[i / 2][cell + i % 2]) : -INFINITY;
                y[i]          = x == -INFINITY ? x : y[i] + x * LOG2E; // it may be anything, NaN too
            }
        }
    }
};

static __device__ __forceinline__ void fasa_tile_cap(float soft_cap, float (&y)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        y[i] = fasa_soft_cap(y[i], soft_cap) * LOG2E;
    }
}

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
