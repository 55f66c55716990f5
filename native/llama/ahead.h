#pragma once

// Selecting ahead: the queries of a layer are foreseen from the residual in front of the feed-forward before it, so that
// its list can be made while that feed-forward runs.
//
//   the graph            residual -> feed-forward -> + residual = sum -> norm, W_q, bias, RoPE -> q
//   what is foreseen     residual -----------------------------------> norm, W_q, bias, RoPE -> q
//
// Nothing here knows an architecture. q's own nodes, from the sum on, are copied with the residual in the sum's place.

#include "core/reasons.h"
#include "fasa.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <functional>
#include <vector>

struct fasa_foreseen {
    fasa_reason reason     = FASA_REASON_AHEAD_UNKNOWN; // FASA_REASON_NONE: they can be foreseen
    ggml_tensor * residual = nullptr;
    ggml_tensor * sum      = nullptr;
    std::vector<ggml_tensor *> nodes;  // from the sum on to q, without the sum, each behind its sources
    std::vector<ggml_tensor *> inputs; // of the graph that they read: positions, ...

    // Bytes that a copy needs, and the copy. room: where it lies, FORK; nullptr: the allocator gives it memory.
    size_t bytes() const;
    ggml_tensor * copy(
        ggml_context * ctx, ggml_tensor * room, const std::function<void(ggml_tensor *)> & on_backend) const;
};

// q: not yet in a graph, all tensors of one context. dev: where its layer runs, nullptr: the CPU.
fasa_foreseen fasa_foresee(ggml_tensor * q, ggml_backend_dev_t dev);

// moves the nodes of the graph from `first` on to right behind `node`, on which alone they depend
void fasa_move_behind(ggml_cgraph * graph, const ggml_tensor * node, int first);
