// The estimate of what a device needs while it computes, beside the compute buffer: one for the check before a ubatch
// and for `fasa-gguf plan` (fasa_gguf/memory/plan.py).

#include "fasa.h"

// partial results of matrix products and of attention
static constexpr uint64_t FASA_POOL_OTHER = 16u << 20;

// Activations as blocks of q8_1; beside f16 weights in f16, what goes in and what comes out. Four bytes cover both.
uint64_t fasa_pool_bytes(uint32_t n_act, uint32_t n_tokens) {
    return uint64_t(4) * n_act * n_tokens + FASA_POOL_OTHER;
}
