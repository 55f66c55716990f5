#include "llama/cache.h"
#include "core/error.h"
#include "llama/remote.h"

#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

fasa_cache::fasa_cache(llama_kv_cache & kv)
    : state(std::make_shared<fasa_state>()), residence(kv), inputs(kv), kv(kv), layers(kv.layers.size()) {}

// ---- why a layer is dense ----

// dense attention is never the faster one where it has to copy a layer over PCIe first
bool fasa_cache::gpu_waits(uint32_t n_kv) const {
    return !residence.any_pinned() && fasa_gpu_waits(state->params, state->gpu_limit, n_kv);
}

// by what its cache is
fasa_reason fasa_cache::cache_reason(size_t ikv) const {
    const auto & l = kv.layers[ikv];
    for (const ggml_type type : { l.k->type, l.v->type }) {
        if (type != GGML_TYPE_F32 && ggml_get_type_traits(type)->to_float == nullptr) {
            return FASA_REASON_CACHE_TYPE;
        }
    }
    const auto dev = residence.device_of(l.il);
    if (dev == nullptr) {
        return fasa_cpu_op_get() ? FASA_REASON_NONE : FASA_REASON_NO_CPU_OPS;
    }
    if (fasa_is_remote(dev)) {
        return fasa_remote_reason(dev);
    }
    if (gpu_waits(kv.get_size())) {
        return FASA_REASON_MIN_CONTEXT_GPU; // and needs no dominant keys
    }
    const auto reason = fasa_device_proc<fasa_dense_reason_t>(dev, "fasa_dense_reason");
    if (reason == nullptr) {
        return FASA_REASON_NO_KERNELS;
    }
    const auto & hparams         = kv.hparams;
    const fasa_layer_shape shape = { l.k->type, l.v->type, hparams.n_embd_head_k(l.il), hparams.n_embd_head_v(l.il),
        int32_t(hparams.n_head(l.il) / std::max(1u, hparams.n_head_kv(l.il))) };
    return reason(dev, &shape);
}

// a list has room for all that its sliding window shows
bool fasa_cache::is_short(uint32_t il) const {
    if (kv.swa_type == LLAMA_SWA_TYPE_NONE || !kv.hparams.is_swa(il)) {
        return false;
    }
    const auto params = state->layer_params(il);
    return kv.n_swa <= fasa_list_length(params, std::max(1u, params.sink + params.recent), UINT32_MAX);
}

// by the settings, the profile and its cache: what a graph adds comes later
fasa_reason fasa_cache::layer_reason(size_t ikv) const {
    const auto & l = kv.layers[ikv];
    if (kv.other) {
        return FASA_REASON_SHARED_CACHE;
    }
    if (l.v == nullptr || kv.hparams.is_mla()) {
        return FASA_REASON_LATENT;
    }
    if (is_short(l.il)) {
        return FASA_REASON_SMALL_WINDOW;
    }
    if (l.il >= state->known.n_chunk.size() || state->known.n_chunk[l.il] == 0) {
        return FASA_REASON_NOT_RANKED;
    }
    if (kv.hparams.n_embd_head_k(l.il) % 2 != 0) {
        return FASA_REASON_ODD_HEAD;
    }
    return cache_reason(ikv);
}

// ---- memory ----

int fasa_cache::configure() {
    collect_counters();
    clear();
    on_changed();
    if (!state->params.enabled) {
        return 0;
    }
    static std::atomic<uint32_t> last_serial{ 0 };
    const uint32_t serial = ++last_serial;

    contexts ctxs;
    for (size_t ikv = 0; ikv < layers.size(); ++ikv) {
        auto & l = layers[ikv];
        l.reason = layer_reason(ikv);
        l.lender = state->lender_of(kv.layers[ikv].il);
        if (l.reason == FASA_REASON_NONE && l.lender >= 0 && layer(l.lender).source != FASA_LAYER_SELECTS) {
            l.reason = FASA_REASON_LENDER_DENSE;
        }
        if (l.reason == FASA_REASON_NONE) {
            add_layer(ikv, ctxs);
            l.fixed.serial = serial;
        }
    }
    add_rows(ctxs);
    if (allocate(ctxs) != 0) {
        return -1;
    }
    for (size_t ikv = 0; ikv < layers.size(); ++ikv) {
        if (layers[ikv].k_dom) { // for foreseen queries, where it is to select ahead; a graph says whether it can
            layers[ikv].for_foreseen = ahead_reason(kv.layers[ikv].il, 1, 0) == FASA_REASON_NONE;
            upload_tables(ikv);
        }
    }
    return 0;
}

// the tensors of a layer that runs sparse
void fasa_cache::add_layer(size_t ikv, contexts & ctxs) {
    auto & l      = layers[ikv];
    const auto il = kv.layers[ikv].il;
    auto * buft   = residence.memory_of(il);
    auto & ctx    = ctxs[buft];
    if (!ctx) {
        ctx.reset(ggml_init({ (4 * layers.size() + 2) * ggml_tensor_overhead(), nullptr, true }));
        if (!ggml_backend_buft_is_host(buft)) {
            const bool remote = fasa_is_remote(residence.device_of(il));
            (remote ? counts : works)[buft] =
                ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, remote ? sizeof(fasa_stats) : sizeof(fasa_work));
        }
    }
    const int n_dom         = fasa_n_dom(std::min(state->params.chunks, state->known.n_chunk[il]));
    const int64_t n_head_kv = kv.hparams.n_head_kv(il);
    const int64_t n_tile    = (kv.get_size() + FASA_TILE - 1) / FASA_TILE;
    l.k_dom                 = ggml_new_tensor_4d(
        ctx.get(), GGML_TYPE_I8, fasa_block_bytes(state->params.k_dom, n_dom), n_tile, n_head_kv, kv.n_stream);
    l.dims         = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, n_dom, n_head_kv);
    l.weight       = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_dom, n_head_kv);
    l.source       = l.lender >= 0 ? FASA_LAYER_BORROWS : FASA_LAYER_SELECTS;
    l.fixed.stats  = &state->stats;
    l.fixed.work   = works.count(buft) ? works[buft] : nullptr;
    l.fixed.counts = counts.count(buft) ? counts[buft] : nullptr;
    ggml_format_name(l.k_dom, "cache_k_dom_l%d", il);
}

// what add_layer and add_rows have made, zeroed
int fasa_cache::allocate(contexts & ctxs) {
    const bool pinned = residence.any_pinned();
    for (auto & [buft, ctx] : ctxs) {
        ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        if (!buf) {
            const size_t size = ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft);
            clear();
            return fasa_set_error("the dominant keys%s need %.1f MiB in %s, which cannot be allocated; use a smaller "
                                  "context, fewer chunks%s or k_dom q4",
                pinned ? " and the rows that are attended" : "", size / 1048576.0, ggml_backend_buft_name(buft),
                pinned ? ", a smaller row_cache" : "");
        }
        ggml_backend_buffer_clear(buf.get(), 0);
        ctxs_bufs.emplace_back(std::move(ctx), std::move(buf));
    }
    return 0;
}

// rows [n] of `from`, a tensor of rows behind each other, in `to`
static void fasa_copy_tensor_rows(ggml_tensor * to, const ggml_tensor * from, const std::vector<int64_t> & rows) {
    std::vector<uint8_t> all(ggml_nbytes(from)), some(rows.size() * from->nb[1]);
    ggml_backend_tensor_get(from, all.data(), 0, all.size());
    for (size_t i = 0; i < rows.size(); ++i) {
        memcpy(some.data() + i * from->nb[1], all.data() + rows[i] * from->nb[1], from->nb[1]);
    }
    ggml_backend_tensor_set(to, some.data(), 0, some.size());
}

const fasa_dominant_rows * fasa_cache::dominant_rows(int32_t il, const fasa_query_rows & rows) {
    auto & l = layer(il);
    if (rows.product == nullptr || l.dominant.of == rows.weight()) {
        return rows.product ? &l.dominant : nullptr;
    }
    const ggml_tensor * weight = rows.weight();
    auto * buft                = weight->buffer ? ggml_backend_buffer_get_type(weight->buffer) : nullptr;
    auto * memory              = residence.memory_of(il);
    const bool plain = buft && (buft == memory || (ggml_backend_buft_is_host(buft) && l.fixed.work == nullptr));
    if (!plain || !ggml_is_contiguous(weight) || weight->ne[2] != 1) { // rows in another order
        return nullptr;
    }
    const int64_t n_dom = l.dims->ne[0], n_head = kv.hparams.n_head(il), n_group = n_head / l.dims->ne[1];
    std::vector<int32_t> dims(ggml_nelements(l.dims));
    ggml_backend_tensor_get(l.dims, dims.data(), 0, ggml_nbytes(l.dims));
    std::vector<int64_t> wanted;
    for (int64_t h = 0; h < n_head; ++h) {
        for (int64_t j = 0; j < n_dom; ++j) {
            wanted.push_back(rows.row(h, std::max(0, dims[h / n_group * n_dom + j])));
        }
    }
    ggml_context_ptr ctx(ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true }));
    fasa_dominant_rows out;
    out.of     = weight;
    out.weight = ggml_new_tensor_2d(ctx.get(), weight->type, weight->ne[0], wanted.size());
    out.bias   = rows.bias ? ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, wanted.size()) : nullptr;
    out.dims   = l.dims;
    ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), memory));
    if (!buf) {
        return nullptr;
    }
    ggml_backend_buffer_set_usage(buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    fasa_copy_tensor_rows(out.weight, weight, wanted);
    if (out.bias) {
        std::vector<float> all(ggml_nelements(rows.bias)), some(wanted.size());
        ggml_backend_tensor_get(rows.bias, all.data(), 0, ggml_nbytes(rows.bias));
        std::transform(wanted.begin(), wanted.end(), some.begin(), [&](int64_t row) { return all[row]; });
        ggml_backend_tensor_set(out.bias, some.data(), 0, ggml_nbytes(out.bias));
    }
    ctxs_bufs.emplace_back(std::move(ctx), std::move(buf));
    l.dominant = out;
    return &l.dominant;
}

// dims and weights of a layer, from the profile to its device
void fasa_cache::upload_tables(size_t ikv) {
    const auto & known  = state->known;
    const auto il       = kv.layers[ikv].il;
    const int n_head_kv = kv.hparams.n_head_kv(il), n_rot = kv.hparams.n_rot(il);
    const int n_chunk = known.n_chunk[il], n_dom = layers[ikv].dims->ne[0];
    const int chunks = std::min<int>(state->params.chunks, n_chunk);
    const auto rope  = kv.hparams.rope_type;
    const int layout = rope == LLAMA_ROPE_TYPE_NORM || rope == LLAMA_ROPE_TYPE_NONE ? 0 : 1;

    const bool ahead     = layers[ikv].for_foreseen;
    const auto & ranking = ahead && !known.ahead_ranking.empty() ? known.ahead_ranking : known.ranking;
    const auto & weights = ahead && !known.ahead_weight.empty() ? known.ahead_weight : known.weight;

    size_t weights_before = 0; // ranked KV heads of the layers before this one
    for (uint32_t i = 0; i < il; ++i) {
        weights_before += known.n_chunk[i] > 0 ? known.n_head_kv[i] : 0;
    }

    std::vector<int32_t> dims(n_dom * n_head_kv, -1);
    std::vector<float> weight(n_dom * n_head_kv, 1.0f);
    for (int h = 0; h < n_head_kv; ++h) {
        for (int c = 0; c < chunks; ++c) {
            const int at = h * n_dom + 2 * c;
            fasa_chunk_dims(ranking[known.offset[il] + h * n_chunk + c], n_rot, layout, &dims[at]);
            if (uint32_t(c) < known.weight_k) {
                weight[at] = weight[at + 1] = weights[(weights_before + h) * known.weight_k + c];
            }
        }
    }
    ggml_backend_tensor_set(layers[ikv].dims, dims.data(), 0, ggml_nbytes(layers[ikv].dims));
    ggml_backend_tensor_set(layers[ikv].weight, weight.data(), 0, ggml_nbytes(layers[ikv].weight));
}

bool fasa_cache::has_ranking(int32_t il, bool for_foreseen) {
    const bool differ = !state->known.ahead_ranking.empty() || !state->known.ahead_weight.empty();
    return !differ || layer(il).for_foreseen == for_foreseen;
}

void fasa_cache::set_ranking(int32_t il, bool for_foreseen) {
    layer(il).for_foreseen = for_foreseen;
    upload_tables(kv.map_layer_ids.at(il));
    on_changed();
}

void fasa_cache::clear() {
    layers.assign(kv.layers.size(), {});
    works.clear();
    counts.clear();
    ctxs_bufs.clear();
}

// ---- FASA-M: attended rows ----

size_t fasa_cache::n_row_layers() const {
    size_t n = 0;
    for (size_t ikv = 0; ikv < layers.size(); ++ikv) {
        n += residence.is_pinned(kv.layers[ikv].il) && layer_reason(ikv) == FASA_REASON_NONE;
    }
    return n;
}

fasa_row_layout fasa_cache::row_of(size_t ikv) const {
    const auto & l = kv.layers[ikv];
    return fasa_row_layout(l.k->type, l.v->type, kv.hparams.n_embd_head_k(l.il), kv.hparams.n_embd_head_v(l.il));
}

uint32_t fasa_cache::list_length(size_t ikv) const {
    const auto params = state->layer_params(kv.layers[ikv].il);
    return fasa_list_length(params, std::max(1u, params.sink + params.recent), kv.get_size());
}

// room on the device for the rows of one token, and the row caches
void fasa_cache::add_rows(contexts & ctxs) {
    std::vector<size_t> pinned;
    std::map<ggml_backend_buffer_type_t, size_t> most;
    for (size_t ikv = 0; ikv < layers.size(); ++ikv) {
        const auto il = kv.layers[ikv].il;
        if (layers[ikv].k_dom && residence.is_pinned(il)) {
            pinned.push_back(ikv);
            const int64_t n_list = state->params.per_head ? kv.hparams.n_head(il) : kv.hparams.n_head_kv(il);
            auto & bytes         = most[residence.memory_of(il)];
            bytes                = std::max(bytes, fasa_rows_bytes(row_of(ikv), list_length(ikv), n_list));
        }
    }
    std::map<ggml_backend_buffer_type_t, ggml_tensor *> rows;
    for (const auto & [buft, bytes] : most) {
        rows[buft] = ggml_new_tensor_1d(ctxs[buft].get(), GGML_TYPE_I8, bytes);
    }
    for (const size_t ikv : pinned) {
        const auto buft         = residence.memory_of(kv.layers[ikv].il);
        const int64_t slot      = FASA_ROW_HEAD + row_of(ikv).stride;
        const int64_t n_head_kv = kv.hparams.n_head_kv(kv.layers[ikv].il);
        const int64_t wanted    = state->params.row_cache < 0 ?
            2 * (int64_t) list_length(ikv) :
            ((int64_t) state->params.row_cache << 20) / (int64_t) state->n_row_layers / n_head_kv / kv.n_stream / slot;
        const int64_t n_slot =
            std::min<int64_t>(wanted, kv.get_size() + FASA_ROW_WAYS - 1) / FASA_ROW_WAYS * FASA_ROW_WAYS;
        layers[ikv].fixed.rows      = rows[buft];
        layers[ikv].fixed.row_cache = n_slot > 0 ?
            ggml_new_tensor_4d(ctxs[buft].get(), GGML_TYPE_I8, slot, n_slot, n_head_kv, kv.n_stream) :
            nullptr;
    }
}

// ---- counters ----

void fasa_cache::collect_counters() {
    auto & s = state->stats;
    for (auto & [buft, work] : works) {
        uint64_t seen[fasa_work::N_COUNTER];
        static_assert(offsetof(fasa_work, counter) == 0, "they are read from the start of the tensor");
        static_assert(sizeof(seen) <= sizeof(fasa_work::counter), "every counter has a place");
        ggml_backend_tensor_get(work, seen, 0, sizeof(seen));
        ggml_backend_tensor_memset(work, 0, 0, sizeof(seen));
#define X(name, NAME) s.name += seen[fasa_work::NAME];
        FASA_COUNTERS_OP(X) FASA_COUNTERS_DEVICE(X)
#undef X
    }
    for (auto & [buft, count] : counts) { // a fasa_stats of the other machine's, which is of this build
        fasa_stats seen;
        ggml_backend_tensor_get(count, (void *) &seen, 0, sizeof(seen));
        ggml_backend_tensor_memset(count, 0, 0, sizeof(seen));
#define X(name, NAME) s.name += seen.name;
        FASA_COUNTERS_OP(X)
#undef X
    }
}

void fasa_cache::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const {
    for (const auto & [ctx, buf] : ctxs_bufs) {
        sizes[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
    }
    residence.memory_breakdown(sizes);
}

size_t fasa_cache::bytes_kv() const {
    return kv.size_k_bytes() + kv.size_v_bytes();
}

size_t fasa_cache::bytes_kv_host() const {
    size_t size = 0;
    for (const auto & l : kv.layers) {
        size += residence.is_pinned(l.il) ? ggml_nbytes(l.k) + (l.v ? ggml_nbytes(l.v) : 0) : 0;
    }
    return size;
}

size_t fasa_cache::cell_bytes(int32_t il) const {
    const auto & l = kv.layers[kv.map_layer_ids.at(il)];
    return ggml_row_size(l.k->type, l.k->ne[0]) + (l.v ? ggml_row_size(l.v->type, l.v->ne[0]) : 0);
}

size_t fasa_cache::bytes_row_cache() const {
    size_t size = 0;
    for (const auto & l : layers) {
        size += l.fixed.row_cache ? ggml_nbytes(l.fixed.row_cache) : 0;
    }
    return size;
}

size_t fasa_cache::bytes_k_dom() const {
    size_t size = 0;
    for (const auto & l : layers) {
        size += l.k_dom ? ggml_nbytes(l.k_dom) : 0;
    }
    return size;
}

// ---- events ----

void fasa_cache::on_changed() {
    inputs.all_stale();
}

bool fasa_cache::on_apply(const llama_kv_cache_context & mctx) {
    const auto & sinfo  = mctx.sinfos[mctx.i_cur];
    const auto & ubatch = mctx.ubatches[mctx.i_cur];
    if (!residence.has_room(ubatch.n_tokens, tile_pool_bytes(ubatch))) {
        return false;
    }
    if (is_first) {
        fasa_begin_ubatch(*state, ubatch, kv);
        state->now.continues = mctx.i_cur > 0;
    }
    inputs.begin(sinfo.strm, sinfo.idxs, mctx.n_kv);
    return true;
}

bool fasa_cache::set_mask(ggml_tensor * mask, const llama_ubatch & ubatch, bool causal) const {
    return inputs.set_mask(mask, ubatch, causal, state->params.enabled && state->now.decodes);
}

// ---- graphs ----

fasa_cache * fasa_cache::of(const llama_kv_cache_context * mctx) {
    return mctx->kv ? mctx->kv->fasa.get() : nullptr;
}

bool fasa_cache::has_layer(int32_t il) const {
    return kv.map_layer_ids.count(il) > 0;
}

size_t fasa_cache::n_layers() const {
    return kv.map_layer_ids.size();
}

bool fasa_cache::is_shared(int32_t il) const {
    const auto at = kv.map_layer_ids.at(il);
    return std::count_if(kv.map_layer_ids.begin(), kv.map_layer_ids.end(),
               [&](const auto & other) { return other.second == at; }) > 1;
}

fasa_layer & fasa_cache::layer(int32_t il) {
    return layers[kv.map_layer_ids.at(il)];
}

ggml_tensor * fasa_cache::work(int32_t il) const {
    const auto found = works.find(residence.memory_of(il));
    return found == works.end() ? nullptr : found->second;
}

// the block that llama_kv_cache::build_input_k_rot chooses
int32_t fasa_cache::n_hadamard() const {
    if (!kv.attn_rot_k) {
        return 0;
    }
    int32_t n = 64;
    while (kv.n_embd_head_k_all % (2 * n) == 0) {
        n *= 2;
    }
    return n;
}

// ---- reasons ----

void fasa_cache::publish_reasons() {
    reasons.resize(layers.size());
    aheads.resize(layers.size());
    for (size_t ikv = 0; ikv < layers.size(); ++ikv) {
        const auto & l = layers[ikv];
        reasons[ikv]   = l.reason != FASA_REASON_NONE ? l.reason : l.now;
        aheads[ikv]    = l.ahead;
    }
}

fasa_reason fasa_cache::reason(int32_t il) const {
    const size_t ikv = kv.map_layer_ids.at(il);
    return ikv < reasons.size() ? reasons[ikv] : FASA_REASON_NOT_BUILT;
}

fasa_reason fasa_cache::published_ahead(int32_t il) const {
    const size_t ikv = kv.map_layer_ids.at(il);
    return ikv < aheads.size() ? aheads[ikv] : FASA_REASON_NOT_BUILT;
}
