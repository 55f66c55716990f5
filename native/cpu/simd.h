#pragma once

// Vectors of 16 floats or integers, one for each cell. The compiler splits them where the machine's are shorter.

#include "ops/ops.h"

#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "vec.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#    if defined(__GNUC__) && !defined(__clang__)
#        pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // gcc 12 warns about its own intrinsics
#    endif
#    include <immintrin.h>
#endif

typedef float fasa_f32x16 __attribute__((vector_size(64)));
typedef int32_t fasa_i32x16 __attribute__((vector_size(64)));

template <typename V, typename T>
static inline V fasa_load(const T * p) {
    V v;
    memcpy(&v, p, sizeof(v));
    return v;
}

static inline fasa_f32x16 fasa_f32_f16(const void * p) {
#if defined(__AVX512F__)
    return (fasa_f32x16) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
#else
    float x[16];
    ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) p, x, 16);
    return fasa_load<fasa_f32x16>(x);
#endif
}

// sum [16] + the dot product of 4 unsigned bytes of each x with the 4 signed bytes of q
static inline fasa_i32x16 fasa_dot4(fasa_i32x16 sum, fasa_i32x16 x, int32_t q) {
#if defined(__AVX512VNNI__)
    return (fasa_i32x16) _mm512_dpbusd_epi32((__m512i) sum, (__m512i) x, _mm512_set1_epi32(q));
#elif defined(__AVX2__)
    const __m256i even = _mm256_set1_epi32((uint16_t) (int8_t) q | (uint32_t) (int8_t) (q >> 16) << 16);
    const __m256i odd  = _mm256_set1_epi32((uint16_t) (int8_t) (q >> 8) | (uint32_t) (int8_t) (q >> 24) << 16);
    __m256i half[2], acc[2];
    memcpy(half, &x, sizeof(x));
    memcpy(acc, &sum, sizeof(sum));
    for (int i = 0; i < 2; ++i) {
        const __m256i lo = _mm256_and_si256(half[i], _mm256_set1_epi16(255)), hi = _mm256_srli_epi16(half[i], 8);
        acc[i] = _mm256_add_epi32(acc[i], _mm256_add_epi32(_mm256_madd_epi16(lo, even), _mm256_madd_epi16(hi, odd)));
    }
    memcpy(&sum, acc, sizeof(sum));
    return sum;
#else
    return sum + (x & 255) * (int8_t) q + ((x >> 8) & 255) * (int8_t) (q >> 8) +
        ((x >> 16) & 255) * (int8_t) (q >> 16) + ((x >> 24) & 255) * (int8_t) (q >> 24);
#endif
}

// x*f + sum, rounded once where the machine can. CUDA computes its scores so, and not every compiler contracts.
static inline fasa_f32x16 fasa_fma(fasa_f32x16 x, float f, fasa_f32x16 sum) {
#if defined(__AVX512F__)
    return (fasa_f32x16) _mm512_fmadd_ps((__m512) x, _mm512_set1_ps(f), (__m512) sum);
#elif defined(__AVX2__) && defined(__FMA__)
    __m256 a[2], b[2];
    memcpy(a, &x, sizeof(x));
    memcpy(b, &sum, sizeof(sum));
    for (int i = 0; i < 2; ++i) {
        b[i] = _mm256_fmadd_ps(a[i], _mm256_set1_ps(f), b[i]);
    }
    memcpy(&sum, b, sizeof(sum));
    return sum;
#else
    return x * f + sum;
#endif
}

static inline fasa_f32x16 fasa_f32_i32(fasa_i32x16 x) {
#if defined(__AVX512F__)
    return (fasa_f32x16) _mm512_cvtepi32_ps((__m512i) x);
#else
    return __builtin_convertvector(x, fasa_f32x16);
#endif
}

// e^x/2^e for x <= 2^20, relative error below 2e-7. 0 where that is below 2^-FASA_SPAN_RANGE, so e^-inf = 0. The
// mantissa is that of e^x, whatever e is.
static inline fasa_f32x16 fasa_exp(fasa_f32x16 x, float e) {
    const fasa_i32x16 keep = x * 1.44269504f > e - FASA_SPAN_RANGE;
    x                      = (fasa_f32x16) ((fasa_i32x16) x & keep);
#if defined(__AVX512F__)
    const fasa_f32x16 n = (fasa_f32x16) _mm512_roundscale_ps((__m512) (x * 1.44269504f), 0);
#else
    const fasa_f32x16 shift = x * 1.44269504f + 12582912.0f; // 1.5*2^23: the integer part lands in the low bits
    const fasa_f32x16 n     = shift - 12582912.0f;
#endif
    const fasa_f32x16 r = (x * 1.44268798828125f - n) + x * 7.05259771e-6f; // 2^r, r in [-0.5, 0.5]
    fasa_f32x16 p       = r * 1.32647272e-3f + 9.67151315e-3f;
    p                   = p * r + 5.55073375e-2f;
    p                   = p * r + 2.40222421e-1f;
    p                   = p * r + 6.93146978e-1f;
    p                   = p * r + 1.0f;
#if defined(__AVX512F__)
    return (fasa_f32x16) _mm512_maskz_scalef_ps(
        _mm512_test_epi32_mask((__m512i) keep, (__m512i) keep), (__m512) p, (__m512) (n - e));
#else
    const fasa_i32x16 pow2 = (((fasa_i32x16) shift - 0x4b400000) + (127 - (int32_t) e)) << 23;
    return (fasa_f32x16) ((fasa_i32x16) (p * (fasa_f32x16) pow2) & keep);
#endif
}

// cap*tanh(x/cap), to 1e-7 of cap: tanh y = 1 - 2/(e^2y + 1)
static inline fasa_f32x16 fasa_soft_cap(fasa_f32x16 x, float cap) {
    fasa_f32x16 y = x * (2.0f / cap);
    y             = y > 80.0f ? fasa_f32x16{} + 80.0f : y;
    return cap - 2.0f * cap / (fasa_exp(y, 0.0f) + 1.0f);
}

typedef float fasa_f32x8 __attribute__((vector_size(32)));
typedef float fasa_f32x4 __attribute__((vector_size(16)));
typedef int32_t fasa_i32x4 __attribute__((vector_size(16)));

static inline float fasa_sum(fasa_f32x16 v) {
    fasa_f32x8 h[2];
    memcpy(h, &v, sizeof(v));
    h[0] += h[1];
    fasa_f32x4 q[2];
    memcpy(q, h, sizeof(h[0]));
    q[0] += q[1];
    return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

static inline float fasa_max(const float * x, int64_t n) {
    fasa_f32x16 m = fasa_f32x16{} - INFINITY;
    int64_t i     = 0;
    for (; i + 16 <= n; i += 16) {
        const fasa_f32x16 v = fasa_load<fasa_f32x16>(x + i);
        m                   = v > m ? v : m;
    }
    float most = -INFINITY;
    for (; i < n; ++i) {
        most = std::max(most, x[i]);
    }
    for (int l = 0; l < 16; ++l) {
        most = std::max(most, m[l]);
    }
    return most;
}
