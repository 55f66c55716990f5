#pragma once

// Selecting ahead: the queries of a layer are foreseen from the residual in front of the feed-forward before it, so
// that its list can be made while that feed-forward runs.
//
//   the graph            residual -> feed-forward -> + residual = sum -> norm, W_q, bias, RoPE -> q
//   what is foreseen     residual -----------------------------------> norm, W_q, bias, RoPE -> q
//
// Nothing here knows an architecture. q's own nodes, from the sum on, are copied with the residual in the sum's place.

#include "core/reasons.h"
#include "fasa.h"
#include "ops/ops.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <functional>
#include <vector>

// Where q is one product with a weight, a bias if any, and RoPE: the product's rows that a dimension of a head needs.
struct fasa_query_rows {
    ggml_tensor * product = nullptr; // the node; nullptr: q is made otherwise
    ggml_tensor * bias    = nullptr; // f32 [rows of the product] or none
    ggml_tensor * rope    = nullptr; // the node
    int64_t first, head, dim;        // row of dimension i of head h: first + h*head + i*dim

    ggml_tensor * weight() const { return product->src[0]; }
    int64_t row(int64_t h, int64_t i) const { return first + h * head + i * dim; }
};

// A product with those rows of the weight alone: a fraction of its bytes
struct fasa_dominant_rows {
    const ggml_tensor * of = nullptr; // the weight
    ggml_tensor * weight   = nullptr; // [n_embd, n_dom*n_head], of its type
    ggml_tensor * bias     = nullptr; // f32 [n_dom*n_head] or none
    ggml_tensor * dims     = nullptr; // i32 [n_dom, n_head_kv]
};

struct fasa_foreseen {
    fasa_reason reason     = FASA_REASON_AHEAD_UNKNOWN; // FASA_REASON_NONE: they can be foreseen
    ggml_tensor * residual = nullptr;
    ggml_tensor * sum      = nullptr;
    std::vector<ggml_tensor *> nodes;  // from the sum on to q, without the sum, each behind its sources
    std::vector<ggml_tensor *> inputs; // of the graph that they read: positions, ...

    fasa_query_rows rows() const;

    // Copies of the nodes up to `last`, nullptr: all of them; the last one is the foreseen q.
    std::vector<ggml_tensor *> copy(ggml_context * ctx, const std::function<void(ggml_tensor *)> & on_backend,
        const ggml_tensor * last = nullptr) const;
    // The same with the dominant rows alone: other dimensions of q are 0.
    std::vector<ggml_tensor *> copy_dominant(ggml_context * ctx, const std::function<void(ggml_tensor *)> & on_backend,
        const fasa_query_rows & rows, const fasa_dominant_rows & dominant, const fasa_layer_const * layer) const;
};

// q: not yet in a graph, all tensors of one context. dev: where its layer runs, nullptr: the CPU.
fasa_foreseen fasa_foresee(ggml_tensor * q, ggml_backend_dev_t dev);

// Those of the copies that own memory and are to stay allocated while a side stream is at work. A norm whose product
// with a weight takes its place is left out: held, it could not be fused with that product.
std::vector<ggml_tensor *> fasa_to_hold(const std::vector<ggml_tensor *> & copies);

// moves the nodes of the graph from `first` on to right behind `node`, on which alone they depend
void fasa_move_behind(ggml_cgraph * graph, const ggml_tensor * node, int first);
