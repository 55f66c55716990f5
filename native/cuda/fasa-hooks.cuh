#pragma once

// FASA on CUDA. ggml-cuda.cu calls the functions up to fasa_cuda_proc_address; the kernels are in cuda/select.cu (TIP
// and SELECT), cuda/fac.cu and cuda/fac-mma.cu (FAC) and, for FASA-M, cuda/fetch.cu and cuda/pinned.cu. Definition of
// every step: fasa_gguf/reference.py.

#include "ops/ops.h"

struct ggml_backend_cuda_context;

// whether the kernels can run a node of ours on this device
bool fasa_cuda_supported(int device, const ggml_tensor * op);

// run it; false: not a node of ours
bool fasa_cuda_forward(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// whether a buffer type is FASA-M's: host memory that its device reads and writes in place
bool fasa_cuda_is_host_buft(ggml_backend_buffer_type_t buft);

// whether FASA has kernels for a device at all
bool fasa_cuda_has_kernels(int device);

// what libllama asks the backend for by name: the functions of ops/ops.h; nullptr: none of ours
void * fasa_cuda_proc_address(const char * name);

ggml_backend_buffer_type_t fasa_cuda_host_buft(ggml_backend_dev_t dev, fasa_on_error_t on_error);
const char * fasa_cuda_host_rates(ggml_backend_dev_t dev, const ggml_tensor * const * k, const ggml_tensor * const * v,
    int n_layer, int n_cells, int n_rows, uint64_t between, fasa_rates * rates);

void fasa_cuda_select(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p);
void fasa_cuda_fac(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p);

void fasa_cuda_stage(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void fasa_cuda_ahead(ggml_backend_cuda_context & ctx, const ggml_tensor * dst);

// The rows of a token's lists on the device: row i of a list is in slot slots[i] & ~FASA_ROW_FETCH of the cache, or,
// where there is no cache or slots[i] is -1, at place i of `rows`
struct fasa_fetched {
    const char * rows; // [length, n_list] rows of `stride` bytes, V at v_at of each; nullptr: k and v are read in place
    const char * cache;    // of the stream, slots of its first KV head
    const int32_t * slots; // [length, n_list] or nullptr
    int64_t cache_nb;      // from KV head to KV head
    int stride, v_at;
};
fasa_fetched fasa_cuda_fetch(ggml_backend_cuda_context & ctx, const ggml_tensor * fac, int token);
