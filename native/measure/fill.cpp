// fasa_fill_random: a cache of a given depth without its prefill.

#include "core/error.h"
#include "llama/cache.h"

#include "llama-kv-cache.h"

#include "ggml-backend.h"

#include <algorithm>
#include <map>
#include <random>
#include <vector>

// ---- random rows ----

static constexpr size_t FASA_POOL_BYTES  = 64u << 20;
static constexpr size_t FASA_PIECE_BYTES = 1u << 20; // of one upload

// Random blocks of one type, made once. A row of a tensor is several blocks in succession. Every pass through the pool
// begins one block later, so no two rows of a stream are equal: equal keys would tie in the selection.
struct fasa_pool {
    std::vector<uint8_t> data;

    void make(ggml_type type, size_t bytes, uint64_t seed);
    // rows [0, n) of a stream, from row `start` of the pool on
    void write(ggml_tensor * t, uint32_t stream, uint32_t n, uint64_t start) const;
};

void fasa_pool::make(ggml_type type, size_t bytes, uint64_t seed) {
    const size_t n_block = std::max(bytes, FASA_PIECE_BYTES) / ggml_type_size(type) + 1;
    const size_t n_value = ggml_blck_size(type);
    data.resize(n_block * ggml_type_size(type));

    std::mt19937 rng(seed + type);
    std::normal_distribution<float> normal; // the scale of normalised keys
    std::vector<float> values(4096 * n_value);
    for (size_t i = 0; i < n_block; i += 4096) {
        const size_t n = std::min<size_t>(4096, n_block - i);
        std::generate_n(values.begin(), n * n_value, [&] { return normal(rng); });
        ggml_quantize_chunk(type, values.data(), data.data() + i * ggml_type_size(type), 0, 1, n * n_value, nullptr);
    }
}

void fasa_pool::write(ggml_tensor * t, uint32_t stream, uint32_t n, uint64_t start) const {
    const size_t row = t->nb[1], block = ggml_type_size(t->type);
    const size_t n_pool = data.size() / row - 1; // whole rows of the pool, wherever in the first one they begin
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

typedef std::map<ggml_type, fasa_pool> fasa_pools;

struct fasa_cache::random_fill {
    fasa_cache & cache;
    llama_kv_cache & kv = cache.kv;

    int check(uint32_t n_cells) const;
    void fill(uint32_t n_cells, uint64_t seed, fasa_pools & pools);

private:
    std::vector<ggml_tensor *> tensors() const; // K and V of all layers
    void fill_cells(uint32_t stream, uint32_t n, uint32_t n_cells);
};

int fasa_cache::random_fill::check(uint32_t n_cells) const {
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

std::vector<ggml_tensor *> fasa_cache::random_fill::tensors() const {
    std::vector<ggml_tensor *> all;
    for (const auto & l : kv.layers) {
        all.push_back(l.k);
        if (l.v) {
            all.push_back(l.v);
        }
    }
    return all;
}

// cells [0, n) of a stream: the last n of the positions below n_cells, of the sequence of the stream's number
void fasa_cache::random_fill::fill_cells(uint32_t stream, uint32_t n, uint32_t n_cells) {
    auto & cells = kv.v_cells[stream];
    for (uint32_t i = 0; i < n; ++i) {
        const llama_pos pos = n_cells - n + i;
        llama_kv_cell_ext ext;
        ext.tok = 0;
        if (kv.hparams.n_pos_per_embd() > 1) {
            ext.x = ext.y = pos; // of text
        }
        cells.pos_set(i, pos);
        cells.ext_set(i, ext);
        cells.seq_add(i, stream);
    }
    kv.v_heads[stream] = n % kv.get_size();
}

// Ascending cells from 0 on, as a prefill leaves them. The smaller cache of a sliding window holds the last positions.
void fasa_cache::random_fill::fill(uint32_t n_cells, uint64_t seed, fasa_pools & pools) {
    const uint32_t n = std::min(n_cells, kv.get_size());
    const auto all   = tensors();
    for (auto * t : all) {
        const size_t bytes = std::min(FASA_POOL_BYTES, n * t->nb[1]) + 2 * t->nb[1];
        if (pools[t->type].data.size() < bytes) {
            pools[t->type].make(t->type, bytes, seed);
        }
    }
    std::mt19937_64 rng(seed);
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        for (auto * t : all) {
            pools[t->type].write(t, s, n, rng());
        }
        fill_cells(s, n, n_cells);
    }
    kv.sc_info = {}; // a stream copy that waits would undo this
    cache.on_changed();
}

int fasa_fill_random(llama_context * ctx, uint32_t n_cells, uint64_t seed) {
    if (fasa_check_given(ctx, "llama_context") != 0) {
        return -1;
    }
    const auto caches = fasa_caches(llama_get_memory(ctx));
    if (caches.empty()) {
        return fasa_set_error(
            "this context has no KV cache that can be filled at random (recurrent, latent or encoder-only model)");
    }
    const fasa_change change(caches);
    if (!change) {
        return -1;
    }
    for (auto * cache : caches) {
        if (fasa_cache::random_fill{ *cache }.check(n_cells) != 0) {
            return -1;
        }
    }
    llama_synchronize(ctx);
    llama_memory_clear(llama_get_memory(ctx), false);
    fasa_pools pools;
    for (size_t i = 0; i < caches.size(); ++i) {
        fasa_cache::random_fill{ *caches[i] }.fill(n_cells, seed + 1000 * i, pools);
    }
    return 0;
}
