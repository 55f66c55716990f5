// The C interface of fasa.h: settings, lists, counters, reasons, the model. The profile is in llama/profile.cpp.

#include "core/error.h"
#include "core/settings.h"
#include "llama/cache.h"
#include "llama/profile.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>

const char * fasa_version(void) {
    return FASA_VERSION;
}

const char * fasa_upstream_version(void) {
    return FASA_UPSTREAM_VERSION;
}

const char * fasa_patches(void) {
    return FASA_PATCHES;
}

static bool fasa_has_layer(const llama_context * ctx, int32_t il) {
    return ctx && il >= 0 && il < (int32_t) ctx->get_model().hparams.n_layer();
}

// ---- settings ----

fasa_change::fasa_change(const std::vector<fasa_cache *> & caches) {
    if (caches.empty()) {
        return; // fasa_error() says so
    }
    if (!caches[0]->state->turn.try_take()) {
        fasa_set_error(
            "this context is decoding: llama_decode runs on another thread, or called this function; call it "
            "between two decodes");
        return;
    }
    state = caches[0]->state;
    state->reading.lock();
}

fasa_change::~fasa_change() {
    if (state) {
        state->reading.unlock();
        state->turn.give();
    }
}

int fasa_set_step(llama_context * ctx, int32_t step) {
    if (step < FASA_STEP_AUTO || step > FASA_STEP_DECODE) {
        return fasa_set_error("step %d: expected 0 (auto), 1 (prompt) or 2 (decode)", step);
    }
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return step == FASA_STEP_AUTO ? 0 : -1;
    }
    caches[0]->state->kinds.said = step;
    return 0;
}

// `p` with what it means for this profile; -1: it cannot be
static int fasa_resolve(const fasa_known & known, fasa_params & p) {
    if (fasa_check_params(p) != 0 || fasa_find_mass(known, p) != 0) {
        return -1;
    }
    if (p.chunks == 0) {
        p.chunks = fasa_default_chunks(*std::max_element(known.n_chunk.begin(), known.n_chunk.end()));
    }
    return 0;
}

int fasa_set_params(llama_context * ctx, const fasa_params * params) {
    if (fasa_check_given(ctx, "llama_context") != 0 || fasa_check_size(params, "fasa_params") != 0) {
        return -1;
    }
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return params->enabled ? -1 : 0;
    }
    const fasa_change change(caches);
    if (!change) {
        return -1;
    }
    auto & state  = *change.state;
    fasa_params p = *params;
    if (p.enabled) {
        if (state.known.n_chunk.empty()) {
            return fasa_set_error("there is no FASA profile; embed one with `fasa-gguf embed-profile MODEL`, or call "
                                  "fasa_set_profile first");
        }
        if (!ctx->get_cparams().flash_attn) {
            return fasa_set_error("flash attention is off in this context, and FASA needs its cache layout; make the "
                                  "context with flash_attn on");
        }
        if (fasa_resolve(state.known, p) != 0) {
            return -1;
        }
    }
    state.params = p;
    return fasa_configure(ctx, caches);
}

int fasa_get_params(const llama_context * ctx, fasa_params * params) {
    if (fasa_check_given(ctx, "llama_context") != 0 || fasa_check_size(params, "fasa_params") != 0) {
        return -1;
    }
    const auto caches = fasa_caches_of(ctx);
    *params           = fasa_params_default();
    if (!caches.empty()) {
        std::lock_guard<std::mutex> lock(caches[0]->state->reading);
        *params = caches[0]->state->params;
    }
    params->mass = params->mean_budget > 0 ? 0.0f : params->mass; // as it was given
    return 0;
}

int fasa_get_layer_params(const llama_context * ctx, int32_t il, fasa_params * params) {
    if (fasa_check_given(ctx, "llama_context") != 0 || fasa_check_size(params, "fasa_params") != 0) {
        return -1;
    }
    if (!fasa_has_layer(ctx, il)) {
        return fasa_set_error("layer %d: no such layer", il);
    }
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return -1;
    }
    std::lock_guard<std::mutex> lock(caches[0]->state->reading);
    *params = caches[0]->state->layer_params(il);
    return 0;
}

int fasa_invalidate(llama_context * ctx) {
    if (fasa_check_given(ctx, "llama_context") != 0) {
        return -1;
    }
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return 0;
    }
    const fasa_change change(caches);
    if (!change) {
        return -1;
    }
    for (auto * cache : caches) {
        cache->on_changed();
    }
    return 0;
}

int fasa_set_observer(llama_context * ctx, fasa_observer observer, void * user) {
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return -1;
    }
    const fasa_change change(caches);
    if (!change) {
        return -1;
    }
    change.state->observer = { observer, user };
    change.state->epoch++;
    return 0;
}

// ---- lists ----

static fasa_cache * fasa_cache_with(const std::vector<fasa_cache *> & caches, int32_t il) {
    for (auto * cache : caches) {
        if (cache->has_layer(il)) {
            return cache;
        }
    }
    return nullptr;
}

// whether layer il can take the list of `lender`; -1: fasa_error() says why not
static int fasa_check_lender(
    const std::vector<fasa_cache *> & caches, const llama_hparams & hparams, int32_t il, int32_t lender) {
    if (!caches[0]->state->params.enabled) {
        return fasa_set_error("layer %d cannot borrow a list: FASA is off", il);
    }
    if (lender < 0 || lender >= il) {
        return fasa_set_error("layer %d borrows from a layer before it, and %d is none", il, lender);
    }
    auto * cache = fasa_cache_with(caches, il);
    if (cache == nullptr || cache != fasa_cache_with(caches, lender)) {
        return fasa_set_error("layers %d and %d have no KV cache in common", il, lender);
    }
    if (cache->is_shared(il)) {
        return fasa_set_error("layer %d shares its K and V with another layer and cannot borrow a list", il);
    }
    if (hparams.n_head_kv(il) != hparams.n_head_kv(lender) || hparams.n_head(il) != hparams.n_head(lender)) {
        return fasa_set_error("layer %d has %u query heads and %u KV heads, layer %d has %u and %u", il,
            hparams.n_head(il), hparams.n_head_kv(il), lender, hparams.n_head(lender), hparams.n_head_kv(lender));
    }
    if (cache->residence.device_of(il) != cache->residence.device_of(lender)) {
        return fasa_set_error("layers %d and %d are on different devices", il, lender);
    }
    const auto & from = cache->layer(lender);
    if (from.source != FASA_LAYER_SELECTS) {
        return fasa_set_error("layer %d does not select: %s", lender,
            from.source == FASA_LAYER_BORROWS ? "it borrows its list itself" : fasa_reason_text(from.reason));
    }
    return 0;
}

int fasa_borrow_list(llama_context * ctx, int32_t il, int32_t lender) {
    if (fasa_check_given(ctx, "llama_context") != 0) {
        return -1;
    }
    if (!fasa_has_layer(ctx, il)) {
        return fasa_set_error("layer %d: no such layer", il);
    }
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return -1;
    }
    const fasa_change change(caches);
    if (!change) {
        return -1;
    }
    const auto & hparams = ctx->get_model().hparams;
    auto & state         = *change.state;
    if (lender != -1) {
        if (fasa_check_lender(caches, hparams, il, lender) != 0) {
            return -1;
        }
        const auto borrower = std::find(state.lender.begin(), state.lender.end(), il);
        if (borrower != state.lender.end()) {
            return fasa_set_error("layer %d lends its list to layer %d", il, int32_t(borrower - state.lender.begin()));
        }
    }
    state.lender.resize(hparams.n_layer(), -1);
    state.lender[il] = lender;
    return fasa_configure(ctx, caches);
}

// ---- counters ----

// what the devices have counted, into the state of the caches; in a turn
static void fasa_collect(const llama_context * ctx, const std::vector<fasa_cache *> & caches) {
    fasa_wait(ctx);
    for (auto * cache : caches) {
        cache->collect_counters();
    }
}

int fasa_get_counters(const llama_context * ctx, fasa_counters * c) {
    if (fasa_check_given(ctx, "llama_context") != 0 || fasa_check_size(c, "fasa_counters") != 0) {
        return -1;
    }
    *c                = {};
    c->size           = sizeof(*c);
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return 0;
    }
    auto & s = *caches[0]->state;
    if (s.turn.try_take()) { // during a decode: as of the last time
        fasa_collect(ctx, caches);
        s.turn.give();
    }
    std::lock_guard<std::mutex> lock(s.reading);
#define X(name, NAME) c->name = s.stats.name;
    FASA_COUNTERS_OP(X)
    FASA_COUNTERS_DEVICE(X)
#undef X
#define X(name, NAME) c->name = s.steps.name;
    FASA_COUNTERS_STEP(X)
#undef X
    for (auto * cache : caches) {
#define X(name, NAME) c->name += cache->name();
        FASA_COUNTERS_MEMORY(X)
#undef X
    }
    return 0;
}

int fasa_reset_counters(llama_context * ctx) {
    if (fasa_check_given(ctx, "llama_context") != 0) {
        return -1;
    }
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return 0;
    }
    const fasa_change change(caches);
    if (!change) {
        return -1;
    }
    fasa_collect(ctx, caches);
    auto & s = *change.state;
    s.steps  = {};
#define X(name, NAME) s.stats.name = 0;
    FASA_COUNTERS_OP(X)
    FASA_COUNTERS_DEVICE(X)
#undef X
    return 0;
}

// ---- reasons ----

int32_t fasa_layer_reason_code(const llama_context * ctx, int32_t il) {
    if (ctx == nullptr) {
        return FASA_REASON_UNKNOWN_CONTEXT;
    }
    if (!fasa_has_layer(ctx, il)) {
        return FASA_REASON_NO_SUCH_LAYER;
    }
    auto * cache = fasa_cache_with(fasa_caches(llama_get_memory(ctx)), il);
    if (cache == nullptr) {
        return FASA_REASON_NO_CACHE;
    }
    std::lock_guard<std::mutex> lock(cache->state->reading);
    return cache->state->params.enabled ? cache->reason(il) : FASA_REASON_OFF;
}

int32_t fasa_layer_ahead_code(const llama_context * ctx, int32_t il) {
    const int32_t reason = fasa_layer_reason_code(ctx, il);
    if (reason != FASA_REASON_NONE) {
        return reason;
    }
    auto * cache = fasa_cache_with(fasa_caches(llama_get_memory(ctx)), il);
    std::lock_guard<std::mutex> lock(cache->state->reading);
    return cache->published_ahead(il);
}

const char * fasa_layer_reason(const llama_context * ctx, int32_t il) {
    const int32_t reason = fasa_layer_reason_code(ctx, il);
    return reason == FASA_REASON_NONE ? nullptr : fasa_reason_text(reason);
}

int32_t fasa_step_reason_code(const llama_context * ctx) {
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return FASA_REASON_UNKNOWN_CONTEXT;
    }
    std::lock_guard<std::mutex> lock(caches[0]->state->reading);
    return caches[0]->state->step_reason;
}

int32_t fasa_prefill_reason_code(const llama_context * ctx) {
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return FASA_REASON_UNKNOWN_CONTEXT;
    }
    std::lock_guard<std::mutex> lock(caches[0]->state->reading);
    return caches[0]->state->prefill_reason;
}

const char * fasa_step_reason(const llama_context * ctx) {
    return fasa_reason_text(fasa_step_reason_code(ctx));
}

// ---- model ----

int fasa_get_model_info(const llama_context * ctx, fasa_model_info * info) {
    if (fasa_check_given(ctx, "llama_context") != 0 || fasa_check_size(info, "fasa_model_info") != 0) {
        return -1;
    }
    const auto & model     = ctx->get_model();
    const auto & hparams   = model.hparams;
    info->n_layer          = hparams.n_layer();
    info->rope_layout      = hparams.rope_type == LLAMA_ROPE_TYPE_NONE ? -1 :
        hparams.rope_type == LLAMA_ROPE_TYPE_NORM                      ? 0 :
                                                                         1;
    info->rope_base        = ctx->get_cparams().rope_freq_base;
    info->rope_scale       = ctx->get_cparams().rope_freq_scale;
    info->is_mla           = hparams.is_mla();
    const bool windows     = hparams.swa_type != LLAMA_SWA_TYPE_NONE && hparams.is_swa_any();
    info->rope_base_window = windows ? hparams.rope_freq_base_train_swa : info->rope_base;
    return 0;
}

int fasa_get_layer_shape(const llama_context * ctx, int32_t il, int32_t * out) {
    if (fasa_check_given(ctx, "llama_context") != 0 || fasa_check_given(out, "layer shape") != 0) {
        return -1;
    }
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
