// What a context does with all of its caches: settings, decodes, counting. Sliding-window models have two.

#include "core/error.h"
#include "llama-context.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama/cache.h"

#include <mutex>
#include <string>
#include <vector>

// why the ubatch that was computed is dense as a whole
static fasa_reason fasa_step_reason_of(const fasa_params & params, const fasa_pending & now) {
    if (!params.enabled) {
        return FASA_REASON_OFF;
    }
    if (!now.decodes) {
        return now.counts.layers_prefill_sparse > 0 ? FASA_REASON_NONE : FASA_REASON_PREFILL;
    }
    return now.counts.layers_sparse > 0      ? FASA_REASON_NONE :
        now.dense_reason != FASA_REASON_NONE ? now.dense_reason :
        now.waits                            ? FASA_REASON_MIN_CONTEXT_GPU :
                                               FASA_REASON_NO_LAYER;
}

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
    static std::mutex joining;
    std::lock_guard<std::mutex> lock(joining);
    for (size_t i = 1; i < out.size(); ++i) {
        if (out[i]->state != out[0]->state) {
            out[i]->state    = out[0]->state;
            out[i]->is_first = false;
        }
    }
    return out;
}

std::vector<fasa_cache *> fasa_caches_of(const llama_context * ctx) {
    auto caches = ctx ? fasa_caches(llama_get_memory(ctx)) : std::vector<fasa_cache *>();
    if (ctx == nullptr) {
        fasa_check_given(ctx, "llama_context");
    } else if (caches.empty()) {
        fasa_set_error("this context has no KV cache that FASA knows (recurrent, latent or encoder-only model)");
    }
    return caches;
}

void fasa_wait(const llama_context * ctx) {
    auto * sched = ctx->get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_synchronize(ggml_backend_sched_get_backend(sched, i));
    }
}

int fasa_configure(llama_context * ctx, const std::vector<fasa_cache *> & caches) {
    fasa_wait(ctx); // a device may still be at work on what goes away
    auto & state = *caches[0]->state;
    state.epoch++;
    fasa_find_gpu_limit(ctx, caches);
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
                c->publish_reasons();
            }
            return fasa_set_error("%s", why.c_str());
        }
        cache->publish_reasons();
    }
    return 0;
}

// ---- decodes ----

fasa_decoding::fasa_decoding(llama_memory_i * memory) {
    const auto caches = fasa_caches(memory);
    if (!caches.empty()) {
        state = caches[0]->state;
        state->turn.take();
    }
}

fasa_decoding::~fasa_decoding() {
    if (state) {
        state->turn.give();
    }
}

void fasa_on_computed(llama_memory_i * memory) {
    const auto caches = fasa_caches(memory);
    if (caches.empty()) {
        return;
    }
    auto & state  = *caches[0]->state;
    auto & now    = state.now;
    auto & counts = now.counts;
    now.active    = false;
    std::lock_guard<std::mutex> lock(state.reading);
    if (counts.layers_sparse + counts.layers_dense + counts.layers_prefill == 0) { // attention by another path
        for (const auto * cache : caches) {
            (now.decodes ? counts.layers_dense : counts.layers_prefill) += cache->n_layers();
        }
    }
    (!now.decodes ? counts.steps_prefill : counts.layers_sparse > 0 ? counts.steps_sparse : counts.steps_dense) = 1;
    state.step_reason           = fasa_step_reason_of(state.params, now);
    counts.steps_prefill_sparse = counts.layers_prefill_sparse > 0;
    // the short end of a prompt does not hide why the rest is dense
    const bool hides =
        now.continues && now.prefill_reason == FASA_REASON_PREFILL_SHORT && state.prefill_reason != FASA_REASON_NONE;
    if (!now.decodes && !hides) {
        state.prefill_reason = state.params.enabled ? now.prefill_reason : FASA_REASON_OFF;
    }
    state.steps.add(counts);
    for (auto * cache : caches) {
        cache->publish_reasons();
    }
}

void fasa_on_failed(llama_memory_i * memory) {
    for (auto * cache : fasa_caches(memory)) {
        cache->on_changed();
        cache->state->now.active = false;
    }
}
