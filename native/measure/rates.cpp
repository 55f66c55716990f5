// For `fasa-gguf bench` and `plan`: how fast a device copies and takes rows from pinned host memory, how fast the cores
// read a cache, and what memory a device has.

#include "core/error.h"
#include "llama/cache.h"
#include "measure/threads.h"

#include "llama-kv-cache.h"

#include "ggml-backend.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

int fasa_copy_rate(const char * backend_name, int32_t n_threads, uint64_t bytes, double * bytes_per_second) {
    if (fasa_check_given(backend_name, "copy rate: backend") != 0 ||
        fasa_check_given(bytes_per_second, "copy rate: bytes_per_second") != 0 ||
        fasa_check_range("copy rate: n_threads", n_threads, 1, FASA_MOST_THREADS) != 0) {
        return -1;
    }
    ggml_backend_ptr backend(ggml_backend_init_by_name(backend_name, nullptr));
    if (!backend) {
        return fasa_set_error("there is no backend %s", backend_name);
    }
    const int64_t n = bytes / sizeof(float);
    if (n < 1 || n > INT32_MAX) {
        return fasa_set_error(
            "copy rate: expected 4 to %llu bytes, found %llu", 4ull * INT32_MAX, (unsigned long long) bytes);
    }
    fasa_cpu_set_threads(backend.get(), n_threads);
    ggml_context_ptr ctx(ggml_init({ 8 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    ggml_tensor * src   = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n);
    ggml_tensor * dst   = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n);
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, ggml_cpy(ctx.get(), src, dst));
    ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
    if (!buf) {
        return fasa_set_error("copy rate: %s has no %.1f MiB for two buffers", backend_name, 2 * bytes / 1048576.0);
    }
    ggml_backend_buffer_clear(buf.get(), 0); // memory that was never written may all be one page of zeros

    for (int repeat = 1;; repeat *= 2) { // the rounds before the last one are the warm-up
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < repeat; ++i) {
            if (ggml_backend_graph_compute_async(backend.get(), graph) != GGML_STATUS_SUCCESS) {
                return fasa_set_error("copy rate: the copy failed on %s", backend_name);
            }
        }
        ggml_backend_synchronize(backend.get());
        float last; // another machine's backend waits for nothing but data
        ggml_backend_tensor_get(dst, &last, 0, sizeof(last));
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (seconds > 0.2 && repeat > 1) {
            *bytes_per_second = 2.0 * n * sizeof(float) * repeat / seconds;
            return 0;
        }
    }
}

// ---- a plain read of the cache ----

namespace {

struct span {
    const char * data;
    size_t size; // bytes
};

uint64_t read_words(const char * data, size_t size) {
    uint64_t sum[8] = { 0 }, words[8];
    for (size_t i = 0; i + sizeof(words) <= size; i += sizeof(words)) {
        memcpy(words, data + i, sizeof(words));
        for (int j = 0; j < 8; ++j) {
            sum[j] += words[j];
        }
    }
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

// Seconds in which n_threads, a part of every span each, read all of them `repeat` times.
double read_seconds(const std::vector<span> & spans, int n_threads, int repeat) {
    std::atomic<uint64_t> sum{ 0 }; // so that nothing is left out
    const auto work = [&](int part) {
        uint64_t mine = 0;
        for (int r = 0; r < repeat; ++r) {
            for (const span & s : spans) {
                const size_t from = s.size * part / n_threads, to = s.size * (part + 1) / n_threads;
                mine += read_words(s.data + from, to - from);
            }
        }
        sum += mine;
    };
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> threads;
    for (int part = 1; part < n_threads; ++part) {
        threads.emplace_back(work, part);
    }
    work(0);
    for (auto & t : threads) {
        t.join();
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

} // namespace

// K and V of every layer of a cache
struct fasa_cache::all_rows {
    std::vector<ggml_tensor *> tensors; // [values of a cell, cells, streams]

    void add(const fasa_cache & cache);
};

void fasa_cache::all_rows::add(const fasa_cache & cache) {
    for (const auto & l : cache.kv.layers) {
        tensors.push_back(l.k);
        if (l.v != nullptr) { // latent attention has none
            tensors.push_back(l.v);
        }
    }
}

int fasa_read_rate(llama_context * ctx, uint32_t n_cells, double * bytes_per_second) {
    if (fasa_check_given(ctx, "llama_context") != 0 ||
        fasa_check_given(bytes_per_second, "read rate: bytes_per_second") != 0) {
        return -1;
    }
    fasa_cache::all_rows rows;
    for (const auto * cache : fasa_caches(llama_get_memory(ctx))) {
        rows.add(*cache);
    }
    std::vector<span> spans; // the first n_cells cells of every tensor and stream
    size_t size = 0;
    for (const ggml_tensor * t : rows.tensors) {
        if (!ggml_backend_buffer_is_host(t->buffer)) {
            return fasa_set_error("read rate: %s is not in host memory", t->name);
        }
        const size_t bytes = t->nb[1] * std::min<int64_t>(n_cells, t->ne[1]);
        for (int64_t s = 0; s < t->ne[2]; ++s) {
            spans.push_back({ (const char *) t->data + s * t->nb[2], bytes });
            size += bytes;
        }
    }
    if (size == 0) {
        return fasa_set_error("read rate: expected a context with a KV cache, and at least one cell");
    }
    llama_synchronize(ctx);
    const int n_threads = std::max(1, llama_n_threads(ctx));
    for (int repeat = 1;; repeat *= 2) { // the rounds before the last one are the warm-up
        const double seconds = read_seconds(spans, n_threads, repeat);
        if (seconds > 0.1 && repeat > 1) {
            *bytes_per_second = (double) size * repeat / seconds;
            return 0;
        }
    }
}

// ---- host memory ----

// K and V [n_layer] of the first stream, as FAC gets them: of all pinned layers that share device and shapes with the
// first one
struct fasa_cache::pinned_rows {
    std::vector<ggml_tensor *> k, v;

    void add(const fasa_cache & cache, ggml_context * ctx);
};

void fasa_cache::pinned_rows::add(const fasa_cache & cache, ggml_context * ctx) {
    const auto & kv                        = cache.kv;
    const llama_kv_cache::kv_layer * first = nullptr;
    for (const auto & l : kv.layers) {
        first = first || !cache.residence.is_pinned(l.il) ? first : &l;
        if (first == nullptr || !cache.residence.is_pinned(l.il) ||
            cache.residence.device_of(l.il) != cache.residence.device_of(first->il) ||
            !ggml_are_same_shape(l.k, first->k) || !ggml_are_same_shape(l.v, first->v)) {
            continue;
        }
        const int64_t n_head = kv.hparams.n_head_kv(l.il);
        const auto view      = [&](ggml_tensor * t) {
            return ggml_view_3d(
                ctx, t, t->ne[0] / n_head, n_head, t->ne[1], ggml_row_size(t->type, t->ne[0] / n_head), t->nb[1], 0);
        };
        k.push_back(view(l.k)), v.push_back(view(l.v));
    }
}

int fasa_host_rates(llama_context * ctx, uint32_t n_cells, uint32_t n_rows, uint64_t between, fasa_rates * rates) {
    if (fasa_check_given(ctx, "llama_context") != 0 || fasa_check_size(rates, "fasa_rates") != 0) {
        return -1;
    }
    ggml_context_ptr views(ggml_init({ 2 * 1024 * ggml_tensor_overhead(), nullptr, true }));
    fasa_cache::pinned_rows rows;
    const auto &k = rows.k, &v = rows.v;
    for (const auto * cache : fasa_caches(llama_get_memory(ctx))) {
        rows.add(*cache, views.get());
        if (!k.empty()) {
            break;
        }
    }
    if (k.empty()) {
        return fasa_set_error("host rates: this context has no K and V in pinned host memory");
    }
    if (n_cells < 1 || n_cells > k[0]->ne[2] || n_rows < 1) {
        return fasa_set_error("host rates: expected 1 to %lld cells and at least one row, found %u and %u",
            (long long) k[0]->ne[2], n_cells, n_rows);
    }
    llama_synchronize(ctx);
    const auto dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(k[0]->view_src->buffer));
    const auto ask =
        (fasa_host_rates_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "fasa_host_rates");
    const auto error = ask(dev, k.data(), v.data(), k.size(), n_cells, n_rows, between, rates);
    return error ? fasa_set_error("host rates of %s: %s", ggml_backend_dev_name(dev), error) : 0;
}

int fasa_device_memory(const char * backend, uint64_t * free, uint64_t * total) {
    if (fasa_check_given(backend, "device memory: backend") != 0 ||
        fasa_check_given(free, "device memory: free") != 0 || fasa_check_given(total, "device memory: total") != 0) {
        return -1;
    }
    const auto dev = ggml_backend_dev_by_name(backend);
    if (dev == nullptr) {
        return fasa_set_error("there is no device %s", backend);
    }
    size_t f = 0, t = 0;
    ggml_backend_dev_memory(dev, &f, &t);
    *free = f, *total = t;
    return 0;
}
