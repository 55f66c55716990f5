#pragma once

// What a graph holds of FASA: the inputs of its sparse layers, and what decides whether it can be used again.

#include "llama/cache.h"
#include "ops/tile.h"

#include "llama-graph.h"

#include <map>
#include <vector>

// a list that is being selected ahead: JOIN waits for it
struct fasa_pending_list {
    ggml_tensor * list;
    std::vector<ggml_tensor *> held; // what the side stream reads and writes, FORK first
    bool fetched;                    // FETCH brings its rows
};

// One per graph and cache, dense graphs too: it holds the inputs of the sparse layers, refuses the reuse of a graph
// whose branch or settings are no longer right, and counts layers.
struct llm_graph_input_fasa : public llm_graph_input_i {
    fasa_cache * cache;
    uint64_t epoch;
    fasa_reason dense_reason; // of the step as a whole
    uint32_t n_stream;
    bool gpu_waits;                // its layers on GPUs are dense
    bool gpu_prompt_waits = false; // and in a prompt
    int n_sparse          = 0;     // layers, in this graph
    int n_dense           = 0;
    int n_waiting         = 0; // of n_dense, layers on GPUs that wait for a longer context
    int n_behind          = 0; // of n_dense, layers whose dominant keys a sparse graph leaves as they are
    int n_tiled           = 0; // layers of a prompt that run sparse

    const ggml_tensor * mask = nullptr; // of the cache's layers, [n_kv, n_tps, 1, n_stream]
    uint64_t cell_sparse     = 0;       // bytes of K and V of one cell, of all sparse layers
    uint64_t cell_dense      = 0;       // and of the dense ones

    ggml_tensor * ranges       = nullptr; // i32 [2*FASA_MAX_RANGES, n_stream]
    ggml_tensor * staged       = nullptr; // i32 [2*FASA_MAX_RANGES, n_stream], of layers that are staged
    ggml_tensor * forced       = nullptr; // i32 [n_forced, n_tps, n_stream]
    // of layers that select ahead, whose K of this ubatch is not stored yet
    ggml_tensor * ranges_ahead = nullptr; // as ranges
    ggml_tensor * fresh        = nullptr; // i32 [n_tps, n_stream]
    ggml_tensor * forced_ahead = nullptr; // i32 [n_forced + n_tps, n_tps, n_stream]

    fasa_reason prefill_reason_of_step;            // why no layer has tiles: it is no prompt, or dense as a whole
    fasa_reason prefill_reason = FASA_REASON_NONE; // why it, or the first layer that is, is dense
    uint32_t n_tile            = 0;                // tiles of a prompt that runs sparse
    uint32_t n_tile_kv         = 0;                // and the cells that they see
    fasa_tile_inputs tiles     = {};

    std::map<int32_t, ggml_tensor *> lists;       // by the layer that made them
    std::map<int32_t, fasa_pending_list> pending; // of layers that select ahead
    std::vector<int32_t> ahead;                   // these layers

    int64_t first_seen        = -1;      // where the dense layers with a window begin to read; -1: there is none
    ggml_tensor * window_mask = nullptr; // their mask, from there on

    llm_graph_input_fasa(
        fasa_cache * cache, fasa_reason dense_reason, fasa_reason prefill_reason, uint32_t n_stream, bool gpu_waits);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    ggml_tensor * new_input(ggml_context * ctx, int64_t ne0, int64_t ne1, const char * name, int64_t ne2 = 1,
        ggml_type type = GGML_TYPE_I32) const;
    void add_ahead(ggml_context * ctx, int64_t n_tps); // the inputs of layers that select ahead, once

    void add_tiles(ggml_context * ctx, int64_t n_tile, int64_t n_kv); // the inputs of a prompt that runs sparse

private:
    void count_bytes() const;
    void count_tiles() const;
    void set_tiles(int32_t * to, const llama_ubatch & ubatch) const;
};

// that of the graph being built; k: the cache's, [d, n_head_kv, n_kv, n_stream]
llm_graph_input_fasa * fasa_graph_input(const llm_graph_context & graph, fasa_cache * cache, const ggml_tensor * k);
