#include "llama/cache.h"
#include "core/error.h"

#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>

fasa_cache::fasa_cache(llama_kv_cache & kv) : state(std::make_shared<fasa_state>()), kv(kv) {
    stale.resize(kv.n_stream);
    owed.resize(kv.n_stream);
    layers.resize(kv.layers.size());
    for (const auto & l : kv.layers) {
        any_pinned = any_pinned || is_pinned(l.il);
    }
    make_stages();
    on_changed();
}

// ---- where K and V lie ----

// nullptr: the device's backend has none of that name, or, as the one that splits tensors over devices, is in no
// registry
template <typename F>
static F fasa_device_proc(ggml_backend_dev_t dev, const char * name) {
    const auto reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
    return reg ? (F) ggml_backend_reg_get_proc_address(reg, name) : nullptr;
}

static thread_local int32_t fasa_kv_place_next = FASA_KV_DEVICE;

static ggml_backend_buffer_type_t fasa_pinned_buft(ggml_backend_dev_t dev) {
    const auto get = fasa_device_proc<fasa_host_buft_t>(dev, "fasa_host_buft");
    return get ? get(dev, [](const char * text) { fasa_set_error("%s", text); }) : nullptr;
}

int fasa_set_kv_place(int32_t place) {
    if (place != FASA_KV_DEVICE && place != FASA_KV_HOST) {
        return fasa_set_error("fasa_set_kv_place: expected %d or %d, found %d", FASA_KV_DEVICE, FASA_KV_HOST, place);
    }
    fasa_kv_place_next = place;
    fasa_set_error("%s", ""); // what it says after a context could not be made is about that context
    return 0;
}

ggml_backend_buffer_type_t fasa_kv_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    const auto pinned = fasa_kv_place_next == FASA_KV_HOST ? fasa_pinned_buft(dev) : nullptr;
    return pinned ? pinned : buft;
}

ggml_backend_dev_t fasa_cache::device_of(int32_t il) const {
    const auto buft = ggml_backend_buffer_get_type(kv.layers[kv.map_layer_ids.at(il)].k->buffer);
    return ggml_backend_buft_is_host(buft) ? nullptr : ggml_backend_buft_get_device(buft);
}

bool fasa_cache::is_pinned(int32_t il) const {
    const auto dev = device_of(il);
    return dev &&
        ggml_backend_buffer_get_type(kv.layers[kv.map_layer_ids.at(il)].k->buffer) != ggml_backend_dev_buffer_type(dev);
}

size_t fasa_cache::stage_v_at(int32_t il) const {
    return (ggml_nbytes(kv.layers[kv.map_layer_ids.at(il)].k) + 255) / 256 * 256;
}

ggml_tensor * fasa_cache::stage(int32_t il) const {
    const auto found = stages.find(device_of(il));
    return found == stages.end() ? nullptr : found->second;
}

ggml_tensor * fasa_cache::work(int32_t il) const {
    const auto found = works.find(buft_of(kv.map_layer_ids.at(il)));
    return found == works.end() ? nullptr : found->second;
}

int32_t fasa_cache::next_pinned(int32_t il) const {
    for (size_t ikv = kv.map_layer_ids.at(il) + 1; ikv < kv.layers.size(); ++ikv) {
        const int32_t next = kv.layers[ikv].il;
        if (is_pinned(next) && device_of(next) == device_of(il)) {
            return next;
        }
    }
    return -1;
}

// Room for the largest layer's K and V on every device. Throws, as the cache that is being made does, when there is
// none.
void fasa_cache::make_stages() {
    std::map<ggml_backend_dev_t, size_t> most;
    for (const auto & l : kv.layers) {
        if (!kv.hparams.no_alloc && is_pinned(l.il)) {
            most[device_of(l.il)] = std::max(most[device_of(l.il)], stage_v_at(l.il) + ggml_nbytes(l.v));
        }
    }
    for (const auto & [dev, bytes] : most) {
        ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
        stages[dev] = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, bytes);
        ggml_backend_buffer_ptr buf(
            ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_dev_buffer_type(dev)));
        if (!buf) {
            fasa_set_error("one layer's K and V need %.1f MiB in %s beside the pinned cache, which cannot be "
                           "allocated; use a smaller context or a "
                           "quantised cache",
                bytes / 1048576.0, ggml_backend_dev_name(dev));
            throw std::runtime_error(fasa_error());
        }
        stage_bufs.emplace_back(std::move(ctx), std::move(buf));
    }
}

// Whether the devices of FASA-M have memory left for what ggml-cuda takes while it computes, beside the compute buffer:
// the process would end where it finds none. Asked when a ubatch needs more than any before it.
bool fasa_cache::has_room(uint32_t n_tokens) {
    static constexpr size_t OTHER   = 16u << 20,
                            KERNELS = 100u << 20; // partial results; kernels, which are loaded when they first run
    size_t n_act                    = kv.hparams.n_embd; // values of a token that go into a matrix product
    for (uint32_t il = 0; il < kv.hparams.n_layer(); ++il) {
        n_act = std::max<size_t>(n_act, kv.hparams.n_ff(il));
    }
    const size_t need = 4 * n_act * n_tokens +
        OTHER; // as blocks of q8_1, or beside f16 weights in f16, what goes in and what comes out
    for (const auto & [dev, stage] : stages) {
        if (need <= room[dev]) {
            continue;
        }
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(dev, &free, &total);
        const size_t wanted = need + (room[dev] ? 0 : KERNELS);
        if (free < wanted) {
            fasa_set_error("%s has %.0f MiB of memory free, and computing %u tokens together takes about %.0f; free "
                           "some (other programs, other contexts), "
                           "or use a smaller ubatch (-ub) or context (-c)",
                ggml_backend_dev_name(dev), free / 1048576.0, n_tokens, wanted / 1048576.0);
            LLAMA_LOG_ERROR("fasa: %s\n", fasa_error());
            return false;
        }
        room[dev] = need;
    }
    return true;
}

// dense attention is never the faster one where it has to copy a layer over PCIe first
bool fasa_cache::gpu_waits(uint32_t n_kv) const {
    return !any_pinned && fasa_gpu_waits(state->params, n_kv);
}

// ---- memory ----

ggml_backend_buffer_type_t fasa_cache::buft_of(size_t ikv) const {
    const auto dev = device_of(kv.layers[ikv].il);
    return dev ? ggml_backend_dev_buffer_type(dev) : ggml_backend_buffer_get_type(kv.layers[ikv].k->buffer);
}

const char * fasa_cache::layer_dense_reason(size_t ikv) const {
    const auto & l = kv.layers[ikv];
    const auto il  = l.il;
    if (kv.other) {
        return "its cache is shared with another context";
    }
    if (l.v == nullptr || kv.hparams.is_mla()) {
        return "multi-head latent attention has no keys per head";
    }
    if (il >= state->n_chunk.size() || state->n_chunk[il] == 0) {
        return "the profile has no ranking for it";
    }
    if (kv.hparams.n_embd_head_k(il) % 2 != 0) {
        return "its head dimension is odd";
    }
    for (const ggml_type type : { l.k->type, l.v->type }) {
        if (type != GGML_TYPE_F32 && ggml_get_type_traits(type)->to_float == nullptr) {
            return "its cache type cannot be read back";
        }
    }
    const auto buft = ggml_backend_buffer_get_type(l.k->buffer);
    if (!ggml_backend_buft_is_host(buft)) {
        if (gpu_waits(kv.get_size())) {
            return FASA_GPU_WAITS; // and needs no dominant keys
        }
        const auto dev    = ggml_backend_buft_get_device(buft);
        const auto reason = fasa_device_proc<fasa_dense_reason_t>(dev, "fasa_dense_reason");
        if (reason == nullptr) {
            return "its cache is on a device that FASA has no kernels for";
        }
        const fasa_layer_shape shape = { l.k->type, l.v->type, kv.hparams.n_embd_head_k(il),
            kv.hparams.n_embd_head_v(il), int32_t(kv.hparams.n_head(il) / std::max(1u, kv.hparams.n_head_kv(il))) };
        return reason(dev, &shape);
    }
    if (fasa_cpu_op_get() == nullptr) {
        return "the CPU backend has no FASA ops";
    }
    return "";
}

// dims and weights of a layer, from the profile to its device
void fasa_cache::upload_tables(size_t ikv) {
    const auto il       = kv.layers[ikv].il;
    const int n_head_kv = kv.hparams.n_head_kv(il), n_rot = kv.hparams.n_rot(il);
    const int n_chunk = state->n_chunk[il], n_dom = layers[ikv].dims->ne[0];
    const int chunks = std::min<int>(state->params.chunks, n_chunk);
    const auto rope  = kv.hparams.rope_type;
    const int layout = rope == LLAMA_ROPE_TYPE_NORM || rope == LLAMA_ROPE_TYPE_NONE ? 0 : 1;

    size_t weights_before = 0; // ranked KV heads of the layers before this one
    for (uint32_t i = 0; i < il; ++i) {
        weights_before += state->n_chunk[i] > 0 ? state->n_head_kv[i] : 0;
    }

    std::vector<int32_t> dims(n_dom * n_head_kv, -1);
    std::vector<float> weight(n_dom * n_head_kv, 1.0f);
    for (int h = 0; h < n_head_kv; ++h) {
        for (int c = 0; c < chunks; ++c) {
            const int at = h * n_dom + 2 * c;
            fasa_chunk_dims(state->ranking[state->offset[il] + h * n_chunk + c], n_rot, layout, &dims[at]);
            if (uint32_t(c) < state->weight_k) {
                weight[at] = weight[at + 1] = state->weight[(weights_before + h) * state->weight_k + c];
            }
        }
    }
    ggml_backend_tensor_set(layers[ikv].dims, dims.data(), 0, ggml_nbytes(layers[ikv].dims));
    ggml_backend_tensor_set(layers[ikv].weight, weight.data(), 0, ggml_nbytes(layers[ikv].weight));
}

int fasa_cache::configure() {
    collect_counters();
    clear();
    on_changed();
    if (!state->params.enabled) {
        return 0;
    }

    static std::atomic<uint32_t> last_serial{ 0 };
    const uint32_t serial = ++last_serial;

    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctxs;
    for (size_t ikv = 0; ikv < layers.size(); ++ikv) {
        auto & l = layers[ikv];
        l.reason = layer_dense_reason(ikv);
        if (!l.reason.empty()) {
            continue;
        }
        const auto il = kv.layers[ikv].il;
        auto * buft   = buft_of(ikv);
        auto & ctx    = ctxs[buft];
        if (!ctx) {
            ctx.reset(ggml_init({ (4 * layers.size() + 2) * ggml_tensor_overhead(), nullptr, true }));
            if (!ggml_backend_buft_is_host(buft)) {
                works[buft] = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, sizeof(fasa_work));
            }
        }
        const int n_dom         = fasa_n_dom(std::min(state->params.chunks, state->n_chunk[il]));
        const int64_t n_head_kv = kv.hparams.n_head_kv(il);
        const int64_t n_tile    = (kv.get_size() + FASA_TILE - 1) / FASA_TILE;
        l.k_dom                 = ggml_new_tensor_4d(
            ctx.get(), GGML_TYPE_I8, fasa_block_bytes(state->params.k_dom, n_dom), n_tile, n_head_kv, kv.n_stream);
        l.dims         = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, n_dom, n_head_kv);
        l.weight       = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_dom, n_head_kv);
        l.source       = FASA_LAYER_SELECTS;
        l.fixed.stats  = &state->stats;
        l.fixed.work   = works.count(buft) ? works[buft] : nullptr;
        l.fixed.serial = serial;
        ggml_format_name(l.k_dom, "cache_k_dom_l%d", il);
    }
    add_rows(ctxs);
    for (auto & [buft, ctx] : ctxs) {
        ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        if (!buf) {
            const size_t size = ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft);
            clear();
            return fasa_set_error("the dominant keys%s need %.1f MiB in %s, which cannot be allocated; use a smaller "
                                  "context, fewer chunks%s or k_dom q4",
                any_pinned ? " and the rows that are attended" : "", size / 1048576.0, ggml_backend_buft_name(buft),
                any_pinned ? ", a smaller row_cache" : "");
        }
        ggml_backend_buffer_clear(buf.get(), 0);
        ctxs_bufs.emplace_back(std::move(ctx), std::move(buf));
    }
    for (size_t ikv = 0; ikv < layers.size(); ++ikv) {
        if (layers[ikv].k_dom) {
            upload_tables(ikv);
        }
    }
    return 0;
}

size_t fasa_cache::n_row_layers() const {
    size_t n = 0;
    for (size_t ikv = 0; ikv < layers.size(); ++ikv) {
        n += is_pinned(kv.layers[ikv].il) && !*layer_dense_reason(ikv);
    }
    return n;
}

// FASA-M: room on the device for the rows of one token, and the row caches
void fasa_cache::add_rows(std::map<ggml_backend_buffer_type_t, ggml_context_ptr> & ctxs) {
    const auto row_of = [&](size_t ikv) {
        const auto & l = kv.layers[ikv];
        return fasa_row_layout(l.k->type, l.v->type, kv.hparams.n_embd_head_k(l.il), kv.hparams.n_embd_head_v(l.il));
    };
    const auto length_of = [&](size_t ikv) {
        const auto params = state->layer_params(kv.layers[ikv].il);
        return fasa_list_length(params, std::max(1u, params.sink + params.recent), kv.get_size());
    };
    std::vector<size_t> pinned;
    std::map<ggml_backend_buffer_type_t, size_t> most;
    for (size_t ikv = 0; ikv < layers.size(); ++ikv) {
        const auto il = kv.layers[ikv].il;
        if (layers[ikv].k_dom && is_pinned(il)) {
            pinned.push_back(ikv);
            auto & bytes = most[buft_of(ikv)];
            bytes        = std::max(bytes,
                fasa_rows_bytes(row_of(ikv), length_of(ikv),
                    state->params.per_head ? kv.hparams.n_head(il) : kv.hparams.n_head_kv(il)));
        }
    }
    std::map<ggml_backend_buffer_type_t, ggml_tensor *> rows;
    for (const auto & [buft, bytes] : most) {
        rows[buft] = ggml_new_tensor_1d(ctxs[buft].get(), GGML_TYPE_I8, bytes);
    }
    for (const size_t ikv : pinned) {
        const int64_t slot      = FASA_ROW_HEAD + row_of(ikv).stride;
        const int64_t n_head_kv = kv.hparams.n_head_kv(kv.layers[ikv].il);
        const int64_t wanted    = state->params.row_cache < 0 ?
            2 * (int64_t) length_of(ikv) :
            ((int64_t) state->params.row_cache << 20) / (int64_t) state->n_row_layers / n_head_kv / kv.n_stream / slot;
        const int64_t n_slot =
            std::min<int64_t>(wanted, kv.get_size() + FASA_ROW_WAYS - 1) / FASA_ROW_WAYS * FASA_ROW_WAYS;
        layers[ikv].fixed.rows      = rows[buft_of(ikv)];
        layers[ikv].fixed.row_cache = n_slot > 0 ?
            ggml_new_tensor_4d(ctxs[buft_of(ikv)].get(), GGML_TYPE_I8, slot, n_slot, n_head_kv, kv.n_stream) :
            nullptr;
    }
}

void fasa_cache::clear() {
    layers.assign(kv.layers.size(), {});
    works.clear();
    ctxs_bufs.clear();
}

void fasa_cache::collect_counters() {
    auto & s = state->stats;
    for (auto & [buft, work] : works) {
        uint64_t seen[fasa_work::N_COUNTER];
        static_assert(offsetof(fasa_work, counter) == 0, "they are read from the start of the tensor");
        ggml_backend_tensor_get(work, seen, 0, sizeof(seen));
        ggml_backend_tensor_memset(work, 0, 0, sizeof(seen));
        s.layers_sparse += seen[fasa_work::LAYERS_SPARSE];
        s.rows_attended += seen[fasa_work::ROWS_ATTENDED];
        s.rows_visible += seen[fasa_work::ROWS_VISIBLE];
        s.lists += seen[fasa_work::LISTS];
        s.bytes_tip += seen[fasa_work::BYTES_TIP];
        s.bytes_fac += seen[fasa_work::BYTES_FAC];
        s.bytes_dense += seen[fasa_work::BYTES_DENSE];
        s.rows_fetched += seen[fasa_work::ROWS_FETCHED];
        s.rows_reused += seen[fasa_work::ROWS_REUSED];
        s.bytes_fetched += seen[fasa_work::BYTES_FETCHED];
        s.bytes_staged += seen[fasa_work::BYTES_STAGED];
    }
}

void fasa_cache::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const {
    for (const auto * bufs : { &ctxs_bufs, &stage_bufs }) {
        for (const auto & [ctx, buf] : *bufs) {
            sizes[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
        }
    }
}

size_t fasa_cache::size_kv() const {
    return kv.size_k_bytes() + kv.size_v_bytes();
}

size_t fasa_cache::size_kv_pinned() const {
    size_t size = 0;
    for (const auto & l : kv.layers) {
        size += is_pinned(l.il) ? ggml_nbytes(l.k) + (l.v ? ggml_nbytes(l.v) : 0) : 0;
    }
    return size;
}

size_t fasa_cache::size_row_cache() const {
    size_t size = 0;
    for (const auto & l : layers) {
        size += l.fixed.row_cache ? ggml_nbytes(l.fixed.row_cache) : 0;
    }
    return size;
}

size_t fasa_cache::size_k_dom() const {
    size_t size = 0;
    for (const auto & l : layers) {
        size += l.k_dom ? ggml_nbytes(l.k_dom) : 0;
    }
    return size;
}

// ---- events ----

void fasa_cache::on_changed() {
    for (auto & s : stale) {
        s.add(0, kv.get_size());
    }
}

bool fasa_cache::on_apply(const llama_kv_cache_context & mctx) {
    const auto & sinfo = mctx.sinfos[mctx.i_cur];
    if (!has_room(mctx.ubatches[mctx.i_cur].n_tokens)) {
        return false;
    }
    ubatch++;
    n_kv = mctx.n_kv;
    strm = sinfo.strm;
    new_cells.clear();
    fresh.assign(sinfo.n_stream(), {});
    for (size_t s = 0; s < sinfo.n_stream(); ++s) {
        const auto & idxs = sinfo.idxs[s];
        new_cells.insert(new_cells.end(), idxs.begin(), idxs.end());
        for (size_t i = 0; i < idxs.size();) {
            size_t j = i + 1;
            while (j < idxs.size() && idxs[j] == idxs[j - 1] + 1) {
                j++;
            }
            stale[sinfo.strm[s]].add(idxs[i], idxs[j - 1] + 1);
            fresh[s].add(idxs[i], idxs[j - 1] + 1);
            i = j;
        }
    }
    return true;
}

// ---- graphs ----

fasa_cache * fasa_cache::of(const llama_kv_cache_context * mctx) {
    return mctx->kv ? mctx->kv->fasa.get() : nullptr;
}

bool fasa_cache::has_layer(int32_t il) const {
    return kv.map_layer_ids.count(il) > 0;
}

fasa_layer & fasa_cache::layer(int32_t il) {
    return layers[kv.map_layer_ids.at(il)];
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

void fasa_cache::set_ranges(int32_t * ranges, uint32_t n_stream, bool gpu_waits) {
    std::fill(ranges, ranges + n_stream * 2 * FASA_MAX_RANGES, 0);
    const llama_seq_id s0 = *std::min_element(strm.begin(), strm.end());
    uint64_t cells        = 0;
    for (uint32_t s = 0; s < n_stream; ++s) {
        auto & later = owed[s0 + s];
        if (!gpu_waits) {
            for (const auto & r : later.data) {
                stale[s0 + s].add(r.first, r.second);
            }
            later = {};
        }
        // cells behind the last used one are empty, and are marked again when they are written
        const auto fresh = stale[s0 + s].take(kv.v_cells[s0 + s].used_max_p1());
        stale[s0 + s]    = {};
        for (size_t i = 0; gpu_waits && i < fresh.data.size(); ++i) {
            later.add(fresh.data[i].first, fresh.data[i].second);
        }
        for (size_t i = 0; i < fresh.data.size(); ++i) {
            ranges[s * 2 * FASA_MAX_RANGES + 2 * i]     = (int32_t) fresh.data[i].first;
            ranges[s * 2 * FASA_MAX_RANGES + 2 * i + 1] = (int32_t) fresh.data[i].second;
        }
        cells += fresh.cells();
    }
    state->cells_refreshed += cells;
    state->rebuilds += cells > new_cells.size();
}

void fasa_cache::set_fresh(int32_t * ranges, uint32_t n_stream) const {
    std::fill(ranges, ranges + n_stream * 2 * FASA_MAX_RANGES, 0);
    const llama_seq_id s0 = *std::min_element(strm.begin(), strm.end());
    for (size_t s = 0; s < fresh.size(); ++s) {
        int32_t * out = ranges + (strm[s] - s0) * 2 * FASA_MAX_RANGES;
        for (const auto & r : fresh[s].data) {
            *out++ = (int32_t) r.first;
            *out++ = (int32_t) r.second;
        }
    }
}

bool fasa_cache::set_mask(ggml_tensor * mask, const llama_ubatch & ubatch, bool causal) const {
    const int64_t n_kv = mask->ne[0];
    if (!state->params.enabled || !causal || mask->type != GGML_TYPE_F16 || kv.swa_type != LLAMA_SWA_TYPE_NONE ||
        kv.hparams.use_alibi || ubatch.is_pos_2d() || ubatch.n_tokens > state->params.max_tokens * mask->ne[3]) {
        return false;
    }
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const auto seq     = ubatch.seq_id[i][0];
        const auto & cells = kv.v_cells[kv.seq_to_stream[seq]];
        const auto n       = cells.get_used();
        if (n != cells.used_max_p1() || n != cells.seq_pos_get(seq).size() ||
            n > n_kv) { // its cells are not [0, n), or not all its own
            return false;
        }
    }
    const ggml_fp16_t seen = ggml_fp32_to_fp16(0.0f), hidden = ggml_fp32_to_fp16(-INFINITY);
    auto * row = (ggml_fp16_t *) mask->data;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i, row += n_kv) {
        const auto seq   = ubatch.seq_id[i][0];
        const auto & all = kv.v_cells[kv.seq_to_stream[seq]].seq_pos_get(seq);
        std::fill(row, row + all.size(), seen);
        std::fill(row + all.size(), row + n_kv, hidden);
        for (auto last = all.rbegin(); last != all.rend() && last->first > ubatch.pos[i]; ++last) {
            row[last->second] = hidden;
        }
    }
    return true;
}

// Forced cells of a token: the `sink` lowest positions of its sequence and the `recent` highest up to its own, ties to
// the lower cell. Usually position p + 1 lies in the cell behind p; where it does not, one scan over the cells finds
// them.
void fasa_cache::set_forced(int32_t * forced, uint32_t n_forced, const llama_ubatch & ubatch) const {
    const uint32_t n_sink = state->params.sink, n_recent = state->params.recent;
    const bool one_cell_each = kv.hparams.n_pos_per_embd() == 1; // else several cells can share a position

    std::vector<std::pair<llama_pos, int32_t>> all; // (position, cell), of the scan
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i, forced += n_forced) {
        std::fill(forced, forced + n_forced, -1);
        const auto seq     = ubatch.seq_id[i][0];
        const auto pos     = ubatch.pos[i];
        const auto & cells = kv.v_cells[kv.seq_to_stream[seq]];
        const auto first   = cells.seq_pos_min(seq);

        const auto holds = [&](int64_t cell, llama_pos p) {
            return cell >= 0 && cell < (int64_t) n_kv && !cells.is_empty(cell) && cells.pos_get(cell) == p &&
                cells.seq_has(cell, seq);
        };

        bool found    = one_cell_each && pos - first + 1 >= (llama_pos) (n_sink + n_recent);
        int32_t * out = forced;
        if (found) {
            auto & hint = first_cell[seq];
            if (!holds(hint, first)) {
                hint = 0;
                while (hint < n_kv && !holds(hint, first)) {
                    hint++;
                }
            }
            int64_t cell = hint;
            for (uint32_t j = 0; j < n_sink && found; ++j, ++cell) {
                found  = holds(cell, first + j);
                *out++ = (int32_t) cell;
            }
            for (int64_t j = 0; j < (int64_t) n_recent && found; ++j) {
                found  = holds(new_cells[i] - j, pos - j);
                *out++ = (int32_t) (new_cells[i] - j);
            }
        }
        if (found) {
            continue;
        }

        all.clear();
        for (uint32_t c = 0; c < n_kv; ++c) {
            if (!cells.is_empty(c) && cells.seq_has(c, seq) && cells.pos_get(c) <= pos) {
                all.emplace_back(cells.pos_get(c), c);
            }
        }
        out               = forced;
        const auto n_low  = std::min<size_t>(n_sink, all.size());
        const auto n_high = std::min<size_t>(n_recent, all.size());
        std::partial_sort(all.begin(), all.begin() + n_low, all.end());
        for (size_t j = 0; j < n_low; ++j) {
            *out++ = all[j].second;
        }
        std::partial_sort(all.begin(), all.begin() + n_high, all.end(), [](const auto & a, const auto & b) {
            return a.first != b.first ? a.first > b.first : a.second < b.second;
        });
        for (size_t j = 0; j < n_high; ++j) {
            *out++ = all[j].second;
        }
    }
}

// ---- all caches of a context ----

std::vector<fasa_cache *> fasa_caches(llama_memory_i * memory) {
    std::vector<fasa_cache *> out;
    if (auto * kv = dynamic_cast<llama_kv_cache *>(memory)) {
        out = { kv->fasa.get() };
    } else if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        out = { iswa->get_base()->fasa.get(), iswa->get_swa()->fasa.get() };
    } else if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        out = { hybrid->get_mem_attn()->fasa.get() };
    } else if (auto * both = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        out = { both->get_mem_attn()->get_base()->fasa.get(), both->get_mem_attn()->get_swa()->fasa.get() };
    }
    return out;
}

void fasa_on_failed(llama_memory_i * memory) {
    for (auto * cache : fasa_caches(memory)) {
        cache->on_changed();
    }
}
