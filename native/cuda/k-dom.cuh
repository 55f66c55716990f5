#pragma once

// K_dom as the kernels see it: the dominant values of the stale cells written, queries made ready for it, and their
// products with a tile of it.

#include "cuda/device.cuh"
#include "ops/ops.h"

static constexpr int MAX_DIM = 256; // of a head (fasa_cuda_reason); a lane has eight at most

struct fasa_tip_args {
    char * k_dom; // [block, n_tile, n_head_kv, n_stream]
    const char * k;
    const int32_t * ranges; // [2*FASA_MAX_RANGES, n_stream]
    const char * q;
    const int32_t * dims; // [n_dom, n_head_kv]
    const float * weight; // [n_dom, n_head_kv]
    const char * mask;
    const int32_t * fresh; // [n_fresh, n_stream] cells that are not scored, -1: none
    int n_fresh;
    int64_t k_dom_nb1, k_dom_nb2, k_dom_nb3; // bytes
    int64_t k_nb1, k_nb2, k_nb3, q_nb1, q_nb2, mask_nb1, mask_nb3;
    ggml_type type_k;
    int n_kv, n_span, n_len, n_head, n_dom, d, n_hadamard;
    uint3 by_n_tps, by_n_group; // fastdiv: tokens of a stream, query heads of a KV head
    float scale, soft_cap;
};

// orthonormal Walsh-Hadamard transform of blocks of row [d] in shared memory, by one warp
static __device__ __forceinline__ void fasa_hadamard(float * row, int d, int n_block) {
    const int lane    = threadIdx.x % 32;
    const float scale = rsqrtf(n_block);
#pragma unroll 1
    for (int h = 1; h < n_block; h *= 2) {
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < d / 2; i += 32) {
            const int j = i / h * 2 * h + i % h;
            if (j / n_block * n_block + n_block <= d) {
                const float u = row[j], w = row[j + h];
                row[j] = u + w, row[j + h] = u - w;
            }
        }
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < d / n_block * n_block; i += 32) {
        row[i] *= scale;
    }
    __syncwarp();
}

// The dimensions that a lane writes of every cell: those of group `lane` with scales, else every 32nd
template <int K_DOM>
static __device__ __forceinline__ void fasa_k_dom_dims(const int32_t * dims, int n_dom, int (&mine)[FASA_GROUP]) {
    const int lane = threadIdx.x % 32;
    if constexpr (K_DOM == FASA_K_DOM_F16) {
#pragma unroll
        for (int i = 0; i < FASA_GROUP; ++i) {
            mine[i] = lane + 32 * i < n_dom ? dims[lane + 32 * i] : -1;
        }
    } else {
        const bool is = lane < n_dom / FASA_GROUP;
        const int4 x  = is ? ((const int4 *) dims)[2 * lane] : make_int4(-1, -1, -1, -1),
                   y  = is ? ((const int4 *) dims)[2 * lane + 1] : make_int4(-1, -1, -1, -1);
        mine[0] = x.x, mine[1] = x.y, mine[2] = x.z, mine[3] = x.w, mine[4] = y.x, mine[5] = y.y, mine[6] = y.z,
        mine[7] = y.w;
    }
}

// one cell's dominant values, from its row [d] in shared memory to its block, by one warp
template <int K_DOM>
static __device__ void fasa_k_dom_write(
    int n_dom, const int (&dims)[FASA_GROUP], const float * row, char * block, int cell) {
    const int lane = threadIdx.x % 32;
    char * data    = block + fasa_block_scales(K_DOM, n_dom);
    float x[FASA_GROUP], most = 0.0f; // the value of largest magnitude, with its sign
#pragma unroll
    for (int i = 0; i < FASA_GROUP; ++i) {
        x[i] = dims[i] < 0 ? 0.0f : row[dims[i]];
        most = fabsf(x[i]) > fabsf(most) ? x[i] : most;
        if (K_DOM == FASA_K_DOM_F16 && lane + 32 * i < n_dom) {
            ((half *) data)[(lane + 32 * i) * FASA_TILE + cell] = __float2half_rn(x[i]);
        }
    }
    if (K_DOM != FASA_K_DOM_F16 && lane < n_dom / FASA_GROUP) {
        const half scale = __float2half_rn(K_DOM == FASA_K_DOM_Q8 ? __fdiv_rn(fabsf(most), 127.0f) : most * -0.125f);
        const float step = __half2float(scale);
        const float inv  = step != 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
        ((half *) block)[lane * FASA_TILE + cell] = scale;
        if (K_DOM == FASA_K_DOM_Q8) {
#pragma unroll
            for (int i = 0; i < FASA_GROUP; ++i) {
                ((int8_t *) data)[((2 * lane + i / 4) * FASA_TILE + cell) * 4 + i % 4] =
                    (int8_t) fminf(127.0f, fmaxf(-127.0f, roundf(x[i] * inv)));
            }
        } else {
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t lo = fminf(15.0f, fmaxf(0.0f, floorf(x[i] * inv + 8.5f))),
                               hi = fminf(15.0f, fmaxf(0.0f, floorf(x[i + 4] * inv + 8.5f)));
                word |= (lo | hi << 4) << 8 * i;
            }
            ((uint32_t *) data)[lane * FASA_TILE + cell] = word;
        }
    }
}

// The stale cells of [first, last), by one warp. Inlined, though few warps come here: a call would put what they have
// asked for into memory, and read the parameters of the kernel from there, one after the other. row: [d] in shared
// memory
template <int K_DOM>
static __device__ __forceinline__ void fasa_refresh(
    const fasa_tip_args & a, int h, int s, int2 stale, int first, int last, float * row) {
    const int lane = threadIdx.x % 32, from = max(stale.x, first), to = min(stale.y, last);
    int mine[FASA_GROUP];
    fasa_k_dom_dims<K_DOM>(a.dims + h * a.n_dom, a.n_dom, mine);
    for (uint32_t some = __ballot_sync(0xffffffff, from < to); some != 0; some &= some - 1) {
        const int r = __ffs(some) - 1;
        for (int cell = __shfl_sync(0xffffffff, from, r); cell < __shfl_sync(0xffffffff, to, r); ++cell) {
            __syncwarp();
            if (8 * lane < a.d) {
                float x[8];
                fasa_load8(a.type_k, a.k + s * a.k_nb3 + cell * a.k_nb2 + h * a.k_nb1, 8 * lane, x);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    row[8 * lane + i] = x[i];
                }
            }
            __syncwarp();
            if (a.n_hadamard > 0) {
                fasa_hadamard(row, a.d, a.n_hadamard);
            }
            fasa_k_dom_write<K_DOM>(a.n_dom, mine, row,
                a.k_dom + s * a.k_dom_nb3 + h * a.k_dom_nb2 + cell / FASA_TILE * a.k_dom_nb1, cell % FASA_TILE);
        }
    }
    __syncwarp();
}

// TIP's products, by the tensor cores: a tile of FASA_TILE cells times TIP_HEADS query heads. Thread (g, c) = (lane/4,
// lane%4) has
//
//   of the keys       group c, of four, of cells 4g to 4g + 3: times its scale, in f16
//   of the queries    group c of head g/2: what f16 takes of it or, where g is odd, what that leaves
//   of the logits     head c of cells 4g to 4g + 3: columns 2c and 2c + 1 of the product, added up
//
// The dimensions of a group go by pairs, as they are taken out of a word: 0 2, 4 6, 1 3, 5 7.
static constexpr int TIP_HEADS = 4;

static __host__ __device__ size_t fasa_tip_query_bytes(int n_dom) {
    return TIP_HEADS * 2 * n_dom * sizeof(half);
}

// The dominant part of the query heads in shared memory: times weight and scale and, beside q8 and q4 keys, in 8 bits
template <int K_DOM>
struct fasa_tip_query {
    half * x; // [TIP_HEADS][what f16 takes, what it leaves][n_dom]

    __device__ fasa_tip_query(char * smem) : x((half *) smem) {}

    // head m, by one warp, from query head `head`, < 0: none; row: [d] in shared memory; dim, w: dims and weight of
    // dimension `lane`
    __device__ void set(const fasa_tip_args & a, int m, int h, int head, int64_t token, int dim, float w, float * row) {
        const int lane  = threadIdx.x % 32;
        const float * q = (const float *) (a.q + token * a.q_nb2 + head * a.q_nb1);
        float in[MAX_DIM / 32];
#pragma unroll
        for (int i = 0; i < MAX_DIM / 32; ++i) {
            in[i] = head >= 0 && lane + 32 * i < a.d ? q[lane + 32 * i] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < MAX_DIM / 32; ++i) {
            if (lane + 32 * i < a.d) {
                row[lane + 32 * i] = in[i];
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
                dim = i < a.n_dom ? a.dims[h * a.n_dom + i] : -1;
                w   = i < a.n_dom ? a.weight[h * a.n_dom + i] : 0.0f;
            }
            float v = dim < 0 ? 0.0f : row[dim] * w * a.scale;
            if constexpr (K_DOM != FASA_K_DOM_F16) { // eight lanes are a group
                float most = fabsf(v);
#pragma unroll
                for (int by = 4; by > 0; by /= 2) {
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, by));
                }
                const float step = __fdiv_rn(most, 127.0f), inv = step > 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
                v = fminf(127.0f, fmaxf(-127.0f, roundf(v * inv))) * step;
            }
            if (i < a.n_dom) {
                half * to =
                    x + m * 2 * a.n_dom + i / FASA_GROUP * FASA_GROUP + (4 * (i & 1) | 2 * (i >> 2 & 1) | (i >> 1 & 1));
                const half high = __float2half_rn(v);
                to[0]           = high;
                to[a.n_dom]     = __float2half_rn(v - __half2float(high));
            }
        }
    }

    // this thread's group of groups 4*quad to 4*quad + 3
    __device__ __forceinline__ uint4 quad(int n_group, int quad) const {
        const int column = threadIdx.x % 32 / 4, group = 4 * quad + threadIdx.x % 4;
        return group < n_group ? ((const uint4 *) x)[column * n_group + group] : make_uint4(0, 0, 0, 0);
    }
};

// what a thread reads of a tile, for one group of four cells
template <int K_DOM>
struct fasa_tip_raw {
    static constexpr int WORDS = K_DOM == FASA_K_DOM_F16 ? 4 : K_DOM == FASA_K_DOM_Q8 ? 2 : 1;
    uint4 word[WORDS]; // [WORDS][4 cells], or f16: [4][2 dimensions][4 cells]
    uint2 scale;       // of the cells; f16: none

    // Where in a block they lie, in bytes: of this thread's group of groups 4*quad to 4*quad + 3 or, where there is
    // none, of another, beside which the query is 0
    struct place {
        int words, scale;

        __device__ place() {}
        __device__ place(int n_group, int quad) {
            const int g = threadIdx.x % 32 / 4, group = min(4 * quad + (int) threadIdx.x % 4, n_group - 1);
            scale = (group * FASA_TILE + 4 * g) * 2;
            words = K_DOM == FASA_K_DOM_F16 ? (group * FASA_GROUP * FASA_TILE + 4 * g) * 2 :
                                              n_group * FASA_TILE * 2 + (group * WORDS * FASA_TILE + 4 * g) * 4;
        }
    };

    __device__ __forceinline__ void load(const char * block, const place & at) {
        if constexpr (K_DOM == FASA_K_DOM_F16) {
#pragma unroll
            for (int i = 0; i < WORDS; ++i) {
                const uint2 * two = (const uint2 *) (block + at.words) + 2 * i * (FASA_TILE / 4);
                word[i]           = make_uint4(two[0].x, two[0].y, two[FASA_TILE / 4].x, two[FASA_TILE / 4].y);
            }
        } else {
            scale = *(const uint2 *) (block + at.scale);
#pragma unroll
            for (int i = 0; i < WORDS; ++i) {
                word[i] = ((const uint4 *) (block + at.words))[i * (FASA_TILE / 4)];
            }
        }
    }

    // the pairs of cell i, times its scale
    __device__ __forceinline__ void pairs(int i, uint32_t (&p)[4]) const {
        if constexpr (K_DOM == FASA_K_DOM_F16) {
            const auto pair = [i](uint32_t x01, uint32_t x23, uint32_t y01, uint32_t y23) {
                return __byte_perm(i < 2 ? x01 : x23, i < 2 ? y01 : y23, i % 2 ? 0x7632 : 0x5410);
            };
#pragma unroll
            for (int k = 0; k < 2; ++k) { // dimensions k and k + 2, k + 4 and k + 6
                p[2 * k]     = k == 0 ? pair(word[0].x, word[0].y, word[1].x, word[1].y) :
                                        pair(word[0].z, word[0].w, word[1].z, word[1].w);
                p[2 * k + 1] = k == 0 ? pair(word[2].x, word[2].y, word[3].x, word[3].y) :
                                        pair(word[2].z, word[2].w, word[3].z, word[3].w);
            }
        } else {
            const auto of = [i](const uint4 & x) {
                return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
            };
            const half2 two = *(const half2 *) (i < 2 ? &scale.x : &scale.y),
                        s   = i % 2 ? __high2half2(two) : __low2half2(two);
            half2 x[4]; // whole numbers, made with 1024 = 0x6400, whose last bit is 1
            if constexpr (K_DOM == FASA_K_DOM_Q4) {
                const uint32_t w = of(word[0]);
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    uint32_t low, high; // w >> 8*k & 0x000f000f | 0x64006400, and & 0x00f000f0, each in one instruction
                    asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;" : "=r"(low) : "r"(w >> 8 * k), "r"(0x64006400));
                    asm("lop3.b32 %0, %1, 0x00f000f0, %2, 0xea;" : "=r"(high) : "r"(w >> 8 * k), "r"(0x64006400));
                    x[2 * k] = __hsub2(*(const half2 *) &low, __float2half2_rn(1024 + 8));
                    x[2 * k + 1] =
                        __hfma2(*(const half2 *) &high, __float2half2_rn(1.0f / 16), __float2half2_rn(-1024 / 16 - 8));
                }
            } else {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const uint32_t byte =
                        __byte_perm(of(word[k % 2]) ^ 0x80808080, 0x64646464, k < 2 ? 0x4240 : 0x4341);
                    x[k] = __hsub2(*(const half2 *) &byte, __float2half2_rn(1024 + 128));
                }
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                x[k] = __hmul2(x[k], s);
                p[k] = *(const uint32_t *) &x[k];
            }
        }
    }

    // y: columns 2c and 2c + 1 of cells 4g + 2*i and 4g + 2*i + 1
    __device__ __forceinline__ void dot(const uint4 & query, float (&y)[2][4]) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t p[2][4];
            pairs(2 * i, p[0]);
            pairs(2 * i + 1, p[1]);
            fasa_mma(y[i], { p[0][0], p[1][0], p[0][1], p[1][1] }, query.x, query.y);
            fasa_mma(y[i], { p[0][2], p[1][2], p[0][3], p[1][3] }, query.z, query.w);
        }
    }
};
