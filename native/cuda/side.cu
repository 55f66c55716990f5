// FORK and JOIN: a layer that selects ahead does so on a side stream of its device, beside the feed-forward before it.
//
// ggml-cuda runs each node on the current stream of its context. FORK makes the side stream the current one, behind what
// came before; SELECT, the last node there, changes back; JOIN lets the main stream wait. All in one call of
// graph_compute: a stream that was forked while a CUDA graph is captured must be joined in it. Where the JOIN is in
// another call (the scheduler split the graph, or a callback looks at nodes), the nodes run in the main stream.

#include "cuda/fasa-hooks.cuh"
#include "cuda/nodes.cuh"

#include "common.cuh"
#include "ggml-impl.h"

static constexpr int FASA_SIDE_STREAM = 1;

struct fasa_side {
    cudaEvent_t begin = nullptr, end = nullptr;
    bool forked  = false; // the side stream is the current one
    bool pending = false; // it has ended, and nobody waited yet
};

// of the thread that computes a graph
struct fasa_sides {
    const ggml_cgraph * graph = nullptr;
    int at                    = 0; // nodes before it are done
    fasa_side of[GGML_CUDA_MAX_DEVICES];

    ~fasa_sides() {
        for (auto & side : of) {
            if (side.begin) { // an error: the driver is going down already
                (void) cudaEventDestroy(side.begin);
                (void) cudaEventDestroy(side.end);
            }
        }
    }

    // whether this graph has the JOIN of this FORK
    bool joins(const ggml_tensor * fork) {
        if (graph == nullptr) {
            return false;
        }
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

void fasa_cuda_begin(const ggml_cgraph * graph) {
    fasa_computing.graph = graph;
    fasa_computing.at    = 0;
}

static fasa_side & fasa_side_of(ggml_backend_cuda_context & ctx) {
    auto & side = fasa_computing.of[ctx.device];
    if (side.begin == nullptr) {
        static const char * env = getenv("FASA_CACHE");
        if (env) {
            CUDA_CHECK(cudaDeviceSetCacheConfig(env[0] == 's' ? cudaFuncCachePreferShared : env[0] == 'l' ? cudaFuncCachePreferL1 : cudaFuncCachePreferEqual));
        }
        CUDA_CHECK(cudaEventCreateWithFlags(&side.begin, cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreateWithFlags(&side.end, cudaEventDisableTiming));
    }
    return side;
}

void fasa_cuda_fork(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    auto & side = fasa_side_of(ctx);
    if (ctx.curr_stream_no != 0 || !fasa_computing.joins(dst)) {
        return;
    }
    auto & stream = ctx.streams[ctx.device][FASA_SIDE_STREAM];
    if (stream == nullptr) { // before ggml-cuda makes it, without a priority
        int low, high;
        CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&low, &high));
        static const char * env = getenv("FASA_SIDE_LOW");
        CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, env ? low : high));
    }
    CUDA_CHECK(cudaEventRecord(side.begin, ctx.stream()));
    CUDA_CHECK(cudaStreamWaitEvent(stream, side.begin));
    ctx.curr_stream_no = FASA_SIDE_STREAM;
    side.forked        = true;
}

void fasa_cuda_return(ggml_backend_cuda_context & ctx) {
    auto & side = fasa_side_of(ctx);
    if (side.forked) {
        CUDA_CHECK(cudaEventRecord(side.end, ctx.stream()));
        ctx.curr_stream_no = 0;
        side.forked        = false;
        side.pending       = true;
    }
}

void fasa_cuda_join(ggml_backend_cuda_context & ctx) {
    auto & side = fasa_side_of(ctx);
    if (side.pending) {
        CUDA_CHECK(cudaStreamWaitEvent(ctx.stream(), side.end));
        side.pending = false;
    }
}
