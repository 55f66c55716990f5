#include "llama/graph-input.h"

#include "llama-batch.h"
#include "llama-cparams.h"

#include <algorithm>
#include <cmath>

// cells that at least one token sees, of all streams together; mask [n_kv, n_tps, 1, n_stream]
template <typename T>
static uint64_t fasa_cells_seen(const ggml_tensor * mask, T hidden) {
    uint64_t n = 0;
    std::vector<uint8_t> seen(mask->ne[1] > 1 ? mask->ne[0] : 0);
    for (int64_t s = 0; s < mask->ne[3]; ++s) {
        if (seen.empty()) { // one token of each stream: a count that the compiler vectorises, in every step of a long
                            // context
            const T * row  = (const T *) ((const char *) mask->data + s * mask->nb[3]);
            uint32_t found = 0;
            for (int64_t j = 0; j < mask->ne[0]; ++j) {
                found += row[j] != hidden;
            }
            n += found;
            continue;
        }
        std::fill(seen.begin(), seen.end(), 0);
        for (int64_t t = 0; t < mask->ne[1]; ++t) {
            const T * row = (const T *) ((const char *) mask->data + t * mask->nb[1] + s * mask->nb[3]);
            for (int64_t j = 0; j < mask->ne[0]; ++j) {
                seen[j] |= row[j] != hidden;
            }
        }
        n += std::count(seen.begin(), seen.end(), 1);
    }
    return n;
}

llm_graph_input_fasa::llm_graph_input_fasa(
    fasa_cache * cache, fasa_reason dense_reason, fasa_reason prefill_reason, uint32_t n_stream, bool gpu_waits)
    : cache(cache), epoch(cache->state->epoch), dense_reason(dense_reason), n_stream(n_stream), gpu_waits(gpu_waits),
      prefill_reason_of_step(prefill_reason) {}

ggml_tensor * llm_graph_input_fasa::new_input(
    ggml_context * ctx, int64_t ne0, int64_t ne1, const char * name, int64_t ne2, ggml_type type) const {
    ggml_tensor * t = ggml_new_tensor_3d(ctx, type, ne0, ne1, ne2);
    ggml_set_input(t);
    ggml_set_name(t, name);
    return t;
}

void llm_graph_input_fasa::add_ahead(ggml_context * ctx, int64_t n_tps) {
    if (ranges_ahead == nullptr) {
        ranges_ahead = new_input(ctx, 2 * FASA_MAX_RANGES, n_stream, "fasa_ranges_ahead");
        fresh        = new_input(ctx, n_tps, n_stream, "fasa_fresh");
        forced_ahead = new_input(ctx, forced->ne[0] + n_tps, n_tps, "fasa_forced_ahead", n_stream);
    }
}

void llm_graph_input_fasa::add_tiles(ggml_context * ctx, int64_t n_tile, int64_t n_kv) {
    const auto & params = cache->state->params;
    const int64_t n_row = fasa_n_span(n_kv) * FASA_SPAN;
    this->n_tile        = n_tile;
    n_tile_kv           = n_kv;
    ranges              = new_input(ctx, 2 * FASA_MAX_RANGES, n_stream, "fasa_ranges");
    tiles.tiles         = new_input(ctx, 2 + 2 * params.prefill_tile, n_tile, "fasa_tiles");
    tiles.forced = new_input(ctx, params.sink + params.prefill_band + params.prefill_tile, n_tile, "fasa_tile_forced");
    tiles.view   = new_input(ctx, n_row, n_tile, "fasa_tile_view", 1, GGML_TYPE_I8);
    tiles.cell_pos = new_input(ctx, n_row, n_stream, "fasa_cell_pos");
}

// [n_tile][2 + 2*T], as ops/tile.h has it
void llm_graph_input_fasa::set_tiles(int32_t * to, const llama_ubatch & ubatch) const {
    const uint32_t n_tps = ubatch.n_tokens / n_stream;
    for (const auto & tile : cache->state->now.tiles) {
        to[0]         = tile.tokens[0] / n_tps;
        to[1]         = tile.tokens.size();
        int32_t * pos = std::copy(tile.tokens.begin(), tile.tokens.end(), to + 2);
        pos           = std::fill_n(pos, fasa_tile_size(tiles.tiles) - tile.tokens.size(), 0);
        std::transform(tile.tokens.begin(), tile.tokens.end(), pos, [&](int32_t i) { return ubatch.pos[i]; });
        to += tiles.tiles->ne[0];
    }
}

void llm_graph_input_fasa::set_input(const llama_ubatch * ubatch) {
    auto & state     = *cache->state;
    auto & inputs    = cache->inputs;
    const auto write = [](ggml_tensor * t, auto fill) {
        if (t && t->buffer) {
            std::vector<int32_t> data(ggml_nelements(t));
            fill(data.data());
            ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
        }
    };
    const auto write_in_place = [](ggml_tensor * t, auto fill) { // it is large, and as the mask in the host's memory
        if (t && t->buffer) {
            GGML_ASSERT(ggml_backend_buffer_is_host(t->buffer));
            fill(t->data);
        }
    };
    if ((ranges && ranges->buffer) || (ranges_ahead && ranges_ahead->buffer)) {
        const auto stale = inputs.take_stale(n_stream, n_waiting > 0 || n_behind > 0, ahead, state.now.counts);
        write(ranges, [&](int32_t * to) { stale.own.write(to); });
        write(ranges_ahead, [&](int32_t * to) { stale.ahead.write(to); });
    }
    write(staged, [&](int32_t * to) { inputs.written().write(to); });
    write(forced, [&](int32_t * to) { inputs.set_forced(to, forced->ne[0], *ubatch, state.params); });
    write(fresh, [&](int32_t * to) { inputs.set_fresh(to); });
    write(forced_ahead, [&](int32_t * to) { inputs.set_forced_ahead(to, forced_ahead->ne[0], *ubatch, state.params); });
    write(tiles.tiles, [&](int32_t * to) { set_tiles(to, *ubatch); });
    write(tiles.forced, [&](int32_t * to) {
        inputs.set_tile_forced(to, tiles.forced->ne[0], state.now.tiles, state.params.sink, state.params.prefill_band);
    });
    write_in_place(
        tiles.view, [&](void * to) { inputs.set_tile_view((int8_t *) to, tiles.view->ne[0], state.now.tiles); });
    write_in_place(
        tiles.cell_pos, [&](void * to) { inputs.set_cell_pos((int32_t *) to, tiles.cell_pos->ne[0], n_stream); });
    auto & now = state.now;
    now.counts.layers_sparse += n_sparse;
    now.counts.layers_ahead += ahead.size();
    (now.decodes ? now.counts.layers_dense : now.counts.layers_prefill) += n_dense + n_tiled;
    count_tiles();
    now.waits        = now.waits || n_waiting > 0;
    now.dense_reason = dense_reason != FASA_REASON_NONE ? dense_reason : now.dense_reason;
    count_bytes();
}

void llm_graph_input_fasa::count_tiles() const {
    auto & now = cache->state->now;
    if (now.decodes) {
        return;
    }
    now.counts.layers_prefill_sparse += n_tiled;
    now.counts.tiles_sparse += n_tiled * now.tiles.size();
    now.counts.tiles_dense += n_dense * now.tiles.size(); // while FASA is off there are none
    now.prefill_reason = now.prefill_reason == FASA_REASON_NONE ? prefill_reason : now.prefill_reason;
}

// what dense attention reads in a decode step: the mask, which is set before, says which cells
void llm_graph_input_fasa::count_bytes() const {
    auto & now = cache->state->now;
    if (mask == nullptr || !now.decodes) {
        return;
    }
    const bool is_set = (mask->flags & GGML_TENSOR_FLAG_INPUT) && mask->buffer &&
        ggml_backend_buffer_is_host(mask->buffer); // a computed one is not known yet
    const uint64_t n = !is_set      ? cache->inputs.n_kv() * n_stream :
        mask->type == GGML_TYPE_F16 ? fasa_cells_seen<ggml_fp16_t>(mask, ggml_fp32_to_fp16(-INFINITY)) :
                                      fasa_cells_seen<float>(mask, -INFINITY);
    now.counts.bytes_dense += n * cell_sparse;
    now.counts.bytes_layers_dense += n * cell_dense;
}

// whether a prompt is too short for prefill auto; other sequences do not make it longer
static bool fasa_prompt_waits(const fasa_state & state, uint32_t n_kv, uint32_t least) {
    const uint32_t n_seen = state.now.active ? std::min(n_kv, state.now.n_seen) : n_kv;
    return state.params.prefill == FASA_PREFILL_AUTO && n_seen < least;
}

// the same for its layers on GPUs
static bool fasa_gpu_prompt_waits(const fasa_cache & cache, uint32_t n_kv) {
    return fasa_prompt_waits(*cache.state, n_kv, cache.prefill_min_context_gpu());
}

// Why a ubatch has no tiles, none of its layers; dense: why it is dense as a decode step (fasa_step_dense_reason)
static fasa_reason fasa_prompt_reason(const fasa_cache & cache, const llama_cparams & cparams,
    const llama_ubatch & ubatch, uint32_t n_kv, fasa_reason dense) {
    const auto & state  = *cache.state;
    const auto & params = state.params;
    if (dense != FASA_REASON_PREFILL) {
        return dense == FASA_REASON_NONE ? FASA_REASON_PREFILL_OFF : dense;
    }
    if (params.prefill == FASA_PREFILL_OFF) {
        return FASA_REASON_PREFILL_OFF;
    }
    if (cparams.embeddings) {
        return FASA_REASON_PREFILL_EMBEDDINGS;
    }
    if (state.observer.fn) {
        return FASA_REASON_PREFILL_OBSERVED;
    }
    if (state.now.active && cache.inputs.repeats_positions(ubatch)) {
        return FASA_REASON_PREFILL_POSITIONS;
    }
    if (fasa_prompt_waits(state, n_kv, params.prefill_min_context)) {
        return FASA_REASON_PREFILL_MIN_CONTEXT;
    }
    // last: the end of any prompt may be so short
    const bool is_short = ubatch.n_tokens < FASA_TILE_LEAST * std::max(1u, ubatch.n_seqs_unq);
    return is_short ? FASA_REASON_PREFILL_SHORT : FASA_REASON_NONE;
}

bool llm_graph_input_fasa::can_reuse(const llm_graph_params & params) {
    const auto & ubatch = params.ubatch;
    const auto & state  = *cache->state;
    const uint32_t n    = params.cparams.kv_unified ? 1 : ubatch.n_seqs_unq;
    const uint32_t n_kv = cache->inputs.n_kv();
    if (first_seen >= 0 && first_seen != cache->inputs.first_seen(ubatch)) {
        return false;
    }
    const auto reason = fasa_step_dense_reason(state.params, state.now.decodes, n_kv);
    return epoch == state.epoch && n == n_stream && gpu_waits == cache->gpu_waits(n_kv) && dense_reason == reason &&
        gpu_prompt_waits == fasa_gpu_prompt_waits(*cache, n_kv) &&
        prefill_reason_of_step == fasa_prompt_reason(*cache, params.cparams, ubatch, n_kv, reason) &&
        (tiles.tiles == nullptr || (n_tile == state.now.tiles.size() && n_tile_kv == n_kv));
}

llm_graph_input_fasa * fasa_graph_input(const llm_graph_context & graph, fasa_cache * cache, const ggml_tensor * k) {
    for (auto & input : graph.res->inputs) {
        auto * ours = dynamic_cast<llm_graph_input_fasa *>(input.get());
        if (ours && ours->cache == cache) {
            return ours;
        }
    }
    const auto & params = cache->state->params;
    const auto & now    = cache->state->now;
    const bool decodes =
        now.active ? now.decodes : graph.n_outputs == graph.n_tokens && graph.n_tokens <= params.max_tokens * k->ne[3];

    const auto reason = fasa_step_dense_reason(params, decodes, k->ne[2]);
    const auto prompt = fasa_prompt_reason(*cache, graph.cparams, graph.ubatch, k->ne[2], reason);
    auto input = std::make_unique<llm_graph_input_fasa>(cache, reason, prompt, k->ne[3], cache->gpu_waits(k->ne[2]));
    input->gpu_prompt_waits = fasa_gpu_prompt_waits(*cache, k->ne[2]);
    const int64_t n_tps     = graph.n_tokens / k->ne[3];
    if (reason == FASA_REASON_NONE) {
        input->ranges = input->new_input(graph.ctx0, 2 * FASA_MAX_RANGES, k->ne[3], "fasa_ranges");
        input->forced =
            input->new_input(graph.ctx0, std::max(1u, params.sink + params.recent), n_tps, "fasa_forced", k->ne[3]);
    }
    if (prompt == FASA_REASON_NONE) {
        input->add_tiles(graph.ctx0,
            now.active ?
                now.tiles.size() :
                fasa_max_tiles(graph.n_tokens, std::max<uint32_t>(1, graph.ubatch.n_seqs_unq), params.prefill_tile),
            k->ne[2]);
    }
    return (llm_graph_input_fasa *) graph.res->add_input(std::move(input));
}
