#pragma once

// Logits of a tile's queries by the tensor cores, for cuda/tile-tip.cuh.

#include "cuda/k-dom.cuh"
#include "cuda/nodes.cuh"
#include "cuda/tile.cuh"

static constexpr int TILE_WARPS = 8;
static constexpr int ROWS_STEP  = 64; // of which there are whole ones in memory

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
    float2 * part; // [pair][n_part][n_row] the sum of 2^logit is y * 2^x
    float * base;  // [pair][n_row/16][32] what a logit is raised by, as fasa_tile_base_at says
    half * factor; // [pair][n_row/16][16] what its exponential is multiplied with, as fasa_tile_factor_at says
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
    return (s * 32 + lane) * 8 + r / 8 * 4 + j % 4;
}

// What a row has of its own, [half of the rows][c][4] and [c][half of the rows][2]: a base lies there twice, here and
// two later
static __device__ __forceinline__ int fasa_tile_base_at(int r) {
    return r / 2 * 4 + r % 2;
}
static __device__ __forceinline__ int fasa_tile_factor_at(int r) {
    return r % 8 / 2 * 4 + r / 8 * 2 + r % 2;
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

// y = from + 16 rows (sums) or cells (pool) times 8 cells or rows
template <int KS>
static __device__ __forceinline__ void fasa_tile_dot(
    float (&y)[4], const float (&from)[4], const uint32_t (&a)[KS][4], const uint2 (&b)[KS]) {
    fasa_mma_from(y, from, a[0], b[0]);
#pragma unroll
    for (int s = 1; s < KS; ++s) {
        fasa_mma(y, a[s], b[s].x, b[s].y);
    }
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

// What is hidden from rows r and r + 8: their logits become -inf. ALL: nothing
template <bool ALL>
struct fasa_tile_hides {
    const int8_t * view;
    const int32_t * cell_pos;
    int pos[2]; // of the rows' tokens; -1: there is no such row

    __device__ __forceinline__ fasa_tile_hides(const fasa_tile_tip_args & a, const fasa_tile_pair & at, int r) {
        if constexpr (!ALL) {
            view = a.view + at.tile * a.n_view, cell_pos = a.mask.row(at.stream);
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                pos[u] = r + 8 * u < at.n ? a.tiles.pos(at.tile, (r + 8 * u) / a.n_group) : -1;
            }
        }
    }

    // cells `cell`, an even number, and `cell` + 1; VIEW and positions go on to a whole span behind the last cell
    __device__ __forceinline__ void add(int cell, int /* n_kv */, float (&y)[4]) const {
        if constexpr (!ALL) {
            const char2 seen   = *(const char2 *) (view + cell);
            const int2 at      = *(const int2 *) (cell_pos + cell);
            const int first[2] = { seen.x == FASA_SEEN_BY_NONE ? INT_MAX : at.x,
                seen.y == FASA_SEEN_BY_NONE ? INT_MAX : at.y };
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                y[i] = first[i % 2] <= pos[i / 2] ? y[i] : -INFINITY; // it may be anything, NaN too
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
