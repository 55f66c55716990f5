#pragma once

// TIP and SELECT in one launch: the estimated logits of every cell, then the best cells of every list, ascending.
//
// A list of a token is shared by `n_part` blocks, each with a range of its cells. Lists are ordered by keys (fasa_key):
//
//   0. TIP (cuda/tip.cuh): exponentials of the block's cells, into shared memory where they fit; span sums into global
//      memory
//   -- barrier of the list's blocks
//   1. the group's score and key of every cell (cuda/select-keys.cuh); a histogram of the keys in BINS, over all blocks
//   -- barrier
//   2. every block finds the bin where the list ends (the edge), hands in its cells of that bin, and counts those above
//      it
//   -- barrier
//   3. every block ranks the edge's cells, which gives the last cell taken, and writes its part of the list
//
// The bins are 0.5% wide, so the edge holds few cells. Where it holds more than EDGE (even attention), step 2 is done
// again on the edge alone, in ever narrower bins, until few cells are left or all of them are equal. Keys and shares
// are whole numbers, so nothing depends on the order of the blocks.
//
// The blocks of a list are launched together (cooperatively), and their barriers spin. Where the device can, they begin
// while the kernel before ends, and ask for the first tiles of K_dom.

#include "cuda/nodes.cuh"
#include "cuda/select-keys.cuh"
#include "cuda/select-steps.cuh"
#include "cuda/tip.cuh"

static constexpr int HEAD_PAD = 8; // floats between the heads' scores in shared memory: four heads are written at once
static constexpr int STATIC_SMEM = 1024; // bytes, at most, that the kernel has beside its dynamic shared memory

// All blocks of a list arrive before one leaves. What they wrote before is seen after (through L2: __ldcg).
struct fasa_list_barrier {
    fasa_work::list_state & state;
    const int n_part;
    const uint32_t mine; // the top bit of state.arrived turns with every barrier: its blocks add 2^31 together
    uint32_t phase = 0;

    __device__ fasa_list_barrier(fasa_work::list_state & state, int part, int n_part)
        : state(state), n_part(n_part), mine(part == 0 ? 0x80000001u - n_part : 1) {}

    // To be called before the first wait, when the kernels before this one are done. To call it again does no harm: the
    // top bit does not turn while this block has not arrived. Only thread 0 uses the phase.
    __device__ void read_phase() { phase = *(volatile uint32_t *) &state.arrived; }

    __device__ void wait() {
        if (n_part == 1) {
            __syncthreads();
            return;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            fasa_add_release(&state.arrived, mine);
            while (((fasa_load_acquire(&state.arrived) ^ phase) & 0x80000000u) == 0) {
            }
        }
        phase ^= 0x80000000u;
        __syncthreads();
    }
};

// where a list ends: in the keys [first, last], whose cells are few or equal
struct fasa_select_range {
    uint32_t first, last;
    int level; // of the histogram that found it
};

// Step 2: the edge, in the histograms of the list; the first one is published. Where too many keys are at the edge,
// ever narrower bins, until they are few or equal.
static __device__ __forceinline__ fasa_select_range fasa_select_find_edge(const fasa_select_args & a,
    fasa_select_block & b, const fasa_tip_list & l, fasa_work::list_state & state, fasa_list_barrier & barrier,
    int part, const uint32_t * key) {
    fasa_select_range at = { FASA_KEY_HIDDEN + 1, FASA_KEY_HIDDEN, 0 }; // no key: every cell is taken
    for (int shift = 0;; ++at.level) {
        barrier.wait();
        if (at.level > 0) {
            fasa_select_clear(state.bins[(at.level - 1) % 3], part, a.n_part); // read by all; used again two levels on
        }
        fasa_select_edge(a, b, state.bins[at.level % 3], at.level == 0);
        if (b.bin < 0) {
            break;
        }
        if (at.level == 0) {
            at.first = fasa_bin_first(b.bin, a.bin_base);
            at.last  = b.bin == BINS - 1 ? UINT32_MAX : fasa_bin_first(b.bin + 1, a.bin_base) - 1;
        } else {
            at.first += (uint32_t) b.bin << shift;
            at.last = min(at.last, at.first + (1u << shift) - 1);
        }
        if (b.n_edge <= EDGE || at.first == at.last) {
            break;
        }
        shift = max(0, 32 - __clz(at.last - at.first) - 11);
        __syncthreads();
        fasa_select_refine(a, b, state.bins[(at.level + 1) % 3], key, l.last - l.first, at.first, at.last, shift);
    }
    return at;
}

// Steps 1 to 3 of list `index` of all tokens' lists
template <bool FOURS>
static __device__ __forceinline__ void fasa_select_list(const fasa_select_args & a, fasa_select_block & b,
    const fasa_tip_list & l, fasa_work::list_state & state, fasa_list_barrier & barrier, int index, int part,
    uint32_t * key) {
    fasa_select_keys<FOURS>(a, b, l, key);
    fasa_select_publish(a, b, state.bins[0]);
    const fasa_select_range at = fasa_select_find_edge(a, b, l, state, barrier, part, key);
    const bool equal           = b.bin >= 0 && b.n_edge > EDGE;
    __syncthreads();
    fasa_select_hand_in(b, state, part, l.first, l.last, key, at.first, at.last, equal);
    barrier.wait();

    const fasa_u64 edge =
        !equal && b.bin >= 0 && threadIdx.x < b.n_edge ? __ldcg(&state.edge[threadIdx.x]) : 0; // asked for early
    const uint32_t above = fasa_select_before(state.part, part);
    fasa_select_clear(state.bins[at.level % 3], part, a.n_part);
    fasa_select_last taken = { at.first, INT_MAX, 0, b.n }; // every cell
    if (equal) {
        taken = fasa_select_equal(a, b, state, part, l.first, l.last, key, at.first);
    } else if (b.bin >= 0) {
        taken = fasa_select_rank(a, b, edge, l.first);
    }
    int32_t * list = a.dst + (int64_t) index * a.n_list_len;
    fasa_select_write(b, l.first, l.last, key, taken, list + 1 + above + taken.before);
    if (part == 0 && threadIdx.x == 0) {
        list[0]      = taken.n;
        state.n_edge = 0;
        auto * c     = (fasa_u64 *) a.work->counter;
        atomicAdd(&c[fasa_work::TOKENS_ATTENDED], (fasa_u64) taken.n);
        atomicAdd(&c[fasa_work::TOKENS_VISIBLE], (fasa_u64) b.n_visible);
        atomicAdd(&c[fasa_work::LISTS], 1ull);
        if (index == 0) {
            atomicAdd(&c[fasa_work::BYTES_TIP], a.bytes_tip);
        }
    }
}

// IN_SMEM: scores and keys of a block's cells lie in its shared memory
template <int K_DOM, int QUADS, bool IN_SMEM>
static __global__ void __launch_bounds__(N_THREAD, 1) fasa_select_kernel(const __grid_constant__ fasa_select_args a) {
    extern __shared__ __align__(16) char smem[];
    fasa_select_block & b = *(fasa_select_block *) smem;
    // [n_shared][part_cells + HEAD_PAD] scores; those of the first head become keys
    float * in_smem       = (float *) (smem + sizeof(fasa_select_block));

    const int part     = blockIdx.x;
    auto & state       = a.work->lists[blockIdx.y];
    const auto list_at = [&](int index) {
        fasa_tip_list l;
        const uint2 at = fast_div_modulo(index, a.by_n_list);
        l.token        = at.x;
        l.head0        = at.y * a.n_shared;
        l.n_shared     = a.n_shared;
        l.first        = part * a.part_cells;
        l.last         = min(a.tip.n_kv, l.first + a.part_cells);
        l.tip          = a.scores + ((int64_t) l.token * a.tip.n_head + l.head0) * a.tip.n_len;
        l.x            = IN_SMEM ? in_smem : l.tip + l.first;
        l.x_stride     = IN_SMEM ? a.part_cells + HEAD_PAD : a.tip.n_len;
        return l;
    };
    fasa_list_barrier barrier(state, part, a.n_part);
    const auto wait_for_before = [&]() {
        ggml_cuda_pdl_sync();
        ggml_cuda_pdl_lc(); // FAC may take the place of blocks that are done
        barrier.read_phase();
    };
    if (!IN_SMEM && a.given) {
        wait_for_before();
    }
#pragma unroll 1
    for (int index = blockIdx.y; index < a.n_lists; index += gridDim.y) {
        const fasa_tip_list l = list_at(index);
        if (IN_SMEM || !a.given) {
            fasa_tip_block<K_DOM, QUADS, IN_SMEM> tip(a.tip, l, smem);
#pragma unroll 1
            for (; tip.g0 < a.n_shared; tip.g0 += TIP_HEADS) {
                tip.ask_first();
                wait_for_before();
                tip.heads(b.piece);
            }
            barrier.wait();
        }
        fasa_select_list<IN_SMEM>(a, b, l, state, barrier, index, part,
            IN_SMEM ? (uint32_t *) in_smem : a.key + (int64_t) index * a.tip.n_kv + l.first);
        if (index + (int) gridDim.y < a.n_lists) {
            barrier.wait(); // the state is used again
        }
    }
}

// ---- how a list is divided ----

struct fasa_select_division {
    int lists;   // lists at a time
    size_t smem; // bytes
};

static void fasa_select_divide(fasa_select_args & a, int parts) {
    const int spans = std::max(1, a.tip.n_span);
    a.part_cells    = (spans + parts - 1) / parts * FASA_SPAN;
    a.n_part        = (spans * FASA_SPAN + a.part_cells - 1) / a.part_cells;
}

// Divides a list among blocks that all run together. False: in_smem is asked for, and their cells do not fit in shared
// memory.
template <typename F>
static bool fasa_select_divide_together(F kernel, fasa_select_args & a, fasa_select_division & division, bool in_smem) {
    const auto & info   = ggml_cuda_info().devices[ggml_cuda_get_device()];
    const auto together = [&](size_t smem) {
        int per_sm = 0;
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, N_THREAD, smem));
        return (a.per_sm > 0 ? std::min(a.per_sm, per_sm) : per_sm) * info.nsm;
    };
    const int most = together(sizeof(fasa_select_block)), useful = std::max(1, a.tip.n_span / 2);
    division.lists  = std::min({ a.n_lists, most, (int) fasa_work::LISTS_AT_ONCE });
    const int parts = info.supports_cooperative_launch ?
        std::max(1, std::min({ most / division.lists, (int) fasa_work::PARTS, useful })) :
        1;
    for (int p = parts; p > 0 && in_smem; --p) {
        fasa_select_divide(a, p);
        division.smem = sizeof(fasa_select_block) + (size_t) a.n_shared * (a.part_cells + HEAD_PAD) * sizeof(float);
        if (division.smem > info.smpbo - STATIC_SMEM) {
            break; // fewer parts need more
        }
        if (together(division.smem) >= a.n_part * division.lists) {
            return true;
        }
    }
    division.smem = sizeof(fasa_select_block);
    fasa_select_divide(a, parts);
    return !in_smem;
}

// a kernel with all that the device allows; devices whose limits were raised are known
template <typename F>
static F fasa_select_raise_limits(F kernel, std::atomic<uint32_t> & known) {
    const int device  = ggml_cuda_get_device();
    const auto & info = ggml_cuda_info().devices[device];
    if (!(known & 1u << device)) {
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, info.smpbo - STATIC_SMEM));
        known |= 1u << device;
    }
    return kernel;
}

// As ggml_cuda_kernel_launch, which knows no cooperative kernels: whether one may begin while the kernel before it ends
static bool fasa_select_begins_early(const void * kernel) {
#if defined(GGML_CUDA_USE_PDL)
    static const bool enabled = [] {
        const char * env = getenv("GGML_CUDA_PDL");
        return env == nullptr || atoi(env) != 0;
    }();
    return enabled && ggml_cuda_kernel_can_use_pdl(kernel);
#else
    GGML_UNUSED(kernel);
    return false;
#endif
}

// No clusters here: a CUDA graph that was captured with them is not safe to update in place (docs/lab/gpu.md)
template <typename F>
static void fasa_select_run(
    F kernel, const fasa_select_args & a, const fasa_select_division & division, cudaStream_t stream) {
    cudaLaunchAttribute attrs[2] = {};
    int n_attr                   = 0;
    if (a.n_part > 1) {
        attrs[n_attr].id                = cudaLaunchAttributeCooperative;
        attrs[n_attr++].val.cooperative = 1;
    }
    if (fasa_select_begins_early((const void *) kernel)) {
        attrs[n_attr].id                                           = cudaLaunchAttributeProgrammaticStreamSerialization;
        attrs[n_attr++].val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim            = dim3(a.n_part, division.lists);
    config.blockDim           = dim3(N_THREAD);
    config.dynamicSmemBytes   = division.smem;
    config.stream             = stream;
    config.attrs              = attrs;
    config.numAttrs           = n_attr;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, a));
}

template <int K_DOM, int QUADS>
static void fasa_select_launch(ggml_backend_cuda_context & ctx, fasa_select_args & a, bool keep_scores) {
    static std::atomic<uint32_t> known[2] = {};
    GGML_ASSERT(fasa_tip_smem(a.tip.n_dom, a.tip.d) <= offsetof(fasa_select_block, most));
    fasa_select_division division;
    if (!keep_scores && !a.given) {
        const auto kernel = fasa_select_raise_limits(fasa_select_kernel<K_DOM, QUADS, true>, known[0]);
        if (fasa_select_divide_together(kernel, a, division, true)) {
            fasa_select_run(kernel, a, division, ctx.stream());
            return;
        }
    }
    ggml_cuda_pool_alloc<uint32_t> key(ctx.pool(), (size_t) a.n_lists * a.tip.n_kv);
    a.key             = key.get();
    const auto kernel = fasa_select_raise_limits(fasa_select_kernel<K_DOM, QUADS, false>, known[1]);
    fasa_select_divide_together(kernel, a, division, false);
    fasa_select_run(kernel, a, division, ctx.stream());
}

template <int K_DOM>
static void fasa_select_quads(ggml_backend_cuda_context & ctx, fasa_select_args & a, bool keep_scores) {
    constexpr int TWO = K_DOM == FASA_K_DOM_F16 ? 0 : 2; // of f16 there would be too much to keep
    switch ((a.tip.n_dom / FASA_GROUP + 3) / 4) {
        case 1: fasa_select_launch<K_DOM, 1>(ctx, a, keep_scores); break;
        case 2: fasa_select_launch<K_DOM, TWO>(ctx, a, keep_scores); break;
        default: fasa_select_launch<K_DOM, 0>(ctx, a, keep_scores); break;
    }
}

static void fasa_select_together(ggml_backend_cuda_context & ctx, fasa_select_args & a, int k_dom, bool keep_scores) {
    switch (k_dom) {
        case FASA_K_DOM_F16: fasa_select_quads<FASA_K_DOM_F16>(ctx, a, keep_scores); break;
        case FASA_K_DOM_Q8: fasa_select_quads<FASA_K_DOM_Q8>(ctx, a, keep_scores); break;
        default: fasa_select_quads<FASA_K_DOM_Q4>(ctx, a, keep_scores); break;
    }
}
