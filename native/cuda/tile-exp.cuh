#pragma once

// Exponentials of many logits for cuda/tile-tip.cuh, by bits and without the special function unit, and their sums by
// the tensor cores.
//
// A logit to base 2 and an offset of its row are t, octaves above the lower end of a window of 32. t in steps of 1/64
// is a whole number of 11 bits, which are the exponent and six bits of the mantissa of 2^t, linear between powers of
// two: too large by 6.2% at the most. Offsets are whole octaves, and a row's exponentials are divided by the sum of the
// same numbers: so they add up to 1, and what is left is how far a cell is from the mean of its row's cells, -5.8%
// to 6.2% at the worst and -3.9% to 2% where they are many.
//
// tests/native/test_tile_exponentials.py has it in numpy.

#include "cuda/device.cuh"

#include <cuda_fp16.h>

static constexpr float TILE_WINDOW = 32.0f, TILE_EXP_SHIFT = 15.0f; // octaves; 2^t is made as 2^(t - TILE_EXP_SHIFT)

// t0 (low half) and t1 in steps; 0 where there is no more, -inf too, and 0x800 or more above the window and for NaN
static __device__ __forceinline__ uint32_t fasa_tile_steps(float t0, float t1) {
    const half2 t    = __floats2half2_rn(t0, t1);                 // of 16 to 32, in steps already
    const uint32_t x = *(const uint32_t *) &t, unit = 0x00400040; // 2^-18: a step becomes 2^-24, f16's least number
    uint32_t y;
#if __CUDA_ARCH__ >= 800
    asm("fma.rn.relu.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(unit), "r"(0));
#else
    const half2 product = __hmul2(*(const half2 *) &x, *(const half2 *) &unit);
    y                   = *(const uint32_t *) &product;
    y &= ~((y >> 15 & 0x00010001) * 0xffff);
#endif
    return y;
}

// two 2^(t - 15) in f16; t < 31
static __device__ __forceinline__ uint32_t fasa_tile_exp(uint32_t steps) {
    return steps << 4;
}

// A word of which a bit of TILE_BEYOND says that one of the two was above the window
static constexpr uint32_t TILE_BEYOND = 0xf800f800;

static __device__ __forceinline__ uint32_t fasa_tile_beyond(uint32_t steps) {
#if __CUDA_ARCH__ >= 800
    return steps;
#else
    return steps + 0x00400040; // f16 ends an octave earlier
#endif
}

// c [16, 8] += in every column the sums of the rows of 2^(t - 15), t [16, 16] as an operand A of fasa_mma
static __device__ __forceinline__ void fasa_tile_sum(float (&c)[4], const uint32_t (&steps)[4]) {
#if __CUDA_ARCH__ >= 800
    // in bf16 a step is the last bit but one, and the window has no end: 2^(t - 127), times 2^112
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %8}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(steps[0] << 1), "r"(steps[1] << 1), "r"(steps[2] << 1), "r"(steps[3] << 1), "r"(0x77807780));
#else
    const uint32_t x[4] = { fasa_tile_exp(steps[0]), fasa_tile_exp(steps[1]), fasa_tile_exp(steps[2]),
        fasa_tile_exp(steps[3]) };
    fasa_mma(c, x, 0x3c003c00, 0x3c003c00);
#endif
}
