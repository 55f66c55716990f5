#pragma once

// TIP: refreshes K_dom of the stale cells, then estimates the logits of every cell from it, for the kernel in fasa-cuda-select.cu.
//
// A warp takes a span of FASA_SPAN cells of one KV head and scores it for four query heads at once, so K_dom is read once for all of
// them. The warp that refreshes a cell is the one that reads it. (Lists of several tokens share
// cells; each refreshes them for itself, with the same bytes.)

#include "fasa-cuda-k-dom.cuh"
#include "fasa-select.h"

static constexpr int TIP_WARPS = 16; // of a block

// What a block works on: the cells [first, last) of one list, `first` at the start of a span.
struct fasa_tip_list {
    int     token, head0, n_shared; // n_shared query heads from head0 on
    int     first, last;
    float * x;                      // [n_shared][x_stride] exp(logit)/2^e of every cell from `first` on, -1: hidden
    int64_t x_stride;
    float * tip;                    // the rows of the list in the TIP node's memory; their ends take e and sum of every span
};

// TIP of a list. smem: room for the queries and rows of warps (fasa_tip_smem); piece [2][TIP_WARPS][TIP_HEADS]. A warp takes a span,
// or where fewer spans than warps are left a piece of one.
// QUADS: groups of a cell by fours, asked for ahead; 0: any number. FOURS: l.x may be read and written by fours, up to the end of a tile.
template <int K_DOM, int QUADS, bool FOURS> struct fasa_tip_block {
    static constexpr bool MMA   = TIP_MMA<K_DOM>;
    static constexpr int  TILES = FASA_SPAN/FASA_TILE;
    static constexpr int  KEPT  = QUADS > 0 ? QUADS : 1;
    static constexpr int  AHEAD = MMA ? 2 : 1; // tiles that are asked for at once

    const fasa_tip_args & a;
    const fasa_tip_list & l;
    fasa_tip_query<K_DOM> query;
    float          * row;
    char           * blocks;
    const uint16_t * mask; // f16 bits
    int h, s, g0 = 0;

    struct tile {
        fasa_tip_raw<K_DOM> raw[KEPT];
        uint16_t hide; // of cell `lane`
    };
    static constexpr uint16_t HIDDEN = 0xfc00; // -inf

    __device__ fasa_tip_block(const fasa_tip_args & a, const fasa_tip_list & l, char * smem) : a(a), l(l), query(smem) {
        const uint2 st = fast_div_modulo(l.token, a.by_n_tps);
        const int   t = st.y;
        s = st.x, h = fastdiv(l.head0, a.by_n_group);
        row    = (float *) (smem + fasa_tip_query<K_DOM>::bytes(a.n_dom)) + threadIdx.x/32*a.d;
        blocks = a.k_dom + s*a.k_dom_nb3 + h*a.k_dom_nb2;
        mask   = (const uint16_t *) (a.mask + s*a.mask_nb3 + t*a.mask_nb1);
    }

    __device__ __forceinline__ const char * block(int cell) const {
        return blocks + (uint64_t) ((uint32_t) cell/FASA_TILE)*(uint32_t) a.k_dom_nb1;
    }

    // the tile at `from`; nothing of it, and all cells hidden, from `to` on
    __device__ __forceinline__ void load(tile & x, int from, int to) const {
        const int cell = from + threadIdx.x % 32;
        x.hide = HIDDEN;
        if (from < to) {
#pragma unroll
            for (int i = 0; i < KEPT && QUADS > 0; ++i) {
                x.raw[i].load(block(from), a.n_dom/FASA_GROUP, i);
            }
            if (cell < to) {
                x.hide = mask[cell];
            }
        }
    }

    // the tile's logits, by the tensor cores, from what is in x or, for any number of groups, from memory
    __device__ __forceinline__ void score(const tile & x, const fasa_tip_quad (&quads)[KEPT], int from, int to, float (&out)[4]) const {
        const int lane = threadIdx.x % 32;
        float y[4][4] = {};
        if constexpr (QUADS > 0) {
#pragma unroll
            for (int i = 0; i < QUADS; ++i) {
                x.raw[i].dot(quads[i], y);
            }
        } else if (from < to) {
            const int n_group = a.n_dom/FASA_GROUP;
#pragma unroll 1
            for (int i = 0; i < (n_group + 3)/4; ++i) {
                fasa_tip_raw<K_DOM> raw;
                fasa_tip_quad       quad;
                raw.load(block(from), n_group, i);
                quad.set(query, n_group, i);
                raw.dot(quad, y);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) { // slot j of the neighbour t ^ j is this thread's head
            const float pair = y[i][1] + __shfl_xor_sync(0xffffffff, y[i][3], 2);
            out[i] = y[i][0] + __shfl_xor_sync(0xffffffff, y[i][2], 2) + __shfl_xor_sync(0xffffffff, pair, 1);
        }
        if (a.soft_cap > 0.0f) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                out[i] = fasa_soft_cap(out[i], a.soft_cap);
            }
        }
        if (__any_sync(0xffffffff, x.hide != 0)) { // few tiles, as a rule
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                out[i] = hidden(out[i], __shfl_sync(0xffffffff, (int) x.hide, lane/4*4 + i));
            }
        }
    }

    static __device__ float hidden(float y, uint16_t hide) {
        return hide == HIDDEN ? -INFINITY : y + __half2float(__ushort_as_half(hide));
    }

    // two tiles' logits, lane = cell
    __device__ __forceinline__ void score_cells(int from, int to, float (&out)[2][4]) const {
        const char * const pair[2] = { block(from), block(from + FASA_TILE < to ? from + FASA_TILE : from) };
#pragma unroll
        for (int u = 0; u < 2; ++u) {
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                out[u][m] = 0.0f;
            }
        }
        if (from < to) {
            fasa_tip_cells<K_DOM>(query, a.n_dom, pair, out);
        }
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            const int cell = from + u*FASA_TILE + (int) threadIdx.x % 32;
            const uint16_t hide = cell < to ? mask[cell] : HIDDEN;
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                out[u][m] = hidden(a.soft_cap > 0.0f ? fasa_soft_cap(out[u][m], a.soft_cap) : out[u][m], hide);
            }
        }
    }

    // over the lanes that hold values of the same head
    static __device__ float most_of(float x) {
#pragma unroll
        for (int half = 16; half >= (MMA ? 4 : 1); half /= 2) {
            x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, half));
        }
        return x;
    }
    static __device__ float sum_of(float x) {
#pragma unroll
        for (int half = 16; half >= (MMA ? 4 : 1); half /= 2) {
            x += __shfl_xor_sync(0xffffffff, x, half);
        }
        return x;
    }

    static __device__ float exponent(float most) { return most == -INFINITY ? -INFINITY : rintf(most*LOG2E); }

    // this thread's values of the tile at `from`, in l.x; -inf where it has none
    __device__ __forceinline__ void get(float (&y)[4], int from, int to) const {
        const int cell = from + first_cell(), head = g0 + first_head();
        const float * x = l.x + head*(int) l.x_stride + cell - l.first;
        y[0] = y[1] = y[2] = y[3] = -INFINITY;
        if constexpr (MMA && FOURS) {
            if (head < l.n_shared) {
                const float4 v = *(const float4 *) x;
                y[0] = v.x, y[1] = v.y, y[2] = v.z, y[3] = v.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (head + (MMA ? 0 : i) < l.n_shared && cell + (MMA ? i : 0) < to) {
                    y[i] = x[MMA ? i : i*l.x_stride];
                }
            }
        }
    }
    __device__ __forceinline__ void put(const float (&y)[4], int from, int to) const {
        const int cell = from + first_cell(), head = g0 + first_head();
        float * x = l.x + head*(int) l.x_stride + cell - l.first;
        if constexpr (MMA && FOURS) {
            if (head < l.n_shared && from < to) {
                asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" // the compiler would write them one by one
                    :: "r"((uint32_t) __cvta_generic_to_shared(x)), "f"(y[0]), "f"(y[1]), "f"(y[2]), "f"(y[3]) : "memory");
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (head + (MMA ? 0 : i) < l.n_shared && (FOURS ? from < to : cell + (MMA ? i : 0) < to)) { // FOURS: all of the tile is read
                    x[MMA ? i : i*l.x_stride] = y[i];
                }
            }
        }
    }
    static __device__ int first_cell() { return MMA ? threadIdx.x % 32/4*4 : threadIdx.x % 32; }
    static __device__ int first_head() { return MMA ? threadIdx.x % 4 : 0; }

    // logits to exponentials relative to 2^e, added to sum
    __device__ __forceinline__ void exponentials(float (&y)[4], const float * e, float * sum) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float x = y[i]*LOG2E - e[MMA ? 0 : i], v = x > -FASA_SPAN_RANGE ? fasa_exp2(x) : 0.0f; // 0 where hidden: -inf or NaN
            sum[MMA ? 0 : i] += v;
            y[i] = y[i] == -INFINITY ? -1.0f : v;
        }
    }

    // e and sum of head g0 + m over a span
    __device__ void write(int m, int span, float e, float sum) const {
        float * row = l.tip + (int64_t) (g0 + m)*a.n_len + a.n_kv;
        row[span] = e, row[a.n_span + span] = sum;
    }

    // The cells from `base` on are read in a round: by every warp n_tile tiles, a span's or a part of one
    __device__ int round_tiles(int base) const {
        const int left = (l.last - base + FASA_TILE - 1)/FASA_TILE;
        int n_tile = TILES;
        while (n_tile > 1 && left <= TIP_WARPS*n_tile/2) {
            n_tile /= 2;
        }
        return n_tile;
    }

    // Heads g0 and on
    __device__ void heads(float * piece) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x/32;
        constexpr int OWN = MMA ? 1 : TIP_HEADS, OWN_LANES = MMA ? TIP_HEADS : 1; // heads of a thread, lanes that have them all
        const auto start = [&](int base, int n_tile) { return base + warp*n_tile*FASA_TILE; };
        const auto end   = [&](int from, int n_tile) { return min(l.last, from + n_tile*FASA_TILE); };
        tile ahead[AHEAD]; // the first one is worked on next
        const auto next_tile = [&](int from, int to) { // moved on, not counted through: that would be as many copies of the code around it
#pragma unroll
            for (int u = 0; u + 1 < AHEAD; ++u) {
                ahead[u] = ahead[u + 1];
            }
            load(ahead[AHEAD - 1], from, to);
        };
        const auto ask = [&](int base, int n_tile) {
            const int from = start(base, n_tile);
#pragma unroll 1
            for (int u = 0; u < AHEAD && MMA; ++u) {
                next_tile(from + u*FASA_TILE, end(from, n_tile));
            }
        };
        typename fasa_tip_query<K_DOM>::raw head; // warp m makes column m
        if (warp < TIP_HEADS) {
            head.load(a, h, g0 + warp < l.n_shared ? l.head0 + g0 + warp : -1, l.token);
        }
        int base = l.first, n_tile = round_tiles(base);
        ask(base, n_tile);
        int2 stale = make_int2(0, 0); // a range of each lane
        if (g0 == 0 && lane < FASA_MAX_RANGES) {
            stale = ((const int2 *) a.ranges)[s*FASA_MAX_RANGES + lane];
        }
        __syncthreads();
        if (warp < TIP_HEADS) {
            query.set(a, warp, h, head, row);
        }
        if (__any_sync(0xffffffff, max(stale.x, l.first) < min(stale.y, l.last))) {
            bool some = false;
#pragma unroll 1
            for (int b = l.first, n = n_tile; b < l.last; b += TIP_WARPS*n*FASA_TILE, n = round_tiles(b)) { // a warp refreshes what it reads
                const int from = start(b, n), to = end(from, n);
                if (__any_sync(0xffffffff, max(stale.x, from) < min(stale.y, to))) {
                    fasa_refresh<K_DOM>(a, h, s, stale, from, to, row);
                    some = true;
                }
            }
            if (some) {
                ask(base, n_tile);
            }
        }
        __syncthreads();
        fasa_tip_quad quads[KEPT];
#pragma unroll
        for (int i = 0; i < KEPT && MMA && QUADS > 0; ++i) {
            quads[i].set(query, a.n_dom/FASA_GROUP, i);
        }
#pragma unroll 1
        while (base < l.last) {
            const int from = start(base, n_tile), to = end(from, n_tile);
            const int base_next = base + TIP_WARPS*n_tile*FASA_TILE, n_next = round_tiles(base_next);
            const int next = start(base_next, n_next), next_to = end(next, n_next);
            float y[4], most[OWN], sum[OWN], e[OWN];
#pragma unroll
            for (int m = 0; m < OWN; ++m) {
                most[m] = -INFINITY, sum[m] = 0.0f;
            }
            const auto keep = [&](float (&y)[4], int at) {
                put(y, at, to);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    most[MMA ? 0 : j] = fmaxf(most[MMA ? 0 : j], y[j]);
                }
            };
#pragma unroll 1
            for (int i = 0; i < n_tile; i += MMA ? 1 : 2) {
                const int at = from + i*FASA_TILE;
                if constexpr (MMA) {
                    const int on = i + AHEAD - n_tile; // `on`: of the next round
                    score(ahead[0], quads, at, to, y);
                    next_tile(on < 0 ? at + AHEAD*FASA_TILE : next + on*FASA_TILE, on < 0 ? to : next_to);
                    keep(y, at);
                } else {
                    float pair[2][4];
                    score_cells(at, to, pair);
                    keep(pair[0], at);
                    keep(pair[1], at + FASA_TILE);
                }
            }
            if (n_tile < AHEAD) { // the next round's were not all asked for, or elsewhere
                ask(base_next, n_next);
            }
#pragma unroll
            for (int m = 0; m < OWN; ++m) {
                most[m] = most_of(most[m]);
            }
            if (n_tile < TILES) {
                together(n_tile, piece, most, -INFINITY, [](float x, float y) { return fmaxf(x, y); });
            }
#pragma unroll
            for (int m = 0; m < OWN; ++m) {
                e[m] = exponent(most[m]);
            }
#pragma unroll 2
            for (int at = from; at < to; at += FASA_TILE) {
                get(y, at, to);
                exponentials(y, e, sum);
                put(y, at, to);
            }
#pragma unroll
            for (int m = 0; m < OWN; ++m) {
                sum[m] = sum_of(sum[m]);
            }
            if (n_tile < TILES) {
                together(n_tile, piece + TIP_WARPS*TIP_HEADS, sum, 0.0f, [](float x, float y) { return x + y; });
            }
            if (lane < OWN_LANES && from%FASA_SPAN == 0 && from < l.last) {
#pragma unroll
                for (int m = 0; m < OWN; ++m) {
                    if (g0 + lane + m < l.n_shared) {
                        write(lane + m, from/FASA_SPAN, e[m], sum[m]);
                    }
                }
            }
            base = base_next, n_tile = n_next;
        }
    }

    // what the warps of a span have, put together in their order; all warps of the block come here
    template <typename F> static __device__ void together(int n_tile, float * piece, float * x, float none, F add) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x/32, per = TILES/n_tile;
        if (lane < (MMA ? TIP_HEADS : 1)) {
#pragma unroll
            for (int m = 0; m < (MMA ? 1 : TIP_HEADS); ++m) {
                piece[warp*TIP_HEADS + lane + m] = x[m];
            }
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < (MMA ? 1 : TIP_HEADS); ++m) {
            x[m] = none;
#pragma unroll 1
            for (int w = warp/per*per; w < warp/per*per + per; ++w) {
                x[m] = add(x[m], piece[w*TIP_HEADS + (MMA ? lane%4 : m)]);
            }
        }
    }

    __device__ void run(float * piece) {
#pragma unroll 1
        for (g0 = 0; g0 < l.n_shared; g0 += TIP_HEADS) {
            heads(piece);
        }
    }
};

template <int K_DOM> static size_t fasa_tip_smem(int n_dom, int d) {
    return fasa_tip_query<K_DOM>::bytes(n_dom) + (size_t) TIP_WARPS*d*sizeof(float);
}

static fasa_tip_args fasa_tip_args_make(const ggml_tensor * tip) {
    const fasa_op_params & p = *fasa_op_get(tip);
    const ggml_tensor * k_dom = tip->src[0], * k = tip->src[1], * q = tip->src[3], * dims = tip->src[4], * mask = tip->src[6];
    fasa_tip_args a = {};
    a.k_dom  = (char *) k_dom->data;
    a.k      = (const char *) k->data;
    a.ranges = (const int32_t *) tip->src[2]->data;
    a.q      = (const char *) q->data;
    a.dims   = (const int32_t *) dims->data;
    a.weight = (const float *) tip->src[5]->data;
    a.mask   = (const char *) mask->data;
    a.k_dom_nb1 = k_dom->nb[1], a.k_dom_nb2 = k_dom->nb[2], a.k_dom_nb3 = k_dom->nb[3];
    a.k_nb1  = k->nb[1], a.k_nb2 = k->nb[2], a.k_nb3 = k->nb[3];
    a.q_nb1  = q->nb[1], a.q_nb2 = q->nb[2];
    a.mask_nb1 = mask->nb[1], a.mask_nb3 = mask->nb[3];
    a.type_k  = k->type;
    a.n_kv    = fasa_tip_n_kv(tip);
    a.n_span  = fasa_n_span(a.n_kv);
    a.n_len   = tip->ne[0];
    a.n_head  = tip->ne[1];
    a.n_group = tip->ne[1]/dims->ne[1];
    a.n_tps   = tip->ne[2];
    a.by_n_tps   = init_fastdiv_values(a.n_tps);
    a.by_n_group = init_fastdiv_values(a.n_group);
    a.n_dom   = dims->ne[0];
    a.d       = k->ne[0];
    a.n_hadamard = p.n_hadamard;
    a.scale    = p.scale;
    a.soft_cap = p.soft_cap;
    return a;
}
