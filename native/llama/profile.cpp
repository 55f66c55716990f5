// The profile of a context: checked, and attached.

#include "llama/profile.h"
#include "core/error.h"
#include "llama/cache.h"

#include "llama-context.h"
#include "llama-model.h"

#include <cmath>

int fasa_find_mass(const fasa_known & known, fasa_params & p) {
    if (!p.enabled || p.mean_budget == 0) {
        return 0;
    }
    const auto & tokens = known.mean_budget;
    if (tokens.empty()) {
        return fasa_set_error("mean_budget %u: the profile has no table of mean budgets; make one with `fasa-gguf "
                              "calibrate-layers MODEL -f TEXT`, or give a mass",
            p.mean_budget);
    }
    const float found =
        fasa_mean_budget_mass(tokens.data(), known.mean_budget_mass.data(), tokens.size(), p.mean_budget);
    if (found == 0) {
        return fasa_set_error(
            "mean_budget %u: the profile's table reaches from %u to %u tokens; give one of these, or a mass",
            p.mean_budget, tokens.front(), tokens.back());
    }
    p.mass = found;
    return 0;
}

// ---- what can be wrong with a profile ----

// every KV head of a layer ranks each of its chunks once; ranking [n_head_kv, n_chunk] of that layer
static int fasa_check_heads(const uint16_t * ranking, uint32_t il, uint32_t n_head_kv, uint32_t n_chunk) {
    for (uint32_t h = 0; h < n_head_kv; ++h) {
        std::vector<bool> seen(n_chunk);
        for (uint32_t c = 0; c < n_chunk; ++c) {
            const uint32_t id = ranking[h * n_chunk + c];
            if (id >= n_chunk || seen[id]) {
                return fasa_set_error("layer %u, KV head %u, rank %u: chunk %u is %s", il, h, c, id,
                    id < n_chunk ? "ranked twice" : "out of range");
            }
            seen[id] = true;
        }
    }
    return 0;
}

// an array of a profile: its length and where it is
static int fasa_check_array(const char * name, const void * data, uint64_t n, uint64_t n_expected) {
    if (n != n_expected) {
        return fasa_set_error("the profile's %s: expected %llu numbers for this shape, found %llu", name,
            (unsigned long long) n_expected, (unsigned long long) n);
    }
    if (n > 0 && data == nullptr) {
        return fasa_set_error("the profile's %s: expected %llu numbers, found NULL", name, (unsigned long long) n);
    }
    return 0;
}

// shapes against the model, and the lengths of the flat arrays; offset: where a layer begins in ranking
static int fasa_check_shape(const fasa_profile * p, const llama_hparams & hparams, std::vector<uint32_t> & offset) {
    if (p->n_layer != hparams.n_layer()) {
        return fasa_set_error(
            "the profile is for a model of %u layers, this one has %u", p->n_layer, hparams.n_layer());
    }
    if (fasa_check_array("n_head_kv", p->n_head_kv, p->n_layer, p->n_layer) != 0 ||
        fasa_check_array("n_chunk", p->n_chunk, p->n_layer, p->n_layer) != 0) {
        return -1;
    }
    uint64_t n_ranking = 0, n_heads = 0;
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
        if (p->weight_k > p->n_chunk[il]) {
            return fasa_set_error(
                "layer %u: the profile has weights of %u chunks, the layer %u chunks", il, p->weight_k, p->n_chunk[il]);
        }
        n_ranking += uint64_t(p->n_head_kv[il]) * p->n_chunk[il];
        n_heads += p->n_head_kv[il];
    }
    if (fasa_check_array("ranking", p->ranking, p->n_ranking, n_ranking) != 0 ||
        fasa_check_array("weight", p->weight, p->n_weight, n_heads * p->weight_k) != 0 ||
        fasa_check_array("layer_miss", p->layer_miss, p->n_layer_miss, p->n_layer_miss ? p->n_layer : 0) != 0 ||
        fasa_check_array("mean_budget", p->mean_budget, p->n_mean_budget, p->n_mean_budget) != 0 ||
        fasa_check_array("ahead", p->ahead, p->n_ahead, p->n_ahead ? p->n_layer : 0) != 0) {
        return -1;
    }
    return fasa_check_array("mean_budget_mass", p->mean_budget_mass, p->n_mean_budget, p->n_mean_budget);
}

static int fasa_check_ranking(const fasa_profile * p, const uint16_t * ranking, const std::vector<uint32_t> & offset) {
    for (uint32_t il = 0; ranking && il < p->n_layer; ++il) {
        if (p->n_chunk[il] > 0 && fasa_check_heads(ranking + offset[il], il, p->n_head_kv[il], p->n_chunk[il]) != 0) {
            return -1;
        }
    }
    return 0;
}

static int fasa_check_weights(const char * name, const float * weight, uint64_t n) {
    for (uint64_t i = 0; weight && i < n; ++i) {
        if (!std::isfinite(weight[i])) {
            return fasa_set_error("the profile's %s: expected finite numbers, found %g at index %llu", name,
                (double) weight[i], (unsigned long long) i);
        }
    }
    return 0;
}

static int fasa_check_masses(const fasa_profile * p) {
    for (uint32_t il = 0; il < p->n_layer_miss; ++il) {
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

// ---- attaching ----

template <typename T>
static std::vector<T> fasa_copy(const T * data, size_t n) {
    return data ? std::vector<T>(data, data + n) : std::vector<T>();
}

int fasa_set_profile(llama_context * ctx, const fasa_profile * p) {
    if (fasa_check_size(p, "fasa_profile") != 0) {
        return -1;
    }
    const auto caches = fasa_caches_of(ctx);
    if (caches.empty()) {
        return -1;
    }
    fasa_known known;
    if (fasa_check_shape(p, ctx->get_model().hparams, known.offset) != 0 ||
        fasa_check_ranking(p, p->ranking, known.offset) != 0 ||
        fasa_check_ranking(p, p->ahead_ranking, known.offset) != 0 ||
        fasa_check_weights("weight", p->weight, p->n_weight) != 0 ||
        fasa_check_weights("ahead_weight", p->ahead_weight, p->n_weight) != 0 || fasa_check_masses(p) != 0) {
        return -1;
    }
    known.n_head_kv        = fasa_copy(p->n_head_kv, p->n_layer);
    known.n_chunk          = fasa_copy(p->n_chunk, p->n_layer);
    known.ranking          = fasa_copy(p->ranking, p->n_ranking);
    known.weight_k         = p->weight_k;
    known.weight           = fasa_copy(p->weight, p->n_weight);
    known.layer_miss       = fasa_copy(p->layer_miss, p->n_layer_miss);
    known.mean_budget      = fasa_copy(p->mean_budget, p->n_mean_budget);
    known.mean_budget_mass = fasa_copy(p->mean_budget_mass, p->n_mean_budget);
    known.ahead            = fasa_copy(p->ahead, p->n_ahead);
    known.ahead_ranking    = fasa_copy(p->ahead_ranking, p->n_ranking);
    known.ahead_weight     = fasa_copy(p->ahead_weight, p->n_weight);
    const fasa_change change(caches);
    if (!change) {
        return -1;
    }
    auto & state = *change.state;
    if (fasa_find_mass(known, state.params) != 0) {
        return -1;
    }
    state.known = std::move(known);
    return fasa_configure(ctx, caches);
}
