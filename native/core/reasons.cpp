// Why attention is dense: texts from the table in fasa_gguf/reasons.py, and the reasons that need no model.

#include "core/reasons.h"
#include "core/tables.h"

static const char * const fasa_reason_texts[] = {
#define X(NAME, text) text,
    FASA_REASONS(X)
#undef X
};

const char * fasa_reason_text(int32_t reason) {
    const int32_t n = sizeof(fasa_reason_texts) / sizeof(fasa_reason_texts[0]);
    return reason >= 0 && reason < n ? fasa_reason_texts[reason] : nullptr;
}

fasa_reason fasa_step_dense_reason(const fasa_params & p, bool decodes, uint32_t n_kv) {
    if (!p.enabled) {
        return FASA_REASON_OFF;
    }
    if (!decodes) {
        return FASA_REASON_PREFILL;
    }
    return n_kv < p.min_context ? FASA_REASON_MIN_CONTEXT : FASA_REASON_NONE;
}

bool fasa_gpu_waits(const fasa_params & p, const fasa_gpu_limit & limit, uint32_t n_kv) {
    return p.min_context > 0 && n_kv < limit.cells;
}
