#pragma once

// What attention of sparse prefill takes of a device beside the compute buffer (cuda/tile-fac.cu).

#include <cstdint>

static constexpr uint64_t FASA_TILE_CELLS  = 256; // FATTN_KQ_STRIDE of ggml-cuda: lists are padded to it
static constexpr uint64_t FASA_TILE_TOKENS = 64;  // that its flash attention looks at the mask of at once, at most
static constexpr uint64_t FASA_TILE_ROOM   = 128 << 20; // bytes of gathered rows at a time, if a tile needs no more

struct fasa_tile_shape {
    uint64_t size;   // tokens of a tile
    uint64_t length; // the most cells of a list
    uint64_t n_list, n_head, d;
};

// K, V and mask of the tiles of n_tile that are gathered at a time, and their queries and results in f32. The most for
// lists of any length up to shape.length: of shorter ones more tiles are gathered at a time.
uint64_t fasa_tile_pool_bytes(const fasa_tile_shape & shape, uint32_t n_tile);
