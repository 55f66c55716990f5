// The estimate of what a device needs while it computes, beside the compute buffer: one for the check before a ubatch
// and for `fasa-gguf plan` (fasa_gguf/memory/plan.py).

#include "core/memory.h"

#include "fasa.h"

#include <algorithm>

// partial results of matrix products and of attention
static constexpr uint64_t FASA_POOL_OTHER = 16u << 20;

// Activations as blocks of q8_1; beside f16 weights in f16, what goes in and what comes out. Four bytes cover both.
uint64_t fasa_pool_bytes(uint32_t n_act, uint32_t n_tokens) {
    return uint64_t(4) * n_act * n_tokens + FASA_POOL_OTHER;
}

static uint64_t fasa_steps(uint64_t n, uint64_t step) {
    return (n + step - 1) / step * step;
}

uint64_t fasa_tile_pool_bytes(const fasa_tile_shape & s, uint32_t n_tile) {
    const uint64_t size = fasa_steps(s.size, FASA_TILE_TOKENS), queries = 8 * size * s.n_head * s.d;
    uint64_t most = 0;
    for (uint64_t n = FASA_TILE_CELLS; n < s.length + 1 + FASA_TILE_CELLS; n += FASA_TILE_CELLS) {
        const uint64_t rows = s.n_list * n * (4 * s.d + 2 * size);
        const uint64_t turn = std::min<uint64_t>(n_tile, std::max<uint64_t>(1, FASA_TILE_ROOM / rows));
        most                = std::max(most, turn * (rows + queries));
    }
    return most;
}
