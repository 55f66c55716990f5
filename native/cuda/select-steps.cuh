#pragma once

// Steps 2 and 3 of SELECT (cuda/select.cu): where a list ends, which cells it takes, and writing it.

#include "cuda/device.cuh"
#include "cuda/tip.cuh"

typedef unsigned long long fasa_u64;

static constexpr int N_WARP    = TIP_WARPS;
static constexpr int N_THREAD  = 32 * N_WARP;
static constexpr int MAX_GROUP = 128;
static constexpr int BINS = fasa_work::BINS, EDGE = fasa_work::EDGE;

// Bins of 1/128 octave, from the score up to which n cells are surely taken (scores add up to n_shared, so no more than
// n reach n_shared/n) 16 octaves down, where the list ends as a rule; what is above and below lies in the bins at
// either end. The last bin is the forced cells, the first one those without a score at all, which can be many.
static constexpr int BIN_SHIFT          = 16;
static constexpr uint32_t FASA_KEY_NONE = FASA_KEY_HIDDEN + 1; // of a score of 0

static __device__ __forceinline__ int fasa_bin(uint32_t key, int base) { // of a visible cell that is not forced
    return key == FASA_KEY_NONE ? 0 : max(1, min(BINS - 2, int(key >> BIN_SHIFT) - base));
}

static __device__ __forceinline__ uint32_t fasa_bin_first(int bin, int base) { // its lowest key
    return bin == 0     ? FASA_KEY_NONE :
        bin == 1        ? FASA_KEY_NONE + 1 :
        bin == BINS - 1 ? FASA_KEY_FORCED :
                          uint32_t(bin + base) << BIN_SHIFT;
}

static int fasa_bin_base(uint32_t n, int n_shared) {
    return int(fasa_key(float(n_shared) / std::max(1u, n) * float(1ull << FASA_SCORE_EXP)) >> BIN_SHIFT) - (BINS - 2);
}

static __device__ __forceinline__ fasa_u64 fasa_key_share(uint32_t key) { // fasa_share of the score behind a key
    return __float2ull_rz(__uint_as_float(key - 1) * 0x1p-20f);
}

struct fasa_select_args {
    fasa_tip_args tip;
    float * scores;         // the TIP node's memory [n_len, n_head, n_tps, n_stream]
    const int32_t * forced; // [n_forced, n_tps, n_stream]
    int32_t * dst;          // [n_list_len, n_list, n_tps, n_stream]
    uint32_t * key;         // [n_lists][n_kv]: keys of lists whose scores lie in global memory
    fasa_work * work;
    int n_lists, n_shared, n_forced, n_list_len, n_part,
        part_cells;  // n_lists: of all tokens; n_shared: query heads of one
    uint3 by_n_list; // fastdiv
    int bin_base;
    int per_sm; // blocks of an SM at the most; 0: as many as fit
    bool given; // the scores are in `scores` already
    uint32_t budget, floor, cap;
    uint64_t need;      // of the shares; 0: the budget decides
    uint64_t bytes_tip; // that all lists together read
};

// what a block knows about its list, in shared memory
struct alignas(16) fasa_select_block {
    fasa_u64 mass[BINS]; // with count also the working memory of TIP; behind the histogram that of the edge's cells
    uint32_t count[BINS];
    float most[MAX_GROUP], inv[MAX_GROUP];
    float piece[2 * N_WARP * TIP_HEADS];
    float factor[N_THREAD]; // [n_shared][spans of the block]: what its exponentials are multiplied by
    fasa_u64 scan_mass[N_WARP];
    uint32_t scan[N_WARP], scan_equal[N_WARP];

    uint32_t n_edge_mine; // cells of this block at the edge
    uint32_t n_visible;
    uint32_t n_before_reached, n_to_reached; // cells above the bin where the mass is reached, and with it
    uint32_t n;                              // cells to take; of the ones at the edge: `n - before`
    uint32_t before;                         // cells above the edge
    fasa_u64 held;                           // their mass
    uint32_t n_edge;                         // cells of the list at the edge
    int bin;                                 // of the edge; -1: every cell is taken
    bool by_mass;                            // the edge's cells are taken until `need` is held
    uint32_t n_floor, n_cap;
    uint32_t n_reached;
    uint32_t last_key; // of the cells at the edge, the last one taken
    int32_t last_cell;
};

// exclusive sum over the block, in thread order; total: of all threads
template <typename T>
static __device__ T fasa_block_scan(T x, T * warps, T & total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    T sum = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const T y = __shfl_up_sync(0xffffffff, sum, step);
        sum += lane >= step ? y : 0;
    }
    __syncthreads();
    if (lane == 31) {
        warps[warp] = sum;
    }
    __syncthreads();
    const T other = lane < N_WARP ? warps[lane] : 0;
    total         = fasa_warp_sum(other);
    return fasa_warp_sum(lane < warp ? other : T(0)) + sum - x;
}

// adds the block's histogram to the list's
static __device__ void fasa_select_publish(
    const fasa_select_args & a, const fasa_select_block & b, fasa_work::histogram & bins) {
#pragma unroll 1
    for (int i = threadIdx.x; i < BINS; i += N_THREAD) {
        if (b.count[i] > 0) {
            atomicAdd(&bins.count[i], b.count[i]);
        }
        if (a.need > 0 && b.mass[i] > 0) {
            atomicAdd((fasa_u64 *) &bins.mass[i], b.mass[i]);
        }
    }
}

static __device__ void fasa_select_clear(fasa_work::histogram & bins, int part, int n_part) {
#pragma unroll 1
    for (int i = part * N_THREAD + threadIdx.x; i < BINS; i += n_part * N_THREAD) {
        bins.count[i] = 0, bins.mass[i] = 0;
    }
}

// Step 2: the bin of a histogram where the list ends. first: the histogram is of all cells, and tells how many are
// visible and to be taken; else of the edge's cells, behind b.before cells that hold b.held.
static __device__ void fasa_select_edge(
    const fasa_select_args & a, fasa_select_block & b, const fasa_work::histogram & bins, bool first) {
    constexpr int MINE = BINS / N_THREAD;
    const int top      = BINS - 1 - MINE * threadIdx.x; // a thread has bins top, top - 1, ...
    const bool by_need = first ? a.need > 0 : b.by_mass;

    uint32_t count[MINE], n_mine   = 0, n_all;
    fasa_u64 mass[MINE], mass_mine = 0, mass_all = 0, held = first ? 0 : b.held;
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        count[i] = __ldcg(&bins.count[top - i]);
        n_mine += count[i];
        mass[i] = by_need ? __ldcg(&bins.mass[top - i]) : 0;
        mass_mine += mass[i];
    }
    uint32_t n_before = first ? 0 : b.before;
    n_before += fasa_block_scan(n_mine, b.scan, n_all);
    if (by_need) {
        held += fasa_block_scan(mass_mine, b.scan_mass, mass_all);
    }
    if (threadIdx.x == 0) {
        if (first) {
            const auto at_most = [&](uint32_t n) {
                return min(max(n, count[0]), n_all);
            }; // the forced ones are in the top bin
            b.n_visible = n_all;
            b.n_floor = at_most(a.floor), b.n_cap = at_most(a.cap);
            b.n       = at_most(a.budget);
            b.by_mass = false;
            b.bin     = -1;
        }
        b.n_before_reached = b.n_to_reached = UINT32_MAX;
    }
    __syncthreads();
    if (by_need) {
        fasa_u64 sum = held;
        uint32_t n   = n_before;
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            if (sum < a.need && sum + mass[i] >= a.need) {
                b.n_before_reached = n, b.n_to_reached = n + count[i];
                b.bin  = top - i;
                b.held = sum;
            }
            sum += mass[i], n += count[i];
        }
        __syncthreads();
        const bool by_mass = b.n_to_reached != UINT32_MAX && b.n_to_reached > b.n_floor && b.n_before_reached < b.n_cap;
        if (threadIdx.x == 0) {
            b.by_mass = by_mass;
            b.before  = b.n_before_reached;
            b.n_edge  = b.n_to_reached - b.n_before_reached;
            b.n       = b.n_to_reached <= b.n_floor ? b.n_floor : b.n_cap;
            if (!by_mass && first) {
                b.bin = -1;
            }
        }
        __syncthreads();
        if (by_mass) {
            return;
        }
    }
    uint32_t n = n_before;
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        if (n < b.n && n + count[i] >= b.n && b.n < b.n_visible) {
            b.bin    = top - i;
            b.before = n;
            b.n_edge = count[i];
        }
        n += count[i];
    }
    __syncthreads();
}

// Step 2a: too many cells lie at the edge, in keys [low, last]: their histogram, over the list, in bins of 2^shift
// keys. key: of `n` cells.
static __device__ __noinline__ void fasa_select_refine(const fasa_select_args & a, fasa_select_block & b,
    fasa_work::histogram & bins, const uint32_t * key, int n, uint32_t low, uint32_t last, int shift) {
#pragma unroll 1
    for (int i = threadIdx.x; i < BINS; i += N_THREAD) {
        b.count[i] = 0, b.mass[i] = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int j = threadIdx.x; j < n; j += N_THREAD) {
        if (key[j] >= low && key[j] <= last) {
            const uint32_t bin = (key[j] - low) >> shift, same = __match_any_sync(__activemask(), bin);
            if ((threadIdx.x & 31) == __ffs(same) - 1) {
                atomicAdd(&b.count[bin], __popc(same));
            }
            if (b.by_mass) {
                atomicAdd(&b.mass[bin], fasa_key_share(key[j]));
            }
        }
    }
    __syncthreads();
    fasa_select_publish(a, b, bins);
}

// a cell of the edge as a number; the larger one is taken first
static __device__ __forceinline__ fasa_u64 fasa_edge(uint32_t key, int cell) {
    return (fasa_u64) key << 32 | (0xffffffffu - (uint32_t) cell);
}

// the sum of what the parts before this one have counted
static __device__ uint32_t fasa_select_before(const uint32_t * count, int part) {
    static_assert(fasa_work::PARTS <= 64, "two of them a lane");
    const int lane = threadIdx.x % 32;
    return fasa_warp_sum(
        (lane < part ? __ldcg(&count[lane]) : 0u) + (lane + 32 < part ? __ldcg(&count[lane + 32]) : 0u));
}

// Step 2b: the cells of [first, last) that are surely taken, those with keys above `edge_last`, are counted, and those
// at the edge go to the state, in any order; where they are too many, and so equal, only their number.
static __device__ __forceinline__ void fasa_select_hand_in(fasa_select_block & b, fasa_work::list_state & state,
    int part, int first, int last, const uint32_t * key, uint32_t edge_first, uint32_t edge_last, bool equal) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t n_mine = 0, n_equal = 0;
#pragma unroll 2
    for (int j = first + threadIdx.x; j < last; j += N_THREAD) {
        const uint32_t k = key[j - first];
        if (k > edge_last) {
            n_mine++;
        } else if (k >= edge_first) {
            n_equal++;
            if (!equal) {
                state.edge[atomicAdd(&state.n_edge, 1)] = fasa_edge(k, j);
            }
        }
    }
    n_mine  = fasa_warp_sum(n_mine);
    n_equal = fasa_warp_sum(n_equal);
    if (lane == 0) {
        b.scan[warp]       = n_mine;
        b.scan_equal[warp] = n_equal;
    }
    __syncthreads();
    if (warp == 0) {
        const uint32_t n_part       = fasa_warp_sum(lane < N_WARP ? b.scan[lane] : 0u),
                       n_part_equal = fasa_warp_sum(lane < N_WARP ? b.scan_equal[lane] : 0u);
        if (lane == 0) {
            state.part[part]  = n_part;
            state.equal[part] = b.n_edge_mine = n_part_equal;
        }
    }
}

// The last cell taken, and how many are taken: at the edge in the parts before this one, and in all.
struct fasa_select_last {
    uint32_t key;
    int32_t cell;
    uint32_t before, n;
};

// Step 3a: ranks the cells of the edge by counting, PER threads a cell; this gives the last one taken (and with a
// target mass the count). x: cell threadIdx.x of the edge
static __device__ __forceinline__ fasa_select_last fasa_select_rank(
    const fasa_select_args & a, fasa_select_block & b, fasa_u64 x, int first) {
    constexpr int PER = N_THREAD >= 4 * EDGE ? 4 : N_THREAD / EDGE;
    static_assert(PER > 0 && PER * EDGE <= N_THREAD && 2 * EDGE <= BINS,
        "every cell has its threads; cells and shares lie in b.mass");
    const int lane = threadIdx.x % 32, at = threadIdx.x / PER, n_edge = b.n_edge;
    fasa_u64 *edge = b.mass, *share = b.mass + EDGE;
    if ((int) threadIdx.x < n_edge) {
        edge[threadIdx.x]  = x;
        share[threadIdx.x] = b.by_mass ? fasa_key_share(x >> 32) : 0;
    }
    if (threadIdx.x == 0) {
        b.n_edge_mine = b.n_reached = 0;
    }
    __syncthreads();
    const bool is = at < n_edge && threadIdx.x % PER == 0;
    fasa_u64 mine = 0, held = 0;
    int rank = 0;
    if (at - lane / PER < n_edge) { // some of the warp's
        mine = at < n_edge ? edge[at] : 0;
#pragma unroll 2
        for (int i = threadIdx.x % PER; i < n_edge; i += PER) {
            const bool before = edge[i] > mine;
            rank += before;
            held += b.by_mass && before ? share[i] : 0;
        }
        rank = fasa_warp_sum<PER>(rank), held = fasa_warp_sum<PER>(held);
    }
    held += b.held; // by the cells before this one, if the mass decides
    uint32_t n = b.n;
    if (b.by_mass) { // taken while the mass is not reached
        const uint32_t some = __ballot_sync(0xffffffff, is && held < a.need);
        if (some && lane == 0) {
            atomicAdd(&b.n_reached, __popc(some));
        }
        __syncthreads();
        n = min(b.n_cap, max(b.n_floor, b.before + b.n_reached));
    }
    const int n_taken = n - b.before, cell = 0xffffffffu - (uint32_t) mine;
    const uint32_t before = __ballot_sync(0xffffffff, is && rank < n_taken && cell < first);
    if (before && lane == 0) {
        atomicAdd(&b.n_edge_mine, __popc(before));
    }
    if (is && rank == n_taken - 1) {
        b.last_key = mine >> 32, b.last_cell = cell;
    }
    __syncthreads();
    return { b.last_key, b.last_cell, b.n_edge_mine, n };
}

// Step 3a where the edge's cells are all equal: the lower ones are taken. Its last cell is that of [first, last).
static __device__ __noinline__ fasa_select_last fasa_select_equal(const fasa_select_args & a, fasa_select_block & b,
    const fasa_work::list_state & state, int part, int first, int last, const uint32_t * key, uint32_t value) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, each = (last - first + N_THREAD - 1) / N_THREAD * 32;
    const int from = first + warp * each, to = min(last, from + each);
    uint32_t n = b.n;
    if (b.by_mass) {
        const fasa_u64 share = fasa_key_share(value), some = share > 0 ? (a.need - b.held + share - 1) / share : 1;
        n = (uint32_t) min((fasa_u64) b.n_cap, max((fasa_u64) b.n_floor, b.before + some));
    }
    const uint32_t taken = n - b.before, before = min(taken, fasa_select_before(state.equal, part));
    const auto equal = [&](int j) {
        return __ballot_sync(0xffffffff, j + lane < to && key[j + lane - first] == value);
    };
    uint32_t mine = 0;
#pragma unroll 1
    for (int j = from; j < to; j += 32) {
        mine += __popc(equal(j));
    }
    __syncthreads();
    if (lane == 0) {
        b.scan[warp] = mine;
    }
    if (threadIdx.x == 0) {
        b.last_cell = taken - before >= b.n_edge_mine ? INT_MAX : -1;
    }
    __syncthreads();
    uint32_t at = before + fasa_warp_sum(lane < warp ? b.scan[lane] : 0u); // equal cells before this warp's
#pragma unroll 1
    for (int j = from; j < to && at < taken; j += 32) {
        const uint32_t some = equal(j);
        if ((some >> lane & 1) && at + __popc(some & ((1u << lane) - 1)) == taken - 1 && b.last_cell != INT_MAX) {
            b.last_cell = j + lane;
        }
        at += __popc(some);
    }
    __syncthreads();
    return { value, b.last_cell, before, n };
}

// Step 3b: the cells of [first, last) up to the last one taken, ascending; a warp writes those of a range of its own
static __device__ __forceinline__ void fasa_select_write(
    fasa_select_block & b, int first, int last, const uint32_t * key, fasa_select_last taken, int32_t * out) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, each = (last - first + N_THREAD - 1) / N_THREAD * 32;
    const int from = first + warp * each, to = min(last, from + each);
    uint32_t mine = 0, n = 0; // mine: which of cells j + 32*lane + (0 to 31) are taken, as bits
#pragma unroll 1
    for (bool writes = false;; writes = true) { // counts, then writes
#pragma unroll 1
        for (int j0 = from; j0 < to; j0 += 1024) {
            if (!writes || each > 1024) {
                const int n_word = min(32, (to - j0 + 31) / 32);
                mine             = 0;
#pragma unroll 2
                for (int i = 0; i < n_word; ++i) {
                    const int j         = j0 + 32 * i + lane;
                    const uint32_t k    = j < to ? key[j - first] : 0;
                    const uint32_t some = __ballot_sync(
                        0xffffffff, k > taken.key || (k == taken.key && j <= taken.cell)); // k is 0 behind the last
                    mine = i == lane ? some : mine;
                }
            }
            const uint32_t some = __popc(mine);
            if (!writes) {
                n += fasa_warp_sum(some);
                continue;
            }
            uint32_t at = some;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const uint32_t before = __shfl_up_sync(0xffffffff, at, step);
                at += lane >= step ? before : 0;
            }
            int32_t * mine_out = out + at - some;
#pragma unroll 1
            for (uint32_t rest = mine; rest != 0; rest &= rest - 1) {
                *mine_out++ = j0 + 32 * lane + __ffs(rest) - 1;
            }
            out += __shfl_sync(0xffffffff, at, 31);
        }
        if (writes) {
            break;
        }
        __syncthreads();
        if (lane == 0) {
            b.scan[warp] = n;
        }
        __syncthreads();
        out += fasa_warp_sum(lane < warp ? b.scan[lane] : 0u);
    }
}

static fasa_select_args fasa_select_args_make(const ggml_tensor * dst, const fasa_op_params & p) {
    const ggml_tensor *tip = dst->src[0], *forced = dst->src[1], *work = fasa_op_layer(dst).work;
    fasa_select_args a = {};
    a.tip              = fasa_tip_args_make(tip);
    a.scores           = (float *) tip->data;
    a.forced           = (const int32_t *) forced->data;
    a.dst              = (int32_t *) dst->data;
    a.work             = (fasa_work *) work->data;
    a.n_lists          = ggml_nrows(dst);
    a.n_shared         = a.tip.n_head / dst->ne[1];
    a.by_n_list        = init_fastdiv_values(dst->ne[1]);
    a.n_forced         = forced->ne[0];
    a.n_list_len       = dst->ne[0];
    a.given            = p.flags & FASA_SCORES_GIVEN;
    a.budget           = p.budget;
    a.floor            = p.floor;
    a.cap              = p.cap;
    a.need             = p.mass > 0 ? std::max<uint64_t>(1, fasa_mass_need(p.mass, a.n_shared)) : 0;
    a.bin_base         = fasa_bin_base(std::max<uint32_t>(p.mass > 0 ? p.cap : p.budget, a.n_forced), a.n_shared);
    a.bytes_tip        = fasa_tip_bytes(tip);
    return a;
}
