#include "llama/attn.h"
#include "llama/fasa-hooks.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cstring>

// where a layer's nodes run
static ggml_backend_t fasa_backend_of(const llm_graph_context & graph, ggml_backend_dev_t dev) {
    for (int i = 0; dev && i < ggml_backend_sched_get_n_backends(graph.sched); ++i) {
        auto * backend = ggml_backend_sched_get_backend(graph.sched, i);
        if (ggml_backend_get_device(backend) == dev) {
            return backend;
        }
    }
    return graph.backend_cpu;
}

// ---- dense or sparse ----

// why this attention cannot be sparse, whatever the step
fasa_reason fasa_attn::reason() const {
    if (!graph.cparams.flash_attn) {
        return FASA_REASON_NO_FLASH_ATTENTION;
    }
    if (graph.cparams.training) {
        return FASA_REASON_TRAINING;
    }
    if (!graph.cparams.causal_attn) {
        return FASA_REASON_NOT_CAUSAL;
    }
    if (v_mla != nullptr) {
        return FASA_REASON_LATENT;
    }
    if (kq_b != nullptr) {
        return FASA_REASON_BIAS;
    }
    if (graph.hparams.f_max_alibi_bias > 0) {
        return FASA_REASON_ALIBI;
    }
    if (q->type != GGML_TYPE_F32) {
        return FASA_REASON_QUERY_TYPE;
    }
    if (q->ne[1] % k->ne[1] != 0) {
        return FASA_REASON_QUERY_HEADS;
    }
    if (kq_mask->type != GGML_TYPE_F16) {
        return FASA_REASON_MASK_TYPE;
    }
    if (kq_mask->op != GGML_OP_NONE) { // TIP reads it before the kernels before it are done
        return FASA_REASON_MASK_COMPUTED;
    }
    return FASA_REASON_NONE;
}

// whose list it takes: a layer before it, or its own
int32_t fasa_attn::lender() const {
    const auto & layer = cache->layer(il);
    return layer.source == FASA_LAYER_BORROWS ? layer.lender : il;
}

// why a layer that can run sparse is dense in this graph, had the step as a whole no reason
fasa_reason fasa_attn::reason_now() const {
    const auto & layer = cache->layer(il);
    if (layer.reason != FASA_REASON_NONE) {
        return layer.reason;
    }
    if (layer.fixed.work && input->gpu_waits) {
        return FASA_REASON_MIN_CONTEXT_GPU;
    }
    if (layer.source != FASA_LAYER_BORROWS) {
        return FASA_REASON_NONE;
    }
    const auto & from = cache->layer(layer.lender); // built before
    if (from.reason != FASA_REASON_NONE || from.now != FASA_REASON_NONE) {
        return FASA_REASON_LENDER_DENSE;
    }
    const bool listed = input->dense_reason != FASA_REASON_NONE || input->lists.count(layer.lender) > 0;
    return listed ? FASA_REASON_NONE : FASA_REASON_LENDER_DENSE;
}

// ---- building ----

void fasa_attn::observe(const fasa_foreseen & foreseen) const {
    if (k->ne[3] != 1 || cache->n_hadamard() != 0 || (k->type != GGML_TYPE_F16 && k->type != GGML_TYPE_F32)) {
        return;
    }
    ggml_tensor * q_ahead = foreseen.reason == FASA_REASON_NONE ?
        foreseen.copy(graph.ctx0, [&](ggml_tensor * t) { on_backend(t); }).back() :
        nullptr;
    ggml_build_forward_expand(graph.gf,
        fasa_build_observe(
            graph.ctx0, q, k, q_ahead, il, kq_scale, soft_cap, foreseen.reason, &cache->state->observer));
}

// where the scheduler is to run it; left alone it may copy the cache to another backend
ggml_tensor * fasa_attn::on_backend(ggml_tensor * node) const {
    const auto backend = fasa_backend_of(graph, cache->residence.device_of(il));
    ggml_backend_sched_set_tensor_backend(graph.sched, node, backend);
    return node;
}

// k and v of a layer in the room that dense attention over pinned host memory has on the device
std::pair<ggml_tensor *, ggml_tensor *> fasa_attn::staged(int il, ggml_tensor * k, ggml_tensor * v) const {
    ggml_tensor * room = cache->residence.stage(il);
    return { fasa_place_in(graph.ctx0, k, room, 0),
        fasa_place_in(graph.ctx0, v, room, cache->residence.stage_v_at(il)) };
}

// nullptr: the stock code goes on
ggml_tensor * fasa_attn::build_dense() const {
    if (!cache->residence.is_pinned(il) || !cache->residence.stage(il) || graph.cparams.training) {
        return build_window();
    }
    return build_staged();
}

// In a sparse step on the CPU, the stock attention of a layer with a sliding window, over the cells from the first that
// it shows: ggml's looks at the mask of every cell for every head, which takes longer than attending to the window.
// nullptr: as stock.
ggml_tensor * fasa_attn::build_window() const {
    const auto & state = *cache->state;
    if (!state.params.enabled || !state.now.active || input->dense_reason != FASA_REASON_NONE || kq_b || v_mla ||
        !graph.cparams.flash_attn || cache->residence.device_of(il) || v->nb[1] > v->nb[2]) {
        return nullptr;
    }
    if (input->first_seen < 0) {
        input->first_seen = cache->inputs.first_seen(graph.ubatch);
    }
    const int64_t first = input->first_seen, n = k->ne[2] - first;
    if (first == 0 || n <= 0) {
        return nullptr;
    }
    const auto rows = [&](ggml_tensor * x) {
        return ggml_view_4d(
            graph.ctx0, x, x->ne[0], x->ne[1], n, x->ne[3], x->nb[1], x->nb[2], x->nb[3], first * x->nb[2]);
    };
    if (input->window_mask == nullptr) {
        ggml_tensor * m    = kq_mask;
        ggml_tensor * view = ggml_view_4d(
            graph.ctx0, m, n, m->ne[1], m->ne[2], m->ne[3], m->nb[1], m->nb[2], m->nb[3], first * m->nb[0]);
        input->window_mask = ggml_is_contiguous(view) ? view : ggml_cont(graph.ctx0, view);
    }
    return graph.build_attn_mha(q, rows(k), rows(v), kq_b, input->window_mask, sinks, v_mla, 0, kq_scale, il);
}

// Dense attention over a copy on the device. In a step that is dense as a whole it is made while the layer before is at
// work (AHEAD), but for the cells that this ubatch writes.
ggml_tensor * fasa_attn::build_staged() const {
    if (input->staged == nullptr) {
        input->staged = input->new_input(graph.ctx0, 2 * FASA_MAX_RANGES, k->ne[3], "fasa_staged");
    }
    const uint64_t * ubatch       = cache->inputs.ubatch_at();
    ggml_tensor * work            = cache->work(il);
    const auto [k_place, v_place] = staged(il, k, v);
    ggml_tensor * k_here          = on_backend(fasa_build_stage(graph.ctx0, k, k_place, input->staged, work, ubatch));
    ggml_tensor * v_here          = on_backend(fasa_build_stage(graph.ctx0, v, v_place, input->staged, work, ubatch));

    ggml_tensor * cur = graph.build_attn_mha(q, k_here, v_here, kq_b, kq_mask, sinks, v_mla, 0, kq_scale, il);
    ggml_build_forward_expand(graph.gf, cur);

    // in a step that is not dense as a whole the next layer may be sparse
    const bool all_dense = !cache->state->params.enabled || input->dense_reason != FASA_REASON_NONE;
    const int next       = all_dense ? cache->residence.next_pinned(il) : -1;
    if (next >= 0) {
        ggml_tensor *k_next = mctx->get_k(graph.ctx0, next), *v_next = mctx->get_v(graph.ctx0, next);
        const auto [k_then, v_then] = staged(next, k_next, v_next);
        ggml_build_forward_expand(
            graph.gf, on_backend(fasa_build_ahead(graph.ctx0, cur, k_next, v_next, k_then, v_then, ubatch)));
    }
    return cur;
}

// TIP and SELECT of a layer with its own queries
fasa_select_op fasa_attn::select_op() const {
    const auto & layer  = cache->layer(il);
    const auto & state  = *cache->state;
    ggml_tensor * k_dom = layer.k_dom;
    fasa_select_op op   = {};
    op.q                = q;
    op.k                = k;
    op.mask             = kq_mask;
    op.k_dom      = ggml_view_4d(graph.ctx0, k_dom, k_dom->ne[0], k_dom->ne[1], k_dom->ne[2], k->ne[3], k_dom->nb[1],
        k_dom->nb[2], k_dom->nb[3], stream0() * k_dom->nb[3]);
    op.dims       = layer.dims;
    op.weight     = layer.weight;
    op.ranges     = input->ranges;
    op.forced     = input->forced;
    op.k_dom_type = state.params.k_dom;
    op.n_hadamard = cache->n_hadamard();
    op.scale      = kq_scale;
    op.soft_cap   = soft_cap;
    op.params     = state.layer_params(il);
    op.layer      = &layer.fixed;
    return op;
}

ggml_tensor * fasa_attn::build_select() const {
    ggml_tensor * list = on_backend(fasa_build_select(graph.ctx0, select_op()));
    on_backend(list->src[0]);
    return list;
}

// FASA-M: whether the rows of a list that holds the ubatch as well have room
bool fasa_attn::has_room_ahead() const {
    const ggml_tensor * rows = cache->layer(il).fixed.rows;
    if (rows == nullptr) {
        return true;
    }
    const ggml_tensor * v = mctx->get_v(graph.ctx0, il);
    const auto params     = cache->state->layer_params(il);
    const fasa_row_layout row(k->type, v->type, k->ne[0], v->ne[0]);
    const int64_t length = fasa_list_length(params, input->forced->ne[0] + graph.n_tokens / k->ne[3], k->ne[2]);
    return fasa_rows_bytes(row, length, params.per_head ? q->ne[1] : k->ne[1]) <= (size_t) rows->ne[0];
}

// FASA-M: whether the rows of its list can be fetched from the residual on. They share the room of all layers, so FAC
// of the layers before is to be done with it; there is room for one token.
bool fasa_attn::can_fetch(const ggml_tensor * residual) const {
    const ggml_tensor * rows = cache->layer(il).fixed.rows;
    if (rows == nullptr || graph.n_tokens != 1) {
        return false;
    }
    for (int i = ggml_graph_n_nodes(graph.gf) - 1; i >= 0; --i) {
        const ggml_tensor * node = ggml_graph_node(graph.gf, i);
        if (node == residual) {
            return true;
        }
        const fasa_op_params * p = fasa_op_get(node);
        if (p && p->kind == FASA_OP_FAC && fasa_op_layer(node).rows == rows) {
            break;
        }
    }
    return false;
}

ggml_tensor * fasa_attn::build_fetch(ggml_tensor * list) const {
    fasa_fetch_op op = {};
    op.list          = list;
    op.k             = k;
    op.v             = mctx->get_v(graph.ctx0, il);
    op.ranges        = input->ranges; // with the cell that this ubatch writes, whose old row is not to be found again
    op.fresh         = input->fresh;
    op.stream0       = stream0();
    op.layer         = &cache->layer(il).fixed;
    return on_backend(fasa_build_fetch(graph.ctx0, op));
}

// Of a layer that settings and profile have select ahead: its ranking, and the nodes if it does so in this step
void fasa_attn::set_ahead(const fasa_foreseen & foreseen) const {
    auto & layer     = cache->layer(il);
    const bool known = foreseen.reason == FASA_REASON_NONE;
    if (!cache->has_ranking(il, known)) {
        ggml_backend_sched_synchronize(graph.sched); // a device may still read the tables
        cache->set_ranking(il, known);
    }
    if (!known) {
        layer.ahead = foreseen.reason;
    } else if (layer.ahead == FASA_REASON_NONE && !has_room_ahead()) {
        layer.ahead = FASA_REASON_AHEAD_ROOM;
    } else if (layer.ahead == FASA_REASON_NONE) {
        build_ahead(foreseen);
    }
}

// TIP and SELECT with foreseen queries, right behind the residual that they are foreseen from: in the graph the
// feed-forward may stand before them already.
void fasa_attn::build_ahead(const fasa_foreseen & foreseen) const {
    input->add_ahead(graph.ctx0, graph.n_tokens / k->ne[3]);
    ggml_build_forward_expand(graph.gf, foreseen.residual);
    const int first = ggml_graph_n_nodes(graph.gf);

    const auto & layer = cache->layer(il);
    const bool fetches = can_fetch(foreseen.residual);
    ggml_tensor * fork = on_backend(fasa_build_fork(graph.ctx0, foreseen.residual, &layer.fixed));
    ggml_build_forward_expand(graph.gf, fork);

    fasa_select_op op = select_op();
    const auto set    = [&](ggml_tensor * t) {
        on_backend(t);
    };
    const auto rows       = foreseen.rows();
    const auto * dominant = cache->dominant_rows(il, rows);
    const auto copies     = dominant ? foreseen.copy_dominant(graph.ctx0, set, rows, *dominant, &layer.fixed) :
                                       foreseen.copy(graph.ctx0, set);
    op.q                  = copies.back();
    op.ranges             = input->ranges_ahead;
    op.forced             = input->forced_ahead;
    op.fresh              = input->fresh;
    op.flags              = fetches ? 0 : FASA_FORKED;
    ggml_tensor * list    = on_backend(fasa_build_select(graph.ctx0, op));
    ggml_tensor * tip     = on_backend(list->src[0]);
    list                  = fetches ? build_fetch(list) : list;
    ggml_build_forward_expand(graph.gf, list);
    fasa_move_behind(graph.gf, foreseen.residual, first);

    fasa_pending_list pending = { list, { fork, foreseen.residual, tip, kq_mask, op.ranges, op.forced, op.fresh },
        fetches };
    if (fetches) {
        pending.held.push_back(input->ranges);
    }
    pending.held.insert(pending.held.end(), foreseen.inputs.begin(), foreseen.inputs.end());
    const auto hold = fasa_to_hold(copies);
    pending.held.insert(pending.held.end(), hold.begin(), hold.end());
    input->pending[il] = pending;
    input->ahead.push_back(il);
}

// attention over the list, [d_v*n_head, n_tokens]
ggml_tensor * fasa_attn::build_fac() const {
    const auto pending = input->pending.find(il);
    const bool fetched = pending != input->pending.end() && pending->second.fetched;
    fasa_fac_op op     = {};
    op.list            = input->lists.at(lender());
    op.q               = q;
    op.k               = k;
    op.v               = v;
    op.mask            = kq_mask;
    op.sinks           = sinks;
    op.ranges          = input->ranges;
    op.fresh           = fetched ? input->fresh : nullptr;
    // no SELECT of its own in the same stream, which would have waited for what made q
    op.joined          = pending != input->pending.end() || lender() != il;
    op.stream0         = stream0();
    op.scale           = kq_scale;
    op.soft_cap        = soft_cap;
    op.layer           = &cache->layer(il).fixed;
    ggml_tensor * cur  = on_backend(fasa_build_fac(graph.ctx0, op));
    graph.cb(cur, "fasa", il);
    return ggml_reshape_2d(graph.ctx0, cur, cur->ne[0] * cur->ne[1], cur->ne[2] * cur->ne[3]);
}

// ---- the hooks ----

bool fasa_attn::begin() {
    input       = fasa_graph_input(graph, cache, k);
    input->mask = kq_mask;
    if (!cache->state->params.enabled) {
        return false;
    }
    auto & layer = cache->layer(il);
    if (layer.reason == FASA_REASON_NONE) {
        layer.reason = reason();
    }
    layer.now = reason_now();
    return input->dense_reason == FASA_REASON_NONE && layer.now == FASA_REASON_NONE;
}

static float fasa_soft_cap_of(const llm_graph_context & graph) {
    return graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f;
}

void fasa_begin_attn(const llm_graph_context & graph, const llama_kv_cache_context * mctx, ggml_tensor * q,
    ggml_tensor * kq_b, ggml_tensor * kq_mask, ggml_tensor * v_mla, float kq_scale, int il) {
    fasa_cache * cache = fasa_cache::of(mctx);
    if (cache == nullptr || !cache->has_layer(il) || graph.cparams.training || !cache->state->attends) {
        return;
    }
    const auto & state    = *cache->state;
    const bool observes   = state.observer.fn != nullptr;
    ggml_tensor * const k = mctx->get_k(graph.ctx0, il);
    fasa_attn attn        = { graph, mctx, q, k, nullptr, kq_b, kq_mask, nullptr, v_mla, kq_scale, il, cache,
        fasa_soft_cap_of(graph) };
    const bool sparse     = attn.begin();
    auto & layer          = cache->layer(il);
    if (sparse) {
        layer.ahead = cache->ahead_reason(il, graph.n_tokens, cache->inputs.n_kv());
    }
    const bool may = sparse && cache->ahead_reason(il, 1, 0) == FASA_REASON_NONE; // in some steps, if not in this one
    if (!observes && !may) {
        return;
    }
    const fasa_foreseen foreseen = fasa_foresee(q, cache->residence.device_of(il));
    if (observes) {
        layer.foreseen = foreseen;
    }
    if (may) {
        attn.set_ahead(foreseen);
    }
}

ggml_tensor * fasa_build_attn(const llm_graph_context & graph, const llama_kv_cache_context * mctx, ggml_tensor * q,
    ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * kq_mask, ggml_tensor * sinks,
    ggml_tensor * v_mla, float kq_scale, int il) {
    fasa_cache * cache = fasa_cache::of(mctx);
    if (cache == nullptr || !cache->has_layer(il)) {
        return nullptr;
    }
    fasa_attn attn = { graph, mctx, q, k, v, kq_b, kq_mask, sinks, v_mla, kq_scale, il, cache,
        fasa_soft_cap_of(graph) };
    auto & layer   = cache->layer(il);
    if (cache->state->observer.fn) {
        attn.observe(layer.foreseen);
    }
    auto & input = attn.input;
    if (!cache->state->attends) { // K and V are stored as usual
        attn.begin();
        return ggml_reshape_2d(graph.ctx0, ggml_cont(graph.ctx0, q), q->ne[0] * q->ne[1], q->ne[2]);
    }
    if (!attn.begin()) {
        if (attn.tile_reason() == FASA_REASON_NONE) {
            return attn.build_tiles();
        }
        input->n_dense++;
        input->n_behind += layer.k_dom != nullptr;
        input->cell_dense += cache->cell_bytes(il);
        input->n_waiting += cache->state->params.enabled && layer.now == FASA_REASON_MIN_CONTEXT_GPU;
        input->prefill_reason = input->prefill_reason == FASA_REASON_NONE ? attn.tile_reason() : input->prefill_reason;
        return attn.build_dense();
    }
    input->n_sparse++;
    input->cell_sparse += cache->cell_bytes(il);
    const auto pending = input->pending.find(il);
    if (pending != input->pending.end()) {
        const auto & from = pending->second;
        input->lists[il]  = fasa_build_join(graph.ctx0, from.list, from.held, &layer.fixed);
        for (ggml_tensor * t = input->lists[il]; t != from.list; t = t->src[0]) {
            attn.on_backend(t);
        }
    } else if (layer.source == FASA_LAYER_SELECTS) {
        input->lists[il] = attn.build_select();
    }
    ggml_tensor * cur = attn.build_fac();
    ggml_build_forward_expand(graph.gf, cur);
    return cur;
}
