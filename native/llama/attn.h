#pragma once

// The attention of one layer in the graph being built: graph.cpp, and graph-tiles.cpp for prompts that are sparse.

#include "llama/ahead.h"
#include "llama/graph-input.h"
#include "ops/ops.h"

#include "llama-graph.h"
#include "llama-kv-cache.h"

#include <utility>

// the attention of one layer: what the hook is given
struct fasa_attn {
    const llm_graph_context & graph;
    const llama_kv_cache_context * mctx;
    ggml_tensor * q;
    ggml_tensor * k;
    ggml_tensor * v;
    ggml_tensor * kq_b;
    ggml_tensor * kq_mask;
    ggml_tensor * sinks;
    ggml_tensor * v_mla;
    float kq_scale;
    int il;

    fasa_cache * cache;
    float soft_cap;
    llm_graph_input_fasa * input = nullptr;

    bool begin(); // whether the layer runs sparse in this graph
    fasa_reason reason() const;
    fasa_reason reason_now() const;
    void observe(const fasa_foreseen & foreseen) const;

    ggml_tensor * build_dense() const;
    ggml_tensor * build_staged() const;
    ggml_tensor * build_window() const;
    ggml_tensor * build_select() const;
    void set_ahead(const fasa_foreseen & foreseen) const;
    void build_ahead(const fasa_foreseen & foreseen) const;
    bool has_room_ahead() const;
    bool can_fetch(const ggml_tensor * residual) const;
    ggml_tensor * build_fetch(ggml_tensor * list) const;
    fasa_select_op select_op() const;
    ggml_tensor * build_fac() const;

    fasa_reason tile_reason() const; // why it is dense in a prompt
    ggml_tensor * build_tiles() const;

    int32_t lender() const;
    int32_t stream0() const { return int32_t(k->view_offs / k->nb[3]); } // as in llama_kv_cache::get_k
    ggml_tensor * on_backend(ggml_tensor * node) const;
    std::pair<ggml_tensor *, ggml_tensor *> staged(int il, ggml_tensor * k, ggml_tensor * v) const;
};
