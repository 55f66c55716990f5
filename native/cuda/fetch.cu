// FASA-M: the rows of a list, K and V of a cell side by side, from pinned host memory to the device, before FAC attends
// to them.
//
// With a row cache (ops/ops.h) rows stay on the device from step to step: a set of FASA_ROW_WAYS slots holds the cells
// that fall into it, and the one that was used longest ago makes room. Which rows are there changes nothing but the
// time.

#include "core/select.h"
#include "cuda/device.cuh"
#include "cuda/fasa-hooks.cuh"

#include <algorithm>
#include <random>
#include <vector>

static constexpr int N_WARP = 8;
static constexpr int AHEAD  = 4; // rows that a warp asks for together

struct fasa_fetch_args {
    const int32_t * list;   // of the token: [n_list_len, n_list], the count, then the cells
    const int32_t * ranges; // [2*FASA_MAX_RANGES] stale cells of the stream; nullptr: seen already
    const char *k, *v;      // of the stream
    char * rows;            // [n_list_len - 1, n_list] rows
    int32_t * slots;        // [n_list_len - 1, n_list]
    char * cache;           // of the stream
    fasa_work * work;
    int64_t k_nb1, k_nb2, v_nb1, v_nb2, cache_nb2;
    int n_list_len, n_list, n_per_head, n_slot, bytes_k, bytes_v, v_at, stride;
};

// Where every row of a KV head's lists is to be: in the slot that has it, in one that it takes (FASA_ROW_FETCH), or in
// `rows` (-1), where all slots of its set are in use by this step. One block per KV head.
static __global__ void __launch_bounds__(1024) fasa_place_kernel(const fasa_fetch_args a) {
    ggml_cuda_pdl_sync(); // where a graph was updated in place, its edges may be those of kernels that are launched
                          // early
    const int h = blockIdx.x, n_set = a.n_slot / FASA_ROW_WAYS;
    auto * const tag   = (int32_t *) (a.cache + h * a.cache_nb2); // the cell + 1; 0: free
    auto * const used  = (uint32_t *) (tag + a.n_slot);           // the step that used it last
    const uint32_t now = a.work->clock + 1;

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
            slots[i] = slot;
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

// T: what a lane copies at once
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
            to[u]           = !take ? nullptr :
                slot < 0            ? rows + (int64_t) i * a.stride :
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

// f of the type that a lane copies at once
template <typename F>
static void fasa_fetch_units(const fasa_fetch_args & a, const F & f) {
    const size_t any = a.bytes_k | a.bytes_v | a.k_nb1 | a.k_nb2 | a.v_nb1 | a.v_nb2 | (uintptr_t) a.k |
        (uintptr_t) a.v; // its lowest bit is their alignment
    any % 16 == 0 ? f(uint4()) : any % 8 == 0 ? f(uint2()) : any % 4 == 0 ? f(uint32_t()) : f(uint16_t());
}

static void fasa_fetch_launch(const fasa_fetch_args & a, cudaStream_t stream) {
    const dim3 grid((a.n_list_len - 1 + N_WARP * AHEAD - 1) / (N_WARP * AHEAD), a.n_list);
    fasa_fetch_units(a, [&](auto unit) { fasa_fetch_kernel<decltype(unit)><<<grid, 32 * N_WARP, 0, stream>>>(a); });
    CUDA_CHECK(cudaGetLastError());
}

fasa_fetched fasa_cuda_fetch(ggml_backend_cuda_context & ctx, const ggml_tensor * fac, int token) {
    const ggml_tensor *list = fac->src[0], *k = fac->src[2], *v = fac->src[3], *ranges = fac->src[6];
    const fasa_layer_const & layer = fasa_op_layer(fac);
    const ggml_tensor *rows = layer.rows, *cache = layer.row_cache;
    const int n_tps = fac->ne[2], s = token / n_tps, n_list = list->ne[1], length = list->ne[0] - 1;
    const fasa_row_layout layout(k->type, v->type, k->ne[0], v->ne[0]);
    GGML_ASSERT(fasa_rows_bytes(layout, length, n_list) <= (size_t) rows->ne[0]);

    fasa_fetch_args a = {};
    a.list            = (const int32_t *) list->data + (int64_t) token * n_list * (length + 1);
    a.ranges = token % n_tps == 0 ? (const int32_t *) ((const char *) ranges->data + s * ranges->nb[1]) : nullptr;
    a.k      = (const char *) k->data + s * k->nb[3];
    a.v      = (const char *) v->data + s * v->nb[3];
    a.slots  = cache ? (int32_t *) rows->data : nullptr;
    a.rows   = (char *) rows->data + fasa_rows_slots(length, n_list);
    a.cache  = cache ? (char *) cache->data + (fasa_op_get(fac)->stream0 + s) * cache->nb[3] : nullptr;
    a.work   = (fasa_work *) layer.work->data;
    a.k_nb1 = k->nb[1], a.k_nb2 = k->nb[2], a.v_nb1 = v->nb[1], a.v_nb2 = v->nb[2];
    a.n_list_len = length + 1;
    a.n_list     = n_list;
    a.n_per_head = n_list / k->ne[1];
    a.n_slot     = cache ? cache->ne[1] : 0;
    a.cache_nb2  = cache ? cache->nb[2] : 0;
    a.bytes_k = layout.bytes_k, a.bytes_v = layout.bytes_v, a.v_at = layout.v_at, a.stride = layout.stride;

    if (cache) {
        fasa_place_kernel<<<k->ne[1], 1024, 0, ctx.stream()>>>(a);
        CUDA_CHECK(cudaGetLastError());
    }
    fasa_fetch_launch(a, ctx.stream());
    return { a.rows, a.cache ? a.cache + (int64_t) a.n_slot * FASA_ROW_HEAD : nullptr, a.slots, a.cache_nb2, a.stride,
        a.v_at };
}

// ---- rates ----

struct fasa_piece {
    const char *k, *v;
};

static __device__ __forceinline__ uint32_t fasa_fold(uint4 x) {
    return x.x ^ x.y ^ x.z ^ x.w;
}
static __device__ __forceinline__ uint32_t fasa_fold(uint2 x) {
    return x.x ^ x.y;
}
static __device__ __forceinline__ uint32_t fasa_fold(uint32_t x) {
    return x;
}
static __device__ __forceinline__ uint32_t fasa_fold(uint16_t x) {
    return x;
}

// rows [n] to whoever asks; the sum keeps the loads
template <typename T>
static __global__ void __launch_bounds__(32 * N_WARP) fasa_gather_kernel(
    const fasa_piece * rows, int n, int units_k, int units, uint32_t * out) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t sum = 0;
    for (int i0 = (blockIdx.x * N_WARP + warp) * AHEAD; i0 < n; i0 += gridDim.x * N_WARP * AHEAD) {
        for (int unit = lane; unit < units; unit += 32) {
            T value[AHEAD] = {};
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                if (i0 + u < n) {
                    const fasa_piece row = rows[i0 + u];
                    value[u] = unit < units_k ? ((const T *) row.k)[unit] : ((const T *) row.v)[unit - units_k];
                }
            }
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                sum ^= fasa_fold(value[u]);
            }
        }
    }
    atomicXor(out, sum);
}

static __global__ void fasa_read_kernel(const uint4 * mem, size_t n, uint32_t * out) {
    uint32_t sum = 0;
    for (size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t) gridDim.x * blockDim.x) {
        sum ^= fasa_fold(mem[i]);
    }
    atomicXor(out, sum);
}

// seconds of f(0) to f(n - 1) on the stream, each behind before(), which does not count
template <typename B, typename F>
static double fasa_time_layers(cudaStream_t stream, int n, const B & before, const F & f) {
    std::vector<cudaEvent_t> events(2 * n);
    for (auto & e : events) {
        CUDA_CHECK(cudaEventCreate(&e));
    }
    for (int i = 0; i < n; ++i) {
        before();
        CUDA_CHECK(cudaEventRecord(events[2 * i], stream));
        f(i);
        CUDA_CHECK(cudaEventRecord(events[2 * i + 1], stream));
    }
    CUDA_CHECK(cudaStreamSynchronize(stream));
    double seconds = 0.0;
    for (int i = 0; i < n; ++i) {
        float ms = 0.0f;
        CUDA_CHECK(cudaEventElapsedTime(&ms, events[2 * i], events[2 * i + 1]));
        seconds += ms / 1e3;
    }
    for (const auto & e : events) {
        CUDA_CHECK(cudaEventDestroy(e));
    }
    return seconds;
}

// device memory, and what is in it: of the caller's stack
struct fasa_device_array {
    char * data = nullptr;
    bool make(size_t size) {
        const bool ok = cudaMalloc(&data, size) == cudaSuccess;
        (void) cudaGetLastError();
        return ok;
    }
    ~fasa_device_array() {
        if (data) {
            CUDA_CHECK(cudaFree(data));
        }
    }
};

// type: fasa_host_rates_t
const char * fasa_cuda_host_rates(ggml_backend_dev_t dev, const ggml_tensor * const * k, const ggml_tensor * const * v,
    int n_layer, int n_cells, int n_rows, uint64_t between, fasa_rates * rates) {
    for (int i = 0; i < ggml_backend_cuda_get_device_count(); ++i) {
        if (ggml_backend_reg_dev_get(ggml_backend_cuda_reg(), i) == dev) {
            ggml_cuda_set_device(i);
        }
    }
    constexpr int N_ROUND = 4; // the first one warms up; other rows in each
    const int n_head = k[0]->ne[1], n_list_len = n_rows + 1;
    const fasa_row_layout layout(k[0]->type, v[0]->type, k[0]->ne[0], v[0]->ne[0]);
    const size_t n_list = (size_t) n_list_len * n_head, n_piece = (size_t) n_rows * n_head,
                 n_byte       = n_piece * (layout.bytes_k + layout.bytes_v);
    const size_t weights_size = std::max<uint64_t>(between, 1u << 20);
    fasa_device_array lists, pieces, rows, work, weights;
    if (!lists.make(n_layer * n_list * sizeof(int32_t)) || !pieces.make(n_layer * n_piece * sizeof(fasa_piece)) ||
        !rows.make(n_piece * layout.stride) || !work.make(sizeof(fasa_work)) || !weights.make(weights_size)) {
        return "the device has no memory for the measurement";
    }
    cudaStream_t stream;
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaMemsetAsync(work.data, 0, sizeof(fasa_work), stream));
    CUDA_CHECK(cudaMemsetAsync(weights.data, 0, weights_size, stream));
    auto * const out  = (uint32_t *) work.data;
    const auto before = [&] {
        fasa_read_kernel<<<1024, 256, 0, stream>>>((const uint4 *) weights.data, between / sizeof(uint4), out);
    };

    std::mt19937_64 rng(0);
    std::vector<int32_t> list(n_layer * n_list);
    std::vector<fasa_piece> piece(n_layer * n_piece);
    double best[3] = { INFINITY, INFINITY, INFINITY };
    for (int round = 0; round < 2 * N_ROUND; ++round) { // one and the other in turns
        for (int h = 0; h < n_layer * n_head; ++h) {
            int32_t * const cells = list.data() + (size_t) h * n_list_len;
            const ggml_tensor *lk = k[h / n_head], *lv = v[h / n_head];
            cells[0] = n_rows;
            std::generate(cells + 1, cells + n_list_len, [&] { return (int32_t) (rng() % n_cells); });
            std::sort(cells + 1, cells + n_list_len);
            for (int i = 0; i < n_rows; ++i) {
                piece[(size_t) h * n_rows + i] = { (const char *) lk->data + h % n_head * lk->nb[1] +
                        cells[1 + i] * lk->nb[2],
                    (const char *) lv->data + h % n_head * lv->nb[1] + cells[1 + i] * lv->nb[2] };
            }
        }
        CUDA_CHECK(cudaMemcpyAsync(lists.data, list.data(), list.size() * sizeof(int32_t), cudaMemcpyDefault, stream));
        CUDA_CHECK(
            cudaMemcpyAsync(pieces.data, piece.data(), piece.size() * sizeof(fasa_piece), cudaMemcpyDefault, stream));
        const double took = fasa_time_layers(stream, n_layer, before, [&](int il) {
            fasa_fetch_args a = {};
            a.list            = (const int32_t *) lists.data + il * n_list;
            a.k = (const char *) k[il]->data, a.v = (const char *) v[il]->data;
            a.rows  = rows.data;
            a.work  = (fasa_work *) work.data;
            a.k_nb1 = k[il]->nb[1], a.k_nb2 = k[il]->nb[2], a.v_nb1 = v[il]->nb[1], a.v_nb2 = v[il]->nb[2];
            a.n_list_len = n_list_len, a.n_list = n_head, a.n_per_head = 1;
            a.bytes_k = layout.bytes_k, a.bytes_v = layout.bytes_v, a.v_at = layout.v_at, a.stride = layout.stride;
            if (round % 2) {
                fasa_fetch_launch(a, stream);
                return;
            }
            fasa_fetch_units(a, [&](auto unit) {
                typedef decltype(unit) T;
                fasa_gather_kernel<T><<<(n_piece + N_WARP * AHEAD - 1) / (N_WARP * AHEAD), 32 * N_WARP, 0, stream>>>(
                    (const fasa_piece *) pieces.data + il * n_piece, n_piece, a.bytes_k / sizeof(T),
                    (a.bytes_k + a.bytes_v) / sizeof(T), out);
            });
            CUDA_CHECK(cudaGetLastError());
        });
        best[round % 2]   = round < 2 ? INFINITY : std::min(best[round % 2], took);
    }
    const size_t size = std::min<size_t>({ n_cells * k[0]->nb[2], weights_size, (size_t) 256 << 20 });
    for (int round = 0; round < N_ROUND; ++round) {
        best[2] = std::min(best[2], fasa_time_layers(stream, 1, before, [&](int) {
            CUDA_CHECK(cudaMemcpyAsync(weights.data, k[0]->data, size, cudaMemcpyDefault, stream));
        }));
    }
    CUDA_CHECK(cudaStreamDestroy(stream));
    rates->copy = size / best[2], rates->gather = n_layer * n_byte / best[0], rates->fetch = n_layer * n_byte / best[1];
    return nullptr;
}
