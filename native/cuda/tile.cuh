#pragma once

// What the kernels of sparse prefill share (ops/tile.h). A pair is a tile and a list of it: query heads [head0, head0 +
// n_group) of a KV head. Its rows are its tokens' query heads, row t*n_group + g.

#include "cuda/device.cuh"
#include "ops/tile.h"

// `tiles` of a graph, in device memory
struct fasa_tiles_ref {
    const int32_t * data;
    int stride, size; // 2 + 2*T, T

    fasa_tiles_ref(const ggml_tensor * t)
        : data((const int32_t *) t->data), stride(t->nb[1] / sizeof(int32_t)), size(fasa_tile_size(t)) {}

    __device__ __forceinline__ int stream(int i) const { return data[i * stride]; }
    __device__ __forceinline__ int count(int i) const { return data[i * stride + 1]; }
    __device__ __forceinline__ int token(int i, int t) const { return data[i * stride + 2 + t]; }
    __device__ __forceinline__ int pos(int i, int t) const { return data[i * stride + 2 + size + t]; }
};

// in place of a mask, the positions of the cells: i32 [n_kv rounded up to FASA_SPAN, n_stream]
struct fasa_tile_mask {
    const int32_t * data;
    int64_t stride;

    fasa_tile_mask(const ggml_tensor * cell_pos)
        : data((const int32_t *) cell_pos->data), stride(cell_pos->nb[1] / sizeof(int32_t)) {}

    __device__ __forceinline__ const int32_t * row(int stream) const { return data + stream * stride; }
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
