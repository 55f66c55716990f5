#pragma once

// K_dom as the kernels see it: the dominant values of the stale cells written, queries made ready for it, and their products with a tile of it.

#include "fasa-cuda-row.cuh"
#include "fasa-ops.h"

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
    uint3 by_n_tps, by_n_group; // fastdiv
    float scale, soft_cap;
};

// orthonormal Walsh-Hadamard transform of blocks of row [d] in shared memory, by one warp
static __device__ __noinline__ void fasa_hadamard(float * row, int d, int n_block) {
    const int lane = threadIdx.x % 32;
    const float scale = rsqrtf(n_block);
#pragma unroll 1
    for (int h = 1; h < n_block; h *= 2) {
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < d/2; i += 32) {
            const int j = i/h*2*h + i%h;
            if (j/n_block*n_block + n_block <= d) {
                const float u = row[j], w = row[j + h];
                row[j] = u + w, row[j + h] = u - w;
            }
        }
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < d/n_block*n_block; i += 32) {
        row[i] *= scale;
    }
    __syncwarp();
}

// The dimensions that a lane writes of every cell: those of group `lane` with scales, else every 32nd
template <int K_DOM> static __device__ __forceinline__ void fasa_k_dom_dims(const int32_t * dims, int n_dom, int (&mine)[FASA_GROUP]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < FASA_GROUP; ++i) {
        const int at = K_DOM == FASA_K_DOM_F16 ? lane + 32*i : lane*FASA_GROUP + i;
        mine[i] = at < n_dom ? dims[at] : -1;
    }
}

// one cell's dominant values, from its row [d] in shared memory to its block, by one warp
template <int K_DOM> static __device__ void fasa_k_dom_write(int n_dom, const int (&dims)[FASA_GROUP], const float * row, char * block, int cell) {
    const int lane = threadIdx.x % 32;
    char * data = block + fasa_block_scales(K_DOM, n_dom);
    float x[FASA_GROUP], most = 0.0f; // the value of largest magnitude, with its sign
#pragma unroll
    for (int i = 0; i < FASA_GROUP; ++i) {
        x[i] = dims[i] < 0 ? 0.0f : row[dims[i]];
        most = fabsf(x[i]) > fabsf(most) ? x[i] : most;
        if (K_DOM == FASA_K_DOM_F16 && lane + 32*i < n_dom) {
            ((half *) data)[(lane + 32*i)*FASA_TILE + cell] = __float2half_rn(x[i]);
        }
    }
    if (K_DOM != FASA_K_DOM_F16 && lane < n_dom/FASA_GROUP) {
        const half  scale = __float2half_rn(K_DOM == FASA_K_DOM_Q8 ? __fdiv_rn(fabsf(most), 127.0f) : most*-0.125f);
        const float step  = __half2float(scale);
        const float inv   = step != 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
        ((half *) block)[lane*FASA_TILE + cell] = scale;
        if (K_DOM == FASA_K_DOM_Q8) {
#pragma unroll
            for (int i = 0; i < FASA_GROUP; ++i) {
                ((int8_t *) data)[((2*lane + i/4)*FASA_TILE + cell)*4 + i%4] = (int8_t) fminf(127.0f, fmaxf(-127.0f, roundf(x[i]*inv)));
            }
        } else {
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t lo = fminf(15.0f, fmaxf(0.0f, floorf(x[i]*inv + 8.5f))), hi = fminf(15.0f, fmaxf(0.0f, floorf(x[i + 4]*inv + 8.5f)));
                word |= (lo | hi << 4) << 8*i;
            }
            ((uint32_t *) data)[lane*FASA_TILE + cell] = word;
        }
    }
}

// the stale cells of [first, last), by one warp; few as a rule, so not in the way of the code around it
template <int K_DOM> static __device__ __noinline__ void fasa_refresh(const fasa_tip_args & a, int h, int s, int2 stale, int first, int last, float * row) {
    const int lane = threadIdx.x % 32, from = max(stale.x, first), to = min(stale.y, last);
    int dims[FASA_GROUP];
    fasa_k_dom_dims<K_DOM>(a.dims + h*a.n_dom, a.n_dom, dims);
    for (uint32_t some = __ballot_sync(0xffffffff, from < to); some != 0; some &= some - 1) {
        const int r = __ffs(some) - 1;
        for (int cell = __shfl_sync(0xffffffff, from, r); cell < __shfl_sync(0xffffffff, to, r); ++cell) {
            const char * src = a.k + s*a.k_nb3 + cell*a.k_nb2 + h*a.k_nb1;
            __syncwarp();
#pragma unroll 1
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
            fasa_k_dom_write<K_DOM>(a.n_dom, dims, row, a.k_dom + s*a.k_dom_nb3 + h*a.k_dom_nb2 + cell/FASA_TILE*a.k_dom_nb1, cell%FASA_TILE);
        }
    }
    __syncwarp();
}

// The dominant part of TIP_HEADS query heads in shared memory: times weight and scale, beside q8 and q4 keys in 8 bits. A dot product of
// bytes begins at the bits of 1.5*2^23, so that it is read back as a float without a conversion, and, beside q4, at -8 times
// the sum of the query's bytes (a nibble n stands for n - 8).
static constexpr int   TIP_HEADS = 4;
static constexpr int   TIP_ZERO  = 0x4b400000;
static constexpr float TIP_ZERO_VALUE = 12582912.0f;

template <int K_DOM> struct fasa_tip_query {
    float * x;    // [TIP_HEADS][n_dom]            f16
    int4  * word; // [TIP_HEADS][n_dom/FASA_GROUP] q8, q4: 8 int8, the bits of their scale, the start of the dot product

    static __host__ __device__ size_t bytes(int n_dom) { return K_DOM == FASA_K_DOM_F16 ? TIP_HEADS*n_dom*4 : TIP_HEADS*n_dom*2; }

    __device__ fasa_tip_query(char * smem) : x((float *) smem), word((int4 *) smem) {
    }

    // what a warp needs for a query head, asked for before the tiles are: these would be in the way
    struct raw {
        float x[256/32], weight;
        int   dim;

        // of KV head h; head < 0: nothing
        __device__ void load(const fasa_tip_args & a, int h, int head, int64_t token) {
            const int lane = threadIdx.x % 32;
            const float * q = (const float *) (a.q + token*a.q_nb2 + head*a.q_nb1);
#pragma unroll
            for (int i = 0; i < 256/32; ++i) {
                x[i] = head >= 0 && lane + 32*i < a.d ? q[lane + 32*i] : 0.0f;
            }
            dim    = lane < a.n_dom ? a.dims  [h*a.n_dom + lane] : -1;
            weight = lane < a.n_dom ? a.weight[h*a.n_dom + lane] : 0.0f;
        }
    };

    // column m, by one warp
    __device__ void set(const fasa_tip_args & a, int m, int h, const raw & in, float * row) {
        const int lane = threadIdx.x % 32;
        const int32_t * dims   = a.dims   + h*a.n_dom;
        const float   * weight = a.weight + h*a.n_dom;
        int   dim = in.dim;
        float w   = in.weight;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 256/32; ++i) {
            if (lane + 32*i < a.d) {
                row[lane + 32*i] = in.x[i];
            }
        }
        __syncwarp();
        if (a.n_hadamard > 0) {
            fasa_hadamard(row, a.d, a.n_hadamard);
        }
#pragma unroll 1
        for (int i0 = 0; i0 < a.n_dom; i0 += 32) {
            const int i = i0 + lane;
            if (i0 > 0) {
                dim = i < a.n_dom ? dims  [i] : -1;
                w   = i < a.n_dom ? weight[i] : 0.0f;
            }
            const float v = dim < 0 ? 0.0f : row[dim]*w*a.scale;
            if constexpr (K_DOM == FASA_K_DOM_F16) {
                if (i < a.n_dom) {
                    x[m*a.n_dom + i] = v;
                }
            } else { // eight lanes are a group
                float most = fabsf(v);
#pragma unroll
                for (int half = 4; half > 0; half /= 2) {
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, half));
                }
                const float step = __fdiv_rn(most, 127.0f), inv = step > 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
                const int b = (int) fminf(127.0f, fmaxf(-127.0f, roundf(v*inv))), sum = fasa_warp_sum<8>(b);
                const int low = fasa_warp_sum<4>((b & 255) << 8*(lane%4)), high = __shfl_xor_sync(0xffffffff, low, 4); // of four lanes
                if (lane%8 == 0 && i < a.n_dom) {
                    word[m*(a.n_dom/FASA_GROUP) + i/FASA_GROUP] =
                        make_int4(low, high, __float_as_int(step), TIP_ZERO - (K_DOM == FASA_K_DOM_Q4 ? 8*sum : 0));
                }
            }
        }
    }
};

// A tile is scored by a warp for TIP_HEADS heads at once: four values a thread. The two ways below differ in whose they are:
//
//   TIP_MMA   value i: cell lane/4*4 + i of the tile, head lane%4     tensor cores; keys in 8 and 4 bits, from 8.0 on
//   else      value i: cell lane, head i
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <int K_DOM> static constexpr bool TIP_MMA = K_DOM != FASA_K_DOM_F16;
#else
template <int K_DOM> static constexpr bool TIP_MMA = false;
#endif

// d [16 cells][8 columns] = c + a [16][32 bytes] * b [32 bytes][8]; UNSIGNED: those of a are
template <bool UNSIGNED> static __device__ __forceinline__ void fasa_mma(int (&d)[4], const uint32_t (&a)[4], const uint2 b, const int (&c)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (UNSIGNED) {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
    } else {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
    }
#endif
}

// Four groups of the queries as a right-hand side. A group has scales of its own, so its dot products are columns of their own, with
// zeros at the other groups: 4 heads x 4 groups are two products of 8 columns. Thread lane gets column pairs of group lane%4; its
// slot j, columns 0 and 1 of the first product and of the second, is head j ^ lane%4: then three exchanges add the groups up.
struct fasa_tip_quad {
    uint2 b[2];
    float step[4]; // of the slots
    int   start[2][4]; // of the products: of slots 2*j and 2*j + 1, for two cells

    template <int K_DOM> __device__ void set(const fasa_tip_query<K_DOM> & q, int n_group, int quad) {
        const int lane = threadIdx.x % 32, t = lane%4, column = lane/4;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int group = 4*quad + column/2, head = (2*j + column%2) ^ column/2;
            const int4 w = t == column/2 && group < n_group ? q.word[head*n_group + group] : make_int4(0, 0, 0, 0);
            b[j] = make_uint2(w.x, w.y);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int4 w = 4*quad + t < n_group ? q.word[(j ^ t)*n_group + 4*quad + t] : make_int4(0, 0, 0, TIP_ZERO);
            step[j] = __int_as_float(w.z), start[j/2][j%2] = start[j/2][j%2 + 2] = w.w;
        }
    }
};

// what a thread reads of one group of four cells
template <int K_DOM> struct fasa_tip_raw {
    static constexpr int WORDS = K_DOM == FASA_K_DOM_Q8 ? 2 : 1;
    uint4 word[WORDS]; // of cells lane/4*4 + (0 to 3)
    uint2 scale;

    __device__ void load(const char * block, int n_group, int quad) {
        const int lane = threadIdx.x % 32, g = 4*quad + lane%4;
        scale = make_uint2(0, 0);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            word[i] = make_uint4(0, 0, 0, 0);
        }
        if (g < n_group) {
            scale = ((const uint2 *) block)[g*(FASA_TILE/4) + lane/4];
#pragma unroll
            for (int i = 0; i < WORDS; ++i) {
                word[i] = ((const uint4 *) (block + n_group*FASA_TILE*2))[(g*WORDS + i)*(FASA_TILE/4) + lane/4];
            }
        }
    }

    // y[cell][slot] += the dot products of this thread's group
    __device__ void dot(const fasa_tip_quad & q, float (&y)[4][4]) const {
        constexpr bool Q4 = K_DOM == FASA_K_DOM_Q4;
        const uint32_t lo[4] = { word[0].x, word[0].y, word[0].z, word[0].w };
        const uint32_t hi[4] = { word[WORDS - 1].x, word[WORDS - 1].y, word[WORDS - 1].z, word[WORDS - 1].w };
        const float2 s[2] = { __half22float2(*(const half2 *) &scale.x), __half22float2(*(const half2 *) &scale.y) };
#pragma unroll
        for (int i = 0; i < 2; ++i) { // 16 cells: of every four, the first or the second two
            const uint32_t a[4] = { Q4 ? lo[2*i] & 0x0f0f0f0f : lo[2*i], Q4 ? lo[2*i + 1] & 0x0f0f0f0f : lo[2*i + 1],
                                    Q4 ? hi[2*i] >> 4 & 0x0f0f0f0f : hi[2*i], Q4 ? hi[2*i + 1] >> 4 & 0x0f0f0f0f : hi[2*i + 1] };
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                int d[4];
                fasa_mma<Q4>(d, a, q.b[j], q.start[j]);
#pragma unroll
                for (int k = 0; k < 4; ++k) { // the dot product times the scale is exact
                    const float scale = k < 2 ? s[i].x : s[i].y;
                    y[2*i + k/2][2*j + k%2] += __fmaf_rn(__int_as_float(d[k]), scale, -TIP_ZERO_VALUE*scale)*q.step[2*j + k%2];
                }
            }
        }
    }
};

// logits [2][TIP_HEADS] of a cell of each of two tiles, lane = cell
template <int K_DOM>
static __device__ __forceinline__ void fasa_tip_cells(const fasa_tip_query<K_DOM> & q, int n_dom, const char * const block[2], float (&out)[2][4]) {
    const int lane = threadIdx.x % 32, n_group = n_dom/FASA_GROUP;
    const size_t data = fasa_block_scales(K_DOM, n_dom);
    constexpr int WORDS = K_DOM == FASA_K_DOM_F16 ? 4 : K_DOM == FASA_K_DOM_Q8 ? 2 : 1; // of a group
#pragma unroll 2
    for (int g = 0; g < n_group; ++g) {
        uint32_t v[2][WORDS];
        float    s[2] = {};
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            if constexpr (K_DOM == FASA_K_DOM_F16) {
#pragma unroll
                for (int i = 0; i < FASA_GROUP/2; ++i) {
                    const uint16_t * x = (const uint16_t *) (block[u] + data) + (g*FASA_GROUP + 2*i)*FASA_TILE + lane;
                    v[u][i] = x[0] | (uint32_t) x[FASA_TILE] << 16;
                }
            } else {
                s[u] = __half2float(((const half *) block[u])[g*FASA_TILE + lane]);
#pragma unroll
                for (int i = 0; i < WORDS; ++i) {
                    v[u][i] = ((const uint32_t *) (block[u] + data))[(g*WORDS + i)*FASA_TILE + lane];
                }
            }
        }
#pragma unroll
        for (int m = 0; m < TIP_HEADS; ++m) {
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
                    const int lo = K_DOM == FASA_K_DOM_Q4 ? v[u][0] & 0x0f0f0f0f : v[u][0], hi = K_DOM == FASA_K_DOM_Q4 ? v[u][0] >> 4 & 0x0f0f0f0f : v[u][WORDS - 1];
                    const int dot = __dp4a(hi, w.y, __dp4a(lo, w.x, w.w));
                    out[u][m] += (__int_as_float(dot) - TIP_ZERO_VALUE)*s[u]*__int_as_float(w.z);
                }
            }
        }
    }
}
