#pragma once

// The CPU functions of the nodes of ops/ops.h. ggml calls each of them from all its threads: ith of nth.

#include "ops/ops.h"

void fasa_cpu_tip(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth);
void fasa_cpu_select(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth);
void fasa_cpu_fac(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth);
void fasa_cpu_observe(ggml_tensor * dst, const fasa_op_params & p, int ith);
void fasa_cpu_spread(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth);
void fasa_cpu_tile_refresh(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth);
void fasa_cpu_tile_tip(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth);
void fasa_cpu_tile_select(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth);
void fasa_cpu_tile_fac(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth);

// TIP: K_dom of the stale cells of [first, last), for every stream and KV head; tip: a node with TIP's first sources
void fasa_refresh(const ggml_tensor * tip, const fasa_op_params & p, int64_t first, int64_t last);
// SELECT: factor [n_group][n_span], what turns the exponentials of a span into softmax, times 2^FASA_SCORE_EXP; row: as
// TIP has them, [n_kv] of a head, then e of every span, then their sums; stride: from head to head
void fasa_select_factors(const float * row, int64_t stride, int64_t n_group, int64_t n_kv, float * factor);
