#include "llama/fasa-hooks.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <map>

namespace {

// One per graph and cache, dense graphs too: it holds the inputs of the sparse layers, refuses the reuse of a graph
// whose branch or settings are no longer right, and counts steps when they run.
struct llm_graph_input_fasa : public llm_graph_input_i {
    fasa_cache * cache;
    uint64_t epoch;
    std::string dense_reason; // "" = sparse
    uint32_t n_stream;
    bool gpu_waits;    // its layers on GPUs are dense
    int n_sparse  = 0; // layers, in this graph
    int n_dense   = 0;
    int n_waiting = 0; // of n_dense, layers on GPUs that wait for a longer context

    ggml_tensor * ranges = nullptr; // i32 [2*FASA_MAX_RANGES, n_stream]
    ggml_tensor * fresh  = nullptr; // i32 [2*FASA_MAX_RANGES, n_stream], of layers that are staged
    ggml_tensor * forced = nullptr; // i32 [n_forced, n_tps, n_stream]

    std::map<int32_t, ggml_tensor *> lists; // by the layer that made them

    llm_graph_input_fasa(fasa_cache * cache, std::string dense_reason, uint32_t n_stream, bool gpu_waits)
        : cache(cache), epoch(cache->state->epoch), dense_reason(std::move(dense_reason)), n_stream(n_stream),
          gpu_waits(gpu_waits) {}

    void set_input(const llama_ubatch * ubatch) override {
        auto & state = *cache->state;
        if (ranges && ranges->buffer) {
            std::vector<int32_t> data(ggml_nelements(ranges));
            cache->set_ranges(data.data(), n_stream, n_waiting > 0);
            ggml_backend_tensor_set(ranges, data.data(), 0, ggml_nbytes(ranges));
        }
        if (fresh && fresh->buffer) {
            std::vector<int32_t> data(ggml_nelements(fresh));
            cache->set_fresh(data.data(), n_stream);
            ggml_backend_tensor_set(fresh, data.data(), 0, ggml_nbytes(fresh));
        }
        if (forced && forced->buffer) {
            std::vector<int32_t> data(ggml_nelements(forced));
            cache->set_forced(data.data(), forced->ne[0], *ubatch);
            ggml_backend_tensor_set(forced, data.data(), 0, ggml_nbytes(forced));
        }
        if (n_sparse > 0) {
            state.stats.layers_dense += n_dense;
        }
        if (!cache->counts_steps) {
            return;
        }
        if (dense_reason == "prefill") {
            state.steps_prefill++;
        } else if (n_sparse > 0) {
            state.steps_sparse++;
            state.step_reason = "";
        } else {
            state.steps_dense++;
            state.step_reason = !dense_reason.empty() ? dense_reason :
                n_waiting > 0                         ? FASA_GPU_WAITS :
                                                        "no layer can run sparse";
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        const auto & ubatch = params.ubatch;
        const uint32_t n    = params.cparams.kv_unified ? 1 : ubatch.n_seqs_unq;
        return epoch == cache->state->epoch && n == n_stream && gpu_waits == cache->gpu_waits(cache->n_kv) &&
            dense_reason ==
            fasa_step_dense_reason(cache->state->params, ubatch.n_tokens, params.n_outputs, n, cache->n_kv);
    }
};

llm_graph_input_fasa * fasa_graph_input(const llm_graph_context & graph, fasa_cache * cache, const ggml_tensor * k) {
    for (auto & input : graph.res->inputs) {
        auto * ours = dynamic_cast<llm_graph_input_fasa *>(input.get());
        if (ours && ours->cache == cache) {
            return ours;
        }
    }
    const auto & params = cache->state->params;

    std::string reason = fasa_step_dense_reason(params, graph.n_tokens, graph.n_outputs, k->ne[3], k->ne[2]);
    auto input         = std::make_unique<llm_graph_input_fasa>(cache, reason, k->ne[3], cache->gpu_waits(k->ne[2]));
    if (reason.empty()) {
        input->ranges = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_I32, 2 * FASA_MAX_RANGES, k->ne[3]);
        input->forced = ggml_new_tensor_3d(
            graph.ctx0, GGML_TYPE_I32, std::max(1u, params.sink + params.recent), graph.n_tokens / k->ne[3], k->ne[3]);
        ggml_set_input(input->ranges);
        ggml_set_input(input->forced);
        ggml_set_name(input->ranges, "fasa_ranges");
        ggml_set_name(input->forced, "fasa_forced");
    }
    return (llm_graph_input_fasa *) graph.res->add_input(std::move(input));
}

// why this attention cannot be sparse, whatever the step; "" when it can
const char * fasa_attn_dense_reason(const llm_graph_context & graph, const ggml_tensor * q, const ggml_tensor * k,
    const ggml_tensor * kq_b, const ggml_tensor * kq_mask, const ggml_tensor * v_mla) {
    if (!graph.cparams.flash_attn) {
        return "flash attention is off";
    }
    if (graph.cparams.training) {
        return "training";
    }
    if (!graph.cparams.causal_attn) {
        return "its attention is not causal";
    }
    if (v_mla != nullptr) {
        return "multi-head latent attention has no keys per head";
    }
    if (kq_b != nullptr) {
        return "its attention has a bias";
    }
    if (graph.hparams.f_max_alibi_bias > 0) {
        return "ALiBi moves the scores";
    }
    if (q->type != GGML_TYPE_F32) {
        return "its queries are not f32";
    }
    if (q->ne[1] % k->ne[1] != 0) {
        return "its query heads are no multiple of its KV heads";
    }
    if (kq_mask->type != GGML_TYPE_F16) {
        return "its mask is not f16";
    }
    if (kq_mask->op != GGML_OP_NONE) {
        return "its mask is computed";
    } // TIP reads it before the kernels before it are done
    return "";
}

// where a layer's nodes run
ggml_backend_t fasa_backend_of(const llm_graph_context & graph, ggml_backend_dev_t dev) {
    for (int i = 0; dev && i < ggml_backend_sched_get_n_backends(graph.sched); ++i) {
        auto * backend = ggml_backend_sched_get_backend(graph.sched, i);
        if (ggml_backend_get_device(backend) == dev) {
            return backend;
        }
    }
    return graph.backend_cpu;
}

// k and v of a layer in the room that dense attention over pinned host memory has on the device
std::pair<ggml_tensor *, ggml_tensor *> fasa_places(
    const llm_graph_context & graph, const fasa_cache * cache, int il, ggml_tensor * k, ggml_tensor * v) {
    ggml_tensor * room = cache->stage(il);
    return { fasa_place_in(graph.ctx0, k, room, 0), fasa_place_in(graph.ctx0, v, room, cache->stage_v_at(il)) };
}

// Dense attention over a copy on the device. In a step that is dense as a whole it is made while the layer before is at
// work (AHEAD), but for the cells that this ubatch writes.
ggml_tensor * fasa_build_staged(const llm_graph_context & graph, const llama_kv_cache_context * mctx,
    fasa_cache * cache, llm_graph_input_fasa * input, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
    ggml_tensor * kq_b, ggml_tensor * kq_mask, ggml_tensor * sinks, ggml_tensor * v_mla, float kq_scale, int il) {
    if (input->fresh == nullptr) {
        input->fresh = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_I32, 2 * FASA_MAX_RANGES, k->ne[3]);
        ggml_set_input(input->fresh);
        ggml_set_name(input->fresh, "fasa_fresh");
    }
    const auto backend            = fasa_backend_of(graph, cache->device_of(il));
    const auto [k_place, v_place] = fasa_places(graph, cache, il, k, v);
    k = fasa_build_stage(graph.ctx0, k, k_place, input->fresh, cache->work(il), &cache->ubatch);
    v = fasa_build_stage(graph.ctx0, v, v_place, input->fresh, cache->work(il), &cache->ubatch);
    ggml_backend_sched_set_tensor_backend(graph.sched, k, backend);
    ggml_backend_sched_set_tensor_backend(graph.sched, v, backend);

    ggml_tensor * cur = graph.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, v_mla, 0, kq_scale, il);
    ggml_build_forward_expand(graph.gf, cur);

    const bool all_dense =
        !cache->state->params.enabled || !input->dense_reason.empty(); // else the next layer may be sparse
    const int next = all_dense ? cache->next_pinned(il) : -1;
    if (next >= 0) {
        ggml_tensor *k_next = mctx->get_k(graph.ctx0, next), *v_next = mctx->get_v(graph.ctx0, next);
        const auto [k_then, v_then] = fasa_places(graph, cache, next, k_next, v_next);
        ggml_tensor * ahead         = fasa_build_ahead(graph.ctx0, cur, k_next, v_next, k_then, v_then, &cache->ubatch);
        ggml_backend_sched_set_tensor_backend(graph.sched, ahead, backend);
        ggml_build_forward_expand(graph.gf, ahead);
    }
    return cur;
}

} // namespace

ggml_tensor * fasa_build_attn(const llm_graph_context & graph, const llama_kv_cache_context * mctx, ggml_tensor * q,
    ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * kq_mask, ggml_tensor * sinks,
    ggml_tensor * v_mla, float kq_scale, int il) {
    fasa_cache * cache = fasa_cache::of(mctx);
    if (cache == nullptr || !cache->has_layer(il)) {
        return nullptr;
    }
    auto & state         = *cache->state;
    const float soft_cap = graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f;

    if (state.observer.fn && k->ne[3] == 1 && cache->n_hadamard() == 0 &&
        (k->type == GGML_TYPE_F16 || k->type == GGML_TYPE_F32)) {
        ggml_build_forward_expand(
            graph.gf, fasa_build_observe(graph.ctx0, q, k, il, kq_scale, soft_cap, &state.observer));
    }

    auto * input = fasa_graph_input(graph, cache, k);

    // dense: the stock code goes on, but over pinned host memory
    const auto dense = [&]() -> ggml_tensor * {
        if (!cache->is_pinned(il) || !cache->stage(il) || graph.cparams.training) {
            return nullptr;
        }
        return fasa_build_staged(graph, mctx, cache, input, q, k, v, kq_b, kq_mask, sinks, v_mla, kq_scale, il);
    };
    if (!state.params.enabled) {
        return dense();
    }
    auto & layer = cache->layer(il);
    layer.asked  = true;
    if (layer.reason.empty()) {
        layer.reason = fasa_attn_dense_reason(graph, q, k, kq_b, kq_mask, v_mla);
    }
    layer.waits = layer.fixed.work ? layer.reason.empty() && input->gpu_waits :
                                     layer.reason == FASA_GPU_WAITS; // the cache, or the step, is short
    if (!input->dense_reason.empty() || !layer.reason.empty() || layer.waits) {
        input->n_dense++;
        input->n_waiting += layer.waits;
        return dense();
    }
    input->n_sparse++;

    const auto backend    = fasa_backend_of(graph, cache->device_of(il));
    const auto on_backend = [&](ggml_tensor * node) { // else the scheduler may copy the cache to another one
        ggml_backend_sched_set_tensor_backend(graph.sched, node, backend);
        return node;
    };
    const size_t stream0 = k->view_offs / k->nb[3]; // the first stream of this ubatch, as in llama_kv_cache::get_k

    if (layer.source == FASA_LAYER_SELECTS) {
        fasa_select_op op = {};
        op.q              = q;
        op.k              = k;
        op.mask           = kq_mask;
        op.k_dom  = ggml_view_4d(graph.ctx0, layer.k_dom, layer.k_dom->ne[0], layer.k_dom->ne[1], layer.k_dom->ne[2],
            k->ne[3], layer.k_dom->nb[1], layer.k_dom->nb[2], layer.k_dom->nb[3], stream0 * layer.k_dom->nb[3]);
        op.dims   = layer.dims;
        op.weight = layer.weight;
        op.ranges = input->ranges;
        op.forced = input->forced;
        op.k_dom_type    = state.params.k_dom;
        op.n_hadamard    = cache->n_hadamard();
        op.scale         = kq_scale;
        op.soft_cap      = soft_cap;
        op.params        = state.layer_params(il);
        op.layer         = &layer.fixed;
        input->lists[il] = on_backend(fasa_build_select(graph.ctx0, op));
        on_backend(input->lists[il]->src[0]);
    }

    fasa_fac_op op    = {};
    op.list           = input->lists.at(layer.source == FASA_LAYER_BORROWS ? layer.lender : il);
    op.q              = q;
    op.k              = k;
    op.v              = v;
    op.mask           = kq_mask;
    op.sinks          = sinks;
    op.ranges         = input->ranges;
    op.stream0        = (int32_t) stream0;
    op.scale          = kq_scale;
    op.soft_cap       = soft_cap;
    op.layer          = &layer.fixed;
    ggml_tensor * cur = on_backend(fasa_build_fac(graph.ctx0, op));
    graph.cb(cur, "fasa", il);

    cur = ggml_reshape_2d(graph.ctx0, cur, cur->ne[0] * cur->ne[1], cur->ne[2] * cur->ne[3]);
    ggml_build_forward_expand(graph.gf, cur);
    return cur;
}
