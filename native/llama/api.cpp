// The C interface of fasa.h.

#include "core/error.h"
#include "llama/cache.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <cmath>
#include <cstring>
#include <numeric>

const char * fasa_version(void) {
    return FASA_VERSION;
}

fasa_params fasa_params_default(void) {
    fasa_params p     = {};
    p.size            = sizeof(p);
    p.chunks          = 0;
    p.budget          = 512;
    p.mass            = 0.0f;
    p.floor           = 64;
    p.cap             = 1024;
    p.sink            = 4;
    p.recent          = 32;
    p.min_context     = 1024;
    p.min_context_gpu = 16384;
    p.max_tokens      = 8;
    p.k_dom           = FASA_K_DOM_Q4;
    p.per_head        = 0;
    p.mean_budget     = 0;
    p.row_cache       = -1;
    return p;
}

// a struct of the caller's, or -1 with the reason
template <typename T>
static int fasa_check_size(const T * s, const char * name) {
    if (s == nullptr) {
        return fasa_set_error("%s: expected a struct, found NULL", name);
    }
    if (s->size != sizeof(T)) {
        return fasa_set_error("%s: expected a struct of %zu bytes, found %zu: the header and the library differ", name,
            sizeof(T), (size_t) s->size);
    }
    return 0;
}

static std::vector<fasa_cache *> fasa_caches_of(const llama_context * ctx) {
    auto caches = ctx ? fasa_caches(llama_get_memory(ctx)) : std::vector<fasa_cache *>();
    if (caches.empty()) {
        fasa_set_error("this context has no KV cache that FASA knows (recurrent, latent or encoder-only model)");
    }
    return caches;
}

// one state for all caches of a context
static fasa_state * fasa_state_of(const std::vector<fasa_cache *> & caches) {
    for (size_t i = 1; i < caches.size(); ++i) {
        caches[i]->state        = caches[0]->state;
        caches[i]->counts_steps = false;
    }
    return caches[0]->state.get();
}

// the caches with all counters in their state: the context is idle then
static std::vector<fasa_cache *> fasa_counted_caches(const llama_context * ctx) {
    const auto caches = fasa_caches_of(ctx);
    if (!caches.empty()) {
        fasa_state_of(caches);
        const_cast<llama_context *>(ctx)->synchronize();
    }
    for (auto * cache : caches) {
        cache->collect_counters();
    }
    return caches;
}

static int fasa_configure(llama_context * ctx, const std::vector<fasa_cache *> & caches) {
    ctx->synchronize(); // a device may still be at work on what goes away
    auto & state = *fasa_state_of(caches);
    state.epoch++;
    state.n_row_layers = 0;
    for (auto * cache : caches) {
        state.n_row_layers += cache->n_row_layers();
    }
    for (auto * cache : caches) {
        if (cache->configure() != 0) {
            state.params.enabled  = 0;
            const std::string why = fasa_error();
            for (auto * c : caches) {
                c->configure();
            }
            return fasa_set_error("%s", why.c_str());
        }
    }
    return 0;
}

// the mass of a mean budget, by a profile's table
static int fasa_find_mass(const uint32_t * tokens, const float * mass, size_t n, fasa_params & p) {
    if (!p.enabled || p.mean_budget == 0) {
        return 0;
    }
    if (n == 0) {
        return fasa_set_error("mean_budget %u: the profile has no table of mean budgets; make one with `fasa-gguf "
                              "calibrate-layers MODEL -f TEXT`, or give a mass",
            p.mean_budget);
    }
    const float found = fasa_mean_budget_mass(tokens, mass, n, p.mean_budget);
    if (found == 0) {
        return fasa_set_error(
            "mean_budget %u: the profile's table reaches from %u to %u tokens; give one of these, or a mass",
            p.mean_budget, tokens[0], tokens[n - 1]);
    }
    p.mass = found;
    return 0;
}

// ---- profile ----

// shapes and ranking against the model; offset, n_ranking and n_weight: of the flat arrays
static int fasa_check_ranking(const fasa_profile * p, const llama_hparams & hparams, std::vector<uint32_t> & offset,
    size_t & n_ranking, size_t & n_weight) {
    if (p->n_layer != hparams.n_layer()) {
        return fasa_set_error(
            "the profile is for a model of %u layers, this one has %u", p->n_layer, hparams.n_layer());
    }
    n_ranking = n_weight = 0;
    offset.resize(p->n_layer);
    for (uint32_t il = 0; il < p->n_layer; ++il) {
        offset[il] = n_ranking;
        if (p->n_chunk[il] == 0) {
            continue;
        }
        if (p->n_head_kv[il] != hparams.n_head_kv(il) || p->n_chunk[il] != hparams.n_embd_head_k(il) / 2) {
            return fasa_set_error("layer %u: the profile has %u KV heads of %u chunks, the model %u of %u", il,
                p->n_head_kv[il], p->n_chunk[il], hparams.n_head_kv(il), hparams.n_embd_head_k(il) / 2);
        }
        n_ranking += size_t(p->n_head_kv[il]) * p->n_chunk[il];
        n_weight += size_t(p->n_head_kv[il]) * p->weight_k;
    }
    for (uint32_t il = 0; il < p->n_layer; ++il) {
        for (uint32_t h = 0; p->n_chunk[il] > 0 && h < p->n_head_kv[il]; ++h) {
            std::vector<bool> seen(p->n_chunk[il]);
            for (uint32_t c = 0; c < p->n_chunk[il]; ++c) {
                const uint32_t id = p->ranking[offset[il] + h * p->n_chunk[il] + c];
                if (id >= p->n_chunk[il] || seen[id]) {
                    return fasa_set_error("layer %u, KV head %u, rank %u: chunk %u is %s", il, h, c, id,
                        id < p->n_chunk[il] ? "ranked twice" : "out of range");
                }
                seen[id] = true;
            }
        }
    }
    return 0;
}

static int fasa_check_masses(const fasa_profile * p) {
    for (uint32_t il = 0; p->layer_budget && il < p->n_layer; ++il) {
        if (!(p->layer_budget[il] > 0) || !std::isfinite(p->layer_budget[il])) {
            return fasa_set_error(
                "layer %u: layer_budget is %g, and must be above 0", il, (double) p->layer_budget[il]);
        }
    }
    for (uint32_t il = 0; p->layer_miss && il < p->n_layer; ++il) {
        if (!(p->layer_miss[il] > 0) || !std::isfinite(p->layer_miss[il])) {
            return fasa_set_error("layer %u: layer_miss is %g, and must be above 0", il, (double) p->layer_miss[il]);
        }
    }
    for (uint32_t i = 0; i < p->n_mean_budget; ++i) {
        const float before = i > 0 ? p->mean_budget_mass[i - 1] : 0.0f;
        if (!(p->mean_budget_mass[i] > before) || p->mean_budget_mass[i] >= 1 ||
            p->mean_budget[i] <= (i > 0 ? p->mean_budget[i - 1] : 0)) {
            return fasa_set_error("entry %u of the table of mean budgets: %u tokens at a mass of %g; both must ascend, "
                                  "and the mass lie between 0 and 1",
                i, p->mean_budget[i], (double) p->mean_budget_mass[i]);
        }
    }
    return 0;
}

int fasa_set_profile(llama_context * ctx, const fasa_profile * p) {
    if (fasa_check_size(p, "fasa_profile") != 0) {
        return -1;
    }
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return -1;
    }
    std::vector<uint32_t> offset;
    size_t n_ranking = 0, n_weight = 0;
    if (fasa_check_ranking(p, ctx->get_model().hparams, offset, n_ranking, n_weight) != 0 ||
        fasa_check_masses(p) != 0) {
        return -1;
    }
    auto & state = *fasa_state_of(caches);
    if (fasa_find_mass(p->mean_budget, p->mean_budget_mass, p->n_mean_budget, state.params) != 0) {
        return -1;
    }
    state.n_head_kv.assign(p->n_head_kv, p->n_head_kv + p->n_layer);
    state.n_chunk.assign(p->n_chunk, p->n_chunk + p->n_layer);
    state.ranking.assign(p->ranking, p->ranking + n_ranking);
    state.offset = std::move(offset);
    state.layer_miss =
        p->layer_miss ? std::vector<float>(p->layer_miss, p->layer_miss + p->n_layer) : std::vector<float>();
    state.mean_budget.assign(p->mean_budget, p->mean_budget + p->n_mean_budget);
    state.mean_budget_mass.assign(p->mean_budget_mass, p->mean_budget_mass + p->n_mean_budget);
    state.weight_k = p->weight ? p->weight_k : 0;
    state.weight   = p->weight ? std::vector<float>(p->weight, p->weight + n_weight) : std::vector<float>();
    state.layer_budget =
        p->layer_budget ? std::vector<float>(p->layer_budget, p->layer_budget + p->n_layer) : std::vector<float>();
    return fasa_configure(ctx, caches);
}

// ---- settings ----

int fasa_set_params(llama_context * ctx, const fasa_params * params) {
    if (fasa_check_size(params, "fasa_params") != 0) {
        return -1;
    }
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return params->enabled ? -1 : 0;
    }
    auto & state  = *fasa_state_of(caches);
    fasa_params p = *params;
    if (p.enabled) {
        if (!state.has_profile()) {
            return fasa_set_error("there is no FASA profile; embed one with `fasa-gguf embed-profile MODEL`, or call "
                                  "fasa_set_profile first");
        }
        if (!ctx->get_cparams().flash_attn) {
            return fasa_set_error("flash attention is off in this context, and FASA needs its cache layout; make the "
                                  "context with flash_attn on");
        }
        if (p.row_cache < -1) {
            return fasa_set_error("setting row_cache out of range: %d (-1, or from 0 on)", p.row_cache);
        }
        if (p.budget < 1 || p.budget > INT32_MAX || p.sink > 65536 || p.recent > 65536 || p.max_tokens < 1 ||
            p.k_dom < FASA_K_DOM_F16 || p.k_dom > FASA_K_DOM_Q4) {
            return fasa_set_error("settings out of range: budget %u (1 to 2^31-1), sink %u and recent %u (up to "
                                  "65536), max_tokens %u (from 1), k_dom %d (0 to 2)",
                p.budget, p.sink, p.recent, p.max_tokens, p.k_dom);
        }
        if (p.mean_budget > 0 && p.mass != 0) {
            return fasa_set_error(
                "settings mean_budget %u and mass %g: give one of them", p.mean_budget, (double) p.mass);
        }
        if (fasa_find_mass(state.mean_budget.data(), state.mean_budget_mass.data(), state.mean_budget.size(), p) != 0) {
            return -1;
        }
        if (!(p.mass >= 0 && p.mass <= 1) || (p.mass > 0 && (p.floor < 1 || p.floor > p.cap || p.cap > INT32_MAX))) {
            return fasa_set_error("settings out of range: mass %g (0 to 1), floor %u and cap %u (1 <= floor <= cap)",
                (double) p.mass, p.floor, p.cap);
        }
        if (p.chunks == 0) {
            uint32_t most = 0;
            for (const uint32_t n : state.n_chunk) {
                most = std::max(most, n);
            }
            p.chunks = std::max(4u, 3 * most / 8 / 4 * 4); // whole groups of FASA_GROUP dimensions
        }
    }
    state.params = p;
    return fasa_configure(ctx, caches);
}

int fasa_get_params(const llama_context * ctx, fasa_params * params) {
    if (fasa_check_size(params, "fasa_params") != 0) {
        return -1;
    }
    const auto caches = fasa_caches_of(ctx);
    *params           = caches.empty() ? fasa_params_default() : fasa_state_of(caches)->params;
    params->mass      = params->mean_budget > 0 ? 0.0f : params->mass; // as it was given
    return 0;
}

int fasa_get_layer_params(const llama_context * ctx, int32_t il, fasa_params * params) {
    if (fasa_check_size(params, "fasa_params") != 0) {
        return -1;
    }
    if (ctx == nullptr || il < 0 || il >= (int32_t) ctx->get_model().hparams.n_layer()) {
        return fasa_set_error("layer %d: no such layer", il);
    }
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return -1;
    }
    *params = fasa_state_of(caches)->layer_params(il);
    return 0;
}

int fasa_invalidate(llama_context * ctx) {
    for (auto * cache : fasa_caches_of(ctx)) {
        cache->on_changed();
    }
    return 0;
}

int fasa_set_observer(llama_context * ctx, fasa_observer observer, void * user) {
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return -1;
    }
    auto & state   = *fasa_state_of(caches);
    state.observer = { observer, user };
    state.epoch++;
    return 0;
}

// ---- counters ----

int fasa_get_counters(const llama_context * ctx, fasa_counters * c) {
    if (fasa_check_size(c, "fasa_counters") != 0) {
        return -1;
    }
    *c                = {};
    c->size           = sizeof(*c);
    const auto caches = fasa_counted_caches(ctx);
    if (caches.empty()) {
        return 0;
    }
    const auto & s     = *fasa_state_of(caches);
    c->steps_sparse    = s.steps_sparse;
    c->steps_dense     = s.steps_dense;
    c->steps_prefill   = s.steps_prefill;
    c->layers_sparse   = s.stats.layers_sparse;
    c->layers_dense    = s.stats.layers_dense;
    c->rows_attended   = s.stats.rows_attended;
    c->rows_visible    = s.stats.rows_visible;
    c->lists           = s.stats.lists;
    c->bytes_tip       = s.stats.bytes_tip;
    c->bytes_fac       = s.stats.bytes_fac;
    c->bytes_dense     = s.stats.bytes_dense;
    c->cells_refreshed = s.cells_refreshed;
    c->rebuilds        = s.rebuilds;
    c->rows_fetched    = s.stats.rows_fetched;
    c->rows_reused     = s.stats.rows_reused;
    c->bytes_fetched   = s.stats.bytes_fetched;
    c->bytes_staged    = s.stats.bytes_staged;
    for (auto * cache : caches) {
        c->bytes_k_dom += cache->size_k_dom();
        c->bytes_kv += cache->size_kv();
        c->bytes_kv_host += cache->size_kv_pinned();
        c->bytes_row_cache += cache->size_row_cache();
    }
    return 0;
}

int fasa_reset_counters(llama_context * ctx) {
    const auto caches = fasa_counted_caches(ctx);
    if (caches.empty()) {
        return 0;
    }
    auto & s       = *fasa_state_of(caches);
    s.steps_sparse = s.steps_dense = s.steps_prefill = s.cells_refreshed = s.rebuilds = 0;
    for (auto * n : { &s.stats.layers_sparse, &s.stats.layers_dense, &s.stats.rows_attended, &s.stats.rows_visible,
             &s.stats.lists, &s.stats.bytes_tip, &s.stats.bytes_fac, &s.stats.bytes_dense, &s.stats.rows_fetched,
             &s.stats.rows_reused, &s.stats.bytes_fetched, &s.stats.bytes_staged }) {
        *n = 0;
    }
    return 0;
}

const char * fasa_layer_reason(const llama_context * ctx, int32_t il) {
    if (ctx == nullptr || il < 0 || il >= (int32_t) ctx->get_model().hparams.n_layer()) {
        return "no such layer";
    }
    for (auto * cache : fasa_caches(llama_get_memory(ctx))) {
        if (cache->has_layer(il)) {
            if (!cache->state->params.enabled) {
                return "FASA is off";
            }
            const auto & layer = cache->layer(il);
            return !layer.reason.empty() ? layer.reason.c_str() :
                layer.waits              ? FASA_GPU_WAITS :
                layer.asked              ? nullptr :
                              "no graph has asked FASA for it: nothing was decoded yet, or this architecture builds "
                              "its attention by another path";
        }
    }
    return "it has no KV cache that FASA knows";
}

const char * fasa_step_reason(const llama_context * ctx) {
    const auto caches = fasa_caches_of(ctx);
    return caches.empty() ? "this context has no KV cache that FASA knows" : fasa_state_of(caches)->step_reason.c_str();
}

// ---- model ----

int fasa_get_model_info(const llama_context * ctx, fasa_model_info * info) {
    if (fasa_check_size(info, "fasa_model_info") != 0) {
        return -1;
    }
    const auto & model   = ctx->get_model();
    const auto & hparams = model.hparams;
    info->n_layer        = hparams.n_layer();
    info->rope_layout    = hparams.rope_type == LLAMA_ROPE_TYPE_NONE ? -1 :
        hparams.rope_type == LLAMA_ROPE_TYPE_NORM                    ? 0 :
                                                                       1;
    info->rope_base      = ctx->get_cparams().rope_freq_base;
    info->rope_scale     = ctx->get_cparams().rope_freq_scale;
    info->is_mla         = hparams.is_mla();
    return 0;
}

int fasa_get_layer_shape(const llama_context * ctx, int32_t il, int32_t * out) {
    const auto & hparams = ctx->get_model().hparams;
    if (il < 0 || il >= (int32_t) hparams.n_layer()) {
        return fasa_set_error("layer %d: the model has %u layers", il, hparams.n_layer());
    }
    bool known = false;
    for (auto * cache : fasa_caches(llama_get_memory(ctx))) {
        known = known || cache->has_layer(il);
    }
    out[0] = known ? hparams.n_head(il) : 0;
    out[1] = known ? hparams.n_head_kv(il) : 0;
    out[2] = known ? hparams.n_embd_head_k(il) : 0;
    out[3] = known ? hparams.n_rot(il) : 0;
    return 0;
}
