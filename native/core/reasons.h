#pragma once

#include "fasa.h"

#include <cstdint>

// dense or FASA, from what stays the same while a graph is reused; decodes: it is no prompt. FASA_REASON_NONE: FASA
fasa_reason fasa_step_dense_reason(const fasa_params & p, bool decodes, uint32_t n_kv);

// whether a layer on a GPU stays dense in a step that is sparse elsewhere (FASA_REASON_MIN_CONTEXT_GPU)
bool fasa_gpu_waits(const fasa_params & p, const fasa_gpu_limit & limit, uint32_t n_kv);
