// FAC by the tensor cores, K and V in f16: eight tokens of the list per warp and turn, for up to eight query heads.
//
// Both products are m16n8. Rows 0 to 7 are the heads. Rows 8 to 15 are what f16 leaves of the f32 queries and weights,
// so that nothing is lost; a thread has both rows of a head, and adds their results. Which dimension a column is does
// not matter as long as both factors, or the result, agree, so a thread reads its dimensions of a row in one piece.
// Thread (g, c) = (lane/4, lane%4):
//
//   logits    [head, token]: A = q [16, D], B = K
//             reads the D/4 dimensions from c*D/4 on of token g, and gets the logits of head g and tokens 2c, 2c + 1
//   values    [head, dimension]: A = the weights [16, 8 tokens], as they lie in the thread that has them, B = V
//             reads the D/8 dimensions from g*D/8 on of tokens 2c, 2c + 1, and gets the D/4 from c*D/4 on of head g

#include "cuda/fac.cuh"

static constexpr int N_WARP = 8, HEADS = 8, TOKENS = 8; // TOKENS: of a warp and turn

// high: x and y as f16; low: what that leaves of them
static __device__ __forceinline__ void fasa_halves(float x, float y, uint32_t & high, uint32_t & low) {
    const half2 h = __floats2half2_rn(x, y), l = __floats2half2_rn(x - __low2float(h), y - __high2float(h));
    high = *(const uint32_t *) &h, low = *(const uint32_t *) &l;
}

// A of the logits: a thread's dimensions of its head's query, times the scale; 0 where there is no head
template <int D>
static __device__ __forceinline__ void fasa_fac_mma_query(
    const fasa_fac_args & a, const fasa_fac_share & at, int g, int c, uint32_t (&q)[D / 16][4]) {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (g < at.n_m) {
            x = ((const float4 *) (a.q + at.token * a.q_nb2 + (at.head0 + g) * a.q_nb1))[c * (D / 16) + i];
        }
        fasa_halves(x.x * a.scale, x.y * a.scale, q[i][0], q[i][1]);
        fasa_halves(x.z * a.scale, x.w * a.scale, q[i][2], q[i][3]);
    }
}

// What a thread reads of eight tokens: its dimensions of the key of token g, and of the values of tokens 2c and 2c + 1
template <int D>
struct fasa_fac_eight {
    uint4 k[D / 32], v[2][D / 64];
    float bias[2];
};

// The list as a thread reads it: turn after turn of eight tokens, the cells of one turn before its rows
template <int D, bool FETCHED>
struct fasa_fac_mma_list {
    const fasa_fac_args & a;
    const int list, h, g, c;
    const int32_t * cells;
    const char *k, *v; // of the stream and KV head
    const half * mask;
    int n, fresh;
    int cell[3]; // of tokens g, 2c and 2c + 1 of the turn that is read next

    __device__ __forceinline__ int token(int i0, int u) const { return i0 + (u == 0 ? g : 2 * c + u - 1); }

    __device__ __forceinline__ void ask(int i0) {
#pragma unroll
        for (int u = 0; u < 3; ++u) {
            const int i = token(i0, u);
            cell[u]     = i < a.n_list_len - 1 ? cells[i] : 0;
        }
    }

    __device__ __forceinline__ fasa_fac_eight<D> load(int i0) const {
        fasa_fac_eight<D> x;
#pragma unroll
        for (int u = 0; u < 3; ++u) {
            const int i   = token(i0, u);
            const bool is = i < n;
            const fasa_fac_row row =
                is ? fasa_fac_row_of<FETCHED>(a, k, v, list, h, i, cell[u], fresh) : fasa_fac_row{};
            if (u == 0) {
#pragma unroll
                for (int j = 0; j < D / 32; ++j) {
                    x.k[j] = is ? ((const uint4 *) row.key)[c * (D / 32) + j] : make_uint4(0, 0, 0, 0);
                }
            } else {
                x.bias[u - 1] = is ? __half2float(mask[cell[u]]) * LOG2E : -INFINITY;
#pragma unroll
                for (int j = 0; j < D / 64; ++j) {
                    x.v[u - 1][j] = is ? ((const uint4 *) row.value)[g * (D / 64) + j] : make_uint4(0, 0, 0, 0);
                }
            }
        }
        return x;
    }
};

// What a thread has of the tokens so far: the largest logit of head g (to base 2), its own weights' sum, and its part
// of the weighted sum of the values
template <int D>
struct fasa_fac_mma_state {
    float acc[D / 8][4], most = -INFINITY, sum = 0.0f;

    __device__ __forceinline__ fasa_fac_mma_state() {
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.0f;
        }
    }

    // eight tokens; first: acc is 0 still
    __device__ __forceinline__ void add(
        const fasa_fac_args & a, const uint32_t (&q)[D / 16][4], const fasa_fac_eight<D> & x, bool first) {
        const uint32_t * key = (const uint32_t *) x.k;
        float y[2][4]        = {};
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            fasa_mma(y[i % 2], q[i], key[2 * i], key[2 * i + 1]);
        }
        float logit[2];
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            const float dot = y[0][u] + y[1][u] + (y[0][2 + u] + y[1][2 + u]);
            logit[u]        = (a.soft_cap > 0.0f ? fasa_soft_cap(dot, a.soft_cap) : dot) * LOG2E + x.bias[u];
        }
        float top         = fmaxf(most, fmaxf(logit[0], logit[1]));
        top               = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
        top               = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
        const float shift = top == -INFINITY ? 0.0f : top, scale = fasa_exp2(most - shift);
        const float w0 = fasa_exp2(logit[0] - shift), w1 = fasa_exp2(logit[1] - shift);
        most = top;
        sum  = sum * scale + (w0 + w1);
        if (!first) {
#pragma unroll
            for (int j = 0; j < D / 8; ++j) {
                acc[j][0] *= scale, acc[j][1] *= scale, acc[j][2] *= scale, acc[j][3] *= scale;
            }
        }
        add_values(x, w0, w1);
    }

    __device__ __forceinline__ void add_values(const fasa_fac_eight<D> & x, float w0, float w1) {
        uint32_t high, low;
        fasa_halves(w0, w1, high, low);
        const uint32_t *v0 = (const uint32_t *) x.v[0], *v1 = (const uint32_t *) x.v[1];
#pragma unroll
        for (int j = 0; j < D / 8; ++j) { // dimension g*D/8 + j of both tokens
            fasa_mma(acc[j], high, low, __byte_perm(v0[j / 2], v1[j / 2], j % 2 ? 0x7632 : 0x5410));
        }
    }

    // the warp's part: parts [HEADS][stride] (fasa_part_stride), of which n_m are written
    __device__ __forceinline__ void write(float * parts, int n_m, int g, int c) {
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        if (g < n_m) {
            float *out = parts + g * fasa_part_stride(D), *mine = out + c * (D / 4);
#pragma unroll
            for (int u = 0; u < 2; ++u) { // dimensions (2c + u)*D/8 + j
#pragma unroll
                for (int j = 0; j < D / 8; j += 4) {
                    *(float4 *) (mine + u * (D / 8) + j) =
                        make_float4(acc[j][u] + acc[j][2 + u], acc[j + 1][u] + acc[j + 1][2 + u],
                            acc[j + 2][u] + acc[j + 2][2 + u], acc[j + 3][u] + acc[j + 3][2 + u]);
                }
            }
            if (c == 0) {
                *(float2 *) (out + D) = make_float2(most, sum);
            }
        }
    }
};

template <int D, bool FETCHED>
static __global__ void __launch_bounds__(32 * N_WARP, 1) fasa_fac_mma_kernel(const fasa_fac_args a) {
    extern __shared__ __align__(16) float smem[]; // [N_WARP][HEADS][stride]

    const fasa_fac_share at = fasa_fac_share_of<HEADS>(a);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
    const int h    = fastdiv(at.head0, a.by_n_group);
    const uint2 st = fast_div_modulo(at.token, a.by_n_tps);
    const int s = st.x, t = st.y;

    fasa_fac_mma_list<D, FETCHED> list = { a, at.list, h, g, c };
    list.cells                         = a.list + ((int64_t) at.token * a.n_list + at.list) * a.n_list_len + 1;
    list.k = a.k + s * a.k_nb3 + h * a.k_nb1, list.v = a.v + s * a.v_nb3 + h * a.v_nb1;
    list.mask = (const half *) (a.mask + s * a.mask_nb3 + t * a.mask_nb1);

    uint32_t q[D / 16][4];
    if (a.joined) { // what made q may be at work yet: SELECT did not wait for it
        ggml_cuda_pdl_sync();
    }
    fasa_fac_mma_query<D>(a, at, g, c, q);
    fasa_fac_mma_state<D> state;

    ggml_cuda_pdl_lc();   // what follows FAC waits for it, and may as well begin
    ggml_cuda_pdl_sync(); // q is older than a SELECT in the same stream, the list is not
    const int first = (warp * at.n_split + at.split) * TOKENS, step = N_WARP * at.n_split * TOKENS;
    list.n     = list.cells[-1];
    list.fresh = fasa_fac_fresh(a);
    list.ask(first);
    fasa_fac_eight<D> next;
    // a turn asks for the rows of i0, then works on those of the turn before: one piece of code, because code has to be
    // fetched too
#pragma unroll 1
    for (int i0 = first; first < list.n; i0 += step) {
        const fasa_fac_eight<D> x = next;
        next                      = list.load(i0);
        list.ask(i0 + step);
        if (i0 == first) {
            continue;
        }
        state.add(a, q, x, i0 <= first + step);
        if (i0 >= list.n) {
            break;
        }
    }
    state.write(smem + warp * HEADS * fasa_part_stride(D), at.n_m, g, c);
    fasa_fac_finish<HEADS>(a, at, smem, N_WARP);
}

template <int D>
static void fasa_fac_mma_launch(ggml_backend_cuda_context & ctx, fasa_fac_args a, int n_token) {
    const int n_chunk = (a.n_shared + HEADS - 1) / HEADS; // of a list
    a.by_n_chunk      = init_fastdiv_values(n_chunk);
    const int nsm = ggml_cuda_info().devices[ggml_cuda_get_device()].nsm, n_share = a.n_list * n_chunk * n_token;
    const int turns = (a.n_list_len - 1 + N_WARP * TOKENS - 1) / (N_WARP * TOKENS); // of one block
    const int n_split =
        n_share > fasa_work::TICKETS ? 1 : std::max(1, std::min({ turns, MAX_PARTS, (nsm + n_share / 2) / n_share }));
    const size_t part = HEADS * fasa_part_stride(D);
    ggml_cuda_pool_alloc<float> parts(ctx.pool(), n_split == 1 ? 1 : n_share * n_split * part);
    a.part = parts.get();
    const ggml_cuda_kernel_launch_params params(
        dim3(n_split, a.n_list * n_chunk, n_token), dim3(32 * N_WARP), N_WARP * part * sizeof(float), ctx.stream());
    // begins while SELECT ends, where the device can
    ggml_cuda_kernel_launch(a.fetched.rows ? fasa_fac_mma_kernel<D, true> : fasa_fac_mma_kernel<D, false>, params, a);
}

bool fasa_cuda_fac_mma(ggml_backend_cuda_context & ctx, fasa_fac_args a, int n_token) {
    const auto aligned = [](const void * data, std::initializer_list<int64_t> strides) {
        uint64_t any = (uintptr_t) data;
        for (const int64_t nb : strides) {
            any |= nb;
        }
        return any % 16 == 0;
    };
    const int cc = ggml_cuda_info().devices[ggml_cuda_get_device()].cc;
    if (a.type_k != GGML_TYPE_F16 || a.type_v != GGML_TYPE_F16 || (a.d != 64 && a.d != 128) ||
        cc < GGML_CUDA_CC_AMPERE || !aligned(a.k, { a.k_nb1, a.k_nb2, a.k_nb3 }) ||
        !aligned(a.v, { a.v_nb1, a.v_nb2, a.v_nb3 })) {
        return false;
    }
    if (a.d == 64) {
        fasa_fac_mma_launch<64>(ctx, a, n_token);
    } else {
        fasa_fac_mma_launch<128>(ctx, a, n_token);
    }
    return true;
}
