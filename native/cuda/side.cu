// FORK and JOIN: a layer that selects ahead does so on a side stream of its device, beside the feed-forward before it.
//
// ggml-cuda runs each node on the current stream of its context. FORK makes the side stream the current one, behind
// what came before; the last node there, SELECT or FETCH, changes back; JOIN lets the main stream wait. All in one call
// of graph_compute: a stream that was forked while a CUDA graph is captured must be joined in it. Where the JOIN is in
// another call (the scheduler split the graph, or a callback looks at nodes), the nodes run in the main stream.
//
// Kernels run beside each other on an SM only if they agree on how it divides its memory into L1 and shared memory. All
// of a graph that forks take what SELECT needs; of others, what is best for them.

#include "cuda/fasa-hooks.cuh"
#include "cuda/nodes.cuh"

#include "common.cuh"
#include "ggml-impl.h"

#include <atomic>

static constexpr int FASA_SIDE_STREAM = 1; // ggml-cuda's number

struct fasa_side {
    cudaEvent_t begin = nullptr, end = nullptr;
    bool forked  = false; // the side stream is the current one
    bool pending = false; // it has ended, and nobody waited yet
};

// of the thread that computes a graph
struct fasa_sides {
    const ggml_cgraph * graph = nullptr;
    int at                    = 0; // its nodes before this one are done
    fasa_side of[GGML_CUDA_MAX_DEVICES];

    ~fasa_sides() {
        for (auto & side : of) {
            if (side.begin) { // an error: the driver is going down already
                (void) cudaEventDestroy(side.begin);
                (void) cudaEventDestroy(side.end);
            }
        }
    }

    // whether the graph has the JOIN of this FORK
    bool joins(const ggml_tensor * fork) {
        while (at < graph->n_nodes && graph->nodes[at] != fork) {
            ++at;
        }
        for (int i = at; i < graph->n_nodes; ++i) {
            const fasa_op_params * p = fasa_op_get(graph->nodes[i]);
            if (p && p->kind == FASA_OP_JOIN && graph->nodes[i]->src[1] == fork) {
                return true;
            }
        }
        return false;
    }
};

static thread_local fasa_sides fasa_computing;

// how kernels of a device divide an SM's memory: a setting of the process
static void fasa_divide_memory(int device, bool as_select) {
    static std::atomic<bool> is_set[GGML_CUDA_MAX_DEVICES];
    if (is_set[device].exchange(as_select) != as_select) {
        CUDA_CHECK(cudaDeviceSetCacheConfig(as_select ? cudaFuncCachePreferShared : cudaFuncCachePreferNone));
    }
}

// with GGML_CUDA_GRAPH_OPT=1 ggml-cuda has moved the nodes of its own branches in between
static bool fasa_may_fork() {
    static const char * env = getenv("GGML_CUDA_GRAPH_OPT");
    static const bool may   = env == nullptr || atoi(env) != 1;
    return may;
}

// ggml-cuda's branches know nothing of what our nodes read besides their sources: a graph with such nodes has none
static void fasa_drop_branches(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph) {
    auto & branches = ctx.stream_context();
    for (int i = 0; i < graph->n_nodes && !branches.concurrent_events.empty(); ++i) {
        if (fasa_op_get(graph->nodes[i])) {
            branches.reset();
        }
    }
}

static bool fasa_forks(const ggml_cgraph * graph) {
    for (int i = 0; i < graph->n_nodes; ++i) {
        const fasa_op_params * p = fasa_op_get(graph->nodes[i]);
        if (p && p->kind == FASA_OP_FORK) {
            return true;
        }
    }
    return false;
}

void fasa_cuda_begin(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph) {
    fasa_computing.graph = graph;
    fasa_computing.at    = 0;
    auto & side          = fasa_computing.of[ctx.device];
    fasa_drop_branches(ctx, graph);
    const bool forks     = fasa_may_fork() && fasa_forks(graph);
    fasa_divide_memory(ctx.device, forks);
    if (forks && side.begin == nullptr) {
        CUDA_CHECK(cudaEventCreateWithFlags(&side.begin, cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreateWithFlags(&side.end, cudaEventDisableTiming));
    }
    auto & stream = ctx.streams[ctx.device][FASA_SIDE_STREAM];
    if (forks && stream == nullptr) { // before ggml-cuda makes it, without a priority
        int low, high;
        CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&low, &high));
        CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, high));
    }
}

void fasa_cuda_fork(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    auto & side = fasa_computing.of[ctx.device];
    if (!fasa_may_fork() || ctx.curr_stream_no != 0 || !fasa_computing.joins(dst)) {
        return;
    }
    CUDA_CHECK(cudaEventRecord(side.begin, ctx.stream()));
    CUDA_CHECK(cudaStreamWaitEvent(ctx.stream(ctx.device, FASA_SIDE_STREAM), side.begin));
    ctx.curr_stream_no = FASA_SIDE_STREAM;
    side.forked        = true;
}

bool fasa_cuda_is_forked(const ggml_backend_cuda_context & ctx) {
    return fasa_computing.of[ctx.device].forked;
}

void fasa_cuda_return(ggml_backend_cuda_context & ctx) {
    auto & side = fasa_computing.of[ctx.device];
    CUDA_CHECK(cudaEventRecord(side.end, ctx.stream()));
    ctx.curr_stream_no = 0;
    side.forked        = false;
    side.pending       = true;
}

void fasa_cuda_join(ggml_backend_cuda_context & ctx) {
    auto & side = fasa_computing.of[ctx.device];
    if (side.pending) {
        CUDA_CHECK(cudaStreamWaitEvent(ctx.stream(), side.end));
        side.pending = false;
    }
}
