// The CPU functions of the ops in ops/ops.h. Compiled into ggml-cpu, so dense and FASA use the same instruction set.
// Definition of every step: fasa_gguf/reference.py.

#include "ops/ops.h"
#include "core/select.h"
#include "cpu/simd.h"

#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "vec.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

static_assert(FASA_TILE == 32, "the kernels below take a tile as two vectors of 16 cells");

// ---- rows ----

// dst [n] f32 from n elements of any ggml type that can be read back
static inline void fasa_row_to_f32(const void * src, float * dst, ggml_type type, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, n * sizeof(float));
    } else if (type == GGML_TYPE_F16) {
#if defined(__AVX512F__)
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {
            const fasa_f32x16 x = fasa_f32_f16((const ggml_fp16_t *) src + i);
            memcpy(dst + i, &x, sizeof(x));
        }
        for (; i < n; ++i) {
            dst[i] = GGML_CPU_FP16_TO_FP32(((const ggml_fp16_t *) src)[i]);
        }
#else
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n);
#endif
    } else {
        ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}

static inline void fasa_prefetch(const char * p, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch(p + i);
    }
}

// orthonormal Walsh-Hadamard transform of each block of n_block values, in place; its own inverse
static void fasa_hadamard(float * x, int64_t n, int64_t n_block) {
    const float scale = 1.0f / sqrtf((float) n_block);
    for (int64_t b = 0; b + n_block <= n; b += n_block) {
        for (int64_t h = 1; h < n_block; h *= 2) {
            for (int64_t i = b; i < b + n_block; i += 2 * h) {
                for (int64_t j = i; j < i + h; ++j) {
                    const float u = x[j], w = x[j + h];
                    x[j]     = u + w;
                    x[j + h] = u - w;
                }
            }
        }
        for (int64_t i = b; i < b + n_block; ++i) {
            x[i] *= scale;
        }
    }
}

// the part of [0, n) that thread ith of nth works on
static inline void fasa_split(int64_t n, int ith, int nth, int64_t & first, int64_t & last) {
    first = n * ith / nth;
    last  = n * (ith + 1) / nth;
}

static inline char * fasa_at(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
    return (char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
}

// ---- REFRESH ----

// write one cell's dominant values x [n_dom] into its block
static void fasa_k_dom_write(int k_dom, int n_dom, const float * x, char * block, int lane) {
    ggml_fp16_t * scale = (ggml_fp16_t *) block;
    char * data         = block + fasa_block_scales(k_dom, n_dom);
    if (k_dom == FASA_K_DOM_F16) {
        for (int d = 0; d < n_dom; ++d) {
            ((ggml_fp16_t *) data)[d * FASA_TILE + lane] = GGML_FP32_TO_FP16(x[d]);
        }
        return;
    }
    for (int g = 0; g < n_dom / FASA_GROUP; ++g, x += FASA_GROUP) {
        float most = 0.0f; // the value of largest magnitude, with its sign
        for (int d = 0; d < FASA_GROUP; ++d) {
            most = fabsf(x[d]) > fabsf(most) ? x[d] : most;
        }
        const ggml_fp16_t half      = GGML_FP32_TO_FP16(k_dom == FASA_K_DOM_Q8 ? fabsf(most) / 127.0f : most / -8.0f);
        const float step            = GGML_FP16_TO_FP32(half);
        const float inv             = step != 0.0f ? 1.0f / step : 0.0f;
        scale[g * FASA_TILE + lane] = half;
        if (k_dom == FASA_K_DOM_Q8) {
            for (int d = 0; d < FASA_GROUP; ++d) {
                const float q = std::min(127.0f, std::max(-127.0f, roundf(x[d] * inv)));
                ((int8_t *) data)[((2 * g + d / 4) * FASA_TILE + lane) * 4 + d % 4] = (int8_t) q;
            }
        } else {
            for (int d = 0; d < 4; ++d) {
                const int lo = (int) std::min(15.0f, std::max(0.0f, floorf(x[d] * inv + 8.5f)));
                const int hi = (int) std::min(15.0f, std::max(0.0f, floorf(x[d + 4] * inv + 8.5f)));
                ((uint8_t *) data)[(g * FASA_TILE + lane) * 4 + d] = (uint8_t) (lo | hi << 4);
            }
        }
    }
}

// the stale cells of [first, last)
static void fasa_refresh(const ggml_tensor * tip, const fasa_op_params & p, int64_t first, int64_t last) {
    const ggml_tensor * k_dom  = tip->src[0];
    const ggml_tensor * k      = tip->src[1];
    const ggml_tensor * ranges = tip->src[2];
    const ggml_tensor * dims   = tip->src[4];

    const int64_t d_k = k->ne[0], n_head_kv = k->ne[1], n_dom = dims->ne[0];

    std::vector<float> row(d_k), x(n_dom);
    for (int64_t s = 0; s < k->ne[3]; ++s) {
        const int32_t * range = (const int32_t *) ((const char *) ranges->data + s * ranges->nb[1]);
        for (int r = 0; r < FASA_MAX_RANGES; ++r) {
            const int64_t from = std::max<int64_t>(range[2 * r], first), to = std::min<int64_t>(range[2 * r + 1], last);
            for (int64_t cell = from; cell < to; ++cell) {
                for (int64_t h = 0; h < n_head_kv; ++h) {
                    fasa_row_to_f32(fasa_at(k, h, cell, s), row.data(), k->type, d_k);
                    if (p.n_hadamard > 0) {
                        fasa_hadamard(row.data(), d_k, p.n_hadamard);
                    }
                    const int32_t * dim = (const int32_t *) ((const char *) dims->data + h * dims->nb[1]);
                    for (int64_t d = 0; d < n_dom; ++d) {
                        x[d] = dim[d] < 0 ? 0.0f : row[dim[d]];
                    }
                    fasa_k_dom_write(
                        p.k_dom, n_dom, x.data(), fasa_at(k_dom, cell / FASA_TILE, h, s), cell % FASA_TILE);
                }
            }
        }
    }
}

// ---- TIP ----

// the dominant part of the query heads of one token, times weight and scale; for K_dom in q8 and q4 in 8 bits
struct fasa_tip_query {
    std::vector<float> x;      // [n_head][n_dom]
    std::vector<int32_t> word; // [n_head][n_dom/4] 4 int8 each
    std::vector<float> scale;  // [n_head][n_dom/FASA_GROUP]
    std::vector<int32_t> sum;  // [n_head][n_dom/FASA_GROUP] of the int8 values

    fasa_tip_query(int64_t n_head, int64_t n_dom)
        : x(n_head * n_dom), word(n_head * n_dom / 4), scale(n_head * n_dom / FASA_GROUP), sum(scale.size()) {}

    void set(const ggml_tensor * tip, const fasa_op_params & p, int64_t token) {
        const ggml_tensor *q = tip->src[3], *dims = tip->src[4], *weight = tip->src[5];

        const int64_t d_k = q->ne[0], n_head = q->ne[1], n_dom = dims->ne[0], n_group = n_head / dims->ne[1];

        row.resize(d_k);
        for (int64_t head = 0; head < n_head; ++head) {
            const int32_t * dim = (const int32_t *) ((const char *) dims->data + head / n_group * dims->nb[1]);
            const float * w     = (const float *) ((const char *) weight->data + head / n_group * weight->nb[1]);
            memcpy(row.data(), fasa_at(q, head, token, 0), d_k * sizeof(float));
            if (p.n_hadamard > 0) {
                fasa_hadamard(row.data(), d_k, p.n_hadamard);
            }
            for (int64_t d = 0; d < n_dom; ++d) {
                x[head * n_dom + d] = dim[d] < 0 ? 0.0f : row[dim[d]] * w[d] * p.scale;
            }
        }
        for (size_t g = 0; g < scale.size(); ++g) {
            quantize(g);
        }
    }

private:
    std::vector<float> row;

    void quantize(size_t g) {
        float most = 0.0f;
        for (int d = 0; d < FASA_GROUP; ++d) {
            most = std::max(most, fabsf(x[g * FASA_GROUP + d]));
        }
        scale[g]        = most / 127.0f;
        const float inv = scale[g] > 0.0f ? 1.0f / scale[g] : 0.0f;
        int8_t v[FASA_GROUP];
        sum[g] = 0;
        for (int d = 0; d < FASA_GROUP; ++d) {
            v[d] = (int8_t) std::min(127.0f, std::max(-127.0f, roundf(x[g * FASA_GROUP + d] * inv)));
            sum[g] += v[d];
        }
        memcpy(&word[2 * g], v, sizeof(v));
    }
};

// logits [M][FASA_SPAN], of which FASA_TILE are written, of the query heads from `head` on over one tile
template <int M, int K_DOM>
static void fasa_tip_tile(int n_dom, const char * block, const fasa_tip_query & q, int64_t head, float * out) {
    fasa_f32x16 acc[M][2] = {};
    const char * data     = block + fasa_block_scales(K_DOM, n_dom);
    if constexpr (K_DOM == FASA_K_DOM_F16) {
        const float * x = q.x.data() + head * n_dom;
        for (int d = 0; d < n_dom; ++d) {
            const fasa_f32x16 k0 = fasa_f32_f16((const ggml_fp16_t *) data + d * FASA_TILE);
            const fasa_f32x16 k1 = fasa_f32_f16((const ggml_fp16_t *) data + d * FASA_TILE + 16);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                acc[m][0] += k0 * x[m * n_dom + d];
                acc[m][1] += k1 * x[m * n_dom + d];
            }
        }
    } else {
        const int n_group    = n_dom / FASA_GROUP;
        const int32_t * word = q.word.data() + head * n_group * 2;
        const int32_t * sum  = q.sum.data() + head * n_group;
        const float * scale  = q.scale.data() + head * n_group;
        constexpr int zero   = K_DOM == FASA_K_DOM_Q4 ? 8 : 128; // what an unsigned value stands for 0 at
        for (int g = 0; g < n_group; ++g) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) { // 16 cells each
                fasa_i32x16 lo, hi;                // dims 0 to 3 and 4 to 7 of the group, unsigned
                if (K_DOM == FASA_K_DOM_Q4) {
                    const fasa_i32x16 v = fasa_load<fasa_i32x16>(data + (g * FASA_TILE + half * 16) * 4);
                    lo                  = v & 0x0f0f0f0f;
                    hi                  = (v >> 4) & 0x0f0f0f0f;
                } else {
                    lo = fasa_load<fasa_i32x16>(data + (2 * g * FASA_TILE + half * 16) * 4) ^ (int32_t) 0x80808080;
                    hi =
                        fasa_load<fasa_i32x16>(data + ((2 * g + 1) * FASA_TILE + half * 16) * 4) ^ (int32_t) 0x80808080;
                }
                const fasa_f32x16 s = fasa_f32_f16((const ggml_fp16_t *) block + g * FASA_TILE + half * 16);
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) {
                    fasa_i32x16 dot = fasa_i32x16{} - zero * sum[m * n_group + g];
                    dot             = fasa_dot4(dot, lo, word[2 * (m * n_group + g)]);
                    dot             = fasa_dot4(dot, hi, word[2 * (m * n_group + g) + 1]);
                    acc[m][half] += fasa_f32_i32(dot) * (s * scale[m * n_group + g]);
                }
            }
        }
    }
    for (int m = 0; m < M; ++m) {
        memcpy(out + m * FASA_SPAN, acc[m], sizeof(acc[m]));
    }
}

typedef void (*fasa_tip_tile_t)(int, const char *, const fasa_tip_query &, int64_t, float *);

template <int K_DOM>
static fasa_tip_tile_t fasa_tip_tile_of(int64_t m) {
    static const fasa_tip_tile_t of[] = { fasa_tip_tile<1, K_DOM>, fasa_tip_tile<2, K_DOM>, fasa_tip_tile<3, K_DOM>,
        fasa_tip_tile<4, K_DOM> };
    return of[m - 1];
}

static fasa_tip_tile_t fasa_tip_tile_get(int k_dom, int64_t m) {
    return k_dom == FASA_K_DOM_F16 ? fasa_tip_tile_of<FASA_K_DOM_F16>(m) :
        k_dom == FASA_K_DOM_Q8     ? fasa_tip_tile_of<FASA_K_DOM_Q8>(m) :
                                     fasa_tip_tile_of<FASA_K_DOM_Q4>(m);
}

// logits x [FASA_SPAN] of n cells -> exp(x)/2^e, their e and their sum; hide [FASA_SPAN]: the mask, -inf behind n
static void fasa_tip_span(
    float * x, const float * hide, float soft_cap, int64_t n, float * out, float * e, float * sum) {
    if (soft_cap > 0) {
        for (int64_t c = 0; c < n; ++c) {
            x[c] = soft_cap * tanhf(x[c] / soft_cap);
        }
    }
    fasa_f32x16 most = fasa_f32x16{} - INFINITY;
    for (int64_t c = 0; c < n; c += 16) {
        const fasa_f32x16 v = fasa_load<fasa_f32x16>(x + c) + fasa_load<fasa_f32x16>(hide + c);
        memcpy(x + c, &v, sizeof(v));
        most = v > most ? v : most;
    }
    float top = -INFINITY;
    for (int l = 0; l < 16; ++l) {
        top = std::max(top, most[l]);
    }
    *e               = top == -INFINITY ? -INFINITY : rintf(top * 1.44269504f);
    fasa_f32x16 sums = {};
    for (int64_t c = 0; c < n; c += 16) {
        const fasa_f32x16 v    = top == -INFINITY ? fasa_f32x16{} : fasa_exp(fasa_load<fasa_f32x16>(x + c), *e);
        const fasa_i32x16 seen = fasa_load<fasa_f32x16>(hide + c) > -INFINITY;
        const fasa_f32x16 y    = seen ? v : fasa_f32x16{} - 1.0f;
        if (c + 16 <= n) {
            memcpy(out + c, &y, sizeof(y));
        } else {
            memcpy(out + c, &y, (n - c) * sizeof(float));
        }
        sums += seen ? v : fasa_f32x16{};
    }
    *sum = fasa_sum(sums);
}

static void fasa_tip(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth) {
    const ggml_tensor *k_dom = dst->src[0], *dims = dst->src[4], *mask = dst->src[6];

    const int64_t n_kv = fasa_tip_n_kv(dst), n_head = dst->ne[1], n_tps = dst->ne[2], n_stream = dst->ne[3];
    const int64_t n_head_kv = dims->ne[1], n_group = n_head / n_head_kv, n_dom = dims->ne[0];
    const int64_t n_span = fasa_n_span(n_kv);

    int64_t first, last;
    fasa_split(n_span, ith, nth, first, last);
    fasa_refresh(dst, p, first * FASA_SPAN, std::min(n_kv, last * FASA_SPAN)); // the cells that this thread scores

    if (auto * stats = ith == 0 ? fasa_op_layer(dst).stats : nullptr) {
        stats->bytes_tip += fasa_tip_bytes(dst);
    }
    fasa_tip_query query(n_head, n_dom);
    float hide[FASA_SPAN], x[4][FASA_SPAN];
    for (int64_t s = 0; s < n_stream; ++s) {
        for (int64_t t = 0; t < n_tps; ++t) {
            query.set(dst, p, s * n_tps + t);
            for (int64_t span = first; span < last; ++span) {
                const int64_t cell = span * FASA_SPAN, n = std::min<int64_t>(FASA_SPAN, n_kv - cell);
                fasa_row_to_f32((const ggml_fp16_t *) fasa_at(mask, t, 0, s) + cell, hide, GGML_TYPE_F16, n);
                std::fill(hide + n, hide + FASA_SPAN, -INFINITY);
                for (int64_t head = 0; head < n_head;) {
                    const int64_t m = std::min<int64_t>(4, n_group - head % n_group);
                    const auto f    = fasa_tip_tile_get(p.k_dom, m);
                    for (int64_t c = 0; c < n; c += FASA_TILE) {
                        f(n_dom, fasa_at(k_dom, (cell + c) / FASA_TILE, head / n_group, s), query, head, x[0] + c);
                    }
                    const int64_t next   = head + m == n_head ?
                        span + 1 :
                        span; // K_dom of the next heads comes while the exponentials are at work
                    const int64_t n_next = next == last ?
                        0 :
                        std::min<int64_t>(FASA_SPAN, n_kv - next * FASA_SPAN) / FASA_TILE * k_dom->nb[1];
                    const char * k_next =
                        fasa_at(k_dom, next * FASA_SPAN / FASA_TILE, (head + m) % n_head / n_group, s);
                    for (int64_t i = 0; i < m; ++i, ++head) {
                        fasa_prefetch(k_next + i * n_next / m, n_next / m);
                        float * row = (float *) fasa_at(dst, head, t, s);
                        fasa_tip_span(
                            x[i], hide, p.soft_cap, n, row + cell, row + n_kv + span, row + n_kv + n_span + span);
                    }
                }
            }
        }
    }
}

// ---- SELECT ----

// 2^e of a whole number -127 < e < 128
static inline float fasa_pow2(float e) {
    const int32_t bits = ((int32_t) e + 127) << 23;
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

// what every span of the rows of a group is to be multiplied with: factor [n_group][n_span]
static void fasa_select_factors(const float * row, int64_t stride, int64_t n_group, int64_t n_kv, float * factor) {
    const int64_t n_span = fasa_n_span(n_kv);
    for (int64_t g = 0; g < n_group; ++g) {
        const float *e = row + g * stride + n_kv, *sum = e + n_span;
        const float most               = *std::max_element(e, e + n_span);
        float lane[FASA_SUM_PARTS][32] = {}, total = 0.0f; // in the order of the CUDA kernel's sum
        for (int64_t i = 0; i < n_span; ++i) {
            lane[i / 32 % FASA_SUM_PARTS][i % 32] +=
                e[i] - most > -FASA_SPAN_RANGE ? sum[i] * fasa_pow2(e[i] - most) : 0.0f;
        }
        for (float * part : lane) {
            for (int half = 16; half > 0; half /= 2) {
                for (int l = 0; l < half; ++l) {
                    part[l] += part[l + half];
                }
            }
            total += part[0];
        }
        const float inv = total > 0.0f ? 1.0f / total : 0.0f;
        for (int64_t i = 0; i < n_span; ++i) {
            factor[g * n_span + i] =
                e[i] - most > -FASA_SCORE_RANGE ? inv * fasa_pow2(e[i] - most + FASA_SCORE_EXP) : 0.0f;
        }
    }
}

// the largest of each half of 16 keys below 2^31
static inline void fasa_block_max(fasa_i32x16 v, uint32_t * most) {
    static_assert(FASA_BLOCK == 8, "half a vector");
#if defined(__AVX512F__)
    __m512i m = (__m512i) v;
    m         = _mm512_max_epi32(m, _mm512_shuffle_epi32(m, (_MM_PERM_ENUM) 0x4e));
    m         = _mm512_max_epi32(m, _mm512_shuffle_epi32(m, (_MM_PERM_ENUM) 0xb1));
    m         = _mm512_max_epi32(m, _mm512_shuffle_i32x4(m, m, 0xb1));
    v         = (fasa_i32x16) m;
    most[0]   = (uint32_t) v[0];
    most[1]   = (uint32_t) v[8];
#else
    fasa_i32x4 q[4];
    memcpy(q, &v, sizeof(v));
    for (int i = 0; i < 2; ++i) {
        const fasa_i32x4 m = q[2 * i] > q[2 * i + 1] ? q[2 * i] : q[2 * i + 1];
        most[i]            = (uint32_t) std::max(std::max(m[0], m[1]), std::max(m[2], m[3]));
    }
#endif
}

// The keys of 16 cells from n_group rows of TIP; the group's score is the sum of their softmaxes (times 2^60). Returns
// -1 for every hidden cell, which is -1 in every row.
static inline fasa_i32x16 fasa_select_16(const float * row, int64_t stride, int64_t n_group, const float * factor,
    int64_t n_span, uint32_t * key, uint32_t * most) {
    fasa_f32x16 sum = {};
    for (int64_t g = 0; g < n_group; ++g) {
        sum = fasa_fma(fasa_load<fasa_f32x16>(row + g * stride), factor[g * n_span], sum);
    }
    const fasa_i32x16 hidden = fasa_load<fasa_f32x16>(row) < 0.0f;
    const fasa_i32x16 bits   = ((fasa_i32x16) sum + 1) & ~hidden; // fasa_key
    memcpy(key, &bits, sizeof(bits));
    fasa_block_max(bits, most);
    return hidden;
}

struct fasa_select_work {            // of a thread: the op has no work buffer
    std::vector<float> factor, last; // last [n_group][16]: the cells behind the last whole 16
    fasa_keys keys;
    fasa_candidates candidates;
};

// the keys of one list, from n_group rows of TIP
static void fasa_select_keys(
    const ggml_tensor * tip, int64_t head, int64_t n_group, int64_t t, int64_t s, fasa_select_work & w) {
    const int64_t n_kv = fasa_tip_n_kv(tip), n_span = fasa_n_span(n_kv), stride = tip->nb[1] / sizeof(float),
                  whole = n_kv / 16 * 16;
    const float * row   = (const float *) fasa_at(tip, head, t, s);

    w.keys.reset(n_kv);
    w.factor.resize(n_group * n_span);
    fasa_select_factors(row, stride, n_group, n_kv, w.factor.data());
    uint32_t *key = w.keys.key.data(), *most = w.keys.most.data();
    fasa_i32x16 hidden = {};
    for (int64_t i = 0; i < n_span; ++i) {
        for (int64_t j = i * FASA_SPAN; j < std::min(whole, (i + 1) * FASA_SPAN); j += 16) {
            hidden +=
                fasa_select_16(row + j, stride, n_group, w.factor.data() + i, n_span, key + j, most + j / FASA_BLOCK);
        }
    }
    if (whole < n_kv) {
        w.last.assign(n_group * 16, -1.0f);
        for (int64_t g = 0; g < n_group; ++g) {
            memcpy(w.last.data() + g * 16, row + g * stride + whole, (n_kv - whole) * sizeof(float));
        }
        hidden += fasa_select_16(
            w.last.data(), 16, n_group, w.factor.data() + n_span - 1, n_span, key + whole, most + whole / FASA_BLOCK);
    }
    w.keys.n_visible = w.keys.key.size();
    for (int l = 0; l < 16; ++l) {
        w.keys.n_visible += hidden[l];
    }
}

static void fasa_select_lists(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth, fasa_select_work & w) {
    const ggml_tensor * tip    = dst->src[0];
    const ggml_tensor * forced = dst->src[1];

    const int64_t n_kv = fasa_tip_n_kv(tip), n_list = dst->ne[1], n_tps = dst->ne[2], n_stream = dst->ne[3];
    const int64_t n_group = tip->ne[1] / n_list; // query heads that share a list

    uint64_t attended = 0, visible = 0, lists = 0;
    for (int64_t i = ith; i < n_list * n_tps * n_stream; i += nth) {
        const int64_t h = i % n_list, t = i / n_list % n_tps, s = i / n_list / n_tps;
        fasa_select_keys(tip, h * n_group, n_group, t, s, w);
        const int32_t * cells = (const int32_t *) fasa_at(forced, t, s, 0);
        for (int64_t j = 0; j < forced->ne[0]; ++j) {
            if (cells[j] >= 0 && cells[j] < n_kv) {
                w.keys.force(cells[j]);
            }
        }
        int32_t * list = (int32_t *) fasa_at(dst, h, t, s);
        list[0]        = fasa_select(w.keys, n_group, { p.budget, p.mass, p.floor, p.cap }, list + 1, w.candidates);
        attended += list[0];
        visible += w.keys.n_visible;
        lists += 1;
    }
    if (auto * stats = fasa_op_layer(dst).stats) {
        stats->tokens_attended += attended;
        stats->tokens_visible += visible;
        stats->lists += lists;
    }
}

static void fasa_select_op(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth) {
    thread_local const auto work =
        std::make_unique<fasa_select_work>(); // a pointer: the address of a thread's own is looked up at every access
    fasa_select_lists(dst, p, ith, nth, *work);
}

// ---- FAC ----

// x [n] = softmax of x, a logit `sink` (or -inf) taking part and giving nothing
static void fasa_softmax(float * x, int64_t n, float sink) {
    const float most = std::max(fasa_max(x, n), sink);
    if (most == -INFINITY) {
        return; // an empty list
    }
    fasa_f32x16 sums = {};
    float sum        = expf(sink - most);
    int64_t i        = 0;
    for (; i + 16 <= n; i += 16) {
        const fasa_f32x16 e = fasa_exp(fasa_load<fasa_f32x16>(x + i) - most, 0.0f);
        memcpy(x + i, &e, sizeof(e));
        sums += e;
    }
    for (; i < n; ++i) {
        x[i] = expf(x[i] - most);
        sum += x[i];
    }
    sum += fasa_sum(sums);
    ggml_vec_scale_f32(n, x, 1.0f / sum);
}

// The rows of a list lie anywhere in the cache, so they are asked for some rows ahead.
static constexpr int64_t FASA_AHEAD = 12; // rows
static constexpr int64_t FASA_ROWS  = 16; // read, then worked on by all heads that share them

// rows [m, d] f32 of the cells list [m, of n in all]; those of the cells behind, or of `next` at the list's end, are
// asked for
static void fasa_fac_read(const ggml_tensor * t, int64_t h, int64_t s, const int32_t * list, int64_t m, int64_t n,
    const ggml_tensor * next, const int32_t * next_list, float * rows) {
    const size_t bytes = ggml_row_size(t->type, t->ne[0]);
    for (int64_t i = 0; i < m; ++i) {
        const int64_t ahead = i + FASA_AHEAD;
        if (ahead < n) {
            fasa_prefetch(fasa_at(t, h, list[ahead], s), bytes);
        } else if (next) {
            fasa_prefetch(fasa_at(next, h, next_list[std::min(ahead - n, FASA_AHEAD - 1)], s),
                ggml_row_size(next->type, next->ne[0]));
        }
        fasa_row_to_f32(fasa_at(t, h, list[i], s), rows + i * t->ne[0], t->type, t->ne[0]);
    }
}

// x [M, stride], n of each: the products of the query heads q [M][d] with rows [n, d]
template <int M>
static void fasa_fac_dots(
    const float * rows, int64_t n, int64_t d, const float * const * q, float * x, int64_t stride) {
    for (int64_t i = 0; i < n; ++i, rows += d) {
        fasa_f32x16 acc[M] = {};
        int64_t j          = 0;
        for (; j + 16 <= d; j += 16) {
            const fasa_f32x16 r = fasa_load<fasa_f32x16>(rows + j);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                acc[m] += r * fasa_load<fasa_f32x16>(q[m] + j);
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            float sum = fasa_sum(acc[m]);
            for (int64_t l = j; l < d; ++l) {
                sum += rows[l] * q[m][l];
            }
            x[m * stride + i] = sum;
        }
    }
}

// 16*W dimensions, from j on, of out [M][d] += x [M, stride] * rows [n, d]: they stay in registers
template <int M, int W>
static inline void fasa_fac_add_at(
    const float * rows, int64_t n, int64_t d, int64_t j, const float * x, int64_t stride, float * const * out) {
    fasa_f32x16 acc[M][W];
    for (int m = 0; m < M; ++m) {
        memcpy(acc[m], out[m] + j, sizeof(acc[m]));
    }
    for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 2
        for (int w = 0; w < W; ++w) {
            const fasa_f32x16 r = fasa_load<fasa_f32x16>(rows + i * d + j + 16 * w);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                acc[m][w] += r * x[m * stride + i];
            }
        }
    }
    for (int m = 0; m < M; ++m) {
        memcpy(out[m] + j, acc[m], sizeof(acc[m]));
    }
}

template <int M>
static void fasa_fac_add(
    const float * rows, int64_t n, int64_t d, const float * x, int64_t stride, float * const * out) {
    int64_t j = 0;
    for (; j + 32 <= d; j += 32) {
        fasa_fac_add_at<M, 2>(rows, n, d, j, x, stride, out);
    }
    for (; j + 16 <= d; j += 16) {
        fasa_fac_add_at<M, 1>(rows, n, d, j, x, stride, out);
    }
    for (; j < d; ++j) {
        for (int m = 0; m < M; ++m) {
            for (int64_t i = 0; i < n; ++i) {
                out[m][j] += x[m * stride + i] * rows[i * d + j];
            }
        }
    }
}

static constexpr int64_t FASA_HEADS                             = 4; // that share registers
static constexpr decltype(&fasa_fac_dots<1>) fasa_fac_dots_of[] = { fasa_fac_dots<1>, fasa_fac_dots<2>,
    fasa_fac_dots<3>, fasa_fac_dots<4> };
static constexpr decltype(&fasa_fac_add<1>) fasa_fac_add_of[]   = { fasa_fac_add<1>, fasa_fac_add<2>, fasa_fac_add<3>,
    fasa_fac_add<4> };

struct fasa_fac_work {            // of a thread: the op has no work buffer
    std::vector<float> logit;     // [heads][n]
    std::vector<float> rows;      // [FASA_ROWS][d]
    std::vector<const float *> q; // [heads]
    std::vector<float *> out;     // [heads]
};

// query heads [g0, g1) of one KV head and token over one list
static void fasa_fac_heads(const ggml_tensor * t, const fasa_op_params & p, int64_t h, int64_t tok, int64_t s,
    int64_t g0, int64_t g1, fasa_fac_work & w) {
    const ggml_tensor *q = t->src[1], *k = t->src[2], *v = t->src[3], *mask = t->src[4], *sinks = t->src[5];

    const int64_t d_k = k->ne[0], d_v = v->ne[0], n_tps = t->ne[2], m = g1 - g0;
    const int64_t n_group = t->ne[1] / k->ne[1];

    const int64_t own = n_group * t->src[0]->ne[1] / t->ne[1]; // query heads of a KV head over those that share a list
    const int32_t * list     = (const int32_t *) fasa_at(t->src[0], h * own + g0 * own / n_group, tok, s);
    const ggml_fp16_t * hide = (const ggml_fp16_t *) fasa_at(mask, tok, 0, s);
    const int64_t n          = *list++;

    w.logit.resize(m * n);
    w.rows.resize(FASA_ROWS * std::max(d_k, d_v));
    w.q.resize(m);
    w.out.resize(m);
    for (int64_t g = 0; g < m; ++g) {
        w.q[g]   = (const float *) fasa_at(q, h * n_group + g0 + g, s * n_tps + tok, 0);
        w.out[g] = (float *) fasa_at(t, h * n_group + g0 + g, tok, s);
        memset(w.out[g], 0, d_v * sizeof(float));
    }
    float *logit = w.logit.data(), *rows = w.rows.data();
    for (int64_t i = 0; i < n; i += FASA_ROWS) {
        const int64_t n_row = std::min(FASA_ROWS, n - i);
        fasa_fac_read(k, h, s, list + i, n_row, n - i, n < FASA_AHEAD ? nullptr : v, list, rows);
        for (int64_t g = 0; g < m; g += FASA_HEADS) {
            fasa_fac_dots_of[std::min(FASA_HEADS, m - g) - 1](rows, n_row, d_k, w.q.data() + g, logit + g * n + i, n);
        }
        for (int64_t j = i; j < i + n_row; ++j) {
            const float bias = GGML_CPU_FP16_TO_FP32(hide[list[j]]);
            for (int64_t g = 0; g < m; ++g) {
                const float dot  = p.scale * logit[g * n + j];
                logit[g * n + j] = (p.soft_cap > 0 ? p.soft_cap * tanhf(dot / p.soft_cap) : dot) + bias;
            }
        }
    }
    for (int64_t g = 0; g < m; ++g) {
        fasa_softmax(logit + g * n, n, sinks ? ((const float *) sinks->data)[h * n_group + g0 + g] : -INFINITY);
    }
    for (int64_t i = 0; i < n; i += FASA_ROWS) {
        const int64_t n_row = std::min(FASA_ROWS, n - i);
        fasa_fac_read(v, h, s, list + i, n_row, n - i, nullptr, nullptr, rows);
        for (int64_t g = 0; g < m; g += FASA_HEADS) {
            fasa_fac_add_of[std::min(FASA_HEADS, m - g) - 1](rows, n_row, d_v, logit + g * n + i, n, w.out.data() + g);
        }
    }
}

static void fasa_fac(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth) {
    const ggml_tensor *list = dst->src[0], *k = dst->src[2], *v = dst->src[3];

    const int64_t n_head = dst->ne[1], n_tps = dst->ne[2], n_stream = dst->ne[3], n_head_kv = k->ne[1],
                  n_group = n_head / n_head_kv;
    const int64_t n_list = list->ne[1], n_shared = n_head / n_list; // query heads that share a list

    thread_local fasa_fac_work work_of_thread;
    auto & work = work_of_thread;
    int64_t first, last;
    fasa_split(n_head * n_tps * n_stream, ith, nth, first, last);
    for (int64_t i = first; i < last;) {
        const int64_t head = i % n_head, t = i / n_head % n_tps, s = i / n_head / n_tps;
        const int64_t h = head / n_group, g0 = head % n_group,
                      g1 = std::min(g0 / n_shared * n_shared + n_shared, g0 + last - i);
        fasa_fac_heads(dst, p, h, t, s, g0, g1, work);
        i += g1 - g0;
    }

    if (auto * stats = ith == 0 ? fasa_op_layer(dst).stats : nullptr) {
        const uint64_t row_bytes = ggml_row_size(k->type, k->ne[0]) + ggml_row_size(v->type, v->ne[0]);
        uint64_t rows            = 0;
        for (int64_t j = 0; j < n_list * n_tps * n_stream; ++j) {
            rows += *(const int32_t *) fasa_at(list, j % n_list, j / n_list % n_tps, j / n_list / n_tps);
        }
        stats->layers_sparse += 1;
        stats->bytes_fac += rows * row_bytes;
        stats->bytes_dense += k->ne[2] * n_head_kv * n_stream * row_bytes;
    }
}

// ---- OBSERVE ----

static void fasa_observe(ggml_tensor * dst, const fasa_op_params & p) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1];
    const auto * slot    = (const fasa_observer_slot *) p.userdata;
    *(float *) dst->data = 0.0f;
    if (slot == nullptr || slot->fn == nullptr) {
        return;
    }
    std::vector<float> copy(ggml_nelements(q)); // q may be a view with gaps
    for (int64_t t = 0; t < q->ne[2]; ++t) {
        for (int64_t h = 0; h < q->ne[1]; ++h) {
            memcpy(copy.data() + (t * q->ne[1] + h) * q->ne[0], fasa_at(q, h, t, 0), q->ne[0] * sizeof(float));
        }
    }
    fasa_observation seen = {};
    seen.il               = p.k_dom;
    seen.n_head           = q->ne[1];
    seen.n_head_kv        = k->ne[1];
    seen.n_embd_head      = q->ne[0];
    seen.n_tokens         = q->ne[2];
    seen.n_kv             = k->ne[2];
    seen.q                = copy.data();
    seen.k                = k->data;
    seen.k_is_f16         = k->type == GGML_TYPE_F16;
    seen.scale            = p.scale;
    seen.soft_cap         = p.soft_cap;
    slot->fn(&seen, slot->user);
}

extern "C" void fasa_cpu_op(ggml_tensor * dst, int ith, int nth, void * userdata);

extern "C" void fasa_cpu_op(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(userdata);
    const fasa_op_params p = *fasa_op_get(dst);
    switch (p.kind) {
        case FASA_OP_TIP: fasa_tip(dst, p, ith, nth); break;
        case FASA_OP_SELECT: fasa_select_op(dst, p, ith, nth); break;
        case FASA_OP_FAC: fasa_fac(dst, p, ith, nth); break;
        case FASA_OP_OBSERVE:
            if (ith == 0) {
                fasa_observe(dst, p);
            }
            break; // ggml calls every thread, whatever n_tasks says
        default: GGML_ABORT("unknown FASA op");
    }
}
