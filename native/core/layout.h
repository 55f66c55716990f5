#pragma once

// How the dominant keys (K_dom) lie in memory; shared by the CPU and the CUDA ops.
//
// K_dom of a layer is a tensor of bytes [block, n_tile, n_head_kv, n_stream]. A block holds FASA_TILE cells of one KV
// head with the cells innermost, because a SIMD register and a warp both score many cells against one piece of the
// query:
//
//   f16   half   value[n_dom][FASA_TILE]
//   q8    half   scale[n_dom/8][FASA_TILE]; int8  value[n_dom/4][FASA_TILE][4]
//   q4    half   scale[n_dom/8][FASA_TILE]; uint8 pair [n_dom/8][FASA_TILE][4]   low nibble: dim j, high nibble: dim j
//   + 4
//
// A scale covers FASA_GROUP consecutive dominant dimensions of one cell. Four bytes of a cell are one operand of the
// four-way dot products that CPUs have (VNNI), and where every other byte is taken, of the f16 pairs of GPUs' tensor
// cores; a nibble n stands for n - 8.

#include "fasa.h"

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#    define FASA_HOST_DEVICE __host__ __device__
#else
#    define FASA_HOST_DEVICE
#endif

static constexpr int FASA_TILE  = 32; // cells
static constexpr int FASA_GROUP = 8;  // dimensions that share a scale

// bytes of the scales at the start of a block
FASA_HOST_DEVICE constexpr size_t fasa_block_scales(int k_dom, int n_dom) {
    return k_dom == FASA_K_DOM_F16 ? 0 : size_t(n_dom / FASA_GROUP) * FASA_TILE * 2;
}

// bytes of a block; bytes of one cell are this over FASA_TILE
FASA_HOST_DEVICE constexpr size_t fasa_block_bytes(int k_dom, int n_dom) {
    return fasa_block_scales(k_dom, n_dom) +
        (k_dom == FASA_K_DOM_F16       ? size_t(n_dom) * FASA_TILE * 2 :
                k_dom == FASA_K_DOM_Q8 ? size_t(n_dom) * FASA_TILE :
                                         size_t(n_dom / 2) * FASA_TILE);
}

// dominant dimensions of `chunks` chunks: two each, padded to whole groups
constexpr int fasa_n_dom(int chunks) {
    return (2 * chunks + FASA_GROUP - 1) / FASA_GROUP * FASA_GROUP;
}

// the two dimensions of a chunk; layout 0: NORM (2i, 2i+1), 1: NEOX (i, i + n_rot/2); chunks from n_rot/2 on do not
// rotate
inline void fasa_chunk_dims(int chunk, int n_rot, int layout, int32_t out[2]) {
    if (chunk < n_rot / 2 && layout == 1) {
        out[0] = chunk;
        out[1] = chunk + n_rot / 2;
    } else {
        out[0] = 2 * chunk; // the pairs behind the rotated dimensions go on from n_rot
        out[1] = 2 * chunk + 1;
    }
}
