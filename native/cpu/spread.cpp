// SPREAD on the CPU: foreseen queries, rotated in the dominant dimensions. The rotation is that of ggml's RoPE,
// operation by operation.

#include "cpu/nodes.h"
#include "cpu/rows.h"

#include <algorithm>
#include <cmath>

// cos and sin of pair `pair` at a position, times their magnitude
static void fasa_rope_at(const fasa_rope & r, int32_t pos, int pair, const float * factors, float & c, float & s) {
    float theta = (float) pos;
    for (int i = 0; i < pair; ++i) {
        theta *= r.theta_scale;
    }
    theta /= factors ? factors[pair] : 1.0f;
    float at = r.freq_scale * theta, magnitude = r.attn_factor;
    if (r.ext_factor != 0.0f) {
        const float y   = (pair - r.corr[0]) / std::max(0.001f, r.corr[1] - r.corr[0]);
        const float mix = (1 - std::min(1.0f, std::max(0.0f, y))) * r.ext_factor;
        at              = at * (1 - mix) + theta * mix;
        magnitude *= 1.0f + 0.1f * logf(1.0f / r.freq_scale);
    }
    c = cosf(at) * magnitude;
    s = sinf(at) * magnitude;
}

void fasa_cpu_spread(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth) {
    const ggml_tensor *values = dst->src[0], *dims = dst->src[1], *pos = dst->src[2], *factors = dst->src[3];

    const int64_t n_head = dst->ne[1], n_dom = dims->ne[0], n_group = n_head / dims->ne[1];
    const float * ff = factors ? (const float *) factors->data : nullptr;
    int64_t first, last;
    fasa_split(n_head * dst->ne[2], ith, nth, first, last);
    for (int64_t i = first; i < last; ++i) {
        const int64_t head = i % n_head, t = i / n_head;
        const int32_t * dim = (const int32_t *) dims->data + head / n_group * n_dom;
        const float * in    = (const float *) ((const char *) values->data + t * values->nb[1]) + head * n_dom;
        float * out         = (float *) fasa_at(dst, head, t, 0);
        std::fill(out, out + dst->ne[0], 0.0f);
        const auto is_dim = [&](int32_t x) {
            return (uint64_t) x < (uint64_t) dst->ne[0]; // not so: -1, padding
        };
        for (int64_t j = 0; j + 1 < n_dom && is_dim(dim[j]) && is_dim(dim[j + 1]); j += 2) {
            float c = 1.0f, s = 0.0f;
            const int pair = p.rope.neox ? dim[j] : dim[j] / 2;
            if (dim[j] < p.rope.n_rot && pair < p.rope.n_rot / 2) {
                fasa_rope_at(p.rope, ((const int32_t *) pos->data)[t], pair, ff, c, s);
            }
            out[dim[j]]     = in[j] * c - in[j + 1] * s;
            out[dim[j + 1]] = in[j] * s + in[j + 1] * c;
        }
    }
}
