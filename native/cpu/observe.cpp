// OBSERVE: hands the queries and keys of a layer to an observer on the host.

#include "cpu/nodes.h"
#include "cpu/rows.h"

#include <cstring>
#include <vector>

// f32 [n_tokens, n_head, d] of q, which may be a view with gaps
static std::vector<float> fasa_copy_heads(const ggml_tensor * q) {
    std::vector<float> copy(q ? ggml_nelements(q) : 0);
    for (int64_t t = 0; q && t < q->ne[2]; ++t) {
        for (int64_t h = 0; h < q->ne[1]; ++h) {
            memcpy(copy.data() + (t * q->ne[1] + h) * q->ne[0], fasa_at(q, h, t, 0), q->ne[0] * sizeof(float));
        }
    }
    return copy;
}

void fasa_cpu_observe(ggml_tensor * dst, const fasa_op_params & p, int ith) {
    if (ith != 0) {
        return; // ggml calls every thread, whatever n_tasks says
    }
    const ggml_tensor *q = dst->src[0], *k = dst->src[1];
    const auto * observer = (const fasa_observer_ref *) p.userdata;
    *(float *) dst->data  = 0.0f;
    if (observer == nullptr || observer->fn == nullptr) {
        return;
    }
    const std::vector<float> copy = fasa_copy_heads(q), ahead = fasa_copy_heads(dst->src[2]);
    fasa_observation seen = {};
    seen.il               = p.k_dom;
    seen.n_head           = q->ne[1];
    seen.n_head_kv        = k->ne[1];
    seen.n_embd_head      = q->ne[0];
    seen.n_tokens         = q->ne[2];
    seen.n_kv             = k->ne[2];
    seen.q                = copy.data();
    seen.k                = k->data;
    seen.k_is_f16         = k->type == GGML_TYPE_F16;
    seen.scale            = p.scale;
    seen.soft_cap         = p.soft_cap;
    seen.q_ahead          = ahead.empty() ? nullptr : ahead.data();
    seen.ahead_reason     = p.stream0;
    observer->fn(&seen, observer->user);
}
