// TIP and SELECT on the side stream (cuda/side.cu), beside the feed-forward of the layer before: the steps of
// cuda/select.cuh as plain launches, one behind the other where that kernel has barriers. Its blocks would want a whole
// SM, and the feed-forward would have to wait for them; blocks of these launches are small.
//
//   fasa_side_tip     TIP: the exponentials of every cell, into the TIP node's memory; a warp takes a span
//   fasa_side_keys    keys and histogram; the last block of a list finds the edge
//   fasa_side_edge    cells of the edge are handed in
//   fasa_side_write   they are ranked, and the list is written

#define FASA_TIP_WARPS 8
#include "cuda/nodes.cuh"
#include "cuda/select-keys.cuh"
#include "cuda/select-steps.cuh"
#include "cuda/tip.cuh"

// where a list ends, as the last block of fasa_side_keys found it
struct fasa_side_found {
    fasa_u64 held;
    uint32_t first, last, before, n_edge, n, n_floor, n_cap, n_visible;
    int32_t bin, by_mass, level;
};
static_assert(sizeof(fasa_side_found) <= sizeof(fasa_work::list_state::found), "a list has room for it");

static __device__ fasa_tip_list fasa_side_list(const fasa_select_args & a, int index, int part, int part_cells) {
    fasa_tip_list l;
    const uint2 at = fast_div_modulo(index, a.by_n_list);
    l.token        = at.x;
    l.head0        = at.y * a.n_shared;
    l.n_shared     = a.n_shared;
    l.first        = part * part_cells;
    l.last         = min(a.tip.n_kv, l.first + part_cells);
    l.tip          = a.scores + ((int64_t) l.token * a.tip.n_head + l.head0) * a.tip.n_len;
    l.x            = l.tip + l.first;
    l.x_stride     = a.tip.n_len;
    return l;
}

// grid: parts of a list, lists from `index0` on
template <int K_DOM, int QUADS>
static __global__ void __launch_bounds__(N_THREAD) fasa_side_tip(
    const __grid_constant__ fasa_select_args a, int index0, int part_cells) {
    extern __shared__ __align__(16) char smem[];
    __shared__ float piece[2 * TIP_WARPS * TIP_HEADS];
    const fasa_tip_list l = fasa_side_list(a, index0 + blockIdx.y, blockIdx.x, part_cells);
    fasa_tip_block<K_DOM, QUADS, false> tip(a.tip, l, smem);
    bool waited = false;
#pragma unroll 1
    for (; tip.g0 < a.n_shared; tip.g0 += TIP_HEADS) {
        tip.ask_first();
        if (!waited) {
            ggml_cuda_pdl_sync();
            ggml_cuda_pdl_lc();
            waited = true;
        }
        tip.heads(piece);
    }
}

// the edge of a list, by its last block
static __device__ void fasa_side_find(const fasa_select_args & a, fasa_select_block & b,
    fasa_work::list_state & state, const uint32_t * key) {
    fasa_side_found found = {};
    found.first = FASA_KEY_HIDDEN + 1, found.last = FASA_KEY_HIDDEN; // no key: every cell is taken
    for (int shift = 0;; ++found.level) {
        if (found.level > 1) {
            fasa_select_clear(state.bins[(found.level - 1) % 2 + 1], 0, 1);
            __threadfence();
            __syncthreads();
        }
        fasa_select_edge(a, b, state.bins[found.level == 0 ? 0 : found.level % 2 + 1], found.level == 0);
        if (b.bin < 0) {
            break;
        }
        if (found.level == 0) {
            found.first = fasa_bin_first(b.bin, a.bin_base);
            found.last  = b.bin == BINS - 1 ? UINT32_MAX : fasa_bin_first(b.bin + 1, a.bin_base) - 1;
        } else {
            found.first += (uint32_t) b.bin << shift;
            found.last = min(found.last, found.first + (1u << shift) - 1);
        }
        if (b.n_edge <= EDGE || found.first == found.last) {
            break;
        }
        shift = max(0, 32 - __clz(found.last - found.first) - 11);
        __syncthreads();
        fasa_select_refine(
            a, b, state.bins[(found.level + 1) % 2 + 1], key, a.tip.n_kv, found.first, found.last, shift);
        __threadfence();
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        found.held = b.held, found.before = b.before, found.n_edge = b.n_edge, found.n = b.n;
        found.n_floor = b.n_floor, found.n_cap = b.n_cap, found.n_visible = b.n_visible;
        found.bin = b.bin, found.by_mass = b.by_mass;
        *(fasa_side_found *) state.found = found;
    }
}

template <bool FOURS>
static __global__ void __launch_bounds__(N_THREAD) fasa_side_keys(
    const __grid_constant__ fasa_select_args a, int index0) {
    extern __shared__ __align__(16) char smem[];
    fasa_select_block & b = *(fasa_select_block *) smem;
    __shared__ bool is_last;
    auto & state          = a.work->lists[blockIdx.y];
    const fasa_tip_list l = fasa_side_list(a, index0 + blockIdx.y, blockIdx.x, a.part_cells);
    uint32_t * key        = a.key + (int64_t) blockIdx.y * a.tip.n_kv;
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();
    fasa_select_keys<FOURS>(a, b, l, key + l.first);
    fasa_select_publish(a, b, state.bins[0]);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&state.ticket, 1) + 1 == gridDim.x;
        if (is_last) {
            state.ticket = 0;
        }
    }
    __syncthreads();
    if (is_last) {
        __threadfence();
        fasa_side_find(a, b, state, key);
    }
}

// what fasa_side_find left, into the block
static __device__ fasa_side_found fasa_side_load(fasa_select_block & b, const fasa_work::list_state & state) {
    const fasa_side_found found = *(const fasa_side_found *) state.found;
    if (threadIdx.x == 0) {
        b.held = found.held, b.before = found.before, b.n_edge = found.n_edge, b.n = found.n;
        b.n_floor = found.n_floor, b.n_cap = found.n_cap, b.n_visible = found.n_visible;
        b.bin = found.bin, b.by_mass = found.by_mass;
    }
    __syncthreads();
    return found;
}

static __global__ void __launch_bounds__(N_THREAD) fasa_side_edge(
    const __grid_constant__ fasa_select_args a, int index0) {
    extern __shared__ __align__(16) char smem[];
    fasa_select_block & b = *(fasa_select_block *) smem;
    auto & state          = a.work->lists[blockIdx.y];
    const fasa_tip_list l = fasa_side_list(a, index0 + blockIdx.y, blockIdx.x, a.part_cells);
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();
    const fasa_side_found found = fasa_side_load(b, state);
    fasa_select_hand_in(b, state, blockIdx.x, l.first, l.last, a.key + (int64_t) blockIdx.y * a.tip.n_kv + l.first,
        found.first, found.last, found.bin >= 0 && found.n_edge > EDGE);
}

static __global__ void __launch_bounds__(N_THREAD) fasa_side_write(
    const __grid_constant__ fasa_select_args a, int index0) {
    extern __shared__ __align__(16) char smem[];
    fasa_select_block & b = *(fasa_select_block *) smem;
    auto & state          = a.work->lists[blockIdx.y];
    const int part = blockIdx.x, index = index0 + blockIdx.y;
    const fasa_tip_list l = fasa_side_list(a, index, part, a.part_cells);
    const uint32_t * key  = a.key + (int64_t) blockIdx.y * a.tip.n_kv + l.first;
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();
    const fasa_side_found found = fasa_side_load(b, state);
    if (threadIdx.x == 0) {
        b.n_edge_mine = __ldcg(&state.equal[part]);
    }
    __syncthreads();
    const bool equal    = found.bin >= 0 && found.n_edge > EDGE;
    const fasa_u64 edge = !equal && found.bin >= 0 && threadIdx.x < found.n_edge ? __ldcg(&state.edge[threadIdx.x]) : 0;
    const uint32_t above = fasa_select_before(state.part, part);
    fasa_select_clear(state.bins[0], part, a.n_part);
    if (found.level > 0) {
        fasa_select_clear(state.bins[1], part, a.n_part);
        fasa_select_clear(state.bins[2], part, a.n_part);
    }
    fasa_select_last taken = { found.first, INT_MAX, 0, found.n }; // every cell
    if (equal) {
        taken = fasa_select_equal(a, b, state, part, l.first, l.last, key, found.first);
    } else if (found.bin >= 0) {
        taken = fasa_select_rank(a, b, edge, l.first);
    }
    int32_t * list = a.dst + (int64_t) index * a.n_list_len;
    fasa_select_write(b, l.first, l.last, key, taken, list + 1 + above + taken.before);
    if (part == 0 && threadIdx.x == 0) {
        list[0]      = taken.n;
        state.n_edge = 0;
        auto * c     = (fasa_u64 *) a.work->counter;
        atomicAdd(&c[fasa_work::TOKENS_ATTENDED], (fasa_u64) taken.n);
        atomicAdd(&c[fasa_work::TOKENS_VISIBLE], (fasa_u64) found.n_visible);
        atomicAdd(&c[fasa_work::LISTS], 1ull);
        if (index == 0) {
            atomicAdd(&c[fasa_work::BYTES_TIP], a.bytes_tip);
        }
    }
}

// ---- launches ----

static int fasa_side_env(const char * name, int otherwise) {
    const char * env = getenv(name);
    return env ? atoi(env) : otherwise;
}

// cells of a part, in spans, when `blocks` share lists of n_span spans
static int fasa_side_part(int n_span, int lists, int blocks, int least, int most_parts) {
    const int parts = std::max(1, std::min({ blocks / lists, most_parts, (n_span + least - 1) / least }));
    return (n_span + parts - 1) / parts * FASA_SPAN;
}

template <int K_DOM, int QUADS>
static void fasa_side_launch(ggml_backend_cuda_context & ctx, fasa_select_args & a) {
    const auto & info   = ggml_cuda_info().devices[ctx.device];
    const int n_span    = std::max(1, a.tip.n_span);
    const int per_batch = std::min(a.n_lists, (int) fasa_work::LISTS_AT_ONCE);
    static const int tip_per_sm = fasa_side_env("FASA_SIDE_TIP", 2), per_sm = fasa_side_env("FASA_SIDE_KEYS", 1);

    ggml_cuda_pool_alloc<uint32_t> key(ctx.pool(), (size_t) per_batch * a.tip.n_kv);
    a.key            = key.get();
    const bool fours = a.tip.n_kv % 4 == 0 && a.tip.n_len % 4 == 0;
    for (int index = 0; index < a.n_lists; index += per_batch) {
        const int lists = std::min(per_batch, a.n_lists - index);
        const int tip_cells = fasa_side_part(n_span, lists, tip_per_sm * info.nsm, TIP_WARPS / 2, n_span);
        a.part_cells = fasa_side_part(n_span, lists, per_sm * info.nsm, 2, fasa_work::PARTS);
        a.n_part     = (n_span * FASA_SPAN + a.part_cells - 1) / a.part_cells;
        const dim3 parts(a.n_part, lists), tip_parts((n_span * FASA_SPAN + tip_cells - 1) / tip_cells, lists);
        const cudaStream_t stream = ctx.stream();
        ggml_cuda_kernel_launch(fasa_side_tip<K_DOM, QUADS>,
            ggml_cuda_kernel_launch_params(tip_parts, dim3(N_THREAD), fasa_tip_smem(a.tip.n_dom, a.tip.d), stream), a, index,
            tip_cells);
        const ggml_cuda_kernel_launch_params rest(parts, dim3(N_THREAD), sizeof(fasa_select_block), stream);
        if (fours) {
            ggml_cuda_kernel_launch(fasa_side_keys<true>, rest, a, index);
        } else {
            ggml_cuda_kernel_launch(fasa_side_keys<false>, rest, a, index);
        }
        ggml_cuda_kernel_launch(fasa_side_edge, rest, a, index);
        ggml_cuda_kernel_launch(fasa_side_write, rest, a, index);
    }
}

template <int K_DOM>
static void fasa_side_quads(ggml_backend_cuda_context & ctx, fasa_select_args & a) {
    constexpr int TWO = K_DOM == FASA_K_DOM_F16 ? 0 : 2; // of f16 there would be too much to keep
    switch ((a.tip.n_dom / FASA_GROUP + 3) / 4) {
        case 1: fasa_side_launch<K_DOM, 1>(ctx, a); break;
        case 2: fasa_side_launch<K_DOM, TWO>(ctx, a); break;
        default: fasa_side_launch<K_DOM, 0>(ctx, a); break;
    }
}

void fasa_cuda_select_side(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p) {
    fasa_select_args a = fasa_select_args_make(dst, p);
    switch (fasa_op_get(dst->src[0])->k_dom) {
        case FASA_K_DOM_F16: fasa_side_quads<FASA_K_DOM_F16>(ctx, a); break;
        case FASA_K_DOM_Q8: fasa_side_quads<FASA_K_DOM_Q8>(ctx, a); break;
        default: fasa_side_quads<FASA_K_DOM_Q4>(ctx, a); break;
    }
}
