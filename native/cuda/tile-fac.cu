// FAC of sparse prefill (ops/tile.h): the rows of every list are gathered, and llama.cpp's flash attention attends to
// them. A pair (a tile and a list of it) is a sequence there, with one KV head:
//
//   q      f32 [d, T rounded up, n_group, pairs]
//   k, v   f16 [d, n_pad, 1, pairs]; n_pad: the longest list's length, in whole steps of flash attention
//   mask   f16 [n_pad, T rounded up, 1, pairs], -inf behind a list's end
//
// Flash attention looks at the mask and leaves out most of what is behind the end of a list, but not all: there are
// zeros. An attention sink is such a row of zeros, right behind the list, and its logit stands in the mask: one query
// head after the other then, since those of a pair have the mask in common.

#include "core/memory.h"
#include "core/select.h"
#include "cuda/device.cuh"
#include "cuda/nodes.cuh"
#include "cuda/tile.cuh"

#include "fattn.cuh"

#include <algorithm>
#include <cstring>

static constexpr int FAC_STEP   = FASA_TILE_CELLS;
static constexpr int FAC_TOKENS = FASA_TILE_TOKENS;

struct fasa_tile_fac_args {
    const int32_t * list; // [pair][n_len]
    const char *q, *k, *v;
    int64_t q_nb1, q_nb2, k_nb1, k_nb2, k_nb3, v_nb1, v_nb2, v_nb3;
    ggml_type type_k, type_v;
    fasa_tile_mask mask;
    fasa_tiles_ref tiles;
    float * dst; // [n_tokens][n_head][d]
    float *q_to, *out;
    half *k_to, *v_to, *mask_to;
    const float * sinks;                                                 // [n_head] or nullptr
    int n_len, n_list, n_group, n_per_kv, n_head, d, n_pad, size, tile0; // size: T, rounded up; tile0: of this turn
    int64_t out_pair, out_t, out_g;                                      // of `out`, from each to the next, in values
};

static constexpr int GATHER_THREADS = 256;

// K and V of the lists; a thread has eight values of a row
static __global__ void __launch_bounds__(GATHER_THREADS) fasa_tile_gather_kernel(const fasa_tile_fac_args a) {
    ggml_cuda_pdl_sync();
    const int pair = blockIdx.y, tile = a.tile0 + pair / a.n_list, list = pair % a.n_list, h = list / a.n_per_kv;
    const int32_t * cells = a.list + ((int64_t) tile * a.n_list + list) * a.n_len;
    const int n = *cells++, n_rows = a.n_pad;
    const int units = a.d / 8, s = a.tiles.stream(tile);
    for (int u = blockIdx.x * GATHER_THREADS + threadIdx.x; u < n_rows * units * 2; u += gridDim.x * GATHER_THREADS) {
        const bool is_v = u >= n_rows * units;
        const int at = u - (is_v ? n_rows * units : 0), i = at / units, dim = at % units * 8;
        float x[8] = {};
        if (i < n) {
            const int64_t cell = cells[i];
            if (is_v) {
                fasa_load8(a.type_v, a.v + cell * a.v_nb2 + h * a.v_nb1 + s * a.v_nb3, dim, x);
            } else {
                fasa_load8(a.type_k, a.k + cell * a.k_nb2 + h * a.k_nb1 + s * a.k_nb3, dim, x);
            }
        }
        half2 y[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            y[j] = __floats2half2_rn(x[2 * j], x[2 * j + 1]);
        }
        *(uint4 *) ((is_v ? a.v_to : a.k_to) + ((int64_t) pair * a.n_pad + i) * a.d + dim) = *(const uint4 *) y;
    }
}

// The mask of the lists' cells. A block has FAC_STEP of them, whose positions it reads once, a warp every eighth token,
// a thread eight cells.
static __global__ void __launch_bounds__(GATHER_THREADS) fasa_tile_gather_mask_kernel(const fasa_tile_fac_args a) {
    static_assert(GATHER_THREADS == FAC_STEP && FAC_STEP == 32 * 8, "a thread reads one position, a warp has all");
    __shared__ __align__(16) int first[FAC_STEP]; // from which position on a query sees the cell
    ggml_cuda_pdl_sync();
    const int pair = blockIdx.y, tile = a.tile0 + pair / a.n_list, list = pair % a.n_list;
    const int32_t * cells = a.list + ((int64_t) tile * a.n_list + list) * a.n_len;
    const int n = *cells++, i = blockIdx.x * FAC_STEP + threadIdx.x, count = a.tiles.count(tile);
    first[threadIdx.x] = i < n ? a.mask.row(a.tiles.stream(tile))[cells[i]] : INT_MAX;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    const int4 low = ((const int4 *) first)[2 * lane], high = ((const int4 *) first)[2 * lane + 1];
    half * out     = a.mask_to + (int64_t) pair * a.size * a.n_pad + blockIdx.x * FAC_STEP + 8 * lane;
    const auto two = [](int x, int y, int pos) { // 0 or -inf
        return (x <= pos ? 0u : 0xfc00u) | (y <= pos ? 0u : 0xfc000000u);
    };
    for (int t = threadIdx.x / 32; t < a.size; t += GATHER_THREADS / 32) {
        const int pos                            = t < count ? a.tiles.pos(tile, t) : -1;
        *(uint4 *) (out + (int64_t) t * a.n_pad) = make_uint4(
            two(low.x, low.y, pos), two(low.z, low.w, pos), two(high.x, high.y, pos), two(high.z, high.w, pos));
    }
}

// the logits of the sinks of query head g of every list; a block has a pair
static __global__ void fasa_tile_sinks_kernel(const fasa_tile_fac_args a, int g) {
    ggml_cuda_pdl_sync();
    const int pair = blockIdx.x, tile = a.tile0 + pair / a.n_list, list = pair % a.n_list;
    const int n  = a.list[((int64_t) tile * a.n_list + list) * a.n_len];
    const half x = __float2half(a.sinks[list * a.n_group + g]);
    for (int t = threadIdx.x; t < a.tiles.count(tile); t += blockDim.x) {
        a.mask_to[((int64_t) pair * a.size + t) * a.n_pad + n] = x;
    }
}

// q in, or flash attention's result out, four values a thread
template <bool IN>
static __global__ void __launch_bounds__(GATHER_THREADS) fasa_tile_move_kernel(const fasa_tile_fac_args a) {
    ggml_cuda_pdl_sync();
    const int pair = blockIdx.y, tile = a.tile0 + pair / a.n_list, head0 = pair % a.n_list * a.n_group;
    const int units = a.d / 4, u = blockIdx.x * GATHER_THREADS + threadIdx.x;
    const int i = u % units, g = u / units % a.n_group, t = u / units / a.n_group;
    if (t >= a.size) {
        return;
    }
    const bool is   = t < a.tiles.count(tile);
    const int token = is ? a.tiles.token(tile, t) : 0;
    if (IN) {
        ((float4 *) a.q_to)[(((int64_t) pair * a.n_group + g) * a.size + t) * units + i] = is ?
            ((const float4 *) (a.q + token * a.q_nb2 + (head0 + g) * a.q_nb1))[i] :
            make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    } else if (is) {
        ((float4 *) a.dst)[((int64_t) token * a.n_head + head0 + g) * units + i] =
            *(const float4 *) (a.out + pair * a.out_pair + t * a.out_t + g * a.out_g + 4 * i);
    }
}

// FASA-M: stale cells fall out of the row cache, as in fasa_assign_slots_kernel (cuda/fetch.cu); a KV head a block
static __global__ void fasa_tile_drop_kernel(
    char * cache, int64_t nb2, int64_t nb3, int n_slot, const int32_t * ranges, int stream0) {
    ggml_cuda_pdl_sync();
    auto * tag = (int32_t *) (cache + blockIdx.x * nb2 + (stream0 + blockIdx.y) * nb3);
    ranges += blockIdx.y * 2 * FASA_MAX_RANGES;
    for (int i = threadIdx.x; i < n_slot; i += blockDim.x) {
        const int cell = tag[i] - 1;
        for (int r = 0; cell >= 0 && r < FASA_MAX_RANGES; ++r) {
            if (cell >= ranges[2 * r] && cell < ranges[2 * r + 1]) {
                tag[i] = 0;
                break;
            }
        }
    }
}

static void fasa_tile_drop(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, int stream0) {
    const ggml_tensor *cache = fasa_op_layer(dst).row_cache, *ranges = dst->src[7];
    if (cache == nullptr || ranges == nullptr) {
        return;
    }
    fasa_tile_drop_kernel<<<dim3(cache->ne[2], ranges->ne[1]), 1024, 0, ctx.stream()>>>(
        (char *) cache->data, cache->nb[2], cache->nb[3], cache->ne[1], (const int32_t *) ranges->data, stream0);
    CUDA_CHECK(cudaGetLastError());
}

static ggml_tensor fasa_fattn_tensor(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3, void * data) {
    ggml_tensor t = {};
    t.type        = type;
    t.ne[0] = ne0, t.ne[1] = ne1, t.ne[2] = ne2, t.ne[3] = ne3;
    t.nb[0] = ggml_type_size(type);
    for (int i = 1; i < GGML_MAX_DIMS; ++i) {
        t.nb[i] = t.nb[i - 1] * t.ne[i - 1];
    }
    t.data = data;
    return t;
}

// flash attention over what was gathered of n_pair pairs: of n_head query heads of each, from g on
static void fasa_tile_fattn(ggml_backend_cuda_context & ctx, const fasa_tile_fac_args & a, const fasa_op_params & p,
    int64_t n_pair, int g, int n_head) {
    ggml_tensor q = fasa_fattn_tensor(GGML_TYPE_F32, a.d, a.size, n_head, n_pair, a.q_to + (int64_t) g * a.size * a.d);
    q.nb[3]       = q.nb[2] * a.n_group;
    ggml_tensor k = fasa_fattn_tensor(GGML_TYPE_F16, a.d, a.n_pad, 1, n_pair, a.k_to);
    ggml_tensor v = fasa_fattn_tensor(GGML_TYPE_F16, a.d, a.n_pad, 1, n_pair, a.v_to);
    ggml_tensor mask = fasa_fattn_tensor(GGML_TYPE_F16, a.n_pad, a.size, 1, n_pair, a.mask_to);
    ggml_tensor out  = fasa_fattn_tensor(GGML_TYPE_F32, a.d, n_head, a.size, n_pair, a.out + g * a.out_g);
    out.op           = GGML_OP_FLASH_ATTN_EXT;
    out.src[0] = &q, out.src[1] = &k, out.src[2] = &v, out.src[3] = &mask;
    const float params[3] = { p.scale, 0.0f, p.soft_cap };
    memcpy(out.op_params, params, sizeof(params));
    out.op_params[3] = GGML_PREC_F32;
    ggml_cuda_flash_attn_ext(ctx, &out);
}

// the result lies as flash attention leaves it
static void fasa_tile_attend(
    ggml_backend_cuda_context & ctx, fasa_tile_fac_args & a, const fasa_op_params & p, int n_pair) {
    if (a.sinks == nullptr) {
        a.out_g = a.d, a.out_t = a.n_group * a.out_g, a.out_pair = a.size * a.out_t;
        fasa_tile_fattn(ctx, a, p, n_pair, 0, a.n_group);
        return;
    }
    a.out_t = a.d, a.out_pair = a.size * a.out_t, a.out_g = n_pair * a.out_pair;
    for (int g = 0; g < a.n_group; ++g) {
        fasa_tile_sinks_kernel<<<n_pair, 128, 0, ctx.stream()>>>(a, g);
        CUDA_CHECK(cudaGetLastError());
        fasa_tile_fattn(ctx, a, p, n_pair, g, 1);
    }
}

void fasa_cuda_tile_fac(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p) {
    const ggml_tensor *list = dst->src[0], *q = dst->src[1], *k = dst->src[2], *v = dst->src[3], *tiles = dst->src[6];
    fasa_tile_fac_args a = { (const int32_t *) list->data, (const char *) q->data, (const char *) k->data,
        (const char *) v->data, (int64_t) q->nb[1], (int64_t) q->nb[2], (int64_t) k->nb[1], (int64_t) k->nb[2],
        (int64_t) k->nb[3], (int64_t) v->nb[1], (int64_t) v->nb[2], (int64_t) v->nb[3], k->type, v->type,
        fasa_tile_mask(dst->src[4]), fasa_tiles_ref(tiles), (float *) dst->data };
    a.n_len              = list->ne[0];
    a.n_list             = list->ne[1];
    a.n_head             = dst->ne[1];
    a.n_group            = a.n_head / a.n_list;
    a.n_per_kv           = a.n_list / k->ne[1];
    a.d                  = k->ne[0];
    a.sinks              = dst->src[5] ? (const float *) dst->src[5]->data : nullptr;
    a.n_pad              = (a.n_len - 1 + !!a.sinks + FAC_STEP - 1) / FAC_STEP * FAC_STEP;
    a.size               = (fasa_tile_size(tiles) + FAC_TOKENS - 1) / FAC_TOKENS * FAC_TOKENS;

    const size_t row = a.d * sizeof(half), bytes = a.n_list * (size_t) a.n_pad * (2 * row + a.size * sizeof(half));
    const int64_t n_tile = tiles->ne[1], turn = std::min<int64_t>(n_tile, std::max<size_t>(1, FASA_TILE_ROOM / bytes));
    const size_t pairs = turn * a.n_list, n_q = pairs * a.size * a.n_group * a.d;
    ggml_cuda_pool_alloc<half> k_to(ctx.pool(), pairs * a.n_pad * a.d), v_to(ctx.pool(), pairs * a.n_pad * a.d),
        mask_to(ctx.pool(), pairs * a.n_pad * a.size);
    ggml_cuda_pool_alloc<float> q_to(ctx.pool(), n_q), out(ctx.pool(), n_q);
    a.k_to = k_to.get(), a.v_to = v_to.get(), a.mask_to = mask_to.get(), a.q_to = q_to.get(), a.out = out.get();

    fasa_tile_drop(ctx, dst, p.stream0);
    const auto stream = ctx.stream();
    for (a.tile0 = 0; a.tile0 < n_tile; a.tile0 += turn) {
        const int n_pair = std::min(turn, n_tile - a.tile0) * a.n_list, units = a.n_pad * a.d / 4;
        const auto blocks = [](int64_t n) {
            return (n + GATHER_THREADS - 1) / GATHER_THREADS;
        };
        const dim3 move(blocks((int64_t) a.size * a.n_group * a.d / 4), n_pair);
        fasa_tile_move_kernel<true><<<move, GATHER_THREADS, 0, stream>>>(a);
        fasa_tile_gather_kernel<<<dim3(std::min<int64_t>(blocks(units), 64), n_pair), GATHER_THREADS, 0, stream>>>(a);
        fasa_tile_gather_mask_kernel<<<dim3(a.n_pad / FAC_STEP, n_pair), GATHER_THREADS, 0, stream>>>(a);
        CUDA_CHECK(cudaGetLastError());
        fasa_tile_attend(ctx, a, p, n_pair);
        fasa_tile_move_kernel<false><<<move, GATHER_THREADS, 0, stream>>>(a);
        CUDA_CHECK(cudaGetLastError());
    }
}
