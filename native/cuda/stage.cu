// STAGE and AHEAD, for dense attention of FASA-M: it reads a copy of one layer's K and V in device memory. AHEAD starts
// the copy of the next layer while this one is attended; STAGE then copies only the cells that the ubatch has written.

#include "core/select.h"
#include "cuda/nodes.cuh"
#include "cuda/pinned.cuh"

#include "common.cuh"
#include "ggml-backend-impl.h"

// T: what a thread copies at once. The cells of `fresh`, a stream per blockIdx.y
template <typename T>
static __global__ void fasa_fresh_kernel(
    char * dst, const char * src, const int32_t * fresh, int row, size_t dst_stream, size_t src_stream) {
    ggml_cuda_pdl_sync(); // as in fasa_assign_slots_kernel (cuda/fetch.cu)
    const int s            = blockIdx.y;
    const int32_t * ranges = fresh + s * 2 * FASA_MAX_RANGES;
    dst += s * dst_stream, src += s * src_stream;
    for (int r = 0; r < FASA_MAX_RANGES; ++r) {
        const size_t begin = (size_t) ranges[2 * r] * row / sizeof(T),
                     end   = (size_t) ranges[2 * r + 1] * row / sizeof(T);
        for (size_t i = begin + blockIdx.x * blockDim.x + threadIdx.x; i < end; i += (size_t) gridDim.x * blockDim.x) {
            ((T *) dst)[i] = ((const T *) src)[i];
        }
    }
}

static __global__ void fasa_count_kernel(uint64_t * counter, uint64_t n) {
    ggml_cuda_pdl_sync();
    *counter += n;
}

static bool fasa_is_capturing(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    return status != cudaStreamCaptureStatusNone;
}

// rows of a cache tensor behind each other; the cells of a stream are so already
static void fasa_copy_rows(void * dst, const ggml_tensor * rows, cudaStream_t stream) {
    const size_t size = rows->ne[2] * rows->nb[2];
    for (int64_t s = 0; s < rows->ne[3]; ++s) {
        CUDA_CHECK(cudaMemcpyAsync(
            (char *) dst + s * size, (const char *) rows->data + s * rows->nb[3], size, cudaMemcpyDefault, stream));
    }
}

static fasa_ahead & fasa_ahead_of(const ggml_tensor * rows) {
    return ((fasa_host_buffer *) (rows->view_src ? rows->view_src : rows)->buffer->context)->ahead;
}

void fasa_cuda_stage(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor *src = dst->src[0], *fresh = dst->src[1], *work = dst->src[2];
    auto & ahead          = fasa_ahead_of(src);
    const bool capturing  = fasa_is_capturing(ctx.stream());
    const uint64_t ubatch = *(const uint64_t *) fasa_op_get(dst)->userdata;
    CUDA_CHECK(cudaStreamWaitEvent(ctx.stream(), ahead.end, capturing ? cudaEventWaitExternal : cudaEventWaitDefault));
    bool there = false;
    for (const auto & done : ahead.done) {
        there = there ||
            (!capturing && done.from == src->data && done.to == dst->data && done.size == ggml_nbytes(dst) &&
                done.ubatch == ubatch);
    }
    if (there) {
        const int row = src->nb[2];
        const dim3 grid(64, src->ne[3]);
        const auto * cells = (const int32_t *) fresh->data;
        const auto copy    = [&](auto kernel) {
            kernel<<<grid, 256, 0, ctx.stream()>>>(
                (char *) dst->data, (const char *) src->data, cells, row, dst->nb[3], src->nb[3]);
        };
        const size_t any = row | dst->nb[3] | src->nb[3] | (uintptr_t) dst->data |
            (uintptr_t) src->data; // its lowest bit is their alignment
        any % 16 == 0    ? copy(fasa_fresh_kernel<uint4>) :
            any % 4 == 0 ? copy(fasa_fresh_kernel<uint32_t>) :
                           copy(fasa_fresh_kernel<uint16_t>);
        CUDA_CHECK(cudaGetLastError());
    } else {
        fasa_copy_rows(dst->data, src, ctx.stream());
    }
    if (work) {
        fasa_count_kernel<<<1, 1, 0, ctx.stream()>>>(
            ((fasa_work *) work->data)->counter + fasa_work::BYTES_STAGED, ggml_nbytes(dst));
        CUDA_CHECK(cudaGetLastError());
    }
}

void fasa_cuda_ahead(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    auto & ahead = fasa_ahead_of(dst->src[1]);
    if (fasa_is_capturing(ctx.stream())) { // the graph may end before the next layer: that one copies for itself
        return;
    }
    CUDA_CHECK(cudaEventRecord(ahead.begin, ctx.stream()));
    CUDA_CHECK(cudaStreamWaitEvent(ahead.stream, ahead.begin));
    for (int i = 0; i < 2; ++i) {
        const ggml_tensor *rows = dst->src[1 + i], *place = dst->src[3 + i];
        fasa_copy_rows(place->data, rows, ahead.stream);
        ahead.done[i] = { rows->data, place->data, ggml_nbytes(place), *(const uint64_t *) fasa_op_get(dst)->userdata };
    }
    CUDA_CHECK(cudaEventRecord(ahead.end, ahead.stream));
}
