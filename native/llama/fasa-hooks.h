#pragma once

// The hooks that the patches call, and nothing else. What they do is in llama/cache.cpp, llama/graph.cpp and
// llama/environment.cpp.

#include "llama/cache.h"

struct gguf_context;
struct llama_model;
struct llm_graph_context;

// Before the attention of one layer is built: its list may be selected ahead. q: not yet in the graph; kq_b, v_mla or
// nullptr.
void fasa_begin_attn(const llm_graph_context & graph, const llama_kv_cache_context * mctx, ggml_tensor * q,
    ggml_tensor * kq_b, ggml_tensor * kq_mask, ggml_tensor * v_mla, float kq_scale, int il);

// Attention of one layer with FASA: [d_v*n_head, n_tokens], already expanded into the graph; nullptr: the caller does
// it dense. q [d, n_head, n_tokens] post-RoPE; k, v: the views of the cache that build_attn_mha takes.
ggml_tensor * fasa_build_attn(const llm_graph_context & graph, const llama_kv_cache_context * mctx, ggml_tensor * q,
    ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * kq_mask, ggml_tensor * sinks,
    ggml_tensor * v_mla, float kq_scale, int il);

// For fasa_use_environment: a model was loaded, a context was made, a context goes.
void fasa_on_model(const llama_model * model, const gguf_context * metadata);
void fasa_on_context(llama_context * ctx);
void fasa_on_free(llama_context * ctx);
