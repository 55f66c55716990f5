#pragma once

// Cache rows, sums over a warp, products by the tensor cores, and what blocks tell each other, for the FASA kernels.

#include "common.cuh"

#include <type_traits>

static constexpr float LOG2E = 1.44269504f;

// x [8] f32: the values `dim` to `dim` + 7 of a cache row; dim is a multiple of 8
template <ggml_type TYPE>
static __device__ __forceinline__ void fasa_load8(const char * row, int dim, float * x) {
    if constexpr (TYPE == GGML_TYPE_F32) {
        *(float4 *) x       = ((const float4 *) row)[dim / 4];
        *(float4 *) (x + 4) = ((const float4 *) row)[dim / 4 + 1];
    } else if constexpr (TYPE == GGML_TYPE_F16) {
        const uint4 v       = ((const uint4 *) row)[dim / 8];
        const uint32_t w[4] = { v.x, v.y, v.z, v.w };
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 f = __half22float2(*(const half2 *) &w[i]);
            x[2 * i] = f.x, x[2 * i + 1] = f.y;
        }
    } else if constexpr (TYPE == GGML_TYPE_BF16) {
        const uint4 v       = ((const uint4 *) row)[dim / 8];
        const uint32_t w[4] = { v.x, v.y, v.z, v.w };
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = __uint_as_float(w[i] << 16), x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000);
        }
    } else if constexpr (TYPE == GGML_TYPE_Q8_0) {
        const block_q8_0 * b = (const block_q8_0 *) row + dim / QK8_0;
        const uint16_t * w =
            (const uint16_t *) (b->qs + dim % QK8_0); // blocks are 34 bytes: 2 bytes is all that is aligned
        const float d = __half2float(b->d);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = d * (int8_t) (w[i] & 255), x[2 * i + 1] = d * (int8_t) (w[i] >> 8);
        }
    } else {
        const block_q4_0 * b = (const block_q4_0 *) row + dim / QK4_0;
        const uint16_t * w   = (const uint16_t *) (b->qs + dim % 16);
        const int shift      = dim % QK4_0 < 16 ? 0 : 4; // the first half of a block lies in the low nibbles
        const float d        = __half2float(b->d);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = d * ((w[i] >> shift & 15) - 8), x[2 * i + 1] = d * ((w[i] >> (8 + shift) & 15) - 8);
        }
    }
}

static __device__ __forceinline__ void fasa_load8(ggml_type type, const char * row, int dim, float * x) {
    if (type == GGML_TYPE_F16) { // not through a table of jumps
        fasa_load8<GGML_TYPE_F16>(row, dim, x);
        return;
    }
    switch (type) {
        case GGML_TYPE_F32: fasa_load8<GGML_TYPE_F32>(row, dim, x); break;
        case GGML_TYPE_BF16: fasa_load8<GGML_TYPE_BF16>(row, dim, x); break;
        case GGML_TYPE_Q8_0: fasa_load8<GGML_TYPE_Q8_0>(row, dim, x); break;
        default: fasa_load8<GGML_TYPE_Q4_0>(row, dim, x); break;
    }
}

// sum over groups of `WIDTH` neighbouring lanes, maximum over the warp; the same bits in every lane
template <int WIDTH = 32, typename T>
static __device__ __forceinline__ T fasa_warp_sum(T x) {
#if __CUDA_ARCH__ >= 800
    constexpr bool ONE = WIDTH == 32 && std::is_same<T, uint32_t>::value; // one instruction
#else
    constexpr bool ONE = false;
#endif
    if constexpr (ONE) {
        return __reduce_add_sync(0xffffffff, x);
    } else {
#pragma unroll
        for (int half = WIDTH / 2; half > 0; half /= 2) {
            x += __shfl_xor_sync(0xffffffff, x, half);
        }
        return x;
    }
}

static __device__ __forceinline__ float fasa_warp_max(float x) {
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, half));
    }
    return x;
}

// 2^x; 0 for -inf
static __device__ __forceinline__ float fasa_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// cap*tanh(x/cap); tanhf itself is too coarse under -use_fast_math
static __device__ __forceinline__ float fasa_soft_cap(float x, float cap) {
    return cap * (1.0f - 2.0f / (fasa_exp2(x / cap * 2.88539008f) + 1.0f));
}

// c [16, 8] += a [16, 8] b [8, 8] by the tensor cores; thread (g, c) = (lane/4, lane%4) has of a rows g and g + 8,
// columns 2c and 2c + 1, of b rows 2c and 2c + 1 of column g, and of c rows g and g + 8, columns 2c and 2c + 1
static __device__ __forceinline__ void fasa_mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
#if __CUDA_ARCH__ >= 750 // no others have kernels
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
#endif
}
// the same with 16 between: a[2], a[3] and b1 are another eight
static __device__ __forceinline__ void fasa_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    fasa_mma(c, a[0], a[1], b0);
    fasa_mma(c, a[2], a[3], b1);
#endif
}

// ---- between blocks: what was written before a release (by any thread of the block, before a __syncthreads) is there
// after an acquire that sees it ----

static __device__ __forceinline__ void fasa_add_release(uint32_t * x, uint32_t n) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(x), "r"(n) : "memory");
}

static __device__ __forceinline__ uint32_t fasa_load_acquire(const uint32_t * x) {
    uint32_t y;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(y) : "l"(x) : "memory");
    return y;
}

// atomicInc, both
static __device__ __forceinline__ uint32_t fasa_count_up(uint32_t * x, uint32_t last) {
    uint32_t y;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(y) : "l"(x), "r"(last) : "memory");
    return y;
}
