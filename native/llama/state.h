#pragma once

// What belongs to a context: settings, profile, counters. Its caches share one (sliding-window models have two).

#include "core/select.h"
#include "llama/steps.h"
#include "ops/ops.h"

#include <cstdint>
#include <vector>

static constexpr uint32_t FASA_LEAST_GPU_LIMIT = 2048; // cells that a probe begins at

inline fasa_gpu_limit fasa_no_gpu_limit() {
    fasa_gpu_limit limit = {};
    limit.size           = sizeof(limit);
    return limit;
}

// the profile that fasa_set_profile copied; empty: there is none
struct fasa_known {
    std::vector<uint32_t> n_head_kv, n_chunk, offset; // [n_layer]; offset: where a layer begins in ranking
    std::vector<uint16_t> ranking;
    uint32_t weight_k = 0;
    std::vector<float> weight;
    std::vector<float> layer_miss;       // [n_layer] or empty
    std::vector<uint32_t> mean_budget;   // [n_mean_budget]
    std::vector<float> mean_budget_mass; // [n_mean_budget]
    std::vector<uint8_t> ahead;          // [n_layer] or empty: all may
    std::vector<uint16_t> ahead_ranking; // as ranking, for foreseen queries; empty: the same one
    std::vector<float> ahead_weight;     // likewise

    bool may_select_ahead(uint32_t il) const { return il >= ahead.size() || ahead[il] != 0; }
};

struct fasa_state {
    // Who writes what a graph is built of holds `turn`, and `reading` too; a decode holds `turn`; who only reads from
    // outside holds `reading`.
    fasa_turn turn;
    std::mutex reading;

    fasa_params params       = fasa_params_default(); // mean_budget > 0: with the mass that it means
    fasa_gpu_limit gpu_limit = fasa_no_gpu_limit();
    bool attends             = true; // false: steps are timed without attention
    fasa_known known;
    std::vector<int32_t> lender; // [n_layer] whose list a layer borrows, -1: nobody's; empty: none borrows

    fasa_stats stats;
    fasa_steps kinds;
    fasa_pending now;                                     // the ubatch being computed
    fasa_step_counts steps;                               // those that were computed
    fasa_reason step_reason    = FASA_REASON_NOT_STARTED; // of the last one
    fasa_reason prefill_reason = FASA_REASON_NOT_STARTED; // of the last one that was a prompt
    fasa_observer_ref observer;

    size_t n_row_layers = 0; // layers, of all caches, that share params.row_cache
    uint64_t epoch      = 0; // goes up with every change that a built graph depends on

    // the settings of one layer: its own mass, and the floor and cap that a mean budget means
    fasa_params layer_params(uint32_t il) const {
        fasa_params p = params;
        p.budget      = std::max(params.budget, params.sink + params.recent + 1);
        p.mass        = fasa_layer_mass(params.mass, il < known.layer_miss.size() ? known.layer_miss[il] : 1.0f);
        if (p.mean_budget > 0) {
            p.floor       = fasa_mean_budget_floor(p.mean_budget);
            p.cap         = fasa_mean_budget_cap(p.mean_budget);
            p.mean_budget = 0;
        }
        return p;
    }

    // the settings of a prompt's tile in one layer, by the names that a decode step has for them
    fasa_params tile_params(uint32_t il) const {
        fasa_params p = params;
        p.budget      = params.prefill_budget;
        p.mass   = fasa_layer_mass(params.prefill_mass, il < known.layer_miss.size() ? known.layer_miss[il] : 1.0f);
        p.floor  = params.prefill_floor;
        p.cap    = params.prefill_cap;
        p.recent = params.prefill_band;
        return p;
    }

    int32_t lender_of(uint32_t il) const { return il < lender.size() ? lender[il] : -1; }
};

// a ubatch, whose cells are placed in kv, is about to be computed: what it is, and the tiles of a prompt
void fasa_begin_ubatch(fasa_state & state, const llama_ubatch & ubatch, const llama_kv_cache & kv);
