#pragma once

// Step 1 of SELECT (cuda/select.cu): the scores and keys of a block's cells, and the histogram of the keys.

#include "cuda/select-steps.cuh"
#include "cuda/tip.cuh"

// what the exponentials of a span with exponent e are multiplied by
static __device__ __forceinline__ float fasa_select_factor(const fasa_select_block & b, int g, float e) {
    const float d = e - b.most[g];
    return d > -FASA_SCORE_RANGE ? __fmul_rn(b.inv[g], __int_as_float((int(d) + FASA_SCORE_EXP + 127) << 23)) : 0.0f;
}

// Step 1a: what turns a head's exponentials into its softmax: the largest exponent, and one over the sum, of every head
// of the list, and with them, where there is room, the factors of the block's spans. Returns whether there is.
// FASA_SUM_PARTS warps share a head; the order of the sum is that of fasa_select_factors (cpu/select.cpp).
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

// Step 1c: the keys and bins of the forced cells of l. mine: forced cell threadIdx.x of the token, or -1
static __device__ __forceinline__ void fasa_select_force(const fasa_select_args & a, fasa_select_block & b,
    const fasa_tip_list & l, uint32_t * key, const int32_t * forced, int mine) {
    const int first = l.first, last = l.last;
    const bool mass = a.need > 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < a.n_forced; i += N_THREAD) {
        const int cell = i < N_THREAD ? mine : forced[i];
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
}

// Step 1: the keys of the cells of l, and their histogram in b. key: of the cells from l.first on; may be l.x.
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
        const bool hidden[4] = { v.x < 0.0f, v.y < 0.0f, v.z < 0.0f, v.w < 0.0f }; // for all heads or for none
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

    fasa_select_force(a, b, l, key, forced, forced_mine);
    __syncthreads();
}
