// SPREAD: foreseen queries, rotated in the dominant dimensions. The rotation is that of ggml-cuda's RoPE, operation by
// operation, so that queries foreseen rightly are equal to the layer's own.

#include "cuda/nodes.cuh"

#include "common.cuh"

static constexpr int FASA_SPREAD_THREADS = 128;

struct fasa_spread_args {
    float * dst;         // [d, n_head, n_tokens]
    const float * value; // [n_dom*n_head, n_tokens]
    const int32_t *dims, *pos;
    const float * factors;
    int d, n_head, n_dom, n_group;
    fasa_rope rope;
};

static __device__ __forceinline__ void fasa_rope_at(
    const fasa_rope & r, int pos, int pair, const float * factors, float & c, float & s) {
    const float theta = pos * powf(r.theta_scale, 2 * pair / 2.0f) / (factors ? factors[pair] : 1.0f);
    float at = r.freq_scale * theta, magnitude = r.attn_factor;
    if (r.ext_factor != 0.0f) {
        const float y   = (pair - r.corr[0]) / max(0.001f, r.corr[1] - r.corr[0]);
        const float mix = (1.0f - min(1.0f, max(0.0f, y))) * r.ext_factor;
        at              = at * (1 - mix) + theta * mix;
        magnitude *= 1.0f + 0.1f * logf(1.0f / r.freq_scale);
    }
    c = cosf(at) * magnitude;
    s = sinf(at) * magnitude;
}

// a head of a token per block
static __global__ void __launch_bounds__(FASA_SPREAD_THREADS) fasa_spread_kernel(const fasa_spread_args a) {
    const int head = blockIdx.x, t = blockIdx.y;
    const int32_t * dim = a.dims + head / a.n_group * a.n_dom;
    const float * in    = a.value + ((int64_t) t * a.n_head + head) * a.n_dom;
    float * out         = a.dst + ((int64_t) t * a.n_head + head) * a.d;
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();
    for (int i = threadIdx.x; i < a.d; i += FASA_SPREAD_THREADS) {
        out[i] = 0.0f;
    }
    __syncthreads();
    for (int j = 2 * threadIdx.x; j + 1 < a.n_dom; j += 2 * FASA_SPREAD_THREADS) {
        const int x = dim[j], y = dim[j + 1];
        if (x < 0) {
            continue;
        }
        float c = 1.0f, s = 0.0f;
        if (x < a.rope.n_rot) {
            fasa_rope_at(a.rope, a.pos[t], a.rope.neox ? x : x / 2, a.factors, c, s);
        }
        out[x] = in[j] * c - in[j + 1] * s;
        out[y] = in[j] * s + in[j + 1] * c;
    }
}

void fasa_cuda_spread(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor *values = dst->src[0], *dims = dst->src[1], *factors = dst->src[3];
    fasa_spread_args a = {};
    a.dst              = (float *) dst->data;
    a.value            = (const float *) values->data;
    a.dims             = (const int32_t *) dims->data;
    a.pos              = (const int32_t *) dst->src[2]->data;
    a.factors          = factors ? (const float *) factors->data : nullptr;
    a.d                = dst->ne[0];
    a.n_head           = dst->ne[1];
    a.n_dom            = dims->ne[0];
    a.n_group          = dst->ne[1] / dims->ne[1];
    a.rope             = fasa_op_get(dst)->rope;
    const ggml_cuda_kernel_launch_params params(dim3(a.n_head, dst->ne[2]), dim3(FASA_SPREAD_THREADS), 0, ctx.stream());
    ggml_cuda_kernel_launch(fasa_spread_kernel, params, a);
}
