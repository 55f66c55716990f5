// For `fasa-gguf bench`: a cache of a given depth without its prefill, and how fast a device copies.

#include "core/error.h"
#include "llama/cache.h"

#include "llama-kv-cache.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <random>
#include <vector>

// ---- random rows ----

static constexpr size_t FASA_POOL_BYTES  = 64u << 20;
static constexpr size_t FASA_PIECE_BYTES = 1u << 20; // of one upload

// Random blocks of one type, made once. A row of a tensor is as many blocks in succession; every round through the pool
// begins one block further on, so no two rows of a stream are equal: equal keys would tie in the selection.
struct fasa_pool {
    std::vector<uint8_t> data;

    void make(ggml_type type, size_t bytes, uint64_t seed);
    void write(ggml_tensor * t, uint32_t stream, uint32_t n,
        uint64_t start) const; // rows [0, n) of a stream, from row `start` of the pool on
};

void fasa_pool::make(ggml_type type, size_t bytes, uint64_t seed) {
    const size_t n_block = std::max(bytes, FASA_PIECE_BYTES) / ggml_type_size(type) + 1;
    const size_t n_value = ggml_blck_size(type);
    data.resize(n_block * ggml_type_size(type));

    std::mt19937 rng(seed + type);
    std::normal_distribution<float> normal; // the scale that normalised keys have
    std::vector<float> values(4096 * n_value);
    for (size_t i = 0; i < n_block; i += 4096) {
        const size_t n = std::min<size_t>(4096, n_block - i);
        std::generate_n(values.begin(), n * n_value, [&] { return normal(rng); });
        ggml_quantize_chunk(type, values.data(), data.data() + i * ggml_type_size(type), 0, 1, n * n_value, nullptr);
    }
}

void fasa_pool::write(ggml_tensor * t, uint32_t stream, uint32_t n, uint64_t start) const {
    const size_t row = t->nb[1], block = ggml_type_size(t->type);
    const size_t n_pool = data.size() / row - 1; // rows of the pool, whichever block of the first one they begin at
    start %= n_pool;
    for (size_t i = 0; i < n;) {
        const size_t first = (start + i) % n_pool, round = (start + i) / n_pool;
        const size_t m = std::min({ n - i, n_pool - first, std::max<size_t>(1, FASA_PIECE_BYTES / row) });
        ggml_backend_tensor_set(
            t, data.data() + first * row + round * block % row, stream * t->nb[2] + i * row, m * row);
        i += m;
    }
}

// ---- a cache of them ----

int fasa_cache::check_fill(uint32_t n_cells) const {
    if (kv.other) {
        return fasa_set_error("the cache is shared with another context, and cannot be filled at random");
    }
    if (kv.v_trans) {
        return fasa_set_error("flash attention is off in this context, and its V cannot be filled at random; make the "
                              "context with flash_attn on");
    }
    if (n_cells > kv.get_size() && kv.n_swa == 0) {
        return fasa_set_error("%u cells cannot be filled: a sequence of this context has %u", n_cells, kv.get_size());
    }
    return 0;
}

// Every stream s: sequence s at the positions below n_cells, in ascending cells from 0 on, as a prefill leaves them. A
// window's smaller cache holds the last of them.
void fasa_cache::fill_random(uint32_t n_cells, uint64_t seed, std::map<ggml_type, fasa_pool> & pools) {
    const uint32_t n = std::min(n_cells, kv.get_size());
    std::vector<ggml_tensor *> tensors;
    for (const auto & l : kv.layers) {
        tensors.push_back(l.k);
        if (l.v) {
            tensors.push_back(l.v);
        }
    }
    for (auto * t : tensors) {
        const size_t bytes = std::min(FASA_POOL_BYTES, n * t->nb[1]) + 2 * t->nb[1];
        if (pools[t->type].data.size() < bytes) {
            pools[t->type].make(t->type, bytes, seed);
        }
    }
    std::mt19937_64 rng(seed);
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        for (auto * t : tensors) {
            pools[t->type].write(t, s, n, rng());
        }
        auto & cells = kv.v_cells[s];
        for (uint32_t i = 0; i < n; ++i) {
            const llama_pos pos = n_cells - n + i;
            llama_kv_cell_ext ext;
            ext.tok = 0;
            if (kv.hparams.n_pos_per_embd() > 1) {
                ext.x = ext.y = pos; // of text
            }
            cells.pos_set(i, pos);
            cells.ext_set(i, ext);
            cells.seq_add(i, s);
        }
        kv.v_heads[s] = n % kv.get_size();
    }
    kv.sc_info = {}; // a stream copy that waits would undo this
    on_changed();
}

int fasa_fill_random(llama_context * ctx, uint32_t n_cells, uint64_t seed) {
    const auto caches = ctx ? fasa_caches(llama_get_memory(ctx)) : std::vector<fasa_cache *>();
    if (caches.empty()) {
        return fasa_set_error(
            "this context has no KV cache that can be filled at random (recurrent, latent or encoder-only model)");
    }
    for (auto * cache : caches) {
        if (cache->check_fill(n_cells) != 0) {
            return -1;
        }
    }
    llama_synchronize(ctx);
    llama_memory_clear(llama_get_memory(ctx), false);
    std::map<ggml_type, fasa_pool> pools;
    for (size_t i = 0; i < caches.size(); ++i) {
        caches[i]->fill_random(n_cells, seed + 1000 * i, pools);
    }
    return 0;
}

// ---- the rate of a device ----

int fasa_copy_rate(const char * backend_name, int32_t n_threads, uint64_t bytes, double * bytes_per_second) {
    ggml_backend_ptr backend(backend_name ? ggml_backend_init_by_name(backend_name, nullptr) : nullptr);
    if (!backend) {
        return fasa_set_error("there is no backend %s", backend_name ? backend_name : "NULL");
    }
    const int64_t n = bytes / sizeof(float);
    if (n < 1 || n > INT32_MAX) {
        return fasa_set_error(
            "copy rate: expected 4 to %llu bytes, found %llu", 4ull * INT32_MAX, (unsigned long long) bytes);
    }
    if (ggml_backend_is_cpu(backend.get())) {
        ggml_backend_cpu_set_n_threads(backend.get(), std::max(1, n_threads));
    }
    ggml_context_ptr ctx(ggml_init({ 8 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    ggml_tensor * src   = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n);
    ggml_tensor * dst   = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n);
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, ggml_cpy(ctx.get(), src, dst));
    ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
    if (!buf) {
        return fasa_set_error("copy rate: %s has no %.1f MiB for two buffers", backend_name, 2 * bytes / 1048576.0);
    }
    ggml_backend_buffer_clear(buf.get(), 0); // memory that was never written may be one page of zeros

    for (int repeat = 1;; repeat *= 2) { // the rounds before the last one warm up
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < repeat; ++i) {
            if (ggml_backend_graph_compute_async(backend.get(), graph) != GGML_STATUS_SUCCESS) {
                return fasa_set_error("copy rate: the copy failed on %s", backend_name);
            }
        }
        ggml_backend_synchronize(backend.get());
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (seconds > 0.2 && repeat > 1) {
            *bytes_per_second = 2.0 * n * sizeof(float) * repeat / seconds;
            return 0;
        }
    }
}

static ggml_backend_dev_t fasa_find_device(const char * name) {
    ggml_backend_dev_t dev = name ? ggml_backend_dev_by_name(name) : nullptr;
    if (dev == nullptr) {
        fasa_set_error("there is no device %s", name ? name : "NULL");
    }
    return dev;
}

// K and V of the first stream of the pinned layers on the first one's device that have its shape, as FAC gets them
std::vector<std::pair<ggml_tensor *, ggml_tensor *>> fasa_cache::pinned_rows(ggml_context * ctx) const {
    std::vector<std::pair<ggml_tensor *, ggml_tensor *>> rows;
    const llama_kv_cache::kv_layer * first = nullptr;
    for (const auto & l : kv.layers) {
        first = first || !residence.is_pinned(l.il) ? first : &l;
        if (first == nullptr || !residence.is_pinned(l.il) || residence.device_of(l.il) != residence.device_of(first->il) ||
            !ggml_are_same_shape(l.k, first->k) || !ggml_are_same_shape(l.v, first->v)) {
            continue;
        }
        const int64_t n_head = kv.hparams.n_head_kv(l.il);
        const auto view      = [&](ggml_tensor * t) {
            return ggml_view_3d(
                ctx, t, t->ne[0] / n_head, n_head, t->ne[1], ggml_row_size(t->type, t->ne[0] / n_head), t->nb[1], 0);
        };
        rows.emplace_back(view(l.k), view(l.v));
    }
    return rows;
}

int fasa_host_rates(llama_context * ctx, uint32_t n_cells, uint32_t n_rows, uint64_t between, fasa_rates * rates) {
    if (rates == nullptr || rates->size != sizeof(*rates)) {
        return fasa_set_error("host rates: the header and the library differ");
    }
    ggml_context_ptr views(ggml_init({ 2 * 1024 * ggml_tensor_overhead(), nullptr, true }));
    std::vector<ggml_tensor *> k, v;
    for (const auto * cache : ctx ? fasa_caches(llama_get_memory(ctx)) : std::vector<fasa_cache *>()) {
        for (const auto & row : cache->pinned_rows(views.get())) {
            k.push_back(row.first), v.push_back(row.second);
        }
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
    const auto dev = fasa_find_device(backend);
    if (dev == nullptr) {
        return -1;
    }
    size_t f = 0, t = 0;
    ggml_backend_dev_memory(dev, &f, &t);
    *free = f, *total = t;
    return 0;
}
