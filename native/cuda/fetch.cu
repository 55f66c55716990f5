// FASA-M: the rows of a list, K and V of a cell side by side, from pinned host memory to the device, before FAC attends
// to them. Read in place, a row would come over PCIe once for every two query heads that share it.
//
// A layer that selects ahead has them fetched on the side stream too (FETCH). What this ubatch writes is not there yet:
// FAC reads that one row in place, and the row cache does not get it.
//
// With a row cache (ops/ops.h) rows stay on the device from step to step. A set of FASA_ROW_WAYS slots holds the cells
// that fall into it, and the least recently used one makes room. Which rows are there changes the time alone.

#include "core/select.h"
#include "cuda/fetch.cuh"
#include "cuda/nodes.cuh"

// Assigns a place to every row of a KV head's lists: the slot that has it, a slot that it takes (FASA_ROW_FETCH), or,
// where this step uses all slots of its set, one in `rows` (-1). One block per KV head.
static __global__ void __launch_bounds__(1024) fasa_assign_slots_kernel(const fasa_fetch_args a) {
    // where a graph was updated in place, its edges may be those of kernels that are launched early
    ggml_cuda_pdl_sync();
    const int h = blockIdx.x, n_set = a.n_slot / FASA_ROW_WAYS;
    auto * const tag   = (int32_t *) (a.cache + h * a.cache_nb2); // the cell + 1; 0: free
    auto * const used  = (uint32_t *) (tag + a.n_slot);           // the step that used it last
    const uint32_t now = a.work->clock + 1;
    const int fresh    = a.fresh ? *a.fresh : -1;

    for (int i = threadIdx.x; a.ranges && i < a.n_slot; i += blockDim.x) {
        const int cell = tag[i] - 1;
        for (int r = 0; cell >= 0 && r < FASA_MAX_RANGES; ++r) {
            if (cell >= a.ranges[2 * r] && cell < a.ranges[2 * r + 1]) {
                tag[i] = 0;
                break;
            }
        }
    }
    __syncthreads();
    for (int list = h * a.n_per_head; list < (h + 1) * a.n_per_head; ++list) {
        const int32_t * cells = a.list + (int64_t) list * a.n_list_len;
        int32_t * slots       = a.slots + (int64_t) list * (a.n_list_len - 1);
        const int n           = *cells++;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const int first = cells[i] % n_set * FASA_ROW_WAYS;
            int slot        = -1;
            for (int w = 0; w < FASA_ROW_WAYS; ++w) {
                slot = tag[first + w] == cells[i] + 1 ? first + w : slot;
            }
            if (slot >= 0) {
                used[slot] = now;
            }
            slots[i] = cells[i] == fresh ? FASA_ROW_FETCH : slot; // FAC does not look
        }
        __syncthreads(); // what is there stays
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const int first = cells[i] % n_set * FASA_ROW_WAYS;
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
                    slots[i]  = slot | FASA_ROW_FETCH;
                }
            }
        }
        __syncthreads();
    }
}

// Copies the rows that are not in the cache to their places. T: what a lane copies at once
template <typename T>
static __global__ void __launch_bounds__(32 * N_WARP) fasa_fetch_kernel(const fasa_fetch_args a) {
    ggml_cuda_pdl_sync();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, list = blockIdx.y, h = list / a.n_per_head;
    const int32_t *cells = a.list + (int64_t) list * a.n_list_len, n = *cells++;
    const int32_t * slots = a.slots ? a.slots + (int64_t) list * (a.n_list_len - 1) : nullptr;
    char * const rows     = a.rows + (int64_t) list * (a.n_list_len - 1) * a.stride;
    char * const cache    = a.cache + h * a.cache_nb2 + (int64_t) a.n_slot * FASA_ROW_HEAD;
    const char *const k = a.k + h * a.k_nb1, *const v = a.v + h * a.v_nb1;
    const int units_k = a.bytes_k / sizeof(T), units = units_k + a.bytes_v / sizeof(T);
    const int fresh = a.fresh ? *a.fresh : -1; // counted here, read by FAC

    int fetched = 0, reused = 0;
    for (int i0 = (blockIdx.x * N_WARP + warp) * AHEAD; i0 < n; i0 += gridDim.x * N_WARP * AHEAD) {
        char * to[AHEAD];
        int64_t cell[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const int i     = i0 + u;
            const int slot  = slots && i < n ? slots[i] : -1;
            const bool take = i < n && (slot < 0 || slot & FASA_ROW_FETCH);
            cell[u]         = take ? cells[i] : 0;
            to[u]           = !take || cell[u] == fresh ? nullptr :
                slot < 0                                ? rows + (int64_t) i * a.stride :
                                                          cache + (int64_t) (slot & ~FASA_ROW_FETCH) * a.stride;
            fetched += take;
            reused += i < n && !take;
        }
        for (int unit = lane; unit < units; unit += 32) {
            const bool is_k = unit < units_k;
            T value[AHEAD];
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                if (to[u]) {
                    value[u] = is_k ? ((const T *) (k + cell[u] * a.k_nb2))[unit] :
                                      ((const T *) (v + cell[u] * a.v_nb2))[unit - units_k];
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
        atomicAdd(&c[fasa_work::ROWS_REUSED], (unsigned long long) reused);
        atomicAdd(&c[fasa_work::BYTES_FETCHED], (unsigned long long) fetched * (a.bytes_k + a.bytes_v));
    }
    if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0) {
        a.work->clock++;
    }
}

void fasa_fetch_launch(const fasa_fetch_args & a, cudaStream_t stream) {
    const dim3 grid((a.n_list_len - 1 + N_WARP * AHEAD - 1) / (N_WARP * AHEAD), a.n_list);
    fasa_fetch_units(a, [&](auto unit) { fasa_fetch_kernel<decltype(unit)><<<grid, 32 * N_WARP, 0, stream>>>(a); });
    CUDA_CHECK(cudaGetLastError());
}

fasa_fetched fasa_cuda_fetch(ggml_backend_cuda_context & ctx, const ggml_tensor * node, int token) {
    const fasa_op_params & p = *fasa_op_get(node);
    const bool fac = p.kind == FASA_OP_FAC, fetched = p.flags & FASA_FETCHED;
    const ggml_tensor * const * src = node->src;
    const ggml_tensor *list = src[0], *k = src[fac ? 2 : 1], *v = src[fac ? 3 : 2], *cells = src[fac ? 6 : 3];
    const ggml_tensor *ranges = fetched ? nullptr : cells, *fresh = fetched ? cells : fac ? nullptr : src[4];
    const fasa_layer_const & layer = fasa_op_layer(node);
    const ggml_tensor *rows = layer.rows, *cache = layer.row_cache;
    const int n_tps = list->ne[2], s = token / n_tps, n_list = list->ne[1], length = list->ne[0] - 1;
    const fasa_row_layout layout(k->type, v->type, k->ne[0], v->ne[0]);
    GGML_ASSERT(fasa_rows_bytes(layout, length, n_list) <= (size_t) rows->ne[0]);

    fasa_fetch_args a = {};
    a.list            = (const int32_t *) list->data + (int64_t) token * n_list * (length + 1);
    a.ranges =
        ranges && token % n_tps == 0 ? (const int32_t *) ((const char *) ranges->data + s * ranges->nb[1]) : nullptr;
    a.fresh = fresh ? (const int32_t *) fresh->data : nullptr;
    a.k     = (const char *) k->data + s * k->nb[3];
    a.v     = (const char *) v->data + s * v->nb[3];
    a.slots = cache ? (int32_t *) rows->data : nullptr;
    a.rows  = (char *) rows->data + fasa_rows_slots(length, n_list);
    a.cache = cache ? (char *) cache->data + (p.stream0 + s) * cache->nb[3] : nullptr;
    a.work  = (fasa_work *) layer.work->data;
    a.k_nb1 = k->nb[1], a.k_nb2 = k->nb[2], a.v_nb1 = v->nb[1], a.v_nb2 = v->nb[2];
    a.n_list_len = length + 1;
    a.n_list     = n_list;
    a.n_per_head = n_list / k->ne[1];
    a.n_slot     = cache ? cache->ne[1] : 0;
    a.cache_nb2  = cache ? cache->nb[2] : 0;
    a.bytes_k = layout.bytes_k, a.bytes_v = layout.bytes_v, a.v_at = layout.v_at, a.stride = layout.stride;

    if (cache && !fetched) {
        fasa_assign_slots_kernel<<<k->ne[1], 1024, 0, ctx.stream()>>>(a);
        CUDA_CHECK(cudaGetLastError());
    }
    if (!fetched) {
        fasa_fetch_launch(a, ctx.stream());
    }
    return { a.rows, a.cache ? a.cache + (int64_t) a.n_slot * FASA_ROW_HEAD : nullptr, a.slots, a.fresh, a.cache_nb2,
        a.stride, a.v_at };
}
