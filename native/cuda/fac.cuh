#pragma once

// What FAC's kernels share: their arguments, the row of a cell, and how the parts of a list are added up.
//
// A list is split over blocks and warps in turns, whatever its count, so that its cells can be read together with the
// count. Every warp leaves a part, and every block adds up those of its warps. The last block of a list to be done adds
// up those of the blocks, in the order of the list, so the result does not depend on which block that is.

#include "cuda/device.cuh"
#include "cuda/nodes.cuh"

static constexpr int MAX_PARTS = 16; // blocks of a list, warps of a block

struct fasa_fac_args {
    float * dst;          // [d, n_head, n_tps, n_stream]
    const int32_t * list; // [n_list_len, n_list, n_tps, n_stream]
    const char *q, *k, *v, *mask;
    const float * sinks; // [n_head] or nullptr
    fasa_work * work;
    float * part; // [share][split][M][stride]
    int64_t q_nb1, q_nb2, k_nb1, k_nb2, k_nb3, v_nb1, v_nb2, v_nb3, mask_nb1, mask_nb3;
    ggml_type type_k, type_v;
    fasa_fetched fetched;
    int token0;  // of this launch
    bool joined; // the list is not from a SELECT right before it in the same stream
    int n_list_len, n_list, n_head, n_shared, d;
    uint3 by_n_tps, by_n_group, by_n_chunk; // fastdiv
    float scale, soft_cap;
    uint64_t row_bytes;
};

// a part of M query heads: [M][stride] f32: values [d], the largest logit (to base 2), the sum of the weights
static constexpr __host__ __device__ int fasa_part_stride(int d) {
    return d + 4;
}

// A block's share of the work: query heads [head0, head0 + n_m) over part `split` of n_split of a token's list
struct fasa_fac_share {
    int token, list, head0, n_m, split, n_split;
    int index; // of `part` and of the tickets: the same for all n_split blocks
};

template <int M>
static __device__ __forceinline__ fasa_fac_share fasa_fac_share_of(const fasa_fac_args & a) {
    const uint2 at = fast_div_modulo(blockIdx.y, a.by_n_chunk);
    const int list = at.x, chunk = at.y;
    return { a.token0 + (int) blockIdx.z, list, list * a.n_shared + chunk * M, min(M, a.n_shared - chunk * M),
        (int) blockIdx.x, (int) gridDim.x, (int) (blockIdx.z * gridDim.y + blockIdx.y) };
}

// the cell whose row is read in place where the others are not, or -1
static __device__ __forceinline__ int fasa_fac_fresh(const fasa_fac_args & a) {
    return a.fetched.fresh ? *a.fetched.fresh : -1;
}

// Where K and V of the cell lie that is i-th of a list. FETCHED: not read in place, unless it is `fresh`
struct fasa_fac_row {
    const char *key, *value;
};
template <bool FETCHED>
static __device__ __forceinline__ fasa_fac_row fasa_fac_row_of(
    const fasa_fac_args & a, const char * k, const char * v, int list, int h, int i, int64_t cell, int fresh) {
    if (!FETCHED || cell == fresh) {
        return { k + cell * a.k_nb2, v + cell * a.v_nb2 };
    }
    const int64_t place = (int64_t) list * (a.n_list_len - 1) + i;
    const int slot      = a.fetched.slots ? a.fetched.slots[place] : -1;
    const char * key    = slot < 0 ?
        a.fetched.rows + place * a.fetched.stride :
        a.fetched.cache + h * a.fetched.cache_nb + (int64_t) (slot & ~FASA_ROW_FETCH) * a.fetched.stride;
    return { key, key + a.fetched.v_at };
}

// Adds up parts [n_part][step], into a part in `out`, or into finished values with `done`. Two neighbouring threads
// share four dimensions.
static __device__ __forceinline__ void fasa_fac_add(
    const float * parts, int n_part, int step, int n_m, int d, float * out, bool done, const float * sinks) {
    constexpr int MINE = MAX_PARTS / 2;
    const int quads = d / 4, stride = fasa_part_stride(d), n = n_m * quads, half = threadIdx.x % 2;
#pragma unroll 1
    for (int i = threadIdx.x / 2; i - (int) threadIdx.x % 32 / 2 < n; i += blockDim.x / 2) {
        const int m = min(i, n - 1) / quads, j = min(i, n - 1) % quads * 4;
        float2 end[MINE];
        float4 value[MINE];
#pragma unroll
        for (int b = 0; b < MINE; ++b) {
            const int at       = 2 * b + half;
            const float * part = parts + min(at, n_part - 1) * step + m * stride;
            end[b]             = *(const float2 *) (part + d);
            value[b]           = *(const float4 *) (part + j);
            end[b].x           = at < n_part ? end[b].x : -INFINITY; // so it has no weight
        }
        const float sink = done && sinks ? sinks[m] * LOG2E : -INFINITY;
        float top        = sink;
#pragma unroll
        for (int b = 0; b < MINE; ++b) {
            top = fmaxf(top, end[b].x);
        }
        top               = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
        const float shift = top == -INFINITY ? 0.0f : top;
        float total       = 0.0f;
        float4 sum        = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int b = 0; b < MINE; ++b) {
            const float factor = fasa_exp2(end[b].x - shift);
            total += factor * end[b].y;
            sum.x += factor * value[b].x, sum.y += factor * value[b].y, sum.z += factor * value[b].z,
                sum.w += factor * value[b].w;
        }
        total = fasa_warp_sum<2>(total) + fasa_exp2(sink - shift);
        sum   = make_float4(
            fasa_warp_sum<2>(sum.x), fasa_warp_sum<2>(sum.y), fasa_warp_sum<2>(sum.z), fasa_warp_sum<2>(sum.w));
        if (i < n && half == 0) {
            const float scale = !done ? 1.0f : total > 0.0f ? 1.0f / total : 0.0f;
            *(float4 *) (out + m * (done ? d : stride) + j) =
                make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
            if (!done && j == 0) {
                *(float2 *) (out + m * stride + d) = make_float2(top, total);
            }
        }
    }
}

// The end of a block: adds up the parts of its warps [n_warp][M][stride], in shared memory, and in the last block those
// of all blocks. Both go through the same code: code that runs once costs about seven nanoseconds an instruction, for
// its fetch.
template <int M>
static __device__ __forceinline__ void fasa_fac_finish(
    const fasa_fac_args & a, const fasa_fac_share & at, const float * warps, int n_warp) {
    __shared__ bool last;
    const int step            = M * fasa_part_stride(a.d);
    float *const parts        = a.part + (int64_t) at.index * at.n_split * step,
                 *const out   = a.dst + ((int64_t) at.token * a.n_head + at.head0) * a.d;
    const float * const sinks = a.sinks ? a.sinks + at.head0 : nullptr;
    __syncthreads();
    const float * from = warps;
    int n              = n_warp;
#pragma unroll 1
    for (bool done = at.n_split == 1;; done = true) {
        fasa_fac_add(from, n, step, at.n_m, a.d, done ? out : parts + at.split * step, done, sinks);
        if (done) {
            break;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            last = fasa_count_up(&a.work->ticket[at.index], at.n_split - 1) ==
                at.n_split - 1u; // back to 0 with the last one
        }
        __syncthreads();
        if (!last) {
            return;
        }
        from = parts, n = at.n_split;
    }
    if (threadIdx.x == 0 && at.head0 % a.n_shared == 0) {
        auto * c = (unsigned long long *) a.work->counter;
        atomicAdd(
            &c[fasa_work::BYTES_FAC], a.list[((int64_t) at.token * a.n_list + at.list) * a.n_list_len] * a.row_bytes);
    }
}

// rows of K and V in f16, by the tensor cores; false: not these, or not on this device
bool fasa_cuda_fac_mma(ggml_backend_cuda_context & ctx, fasa_fac_args a, int n_token);
