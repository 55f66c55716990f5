#pragma once

// FASA on CUDA: what ggml-cuda calls. Definition of every step: fasa_gguf/reference.py.

#include "ops/ops.h"

struct ggml_backend_cuda_context;

// whether the kernels can run a node of ours on this device
bool fasa_cuda_supported(int device, const ggml_tensor * op);

// a graph is about to be computed, or captured
void fasa_cuda_begin(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph);

// run it; false: not a node of ours
bool fasa_cuda_forward(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// whether a buffer type is FASA-M's: host memory that its device reads and writes in place
bool fasa_cuda_is_host_buft(ggml_backend_buffer_type_t buft);

// whether FASA has kernels for a device at all
bool fasa_cuda_has_kernels(int device);

// what libllama asks the backend for by name: the functions of ops/ops.h; nullptr: none of ours
void * fasa_cuda_proc_address(const char * name);
