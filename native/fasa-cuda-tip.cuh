#pragma once

// TIP: refreshes K_dom of the stale cells, then estimates the logits of every cell from it, for the kernel in fasa-cuda-select.cu.
//
// A warp takes a span of FASA_SPAN cells of one KV head, lane = cell, two tiles at a time, and scores it for M query heads at once,
// so K_dom is read once for all of them. The warp that refreshes a cell is the one that reads it. (Lists of several tokens share
// cells; each refreshes them for itself, with the same bytes.)

#include "fasa-cuda-row.cuh"
#include "fasa-ops.h"
#include "fasa-select.h"

struct fasa_tip_args {
    char          * k_dom;                   // [block, n_tile, n_head_kv, n_stream]
    const char    * k;
    const int32_t * ranges;                  // [2*FASA_MAX_RANGES, n_stream]
    const char    * q;
    const int32_t * dims;                    // [n_dom, n_head_kv]
    const float   * weight;                  // [n_dom, n_head_kv]
    const char    * mask;
    int64_t k_dom_nb1, k_dom_nb2, k_dom_nb3; // bytes
    int64_t k_nb1, k_nb2, k_nb3, q_nb1, q_nb2, mask_nb1, mask_nb3;
    ggml_type type_k;
    int n_kv, n_span, n_len, n_head, n_group, n_tps, n_dom, d, n_hadamard;
    float scale, soft_cap;
};

// orthonormal Walsh-Hadamard transform of blocks of row [d] in shared memory, by one warp
static __device__ void fasa_hadamard(float * row, int d, int n_block) {
    const int lane = threadIdx.x % 32;
    const float scale = rsqrtf(n_block);
    for (int h = 1; h < n_block; h *= 2) {
        __syncwarp();
        for (int i = lane; i < d/2; i += 32) {
            const int j = i/h*2*h + i%h;
            if (j/n_block*n_block + n_block <= d) {
                const float u = row[j], w = row[j + h];
                row[j] = u + w, row[j + h] = u - w;
            }
        }
    }
    __syncwarp();
    for (int i = lane; i < d/n_block*n_block; i += 32) {
        row[i] *= scale;
    }
    __syncwarp();
}

// one cell's dominant values, from its row [d] in shared memory to its block, by one warp
template <int K_DOM> static __device__ void fasa_k_dom_write(int n_dom, const int32_t * dims, const float * row, char * block, int cell) {
    const int lane = threadIdx.x % 32;
    char * data = block + fasa_block_scales(K_DOM, n_dom);
    for (int i = lane; K_DOM == FASA_K_DOM_F16 && i < n_dom; i += 32) {
        ((half *) data)[i*FASA_TILE + cell] = __float2half_rn(dims[i] < 0 ? 0.0f : row[dims[i]]);
    }
    for (int g = lane; K_DOM != FASA_K_DOM_F16 && g < n_dom/FASA_GROUP; g += 32) {
        float x[FASA_GROUP], most = 0.0f; // the value of largest magnitude, with its sign
#pragma unroll
        for (int i = 0; i < FASA_GROUP; ++i) {
            const int dim = dims[g*FASA_GROUP + i];
            x[i] = dim < 0 ? 0.0f : row[dim];
            most = fabsf(x[i]) > fabsf(most) ? x[i] : most;
        }
        const half  scale = __float2half_rn(K_DOM == FASA_K_DOM_Q8 ? __fdiv_rn(fabsf(most), 127.0f) : most*-0.125f);
        const float step  = __half2float(scale);
        const float inv   = step != 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
        ((half *) block)[g*FASA_TILE + cell] = scale;
        if (K_DOM == FASA_K_DOM_Q8) {
#pragma unroll
            for (int i = 0; i < FASA_GROUP; ++i) {
                ((int8_t *) data)[((2*g + i/4)*FASA_TILE + cell)*4 + i%4] = (int8_t) fminf(127.0f, fmaxf(-127.0f, roundf(x[i]*inv)));
            }
        } else {
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t lo = fminf(15.0f, fmaxf(0.0f, floorf(x[i]*inv + 8.5f))), hi = fminf(15.0f, fmaxf(0.0f, floorf(x[i + 4]*inv + 8.5f)));
                word |= (lo | hi << 4) << 8*i;
            }
            ((uint32_t *) data)[g*FASA_TILE + cell] = word;
        }
    }
}

// the stale cells of [first, last), by one warp; few as a rule, so not in the way of the code around it
template <int K_DOM> static __device__ __noinline__ void fasa_refresh(const fasa_tip_args & a, int h, int s, int first, int last, float * row) {
    const int lane = threadIdx.x % 32;
    const int32_t * range = a.ranges + s*2*FASA_MAX_RANGES;
    int from = 0, to = 0;
    if (lane < FASA_MAX_RANGES) {
        from = max(range[2*lane], first), to = min(range[2*lane + 1], last);
    }
    for (uint32_t some = __ballot_sync(0xffffffff, from < to); some != 0; some &= some - 1) {
        const int r = __ffs(some) - 1;
        for (int cell = __shfl_sync(0xffffffff, from, r); cell < __shfl_sync(0xffffffff, to, r); ++cell) {
            const char * src = a.k + s*a.k_nb3 + cell*a.k_nb2 + h*a.k_nb1;
            __syncwarp();
            for (int dim = 8*lane; dim < a.d; dim += 256) {
                float x[8];
                fasa_load8(a.type_k, src, dim, x);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    row[dim + i] = x[i];
                }
            }
            __syncwarp();
            if (a.n_hadamard > 0) {
                fasa_hadamard(row, a.d, a.n_hadamard);
            }
            fasa_k_dom_write<K_DOM>(a.n_dom, a.dims + h*a.n_dom, row, a.k_dom + s*a.k_dom_nb3 + h*a.k_dom_nb2 + cell/FASA_TILE*a.k_dom_nb1, cell%FASA_TILE);
        }
    }
    __syncwarp();
}

// The dominant part of M columns in shared memory: times weight and scale, beside q8 and q4 keys in 8 bits. A dot product of
// bytes begins at the bits of 1.5*2^23, so that it is read back as a float by one subtraction, and, beside q4, at -8 times
// the sum of the query's bytes (a nibble n stands for n - 8).
template <int K_DOM, int M> struct fasa_tip_query {
    static constexpr int ZERO = 0x4b400000;

    float * x;    // [M][n_dom]            f16
    int4  * word; // [M][n_dom/FASA_GROUP] q8, q4: 8 int8, the bits of their scale, the start of the dot product

    static __host__ __device__ size_t bytes(int n_dom) { return K_DOM == FASA_K_DOM_F16 ? M*n_dom*4 : M*n_dom*2; }

    __device__ fasa_tip_query(char * smem) : x((float *) smem), word((int4 *) smem) {
    }

    // column m from the query head `head` of token `token`, by one warp; head < 0: nothing
    __device__ void set(const fasa_tip_args & a, int m, int h, int head, int64_t token, float * row) {
        const int lane = threadIdx.x % 32;
        __syncwarp();
        for (int i = lane; i < a.d; i += 32) {
            row[i] = head < 0 ? 0.0f : ((const float *) (a.q + token*a.q_nb2 + head*a.q_nb1))[i];
        }
        __syncwarp();
        if (a.n_hadamard > 0) {
            fasa_hadamard(row, a.d, a.n_hadamard);
        }
        const int32_t * dims   = a.dims   + h*a.n_dom;
        const float   * weight = a.weight + h*a.n_dom;
        for (int i = lane; K_DOM == FASA_K_DOM_F16 && i < a.n_dom; i += 32) {
            x[m*a.n_dom + i] = dims[i] < 0 ? 0.0f : row[dims[i]]*weight[i]*a.scale;
        }
        for (int g = lane; K_DOM != FASA_K_DOM_F16 && g < a.n_dom/FASA_GROUP; g += 32) {
            float v[FASA_GROUP], most = 0.0f;
#pragma unroll
            for (int i = 0; i < FASA_GROUP; ++i) {
                const int dim = dims[g*FASA_GROUP + i];
                v[i] = dim < 0 ? 0.0f : row[dim]*weight[g*FASA_GROUP + i]*a.scale;
                most = fmaxf(most, fabsf(v[i]));
            }
            const float step = __fdiv_rn(most, 127.0f), inv = step > 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
            uint32_t w[2] = { 0, 0 };
            int sum = 0;
#pragma unroll
            for (int i = 0; i < FASA_GROUP; ++i) {
                const int b = (int) fminf(127.0f, fmaxf(-127.0f, roundf(v[i]*inv)));
                sum    += b;
                w[i/4] |= (uint32_t) (b & 255) << 8*(i%4);
            }
            word[m*(a.n_dom/FASA_GROUP) + g] = make_int4(w[0], w[1], __float_as_int(step), ZERO - (K_DOM == FASA_K_DOM_Q4 ? 8*sum : 0));
        }
    }
};

// logits [2][M] of a cell of each of two tiles (lane = cell); GROUPS: number of groups of a cell, asked for at once; 0: any number
template <int K_DOM, int M, int GROUPS>
static __device__ __forceinline__ void fasa_tip_cells(const fasa_tip_query<K_DOM, M> & q, int n_dom, const char * const block[2], float out[2][M]) {
    const int lane = threadIdx.x % 32, n_group = n_dom/FASA_GROUP;
    const size_t data = fasa_block_scales(K_DOM, n_dom);
#pragma unroll
    for (int m = 0; m < M; ++m) {
        out[0][m] = out[1][m] = 0.0f;
    }
    constexpr int WORDS = K_DOM == FASA_K_DOM_F16 ? 4 : K_DOM == FASA_K_DOM_Q8 ? 2 : 1; // of a group
    const auto load = [&](int g, uint32_t v[2][WORDS], half s[2]) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            if constexpr (K_DOM == FASA_K_DOM_F16) {
#pragma unroll
                for (int i = 0; i < FASA_GROUP/2; ++i) {
                    const uint16_t * x = (const uint16_t *) (block[u] + data) + (g*FASA_GROUP + 2*i)*FASA_TILE + lane;
                    v[u][i] = x[0] | (uint32_t) x[FASA_TILE] << 16;
                }
            } else {
                s[u] = ((const half *) block[u])[g*FASA_TILE + lane];
#pragma unroll
                for (int i = 0; i < WORDS; ++i) {
                    v[u][i] = ((const uint32_t *) (block[u] + data))[(g*WORDS + i)*FASA_TILE + lane];
                }
            }
        }
    };
    const auto group = [&](int g, const uint32_t v[2][WORDS], const half s[2]) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            if constexpr (K_DOM == FASA_K_DOM_F16) {
#pragma unroll
                for (int i = 0; i < FASA_GROUP/2; ++i) {
                    const float2 x = *(const float2 *) &q.x[m*n_dom + g*FASA_GROUP + 2*i];
#pragma unroll
                    for (int u = 0; u < 2; ++u) {
                        const float2 k = __half22float2(*(const half2 *) &v[u][i]);
                        out[u][m] += k.x*x.x + k.y*x.y;
                    }
                }
            } else {
                const int4 w = q.word[m*n_group + g];
#pragma unroll
                for (int u = 0; u < 2; ++u) {
                    const int lo = K_DOM == FASA_K_DOM_Q4 ? v[u][0] & 0x0f0f0f0f : v[u][0], hi = K_DOM == FASA_K_DOM_Q4 ? v[u][0] >> 4 & 0x0f0f0f0f : v[u][1];
                    const int dot = __dp4a(hi, w.y, __dp4a(lo, w.x, w.w));
                    out[u][m] += (__int_as_float(dot) - 12582912.0f)*(__half2float(s[u])*__int_as_float(w.z));
                }
            }
        }
    };
    if constexpr (GROUPS > 0) {
        uint32_t v[GROUPS][2][WORDS];
        half     s[GROUPS][2];
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            load(g, v[g], s[g]);
        }
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            group(g, v[g], s[g]);
        }
    } else {
#pragma unroll 2
        for (int g = 0; g < n_group; ++g) {
            uint32_t v[2][WORDS];
            half     s[2] = {};
            load(g, v, s);
            group(g, v, s);
        }
    }
}

// What a block works on: the cells [first, last) of one list, `first` at the start of a span.
struct fasa_tip_list {
    int     token, head0, n_shared; // n_shared query heads from head0 on
    int     first, last;
    float * x;                      // [n_shared][x_stride] exp(logit)/2^e of every cell from `first` on, -1: hidden
    int64_t x_stride;
    float * tip;                    // the rows of the list in the TIP node's memory; their ends take e and sum of every span
};

// TIP of a list. smem: room for the queries and a row for every warp (fasa_tip_smem); piece [2][n_warp][M]. A warp takes a span,
// or where the block has fewer spans than warps a piece of one.
template <int K_DOM, int M, int GROUPS> struct fasa_tip_block {
    const fasa_tip_args & a;
    const fasa_tip_list & l;
    fasa_tip_query<K_DOM, M> query;
    float      * row;
    char       * blocks;
    const half * mask;
    int h, s, g0 = 0;

    __device__ fasa_tip_block(const fasa_tip_args & a, const fasa_tip_list & l, char * smem) : a(a), l(l), query(smem) {
        const int t = l.token%a.n_tps;
        s = l.token/a.n_tps, h = l.head0/a.n_group;
        row    = (float *) (smem + fasa_tip_query<K_DOM, M>::bytes(a.n_dom)) + threadIdx.x/32*a.d;
        blocks = a.k_dom + s*a.k_dom_nb3 + h*a.k_dom_nb2;
        mask   = (const half *) (a.mask + s*a.mask_nb3 + t*a.mask_nb1);
        const int64_t end = (l.last + FASA_TILE - 1)/FASA_TILE*a.k_dom_nb1;
        for (int64_t i = l.first/FASA_TILE*a.k_dom_nb1 + threadIdx.x*128; i < end; i += blockDim.x*128) {
            asm volatile("prefetch.global.L2 [%0];" :: "l"(blocks + i)); // while the queries are made ready
        }
    }

    // logits of cells [from, to), one warp; top: the largest that this lane saw
    __device__ void logits(int from, int to, float top[M]) {
        const int lane = threadIdx.x % 32;
        if (g0 == 0) {
            fasa_refresh<K_DOM>(a, h, s, from, to, row);
        }
#pragma unroll 1
        for (int tile = from; tile < to; tile += 2*FASA_TILE) {
            const char * const first = blocks + tile/FASA_TILE*a.k_dom_nb1;
            const char * const block[2] = { first, tile + FASA_TILE < to ? first + a.k_dom_nb1 : first };
            float hide[2], y[2][M];
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const int cell = tile + u*FASA_TILE + lane;
                hide[u] = cell < to ? __half2float(mask[cell]) : -INFINITY;
            }
            fasa_tip_cells<K_DOM, M, GROUPS>(query, a.n_dom, block, y);
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const int cell = tile + u*FASA_TILE + lane;
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    const float v = a.soft_cap > 0.0f ? fasa_soft_cap(y[u][m], a.soft_cap) : y[u][m], logit = hide[u] > -INFINITY ? v + hide[u] : -INFINITY;
                    top[m] = fmaxf(top[m], logit);
                    if (cell < to && g0 + m < l.n_shared) {
                        l.x[(g0 + m)*l.x_stride + cell - l.first] = logit;
                    }
                }
            }
        }
    }

    // logits of head g0 + m to exponentials relative to 2^e; returns their sum
    __device__ float exponentials(int from, int to, int m, float e) const {
        float sum = 0.0f, * x = l.x + (g0 + m)*l.x_stride - l.first;
#pragma unroll 4
        for (int cell = from + threadIdx.x % 32; cell < to; cell += 32) {
            const float logit = x[cell], y = logit*LOG2E - e, v = y > -FASA_SPAN_RANGE ? fasa_exp2(y) : 0.0f;
            x[cell] = logit == -INFINITY ? -1.0f : v;
            sum += v; // 0 where the cell is hidden: -inf - e, or NaN
        }
        return fasa_warp_sum(sum);
    }

    __device__ void write(int m, int span, float e, float sum) const {
        float * row = l.tip + (int64_t) (g0 + m)*a.n_len + a.n_kv;
        row[span] = e, row[a.n_span + span] = sum;
    }

    static __device__ float exponent(float most) { return most == -INFINITY ? -INFINITY : rintf(most*LOG2E); }

    __device__ void spans() {
        const int lane = threadIdx.x % 32, warp = threadIdx.x/32, n_warp = blockDim.x/32;
        for (int from = l.first + warp*FASA_SPAN; from < l.last; from += n_warp*FASA_SPAN) {
            const int to = min(l.last, from + FASA_SPAN);
            float top[M];
#pragma unroll
            for (int m = 0; m < M; ++m) {
                top[m] = -INFINITY;
            }
            logits(from, to, top);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                if (g0 + m < l.n_shared) {
                    const float e = exponent(fasa_warp_max(top[m])), sum = exponentials(from, to, m, e);
                    if (lane == 0) {
                        write(m, from/FASA_SPAN, e, sum);
                    }
                }
            }
        }
    }

    // n_tile tiles for every warp, less than a span
    __device__ void pieces(int n_tile, float * piece) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x/32, n_warp = blockDim.x/32, per = FASA_SPAN/FASA_TILE/n_tile; // pieces of a span
        const int from = l.first + warp*n_tile*FASA_TILE, to = min(l.last, from + n_tile*FASA_TILE);
        float top[M], * sums = piece + n_warp*M;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            top[m] = -INFINITY;
        }
        logits(from, to, top);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const float most = fasa_warp_max(top[m]);
            if (lane == 0) {
                piece[warp*M + m] = most;
            }
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < M; ++m) {
            float most = -INFINITY;
            for (int w = warp/per*per; w < warp/per*per + per; ++w) {
                most = fmaxf(most, piece[w*M + m]);
            }
            const float sum = g0 + m < l.n_shared ? exponentials(from, to, m, exponent(most)) : 0.0f;
            if (lane == 0) {
                sums[warp*M + m] = sum;
            }
        }
        __syncthreads();
        const int m = threadIdx.x%M, first = threadIdx.x/M*per, span = l.first/FASA_SPAN + threadIdx.x/M;
        if (first < n_warp && span*FASA_SPAN < l.last && g0 + m < l.n_shared) {
            float most = -INFINITY, sum = 0.0f;
            for (int w = first; w < first + per; ++w) {
                most = fmaxf(most, piece[w*M + m]);
                sum += sums[w*M + m];
            }
            write(m, span, exponent(most), sum);
        }
    }

    __device__ void run(float * piece) {
        const int warp = threadIdx.x/32, n_warp = blockDim.x/32;
        int n_tile = FASA_SPAN/FASA_TILE;
        while (n_tile > 1 && (l.last - l.first + FASA_TILE - 1)/FASA_TILE <= n_warp*n_tile/2) {
            n_tile /= 2;
        }
        for (g0 = 0; g0 < l.n_shared; g0 += M) {
            __syncthreads();
            for (int m = warp; m < M; m += n_warp) {
                query.set(a, m, h, g0 + m < l.n_shared ? l.head0 + g0 + m : -1, l.token, row);
            }
            __syncthreads();
            if (n_tile < FASA_SPAN/FASA_TILE) {
                pieces(n_tile, piece);
            } else {
                spans();
            }
        }
    }
};

template <int K_DOM, int M> static size_t fasa_tip_smem(int n_dom, int d, int n_warp) {
    return fasa_tip_query<K_DOM, M>::bytes(n_dom) + (size_t) n_warp*d*sizeof(float);
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
    a.n_dom   = dims->ne[0];
    a.d       = k->ne[0];
    a.n_hadamard = p.n_hadamard;
    a.scale    = p.scale;
    a.soft_cap = p.soft_cap;
    return a;
}
