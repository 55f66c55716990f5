#pragma once

// The CPU functions of the nodes of ops/ops.h. ggml calls each of them from all its threads: ith of nth.

#include "ops/ops.h"

void fasa_cpu_tip(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth);
void fasa_cpu_select(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth);
void fasa_cpu_fac(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth);
void fasa_cpu_observe(ggml_tensor * dst, const fasa_op_params & p, int ith);
void fasa_cpu_spread(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth);
