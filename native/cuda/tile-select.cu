// SELECT of sparse prefill (ops/tile.h): the cells that a tile attends. Definition: fasa_select of core/select.h, whose
// lists these are, index for index. A block makes a list:
//
//   1. keys over the scores, and a histogram of them in bins that are finest where the list ends as a rule
//   2. the bin where it would end if nothing but its length ended it; its cells and those above it are the candidates
//   3. the list's length, from the candidates' shares, and its last key, both by bisection over the candidates
//   4. the candidates that are taken, in order
//
// Candidates lie in shared memory. Where they are too many (even attention), all cells are the candidates.

#include "core/select.h"
#include "cuda/nodes.cuh"
#include "cuda/tile.cuh"

#include <atomic>

typedef unsigned long long fasa_u64;

static constexpr int SELECT_THREADS = 1024, SELECT_WARPS = SELECT_THREADS / 32, SELECT_BINS = 4096;
static constexpr int BIN_SHIFT = 15; // bins of 1/256 octave

struct fasa_tile_select_args {
    float * scores; // [list of all][n_kv], times 2^FASA_SCORE_EXP
    const int8_t * view;
    int64_t n_view;
    const int32_t * forced; // [n_tile][n_forced]
    fasa_tiles_ref tiles;
    int32_t * dst; // [list of all][n_len]
    fasa_work * work;
    int n_kv, n_list, n_group, n_forced, n_len, n_room; // n_room: for candidates
    uint32_t most, floor, cap;                          // most: the budget or the cap
    bool by_mass;
    fasa_u64 need; // of one row's shares
};

struct fasa_tile_select_block {
    uint32_t count[SELECT_BINS];
    uint32_t scan[2][SELECT_WARPS];
    fasa_u64 sum;
    fasa_u64 forced_share;
    uint32_t total, n_visible, n_forced, bin;
};

static __device__ __forceinline__ int fasa_tile_bin(uint32_t key, int base) {
    return min(SELECT_BINS - 1, max(0, int(key >> BIN_SHIFT) - base));
}

static __device__ __forceinline__ fasa_u64 fasa_tile_share(uint32_t key) { // fasa_share of what is behind a key
    return __float2ull_rz(__uint_as_float(key - 1) * 0x1p-20f);
}

// sum over the block, in every thread
template <typename T>
static __device__ __forceinline__ T fasa_block_sum(T x, T * total) {
    __syncthreads();
    if (threadIdx.x == 0) {
        *total = 0;
    }
    __syncthreads();
    x = fasa_warp_sum(x);
    if (threadIdx.x % 32 == 0 && x != 0) {
        atomicAdd(total, x);
    }
    __syncthreads();
    return *total;
}

// exclusive sums over the warps of what lane 0 of each has
static __device__ __forceinline__ uint2 fasa_before(fasa_tile_select_block & b, uint32_t x, uint32_t y) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
    if (lane == 0) {
        b.scan[0][warp] = x, b.scan[1][warp] = y;
    }
    __syncthreads();
    return make_uint2(
        fasa_warp_sum(lane < warp ? b.scan[0][lane] : 0u), fasa_warp_sum(lane < warp ? b.scan[1][lane] : 0u));
}

struct fasa_candidate_list {
    const uint32_t * key;
    const int32_t * cell; // nullptr: candidate i is cell i
    int n;

    // the warp's part of them: whole warps' widths
    __device__ int2 mine() const {
        const int per = (n + SELECT_THREADS - 1) / SELECT_THREADS * 32, first = threadIdx.x / 32 * per;
        return make_int2(min(n, first), min(n, first + per));
    }
};

// Groups of four cells that are read at once: all or none, since lists follow each other (VIEW's rows are spans)
static __device__ __forceinline__ int fasa_tile_wide(int n_kv) {
    return n_kv % 4 == 0 ? n_kv / 4 : 0;
}

// 1. Keys over the scores of the list's cells; what is forced. key: where the scores lie
static __device__ __forceinline__ void fasa_tile_keys(
    const fasa_tile_select_args & a, fasa_tile_select_block & b, int list, int tile, int base, uint32_t * key) {
    const float * scores = (const float *) key;
    const int8_t * view  = a.view + tile * a.n_view;
    for (int i = threadIdx.x; i < SELECT_BINS; i += SELECT_THREADS) {
        b.count[i] = 0;
    }
    if (threadIdx.x == 0) {
        b.n_forced = 0, b.forced_share = 0;
    }
    __syncthreads();
    uint32_t n_visible = 0, n_none = 0; // cells without a score at all can be many: counted apart
    const auto take = [&](bool seen, float score) {
        const uint32_t k = seen ? __float_as_uint(score) + 1 : FASA_KEY_HIDDEN;
        const int bin    = fasa_tile_bin(k, base);
        n_visible += seen;
        n_none += seen && bin == 0;
        if (seen && bin > 0) {
            atomicAdd(&b.count[bin], 1);
        }
        return k;
    };
    const int n_wide = fasa_tile_wide(a.n_kv);
#pragma unroll 4
    for (int i = threadIdx.x; i < n_wide; i += SELECT_THREADS) {
        const char4 v      = ((const char4 *) view)[i];
        const float4 x     = ((const float4 *) scores)[i];
        ((uint4 *) key)[i] = make_uint4(take(v.x != FASA_SEEN_BY_NONE, x.x), take(v.y != FASA_SEEN_BY_NONE, x.y),
            take(v.z != FASA_SEEN_BY_NONE, x.z), take(v.w != FASA_SEEN_BY_NONE, x.w));
    }
#pragma unroll 4
    for (int c = 4 * n_wide + threadIdx.x; c < a.n_kv; c += SELECT_THREADS) {
        key[c] = take(view[c] != FASA_SEEN_BY_NONE, scores[c]);
    }
    n_none = fasa_warp_sum(n_none);
    if (threadIdx.x % 32 == 0 && n_none > 0) {
        atomicAdd(&b.count[0], n_none);
    }
    n_visible = fasa_block_sum(n_visible, &b.total);
    if (threadIdx.x == 0) {
        b.n_visible = n_visible;
    }
    const int32_t * forced = a.forced + tile * a.n_forced;
    for (int i = threadIdx.x; i < a.n_forced; i += SELECT_THREADS) {
        const int c = forced[i];
        if (c >= 0 && c < a.n_kv && *(volatile uint32_t *) &key[c] != FASA_KEY_HIDDEN) {
            const uint32_t k = atomicExch(&key[c], FASA_KEY_FORCED);
            if (k != FASA_KEY_FORCED) { // a cell may be named twice
                atomicSub(&b.count[fasa_tile_bin(k, base)], 1);
                atomicAdd(&b.count[SELECT_BINS - 1], 1);
                atomicAdd(&b.n_forced, 1);
                atomicAdd(&b.forced_share, fasa_tile_share(k));
            }
        }
    }
    __syncthreads();
}

// 2. The highest bin from which on there are at least n cells, and how many there are
static __device__ __forceinline__ uint32_t fasa_tile_edge(fasa_tile_select_block & b, uint32_t n) {
    constexpr int PER = SELECT_BINS / SELECT_THREADS; // bins of a thread, from the highest down
    const int lane = threadIdx.x % 32, first = SELECT_BINS - 1 - (int) threadIdx.x * PER;
    uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        mine += b.count[first - i];
    }
    uint32_t upto = mine; // inclusive over the warp
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const uint32_t x = __shfl_up_sync(0xffffffff, upto, by);
        upto += lane >= by ? x : 0;
    }
    const uint32_t warps = __shfl_sync(0xffffffff, upto, 31);
    uint32_t before      = fasa_before(b, warps, 0).x + upto - mine;
    if (before < n && before + mine >= n) {
        for (int i = 0; before < n; ++i) {
            before += b.count[first - i];
            b.bin   = first - i;
            b.total = before;
        }
    }
    __syncthreads();
    return b.total;
}

// those keys that are at least `low`, in order, in shared memory
static __device__ __forceinline__ fasa_candidate_list fasa_tile_collect(const fasa_tile_select_args & a,
    fasa_tile_select_block & b, const uint32_t * key, uint32_t low, uint32_t n, uint32_t * room) {
    const fasa_candidate_list all = { key, nullptr, a.n_kv };
    if (n > (uint32_t) a.n_room) {
        return all;
    }
    uint32_t * to_key = room;
    int32_t * to_cell = (int32_t *) room + a.n_room;
    const int lane    = threadIdx.x % 32;
    const int2 at     = all.mine();
    uint32_t mine     = 0;
    const bool wide   = fasa_tile_wide(a.n_kv) > 0;
    if (wide) {
#pragma unroll 4
        for (int c = at.x + 4 * lane; c < at.y; c += 128) {
            const uint4 k = *(const uint4 *) (key + c);
            mine += (k.x >= low) + (k.y >= low) + (k.z >= low) + (k.w >= low);
        }
    } else {
#pragma unroll 4
        for (int c = at.x + lane; c < at.y; c += 32) {
            mine += key[c] >= low;
        }
    }
    uint32_t to = fasa_before(b, fasa_warp_sum(mine), 0).x;
    if (wide) {
#pragma unroll 4
        for (int c0 = at.x; c0 < at.y; c0 += 128) {
            const int c          = c0 + 4 * lane;
            const uint4 v        = c < at.y ? *(const uint4 *) (key + c) : make_uint4(0, 0, 0, 0);
            const uint32_t k[4]  = { v.x, v.y, v.z, v.w };
            const uint32_t takes = (k[0] >= low) + (k[1] >= low) + (k[2] >= low) + (k[3] >= low);
            if (!__any_sync(0xffffffff, takes > 0)) {
                continue;
            }
            uint32_t upto = takes;
#pragma unroll
            for (int by = 1; by < 32; by *= 2) {
                const uint32_t x = __shfl_up_sync(0xffffffff, upto, by);
                upto += lane >= by ? x : 0;
            }
            uint32_t i = to + upto - takes;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (k[j] >= low) {
                    to_key[i] = k[j], to_cell[i++] = c + j;
                }
            }
            to += __shfl_sync(0xffffffff, upto, 31);
        }
    } else {
#pragma unroll 4
        for (int c0 = at.x; c0 < at.y; c0 += 32) {
            const int c          = c0 + lane;
            const uint32_t k     = c < at.y ? key[c] : FASA_KEY_HIDDEN;
            const uint32_t takes = __ballot_sync(0xffffffff, k >= low);
            if (k >= low) {
                const uint32_t i = to + __popc(takes & ((1u << lane) - 1));
                to_key[i] = k, to_cell[i] = c;
            }
            to += __popc(takes);
        }
    }
    __syncthreads();
    return { to_key, to_cell, (int) n };
}

// the candidates whose key is at least `low`, and what they share, both over the block
static __device__ __forceinline__ uint32_t fasa_tile_count(
    fasa_tile_select_block & b, const fasa_candidate_list & c, uint32_t low) {
    uint32_t n = 0;
    for (int i = threadIdx.x; i < c.n; i += SELECT_THREADS) {
        n += c.key[i] >= low;
    }
    return fasa_block_sum(n, &b.total);
}
static __device__ __forceinline__ fasa_u64 fasa_tile_held(
    fasa_tile_select_block & b, const fasa_candidate_list & c, uint32_t low) {
    fasa_u64 sum = 0;
    for (int i = threadIdx.x; i < c.n; i += SELECT_THREADS) {
        const uint32_t k = c.key[i];
        sum += k >= low && k != FASA_KEY_FORCED ? fasa_tile_share(k) : 0;
    }
    return fasa_block_sum(sum, &b.sum) + b.forced_share;
}

// 3a. fasa_mass_count of core/select.h
static __device__ __forceinline__ uint32_t fasa_tile_mass_count(
    fasa_tile_select_block & b, const fasa_candidate_list & c, fasa_u64 need, uint32_t n_most) {
    if (b.forced_share >= need) {
        return max(1u, b.n_forced);
    }
    uint32_t low = FASA_KEY_HIDDEN + 1, high = FASA_KEY_FORCED;
    if (fasa_tile_held(b, c, low) < need) {
        return n_most;
    }
    fasa_u64 held_high = b.forced_share;
    while (high - low > 1) {
        const uint32_t mid  = low + (high - low) / 2;
        const fasa_u64 held = fasa_tile_held(b, c, mid);
        if (held >= need) {
            low = mid;
        } else {
            high = mid, held_high = held;
        }
    }
    const fasa_u64 one = fasa_tile_share(low), rest = need - held_high, n = fasa_tile_count(b, c, high);
    return (uint32_t) min((fasa_u64) n_most, n + (rest + one - 1) / one);
}

// 3b. the largest key that at least n candidates reach
static __device__ __forceinline__ uint32_t fasa_tile_last_key(
    fasa_tile_select_block & b, const fasa_candidate_list & c, uint32_t n) {
    uint64_t low = FASA_KEY_HIDDEN + 1, high = (uint64_t) FASA_KEY_FORCED + 1;
    while (high - low > 1) {
        const uint64_t mid                                       = (low + high) / 2;
        (fasa_tile_count(b, c, (uint32_t) mid) < n ? high : low) = mid;
    }
    return (uint32_t) low;
}

// 4. the n best candidates in order: those above `last`, and of those at it the first ones
static __device__ __forceinline__ void fasa_tile_write(
    fasa_tile_select_block & b, const fasa_candidate_list & c, uint32_t n, uint32_t last, int32_t * list) {
    const uint32_t equal = last == FASA_KEY_FORCED ? n : n - fasa_tile_count(b, c, last + 1);
    const int lane       = threadIdx.x % 32;
    const int2 at        = c.mine();
    uint32_t n_above = 0, n_equal = 0;
    for (int i = at.x + lane; i < at.y; i += 32) {
        n_above += c.key[i] > last, n_equal += c.key[i] == last;
    }
    uint2 to = fasa_before(b, fasa_warp_sum(n_above), fasa_warp_sum(n_equal));
    for (int i0 = at.x; i0 < at.y; i0 += 32) {
        const int i           = i0 + lane;
        const uint32_t k      = i < at.y ? c.key[i] : FASA_KEY_HIDDEN;
        const uint32_t aboves = __ballot_sync(0xffffffff, k > last), equals = __ballot_sync(0xffffffff, k == last),
                       before = (1u << lane) - 1, j = to.y + __popc(equals & before);
        if (k > last || (k == last && j < equal)) {
            list[to.x + __popc(aboves & before) + min(j, equal)] = c.cell ? c.cell[i] : i;
        }
        to.x += __popc(aboves), to.y += __popc(equals);
    }
}

static __global__ void __launch_bounds__(SELECT_THREADS, 1) fasa_tile_select_kernel(const fasa_tile_select_args a) {
    extern __shared__ __align__(16) char smem[];
    auto & b = *(fasa_tile_select_block *) smem;
    ggml_cuda_pdl_sync();
    const int index = blockIdx.x, tile = index / a.n_list, n_row = a.n_group * a.tiles.count(tile);
    uint32_t * key        = (uint32_t *) a.scores + (int64_t) index * a.n_kv;
    int32_t * list        = a.dst + (int64_t) index * a.n_len;
    // scores add up to n_row, so no more than n cells reach n_row/n
    const uint32_t surely = __float_as_uint(float(max(1, n_row)) / max(1u, a.most) * float(1ull << FASA_SCORE_EXP)) + 1;
    const int base        = max(0, int(surely >> BIN_SHIFT) - (SELECT_BINS - 2));

    fasa_tile_keys(a, b, index % a.n_list, tile, base, key);
    const uint32_t n_visible = b.n_visible, n_forced = b.n_forced;
    uint32_t n = min(max(a.most, n_forced), n_visible);
    if (n > 0) {
        const uint32_t found        = fasa_tile_edge(b, n);
        const uint32_t low          = b.bin == 0 ? FASA_KEY_HIDDEN + 1 : uint32_t(b.bin + base) << BIN_SHIFT;
        const fasa_candidate_list c = fasa_tile_collect(a, b, key, low, found, (uint32_t *) (smem + sizeof(b)));
        if (a.by_mass) {
            n = fasa_tile_mass_count(b, c, a.need * n_row, n);
            n = min(max(min(max(n, a.floor), a.cap), n_forced), n_visible);
        }
        fasa_tile_write(b, c, n, fasa_tile_last_key(b, c, n), list + 1);
    }
    if (threadIdx.x == 0) {
        list[0]   = n;
        auto * to = (fasa_u64 *) a.work->counter;
        atomicAdd(&to[fasa_work::PREFILL_ATTENDED], (fasa_u64) n);
        atomicAdd(&to[fasa_work::PREFILL_VISIBLE], (fasa_u64) n_visible);
    }
}

void fasa_cuda_tile_select(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p) {
    const ggml_tensor *tip = dst->src[0], *forced = dst->src[1], *tiles = dst->src[2], *view = dst->src[3];
    const int n_list = dst->ne[1], n_head = tip->src[1]->ne[1];
    fasa_tile_select_args a = { (float *) tip->data, (const int8_t *) view->data, view->ne[0],
        (const int32_t *) forced->data, fasa_tiles_ref(tiles), (int32_t *) dst->data,
        (fasa_work *) fasa_op_layer(dst).work->data };
    a.n_kv                  = tip->ne[0];
    a.n_list                = n_list;
    a.n_group               = n_head / n_list;
    a.n_forced              = forced->ne[0];
    a.n_len                 = dst->ne[0];
    a.most                  = p.mass > 0 ? p.cap : p.budget;
    a.floor                 = p.floor;
    a.cap                   = p.cap;
    a.by_mass               = p.mass > 0;
    a.need                  = fasa_mass_need(p.mass, 1);
    a.n_room                = std::min(a.n_kv, 5760);

    static std::atomic<uint32_t> known = {}; // devices
    const int device                   = ggml_cuda_get_device();
    const size_t smem                  = sizeof(fasa_tile_select_block) + 8 * (size_t) a.n_room;
    if (!(known & 1u << device)) {
        CUDA_CHECK(
            cudaFuncSetAttribute(fasa_tile_select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536 - 1024));
        known |= 1u << device;
    }
    GGML_ASSERT(smem <= 65536 - 1024);
    fasa_tile_select_kernel<<<n_list * dst->ne[2], SELECT_THREADS, smem, ctx.stream()>>>(a);
    CUDA_CHECK(cudaGetLastError());
}
