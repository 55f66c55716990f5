#pragma once

// TIP: refreshes K_dom of the stale cells, then estimates the logits of every cell from it, for the kernel in
// cuda/select.cu.
//
// A warp takes a span of FASA_SPAN cells of one KV head and scores it for four query heads at once, so K_dom is read
// once for all of them. The warp that refreshes a cell is the one that reads it. (Lists of several tokens share cells;
// each refreshes them for itself, with the same bytes.)
//
// What is asked for before the kernel waits for those before it (K_dom, dims, weights, mask, stale ranges) no kernel of
// the step writes but this one, and what this one refreshes is asked for again.

#include "core/select.h"
#include "cuda/k-dom.cuh"

#ifndef FASA_TIP_WARPS
#    define FASA_TIP_WARPS 16 // what a block has that needs not share its SM
#endif
static constexpr int TIP_WARPS = FASA_TIP_WARPS; // of a block

// What a block works on: the cells [first, last) of one list, `first` at the start of a span.
struct fasa_tip_list {
    int token, head0, n_shared; // n_shared query heads from head0 on
    int first, last;
    float * x; // [n_shared][x_stride] exp(logit)/2^e of every cell from `first` on, -1: hidden
    int x_stride;
    float * tip; // the list's heads in the TIP node's memory; their ends take e and sum of every span
};

// TIP of a list. smem: room for the queries and rows of warps (fasa_tip_smem); piece [2][TIP_WARPS][TIP_HEADS]. A warp
// takes a span, or where fewer spans than warps are left a piece of one. QUADS: groups of a cell by fours, asked for
// ahead; 0: any number. FOURS: l.x may be read and written by fours, up to the end of a tile.
template <int K_DOM, int QUADS, bool FOURS>
struct fasa_tip_block {
    static constexpr int TILES       = FASA_SPAN / FASA_TILE;
    static constexpr int KEPT        = QUADS > 0 ? QUADS : 1;
    static constexpr int PAIR        = 2;      // tiles that are asked for, and worked on, at once
    static constexpr uint16_t HIDDEN = 0xfc00; // -inf
    static constexpr uint16_t FRESH  = 0x7e00; // no value of a mask: the cell has the logit FASA_FRESH

    struct tile {
        fasa_tip_raw<K_DOM> raw[KEPT];
        uint16_t hide; // of cell `lane`
    };

    const fasa_tip_args & a;
    const fasa_tip_list & l;
    fasa_tip_query<K_DOM> query;
    float * row;
    char * blocks;         // of the KV head
    const uint16_t * mask; // f16 bits
    int h, s;
    typename fasa_tip_raw<K_DOM>::place place[KEPT];
    int2 stale;        // a range of each lane
    int fresh    = -1; // cell `lane` of a.fresh
    int dim      = -1; // dims and weight of dimension `lane`
    float weight = 0.0f;
    tile ahead[PAIR]; // worked on next
    int g0 = 0, base,
        n_tile; // heads from g0 on; the round that begins at base, with n_tile tiles a warp, a power of two

    __device__ fasa_tip_block(const fasa_tip_args & a, const fasa_tip_list & l, char * smem) : a(a), l(l), query(smem) {
        const uint2 st = fast_div_modulo(l.token, a.by_n_tps);
        const int t    = st.y;
        s = st.x, h = fastdiv(l.head0, a.by_n_group);
        row    = (float *) (smem + fasa_tip_query_bytes(a.n_dom)) + threadIdx.x / 32 * a.d;
        blocks = a.k_dom + s * a.k_dom_nb3 + h * a.k_dom_nb2;
#pragma unroll
        for (int i = 0; i < QUADS; ++i) {
            place[i] = { a.n_dom / FASA_GROUP, i };
        }
        mask = (const uint16_t *) (a.mask + s * a.mask_nb3 + t * a.mask_nb1);
        if ((int) threadIdx.x % 32 < a.n_fresh) {
            fresh = a.fresh[s * a.n_fresh + threadIdx.x % 32];
        }
        if ((int) threadIdx.x % 32 < a.n_dom) {
            dim = a.dims[h * a.n_dom + threadIdx.x % 32], weight = a.weight[h * a.n_dom + threadIdx.x % 32];
        }
    }

    __device__ __forceinline__ const char * block(int cell) const {
        return blocks + (uint64_t) ((uint32_t) cell / FASA_TILE) * (uint32_t) a.k_dom_nb1;
    }

    // the tile at `from`; from `to` on the last one before it, and all cells hidden
    __device__ __forceinline__ void load(tile & x, int from, int to) const {
        const int cell  = from + threadIdx.x % 32;
        const char * at = block(min(from, to - 1));
#pragma unroll
        for (int i = 0; i < QUADS; ++i) {
            x.raw[i].load(at, place[i]);
        }
        x.hide = cell < to ? mask[cell] : HIDDEN;
        if (a.n_fresh > 0) {
            mark_fresh(x, from);
        }
    }

    __device__ __forceinline__ void mark_fresh(tile & x, int from) const {
        const int cell = from + threadIdx.x % 32;
        for (uint32_t some = __ballot_sync(0xffffffff, fresh >= from && fresh < from + FASA_TILE); some != 0;
            some &= some - 1) {
            if (__shfl_sync(0xffffffff, fresh, __ffs(some) - 1) == cell && x.hide != HIDDEN) {
                x.hide = FRESH;
            }
        }
        for (int i = 32; i < a.n_fresh; ++i) {
            if (a.fresh[s * a.n_fresh + i] == cell && x.hide != HIDDEN) {
                x.hide = FRESH;
            }
        }
    }

    // the pair's logits, from what was asked for or, for any number of groups, from memory
    __device__ __forceinline__ void score(const uint4 (&quads)[KEPT], int from, int to, float (&out)[PAIR][4]) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int u = 0; u < PAIR; ++u) {
            float y[2][4] = {};
            if constexpr (QUADS > 0) {
#pragma unroll
                for (int i = 0; i < QUADS; ++i) {
                    ahead[u].raw[i].dot(quads[i], y);
                }
            } else if (from + u * FASA_TILE < to) {
                const int n_group = a.n_dom / FASA_GROUP;
#pragma unroll 1
                for (int i = 0; i < (n_group + 3) / 4; ++i) {
                    fasa_tip_raw<K_DOM> raw;
                    raw.load(block(from + u * FASA_TILE), { n_group, i });
                    raw.dot(query.quad(n_group, i), y);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                out[u][i] = y[i / 2][i % 2 * 2] + y[i / 2][i % 2 * 2 + 1];
            }
        }
        if (a.soft_cap > 0.0f) {
#pragma unroll
            for (int i = 0; i < 4 * PAIR; ++i) {
                out[i / 4][i % 4] = fasa_soft_cap(out[i / 4][i % 4], a.soft_cap);
            }
        }
        if (__any_sync(0xffffffff, (ahead[0].hide | ahead[1].hide) != 0)) { // few tiles, as a rule
#pragma unroll
            for (int i = 0; i < 4 * PAIR; ++i) {
                const uint16_t hide = __shfl_sync(0xffffffff, (int) ahead[i / 4].hide, lane / 4 * 4 + i % 4);
                out[i / 4][i % 4]   = hide == HIDDEN ? -INFINITY :
                    hide == FRESH                    ? FASA_FRESH :
                                                       out[i / 4][i % 4] + __half2float(__ushort_as_half(hide));
            }
        }
    }

    // this thread's values of a tile: cells first_cell() to first_cell() + 3 of head first_head()
    static __device__ int first_cell() { return threadIdx.x % 32 / 4 * 4; }
    static __device__ int first_head() { return threadIdx.x % 4; }

    // over the lanes of a head
    static __device__ float most_of(float x) {
#pragma unroll
        for (int by = 16; by >= 4; by /= 2) {
            x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, by));
        }
        return x;
    }
    static __device__ float sum_of(float x) {
#pragma unroll
        for (int by = 16; by >= 4; by /= 2) {
            x += __shfl_xor_sync(0xffffffff, x, by);
        }
        return x;
    }

    // this thread's values of the tile at `from`, in l.x; -inf where it has none
    __device__ __forceinline__ void get(float (&y)[4], int from, int to) const {
        const int cell = from + first_cell(), head = g0 + first_head();
        const float * x = l.x + head * l.x_stride + cell - l.first;
        y[0] = y[1] = y[2] = y[3] = -INFINITY;
        if constexpr (FOURS) {
            if (head < l.n_shared) {
                const float4 v = *(const float4 *) x;
                y[0] = v.x, y[1] = v.y, y[2] = v.z, y[3] = v.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (head < l.n_shared && cell + i < to) {
                    y[i] = x[i];
                }
            }
        }
    }
    __device__ __forceinline__ void put(const float (&y)[4], int from, int to) const {
        const int cell = from + first_cell(), head = g0 + first_head();
        float * x = l.x + head * l.x_stride + cell - l.first;
        if constexpr (FOURS) {
            if (head < l.n_shared && from < to) {                       // all of the tile is read
                asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" // the compiler would write them one by one
                    ::"r"((uint32_t) __cvta_generic_to_shared(x)),
                    "f"(y[0]), "f"(y[1]), "f"(y[2]), "f"(y[3])
                    : "memory");
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (head < l.n_shared && cell + i < to) {
                    x[i] = y[i];
                }
            }
        }
    }

    // logits to exponentials relative to 2^e, added to sum
    __device__ __forceinline__ void exponentials(float (&y)[4], float e, float & sum) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float x = y[i] * LOG2E - e,
                        v = x > -FASA_SPAN_RANGE ? fasa_exp2(x) : 0.0f; // 0 where hidden: -inf or NaN
            sum += v;
            y[i] = y[i] == -INFINITY ? -1.0f : v;
        }
    }

    // The cells from `base` on are read in a round: by every warp n_tile tiles, a span's or some pairs of one
    __device__ int round_tiles(int base) const {
        const int left = (l.last - base + FASA_TILE - 1) / FASA_TILE;
        int n_tile     = TILES;
        while (n_tile > PAIR && left <= TIP_WARPS * n_tile / 2) {
            n_tile /= 2;
        }
        return n_tile;
    }

    __device__ int start(int base, int n_tile) const { return base + (int) threadIdx.x / 32 * n_tile * FASA_TILE; }
    __device__ int end(int from, int n_tile) const { return min(l.last, from + n_tile * FASA_TILE); }

    __device__ __forceinline__ void ask(int from, int to) {
#pragma unroll
        for (int u = 0; u < PAIR; ++u) {
            load(ahead[u], from + u * FASA_TILE, to);
        }
    }

    // Asks for the first tiles: the first time before the step's queries and newest keys are known
    __device__ __forceinline__ void ask_first() {
        base = l.first, n_tile = round_tiles(base);
        ask(start(base, n_tile), end(start(base, n_tile), n_tile));
        stale = make_int2(0, 0);
        if (g0 == 0 && threadIdx.x % 32 < FASA_MAX_RANGES) {
            stale = ((const int2 *) a.ranges)[s * FASA_MAX_RANGES + threadIdx.x % 32];
        }
    }

    // the stale cells that this warp reads
    __device__ __forceinline__ void refresh() {
        if (!__any_sync(0xffffffff, max(stale.x, l.first) < min(stale.y, l.last))) {
            return;
        }
        bool some = false;
#pragma unroll 1
        for (int b = l.first, n = n_tile; b < l.last; b += TIP_WARPS * n * FASA_TILE, n = round_tiles(b)) {
            const int from = start(b, n), to = end(from, n);
            if (__any_sync(0xffffffff, max(stale.x, from) < min(stale.y, to))) {
                fasa_refresh<K_DOM>(a, h, s, stale, from, to, row);
                some = true;
            }
        }
        if (some) {
            ask(start(base, n_tile), end(start(base, n_tile), n_tile));
        }
    }

    // Heads g0 and on
    __device__ __forceinline__ void heads(float * piece) {
        const int warp = threadIdx.x / 32,
                  mine =
                      TIP_WARPS - 1 - warp; // the last warps make the queries ready: the newest cells are rarely theirs
        __syncthreads();                    // the queries before these are not needed any more
        if (mine < TIP_HEADS) {
            query.set(a, mine, h, g0 + mine < l.n_shared ? l.head0 + g0 + mine : -1, l.token, dim, weight, row);
        }
        refresh();
        __syncthreads();
        uint4 quads[KEPT];
#pragma unroll
        for (int i = 0; i < QUADS; ++i) {
            quads[i] = query.quad(a.n_dom / FASA_GROUP, i);
        }
#pragma unroll 1
        while (base < l.last) {
            const int from = start(base, n_tile), to = end(from, n_tile);
            const int base_next = base + TIP_WARPS * n_tile * FASA_TILE, n_next = round_tiles(base_next);
            const int next = start(base_next, n_next), next_to = end(next, n_next);
            float y[4], most = -INFINITY, sum = 0.0f;
#pragma unroll 1
            for (int i = 0; i < n_tile; i += PAIR) {
                const int at  = from + i * FASA_TILE;
                const bool on = i + PAIR < n_tile; // else the next round is asked for
                float pair[PAIR][4];
                score(quads, at, to, pair);
                ask(on ? at + PAIR * FASA_TILE : next, on ? to : next_to);
#pragma unroll
                for (int u = 0; u < PAIR; ++u) {
                    put(pair[u], at + u * FASA_TILE, to);
                    most = fmaxf(fmaxf(most, fmaxf(pair[u][0], pair[u][1])), fmaxf(pair[u][2], pair[u][3]));
                }
            }
            most = most_of(most);
            if (n_tile < TILES) {
                most = together(piece, most, -INFINITY, [](float x, float y) { return fmaxf(x, y); });
            }
            const float e = most == -INFINITY ? -INFINITY : rintf(most * LOG2E);
#pragma unroll 2
            for (int at = from; at < to; at += FASA_TILE) {
                get(y, at, to);
                exponentials(y, most > FASA_FRESH ? e : 0.0f, sum); // a span of fresh cells has none
                put(y, at, to);
            }
            sum = sum_of(sum);
            if (n_tile < TILES) {
                sum = together(piece + TIP_WARPS * TIP_HEADS, sum, 0.0f, [](float x, float y) { return x + y; });
            }
            const int head = g0 + threadIdx.x % 32;
            if (threadIdx.x % 32 < TIP_HEADS && head < l.n_shared && from % FASA_SPAN == 0 && from < l.last) {
                float * of_span = l.tip + (int64_t) head * a.n_len + a.n_kv + from / FASA_SPAN;
                of_span[0] = e, of_span[a.n_span] = sum;
            }
            base = base_next, n_tile = n_next;
        }
    }

    // what the warps of a span have, put together in their order; all warps of the block come here
    template <typename F>
    __device__ __forceinline__ float together(float * piece, float x, float none, F add) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, per = TILES >> (31 - __clz(n_tile)),
                  first = warp & -per;
        if (lane < TIP_HEADS) {
            piece[warp * TIP_HEADS + lane] = x;
        }
        __syncthreads();
        float y = none;
#pragma unroll 1
        for (int w = first; w < first + per; ++w) {
            y = add(y, piece[w * TIP_HEADS + lane % TIP_HEADS]);
        }
        return y;
    }
};

static size_t fasa_tip_smem(int n_dom, int d) {
    return fasa_tip_query_bytes(n_dom) + (size_t) TIP_WARPS * d * sizeof(float);
}

static fasa_tip_args fasa_tip_args_make(const ggml_tensor * tip) {
    const fasa_op_params & p = *fasa_op_get(tip);
    const ggml_tensor *k_dom = tip->src[0], *k = tip->src[1], *q = tip->src[3], *dims = tip->src[4],
                      *mask = tip->src[6];
    fasa_tip_args a         = {};
    a.k_dom                 = (char *) k_dom->data;
    a.k                     = (const char *) k->data;
    a.ranges                = (const int32_t *) tip->src[2]->data;
    a.q                     = (const char *) q->data;
    a.dims                  = (const int32_t *) dims->data;
    a.weight                = (const float *) tip->src[5]->data;
    a.fresh                 = tip->src[7] ? (const int32_t *) tip->src[7]->data : nullptr;
    a.n_fresh               = tip->src[7] ? tip->src[7]->ne[0] : 0;
    a.mask                  = (const char *) mask->data;
    a.k_dom_nb1 = k_dom->nb[1], a.k_dom_nb2 = k_dom->nb[2], a.k_dom_nb3 = k_dom->nb[3];
    a.k_nb1 = k->nb[1], a.k_nb2 = k->nb[2], a.k_nb3 = k->nb[3];
    a.q_nb1 = q->nb[1], a.q_nb2 = q->nb[2];
    a.mask_nb1 = mask->nb[1], a.mask_nb3 = mask->nb[3];
    a.type_k     = k->type;
    a.n_kv       = fasa_tip_n_kv(tip);
    a.n_span     = fasa_n_span(a.n_kv);
    a.n_len      = tip->ne[0];
    a.n_head     = tip->ne[1];
    a.by_n_tps   = init_fastdiv_values(tip->ne[2]);
    a.by_n_group = init_fastdiv_values(tip->ne[1] / dims->ne[1]);
    a.n_dom      = dims->ne[0];
    a.d          = k->ne[0];
    a.n_hadamard = p.n_hadamard;
    a.scale      = p.scale;
    a.soft_cap   = p.soft_cap;
    return a;
}
