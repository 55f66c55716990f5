#pragma once

// Included before everything in ggml-cpu, of the stock build too (CMakeLists.txt).
//
// ggml adds up V in steps of GGML_F16_STEP values and the rest of a head value by value, some 20 times slower. With
// AVX512-FP16 a step is four vectors, 128 values: too long for heads of 64, 80 and 96. Two vectors are as fast.

#if defined(__AVX512FP16__)
#    include "simd-mappings.h"
#    if GGML_F16_STEP != 128
#        error "simd-mappings.h has changed: are steps of 64 values still right?"
#    endif
#    undef GGML_F16_STEP
#    define GGML_F16_STEP 64
#endif
