// Sparse prefill: the nodes of one layer in a prompt's graph (ops/tile.h), when there are any, and what they take of a
// device.

#include "core/memory.h"
#include "llama/attn.h"
#include "llama/remote.h"
#include "ops/tile.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-kv-cache.h"

#include <algorithm>

// why a device has no kernels for tiles of a layer of this shape
static fasa_reason fasa_tile_reason(ggml_backend_dev_t dev, const fasa_layer_shape & shape) {
    const auto reason = fasa_device_proc<fasa_dense_reason_t>(dev, "fasa_tile_reason");
    return reason ? reason(dev, &shape) : FASA_REASON_NO_KERNELS;
}

uint32_t fasa_cache::prefill_min_context_gpu() const {
    const uint64_t least = uint64_t(state->params.prefill_min_context_gpu) << residence.any_pinned();
    return std::min<uint64_t>(least, UINT32_MAX);
}

size_t fasa_cache::tile_pool_bytes(const llama_ubatch & ubatch) const {
    const auto & p     = state->params;
    const bool is_auto = p.prefill == FASA_PREFILL_AUTO;
    const auto n_seq   = std::max(1u, ubatch.n_seqs_unq);
    if (!p.enabled || p.prefill == FASA_PREFILL_OFF || ubatch.n_tokens < FASA_TILE_LEAST * n_seq ||
        (is_auto && kv.get_size() < std::max(p.prefill_min_context, prefill_min_context_gpu()))) {
        return 0;
    }
    const uint32_t n_tile = fasa_max_tiles(ubatch.n_tokens, n_seq, p.prefill_tile);
    size_t most           = 0;
    const uint32_t longest =
        std::max(p.prefill_mass > 0 ? p.prefill_cap : p.prefill_budget, p.sink + p.prefill_band + p.prefill_tile);
    for (size_t ikv = 0; ikv < layers.size(); ++ikv) {
        const auto & l    = kv.layers[ikv];
        const uint32_t il = l.il, n_head = kv.hparams.n_head(il), n_head_kv = kv.hparams.n_head_kv(il);
        if (layers[ikv].reason != FASA_REASON_NONE || !residence.is_pinned(il) || kv.hparams.is_swa(il)) {
            continue;
        }
        const int64_t d_k = kv.hparams.n_embd_head_k(il), d_v = kv.hparams.n_embd_head_v(il);
        const fasa_layer_shape layer = { l.k->type, l.v->type, d_k, d_v, int32_t(n_head / n_head_kv) };
        if (fasa_tile_reason(residence.device_of(il), layer) == FASA_REASON_NONE) {
            const fasa_tile_shape shape = { p.prefill_tile, std::min(longest, kv.get_size()),
                p.per_head ? n_head : n_head_kv, n_head, uint64_t(d_k) };
            most                        = std::max<size_t>(most, fasa_tile_pool_bytes(shape, n_tile));
        }
    }
    return most;
}

// why a layer whose cache is on a device, or in its pinned memory, is dense
static fasa_reason fasa_device_tile_reason(const fasa_attn & a, ggml_backend_dev_t dev) {
    if (fasa_is_remote(dev)) {
        return FASA_REASON_PREFILL_REMOTE;
    }
    if (a.cache->layer(a.il).fixed.work == nullptr) {
        return FASA_REASON_NO_KERNELS;
    }
    if (a.input->gpu_prompt_waits) {
        return FASA_REASON_PREFILL_MIN_CONTEXT_GPU;
    }
    const int64_t d = a.k->ne[0];
    if (a.soft_cap > 0 && d != 128 && d != 256) { // those that llama.cpp's flash attention caps
        return FASA_REASON_PREFILL_HEAD_DIM;
    }
    return fasa_tile_reason(dev, { a.k->type, a.v->type, d, a.v->ne[0], int32_t(a.q->ne[1] / a.k->ne[1]) });
}

fasa_reason fasa_attn::tile_reason() const {
    if (input->prefill_reason_of_step != FASA_REASON_NONE) {
        return input->prefill_reason_of_step;
    }
    const auto & layer = cache->layer(il);
    if (layer.reason != FASA_REASON_NONE) {
        return layer.reason;
    }
    if (const auto dev = cache->residence.device_of(il)) {
        const auto reason = fasa_device_tile_reason(*this, dev);
        if (reason != FASA_REASON_NONE) {
            return reason;
        }
    } else if (cache->state->params.prefill == FASA_PREFILL_AUTO && graph.cparams.op_offload &&
        graph.cparams.offload_kqv && cache->residence.offloads(graph.n_tokens)) {
        return FASA_REASON_PREFILL_OFFLOAD; // ggml's scheduler moves the products there, and attention with them
    }
    if (graph.hparams.is_swa(il)) {
        return FASA_REASON_PREFILL_WINDOW;
    }
    return lender() != il && input->lists.count(lender()) == 0 ? FASA_REASON_LENDER_DENSE : FASA_REASON_NONE;
}

// attention over the lists of the ubatch's tiles, [d_v*n_head, n_tokens]
ggml_tensor * fasa_attn::build_tiles() const {
    auto & layer = cache->layer(il);
    input->n_tiled++;
    if (lender() == il) {
        fasa_select_op op = select_op();
        op.params         = cache->state->tile_params(il);
        input->lists[il]  = fasa_build_tile_select(graph.ctx0, op, input->tiles);
        for (ggml_tensor * t = on_backend(input->lists[il]); t->src[0] != op.k_dom; t = t->src[0]) {
            on_backend(t->src[0]);
        }
    }
    fasa_fac_op op    = {};
    op.list           = input->lists.at(lender());
    op.q              = q;
    op.k              = k;
    op.v              = v;
    op.sinks          = sinks;
    op.ranges         = input->ranges;
    op.stream0        = stream0();
    op.scale          = kq_scale;
    op.soft_cap       = soft_cap;
    op.layer          = &layer.fixed;
    ggml_tensor * cur = on_backend(fasa_build_tile_fac(graph.ctx0, op, input->tiles));
    graph.cb(cur, "fasa", il);
    ggml_build_forward_expand(graph.gf, cur);
    return ggml_reshape_2d(graph.ctx0, cur, cur->ne[0] * cur->ne[1], cur->ne[2] * cur->ne[3]);
}
