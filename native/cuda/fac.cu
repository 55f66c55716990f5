// FAC: exact attention over the cells of a list. Rows are read in place; those of FASA-M where cuda/fetch.cu has put
// them, but for that of a cell which was written since.
//
// LANES lanes read a token's row, eight dimensions each, so a warp works on 32/LANES tokens of the list at a time, for
// up to M query heads of the group. From compute capability 8.0 on, rows in f16 go to the tensor cores
// (cuda/fac-mma.cu).

#include "cuda/fac.cuh"

static constexpr int N_WARP      = 16;
static constexpr int STATIC_SMEM = 1024; // bytes, at most, that the kernel has beside its dynamic shared memory

// Eight values of a row. Those in f16 stay as they are stored, so that more rows can be read at once.
template <bool F16>
struct fasa_fac_values;
template <>
struct fasa_fac_values<true> {
    uint4 v;
    __device__ void zero() { v = make_uint4(0, 0, 0, 0); }
    __device__ void load(ggml_type, const char * row, int dim) { v = ((const uint4 *) row)[dim / 8]; }
    __device__ void get(float * x) const { fasa_load8<GGML_TYPE_F16>((const char *) &v, 0, x); }
};
template <>
struct fasa_fac_values<false> {
    float v[8];
    __device__ void zero() {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            v[i] = 0.0f;
        }
    }
    __device__ void load(ggml_type type, const char * row, int dim) { fasa_load8(type, row, dim, v); }
    __device__ void get(float * x) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            x[i] = v[i];
        }
    }
};

template <int M, bool F16>
static constexpr int FASA_AHEAD = (F16 ? 4 : 2) / (M > 2 ? 2 : 1); // tokens of a lane that are read together

// What a lane has of its tokens so far, for M query heads: the largest logit (to base 2), the sum of the weights, and
// eight dimensions of the weighted sum of the values
template <int M>
struct fasa_fac_state {
    float acc[M][8], most[M], sum[M];

    __device__ __forceinline__ void zero() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            most[m] = -INFINITY, sum[m] = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                acc[m][i] = 0.0f;
            }
        }
    }

    // Makes the largest of these logits and of those before the new `most`. shift [M]: what weights are relative to.
    template <int N>
    __device__ __forceinline__ void raise(const float (&logit)[N][M], float (&shift)[M]) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            float top = most[m];
#pragma unroll
            for (int u = 0; u < N; ++u) {
                top = fmaxf(top, logit[u][m]);
            }
            shift[m]          = top == -INFINITY ? 0.0f : top;
            const float scale = fasa_exp2(most[m] - shift[m]);
            most[m]           = top;
            sum[m] *= scale;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                acc[m][j] *= scale;
            }
        }
    }

    // one token's value y [8]
    __device__ __forceinline__ void add(const float (&y)[8], const float (&logit)[M], const float (&shift)[M]) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const float w = fasa_exp2(logit[m] - shift[m]);
            sum[m] += w;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                acc[m][j] += w * y[j];
            }
        }
    }

    // head m: adds up the tokens of the warp, of which LANES lanes share one
    template <int LANES>
    __device__ __forceinline__ void add_lanes(int m) {
#pragma unroll
        for (int half_warp = LANES; half_warp < 32; half_warp *= 2) {
            const float most_b = __shfl_xor_sync(0xffffffff, most[m], half_warp),
                        sum_b  = __shfl_xor_sync(0xffffffff, sum[m], half_warp);
            const float top = fmaxf(most[m], most_b), shift = top == -INFINITY ? 0.0f : top;
            const float fa = fasa_exp2(most[m] - shift), fb = fasa_exp2(most_b - shift);
            sum[m]  = sum[m] * fa + sum_b * fb;
            most[m] = top;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                acc[m][j] = acc[m][j] * fa + __shfl_xor_sync(0xffffffff, acc[m][j], half_warp) * fb;
            }
        }
    }

    // the warp's part: parts [M][stride] (fasa_part_stride)
    template <int LANES>
    __device__ __forceinline__ void write(float * parts, int d, int dim, bool active) {
        const int lane = threadIdx.x % 32, stride = fasa_part_stride(d);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            add_lanes<LANES>(m);
            float * out = parts + m * stride;
            if (lane < LANES && active) {
                *(float4 *) (out + dim)     = make_float4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
                *(float4 *) (out + dim + 4) = make_float4(acc[m][4], acc[m][5], acc[m][6], acc[m][7]);
            }
            if (lane == 0) {
                out[d] = most[m], out[d + 1] = sum[m];
            }
        }
    }
};

// q [M][8]: this lane's dimensions of the block's query heads, times the scale; 0 where there are none
template <int M>
static __device__ __forceinline__ void fasa_fac_query(
    const fasa_fac_args & a, const fasa_fac_share & at, int dim, bool active, float (&q)[M][8]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            q[m][i] = 0.0f;
        }
        if (m < at.n_m && active) {
            fasa_load8<GGML_TYPE_F32>(a.q + at.token * a.q_nb2 + (at.head0 + m) * a.q_nb1, dim, q[m]);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            q[m][i] *= a.scale;
        }
    }
}

// The logits of one token, to base 2: x [8] are this lane's dimensions of its key, LANES lanes share the token
template <int LANES, int M>
static __device__ __forceinline__ void fasa_fac_logits(
    const fasa_fac_args & a, const float (&q)[M][8], const float (&x)[8], float bias, float (&logit)[M]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            dot += q[m][j] * x[j];
        }
        dot      = fasa_warp_sum<LANES>(dot);
        logit[m] = (a.soft_cap > 0.0f ? fasa_soft_cap(dot, a.soft_cap) : dot) * LOG2E + bias;
    }
}

template <int LANES, int M, bool F16>
static __global__ void __launch_bounds__(32 * N_WARP, 1) fasa_fac_kernel(const fasa_fac_args a) {
    constexpr int TOKENS = 32 / LANES; // of a warp, at a time
    constexpr int AHEAD  = FASA_AHEAD<M, F16>;

    extern __shared__ __align__(16) float smem[]; // [N_WARP][M][stride]

    const fasa_fac_share at = fasa_fac_share_of<M>(a);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, dim = lane % LANES * 8;
    const int h    = fastdiv(at.head0, a.by_n_group);
    const uint2 st = fast_div_modulo(at.token, a.by_n_tps);
    const int s = st.x, t = st.y;

    const int32_t * cells = a.list + ((int64_t) at.token * a.n_list + at.list) * a.n_list_len + 1;
    const char *k = a.k + s * a.k_nb3 + h * a.k_nb1, *v = a.v + s * a.v_nb3 + h * a.v_nb1;
    const half * mask = (const half *) (a.mask + s * a.mask_nb3 + t * a.mask_nb1);
    const bool active = dim < a.d;

    float q[M][8];
    fasa_fac_state<M> state;
    if (a.joined) { // what made q may be at work yet: SELECT did not wait for it
        ggml_cuda_pdl_sync();
    }
    fasa_fac_query<M>(a, at, dim, active, q);
    state.zero();
    ggml_cuda_pdl_lc();   // what follows FAC waits for it, and may as well begin
    ggml_cuda_pdl_sync(); // q is older than a SELECT in the same stream, the list is not
    const int first = (warp * at.n_split + at.split) * TOKENS,
              step  = N_WARP * at.n_split * TOKENS; // from token to token of a lane
    int cell_of[AHEAD];
    const auto ask = [&](int i0) {
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const int i = i0 + u * step + lane / LANES;
            cell_of[u]  = i < a.n_list_len - 1 ? cells[i] : 0;
        }
    };
    const int n = cells[-1], fresh = fasa_fac_fresh(a);
    ask(first);
    for (int i0 = first; i0 < n; i0 += AHEAD * step) {
        fasa_fac_values<F16> keys[AHEAD], values[AHEAD];
        float bias[AHEAD], logit[AHEAD][M], shift[M];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const int i = i0 + u * step + lane / LANES;
            bias[u]     = -INFINITY;
            keys[u].zero(), values[u].zero();
            if (i < n) {
                const int64_t cell     = cell_of[u];
                const fasa_fac_row row = a.fetched.rows ? fasa_fac_row_of<true>(a, k, v, at.list, h, i, cell, fresh) :
                                                          fasa_fac_row_of<false>(a, k, v, at.list, h, i, cell, fresh);
                bias[u]                = __half2float(mask[cell]) * LOG2E;
                if (active) {
                    keys[u].load(a.type_k, row.key, dim);
                    values[u].load(a.type_v, row.value, dim);
                }
            }
        }
        ask(i0 + AHEAD * step);
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            float x[8];
            keys[u].get(x);
            fasa_fac_logits<LANES>(a, q, x, bias[u], logit[u]);
        }
        state.raise(logit, shift);
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            float y[8];
            values[u].get(y);
            state.add(y, logit[u], shift);
        }
    }
    state.template write<LANES>(smem + warp * M * fasa_part_stride(a.d), a.d, dim, active);
    fasa_fac_finish<M>(a, at, smem, N_WARP);
}

template <int LANES, int M, bool F16>
static void fasa_fac_launch(ggml_backend_cuda_context & ctx, fasa_fac_args a, int n_token) {
    const int n_chunk   = (a.n_shared + M - 1) / M; // of a list
    a.by_n_chunk        = init_fastdiv_values(n_chunk);
    const int device    = ggml_cuda_get_device();
    const auto & info   = ggml_cuda_info().devices[device];
    const int n_share   = a.n_list * n_chunk * n_token;
    const int tokens    = N_WARP * 32 / LANES * FASA_AHEAD<M, F16>; // of a block, at a time
    const int turns     = (a.n_list_len - 1 + tokens / 2 - 1) / (tokens / 2);
    const int n_split   = n_share > fasa_work::TICKETS ?
        1 :
        std::max(1, std::min({ turns, MAX_PARTS, (info.nsm + n_share / 2) / n_share }));
    const size_t n_byte = (size_t) N_WARP * M * fasa_part_stride(a.d) * sizeof(float);
    const auto kernel   = fasa_fac_kernel<LANES, M, F16>;
    static std::atomic<uint32_t> known{ 0 }; // devices whose limit was raised
    if (!(known & 1u << device)) {
        const size_t most =
            std::min((size_t) N_WARP * M * fasa_part_stride(256) * sizeof(float), info.smpbo - STATIC_SMEM);
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
        known |= 1u << device;
    }
    ggml_cuda_pool_alloc<float> part(
        ctx.pool(), n_split == 1 ? 1 : (size_t) n_share * n_split * M * fasa_part_stride(a.d));
    a.part = part.get();
    const ggml_cuda_kernel_launch_params params(
        dim3(n_split, a.n_list * n_chunk, n_token), dim3(32 * N_WARP), n_byte, ctx.stream());
    ggml_cuda_kernel_launch(kernel, params, a); // begins while SELECT ends, where the device can
}

template <int LANES, int M>
static void fasa_fac_type(ggml_backend_cuda_context & ctx, const fasa_fac_args & a, int n_token) {
    if (a.type_k == GGML_TYPE_F16 && a.type_v == GGML_TYPE_F16) {
        fasa_fac_launch<LANES, M, true>(ctx, a, n_token);
    } else {
        fasa_fac_launch<LANES, M, false>(ctx, a, n_token);
    }
}

template <int LANES>
static void fasa_fac_heads(ggml_backend_cuda_context & ctx, const fasa_fac_args & a, int n_token) {
    const size_t most = ggml_cuda_info().devices[ggml_cuda_get_device()].smpbo - STATIC_SMEM; // bytes
    if (a.n_shared == 1) {
        fasa_fac_type<LANES, 1>(ctx, a, n_token);
    } else if (a.n_shared == 2 || N_WARP * 4 * fasa_part_stride(a.d) * sizeof(float) > most) {
        fasa_fac_type<LANES, 2>(ctx, a, n_token);
    } else {
        fasa_fac_type<LANES, 4>(ctx, a, n_token);
    }
}

void fasa_cuda_fac(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p) {
    const ggml_tensor *list = dst->src[0], *q = dst->src[1], *k = dst->src[2], *v = dst->src[3], *mask = dst->src[4],
                      *sinks       = dst->src[5];
    const fasa_layer_const & layer = fasa_op_layer(dst);
    fasa_fac_args a                = {};
    a.dst                          = (float *) dst->data;
    a.list                         = (const int32_t *) list->data;
    a.q                            = (const char *) q->data;
    a.k                            = (const char *) k->data;
    a.v                            = (const char *) v->data;
    a.mask                         = (const char *) mask->data;
    a.sinks                        = sinks ? (const float *) sinks->data : nullptr;
    a.work                         = (fasa_work *) layer.work->data;
    a.q_nb1 = q->nb[1], a.q_nb2 = q->nb[2];
    a.k_nb1 = k->nb[1], a.k_nb2 = k->nb[2], a.k_nb3 = k->nb[3];
    a.v_nb1 = v->nb[1], a.v_nb2 = v->nb[2], a.v_nb3 = v->nb[3];
    a.mask_nb1 = mask->nb[1], a.mask_nb3 = mask->nb[3];
    a.type_k = k->type, a.type_v = v->type;
    a.n_list_len       = list->ne[0];
    a.n_list           = list->ne[1];
    a.by_n_tps         = init_fastdiv_values(dst->ne[2]);
    a.n_head           = dst->ne[1];
    a.n_shared         = a.n_head / a.n_list;
    a.by_n_group       = init_fastdiv_values(a.n_head / k->ne[1]);
    a.d                = k->ne[0];
    a.scale            = p.scale;
    a.soft_cap         = p.soft_cap;
    a.joined           = p.flags & FASA_FORKED;
    const int n_stream = dst->ne[3], n_token = dst->ne[2] * n_stream;
    a.row_bytes       = ggml_row_size(k->type, k->ne[0]) + ggml_row_size(v->type, v->ne[0]);
    const auto launch = [&](int n) {
        if (fasa_cuda_fac_mma(ctx, a, n)) {
            return;
        }
        if (a.d <= 64) {
            fasa_fac_heads<8>(ctx, a, n);
        } else if (a.d <= 128) {
            fasa_fac_heads<16>(ctx, a, n);
        } else {
            fasa_fac_heads<32>(ctx, a, n);
        }
    };
    const bool in_place = layer.rows == nullptr;
    if (in_place) {
        launch(n_token);
    }
    for (; !in_place && a.token0 < n_token; ++a.token0) { // their rows have room for those of one token
        a.fetched = fasa_cuda_fetch(ctx, dst, a.token0);
        launch(1);
    }
}
