#pragma once

// The layers of a struct fasa_op_case, each with a cache of its own, timed as graphs: for op-time.cpp and probe.cpp.

#include "measure/op-case.h"

#include <vector>

static constexpr int64_t FASA_TIME_CELLS   = 16384; // cells of k and v that are given
// bytes of K and V, and of feed-forwards, that are read in turn, so that no cache of a device holds them
static constexpr int64_t FASA_TIME_BYTES   = 256 << 20;
static constexpr int64_t FASA_BESIDE_BYTES = 128 << 20;

enum fasa_op_time_kind {
    FASA_TIME_DENSE,  // flash attention
    FASA_TIME_SELECT, // TIP and SELECT
    FASA_TIME_FASA,   // and FAC
    FASA_TIME_BESIDE, // a feed-forward
    FASA_TIME_AHEAD,  // TIP and SELECT beside it, then FAC
};

// the weights of a feed-forward, and of what foresees queries
struct fasa_op_beside {
    ggml_tensor *up = nullptr, *down = nullptr; // f16 [n_embd, n_ff], [n_ff, n_embd]
    ggml_tensor * query = nullptr;              // f16 [n_embd, n_dom*n_head], the dominant rows of W_q
};

struct fasa_op_time_run {
    // k, v: FASA_TIME_CELLS rows of the caches' types, which the caches repeat. -1: fasa_error() says why
    int init(const fasa_op_case & c, int n_layer, ggml_type type_k, ggml_type type_v, const std::vector<uint8_t> & k,
        const std::vector<uint8_t> & v);
    double time(fasa_op_time_kind kind, int n_rep);

private:
    ggml_backend_ptr backend;
    ggml_context_ptr ctx, kv_ctx;
    ggml_backend_buffer_ptr buf, kv_buf;
    std::vector<fasa_op_layer_case> layers;
    std::vector<fasa_op_beside> beside;
    ggml_tensor * residual = nullptr; // f32 [n_embd]

    void make_beside(uint64_t bytes, int n_layer, int64_t n_embd, int64_t n_query);
    int set_inputs(const fasa_op_case & c, const std::vector<uint8_t> & k, const std::vector<uint8_t> & v);
};
