// FASA-M: the rows of a list, K and V of a cell side by side, from pinned host memory to the device, before FAC attends to them.
//
// With a row cache (fasa-ops.h) rows stay on the device from step to step: a set of FASA_ROW_WAYS slots holds the cells that fall
// into it, and the one that was used longest ago makes room. Which rows are there changes nothing but the time.

#include "fasa-cuda.cuh"
#include "fasa-cuda-row.cuh"
#include "fasa-select.h"

static constexpr int N_WARP = 8;
static constexpr int AHEAD  = 4; // rows that a warp asks for together

struct fasa_fetch_args {
    const int32_t * list;   // of the token: [n_list_len, n_list], the count, then the cells
    const int32_t * ranges; // [2*FASA_MAX_RANGES] stale cells of the stream; nullptr: seen already
    const char    * k, * v; // of the stream
    char          * rows;   // [n_list_len - 1, n_list] rows
    int32_t       * slots;  // [n_list_len - 1, n_list]
    char          * cache;  // of the stream
    fasa_work     * work;
    int64_t k_nb1, k_nb2, v_nb1, v_nb2, cache_nb2;
    int n_list_len, n_list, n_per_head, n_slot, bytes_k, bytes_v, v_at, stride;
};

// Where every row of a KV head's lists is to be: in the slot that has it, in one that it takes (FASA_ROW_FETCH), or in `rows` (-1),
// where all slots of its set are in use by this step. One block per KV head.
static __global__ void __launch_bounds__(1024) fasa_place_kernel(const fasa_fetch_args a) {
    const int h = blockIdx.x, n_set = a.n_slot/FASA_ROW_WAYS;
    auto * const tag  = (int32_t *) (a.cache + h*a.cache_nb2); // the cell + 1; 0: free
    auto * const used = (uint32_t *) (tag + a.n_slot);         // the step that used it last
    const uint32_t now = a.work->clock + 1;

    for (int i = threadIdx.x; a.ranges && i < a.n_slot; i += blockDim.x) {
        const int cell = tag[i] - 1;
        for (int r = 0; cell >= 0 && r < FASA_MAX_RANGES; ++r) {
            if (cell >= a.ranges[2*r] && cell < a.ranges[2*r + 1]) {
                tag[i] = 0;
                break;
            }
        }
    }
    __syncthreads();
    for (int list = h*a.n_per_head; list < (h + 1)*a.n_per_head; ++list) {
        const int32_t * cells = a.list + (int64_t) list*a.n_list_len;
        int32_t * slots = a.slots + (int64_t) list*(a.n_list_len - 1);
        const int n = *cells++;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const int first = cells[i]%n_set*FASA_ROW_WAYS;
            int slot = -1;
            for (int w = 0; w < FASA_ROW_WAYS; ++w) {
                slot = tag[first + w] == cells[i] + 1 ? first + w : slot;
            }
            if (slot >= 0) {
                used[slot] = now;
            }
            slots[i] = slot;
        }
        __syncthreads(); // what is there stays
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const int first = cells[i]%n_set*FASA_ROW_WAYS;
            while (slots[i] < 0) {
                uint32_t oldest = 0, seen = 0;
                int slot = -1;
                for (int w = 0; w < FASA_ROW_WAYS; ++w) {
                    const uint32_t last = *(volatile uint32_t *) &used[first + w], age = now - last;
                    if (age > oldest) {
                        oldest = age, seen = last, slot = first + w;
                    }
                }
                if (slot < 0) {
                    break;
                }
                if (atomicCAS(&used[slot], seen, now) == seen) {
                    tag[slot] = cells[i] + 1;
                    slots[i] = slot | FASA_ROW_FETCH;
                }
            }
        }
        __syncthreads();
    }
}

// T: what a lane copies at once
template <typename T> static __global__ void __launch_bounds__(32*N_WARP) fasa_fetch_kernel(const fasa_fetch_args a) {
    const int lane = threadIdx.x%32, warp = threadIdx.x/32, list = blockIdx.y, h = list/a.n_per_head;
    const int32_t * cells = a.list + (int64_t) list*a.n_list_len, n = *cells++;
    const int32_t * slots = a.slots ? a.slots + (int64_t) list*(a.n_list_len - 1) : nullptr;
    char * const rows  = a.rows + (int64_t) list*(a.n_list_len - 1)*a.stride;
    char * const cache = a.cache + h*a.cache_nb2 + (int64_t) a.n_slot*FASA_ROW_HEAD;
    const char * const k = a.k + h*a.k_nb1, * const v = a.v + h*a.v_nb1;
    const int units_k = a.bytes_k/sizeof(T), units = units_k + a.bytes_v/sizeof(T);

    int fetched = 0, reused = 0;
    for (int i0 = (blockIdx.x*N_WARP + warp)*AHEAD; i0 < n; i0 += gridDim.x*N_WARP*AHEAD) {
        char  * to[AHEAD];
        int64_t cell[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const int i = i0 + u;
            const int slot = slots && i < n ? slots[i] : -1;
            const bool take = i < n && (slot < 0 || slot & FASA_ROW_FETCH);
            cell[u] = take ? cells[i] : 0;
            to[u] = !take ? nullptr : slot < 0 ? rows + (int64_t) i*a.stride : cache + (int64_t) (slot & ~FASA_ROW_FETCH)*a.stride;
            fetched += take;
            reused  += i < n && !take;
        }
        for (int unit = lane; unit < units; unit += 32) {
            const bool is_k = unit < units_k;
            T value[AHEAD];
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                if (to[u]) {
                    value[u] = is_k ? ((const T *) (k + cell[u]*a.k_nb2))[unit] : ((const T *) (v + cell[u]*a.v_nb2))[unit - units_k];
                }
            }
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                if (to[u]) {
                    ((T *) (to[u] + (is_k ? 0 : a.v_at)))[is_k ? unit : unit - units_k] = value[u];
                }
            }
        }
    }
    if (lane == 0 && fetched + reused > 0) {
        auto * c = (unsigned long long *) a.work->counter;
        atomicAdd(&c[fasa_work::ROWS_FETCHED], (unsigned long long) fetched);
        atomicAdd(&c[fasa_work::ROWS_REUSED],  (unsigned long long) reused);
        atomicAdd(&c[fasa_work::BYTES_FETCHED], (unsigned long long) fetched*(a.bytes_k + a.bytes_v));
    }
    if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0) {
        a.work->clock++;
    }
}

fasa_fetched fasa_cuda_fetch(ggml_backend_cuda_context & ctx, const ggml_tensor * fac, int token) {
    const ggml_tensor * list = fac->src[0], * k = fac->src[2], * v = fac->src[3], * rows = fac->src[6], * cache = fac->src[7], * ranges = fac->src[8];
    const int n_tps = fac->ne[2], s = token/n_tps, n_list = list->ne[1], length = list->ne[0] - 1;
    const fasa_row_layout layout(k->type, v->type, k->ne[0], v->ne[0]);
    GGML_ASSERT(fasa_rows_bytes(layout, length, n_list) <= (size_t) rows->ne[0]);

    fasa_fetch_args a = {};
    a.list   = (const int32_t *) list->data + (int64_t) token*n_list*(length + 1);
    a.ranges = token%n_tps == 0 ? (const int32_t *) ((const char *) ranges->data + s*ranges->nb[1]) : nullptr;
    a.k      = (const char *) k->data + s*k->nb[3];
    a.v      = (const char *) v->data + s*v->nb[3];
    a.slots  = cache ? (int32_t *) rows->data : nullptr;
    a.rows   = (char *) rows->data + fasa_rows_slots(length, n_list);
    a.cache  = cache ? (char *) cache->data + s*cache->nb[3] : nullptr;
    a.work   = (fasa_work *) list->src[2]->data;
    a.k_nb1  = k->nb[1], a.k_nb2 = k->nb[2], a.v_nb1 = v->nb[1], a.v_nb2 = v->nb[2];
    a.n_list_len = length + 1;
    a.n_list     = n_list;
    a.n_per_head = n_list/k->ne[1];
    a.n_slot     = cache ? cache->ne[1] : 0;
    a.cache_nb2  = cache ? cache->nb[2] : 0;
    a.bytes_k = layout.bytes_k, a.bytes_v = layout.bytes_v, a.v_at = layout.v_at, a.stride = layout.stride;

    if (cache) {
        fasa_place_kernel<<<k->ne[1], 1024, 0, ctx.stream()>>>(a);
        CUDA_CHECK(cudaGetLastError());
    }
    const int per_block = N_WARP*AHEAD;
    const dim3 grid((length + per_block - 1)/per_block, n_list);
    const size_t any = a.bytes_k | a.bytes_v | a.k_nb1 | a.k_nb2 | a.v_nb1 | a.v_nb2 | (uintptr_t) a.k | (uintptr_t) a.v; // its lowest bit is their alignment
    if (any%16 == 0) {
        fasa_fetch_kernel<uint4><<<grid, 32*N_WARP, 0, ctx.stream()>>>(a);
    } else if (any%8 == 0) {
        fasa_fetch_kernel<uint2><<<grid, 32*N_WARP, 0, ctx.stream()>>>(a);
    } else if (any%4 == 0) {
        fasa_fetch_kernel<uint32_t><<<grid, 32*N_WARP, 0, ctx.stream()>>>(a);
    } else {
        fasa_fetch_kernel<uint16_t><<<grid, 32*N_WARP, 0, ctx.stream()>>>(a);
    }
    CUDA_CHECK(cudaGetLastError());
    return { a.rows, a.cache ? a.cache + (int64_t) a.n_slot*FASA_ROW_HEAD : nullptr, a.slots, a.cache_nb2, a.stride, a.v_at };
}
