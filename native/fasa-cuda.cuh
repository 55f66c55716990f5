#pragma once

// FASA on CUDA. ggml-cuda.cu calls the two functions below, and hands out fasa_cuda_dense_reason by name; the kernels are in
// fasa-cuda-select.cu (TIP and SELECT) and fasa-cuda-fac.cu. Definition of every step: fasa_gguf/reference.py.

#include "fasa-ops.h"

struct ggml_backend_cuda_context;

// whether the kernels can run a node of ours on this device
bool fasa_cuda_supported(int device, const ggml_tensor * op);

// run it; false: not a node of ours
bool fasa_cuda_forward(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

void fasa_cuda_select(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p);
void fasa_cuda_fac   (ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p);

// why layers of this shape are dense on this device, "" when they need not be (type: fasa_dense_reason_t)
extern "C" const char * fasa_cuda_dense_reason(ggml_backend_dev_t dev, const fasa_layer_shape * shape);
