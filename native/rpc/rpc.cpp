#include "rpc/rpc.h"

#include "ggml-impl.h"

#include <map>
#include <memory>
#include <vector>

static bool fasa_is_custom(const ggml_tensor * t) {
    return t->op == GGML_OP_CUSTOM || t->op == GGML_OP_MAP_CUSTOM1 || t->op == GGML_OP_MAP_CUSTOM2 ||
        t->op == GGML_OP_MAP_CUSTOM3;
}

// the function that runs our nodes on a backend; nullptr: it is no CPU, or one without FASA
static ggml_custom_op_t fasa_rpc_function(ggml_backend_t backend) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    return (ggml_custom_op_t) ggml_backend_reg_get_proc_address(reg, "fasa_cpu_op");
}

bool fasa_rpc_sends(const ggml_tensor * t) {
    const fasa_op_params * p = fasa_op_get(t);
    return !fasa_is_custom(t) || (p && p->flags == FASA_REMOTE);
}

// ---- what nodes of a graph that came over the wire point to: this process's own ----

// Kept as long as the graph may be computed again, which is until the next one of its backend comes. A server has one
// client at a time.
static std::map<ggml_backend_t, std::vector<std::unique_ptr<fasa_layer_const>>> fasa_rpc_layers;

static const fasa_layer_const * fasa_rpc_layer(ggml_backend_t backend, const ggml_tensor * counts) {
    auto * stats  = counts ? (fasa_stats *) counts->data : nullptr;
    auto & layers = fasa_rpc_layers[backend];
    for (const auto & layer : layers) {
        if (layer->stats == stats) {
            return layer.get();
        }
    }
    layers.push_back(std::make_unique<fasa_layer_const>());
    layers.back()->stats = stats;
    return layers.back().get();
}

// the last source: where what the ops do is counted; nullptr: nowhere
static bool fasa_rpc_counts(const ggml_tensor * counts) {
    return counts == nullptr ||
        (counts->type == GGML_TYPE_I8 && counts->buffer && ggml_backend_buffer_is_host(counts->buffer) &&
            ggml_is_contiguous(counts) && (size_t) ggml_nbytes(counts) == sizeof(fasa_stats) &&
            (uintptr_t) counts->data % alignof(fasa_stats) == 0);
}

bool fasa_rpc_resolve(ggml_backend_t backend, ggml_cgraph * graph) {
    fasa_rpc_layers[backend].clear();
    const ggml_custom_op_t function = fasa_rpc_function(backend);
    for (int i = 0; i < graph->n_nodes; ++i) {
        ggml_tensor * node = graph->nodes[i];
        if (node == nullptr || !fasa_is_custom(node)) {
            continue;
        }
        const ggml_tensor * counts = node->src[FASA_COUNTS_AT];
        const char * fault         = !function ? "this device has no FASA" : fasa_node_fault(node);
        if (fault == nullptr && !fasa_rpc_counts(counts)) {
            fault = "counts";
        }
        if (fault) {
            GGML_LOG_ERROR("fasa: the custom node %d (%.32s) from the wire is refused: %s\n", i, node->name, fault);
            return false;
        }
        auto * p    = (fasa_op_params *) node->op_params;
        p->fun      = function;
        p->n_tasks  = GGML_N_TASKS_MAX;
        p->flags    = 0;
        p->userdata = const_cast<fasa_layer_const *>(fasa_rpc_layer(backend, counts));
    }
    return true;
}

bool fasa_rpc_answers(ggml_backend_t backend, const ggml_tensor * t, uint64_t * answer) {
    const fasa_op_params * p = fasa_op_get(t);
    if (p == nullptr || p->kind != FASA_OP_ASK) {
        return false;
    }
    uint64_t build;
    memcpy(&build, &p->userdata, sizeof(build)); // a number
    *answer = fasa_remote_answer(build != FASA_BUILD_HASH ? FASA_REASON_REMOTE_BUILD :
            !fasa_rpc_function(backend)                   ? FASA_REASON_REMOTE_DEVICE :
                                                            FASA_REASON_NONE);
    return true;
}
