#pragma once

// What the files of this folder call of each other: the nodes of ops/ops.h, and FASA-M's memory.

#include "ops/ops.h"

struct ggml_backend_cuda_context;

// TIP and SELECT (cuda/select.cu), FAC (cuda/fac.cu)
void fasa_cuda_select(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p);
void fasa_cuda_select_side(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p);
void fasa_cuda_fac(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p);

// sparse prefill (ops/tile.h): REFRESH (cuda/tile-keys.cu), TIP, SELECT, FAC (cuda/tile-*.cu)
void fasa_cuda_tile_refresh(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p);
void fasa_cuda_tile_tip(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p);
void fasa_cuda_tile_select(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p);
void fasa_cuda_tile_fac(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p);

// STAGE and AHEAD (cuda/stage.cu)
void fasa_cuda_stage(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void fasa_cuda_ahead(ggml_backend_cuda_context & ctx, const ggml_tensor * dst);

// SPREAD (cuda/spread.cu)
void fasa_cuda_spread(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// FORK, the end of what runs on the side stream, and JOIN (cuda/side.cu)
void fasa_cuda_fork(ggml_backend_cuda_context & ctx, const ggml_tensor * dst);
bool fasa_cuda_is_forked(const ggml_backend_cuda_context & ctx);
void fasa_cuda_return(ggml_backend_cuda_context & ctx);
void fasa_cuda_join(ggml_backend_cuda_context & ctx);

// functions that libllama asks for by name: fasa_host_buft_t (cuda/pinned.cu), fasa_host_rates_t (cuda/rates.cu)
ggml_backend_buffer_type_t fasa_cuda_host_buft(ggml_backend_dev_t dev, fasa_on_error_t on_error);
const char * fasa_cuda_host_rates(ggml_backend_dev_t dev, const ggml_tensor * const * k, const ggml_tensor * const * v,
    int n_layer, int n_cells, int n_rows, uint64_t between, fasa_rates * rates);

// The rows of a token's lists on the device, as cuda/fetch.cu leaves them (FETCH, or FAC itself). Row i of a list is in
// slot slots[i] & ~FASA_ROW_FETCH of the cache. Where there is no cache or slots[i] is -1, it is at place i of `rows`.
struct fasa_fetched {
    const char * rows; // [length, n_list] rows of `stride` bytes, V at v_at of each; nullptr: k and v are read in place
    const char * cache;    // of the stream, slots of its first KV head
    const int32_t * slots; // [length, n_list] or nullptr
    const int32_t * fresh; // the cell that is read in place, behind FETCH, or nullptr
    int64_t cache_nb;      // from KV head to KV head
    int stride, v_at;
};
// node: FAC or FETCH. Without those that FETCH has brought, where it is FAC.
fasa_fetched fasa_cuda_fetch(ggml_backend_cuda_context & ctx, const ggml_tensor * node, int token);
