// REFRESH of sparse prefill (ops/tile.h).

#include "core/select.h"
#include "cuda/k-dom.cuh"
#include "cuda/nodes.cuh"
#include "cuda/tile.cuh"

// A warp has a tile of FASA_TILE cells of K_dom, a lane one of them.

static constexpr int REFRESH_WARPS = 4;

// Values 8*group to 8*group + 7 of a cell of a tile
template <int K_DOM>
static __device__ __forceinline__ void fasa_k_dom_eight(const char * block, int n_dom, int group, int cell, float * x) {
    const char * data = block + fasa_block_scales(K_DOM, n_dom);
    if constexpr (K_DOM == FASA_K_DOM_F16) {
#pragma unroll
        for (int i = 0; i < FASA_GROUP; ++i) {
            x[i] = __half2float(((const half *) data)[(group * FASA_GROUP + i) * FASA_TILE + cell]);
        }
    } else {
        const float s = __half2float(((const half *) block)[group * FASA_TILE + cell]);
        if constexpr (K_DOM == FASA_K_DOM_Q4) {
            const uint32_t w = ((const uint32_t *) data)[group * FASA_TILE + cell];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                x[i]     = (int(w >> 8 * i & 15) - 8) * s;
                x[i + 4] = (int(w >> (8 * i + 4) & 15) - 8) * s;
            }
        } else {
#pragma unroll
            for (int i = 0; i < FASA_GROUP; ++i) {
                x[i] = ((const int8_t *) data)[((2 * group + i / 4) * FASA_TILE + cell) * 4 + i % 4] * s;
            }
        }
    }
}

// The cell's values in 8 bits with one scale, as they are read back, in f16: out [n_pad]
template <int K_DOM>
static __device__ __forceinline__ void fasa_tile_key(const char * block, int n_dom, int n_pad, int cell, half * out) {
    float most = 0.0f;
    for (int g = 0; g < n_dom / FASA_GROUP; ++g) {
        float x[FASA_GROUP];
        fasa_k_dom_eight<K_DOM>(block, n_dom, g, cell, x);
#pragma unroll
        for (int i = 0; i < FASA_GROUP; ++i) {
            most = fmaxf(most, fabsf(x[i]));
        }
    }
    const float step = __fdiv_rn(most, 127.0f), inv = step > 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
    for (int g = 0; g < n_pad / FASA_GROUP; ++g) {
        float x[FASA_GROUP] = {};
        if (g < n_dom / FASA_GROUP) {
            fasa_k_dom_eight<K_DOM>(block, n_dom, g, cell, x);
        }
        half2 y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            y[i] = __floats2half2_rn(rintf(x[2 * i] * inv) * step, rintf(x[2 * i + 1] * inv) * step);
        }
        ((uint4 *) out)[g] = *(const uint4 *) y;
    }
}

template <int K_DOM>
static __global__ void __launch_bounds__(32 * REFRESH_WARPS) fasa_tile_refresh_kernel(
    const fasa_tip_args a, int n_pad, char * dst, int64_t nb2, int64_t nb3) {
    extern __shared__ float rows[]; // [REFRESH_WARPS][d]
    ggml_cuda_pdl_sync();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, h = blockIdx.y, s = blockIdx.z;
    const int tile = blockIdx.x * REFRESH_WARPS + warp, first = tile * FASA_TILE;
    if (first >= a.n_kv) {
        return;
    }
    int2 stale = { 0, 0 };
    if (lane < FASA_MAX_RANGES) {
        stale = ((const int2 *) a.ranges)[s * FASA_MAX_RANGES + lane];
    }
    fasa_refresh<K_DOM>(a, h, s, stale, first, min(a.n_kv, first + FASA_TILE), rows + warp * a.d);
    const int cell = first + lane;
    if (cell < (a.n_kv + 15) / 16 * 16) {
        fasa_tile_key<K_DOM>(a.k_dom + s * a.k_dom_nb3 + h * a.k_dom_nb2 + tile * a.k_dom_nb1, a.n_dom, n_pad, lane,
            (half *) (dst + s * nb3 + h * nb2) + (int64_t) cell * n_pad);
    }
}

void fasa_cuda_tile_refresh(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p) {
    const ggml_tensor *k_dom = dst->src[0], *k = dst->src[1], *dims = dst->src[4];
    fasa_tip_args a = {};
    a.k_dom         = (char *) k_dom->data;
    a.k             = (const char *) k->data;
    a.ranges        = (const int32_t *) dst->src[2]->data;
    a.dims          = (const int32_t *) dims->data;
    a.k_dom_nb1 = k_dom->nb[1], a.k_dom_nb2 = k_dom->nb[2], a.k_dom_nb3 = k_dom->nb[3];
    a.k_nb1 = k->nb[1], a.k_nb2 = k->nb[2], a.k_nb3 = k->nb[3];
    a.type_k     = k->type;
    a.n_kv       = k->ne[2];
    a.n_dom      = dims->ne[0];
    a.d          = k->ne[0];
    a.n_hadamard = p.n_hadamard;

    const int n_tile = (a.n_kv + FASA_TILE - 1) / FASA_TILE;
    const dim3 grid((n_tile + REFRESH_WARPS - 1) / REFRESH_WARPS, k->ne[1], k->ne[3]);
    const auto run = [&](auto kernel) {
        kernel<<<grid, 32 * REFRESH_WARPS, REFRESH_WARPS * a.d * sizeof(float), ctx.stream()>>>(
            a, (int) fasa_tile_pad(a.n_dom), (char *) dst->data, dst->nb[2], dst->nb[3]);
    };
    switch (p.k_dom) {
        case FASA_K_DOM_F16: run(fasa_tile_refresh_kernel<FASA_K_DOM_F16>); break;
        case FASA_K_DOM_Q8: run(fasa_tile_refresh_kernel<FASA_K_DOM_Q8>); break;
        default: run(fasa_tile_refresh_kernel<FASA_K_DOM_Q4>); break;
    }
    CUDA_CHECK(cudaGetLastError());
}
