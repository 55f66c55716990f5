#pragma once

// Force-included into ggml-cpu of both builds, patched and stock (CMakeLists.txt): smaller steps of ggml's f16 vectors.
//
// ggml_vec_mad_f16 and ggml_vec_scale_f16 (V in flash attention) take GGML_F16_STEP values at a time,
// ggml_vec_dot_f16 (Q*K) GGML_F16_DOT_STEP, and what is left of a head value by value, which costs some 20 times as
// much. Upstream's steps are four vectors: 64 values with AVX512, 128 with AVX512-FP16. So heads of 80 and 96, and of
// 64 with AVX512-FP16, run mostly value by value. With steps of 16 values every head that is a multiple of 16 runs in
// vectors. One vector a step costs these nothing: mad and scale have no chain from vector to vector, and the dot
// products of several rows overlap.
//
// Other instruction sets are left as upstream has them.

#if defined(__AVX512F__)

#    include "simd-mappings.h"

#    if !defined(GGML_F16_STEP) || !defined(GGML_F16_DOT_STEP) || !defined(GGML_F16_DOT_VEC_REDUCE)
#        error                                                                                                         \
            "simd-mappings.h has changed: look at its AVX512 part and at ggml_vec_dot_f16, then at native/cpu/f16-step.h"
#    endif

#    undef GGML_F16_STEP
#    define GGML_F16_STEP 16

#    if defined(__AVX512FP16__)
// vectors of 16 instead of 32 f16; the sums stay in f16
#        undef GGML_F16_EPR
#        undef GGML_F16_VEC
#        undef GGML_F16_VEC_ZERO
#        undef GGML_F16_VEC_SET1
#        undef GGML_F16_VEC_LOAD
#        undef GGML_F16_VEC_STORE
#        undef GGML_F16_VEC_FMA
#        undef GGML_F16_VEC_ADD
#        undef GGML_F16_VEC_MUL
#        undef GGML_F16_VEC_REDUCE
#        define GGML_F16_EPR                16
#        define GGML_F16_VEC                __m256h
#        define GGML_F16_VEC_ZERO           _mm256_setzero_ph()
#        define GGML_F16_VEC_SET1(x)        _mm256_set1_ph(__extension__(_Float16)(x))
#        define GGML_F16_VEC_LOAD(p, i)     _mm256_loadu_ph(p)
#        define GGML_F16_VEC_STORE(p, r, i) _mm256_storeu_ph(p, r[i])
#        define GGML_F16_VEC_FMA(a, b, c)   _mm256_fmadd_ph(b, c, a)
#        define GGML_F16_VEC_ADD            _mm256_add_ph
#        define GGML_F16_VEC_MUL            _mm256_mul_ph
#        define GGML_F16_VEC_REDUCE(res, x) (res) = (ggml_float) _mm256_reduce_add_ph((x)[0])
#    endif

// dot products are of 16 values in f32 in both cases; one vector is summed
#    undef GGML_F16_DOT_STEP
#    undef GGML_F16_DOT_VEC_REDUCE
#    define GGML_F16_DOT_STEP 16
#    undef GGML_F16_DOT_ARR
#    define GGML_F16_DOT_ARR                1
#    define GGML_F16_DOT_VEC_REDUCE(res, x) (res) = (ggml_float) _mm512_reduce_add_ps((x)[0])

#endif
