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
// The bins are 2% wide, so the edge holds tens of cells. Where it holds more than EDGE (equal scores), one block finds the last
// cell by a radix search over the row. Keys and shares are whole numbers, so nothing depends on the order of the blocks. The
// barriers spin, so the blocks are launched together (cooperatively).

#include "fasa-cuda.cuh"
#include "fasa-cuda-tip.cuh"

typedef unsigned long long fasa_u64;

static constexpr int N_THREAD  = 512;
static constexpr int MAX_GROUP = 128;
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
    uint32_t      * key;    // [row][n_kv]: keys of rows whose scores lie in global memory, or of crowded ones
    fasa_work     * work;
    int n_row, n_list, n_shared, n_forced, n_list_len, n_part, part_cells; // n_shared: query heads of a list
    bool in_smem;           // scores and keys of a block's cells lie in its shared memory
    bool given;             // the scores are in `scores` already
    uint32_t budget, floor, cap;
    uint64_t need;          // of the shares; 0: the budget decides
};

// what a block knows about its row, in shared memory
struct fasa_select_block {
    fasa_u64 mass [BINS]; // mass and count: also the working memory of TIP, of span sums and of the edge's cells
    uint32_t count[BINS];
    float    most[MAX_GROUP], inv[MAX_GROUP];
    fasa_u64 scan_mass[32];
    uint32_t scan[32];

    uint32_t n_edge_mine, edge_base; // cells of this block at the edge, and where they go
    uint32_t n;        // cells to take; of the ones at the edge: `n - before`
    uint32_t before;   // cells above the edge
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
    for (int w = 0; w < N_THREAD/32; ++w) {
        before += w < warp ? warps[w] : 0;
        total  += warps[w];
    }
    return before + sum - x;
}

// All blocks of a row arrive before one leaves; what they wrote before is seen after (through L2: __ldcg). `generation` is the
// slot's, kept by every block across its barriers.
static __device__ void fasa_row_barrier(fasa_work::slot & slot, int n_part, uint32_t & generation) {
    __syncthreads();
    if (n_part > 1) {
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
}

// Step 1a: what turns a head's exponentials into its softmax: the largest exponent, and one over the sum, of every head of the list
static __device__ void fasa_select_norms(const fasa_select_args & a, fasa_select_block & b, const float * row) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x/32, n_span = a.tip.n_span, n_stat = 2*n_span;
    float   * stat   = (float *) b.mass; // [n_shared][e and sum of every span]
    const bool staged = a.n_shared*n_stat <= (int) (sizeof(b.mass) + sizeof(b.count))/4;
    for (int i = threadIdx.x; staged && i < a.n_shared*n_stat; i += N_THREAD) {
        stat[i] = __ldcg(&row[(int64_t) (i/n_stat)*a.tip.n_len + a.tip.n_kv + i%n_stat]);
    }
    __syncthreads();
    for (int g = warp; g < a.n_shared; g += N_THREAD/32) {
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

// Step 1, cells [first, last): keys, and their histogram in b. row: the list's rows of TIP, whose ends have the span sums;
// x [n_shared][x_stride], key: of the cells from `first` on; key may be x.
static __device__ void fasa_select_keys(const fasa_select_args & a, fasa_select_block & b, const float * row, int token, int first, int last,
        const float * x, int64_t x_stride, uint32_t * key) {
    const int  lane = threadIdx.x % 32;
    const bool mass = a.need > 0;
    fasa_select_norms(a, b, row);
    for (int i = threadIdx.x; i < BINS; i += N_THREAD) {
        b.count[i] = 0;
        b.mass [i] = 0;
    }
    __syncthreads();

    for (int j0 = first; j0 < last; j0 += N_THREAD) {
        const int  j = j0 + threadIdx.x;
        int bin = -1;
        if (j < last) {
            float score = 0.0f;
            bool  hidden = false;
#pragma unroll 4
            for (int g = 0; g < a.n_shared; ++g) {
                const float v = x[g*x_stride + j - first], d = row[(int64_t) g*a.tip.n_len + a.tip.n_kv + j/FASA_SPAN] - b.most[g];
                const float f = d > -FASA_SCORE_RANGE ? __fmul_rn(b.inv[g], __int_as_float((int(d) + FASA_SCORE_EXP + 127) << 23)) : 0.0f;
                score  = __fmaf_rn(v, f, score);
                hidden = hidden || v < 0.0f;
            }
            const uint32_t k = hidden ? FASA_KEY_HIDDEN : __float_as_uint(score) + 1;
            key[j - first] = k;
            bin = hidden ? -1 : fasa_bin(k);
            if (mass && bin >= 0) {
                const fasa_u64 share = fasa_key_share(k);
                if (share > 0) {
                    atomicAdd(&b.mass[bin], share);
                }
            }
        }
        const uint32_t lowest = __ballot_sync(0xffffffff, bin == 0); // many cells can have no score at all
        if (bin > 0) {
            atomicAdd(&b.count[bin], 1);
        } else if (lowest && lane == __ffs(lowest) - 1) {
            atomicAdd(&b.count[0], __popc(lowest));
        }
    }
    __syncthreads();

    for (int i = threadIdx.x; i < a.n_forced; i += N_THREAD) {
        const int cell = a.forced[token*a.n_forced + i];
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

// Step 2: the edge, from the row's histogram. Also returns the number of visible cells.
static __device__ uint32_t fasa_select_edge(const fasa_select_args & a, fasa_select_block & b, const fasa_work::slot & slot) {
    const bool by_need = a.need > 0;
    constexpr int MINE = BINS/N_THREAD;
    const int top = BINS - 1 - MINE*threadIdx.x; // a thread has bins top, top - 1, ...

    uint32_t count[MINE], n_mine = 0, n_visible;
    fasa_u64 mass[MINE], mass_mine = 0, mass_all = 0, mass_before = 0;
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        count[i] = __ldcg(&slot.count[top - i]);
        n_mine  += count[i];
        mass[i]  = by_need ? __ldcg(&slot.mass[top - i]) : 0;
        mass_mine += mass[i];
    }
    const uint32_t n_before = fasa_block_scan(n_mine, b.scan, n_visible);
    if (by_need) {
        mass_before = fasa_block_scan(mass_mine, b.scan_mass, mass_all);
    }
    __shared__ uint32_t n_forced;
    __shared__ uint32_t n_before_reached, n_to_reached; // cells above the bin where the mass is reached, and with it
    if (threadIdx.x == 0) {
        n_forced = count[0];
        n_before_reached = n_to_reached = UINT32_MAX;
    }
    __syncthreads();

    const auto at_most = [&](uint32_t n) { return min(max(n, n_forced), n_visible); };
    if (by_need) {
        fasa_u64 held = mass_before;
        uint32_t n    = n_before;
        for (int i = 0; i < MINE; ++i) {
            if (held < a.need && held + mass[i] >= a.need) {
                n_before_reached = n, n_to_reached = n + count[i];
                b.bin  = top - i;
                b.held = held;
            }
            held += mass[i], n += count[i];
        }
        __syncthreads();
        const uint32_t n_floor = at_most(a.floor), n_cap = at_most(a.cap);
        const bool by_mass = n_to_reached != UINT32_MAX && n_to_reached > n_floor && n_before_reached < n_cap;
        if (threadIdx.x == 0) {
            b.by_mass = by_mass;
            b.n_floor = n_floor, b.n_cap = n_cap;
            b.before  = n_before_reached;
            b.n       = n_to_reached <= n_floor ? n_floor : n_cap;
        }
        if (by_mass) {
            __syncthreads();
            return n_visible;
        }
    } else if (threadIdx.x == 0) {
        b.by_mass = false;
        b.n = at_most(a.budget);
    }
    __syncthreads();
    if (b.n == n_visible) {
        if (threadIdx.x == 0) {
            b.bin = -1;
        }
    } else {
        uint32_t n = n_before;
        for (int i = 0; i < MINE; ++i) {
            if (n < b.n && n + count[i] >= b.n) {
                b.bin = top - i;
                b.before = n;
            }
            n += count[i];
        }
    }
    __syncthreads();
    return n_visible;
}

// The last cell taken, by one block over all cells of a row, when too many lie at the edge
static __device__ void fasa_select_last(const fasa_select_args & a, fasa_select_block & b, const uint32_t * key) {
    const uint32_t low = fasa_bin_first(b.bin), high = b.bin == BINS - 1 ? UINT32_MAX : fasa_bin_first(b.bin + 1) - 1; // keys at the edge
    __shared__ uint32_t prefix, above;
    __shared__ fasa_u64 held;
    for (bool by_mass = b.by_mass, done = false; !done;) {
        if (threadIdx.x == 0) {
            prefix = 0, above = b.before, held = b.held;
        }
        for (int shift = 21; shift >= 0; shift -= shift == 21 ? 11 : 10) { // 11, 11 and 10 bits
            const int keep = shift + (shift == 0 ? 10 : 11);
            __syncthreads();
            for (int i = threadIdx.x; i < BINS; i += N_THREAD) {
                b.count[i] = 0, b.mass[i] = 0;
            }
            __syncthreads();
            for (int j = threadIdx.x; j < a.tip.n_kv; j += N_THREAD) {
                const uint32_t k = __ldcg(&key[j]);
                if (k >= low && k <= high && (keep == 32 || k >> keep == prefix)) {
                    atomicAdd(&b.count[k >> shift & (BINS - 1) & ((1u << (keep - shift)) - 1)], 1);
                    atomicAdd(&b.mass [k >> shift & (BINS - 1) & ((1u << (keep - shift)) - 1)], k == FASA_KEY_FORCED ? 0 : fasa_key_share(k));
                }
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                int digit = (1 << (keep - shift)) - 1;
                while (digit > 0 && (by_mass ? held + b.mass[digit] < a.need : above + b.count[digit] < b.n)) {
                    above += b.count[digit], held += b.mass[digit];
                    --digit;
                }
                prefix = prefix << (keep - shift) | digit;
            }
        }
        __syncthreads();
        done = !by_mass;
        if (by_mass) { // how many of the equal ones; then once more, by that number
            if (threadIdx.x == 0) {
                const fasa_u64 share = fasa_key_share(prefix);
                const fasa_u64 equal = share > 0 ? (a.need - held + share - 1)/share : 1;
                b.n = (uint32_t) min((fasa_u64) b.n_cap, max((fasa_u64) b.n_floor, above + equal));
            }
            by_mass = false;
        }
        __syncthreads();
    }
    // the cell where the equal ones end
    uint32_t n = above;
    for (int j0 = 0; j0 < a.tip.n_kv && n < b.n; j0 += N_THREAD) {
        const int j = j0 + threadIdx.x;
        const bool equal = j < a.tip.n_kv && __ldcg(&key[j]) == prefix;
        uint32_t total;
        const uint32_t at = n + fasa_block_scan<uint32_t>(equal, b.scan, total);
        if (equal && at == b.n - 1) {
            b.last_key = prefix, b.last_cell = j;
        }
        n += total;
    }
    __syncthreads();
}

// Step 2b: cells of [first, last) that are surely taken are counted; those at the edge go to the slot, in any order. settled: the last
// cell taken is known, so none is at the edge.
static __device__ void fasa_select_hand_in(fasa_select_block & b, fasa_work::slot & slot, int part, int first, int last, const uint32_t * key,
        uint32_t low, uint32_t high, bool settled) {
    uint32_t * edge_key  = (uint32_t *) b.mass;
    int32_t  * edge_cell = (int32_t  *) b.mass + EDGE;
    uint32_t n_mine = 0, n_part = 0;
    if (threadIdx.x == 0) {
        b.n_edge_mine = 0;
    }
    __syncthreads();
    for (int j = first + threadIdx.x; j < last; j += N_THREAD) {
        const uint32_t k = key[j - first];
        if (settled ? k > b.last_key || (k == b.last_key && j <= b.last_cell) : k >= high) {
            n_mine++;
        } else if (!settled && k >= low) {
            const uint32_t at = atomicAdd(&b.n_edge_mine, 1);
            edge_key[at] = k, edge_cell[at] = j;
        }
    }
    fasa_block_scan(n_mine, b.scan, n_part);
    if (threadIdx.x == 0) {
        slot.part[part] = n_part;
        b.edge_base = b.n_edge_mine > 0 ? atomicAdd(&slot.n_edge, b.n_edge_mine) : 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (int) b.n_edge_mine; i += N_THREAD) {
        slot.edge_key[b.edge_base + i] = edge_key[i], slot.edge_cell[b.edge_base + i] = edge_cell[i];
    }
}

// Step 3a: ranks the n_edge cells of the edge by key, then cell: sets the last one taken (and with a target mass the count).
// Returns how many of them are taken in the parts before `first`.
static __device__ uint32_t fasa_select_rank(const fasa_select_args & a, fasa_select_block & b, const fasa_work::slot & slot, int n_edge, int first) {
    uint32_t * edge_key  = (uint32_t *) b.mass;
    int32_t  * edge_cell = (int32_t  *) b.mass + EDGE;
    for (int i = threadIdx.x; i < n_edge; i += N_THREAD) {
        edge_key[i] = __ldcg(&slot.edge_key[i]), edge_cell[i] = __ldcg(&slot.edge_cell[i]);
    }
    int team = 1; // threads that rank a cell together
    while (team < 32 && n_edge*team*2 <= N_THREAD) {
        team *= 2;
    }
    __syncthreads();
    const int mine = threadIdx.x/team, step = N_THREAD/team;
    uint32_t rank[EDGE/N_THREAD] = {}, n_reached = 0, n_before = 0, n_all;
#pragma unroll
    for (int r = 0; r < EDGE/N_THREAD; ++r) {
        const int i = mine + r*step;
        if (r > 0 && team > 1) {
            break;
        }
        const uint32_t k = i < n_edge ? edge_key[i] : 0;
        const int32_t  c = i < n_edge ? edge_cell[i] : 0;
        fasa_u64 held = 0;
        for (int j = threadIdx.x%team; j < n_edge; j += team) {
            const uint32_t other = edge_key[j];
            if (other > k || (other == k && edge_cell[j] < c)) {
                rank[r]++;
                held += b.by_mass ? fasa_key_share(other) : 0;
            }
        }
        for (int half = team/2; half > 0; half /= 2) {
            rank[r] += __shfl_xor_sync(0xffffffff, rank[r], half);
            held    += __shfl_xor_sync(0xffffffff, held, half);
        }
        n_reached += i < n_edge && threadIdx.x%team == 0 && b.held + held < a.need;
    }
    if (b.by_mass) { // taken while the mass is not reached
        fasa_block_scan(n_reached, b.scan, n_all);
        if (threadIdx.x == 0) {
            b.n = min(b.n_cap, max(b.n_floor, b.before + n_all));
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < EDGE/N_THREAD; ++r) {
        const int i = mine + r*step;
        if (i < n_edge && threadIdx.x%team == 0 && (r == 0 || team == 1)) {
            n_before += rank[r] < b.n - b.before && edge_cell[i] < first;
            if (rank[r] == b.n - b.before - 1) {
                b.last_key = edge_key[i], b.last_cell = edge_cell[i];
            }
        }
    }
    fasa_block_scan(n_before, b.scan, n_all);
    __syncthreads();
    return n_all;
}

// Step 3b: the cells of [first, last) that are taken, ascending; a thread writes those of a range of its own
static __device__ void fasa_select_write(fasa_select_block & b, int first, int last, const uint32_t * key, int32_t * out) {
    const int each = (last - first + N_THREAD - 1)/N_THREAD, from = min(last, first + (int) threadIdx.x*each), to = min(last, from + each);
    const auto taken = [&](int j) { return key[j - first] > b.last_key || (key[j - first] == b.last_key && j <= b.last_cell); };
    uint32_t n_taken = 0, n_total;
    for (int j = from; j < to; ++j) {
        n_taken += taken(j);
    }
    out += fasa_block_scan(n_taken, b.scan, n_total);
    for (int j = from; n_taken > 0 && j < to; ++j) {
        if (taken(j)) {
            *out++ = j;
        }
    }
}

// Steps 1 to 3 of one row
static __device__ void fasa_select_row(const fasa_select_args & a, fasa_select_block & b, fasa_work::slot & slot, uint32_t & generation, int row,
        int part, int first, int last, const float * tip, const float * x, int64_t x_stride, uint32_t * key) {
    fasa_select_keys(a, b, tip, row/a.n_list, first, last, x, x_stride, key);
    for (int i = threadIdx.x; i < BINS; i += N_THREAD) {
        if (b.count[i] > 0) {
            atomicAdd(&slot.count[i], b.count[i]);
        }
        if (a.need > 0 && b.mass[i] > 0) {
            atomicAdd((fasa_u64 *) &slot.mass[i], b.mass[i]);
        }
    }
    fasa_row_barrier(slot, a.n_part, generation);

    const uint32_t n_visible = fasa_select_edge(a, b, slot);
    const int      n_edge    = b.bin < 0 ? 0 : __ldcg(&slot.count[b.bin]);
    const bool     whole     = b.bin < 0 || (!b.by_mass && n_edge == b.n - b.before); // all of the edge's cells are taken
    const bool     crowded   = !whole && n_edge > EDGE;
    const uint32_t low       = b.bin < 0 ? FASA_KEY_HIDDEN + 1 : fasa_bin_first(b.bin);
    const uint32_t high      = whole ? low : b.bin == BINS - 1 ? UINT32_MAX : fasa_bin_first(b.bin + 1); // keys from here on are taken
    __syncthreads();
    if (threadIdx.x == 0) {
        b.last_key = low, b.last_cell = INT_MAX;
    }
    if (crowded) {
        uint32_t * all = a.key + (int64_t) row*a.tip.n_kv;
        for (int j = first + threadIdx.x; all + first != key && j < last; j += N_THREAD) {
            all[j] = key[j - first];
        }
        fasa_row_barrier(slot, a.n_part, generation);
        if (part == 0) {
            fasa_select_last(a, b, all);
            if (threadIdx.x == 0) {
                slot.result_key = b.last_key, slot.result_cell = b.last_cell, slot.result_n = b.n;
            }
        }
        fasa_row_barrier(slot, a.n_part, generation);
        if (threadIdx.x == 0) {
            b.last_key = __ldcg(&slot.result_key), b.last_cell = __ldcg(&slot.result_cell), b.n = __ldcg(&slot.result_n);
        }
    }
    __syncthreads();
    fasa_select_hand_in(b, slot, part, first, last, key, low, high, crowded || whole);
    fasa_row_barrier(slot, a.n_part, generation);

    for (int i = part*N_THREAD + threadIdx.x; i < BINS; i += a.n_part*N_THREAD) {
        slot.count[i] = 0, slot.mass[i] = 0; // read by all: left empty
    }
    uint32_t offset = 0;
#pragma unroll 8
    for (int p = 0; p < part; ++p) {
        offset += __ldcg(&slot.part[p]);
    }
    if (!whole && !crowded) {
        offset += fasa_select_rank(a, b, slot, n_edge, first);
    }
    int32_t * list = a.dst + (int64_t) row*a.n_list_len;
    fasa_select_write(b, first, last, key, list + 1 + offset);
    if (part == 0 && threadIdx.x == 0) {
        list[0] = b.n;
        slot.n_edge = 0;
        auto * c = (fasa_u64 *) a.work->counter;
        atomicAdd(&c[fasa_work::ROWS_ATTENDED], (fasa_u64) b.n);
        atomicAdd(&c[fasa_work::ROWS_VISIBLE],  (fasa_u64) n_visible);
        atomicAdd(&c[fasa_work::LISTS], 1ull);
    }
}

template <int K_DOM, int M, int GROUPS>
static __global__ void __launch_bounds__(N_THREAD, M > 4 ? 1 : 2) fasa_select_kernel(const fasa_select_args a) {
    extern __shared__ __align__(16) char smem[];
    fasa_select_block & b = *(fasa_select_block *) smem;
    float * in_smem = (float *) (smem + sizeof(fasa_select_block)); // [n_shared][part_cells]; the first of them become keys

    const int part = blockIdx.x, first = part*a.part_cells, last = min(a.tip.n_kv, first + a.part_cells);
    auto & slot = a.work->slots[blockIdx.y];
    uint32_t generation = a.n_part > 1 ? *(volatile uint32_t *) &slot.generation : 0;
    for (int row = blockIdx.y; row < a.n_row; row += gridDim.y) {
        const int token = row/a.n_list, head0 = row%a.n_list*a.n_shared;
        float * tip = a.scores + ((int64_t) token*a.tip.n_head + head0)*a.tip.n_len;

        float       * x        = a.in_smem ? in_smem : tip + first;
        const int64_t x_stride = a.in_smem ? a.part_cells : a.tip.n_len;
        uint32_t    * key      = a.in_smem ? (uint32_t *) in_smem : a.key + (int64_t) row*a.tip.n_kv + first;
        if (!a.given) {
            fasa_tip_spans<K_DOM, M, GROUPS>(a.tip, token, head0, a.n_shared, first, last, x, x_stride, tip, smem);
            fasa_row_barrier(slot, a.n_part, generation);
        }
        fasa_select_row(a, b, slot, generation, row, part, first, last, tip, x, x_stride, key);
        if (row + (int) gridDim.y < a.n_row) {
            fasa_row_barrier(slot, a.n_part, generation); // the slot is used again
        }
    }
}

// How a row is divided: parts, and whether scores stay in shared memory. All blocks of the launch must run together.
template <typename F> static size_t fasa_select_plan(F kernel, fasa_select_args & a, bool global_scores, int & slots) {
    const auto & info = ggml_cuda_info().devices[ggml_cuda_get_device()];
    const auto together = [&](size_t smem) {
        int per_sm = 0;
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, N_THREAD, smem));
        return per_sm*info.nsm;
    };
    const size_t base  = sizeof(fasa_select_block);
    const int    spans = std::max(1, a.tip.n_span), wide = (spans + N_THREAD/32 - 1)/(N_THREAD/32); // a span for every warp
    const int    most  = together(base);
    slots = std::min({ a.n_row, most, (int) fasa_work::SLOTS });
    const auto divide = [&](int parts) {
        a.part_cells = (spans + parts - 1)/parts*FASA_SPAN;
        a.n_part     = (spans*FASA_SPAN + a.part_cells - 1)/a.part_cells;
    };
    const int parts = info.supports_cooperative_launch ? std::max(1, std::min({ most/slots, (int) fasa_work::PARTS, wide })) : 1;
    for (int p = parts; p > 0 && !global_scores; --p) {
        divide(p);
        const size_t smem = base + (size_t) a.n_shared*a.part_cells*sizeof(float);
        if (smem <= info.smpbo && together(smem) >= a.n_part*slots) {
            a.in_smem = true;
            return smem;
        }
        if (smem > info.smpbo) {
            break; // fewer parts need more
        }
    }
    a.in_smem = false;
    divide(parts);
    return base;
}

template <int K_DOM, int M, int GROUPS> static void fasa_select_launch(ggml_backend_cuda_context & ctx, fasa_select_args & a, bool keep_scores) {
    const auto kernel = fasa_select_kernel<K_DOM, M, GROUPS>;
    static std::atomic<uint32_t> known{0}; // devices whose limit was raised
    const int device = ggml_cuda_get_device();
    if (!(known & 1u << device)) {
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ggml_cuda_info().devices[device].smpbo));
        known |= 1u << device;
    }
    GGML_ASSERT((fasa_tip_smem<K_DOM, M>(a.tip.n_dom, a.tip.d, N_THREAD/32) <= offsetof(fasa_select_block, most)));
    int slots = 1;
    const size_t smem = fasa_select_plan(kernel, a, keep_scores || a.given, slots);

    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim  = dim3(a.n_part, slots);
    config.blockDim = dim3(N_THREAD);
    config.dynamicSmemBytes = smem;
    config.stream   = ctx.stream();
    config.attrs    = &together;
    config.numAttrs = a.n_part > 1 ? 1 : 0;
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
