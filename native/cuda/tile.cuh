#pragma once

// What the kernels of sparse prefill share (ops/tile.h). A pair is a tile and a list of it: query heads [head0, head0 +
// n_group) of a KV head. Its rows are its tokens' query heads, row t*n_group + g.

#include "cuda/device.cuh"
#include "ops/tile.h"

// `tiles` of a graph, in device memory
struct fasa_tiles_ref {
    const int32_t * data;
    int stride; // 2 + T

    fasa_tiles_ref(const ggml_tensor * t) : data((const int32_t *) t->data), stride(t->nb[1] / sizeof(int32_t)) {}

    __device__ __forceinline__ int stream(int i) const { return data[i * stride]; }
    __device__ __forceinline__ int count(int i) const { return data[i * stride + 1]; }
    __device__ __forceinline__ int token(int i, int t) const { return data[i * stride + 2 + t]; }
};

// the mask as the tiles see it: [n_kv, n_tps, 1, n_stream]
struct fasa_tile_mask {
    const char * data;
    int64_t nb1, nb3;
    int n_tps;

    fasa_tile_mask(const ggml_tensor * m)
        : data((const char *) m->data), nb1(m->nb[1]), nb3(m->nb[3]), n_tps(m->ne[1]) {}

    __device__ __forceinline__ const half * row(int token, int stream) const {
        return (const half *) (data + token % n_tps * nb1 + stream * nb3);
    }
};

// y = from + a b, as fasa_mma has them, of 16 between
static __device__ __forceinline__ void fasa_mma_from(
    float (&y)[4], const float (&from)[4], const uint32_t (&a)[4], uint2 b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
        "%12, %13};"
        : "=f"(y[0]), "=f"(y[1]), "=f"(y[2]), "=f"(y[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "f"(from[0]), "f"(from[1]), "f"(from[2]),
        "f"(from[3]));
#else
    y[0] = from[0], y[1] = from[1], y[2] = from[2], y[3] = from[3];
    fasa_mma(y, a, b.x, b.y);
#endif
}
