// Sparse prefill: the nodes of one layer in a prompt's graph (ops/tile.h), and when there are any.

#include "llama/attn.h"
#include "ops/tile.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-hparams.h"

#include <algorithm>

// why a layer whose cache is on a device, or in its pinned memory, is dense
static fasa_reason fasa_device_tile_reason(const fasa_attn & a, ggml_backend_dev_t dev) {
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
    const auto reason = fasa_device_proc<fasa_dense_reason_t>(dev, "fasa_tile_reason");
    if (reason == nullptr) {
        return FASA_REASON_NO_KERNELS;
    }
    const fasa_layer_shape shape = { a.k->type, a.v->type, d, a.v->ne[0], int32_t(a.q->ne[1] / a.k->ne[1]) };
    return reason(dev, &shape);
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
        graph.cparams.offload_kqv && cache->residence.any_gpu()) {
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
