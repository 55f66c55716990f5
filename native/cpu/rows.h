#pragma once

// Rows of tensors, and how threads share the work.

#include "cpu/simd.h"

#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <cmath>
#include <cstring>

// dst [n] f32 from n elements of any ggml type that has a to_float
static inline void fasa_row_to_f32(const void * src, float * dst, ggml_type type, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, n * sizeof(float));
    } else if (type == GGML_TYPE_F16) {
#if defined(__AVX512F__)
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {
            const fasa_f32x16 x = fasa_f32_f16((const ggml_fp16_t *) src + i);
            memcpy(dst + i, &x, sizeof(x));
        }
        for (; i < n; ++i) {
            dst[i] = GGML_CPU_FP16_TO_FP32(((const ggml_fp16_t *) src)[i]);
        }
#else
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n);
#endif
    } else {
        ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}

static inline void fasa_prefetch(const char * p, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch(p + i);
    }
}

// Orthonormal Walsh-Hadamard transform of each block of n_block values, in place. It is its own inverse.
static inline void fasa_hadamard(float * x, int64_t n, int64_t n_block) {
    const float scale = 1.0f / sqrtf((float) n_block);
    for (int64_t b = 0; b + n_block <= n; b += n_block) {
        for (int64_t h = 1; h < n_block; h *= 2) {
            for (int64_t i = b; i < b + n_block; i += 2 * h) {
                for (int64_t j = i; j < i + h; ++j) {
                    const float u = x[j], w = x[j + h];
                    x[j]     = u + w;
                    x[j + h] = u - w;
                }
            }
        }
        for (int64_t i = b; i < b + n_block; ++i) {
            x[i] *= scale;
        }
    }
}

// [first, last): the part of [0, n) that thread ith of nth works on
static inline void fasa_split(int64_t n, int ith, int nth, int64_t & first, int64_t & last) {
    first = n * ith / nth;
    last  = n * (ith + 1) / nth;
}

static inline char * fasa_at(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
    return (char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
}
