// TIP and SELECT in one launch: the estimated logits of every cell, then the best cells of every list, ascending.
//
// A row (a list of a token) is shared by `n_part` blocks, each with a range of its cells. Rows are ordered by keys
// (fasa_key):
//
//   0. TIP (cuda/tip.cuh): exponentials of the block's cells, into shared memory where they fit; span sums to global
//   memory
//   -- barrier of the row's blocks
//   1. the group's score and key of every cell; a histogram of the keys in BINS, over the whole row
//   -- barrier
//   2. every block finds the bin where the list ends (the edge), hands in its cells of that bin, and counts those above
//   it
//   -- barrier
//   3. every block ranks the edge's cells, which gives the last cell taken, and writes its part of the list
//
// The bins are 0.5% wide, so the edge holds few cells. Where it holds more than EDGE (even attention), step 2 is done
// again on the edge alone, in ever narrower bins, until few are left or all of them are equal. Keys and shares are
// whole numbers, so nothing depends on the order of the blocks.
//
// The blocks of a row are launched together (cooperatively), and their barriers spin. Where the device can, they begin
// while the kernel before ends, and ask for the first tiles of K_dom.

#include "cuda/fasa-hooks.cuh"
#include "cuda/select-steps.cuh"
#include "cuda/tip.cuh"

static constexpr int ROW_PAD = 8; // floats between the rows of scores in shared memory: four heads are written at once
static constexpr int STATIC_SMEM = 1024; // bytes, at most, that the kernel has beside its dynamic shared memory

// All blocks of a row arrive before one leaves; what they wrote before is seen after (through L2: __ldcg).
struct fasa_row_barrier {
    fasa_work::slot & slot;
    const int n_part;
    const uint32_t mine; // the top bit of slot.arrived turns with every barrier: its blocks add 2^31 together
    uint32_t phase = 0;

    __device__ fasa_row_barrier(fasa_work::slot & slot, int part, int n_part)
        : slot(slot), n_part(n_part), mine(part == 0 ? 0x80000001u - n_part : 1) {}

    // Before the first wait, when the kernels before this one are done; again is no harm, as the top bit does not turn
    // while this block has not arrived. Only thread 0 uses it.
    __device__ void read_phase() { phase = *(volatile uint32_t *) &slot.arrived; }

    __device__ void wait() {
        if (n_part == 1) {
            __syncthreads();
            return;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            fasa_add_release(&slot.arrived, mine);
            while (((fasa_load_acquire(&slot.arrived) ^ phase) & 0x80000000u) == 0) {
            }
        }
        phase ^= 0x80000000u;
        __syncthreads();
    }
};

// what the exponentials of a span with exponent e are multiplied by
static __device__ __forceinline__ float fasa_select_factor(const fasa_select_block & b, int g, float e) {
    const float d = e - b.most[g];
    return d > -FASA_SCORE_RANGE ? __fmul_rn(b.inv[g], __int_as_float((int(d) + FASA_SCORE_EXP + 127) << 23)) : 0.0f;
}

// Step 1a: what turns a head's exponentials into its softmax: the largest exponent, and one over the sum, of every head
// of the list, and with them, where there is room, the factors of the block's spans. Returns whether there is.
// FASA_SUM_PARTS warps share a head; the order of the sum is that of fasa_select_factors (cpu/ops.cpp).
static __device__ __forceinline__ bool fasa_select_norms(
    const fasa_select_args & a, fasa_select_block & b, const fasa_tip_list & l) {
    constexpr int PARTS = FASA_SUM_PARTS, STEP = 32 * PARTS, KEPT = 5; // spans of a lane that are read at once
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_span = a.tip.n_span;
    const int first      = warp % PARTS * 32 + lane;
    const int n_mine     = (l.last - l.first + FASA_SPAN - 1) / FASA_SPAN;
    const bool room      = n_mine * a.n_shared <= N_THREAD;
    const auto exponents = [&](int g) {
        return l.tip + (int64_t) g * a.tip.n_len + a.tip.n_kv;
    }; // [n_span], and sums [n_span] behind
    const int g_mine = threadIdx.x / n_mine;
    const float e_mine =
        room && g_mine < a.n_shared ? __ldcg(&exponents(g_mine)[l.first / FASA_SPAN + threadIdx.x % n_mine]) : 0.0f;
#pragma unroll 1
    for (int g0 = 0; g0 < a.n_shared; g0 += N_WARP / PARTS) {
        const int g     = g0 + warp / PARTS;
        const bool some = g < a.n_shared;
        const float *e = exponents(some ? g : 0), *sum = e + n_span;
        float e_kept[KEPT], sum_kept[KEPT];
#pragma unroll
        for (int r = 0; r < KEPT; ++r) {
            const bool is = some && first + r * STEP < n_span;
            e_kept[r]     = is ? __ldcg(&e[first + r * STEP]) : -INFINITY;
            sum_kept[r]   = is ? __ldcg(&sum[first + r * STEP]) : 0.0f;
        }
        float most = -INFINITY, total = 0.0f;
#pragma unroll
        for (int r = 0; r < KEPT; ++r) {
            most = fmaxf(most, e_kept[r]);
        }
#pragma unroll 1
        for (int i = first + KEPT * STEP; some && i < n_span; i += STEP) {
            most = fmaxf(most, __ldcg(&e[i]));
        }
        most = fasa_warp_max(most);
        if (lane == 0) {
            b.piece[warp] = most;
        }
        __syncthreads();
#pragma unroll
        for (int w = 0; w < PARTS; ++w) {
            most = fmaxf(most, b.piece[warp / PARTS * PARTS + w]);
        }
        const auto add = [&](float e, float sum) {
            const float d = e - most;
            total += d > -FASA_SPAN_RANGE ? __fmul_rn(sum, __int_as_float((int(d) + 127) << 23)) : 0.0f;
        };
#pragma unroll
        for (int r = 0; r < KEPT; ++r) {
            add(e_kept[r], sum_kept[r]);
        }
#pragma unroll 1
        for (int i = first + KEPT * STEP; some && i < n_span; i += STEP) {
            add(__ldcg(&e[i]), __ldcg(&sum[i]));
        }
        total = fasa_warp_sum(total);
        if (lane == 0) {
            b.piece[N_WARP + warp] = total;
        }
        __syncthreads();
        if (some && warp % PARTS == 0 && lane == 0) {
            total = 0.0f;
            for (int w = 0; w < PARTS; ++w) {
                total += b.piece[N_WARP + warp + w];
            }
            b.most[g] = most;
            b.inv[g]  = total > 0.0f ? __fdiv_rn(1.0f, total) : 0.0f;
        }
    }
    __syncthreads();
    if (room && g_mine < a.n_shared) {
        b.factor[threadIdx.x] = fasa_select_factor(b, g_mine, e_mine);
    }
    __syncthreads();
    return room;
}

// x [4]; whole: four may be read at once, else n of them at the most, and the others are hidden
static __device__ __forceinline__ float4 fasa_fours(const float * x, bool whole, int n) {
    constexpr float none = -1.0f;
    if (whole) {
        return *(const float4 *) x;
    }
    return make_float4(n > 0 ? x[0] : none, n > 1 ? x[1] : none, n > 2 ? x[2] : none, n > 3 ? x[3] : none);
}

// Step 1, the cells of l: keys, and their histogram in b. key: of the cells from l.first on; may be l.x.
template <bool FOURS>
static __device__ __forceinline__ void fasa_select_keys(
    const fasa_select_args & a, fasa_select_block & b, const fasa_tip_list & l, uint32_t * key) {
    const int lane = threadIdx.x % 32, first = l.first, last = l.last;
    const bool mass        = a.need > 0;
    const int32_t * forced = a.forced + l.token * a.n_forced;
    const int forced_mine  = (int) threadIdx.x < a.n_forced ? forced[threadIdx.x] : -1; // asked for early
#pragma unroll 1
    for (int i = threadIdx.x; i < BINS; i += N_THREAD) {
        b.count[i] = 0;
        if (mass) {
            b.mass[i] = 0;
        }
    }
    const bool staged = fasa_select_norms(a, b, l);
    const int n_span  = (last - first + FASA_SPAN - 1) / FASA_SPAN;
    uint32_t n_none   = 0; // cells without a score at all: counted apart, as they can be many

#pragma unroll 1
    for (int j0 = first + threadIdx.x / 32 * 128; j0 < last;
        j0 += 4 * N_THREAD) { // four cells a thread; a warp's lie in one span
        const int j     = j0 + 4 * lane;
        const float * x = l.x + j - first;
        float score[4]  = {};
        float4 v;
#pragma unroll 2
        for (int g = 0; g < a.n_shared; ++g, x += l.x_stride) {
            const float f = staged ?
                b.factor[g * n_span + (j0 - first) / FASA_SPAN] :
                fasa_select_factor(b, g, __ldcg(&l.tip[(int64_t) g * a.tip.n_len + a.tip.n_kv + j0 / FASA_SPAN]));
            v             = fasa_fours(x, FOURS && j < last, FOURS ? 0 : last - j);
            score[0] = __fmaf_rn(v.x, f, score[0]), score[1] = __fmaf_rn(v.y, f, score[1]);
            score[2] = __fmaf_rn(v.z, f, score[2]), score[3] = __fmaf_rn(v.w, f, score[3]);
        }
        const bool hidden[4] = { v.x < 0.0f, v.y < 0.0f, v.z < 0.0f, v.w < 0.0f }; // in all rows or in none
        uint32_t k[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            k[u] = hidden[u] ? FASA_KEY_HIDDEN : __float_as_uint(score[u]) + 1;
            n_none += k[u] == FASA_KEY_NONE;
            if (k[u] > FASA_KEY_NONE) {
                atomicAdd(&b.count[fasa_bin(k[u], a.bin_base)], 1);
            }
        }
        if (mass) {
#pragma unroll
            for (int u = 0; u < 4; ++u) {
                const fasa_u64 share = hidden[u] ? 0 : fasa_key_share(k[u]);
                if (share > 0) {
                    atomicAdd(&b.mass[fasa_bin(k[u], a.bin_base)], share);
                }
            }
        }
        if (FOURS) {
            if (j < last) {
                *(uint4 *) &key[j - first] = make_uint4(k[0], k[1], k[2], k[3]);
            }
        } else {
#pragma unroll
            for (int u = 0; u < 4; ++u) {
                if (j + u < last) {
                    key[j - first + u] = k[u];
                }
            }
        }
    }
    n_none = fasa_warp_sum(n_none);
    if (n_none > 0 && lane == 0) {
        atomicAdd(&b.count[0], n_none);
    }
    __syncthreads();

#pragma unroll 1
    for (int i = threadIdx.x; i < a.n_forced; i += N_THREAD) {
        const int cell = i < N_THREAD ? forced_mine : forced[i];
        if (cell >= first && cell < last && key[cell - first] != FASA_KEY_HIDDEN) {
            const uint32_t k = atomicExch(&key[cell - first], FASA_KEY_FORCED);
            if (k != FASA_KEY_FORCED) { // a cell may be named twice
                atomicSub(&b.count[fasa_bin(k, a.bin_base)], 1);
                atomicAdd(&b.count[BINS - 1], 1);
                if (mass) {
                    atomicAdd(&b.mass[fasa_bin(k, a.bin_base)], 0 - fasa_key_share(k));
                    atomicAdd(&b.mass[BINS - 1], fasa_key_share(k));
                }
            }
        }
    }
    __syncthreads();
}

// Steps 1 to 3 of one row
template <bool FOURS>
static __device__ __forceinline__ void fasa_select_row(const fasa_select_args & a, fasa_select_block & b,
    const fasa_tip_list & l, fasa_work::slot & slot, fasa_row_barrier & row_barrier, int row, int part,
    uint32_t * key) {
    fasa_select_keys<FOURS>(a, b, l, key);
    fasa_select_publish(a, b, slot.bins[0]);
    // the keys of the edge; where they are too many, ever narrower bins, until they are few or equal
    uint32_t edge_first = FASA_KEY_HIDDEN + 1, edge_last = FASA_KEY_HIDDEN; // none: every cell is taken
    int level = 0;
    for (int shift = 0;; ++level) {
        row_barrier.wait();
        if (level > 0) {
            fasa_select_clear(slot.bins[(level - 1) % 3], part, a.n_part); // read by all; used again two levels on
        }
        fasa_select_edge(a, b, slot.bins[level % 3], level == 0);
        if (b.bin < 0) {
            break;
        }
        if (level == 0) {
            edge_first = fasa_bin_first(b.bin, a.bin_base);
            edge_last  = b.bin == BINS - 1 ? UINT32_MAX : fasa_bin_first(b.bin + 1, a.bin_base) - 1;
        } else {
            edge_first += (uint32_t) b.bin << shift;
            edge_last = min(edge_last, edge_first + (1u << shift) - 1);
        }
        if (b.n_edge <= EDGE || edge_first == edge_last) {
            break;
        }
        shift = max(0, 32 - __clz(edge_last - edge_first) - 11);
        __syncthreads();
        fasa_select_refine(a, b, slot.bins[(level + 1) % 3], key, l.last - l.first, edge_first, edge_last, shift);
    }
    const bool equal = b.bin >= 0 && b.n_edge > EDGE;
    __syncthreads();
    fasa_select_hand_in(b, slot, part, l.first, l.last, key, edge_first, edge_last, equal);
    row_barrier.wait();

    const fasa_u64 edge =
        !equal && b.bin >= 0 && threadIdx.x < b.n_edge ? __ldcg(&slot.edge[threadIdx.x]) : 0; // asked for early
    const uint32_t above = fasa_select_before(slot.part, part);
    fasa_select_clear(slot.bins[level % 3], part, a.n_part);
    fasa_select_last taken = { edge_first, INT_MAX, 0, b.n }; // every cell
    if (equal) {
        taken = fasa_select_equal(a, b, slot, part, l.first, l.last, key, edge_first);
    } else if (b.bin >= 0) {
        taken = fasa_select_rank(a, b, edge, l.first);
    }
    int32_t * list = a.dst + (int64_t) row * a.n_list_len;
    fasa_select_write(b, l.first, l.last, key, taken, list + 1 + above + taken.before);
    if (part == 0 && threadIdx.x == 0) {
        list[0]     = taken.n;
        slot.n_edge = 0;
        auto * c    = (fasa_u64 *) a.work->counter;
        atomicAdd(&c[fasa_work::TOKENS_ATTENDED], (fasa_u64) taken.n);
        atomicAdd(&c[fasa_work::TOKENS_VISIBLE], (fasa_u64) b.n_visible);
        atomicAdd(&c[fasa_work::LISTS], 1ull);
        if (row == 0) {
            atomicAdd(&c[fasa_work::BYTES_TIP], a.bytes_tip);
        }
    }
}

// IN_SMEM: scores and keys of a block's cells lie in its shared memory
template <int K_DOM, int QUADS, bool IN_SMEM>
static __global__ void __launch_bounds__(N_THREAD, 1) fasa_select_kernel(const __grid_constant__ fasa_select_args a) {
    extern __shared__ __align__(16) char smem[];
    fasa_select_block & b = *(fasa_select_block *) smem;
    float * in_smem =
        (float *) (smem + sizeof(fasa_select_block)); // [n_shared][part_cells + ROW_PAD]; the first of them become keys

    const int part  = blockIdx.x;
    auto & slot     = a.work->slots[blockIdx.y];
    const auto list = [&](int row) {
        fasa_tip_list l;
        const uint2 at = fast_div_modulo(row, a.by_n_list);
        l.token        = at.x;
        l.head0        = at.y * a.n_shared;
        l.n_shared     = a.n_shared;
        l.first        = part * a.part_cells;
        l.last         = min(a.tip.n_kv, l.first + a.part_cells);
        l.tip          = a.scores + ((int64_t) l.token * a.tip.n_head + l.head0) * a.tip.n_len;
        l.x            = IN_SMEM ? in_smem : l.tip + l.first;
        l.x_stride     = IN_SMEM ? a.part_cells + ROW_PAD : a.tip.n_len;
        return l;
    };
    fasa_row_barrier row_barrier(slot, part, a.n_part);
    const auto wait_for_before = [&]() {
        ggml_cuda_pdl_sync();
        ggml_cuda_pdl_lc(); // FAC may take the place of blocks that are done
        row_barrier.read_phase();
    };
    if (!IN_SMEM && a.given) {
        wait_for_before();
    }
#pragma unroll 1
    for (int row = blockIdx.y; row < a.n_row; row += gridDim.y) {
        const fasa_tip_list l = list(row);
        if (IN_SMEM || !a.given) {
            fasa_tip_block<K_DOM, QUADS, IN_SMEM> tip(a.tip, l, smem);
#pragma unroll 1
            for (; tip.g0 < a.n_shared; tip.g0 += TIP_HEADS) {
                tip.ask_first();
                wait_for_before();
                tip.heads(b.piece);
            }
            row_barrier.wait();
        }
        fasa_select_row<IN_SMEM>(a, b, l, slot, row_barrier, row, part,
            IN_SMEM ? (uint32_t *) in_smem : a.key + (int64_t) row * a.tip.n_kv + l.first);
        if (row + (int) gridDim.y < a.n_row) {
            row_barrier.wait(); // the slot is used again
        }
    }
}

// ---- how a row is divided ----

struct fasa_select_plan {
    int slots;   // rows at a time
    size_t smem; // bytes
};

static void fasa_select_divide(fasa_select_args & a, int parts) {
    const int spans = std::max(1, a.tip.n_span);
    a.part_cells    = (spans + parts - 1) / parts * FASA_SPAN;
    a.n_part        = (spans * FASA_SPAN + a.part_cells - 1) / a.part_cells;
}

// A row is shared by blocks that all run together. False: their cells do not fit in shared memory, where they are
// wanted.
template <typename F>
static bool fasa_select_plan_together(F kernel, fasa_select_args & a, fasa_select_plan & plan, bool in_smem) {
    const auto & info   = ggml_cuda_info().devices[ggml_cuda_get_device()];
    const auto together = [&](size_t smem) {
        int per_sm = 0;
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, N_THREAD, smem));
        return per_sm * info.nsm;
    };
    const int most = together(sizeof(fasa_select_block)), useful = std::max(1, a.tip.n_span / 2);
    plan.slots      = std::min({ a.n_row, most, (int) fasa_work::SLOTS });
    const int parts = info.supports_cooperative_launch ?
        std::max(1, std::min({ most / plan.slots, (int) fasa_work::PARTS, useful })) :
        1;
    for (int p = parts; p > 0 && in_smem; --p) {
        fasa_select_divide(a, p);
        plan.smem = sizeof(fasa_select_block) + (size_t) a.n_shared * (a.part_cells + ROW_PAD) * sizeof(float);
        if (plan.smem > info.smpbo - STATIC_SMEM) {
            break; // fewer parts need more
        }
        if (together(plan.smem) >= a.n_part * plan.slots) {
            return true;
        }
    }
    plan.smem = sizeof(fasa_select_block);
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
static void fasa_select_run(F kernel, const fasa_select_args & a, const fasa_select_plan & plan, cudaStream_t stream) {
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
    config.gridDim            = dim3(a.n_part, plan.slots);
    config.blockDim           = dim3(N_THREAD);
    config.dynamicSmemBytes   = plan.smem;
    config.stream             = stream;
    config.attrs              = attrs;
    config.numAttrs           = n_attr;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, a));
}

template <int K_DOM, int QUADS>
static void fasa_select_launch(ggml_backend_cuda_context & ctx, fasa_select_args & a, bool keep_scores) {
    static std::atomic<uint32_t> known[2] = {};
    GGML_ASSERT(fasa_tip_smem(a.tip.n_dom, a.tip.d) <= offsetof(fasa_select_block, most));
    fasa_select_plan plan;
    if (!keep_scores && !a.given) {
        const auto kernel = fasa_select_raise_limits(fasa_select_kernel<K_DOM, QUADS, true>, known[0]);
        if (fasa_select_plan_together(kernel, a, plan, true)) {
            fasa_select_run(kernel, a, plan, ctx.stream());
            return;
        }
    }
    ggml_cuda_pool_alloc<uint32_t> key(ctx.pool(), (size_t) a.n_row * a.tip.n_kv);
    a.key             = key.get();
    const auto kernel = fasa_select_raise_limits(fasa_select_kernel<K_DOM, QUADS, false>, known[1]);
    fasa_select_plan_together(kernel, a, plan, false);
    fasa_select_run(kernel, a, plan, ctx.stream());
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

void fasa_cuda_select(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p) {
    const ggml_tensor *tip = dst->src[0], *forced = dst->src[1], *work = fasa_op_layer(dst).work;
    fasa_select_args a     = {};
    a.tip                  = fasa_tip_args_make(tip);
    a.scores               = (float *) tip->data;
    a.forced               = (const int32_t *) forced->data;
    a.dst                  = (int32_t *) dst->data;
    a.work                 = (fasa_work *) work->data;
    a.n_row                = ggml_nrows(dst);
    a.n_shared             = a.tip.n_head / dst->ne[1];
    a.by_n_list            = init_fastdiv_values(dst->ne[1]);
    a.n_forced             = forced->ne[0];
    a.n_list_len           = dst->ne[0];
    a.given                = p.device & FASA_SCORES_GIVEN;
    a.budget               = p.budget;
    a.floor                = p.floor;
    a.cap                  = p.cap;
    a.need                 = p.mass > 0 ? std::max<uint64_t>(1, fasa_mass_need(p.mass, a.n_shared)) : 0;
    a.bin_base             = fasa_bin_base(std::max<uint32_t>(p.mass > 0 ? p.cap : p.budget, a.n_forced), a.n_shared);
    a.bytes_tip            = fasa_tip_bytes(tip);
    const bool keep_scores = p.device & FASA_SCORES_KEPT;
    switch (fasa_op_get(tip)->k_dom) {
        case FASA_K_DOM_F16: fasa_select_quads<FASA_K_DOM_F16>(ctx, a, keep_scores); break;
        case FASA_K_DOM_Q8: fasa_select_quads<FASA_K_DOM_Q8>(ctx, a, keep_scores); break;
        default: fasa_select_quads<FASA_K_DOM_Q4>(ctx, a, keep_scores); break;
    }
}
