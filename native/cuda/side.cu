// FORK and JOIN: a layer that selects ahead does so on a side stream of its device, beside the feed-forward before it.
//
// ggml-cuda runs each node on the current stream of its context. FORK makes the side stream the current one, behind what
// came before; SELECT, the last node there, changes back; JOIN lets the main stream wait. All in one call of
// graph_compute. Where the JOIN is in another call (the scheduler split the graph, or a callback looks at nodes), the
// nodes run in the main stream.
//
// In a CUDA graph a kernel whose blocks fill the device holds up all that is behind it in other branches, whatever their
// priority. So the side stream is captured into a graph of its own, which is launched with the main one into a stream of
// high priority. The two wait for each other by numbers in device memory, which the stream itself writes and waits for:
//
//   main      residual .............................. JOIN, FAC
//                |                                     |
//   signal       + write begin, wait end, clear end ---+
//   side graph     wait begin, clear begin, queries, TIP, SELECT, write end
//
// Kernels run beside each other on an SM only if they agree on how it divides its memory into L1 and shared memory. All
// of a graph that forks take what SELECT needs.

#include "cuda/fasa-hooks.cuh"
#include "cuda/nodes.cuh"

#include "common.cuh"
#include "ggml-impl.h"

#include <cuda.h>

#include <map>
#include <mutex>
#include <utility>

static constexpr int FASA_SIDE_STREAM = 1;
static constexpr int FASA_MOST_FORKS  = 1024; // of a graph
static constexpr int FASA_FLAG_STRIDE = 32;   // numbers from flag to flag: each has a cache line

// cuStreamWaitValue32 and cuStreamWriteValue32; nullptr: the driver or the device has none, or launches block
struct fasa_memory_ops {
    typedef CUresult (*op)(CUstream stream, CUdeviceptr at, cuuint32_t value, unsigned int flags);
    op wait = nullptr, write = nullptr;

    fasa_memory_ops() {
        const char * blocking = getenv("CUDA_LAUNCH_BLOCKING"); // the side graph's launch would wait for the main one's
        if (blocking == nullptr || atoi(blocking) == 0) {
            wait  = get("cuStreamWaitValue32");
            write = get("cuStreamWriteValue32");
        }
    }

    static op get(const char * name) {
        void * found = nullptr;
        cudaDriverEntryPointQueryResult result;
        const auto error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? (op) found : nullptr;
    }
};

// of a backend's context
struct fasa_side {
    cudaStream_t signal = nullptr;
    cudaEvent_t begin = nullptr, end = nullptr;
    uint32_t * flags = nullptr;                       // [FASA_MOST_FORKS][begin, end]
    std::map<void *, cudaGraphExec_t> graphs;         // by the main one's
    const ggml_cgraph * graph = nullptr;              // being computed
    int at                    = 0;                    // its nodes before this one are done
    int n_forks               = 0;                    // of this capture, in the side graph
    bool forked               = false;                // the side stream is the current one
    bool pending              = false;                // it has ended, and nobody waited yet
    bool joined               = false;                // and the next kernel waits for it
    bool captures             = false;                // the side stream, into a graph of its own

    uint32_t * flag(int fork, int which) const { return flags + (2 * fork + which) * FASA_FLAG_STRIDE; }

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

// A context that has gone leaves its side behind; one at the same address takes it over, since nothing in it but `graphs`
// depends on the context, and these are captured anew with their main ones.
static fasa_side & fasa_side_of(const ggml_backend_cuda_context & ctx) {
    static std::mutex mutex;
    static std::map<const void *, fasa_side> sides;
    std::lock_guard<std::mutex> lock(mutex);
    return sides[&ctx];
}

static const fasa_memory_ops & fasa_memory_ops_get() {
    static const fasa_memory_ops ops;
    return ops;
}

static void fasa_wait(cudaStream_t stream, const uint32_t * at, uint32_t value) {
    const auto result =
        fasa_memory_ops_get().wait((CUstream) stream, (CUdeviceptr) at, value, CU_STREAM_WAIT_VALUE_EQ);
    GGML_ASSERT(result == CUDA_SUCCESS);
}

static void fasa_write(cudaStream_t stream, const uint32_t * at, uint32_t value) {
    const auto result =
        fasa_memory_ops_get().write((CUstream) stream, (CUdeviceptr) at, value, CU_STREAM_WRITE_VALUE_DEFAULT);
    GGML_ASSERT(result == CUDA_SUCCESS);
}

static bool fasa_is_capturing(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    return status != cudaStreamCaptureStatusNone;
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
    auto & side  = fasa_side_of(ctx);
    side.graph   = graph;
    side.at      = 0;
    side.n_forks = 0;
    if (!fasa_forks(graph)) {
        if (side.signal) { // back to what is best for kernels alone
            CUDA_CHECK(cudaDeviceSetCacheConfig(cudaFuncCachePreferNone));
        }
        return;
    }
    CUDA_CHECK(cudaDeviceSetCacheConfig(cudaFuncCachePreferShared));
    if (side.signal == nullptr) {
        CUDA_CHECK(cudaStreamCreateWithFlags(&side.signal, cudaStreamNonBlocking));
        CUDA_CHECK(cudaEventCreateWithFlags(&side.begin, cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreateWithFlags(&side.end, cudaEventDisableTiming));
        CUDA_CHECK(cudaMalloc(&side.flags, 2 * FASA_MOST_FORKS * FASA_FLAG_STRIDE * sizeof(uint32_t)));
        CUDA_CHECK(cudaMemset(side.flags, 0, 2 * FASA_MOST_FORKS * FASA_FLAG_STRIDE * sizeof(uint32_t)));
    }
    auto & stream = ctx.streams[ctx.device][FASA_SIDE_STREAM];
    if (stream == nullptr) { // before ggml-cuda makes it, without a priority
        int low, high;
        CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&low, &high));
        CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, high));
    }
}

void fasa_cuda_fork(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    auto & side = fasa_side_of(ctx);
    if (ctx.curr_stream_no != 0 || !side.joins(dst)) {
        return;
    }
    const cudaStream_t main = ctx.stream(), stream = ctx.stream(ctx.device, FASA_SIDE_STREAM);
    const auto & ops = fasa_memory_ops_get();
    if (side.n_forks == FASA_MOST_FORKS) {
        return;
    }
    CUDA_CHECK(cudaEventRecord(side.begin, main));
    if (fasa_is_capturing(main) && ops.wait && ops.write) {
        if (!side.captures) {
            CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
            side.captures = true;
        }
        uint32_t *begin = side.flag(side.n_forks, 0), *end = side.flag(side.n_forks, 1);
        CUDA_CHECK(cudaStreamWaitEvent(side.signal, side.begin));
        fasa_write(side.signal, begin, 1);
        fasa_wait(side.signal, end, 1);
        fasa_write(side.signal, end, 0);
        fasa_wait(stream, begin, 1);
        fasa_write(stream, begin, 0);
    } else {
        CUDA_CHECK(cudaStreamWaitEvent(stream, side.begin));
    }
    ctx.curr_stream_no = FASA_SIDE_STREAM;
    side.forked        = true;
}

bool fasa_cuda_is_forked(const ggml_backend_cuda_context & ctx) {
    return fasa_side_of(ctx).forked;
}

void fasa_cuda_return(ggml_backend_cuda_context & ctx) {
    auto & side = fasa_side_of(ctx);
    if (side.captures) {
        fasa_write(ctx.stream(), side.flag(side.n_forks++, 1), 1);
    }
    CUDA_CHECK(cudaEventRecord(side.end, side.captures ? side.signal : ctx.stream()));
    ctx.curr_stream_no = 0;
    side.forked        = false;
    side.pending       = true;
}

void fasa_cuda_join(ggml_backend_cuda_context & ctx) {
    auto & side = fasa_side_of(ctx);
    if (side.pending) {
        CUDA_CHECK(cudaStreamWaitEvent(ctx.stream(), side.end));
        side.pending = false;
        side.joined  = true;
    }
}

bool fasa_cuda_has_joined(const ggml_backend_cuda_context & ctx) {
    return std::exchange(fasa_side_of(ctx).joined, false);
}

void fasa_cuda_launch(ggml_backend_cuda_context & ctx, void * exec, bool captured) {
    auto & side = fasa_side_of(ctx);
    if (captured) {
        auto found = side.graphs.find(exec);
        if (found != side.graphs.end()) {
            CUDA_CHECK(cudaGraphExecDestroy(found->second));
            side.graphs.erase(found);
        }
        if (side.captures) {
            cudaGraph_t graph = nullptr;
            CUDA_CHECK(cudaStreamEndCapture(ctx.stream(ctx.device, FASA_SIDE_STREAM), &graph));
            CUDA_CHECK(cudaGraphInstantiate(&side.graphs[exec], graph, nullptr, nullptr, 0));
            CUDA_CHECK(cudaGraphDestroy(graph));
            side.captures = false;
        }
    }
    const auto found = side.graphs.find(exec);
    if (found != side.graphs.end()) {
        CUDA_CHECK(cudaGraphLaunch(found->second, ctx.stream(ctx.device, FASA_SIDE_STREAM)));
    }
}
