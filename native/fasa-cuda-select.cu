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
// The bins are 2% wide, so the edge holds tens of cells. Where it holds more than EDGE (even attention), step 2 is done again on the
// edge alone, in ever narrower bins, until few are left or all of them are equal. Keys and shares are whole numbers, so nothing
// depends on the order of the blocks.
//
// The blocks of a row are a cluster where that pays and the GPU has clusters (9.0 and later); elsewhere they are launched together
// (cooperatively), and their barriers spin.

#include "fasa-cuda.cuh"
#include "fasa-cuda-tip.cuh"

typedef unsigned long long fasa_u64;

static constexpr int N_THREAD  = 512;
static constexpr int N_WARP    = N_THREAD/32;
static constexpr int MAX_GROUP = 128;
static constexpr int MAX_FACTOR = 512;
static constexpr int STATIC_SMEM = 1024; // bytes, at most, that the kernel has beside its dynamic shared memory
static constexpr int BINS = fasa_work::BINS, EDGE = fasa_work::EDGE;

// bins of 1/32 octave, from the largest score there can be (MAX_GROUP times 2^FASA_SCORE_EXP) down; the last one is the forced cells
static constexpr int BIN_SHIFT = 18;
static constexpr int BIN_BASE  = ((127 + FASA_SCORE_EXP + 8) << (23 - BIN_SHIFT)) - (BINS - 2);

static __device__ __forceinline__ int fasa_bin(uint32_t key) { // of a visible cell
    return key == FASA_KEY_FORCED ? BINS - 1 : max(0, min(BINS - 2, int(key >> BIN_SHIFT) - BIN_BASE));
}

static __device__ __forceinline__ uint32_t fasa_bin_first(int bin) { // its lowest key
    return bin == 0 ? FASA_KEY_HIDDEN + 1 : bin == BINS - 1 ? FASA_KEY_FORCED : uint32_t(bin + BIN_BASE) << BIN_SHIFT;
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
    bool in_smem;           // scores and keys of a block's cells lie in its shared memory
    bool given;             // the scores are in `scores` already
    bool cluster;           // the blocks of a row are a cluster
    uint32_t budget, floor, cap;
    uint64_t need;          // of the shares; 0: the budget decides
};

// what a block knows about its row, in shared memory
struct fasa_select_block {
    fasa_u64 mass [BINS]; // mass and count: also the working memory of TIP, of span sums and of the edge's cells
    uint32_t count[BINS];
    float    most[MAX_GROUP], inv[MAX_GROUP];
    float    piece[2*N_WARP*8];
    float    factor[MAX_FACTOR]; // [n_shared][spans of the block]: what its exponentials are multiplied by
    fasa_u64 scan_mass[N_WARP];
    uint32_t scan[N_WARP];

    uint32_t n_edge_mine, edge_base; // cells of this block at the edge, and where they go
    uint32_t n_visible;
    uint32_t n_before_reached, n_to_reached; // cells above the bin where the mass is reached, and with it
    uint32_t n;        // cells to take; of the ones at the edge: `n - before`
    uint32_t before;   // cells above the edge
    uint32_t n_edge;   // cells of the row at the edge
    fasa_u64 held;     // their mass
    int      bin;      // of the edge; -1: every cell is taken
    bool     by_mass;  // the edge's cells are taken until `need` is held
    uint32_t n_floor, n_cap;
    uint32_t last_key; // the last cell taken
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
    const int  n_part;
    const bool cluster;
    uint32_t   generation = 0; // the slot's

    __device__ fasa_row_barrier(fasa_work::slot & slot, int n_part, bool cluster) : slot(slot), n_part(n_part), cluster(cluster) {
        if (n_part > 1 && !cluster) {
            generation = *(volatile uint32_t *) &slot.generation;
        }
    }

    __device__ void wait() {
        if (n_part == 1) {
            __syncthreads();
            return;
        }
#if __CUDA_ARCH__ >= 900
        if (cluster) {
            fasa_cluster_sync();
            return;
        }
#endif
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            if (atomicAdd(&slot.arrived, 1) == n_part - 1u) {
                slot.arrived = 0;
                __threadfence();
                atomicExch(&slot.generation, generation + 1);
            } else {
                while (*(volatile uint32_t *) &slot.generation == generation) {}
            }
            __threadfence();
        }
        generation++;
        __syncthreads();
    }
};

// Step 1a: what turns a head's exponentials into its softmax: the largest exponent, and one over the sum, of every head of the list
static __device__ void fasa_select_norms(const fasa_select_args & a, fasa_select_block & b, const float * row) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x/32, n_span = a.tip.n_span, n_stat = 2*n_span;
    float   * stat   = (float *) b.mass; // [n_shared][e and sum of every span]
    const bool staged = a.n_shared*n_stat <= (int) (sizeof(b.mass) + sizeof(b.count))/4;
    for (int i = threadIdx.x; staged && i < a.n_shared*n_stat; i += N_THREAD) {
        stat[i] = __ldcg(&row[(int64_t) (i/n_stat)*a.tip.n_len + a.tip.n_kv + i%n_stat]);
    }
    __syncthreads();
    for (int g = warp; g < a.n_shared; g += N_WARP) {
        const float * e = staged ? stat + g*n_stat : row + (int64_t) g*a.tip.n_len + a.tip.n_kv;
        const auto at = [&](int i) { return staged ? e[i] : __ldcg(&e[i]); };
        float most = -INFINITY, total = 0.0f;
        for (int i = lane; i < n_span; i += 32) {
            most = fmaxf(most, at(i));
        }
        most = fasa_warp_max(most);
        for (int i = lane; i < n_span; i += 32) {
            const float d = at(i) - most;
            total += d > -FASA_SPAN_RANGE ? __fmul_rn(at(n_span + i), __int_as_float((int(d) + 127) << 23)) : 0.0f;
        }
        total = fasa_warp_sum(total);
        if (lane == 0) {
            b.most[g] = most;
            b.inv [g] = total > 0.0f ? __fdiv_rn(1.0f, total) : 0.0f;
        }
    }
    __syncthreads();
}

// Step 1, the cells of l: keys, and their histogram in b. key: of the cells from l.first on; may be l.x.
static __device__ void fasa_select_keys(const fasa_select_args & a, fasa_select_block & b, const fasa_tip_list & l, uint32_t * key) {
    const int  lane = threadIdx.x % 32, first = l.first, last = l.last;
    const bool mass = a.need > 0;
    fasa_select_norms(a, b, l.tip);
    const auto factor = [&](int g, int span) {
        const float d = l.tip[(int64_t) g*a.tip.n_len + a.tip.n_kv + span] - b.most[g];
        return d > -FASA_SCORE_RANGE ? __fmul_rn(b.inv[g], __int_as_float((int(d) + FASA_SCORE_EXP + 127) << 23)) : 0.0f;
    };
    const int  n_span = (last - first + FASA_SPAN - 1)/FASA_SPAN;
    const bool staged = n_span*a.n_shared <= MAX_FACTOR;
    for (int i = threadIdx.x; staged && i < n_span*a.n_shared; i += N_THREAD) {
        b.factor[i] = factor(i/n_span, first/FASA_SPAN + i%n_span);
    }
    for (int i = threadIdx.x; i < BINS; i += N_THREAD) {
        b.count[i] = 0;
        if (mass) {
            b.mass[i] = 0;
        }
    }
    __syncthreads();

    constexpr int TILES = 4; // of a warp at a time; they lie in one span
    for (int j0 = first + threadIdx.x/32*TILES*32; j0 < last; j0 += N_THREAD*TILES) {
        float score[TILES] = {};
        bool  hidden[TILES];
#pragma unroll
        for (int u = 0; u < TILES; ++u) {
            hidden[u] = j0 + 32*u + lane >= last;
        }
        for (int g = 0; g < a.n_shared; ++g) {
            const float   f = staged ? b.factor[g*n_span + (j0 - first)/FASA_SPAN] : factor(g, j0/FASA_SPAN);
            const float * x = l.x + g*l.x_stride + j0 - first + lane;
#pragma unroll
            for (int u = 0; u < TILES; ++u) {
                const float v = j0 + 32*u + lane < last ? x[32*u] : -1.0f;
                score[u]  = __fmaf_rn(v, f, score[u]);
                hidden[u] = hidden[u] || v < 0.0f;
            }
        }
#pragma unroll
        for (int u = 0; u < TILES; ++u) {
            const int      j = j0 + 32*u + lane;
            const uint32_t k = hidden[u] ? FASA_KEY_HIDDEN : __float_as_uint(score[u]) + 1;
            const int    bin = hidden[u] ? -1 : fasa_bin(k);
            if (j < last) {
                key[j - first] = k;
            }
            if (mass && bin >= 0) {
                const fasa_u64 share = fasa_key_share(k);
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
    }
    __syncthreads();

    for (int i = threadIdx.x; i < a.n_forced; i += N_THREAD) {
        const int cell = a.forced[l.token*a.n_forced + i];
        if (cell >= first && cell < last && key[cell - first] != FASA_KEY_HIDDEN) {
            const uint32_t k = atomicExch(&key[cell - first], FASA_KEY_FORCED);
            if (k != FASA_KEY_FORCED) { // a cell may be named twice
                atomicSub(&b.count[fasa_bin(k)], 1);
                atomicAdd(&b.count[BINS - 1], 1);
                if (mass) {
                    atomicAdd(&b.mass[fasa_bin(k)], 0 - fasa_key_share(k));
                    atomicAdd(&b.mass[BINS - 1], fasa_key_share(k));
                }
            }
        }
    }
    __syncthreads();
}

// adds the block's histogram to the row's
static __device__ void fasa_select_publish(const fasa_select_args & a, const fasa_select_block & b, fasa_work::histogram & bins) {
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
static __device__ void fasa_select_refine(const fasa_select_args & a, fasa_select_block & b, fasa_work::histogram & bins, const uint32_t * key, int n,
        uint32_t low, uint32_t last, int shift) {
    for (int i = threadIdx.x; i < BINS; i += N_THREAD) {
        b.count[i] = 0, b.mass[i] = 0;
    }
    __syncthreads();
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
static __device__ void fasa_select_hand_in(fasa_select_block & b, fasa_work::slot & slot, int part, int first, int last, const uint32_t * key,
        uint32_t edge_first, uint32_t edge_last, bool equal) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x/32;
    if (threadIdx.x == 0) {
        b.n_edge_mine = 0;
    }
    __syncthreads();
    uint32_t n_mine = 0;
#pragma unroll 4
    for (int j = first + threadIdx.x; j < last; j += N_THREAD) {
        const uint32_t k = key[j - first];
        if (k > edge_last) {
            n_mine++;
        } else if (k >= edge_first) {
            const uint32_t at = atomicAdd(&b.n_edge_mine, 1);
            if (!equal) {
                b.mass[at] = fasa_edge(k, j);
            }
        }
    }
    n_mine = fasa_warp_sum(n_mine);
    if (lane == 0) {
        b.scan[warp] = n_mine;
    }
    __syncthreads();
    if (warp == 0) {
        const uint32_t n_part = fasa_warp_sum(lane < N_WARP ? b.scan[lane] : 0u);
        if (lane == 0) {
            slot.part [part] = n_part;
            slot.equal[part] = b.n_edge_mine;
            b.edge_base = !equal && b.n_edge_mine > 0 ? atomicAdd(&slot.n_edge, b.n_edge_mine) : 0;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; !equal && i < (int) b.n_edge_mine; i += N_THREAD) {
        slot.edge[b.edge_base + i] = b.mass[i];
    }
}

// Step 3a: sorts the n_edge cells of the edge, which gives the last one taken (and with a target mass the count). Returns how many
// of them are taken in the parts before `first`.
static __device__ uint32_t fasa_select_rank(const fasa_select_args & a, fasa_select_block & b, const fasa_work::slot & slot, int n_edge, int first) {
    fasa_u64 * edge = b.mass;
    int size = 32;
    while (size < n_edge) {
        size *= 2;
    }
    for (int i = threadIdx.x; i < size; i += N_THREAD) {
        edge[i] = i < n_edge ? __ldcg(&slot.edge[i]) : 0;
    }
    __syncthreads();
    const bool one_warp = size <= 128;
    for (int run = 2; run <= size; run *= 2) { // bitonic, the largest first
        for (int half = run/2; half > 0; half /= 2) {
            if (one_warp) {
                __syncwarp();
            } else {
                __syncthreads();
            }
            for (int i = threadIdx.x; i < size/2 && (!one_warp || threadIdx.x < 32); i += one_warp ? 32 : N_THREAD) {
                const int lo = 2*i - (i & (half - 1)), hi = lo + half;
                const fasa_u64 x = edge[lo], y = edge[hi];
                if ((x < y) == ((lo & run) == 0)) {
                    edge[lo] = y, edge[hi] = x;
                }
            }
        }
    }
    __syncthreads();
    if (b.by_mass) { // taken while the mass is not reached
        constexpr int MINE = EDGE/N_THREAD;
        fasa_u64 share[MINE], mine = 0, total;
        uint32_t n_reached = 0, n_all;
#pragma unroll
        for (int r = 0; r < MINE; ++r) {
            const int i = MINE*threadIdx.x + r;
            share[r] = i < n_edge ? fasa_key_share(edge[i] >> 32) : 0;
            mine += share[r];
        }
        fasa_u64 held = b.held + fasa_block_scan(mine, b.scan_mass, total);
#pragma unroll
        for (int r = 0; r < MINE; ++r) {
            n_reached += MINE*(int) threadIdx.x + r < n_edge && held < a.need;
            held += share[r];
        }
        fasa_block_scan(n_reached, b.scan, n_all);
        if (threadIdx.x == 0) {
            b.n = min(b.n_cap, max(b.n_floor, b.before + n_all));
        }
        __syncthreads();
    }
    const int n_taken = b.n - b.before;
    if (threadIdx.x == 0) {
        b.n_edge_mine = 0;
        b.last_key  = edge[n_taken - 1] >> 32;
        b.last_cell = 0xffffffffu - (uint32_t) edge[n_taken - 1];
    }
    __syncthreads();
    uint32_t n_before = 0;
    for (int i = threadIdx.x; i < n_taken; i += N_THREAD) {
        n_before += (int) (0xffffffffu - (uint32_t) edge[i]) < first;
    }
    if (n_before > 0) {
        atomicAdd(&b.n_edge_mine, n_before);
    }
    __syncthreads();
    return b.n_edge_mine;
}

// Step 3a where the edge's cells are all equal: the lower ones are taken. Sets the last one taken of [first, last); returns how many are
// taken in the parts before.
static __device__ uint32_t fasa_select_equal(const fasa_select_args & a, fasa_select_block & b, const fasa_work::slot & slot, int part, int first, int last,
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
    for (int j = from; j < to; j += 32) {
        mine += __popc(equal(j));
    }
    __syncthreads();
    if (lane == 0) {
        b.scan[warp] = mine;
    }
    if (threadIdx.x == 0) {
        b.n = n;
        b.last_key = value, b.last_cell = taken - before >= b.n_edge_mine ? INT_MAX : -1;
    }
    __syncthreads();
    uint32_t at = before + fasa_warp_sum(lane < warp ? b.scan[lane] : 0u); // equal cells before this warp's
    for (int j = from; j < to && at < taken; j += 32) {
        const uint32_t some = equal(j);
        if ((some >> lane & 1) && at + __popc(some & ((1u << lane) - 1)) == taken - 1 && b.last_cell != INT_MAX) {
            b.last_cell = j + lane;
        }
        at += __popc(some);
    }
    __syncthreads();
    return before;
}

// Step 3b: the cells of [first, last) that are taken, ascending; a warp writes those of a range of its own
static __device__ void fasa_select_write(fasa_select_block & b, int first, int last, const uint32_t * key, int32_t * out) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x/32, each = (last - first + N_THREAD - 1)/N_THREAD*32;
    const int from = first + warp*each, to = min(last, from + each);
    const auto taken = [&](int j) { // of the 32 cells from j on
        const uint32_t k = j + lane < to ? key[j + lane - first] : 0;
        return __ballot_sync(0xffffffff, k > b.last_key || (k == b.last_key && j + lane <= b.last_cell && j + lane < to));
    };
    uint32_t n = 0;
#pragma unroll 4
    for (int j = from; j < to; j += 32) {
        n += __popc(taken(j));
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
#pragma unroll 4
    for (int j = from; j < to; j += 32) {
        const uint32_t some = taken(j);
        if (some >> lane & 1) {
            out[__popc(some & ((1u << lane) - 1))] = j + lane;
        }
        out += __popc(some);
    }
}

// Steps 1 to 3 of one row
static __device__ void fasa_select_row(const fasa_select_args & a, fasa_select_block & b, const fasa_tip_list & l, fasa_work::slot & slot,
        fasa_row_barrier & row_barrier, int row, int part, uint32_t * key) {
    fasa_select_keys(a, b, l, key);
    fasa_select_publish(a, b, slot.bins[0]);
    row_barrier.wait();
    fasa_select_edge(a, b, slot.bins[0], true);

    // the keys of the edge; where they are too many, ever narrower bins, until they are few or equal
    uint32_t edge_first = FASA_KEY_HIDDEN + 1, edge_last = FASA_KEY_HIDDEN; // none: every cell is taken
    int level = 0;
    if (b.bin >= 0) {
        edge_first = fasa_bin_first(b.bin);
        edge_last  = b.bin == BINS - 1 ? UINT32_MAX : fasa_bin_first(b.bin + 1) - 1;
    }
    while (b.bin >= 0 && b.n_edge > EDGE && edge_first < edge_last) {
        const int shift = max(0, 32 - __clz(edge_last - edge_first) - 11);
        ++level;
        __syncthreads();
        fasa_select_refine(a, b, slot.bins[level%3], key, l.last - l.first, edge_first, edge_last, shift);
        row_barrier.wait();
        fasa_select_clear(slot.bins[(level - 1)%3], part, a.n_part); // read by all; used again two levels on
        fasa_select_edge(a, b, slot.bins[level%3], false);
        edge_first += (uint32_t) b.bin << shift;
        edge_last   = min(edge_last, edge_first + (1u << shift) - 1);
    }
    const bool equal = b.bin >= 0 && b.n_edge > EDGE;
    __syncthreads();
    fasa_select_hand_in(b, slot, part, l.first, l.last, key, edge_first, edge_last, equal);
    row_barrier.wait();

    fasa_select_clear(slot.bins[level%3], part, a.n_part);
    uint32_t offset = fasa_select_before(slot.part, part);
    if (equal) {
        offset += fasa_select_equal(a, b, slot, part, l.first, l.last, key, edge_first);
    } else if (b.bin >= 0) {
        offset += fasa_select_rank(a, b, slot, b.n_edge, l.first);
    } else {
        if (threadIdx.x == 0) {
            b.last_key = edge_first, b.last_cell = INT_MAX;
        }
        __syncthreads();
    }
    int32_t * list = a.dst + (int64_t) row*a.n_list_len;
    fasa_select_write(b, l.first, l.last, key, list + 1 + offset);
    if (part == 0 && threadIdx.x == 0) {
        list[0] = b.n;
        slot.n_edge = 0;
        auto * c = (fasa_u64 *) a.work->counter;
        atomicAdd(&c[fasa_work::ROWS_ATTENDED], (fasa_u64) b.n);
        atomicAdd(&c[fasa_work::ROWS_VISIBLE],  (fasa_u64) b.n_visible);
        atomicAdd(&c[fasa_work::LISTS], 1ull);
    }
}

template <int K_DOM, int M, int GROUPS>
static __global__ void __launch_bounds__(N_THREAD, 1) fasa_select_kernel(const __grid_constant__ fasa_select_args a) {
    extern __shared__ __align__(16) char smem[];
    fasa_select_block & b = *(fasa_select_block *) smem;
    float * in_smem = (float *) (smem + sizeof(fasa_select_block)); // [n_shared][part_cells]; the first of them become keys

    const int part = blockIdx.x;
    auto & slot = a.work->slots[blockIdx.y];
    fasa_row_barrier row_barrier(slot, a.n_part, a.cluster);
    for (int row = blockIdx.y; row < a.n_row; row += gridDim.y) {
        fasa_tip_list l;
        l.token    = row/a.n_list;
        l.head0    = row%a.n_list*a.n_shared;
        l.n_shared = a.n_shared;
        l.first    = part*a.part_cells;
        l.last     = min(a.tip.n_kv, l.first + a.part_cells);
        l.tip      = a.scores + ((int64_t) l.token*a.tip.n_head + l.head0)*a.tip.n_len;
        l.x        = a.in_smem ? in_smem : l.tip + l.first;
        l.x_stride = a.in_smem ? a.part_cells : a.tip.n_len;
        if (!a.given) {
            fasa_tip_block<K_DOM, M, GROUPS>(a.tip, l, smem).run(b.piece);
            row_barrier.wait();
        }
        fasa_select_row(a, b, l, slot, row_barrier, row, part, a.in_smem ? (uint32_t *) in_smem : a.key + (int64_t) row*a.tip.n_kv + l.first);
        if (row + (int) gridDim.y < a.n_row) {
            row_barrier.wait(); // the slot is used again
        }
    }
}

// ---- how a row is divided ----

struct fasa_select_plan {
    int    slots;   // rows at a time
    size_t smem;    // bytes
    bool   cluster;
};

static void fasa_select_divide(fasa_select_args & a, int parts) {
    const int spans = std::max(1, a.tip.n_span);
    a.part_cells = (spans + parts - 1)/parts*FASA_SPAN;
    a.n_part     = (spans*FASA_SPAN + a.part_cells - 1)/a.part_cells;
}

static cudaLaunchConfig_t fasa_select_config(const fasa_select_args & a, const fasa_select_plan & plan, cudaLaunchAttribute * attr, cudaStream_t stream) {
    cudaLaunchConfig_t config = {};
    config.gridDim  = dim3(a.n_part, plan.slots);
    config.blockDim = dim3(N_THREAD);
    config.dynamicSmemBytes = plan.smem;
    config.stream   = stream;
    config.attrs    = attr;
    config.numAttrs = a.n_part > 1 ? 1 : 0;
    if (plan.cluster) {
        attr->id = cudaLaunchAttributeClusterDimension;
        attr->val.clusterDim.x = a.n_part;
        attr->val.clusterDim.y = attr->val.clusterDim.z = 1;
    } else {
        attr->id = cudaLaunchAttributeCooperative;
        attr->val.cooperative = 1;
    }
    return config;
}

// A row is a cluster of up to 16 blocks: as many as the cells and the GPU's size give work to. False: the GPU cannot.
template <typename F> static bool fasa_select_plan_cluster(F kernel, fasa_select_args & a, fasa_select_plan & plan) {
    const auto & info = ggml_cuda_info().devices[ggml_cuda_get_device()];
    const size_t most = info.smpbo - STATIC_SMEM;
    plan.cluster = true;
    plan.slots   = std::min(a.n_row, (int) fasa_work::SLOTS);
    const int useful = std::max(1, std::min(a.tip.n_span/2, info.nsm/plan.slots));
    for (int parts = 16; parts > 0; --parts) {
        fasa_select_divide(a, parts);
        plan.smem = sizeof(fasa_select_block) + (size_t) a.n_shared*a.part_cells*sizeof(float);
        if (plan.smem > most) {
            return false; // fewer parts need more
        }
        if (parts > useful && (size_t) (a.tip.n_span + useful - 1)/useful*FASA_SPAN*a.n_shared*sizeof(float) + sizeof(fasa_select_block) <= most) {
            continue; // as many as are useful would do
        }
        int clusters = 0;
        cudaLaunchAttribute attr = {};
        const auto config = fasa_select_config(a, plan, &attr, nullptr);
        if (a.n_part == 1 || (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters >= std::min(plan.slots, info.nsm/16))) {
            return true;
        }
        (void) cudaGetLastError();
    }
    return false;
}

// A row is shared by blocks that all run together.
template <typename F> static void fasa_select_plan_together(F kernel, fasa_select_args & a, fasa_select_plan & plan, bool in_smem) {
    const auto & info = ggml_cuda_info().devices[ggml_cuda_get_device()];
    const auto together = [&](size_t smem) {
        int per_sm = 0;
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, N_THREAD, smem));
        return per_sm*info.nsm;
    };
    const int most = together(sizeof(fasa_select_block)), useful = std::max(1, a.tip.n_span/2);
    plan.cluster = false;
    plan.slots   = std::min({ a.n_row, most, (int) fasa_work::SLOTS });
    const int parts = info.supports_cooperative_launch ? std::max(1, std::min({ most/plan.slots, (int) fasa_work::PARTS, useful })) : 1;
    for (int p = parts; p > 0 && in_smem; --p) {
        fasa_select_divide(a, p);
        plan.smem = sizeof(fasa_select_block) + (size_t) a.n_shared*a.part_cells*sizeof(float);
        if (plan.smem > info.smpbo - STATIC_SMEM) {
            break; // fewer parts need more
        }
        if (together(plan.smem) >= a.n_part*plan.slots) {
            a.in_smem = true;
            return;
        }
    }
    plan.smem = sizeof(fasa_select_block);
    fasa_select_divide(a, parts);
}

template <int K_DOM, int M, int GROUPS> static void fasa_select_launch(ggml_backend_cuda_context & ctx, fasa_select_args & a, bool keep_scores) {
    const auto kernel = fasa_select_kernel<K_DOM, M, GROUPS>;
    const int  device = ggml_cuda_get_device();
    const bool clusters = ggml_cuda_info().devices[device].cc >= 900;
    static std::atomic<uint32_t> known{0}; // devices whose limits were raised
    if (!(known & 1u << device)) {
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ggml_cuda_info().devices[device].smpbo - STATIC_SMEM));
        if (clusters) {
            CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
        }
        known |= 1u << device;
    }
    GGML_ASSERT((fasa_tip_smem<K_DOM, M>(a.tip.n_dom, a.tip.d, N_WARP) <= offsetof(fasa_select_block, most)));
    fasa_select_plan plan;
    const bool in_smem = !keep_scores && !a.given;
    // A cluster's barrier is cheaper, but with few rows clusters leave many multiprocessors idle: better for short contexts only.
    const bool short_enough = a.tip.n_span <= 64 || a.n_row >= ggml_cuda_info().devices[device].nsm/8;
    if (clusters && in_smem && short_enough && fasa_select_plan_cluster(kernel, a, plan)) {
        a.in_smem = true;
    } else {
        fasa_select_plan_together(kernel, a, plan, in_smem);
    }
    a.cluster = plan.cluster && a.n_part > 1;
    cudaLaunchAttribute attr = {};
    const auto config = fasa_select_config(a, plan, &attr, ctx.stream());
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, a));
}

template <int K_DOM, int M> static void fasa_select_groups(ggml_backend_cuda_context & ctx, fasa_select_args & a, bool keep_scores) {
    const int groups = K_DOM == FASA_K_DOM_Q4 ? a.tip.n_dom/FASA_GROUP : 0;
    switch (groups) {
        case 3:  fasa_select_launch<K_DOM, M, K_DOM == FASA_K_DOM_Q4 ? 3 : 0>(ctx, a, keep_scores); break;
        case 4:  fasa_select_launch<K_DOM, M, K_DOM == FASA_K_DOM_Q4 ? 4 : 0>(ctx, a, keep_scores); break;
        case 6:  fasa_select_launch<K_DOM, M, K_DOM == FASA_K_DOM_Q4 ? 6 : 0>(ctx, a, keep_scores); break;
        default: fasa_select_launch<K_DOM, M, 0>(ctx, a, keep_scores); break;
    }
}

template <int K_DOM> static void fasa_select_heads(ggml_backend_cuda_context & ctx, fasa_select_args & a, bool keep_scores) {
    if (a.n_shared <= 2) {
        fasa_select_groups<K_DOM, 2>(ctx, a, keep_scores);
    } else if (a.n_shared <= 4) {
        fasa_select_groups<K_DOM, 4>(ctx, a, keep_scores);
    } else {
        fasa_select_groups<K_DOM, 8>(ctx, a, keep_scores);
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
    ggml_cuda_pool_alloc<uint32_t> key(ctx.pool(), (size_t) a.n_row*a.tip.n_kv);
    a.key = key.get();
    const bool keep_scores = p.device & FASA_SCORES_KEPT;
    switch (fasa_op_get(tip)->k_dom) {
        case FASA_K_DOM_F16: fasa_select_heads<FASA_K_DOM_F16>(ctx, a, keep_scores); break;
        case FASA_K_DOM_Q8:  fasa_select_heads<FASA_K_DOM_Q8> (ctx, a, keep_scores); break;
        default:             fasa_select_heads<FASA_K_DOM_Q4> (ctx, a, keep_scores); break;
    }
}
