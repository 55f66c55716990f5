// min_context_gpu when it is -1: found by a probe of the devices (measure/probe.cpp), with the shape of their layers.

#include "core/crossover.h"
#include "core/error.h"
#include "core/select.h"
#include "llama/cache.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>

uint64_t fasa_feed_forward_bytes(const llama_model & model, uint32_t il) {
    const auto & l     = model.layers[il];
    const auto n_bytes = [](const ggml_tensor * t) {
        return t ? ggml_nbytes(t) : 0;
    };
    const uint64_t experts = n_bytes(l.ffn_up_exps) + n_bytes(l.ffn_gate_exps) + n_bytes(l.ffn_down_exps);
    const auto & hparams   = model.hparams;
    return n_bytes(l.ffn_up) + n_bytes(l.ffn_gate) + n_bytes(l.ffn_down) +
        (hparams.n_expert ? experts * hparams.n_expert_used(il) / hparams.n_expert : 0);
}

// Of each device in mode device: a layer, one that selects ahead where there is one
std::map<ggml_backend_dev_t, int32_t> fasa_cache::gpu_layers() const {
    std::map<ggml_backend_dev_t, int32_t> out;
    if (residence.any_pinned()) {
        return out;
    }
    for (size_t ikv = 0; ikv < layers.size(); ++ikv) {
        const auto il  = kv.layers[ikv].il;
        const auto dev = residence.device_of(il);
        if (dev == nullptr || layer_reason(ikv) != FASA_REASON_NONE) {
            continue;
        }
        const auto found = out.find(dev);
        if (found == out.end() || found->second == 0 || !state->known.may_select_ahead(found->second)) {
            out[dev] = (int32_t) il; // layer 0 never does
        }
    }
    return out;
}

fasa_gpu_case fasa_cache::gpu_case(ggml_backend_dev_t dev, int32_t il, const llama_model & model) const {
    const auto & l  = kv.layers[kv.map_layer_ids.at(il)];
    const auto p    = state->layer_params(il);
    fasa_gpu_case g = {};
    g.size          = sizeof(g);
    g.backend       = ggml_backend_dev_name(dev);
    g.n_threads     = 1;
    g.n_head        = kv.hparams.n_head(il);
    g.n_head_kv     = kv.hparams.n_head_kv(il);
    g.n_embd_head   = kv.hparams.n_embd_head_k(il);
    g.type_k        = ggml_type_name(l.k->type);
    g.type_v        = ggml_type_name(l.v->type);
    g.k_dom         = p.k_dom;
    g.n_dom         = fasa_n_dom(std::min(p.chunks, state->known.n_chunk[il]));
    g.attended      = p.mass > 0 ? p.cap : p.budget;
    g.n_forced      = (int32_t) std::max(1u, p.sink + p.recent);
    g.per_head      = (int32_t) p.per_head;
    g.ahead         = p.ahead != FASA_AHEAD_OFF && il > 0 && state->known.may_select_ahead(il);
    g.beside        = fasa_feed_forward_bytes(model, il);
    g.ahead         = g.ahead && g.beside > 0;
    return g;
}

uint32_t fasa_cache::n_cells() const {
    return kv.get_size();
}

void fasa_find_gpu_limit(const llama_context * ctx, const std::vector<fasa_cache *> & caches) {
    auto & state      = *caches[0]->state;
    const auto & p    = state.params;
    fasa_gpu_limit at = fasa_no_gpu_limit();
    state.gpu_limit   = at; // no layer waits while it is not known
    if (!p.enabled || p.min_context == 0 || ctx->get_model().hparams.no_alloc) {
        return;
    }
    for (const auto * cache : caches) {
        for (const auto & [dev, il] : cache->gpu_layers()) {
            fasa_gpu_limit found = fasa_no_gpu_limit();
            if (p.min_context_gpu >= 0) {
                found.cells  = (uint32_t) p.min_context_gpu;
                found.source = FASA_LIMIT_SET;
            } else if (cache->n_cells() <= FASA_LEAST_GPU_LIMIT) {
                found.cells  = FASA_LEAST_GPU_LIMIT;
                found.source = FASA_LIMIT_SHORT;
            } else {
                const auto g = cache->gpu_case(dev, il, ctx->get_model());
                if (fasa_find_gpu_limit(&g, &found) != 0) {
                    found.cells  = FASA_GPU_LIMIT;
                    found.source = FASA_LIMIT_DEFAULT;
                    snprintf(found.note, sizeof(found.note), "%s", fasa_error());
                }
            }
            at = found.cells > at.cells || at.source == FASA_LIMIT_NONE ? found : at; // of devices that differ
        }
    }
    state.gpu_limit = at;
}

int fasa_get_gpu_limit(const llama_context * ctx, fasa_gpu_limit * limit) {
    if (fasa_check_given(ctx, "llama_context") != 0 || fasa_check_size(limit, "fasa_gpu_limit") != 0) {
        return -1;
    }
    const auto caches = fasa_caches_of(ctx);
    *limit            = fasa_no_gpu_limit();
    if (!caches.empty()) {
        std::lock_guard<std::mutex> lock(caches[0]->state->reading);
        *limit = caches[0]->state->gpu_limit;
    }
    return 0;
}

int fasa_set_attention(llama_context * ctx, int32_t on) {
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return -1;
    }
    const fasa_change change(caches);
    if (!change) {
        return -1;
    }
    change.state->attends = on != 0;
    change.state->epoch++;
    return 0;
}
