#pragma once

// FASA in ggml-rpc: what a server lets in, and which nodes a client sends. The pointers that op_params carry over the
// wire are those of the client's process. The server replaces them before anything runs.

#include "ops/ops.h"

// Client: whether a node can run on another machine. A custom one only if it is of ours and made for it.
bool fasa_rpc_sends(const ggml_tensor * node);

// Server: makes the custom nodes of a graph from the wire runnable by `backend`. False: one of them is not of ours, or
// is not sound; it was said on stderr, and nothing must run.
bool fasa_rpc_resolve(ggml_backend_t backend, ggml_cgraph * graph);

// Server: `question` is a tensor whose allocation size is asked for. True: it was a client's question whether layers of
// a shape can run sparse on `backend` (fasa_remote_question); *answer is for it.
bool fasa_rpc_answers(ggml_backend_t backend, const ggml_tensor * question, uint64_t * answer);

// why a custom node must not run; nullptr: TIP, SELECT, FAC, SPREAD, FORK or JOIN that touches no memory but its own
const char * fasa_node_fault(const ggml_tensor * node);
