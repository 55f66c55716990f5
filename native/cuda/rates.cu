// fasa_host_rates_t: how fast a device takes K and V from pinned host memory (fasa_host_rates of fasa.h).

#include "cuda/fetch.cuh"
#include "cuda/nodes.cuh"

#include <algorithm>
#include <random>
#include <vector>

// where K and V of a row lie in host memory
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

// Reads the rows [n] and does nothing with them; the sum keeps the compiler from dropping the loads
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

// Seconds that f(0) to f(n - 1) take on the stream. before() goes ahead of each, and does not count.
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

// device memory that is freed at the end of its scope
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

// The layers that are measured: random rows of each, drawn anew for every round
struct fasa_host_rates_run {
    const ggml_tensor *const *k, *const *v; // [n_layer]
    const int n_layer, n_cells, n_rows;
    const uint64_t between;
    const int n_head          = k[0]->ne[1];
    const fasa_row_layout row = { k[0]->type, v[0]->type, k[0]->ne[0], v[0]->ne[0] };
    const size_t n_list       = ((size_t) n_rows + 1) * n_head; // integers of a layer's lists
    const size_t n_piece      = (size_t) n_rows * n_head;       // rows of a layer
    const size_t weights_size = std::max<uint64_t>(between, 1u << 20);

    cudaStream_t stream = nullptr;
    fasa_device_array lists, pieces, rows, work, weights;

    fasa_host_rates_run(const ggml_tensor * const * k, const ggml_tensor * const * v, int n_layer, int n_cells,
        int n_rows, uint64_t between)
        : k(k), v(v), n_layer(n_layer), n_cells(n_cells), n_rows(n_rows), between(between) {}

    bool init(); // false: the device has no memory for it
    void draw();
    double time_gather();
    double time_fetch();
    double time_copy(size_t size); // of the first `size` bytes of K

private:
    std::mt19937_64 rng{ 0 };
    std::vector<int32_t> list;     // [n_layer][n_head][1 + n_rows]
    std::vector<fasa_piece> piece; // [n_layer][n_head][n_rows]

    uint32_t * out() const { return (uint32_t *) work.data; }
    fasa_fetch_args fetch_args(int il) const;

    // reads `between` bytes of device memory, as a decode step reads a layer's weights
    template <typename F>
    double time_behind_weights(int n, const F & f) {
        const auto read = [&] {
            fasa_read_kernel<<<1024, 256, 0, stream>>>((const uint4 *) weights.data, between / sizeof(uint4), out());
        };
        return fasa_time_layers(stream, n, read, f);
    }
};

bool fasa_host_rates_run::init() {
    if (!lists.make(n_layer * n_list * sizeof(int32_t)) || !pieces.make(n_layer * n_piece * sizeof(fasa_piece)) ||
        !rows.make(n_piece * row.stride) || !work.make(sizeof(fasa_work)) || !weights.make(weights_size)) {
        return false;
    }
    list.resize(n_layer * n_list);
    piece.resize(n_layer * n_piece);
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaMemsetAsync(work.data, 0, sizeof(fasa_work), stream));
    CUDA_CHECK(cudaMemsetAsync(weights.data, 0, weights_size, stream));
    return true;
}

void fasa_host_rates_run::draw() {
    for (int h = 0; h < n_layer * n_head; ++h) {
        int32_t *const cells = list.data() + (size_t) h * (n_rows + 1), *const end = cells + n_rows + 1;
        const ggml_tensor *lk = k[h / n_head], *lv = v[h / n_head];
        cells[0] = n_rows;
        std::generate(cells + 1, end, [&] { return (int32_t) (rng() % n_cells); });
        std::sort(cells + 1, end);
        for (int i = 0; i < n_rows; ++i) {
            const int64_t cell               = cells[1 + i];
            piece[(size_t) h * n_rows + i].k = (const char *) lk->data + h % n_head * lk->nb[1] + cell * lk->nb[2];
            piece[(size_t) h * n_rows + i].v = (const char *) lv->data + h % n_head * lv->nb[1] + cell * lv->nb[2];
        }
    }
    CUDA_CHECK(cudaMemcpyAsync(lists.data, list.data(), list.size() * sizeof(int32_t), cudaMemcpyDefault, stream));
    CUDA_CHECK(
        cudaMemcpyAsync(pieces.data, piece.data(), piece.size() * sizeof(fasa_piece), cudaMemcpyDefault, stream));
}

fasa_fetch_args fasa_host_rates_run::fetch_args(int il) const {
    fasa_fetch_args a = {};
    a.list            = (const int32_t *) lists.data + il * n_list;
    a.k = (const char *) k[il]->data, a.v = (const char *) v[il]->data;
    a.rows  = rows.data;
    a.work  = (fasa_work *) work.data;
    a.k_nb1 = k[il]->nb[1], a.k_nb2 = k[il]->nb[2], a.v_nb1 = v[il]->nb[1], a.v_nb2 = v[il]->nb[2];
    a.n_list_len = n_rows + 1, a.n_list = n_head, a.n_per_head = 1;
    a.bytes_k = row.bytes_k, a.bytes_v = row.bytes_v, a.v_at = row.v_at, a.stride = row.stride;
    return a;
}

double fasa_host_rates_run::time_gather() {
    return time_behind_weights(n_layer, [&](int il) {
        const fasa_fetch_args a = fetch_args(il);
        fasa_fetch_units(a, [&](auto unit) {
            typedef decltype(unit) T;
            fasa_gather_kernel<T><<<(n_piece + N_WARP * AHEAD - 1) / (N_WARP * AHEAD), 32 * N_WARP, 0, stream>>>(
                (const fasa_piece *) pieces.data + il * n_piece, n_piece, a.bytes_k / sizeof(T),
                (a.bytes_k + a.bytes_v) / sizeof(T), out());
        });
        CUDA_CHECK(cudaGetLastError());
    });
}

double fasa_host_rates_run::time_fetch() {
    return time_behind_weights(n_layer, [&](int il) { fasa_fetch_launch(fetch_args(il), stream); });
}

double fasa_host_rates_run::time_copy(size_t size) {
    return time_behind_weights(
        1, [&](int) { CUDA_CHECK(cudaMemcpyAsync(weights.data, k[0]->data, size, cudaMemcpyDefault, stream)); });
}

const char * fasa_cuda_host_rates(ggml_backend_dev_t dev, const ggml_tensor * const * k, const ggml_tensor * const * v,
    int n_layer, int n_cells, int n_rows, uint64_t between, fasa_rates * rates) {
    for (int i = 0; i < ggml_backend_cuda_get_device_count(); ++i) {
        if (ggml_backend_reg_dev_get(ggml_backend_cuda_reg(), i) == dev) {
            ggml_cuda_set_device(i);
        }
    }
    fasa_host_rates_run run(k, v, n_layer, n_cells, n_rows, between);
    if (!run.init()) {
        return "the device has no memory for the measurement";
    }
    constexpr int N_ROUND = 4; // the first one is the warm-up
    double gather = INFINITY, fetch = INFINITY, copy = INFINITY;
    for (int round = 0; round < N_ROUND; ++round) {
        run.draw();
        const double a = run.time_gather();
        run.draw();
        const double b = run.time_fetch();
        if (round > 0) {
            gather = std::min(gather, a), fetch = std::min(fetch, b);
        }
    }
    const size_t size = std::min<size_t>({ n_cells * k[0]->nb[2], run.weights_size, (size_t) 256 << 20 });
    for (int round = 0; round < N_ROUND; ++round) {
        copy = std::min(copy, run.time_copy(size));
    }
    CUDA_CHECK(cudaStreamDestroy(run.stream));
    const size_t n_byte = n_layer * run.n_piece * (run.row.bytes_k + run.row.bytes_v);
    rates->copy = size / copy, rates->gather = n_byte / gather, rates->fetch = n_byte / fetch;
    return nullptr;
}
