// TIP and SELECT in one launch: the estimated logits of every cell, then the best cells of every list, ascending.
//
// A row (a list of a token) is shared by `n_part` blocks, each with a range of its cells. Rows are ordered by keys (fasa_key):
//
//   0. TIP (fasa-cuda-tip.cuh): exponentials of the block's cells, into shared memory where they fit; span sums to global memory
//   -- barrier of the row's blocks
//   1. the group's score and key of every cell; a histogram of the keys in BINS, over the whole row
//   -- barrier
//   2. every block finds the bin where the list ends (the edge), hands in its cells of that bin, and counts those above it
//   -- barrier
//   3. every block ranks the edge's cells, which gives the last cell taken, and writes its part of the list
//
// The bins are 0.5% wide, so the edge holds few cells. Where it holds more than EDGE (even attention), step 2 is done again on the
// edge alone, in ever narrower bins, until few are left or all of them are equal. Keys and shares are whole numbers, so nothing
// depends on the order of the blocks.
//
// The blocks of a row are launched together (cooperatively), and their barriers spin.

#include "fasa-cuda.cuh"
#include "fasa-cuda-tip.cuh"

typedef unsigned long long fasa_u64;

static constexpr int N_WARP    = TIP_WARPS;
static constexpr int N_THREAD  = 32*N_WARP;
static constexpr int MAX_GROUP = 128;
static constexpr int ROW_PAD = 8; // floats between the rows of scores in shared memory: four heads are written at once
static constexpr int STATIC_SMEM = 1024; // bytes, at most, that the kernel has beside its dynamic shared memory
static constexpr int BINS = fasa_work::BINS, EDGE = fasa_work::EDGE;

// Bins of 1/128 octave, from the score up to which n cells are surely taken (scores add up to n_shared, so no more than n reach
// n_shared/n) 16 octaves down, where the list ends as a rule; what is above and below lies in the bins at either end. The last bin is
// the forced cells, the first one those without a score at all, which can be many.
static constexpr int BIN_SHIFT = 16;
static constexpr uint32_t FASA_KEY_NONE = FASA_KEY_HIDDEN + 1; // of a score of 0

static __device__ __forceinline__ int fasa_bin(uint32_t key, int base) { // of a visible cell
    return key == FASA_KEY_FORCED ? BINS - 1 : key == FASA_KEY_NONE ? 0 : max(1, min(BINS - 2, int(key >> BIN_SHIFT) - base));
}

static __device__ __forceinline__ uint32_t fasa_bin_first(int bin, int base) { // its lowest key
    return bin == 0 ? FASA_KEY_NONE : bin == 1 ? FASA_KEY_NONE + 1 : bin == BINS - 1 ? FASA_KEY_FORCED : uint32_t(bin + base) << BIN_SHIFT;
}

static int fasa_bin_base(uint32_t n, int n_shared) {
    return int(fasa_key(float(n_shared)/std::max(1u, n)*float(1ull << FASA_SCORE_EXP)) >> BIN_SHIFT) - (BINS - 2);
}

static __device__ __forceinline__ fasa_u64 fasa_key_share(uint32_t key) { // fasa_share of the score behind a key
    return __float2ull_rz(__uint_as_float(key - 1)*0x1p-20f);
}

struct fasa_select_args {
    fasa_tip_args   tip;
    float         * scores; // the TIP node's memory [n_len, n_head, n_tps, n_stream]
    const int32_t * forced; // [n_forced, n_tps, n_stream]
    int32_t       * dst;    // [n_list_len, n_list, n_tps, n_stream]
    uint32_t      * key;    // [row][n_kv]: keys of rows whose scores lie in global memory
    fasa_work     * work;
    int n_row, n_list, n_shared, n_forced, n_list_len, n_part, part_cells; // n_shared: query heads of a list
    int  bin_base;
    bool given;             // the scores are in `scores` already
    uint32_t budget, floor, cap;
    uint64_t need;          // of the shares; 0: the budget decides
};

// what a block knows about its row, in shared memory
struct alignas(16) fasa_select_block {
    fasa_u64 mass [BINS]; // mass and count: also the working memory of TIP, of span sums and of the edge's cells
    uint32_t count[BINS];
    float    most[MAX_GROUP], inv[MAX_GROUP];
    float    piece[2*N_WARP*TIP_HEADS];
    float    factor[N_THREAD]; // [n_shared][spans of the block]: what its exponentials are multiplied by
    fasa_u64 scan_mass[N_WARP];
    uint32_t scan[N_WARP], scan_equal[N_WARP];

    uint32_t n_edge_mine; // cells of this block at the edge
    uint32_t n_visible;
    uint32_t n_before_reached, n_to_reached; // cells above the bin where the mass is reached, and with it
    uint32_t n;        // cells to take; of the ones at the edge: `n - before`
    uint32_t before;   // cells above the edge
    uint32_t n_edge;   // cells of the row at the edge
    fasa_u64 held;     // their mass
    int      bin;      // of the edge; -1: every cell is taken
    bool     by_mass;  // the edge's cells are taken until `need` is held
    uint32_t n_floor, n_cap;
    uint32_t n_reached;
    uint32_t last_key;   // of the cells at the edge, the last one taken
    int32_t  last_cell;
};

// exclusive sum over the block, in thread order; total: of all threads
template <typename T> static __device__ T fasa_block_scan(T x, T * warps, T & total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x/32;
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
    T before = 0;
    total = 0;
#pragma unroll
    for (int w = 0; w < N_WARP; ++w) {
        before += w < warp ? warps[w] : 0;
        total  += warps[w];
    }
    return before + sum - x;
}

// All blocks of a row arrive before one leaves; what they wrote before is seen after (through L2: __ldcg).
struct fasa_row_barrier {
    fasa_work::slot & slot;
    const int n_part;
    uint32_t  phase = 0, mine = 1; // the top bit of slot.arrived turns with every barrier: its blocks add 2^31 together

    __device__ fasa_row_barrier(fasa_work::slot & slot, int part, int n_part) : slot(slot), n_part(n_part) {
        if (n_part > 1) {
            phase = *(volatile uint32_t *) &slot.arrived;
            mine  = part == 0 ? 0x80000001u - n_part : 1;
        }
    }

    __device__ void wait() {
        if (n_part == 1) {
            __syncthreads();
            return;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(&slot.arrived, mine);
            while (((*(volatile uint32_t *) &slot.arrived ^ phase) & 0x80000000u) == 0) {}
            __threadfence();
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

// Step 1a: what turns a head's exponentials into its softmax: the largest exponent, and one over the sum, of every head of the list,
// and with them, where there is room, the factors of the block's spans. Returns whether there is.
// FASA_SUM_PARTS warps share a head; the order of the sum is that of fasa_select_factors (fasa-ops-cpu.cpp).
static __device__ __forceinline__ bool fasa_select_norms(const fasa_select_args & a, fasa_select_block & b, const fasa_tip_list & l) {
    constexpr int PARTS = FASA_SUM_PARTS, STEP = 32*PARTS, KEPT = 6; // spans of a lane that are read at once
    const int lane = threadIdx.x % 32, warp = threadIdx.x/32, n_span = a.tip.n_span;
    const int first = warp%PARTS*32 + lane;
    const int  n_mine = (l.last - l.first + FASA_SPAN - 1)/FASA_SPAN;
    const bool room   = n_mine*a.n_shared <= N_THREAD;
    const auto exponents = [&](int g) { return l.tip + (int64_t) g*a.tip.n_len + a.tip.n_kv; }; // [n_span], and sums [n_span] behind
    const int   g_mine = threadIdx.x/n_mine;
    const float e_mine = room && g_mine < a.n_shared ? __ldcg(&exponents(g_mine)[l.first/FASA_SPAN + threadIdx.x%n_mine]) : 0.0f;
#pragma unroll 1
    for (int g0 = 0; g0 < a.n_shared; g0 += N_WARP/PARTS) {
        const int  g = g0 + warp/PARTS;
        const bool some = g < a.n_shared;
        const float * e = exponents(some ? g : 0), * sum = e + n_span;
        float e_kept[KEPT], sum_kept[KEPT];
#pragma unroll
        for (int r = 0; r < KEPT; ++r) {
            const bool is = some && first + r*STEP < n_span;
            e_kept  [r] = is ? __ldcg(&e  [first + r*STEP]) : -INFINITY;
            sum_kept[r] = is ? __ldcg(&sum[first + r*STEP]) : 0.0f;
        }
        float most = -INFINITY, total = 0.0f;
#pragma unroll
        for (int r = 0; r < KEPT; ++r) {
            most = fmaxf(most, e_kept[r]);
        }
#pragma unroll 1
        for (int i = first + KEPT*STEP; some && i < n_span; i += STEP) {
            most = fmaxf(most, __ldcg(&e[i]));
        }
        most = fasa_warp_max(most);
        if (lane == 0) {
            b.piece[warp] = most;
        }
        __syncthreads();
#pragma unroll
        for (int w = 0; w < PARTS; ++w) {
            most = fmaxf(most, b.piece[warp/PARTS*PARTS + w]);
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
        for (int i = first + KEPT*STEP; some && i < n_span; i += STEP) {
            add(__ldcg(&e[i]), __ldcg(&sum[i]));
        }
        total = fasa_warp_sum(total);
        if (lane == 0) {
            b.piece[N_WARP + warp] = total;
        }
        __syncthreads();
        if (some && warp%PARTS == 0 && lane == 0) {
            total = 0.0f;
            for (int w = 0; w < PARTS; ++w) {
                total += b.piece[N_WARP + warp + w];
            }
            b.most[g] = most;
            b.inv [g] = total > 0.0f ? __fdiv_rn(1.0f, total) : 0.0f;
        }
    }
    __syncthreads();
    if (room && g_mine < a.n_shared) {
        b.factor[threadIdx.x] = fasa_select_factor(b, g_mine, e_mine);
    }
    __syncthreads();
    return room;
}

// x [4]; whole: four may be read at once, else n of them at the most, and `none` for the others
static __device__ __forceinline__ float4 fasa_fours(const float * x, bool whole, int n, float none) {
    if (whole) {
        return *(const float4 *) x;
    }
    return make_float4(n > 0 ? x[0] : none, n > 1 ? x[1] : none, n > 2 ? x[2] : none, n > 3 ? x[3] : none);
}

// Step 1, the cells of l: keys, and their histogram in b. key: of the cells from l.first on; may be l.x.
template <bool FOURS>
static __device__ __forceinline__ void fasa_select_keys(const fasa_select_args & a, fasa_select_block & b, const fasa_tip_list & l, uint32_t * key) {
    const int  lane = threadIdx.x % 32, first = l.first, last = l.last;
    const bool mass = a.need > 0;
    const int32_t * forced = a.forced + l.token*a.n_forced;
    const int forced_mine = (int) threadIdx.x < a.n_forced ? forced[threadIdx.x] : -1; // asked for early
#pragma unroll 1
    for (int i = threadIdx.x; i < BINS; i += N_THREAD) {
        b.count[i] = 0;
        if (mass) {
            b.mass[i] = 0;
        }
    }
    const bool staged = fasa_select_norms(a, b, l);
    const int  n_span = (last - first + FASA_SPAN - 1)/FASA_SPAN;

#pragma unroll 1
    for (int j0 = first + threadIdx.x/32*128; j0 < last; j0 += 4*N_THREAD) { // four cells a thread; a warp's lie in one span
        const int   j = j0 + 4*lane;
        const float * x = l.x + j - first;
        float score[4] = {};
        bool  hidden[4];
#pragma unroll 4
        for (int g = 0; g < a.n_shared; ++g, x += (int) l.x_stride) {
            const float f = staged ? b.factor[g*n_span + (j0 - first)/FASA_SPAN] :
                fasa_select_factor(b, g, __ldcg(&l.tip[(int64_t) g*a.tip.n_len + a.tip.n_kv + j0/FASA_SPAN]));
            const float4 v = fasa_fours(x, FOURS && j < last, FOURS ? 0 : last - j, -1.0f);
            const float at[4] = { v.x, v.y, v.z, v.w };
#pragma unroll
            for (int u = 0; u < 4; ++u) {
                score[u]  = __fmaf_rn(at[u], f, score[u]);
                hidden[u] = g == 0 ? at[u] < 0.0f : hidden[u]; // in all rows or in none
            }
        }
        uint32_t k[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            k[u] = hidden[u] ? FASA_KEY_HIDDEN : __float_as_uint(score[u]) + 1;
            const int bin = hidden[u] ? -1 : fasa_bin(k[u], a.bin_base);
            if (mass && bin >= 0) {
                const fasa_u64 share = fasa_key_share(k[u]);
                if (share > 0) {
                    atomicAdd(&b.mass[bin], share);
                }
            }
            const uint32_t lowest = __ballot_sync(0xffffffff, bin == 0); // many cells can have no score at all
            if (bin > 0) {
                atomicAdd(&b.count[bin], 1);
            } else if (lowest && lane == __ffs(lowest) - 1) {
                atomicAdd(&b.count[0], __popc(lowest));
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

// adds the block's histogram to the row's
static __device__ void fasa_select_publish(const fasa_select_args & a, const fasa_select_block & b, fasa_work::histogram & bins) {
#pragma unroll
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
    for (int i = part*N_THREAD + threadIdx.x; i < BINS; i += n_part*N_THREAD) {
        bins.count[i] = 0, bins.mass[i] = 0;
    }
}

// Step 2: the bin of a histogram where the list ends. first: the histogram is of all cells, and tells how many are visible and to be
// taken; else of the edge's cells, behind b.before cells that hold b.held.
static __device__ void fasa_select_edge(const fasa_select_args & a, fasa_select_block & b, const fasa_work::histogram & bins, bool first) {
    constexpr int MINE = BINS/N_THREAD;
    const int  top     = BINS - 1 - MINE*threadIdx.x; // a thread has bins top, top - 1, ...
    const bool by_need = first ? a.need > 0 : b.by_mass;

    uint32_t count[MINE], n_mine = 0, n_all;
    fasa_u64 mass[MINE], mass_mine = 0, mass_all = 0, held = first ? 0 : b.held;
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        count[i] = __ldcg(&bins.count[top - i]);
        n_mine  += count[i];
        mass[i]  = by_need ? __ldcg(&bins.mass[top - i]) : 0;
        mass_mine += mass[i];
    }
    uint32_t n_before = first ? 0 : b.before;
    n_before += fasa_block_scan(n_mine, b.scan, n_all);
    if (by_need) {
        held += fasa_block_scan(mass_mine, b.scan_mass, mass_all);
    }
    if (threadIdx.x == 0) {
        if (first) {
            const auto at_most = [&](uint32_t n) { return min(max(n, count[0]), n_all); }; // the forced ones are in the top bin
            b.n_visible = n_all;
            b.n_floor   = at_most(a.floor), b.n_cap = at_most(a.cap);
            b.n         = at_most(a.budget);
            b.by_mass   = false;
            b.bin       = -1;
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

// Step 2a: too many cells lie at the edge, in keys [low, low + (BINS << shift)): their histogram, over the row. key: of `n` cells.
static __device__ __noinline__ void fasa_select_refine(const fasa_select_args & a, fasa_select_block & b, fasa_work::histogram & bins, const uint32_t * key, int n,
        uint32_t low, uint32_t last, int shift) {
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

// a cell of the edge as a number: larger is taken earlier
static __device__ __forceinline__ fasa_u64 fasa_edge(uint32_t key, int cell) {
    return (fasa_u64) key << 32 | (0xffffffffu - (uint32_t) cell);
}

// the sum of what the parts before this one have counted
static __device__ uint32_t fasa_select_before(const uint32_t * count, int part) {
    static_assert(fasa_work::PARTS <= 64, "two of them a lane");
    const int lane = threadIdx.x % 32;
    return fasa_warp_sum((lane < part ? __ldcg(&count[lane]) : 0u) + (lane + 32 < part ? __ldcg(&count[lane + 32]) : 0u));
}

// Step 2b: the cells of [first, last) that are surely taken, those with keys above `edge_last`, are counted, and those at the edge go
// to the slot, in any order; where they are too many, and so equal, only their number.
static __device__ __forceinline__ void fasa_select_hand_in(fasa_select_block & b, fasa_work::slot & slot, int part, int first, int last, const uint32_t * key,
        uint32_t edge_first, uint32_t edge_last, bool equal) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x/32;
    uint32_t n_mine = 0, n_equal = 0;
#pragma unroll 4
    for (int j = first + threadIdx.x; j < last; j += N_THREAD) {
        const uint32_t k = key[j - first];
        if (k > edge_last) {
            n_mine++;
        } else if (k >= edge_first) {
            n_equal++;
            if (!equal) {
                slot.edge[atomicAdd(&slot.n_edge, 1)] = fasa_edge(k, j);
            }
        }
    }
    n_mine  = fasa_warp_sum(n_mine);
    n_equal = fasa_warp_sum(n_equal);
    if (lane == 0) {
        b.scan[warp] = n_mine;
        b.scan_equal[warp] = n_equal;
    }
    __syncthreads();
    if (warp == 0) {
        const uint32_t n_part = fasa_warp_sum(lane < N_WARP ? b.scan[lane] : 0u), n_part_equal = fasa_warp_sum(lane < N_WARP ? b.scan_equal[lane] : 0u);
        if (lane == 0) {
            slot.part [part] = n_part;
            slot.equal[part] = b.n_edge_mine = n_part_equal;
        }
    }
}

// The last cell taken, and how many are taken: at the edge in the parts before this one, and in all.
struct fasa_select_last {
    uint32_t key;
    int32_t  cell;
    uint32_t before, n;
};

// Step 3a: ranks the n_edge cells of the edge by counting, a thread one of them; this gives the last one taken (and with a target mass the count)
static __device__ __noinline__ fasa_select_last fasa_select_rank(const fasa_select_args & a, fasa_select_block & b, const fasa_work::slot & slot, int n_edge, int first) {
    static_assert(EDGE <= N_THREAD && 2*EDGE <= BINS, "one of them a thread; cells and shares lie in b.mass");
    const int lane = threadIdx.x % 32;
    fasa_u64 * edge = b.mass, * share = b.mass + EDGE;
    const bool is = (int) threadIdx.x < n_edge;
    const fasa_u64 mine = is ? __ldcg(&slot.edge[threadIdx.x]) : 0;
    if (is) {
        edge [threadIdx.x] = mine;
        share[threadIdx.x] = b.by_mass ? fasa_key_share(mine >> 32) : 0;
    }
    if (threadIdx.x == 0) {
        b.n_edge_mine = b.n_reached = 0;
    }
    __syncthreads();
    fasa_u64 held = b.held; // by the cells before this one, if the mass decides
    int rank = 0;
    if ((int) threadIdx.x - lane < n_edge) {
#pragma unroll 4
        for (int i = 0; i < n_edge; ++i) {
            const bool before = edge[i] > mine;
            rank += before;
            held += b.by_mass && before ? share[i] : 0;
        }
    }
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
static __device__ __noinline__ fasa_select_last fasa_select_equal(const fasa_select_args & a, fasa_select_block & b, const fasa_work::slot & slot, int part, int first, int last,
        const uint32_t * key, uint32_t value) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x/32, each = (last - first + N_THREAD - 1)/N_THREAD*32;
    const int from = first + warp*each, to = min(last, from + each);
    uint32_t n = b.n;
    if (b.by_mass) {
        const fasa_u64 share = fasa_key_share(value), some = share > 0 ? (a.need - b.held + share - 1)/share : 1;
        n = (uint32_t) min((fasa_u64) b.n_cap, max((fasa_u64) b.n_floor, b.before + some));
    }
    const uint32_t taken = n - b.before, before = min(taken, fasa_select_before(slot.equal, part));
    const auto equal = [&](int j) { return __ballot_sync(0xffffffff, j + lane < to && key[j + lane - first] == value); };
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
static __device__ __forceinline__ void fasa_select_write(fasa_select_block & b, int first, int last, const uint32_t * key, fasa_select_last taken, int32_t * out) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x/32, each = (last - first + N_THREAD - 1)/N_THREAD*32;
    const int from = first + warp*each, to = min(last, from + each);
    const auto word = [&](int j0, int & n) { // which of cells j0 + 32*lane + (0 to 31) are taken, as bits; n: how many in all lanes
        uint32_t mine = 0;
        const int n_word = min(32, (to - j0 + 31)/32);
#pragma unroll 4
        for (int i = 0; i < n_word; ++i) {
            const int j = j0 + 32*i + lane;
            const uint32_t k = j < to ? key[j - first] : 0;
            const uint32_t some = __ballot_sync(0xffffffff, k > taken.key || (k == taken.key && j <= taken.cell && j < to));
            mine = i == lane ? some : mine;
        }
        n = fasa_warp_sum(__popc(mine));
        return mine;
    };
    uint32_t mine = 0, n = 0; // mine: the last word(), the only one as a rule
    int some;
#pragma unroll 1
    for (int j = from; j < to; j += 1024) {
        mine = word(j, some);
        n += some;
    }
    __syncthreads();
    if (lane == 0) {
        b.scan[warp] = n;
    }
    __syncthreads();
    if (n == 0) {
        return;
    }
    out += fasa_warp_sum(lane < warp ? b.scan[lane] : 0u);
#pragma unroll 1
    for (int j = from; j < to; j += 1024) {
        mine = each > 1024 ? word(j, some) : mine;
        int at = __popc(mine);
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int before = __shfl_up_sync(0xffffffff, at, step);
            at += lane >= step ? before : 0;
        }
        const int all = __shfl_sync(0xffffffff, at, 31);
        at -= __popc(mine);
#pragma unroll 1
        for (uint32_t rest = mine; rest != 0; rest &= rest - 1) {
            out[at++] = j + 32*lane + __ffs(rest) - 1;
        }
        out += all;
    }
}

// Steps 1 to 3 of one row
template <bool FOURS>
static __device__ __forceinline__ void fasa_select_row(const fasa_select_args & a, fasa_select_block & b, const fasa_tip_list & l, fasa_work::slot & slot,
        fasa_row_barrier & row_barrier, int row, int part, uint32_t * key) {
    fasa_select_keys<FOURS>(a, b, l, key);
    fasa_select_publish(a, b, slot.bins[0]);
    // the keys of the edge; where they are too many, ever narrower bins, until they are few or equal
    uint32_t edge_first = FASA_KEY_HIDDEN + 1, edge_last = FASA_KEY_HIDDEN; // none: every cell is taken
    int level = 0;
    for (int shift = 0;; ++level) {
        row_barrier.wait();
        if (level > 0) {
            fasa_select_clear(slot.bins[(level - 1)%3], part, a.n_part); // read by all; used again two levels on
        }
        fasa_select_edge(a, b, slot.bins[level%3], level == 0);
        if (b.bin < 0) {
            break;
        }
        if (level == 0) {
            edge_first = fasa_bin_first(b.bin, a.bin_base);
            edge_last  = b.bin == BINS - 1 ? UINT32_MAX : fasa_bin_first(b.bin + 1, a.bin_base) - 1;
        } else {
            edge_first += (uint32_t) b.bin << shift;
            edge_last   = min(edge_last, edge_first + (1u << shift) - 1);
        }
        if (b.n_edge <= EDGE || edge_first == edge_last) {
            break;
        }
        shift = max(0, 32 - __clz(edge_last - edge_first) - 11);
        __syncthreads();
        fasa_select_refine(a, b, slot.bins[(level + 1)%3], key, l.last - l.first, edge_first, edge_last, shift);
    }
    const bool equal = b.bin >= 0 && b.n_edge > EDGE;
    __syncthreads();
    fasa_select_hand_in(b, slot, part, l.first, l.last, key, edge_first, edge_last, equal);
    row_barrier.wait();

    fasa_select_clear(slot.bins[level%3], part, a.n_part);
    const uint32_t above = fasa_select_before(slot.part, part);
    fasa_select_last taken = { edge_first, INT_MAX, 0, b.n }; // every cell
    if (equal) {
        taken = fasa_select_equal(a, b, slot, part, l.first, l.last, key, edge_first);
    } else if (b.bin >= 0) {
        taken = fasa_select_rank(a, b, slot, b.n_edge, l.first);
    }
    int32_t * list = a.dst + (int64_t) row*a.n_list_len;
    fasa_select_write(b, l.first, l.last, key, taken, list + 1 + above + taken.before);
    if (part == 0 && threadIdx.x == 0) {
        list[0] = taken.n;
        slot.n_edge = 0;
        auto * c = (fasa_u64 *) a.work->counter;
        atomicAdd(&c[fasa_work::ROWS_ATTENDED], (fasa_u64) taken.n);
        atomicAdd(&c[fasa_work::ROWS_VISIBLE],  (fasa_u64) b.n_visible);
        atomicAdd(&c[fasa_work::LISTS], 1ull);
    }
}

// IN_SMEM: scores and keys of a block's cells lie in its shared memory
template <int K_DOM, int QUADS, bool IN_SMEM>
static __global__ void __launch_bounds__(N_THREAD, 1) fasa_select_kernel(const __grid_constant__ fasa_select_args a) {
    extern __shared__ __align__(16) char smem[];
    fasa_select_block & b = *(fasa_select_block *) smem;
    float * in_smem = (float *) (smem + sizeof(fasa_select_block)); // [n_shared][part_cells + ROW_PAD]; the first of them become keys

    const int part = blockIdx.x;
    auto & slot = a.work->slots[blockIdx.y];
    const auto list = [&](int row) {
        fasa_tip_list l;
        l.token    = row/a.n_list;
        l.head0    = row%a.n_list*a.n_shared;
        l.n_shared = a.n_shared;
        l.first    = part*a.part_cells;
        l.last     = min(a.tip.n_kv, l.first + a.part_cells);
        l.tip      = a.scores + ((int64_t) l.token*a.tip.n_head + l.head0)*a.tip.n_len;
        l.x        = IN_SMEM ? in_smem : l.tip + l.first;
        l.x_stride = IN_SMEM ? a.part_cells + ROW_PAD : a.tip.n_len;
        return l;
    };
    ggml_cuda_pdl_sync(); // where a graph was updated in place, its edges may be those of kernels that are launched early
    ggml_cuda_pdl_lc();   // FAC may take the place of blocks that are done
    fasa_row_barrier row_barrier(slot, part, a.n_part);
#pragma unroll 1
    for (int row = blockIdx.y; row < a.n_row; row += gridDim.y) {
        const fasa_tip_list l = list(row);
        if (IN_SMEM || !a.given) {
            fasa_tip_block<K_DOM, QUADS, IN_SMEM>(a.tip, l, smem).run(b.piece);
            row_barrier.wait();
        }
        fasa_select_row<IN_SMEM>(a, b, l, slot, row_barrier, row, part, IN_SMEM ? (uint32_t *) in_smem : a.key + (int64_t) row*a.tip.n_kv + l.first);
        if (row + (int) gridDim.y < a.n_row) {
            row_barrier.wait(); // the slot is used again
        }
    }
}

// ---- how a row is divided ----

struct fasa_select_plan {
    int    slots; // rows at a time
    size_t smem;  // bytes
};

static void fasa_select_divide(fasa_select_args & a, int parts) {
    const int spans = std::max(1, a.tip.n_span);
    a.part_cells = (spans + parts - 1)/parts*FASA_SPAN;
    a.n_part     = (spans*FASA_SPAN + a.part_cells - 1)/a.part_cells;
}

// A row is shared by blocks that all run together. False: their cells do not fit in shared memory, where they are wanted.
template <typename F> static bool fasa_select_plan_together(F kernel, fasa_select_args & a, fasa_select_plan & plan, bool in_smem) {
    const auto & info = ggml_cuda_info().devices[ggml_cuda_get_device()];
    const auto together = [&](size_t smem) {
        int per_sm = 0;
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, N_THREAD, smem));
        return per_sm*info.nsm;
    };
    const int most = together(sizeof(fasa_select_block)), useful = std::max(1, a.tip.n_span/2);
    plan.slots = std::min({ a.n_row, most, (int) fasa_work::SLOTS });
    const int parts = info.supports_cooperative_launch ? std::max(1, std::min({ most/plan.slots, (int) fasa_work::PARTS, useful })) : 1;
    for (int p = parts; p > 0 && in_smem; --p) {
        fasa_select_divide(a, p);
        plan.smem = sizeof(fasa_select_block) + (size_t) a.n_shared*(a.part_cells + ROW_PAD)*sizeof(float);
        if (plan.smem > info.smpbo - STATIC_SMEM) {
            break; // fewer parts need more
        }
        if (together(plan.smem) >= a.n_part*plan.slots) {
            return true;
        }
    }
    plan.smem = sizeof(fasa_select_block);
    fasa_select_divide(a, parts);
    return !in_smem;
}

// a kernel with all that the device allows; devices whose limits were raised are known
template <typename F> static F fasa_select_raise_limits(F kernel, std::atomic<uint32_t> & known) {
    const int    device = ggml_cuda_get_device();
    const auto & info   = ggml_cuda_info().devices[device];
    if (!(known & 1u << device)) {
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, info.smpbo - STATIC_SMEM));
        known |= 1u << device;
    }
    return kernel;
}

// No clusters here: a CUDA graph that was captured with them is not safe to update in place (docs/gpu.md)
template <typename F> static void fasa_select_run(F kernel, const fasa_select_args & a, const fasa_select_plan & plan, cudaStream_t stream) {
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim  = dim3(a.n_part, plan.slots);
    config.blockDim = dim3(N_THREAD);
    config.dynamicSmemBytes = plan.smem;
    config.stream   = stream;
    config.attrs    = &together;
    config.numAttrs = a.n_part > 1;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, a));
}

template <int K_DOM, int QUADS> static void fasa_select_launch(ggml_backend_cuda_context & ctx, fasa_select_args & a, bool keep_scores) {
    static std::atomic<uint32_t> known[2] = {};
    GGML_ASSERT((fasa_tip_smem<K_DOM>(a.tip.n_dom, a.tip.d) <= offsetof(fasa_select_block, most)));
    fasa_select_plan plan;
    if (!keep_scores && !a.given) {
        const auto kernel = fasa_select_raise_limits(fasa_select_kernel<K_DOM, QUADS, true>, known[0]);
        if (fasa_select_plan_together(kernel, a, plan, true)) {
            fasa_select_run(kernel, a, plan, ctx.stream());
            return;
        }
    }
    const auto kernel = fasa_select_raise_limits(fasa_select_kernel<K_DOM, QUADS, false>, known[1]);
    fasa_select_plan_together(kernel, a, plan, false);
    fasa_select_run(kernel, a, plan, ctx.stream());
}

template <int K_DOM> static void fasa_select_quads(ggml_backend_cuda_context & ctx, fasa_select_args & a, bool keep_scores) {
    switch (K_DOM == FASA_K_DOM_F16 ? 0 : (a.tip.n_dom/FASA_GROUP + 3)/4) {
        case 1:  fasa_select_launch<K_DOM, K_DOM == FASA_K_DOM_F16 ? 0 : 1>(ctx, a, keep_scores); break;
        case 2:  fasa_select_launch<K_DOM, K_DOM == FASA_K_DOM_F16 ? 0 : 2>(ctx, a, keep_scores); break;
        default: fasa_select_launch<K_DOM, 0>(ctx, a, keep_scores); break;
    }
}

void fasa_cuda_select(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p) {
    const ggml_tensor * tip = dst->src[0], * forced = dst->src[1], * work = dst->src[2];
    fasa_select_args a = {};
    a.tip      = fasa_tip_args_make(tip);
    a.scores   = (float *) tip->data;
    a.forced   = (const int32_t *) forced->data;
    a.dst      = (int32_t *) dst->data;
    a.work     = (fasa_work *) work->data;
    a.n_row    = ggml_nrows(dst);
    a.n_list   = dst->ne[1];
    a.n_shared = a.tip.n_head/a.n_list;
    a.n_forced = forced->ne[0];
    a.n_list_len = dst->ne[0];
    a.given  = p.device & FASA_SCORES_GIVEN;
    a.budget = p.budget;
    a.floor  = p.floor;
    a.cap    = p.cap;
    a.need   = p.mass > 0 ? std::max<uint64_t>(1, fasa_mass_need(p.mass, a.n_shared)) : 0;
    a.bin_base = fasa_bin_base(std::max<uint32_t>(p.mass > 0 ? p.cap : p.budget, a.n_forced), a.n_shared);
    ggml_cuda_pool_alloc<uint32_t> key(ctx.pool(), (size_t) a.n_row*a.tip.n_kv);
    a.key = key.get();
    const bool keep_scores = p.device & FASA_SCORES_KEPT;
    switch (fasa_op_get(tip)->k_dom) {
        case FASA_K_DOM_F16: fasa_select_quads<FASA_K_DOM_F16>(ctx, a, keep_scores); break;
        case FASA_K_DOM_Q8:  fasa_select_quads<FASA_K_DOM_Q8> (ctx, a, keep_scores); break;
        default:             fasa_select_quads<FASA_K_DOM_Q4> (ctx, a, keep_scores); break;
    }
}
