// TIP of sparse prefill: REFRESH and TIP of ops/tile.h. Definition: tile_estimate and tile_score of
// fasa_gguf/reference_prefill.py.

#include "core/select.h"
#include "cpu/nodes.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "ops/tile.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

// ---- REFRESH ----

static constexpr float FASA_TO_INT = 12582912.0f; // 1.5*2^23: x + this has x, rounded to the nearest integer, below

// The nearest integer, ties to even; |x| < 2^22. Where the machine has an instruction for it, x is rounded before: q4
// has many values at a tie, and a fused multiplication would move them.
static inline fasa_i32x16 fasa_nearest(fasa_f32x16 x) {
#if defined(__AVX512F__)
    return (fasa_i32x16) _mm512_cvtps_epi32((__m512) x);
#elif defined(__AVX2__)
    __m256 half[2];
    __m256i out[2];
    memcpy(half, &x, sizeof(x));
    out[0] = _mm256_cvtps_epi32(half[0]);
    out[1] = _mm256_cvtps_epi32(half[1]);
    return fasa_load<fasa_i32x16>(out);
#else
    return (fasa_i32x16) (x + FASA_TO_INT) - 0x4b400000;
#endif
}

// x [n_dom] of 16 cells, from half a block of K_dom
static void fasa_k_dom_read(int k_dom, int n_dom, const char * block, int half, fasa_f32x16 * x) {
    const char * data = block + fasa_block_scales(k_dom, n_dom);
    for (int d = 0; k_dom == FASA_K_DOM_F16 && d < n_dom; ++d) {
        x[d] = fasa_f32_f16((const ggml_fp16_t *) data + d * FASA_TILE + half * 16);
    }
    for (int g = 0; k_dom != FASA_K_DOM_F16 && g < n_dom / FASA_GROUP; ++g, x += FASA_GROUP) {
        const fasa_f32x16 s = fasa_f32_f16((const ggml_fp16_t *) block + g * FASA_TILE + half * 16);
        if (k_dom == FASA_K_DOM_Q4) {
            const fasa_i32x16 v = fasa_load<fasa_i32x16>(data + (g * FASA_TILE + half * 16) * 4);
            for (int d = 0; d < 4; ++d) {
                x[d]     = fasa_f32_i32(((v >> (8 * d)) & 15) - 8) * s;
                x[d + 4] = fasa_f32_i32(((v >> (8 * d + 4)) & 15) - 8) * s;
            }
        } else {
            for (int w = 0; w < 2; ++w) {
                const fasa_i32x16 v = fasa_load<fasa_i32x16>(data + ((2 * g + w) * FASA_TILE + half * 16) * 4);
                for (int d = 0; d < 4; ++d) {
                    x[4 * w + d] = fasa_f32_i32((v << (24 - 8 * d)) >> 24) * s;
                }
            }
        }
    }
}

// 16 cells x [n_dom] in 8 bits with one scale a cell: fasa_rows_16_bytes
static void fasa_rows_write(int n_dom, const fasa_f32x16 * x, char * out) {
    fasa_f32x16 most = {};
    for (int d = 0; d < n_dom; ++d) {
        const fasa_f32x16 a = (fasa_f32x16) ((fasa_i32x16) x[d] & 0x7fffffff);
        most                = a > most ? a : most;
    }
    const fasa_f32x16 scale = most / 127.0f;
    const fasa_f32x16 inv   = scale > 0.0f ? 1.0f / scale : fasa_f32x16{};
    for (int w = 0; w < n_dom / 4; ++w) {
        fasa_i32x16 word = {};
        for (int d = 0; d < 4; ++d) {
            word |= (fasa_nearest(x[4 * w + d] * inv) + 128) << (8 * d);
        }
        memcpy(out + w * 64, &word, 64);
    }
    memcpy(out + n_dom * 16, &scale, 64);
}

void fasa_cpu_tile_refresh(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth) {
    const ggml_tensor *k_dom = dst->src[0], *k = dst->src[1];
    const int64_t n_kv = k->ne[2], n_dom = dst->src[4]->ne[0], n_tile = (n_kv + FASA_TILE - 1) / FASA_TILE;

    int64_t first, last;
    fasa_split(n_tile, ith, nth, first, last);
    fasa_refresh(dst, p, first * FASA_TILE, std::min(n_kv, last * FASA_TILE));
    std::vector<fasa_f32x16> x(n_dom);
    for (int64_t s = 0; s < k->ne[3]; ++s) {
        for (int64_t h = 0; h < k->ne[1]; ++h) {
            for (int64_t i = 2 * first; i < std::min(2 * last, dst->ne[1]); ++i) {
                fasa_k_dom_read(p.k_dom, n_dom, fasa_at(k_dom, i / 2, h, s), i % 2, x.data());
                fasa_rows_write(n_dom, x.data(), fasa_at(dst, i, h, s));
            }
        }
    }
}

// ---- TIP ----

static constexpr int FASA_ROWS_AT_ONCE = 8; // queries that share the loads of a cell's row
static constexpr float FASA_LOG2E      = 1.44269504f;

struct fasa_tile_tip_work {    // one per thread: the op has no work buffer
    std::vector<float> row, x; // [d], [n_dom]
    std::vector<int32_t> word; // [count rounded up][n_dom/4] 4 int8 each
    std::vector<float> scale;  // [count rounded up]
    std::vector<int32_t> sum;  // [count rounded up] of the int8 values
    std::vector<float> e;      // [FASA_ROWS_AT_ONCE][n_kv rounded up + 2*n_span] as of TIP
    std::vector<float> factor; // [FASA_ROWS_AT_ONCE][n_span]
    std::vector<float> pool;   // [n_kv rounded up]
    std::vector<int8_t> state; // [n_span] enum fasa_seen
};

// the queries of one head, in 8 bits with one scale each
static void fasa_tile_queries(const ggml_tensor * tip, const fasa_op_params & p, const fasa_tile_ref & tile,
    int64_t head, fasa_tile_tip_work & w) {
    const ggml_tensor *q = tip->src[1], *dims = tip->src[2], *weight = tip->src[3];

    const int64_t d_k = q->ne[0], n_dom = dims->ne[0], h = head / (q->ne[1] / dims->ne[1]);
    const int64_t n_row = (tile.count + FASA_ROWS_AT_ONCE - 1) / FASA_ROWS_AT_ONCE * FASA_ROWS_AT_ONCE;
    const int32_t * dim = (const int32_t *) ((const char *) dims->data + h * dims->nb[1]);
    const float * by    = (const float *) ((const char *) weight->data + h * weight->nb[1]);
    w.row.resize(d_k);
    w.x.resize(n_dom);
    w.word.assign(n_row * n_dom / 4, 0);
    w.scale.assign(n_row, 0.0f);
    w.sum.assign(n_row, 0);
    for (int32_t t = 0; t < tile.count; ++t) {
        memcpy(w.row.data(), fasa_at(q, head, tile.token[t], 0), d_k * sizeof(float));
        if (p.n_hadamard > 0) {
            fasa_hadamard(w.row.data(), d_k, p.n_hadamard);
        }
        float most = 0.0f;
        for (int64_t d = 0; d < n_dom; ++d) {
            w.x[d] = dim[d] < 0 ? 0.0f : w.row[dim[d]] * by[d] * p.scale;
            most   = std::max(most, fabsf(w.x[d]));
        }
        const float step = most / 127.0f, inv = step > 0.0f ? 1.0f / step : 0.0f;
        int8_t * to = (int8_t *) (w.word.data() + t * n_dom / 4);
        for (int64_t d = 0; d < n_dom; ++d) {
            to[d] = (int8_t) rintf(w.x[d] * inv);
            w.sum[t] += to[d];
        }
        w.scale[t] = step;
    }
}

// Logits x [FASA_ROWS_AT_ONCE][FASA_SPAN] of the queries from row r on, over n 16-cell rows of keys
static void fasa_tile_dots(
    const char * rows, int64_t n, int n_dom, const fasa_tile_tip_work & w, int64_t r, float * x) {
    constexpr int R      = FASA_ROWS_AT_ONCE;
    const int n_word     = n_dom / 4;
    const int32_t * word = w.word.data() + r * n_word;
    const int32_t * sum  = w.sum.data() + r;
    const float * scale  = w.scale.data() + r;
    for (int64_t b = 0; b < n; ++b, rows += fasa_rows_16_bytes(n_dom)) {
        fasa_i32x16 acc[R];
#pragma GCC unroll 8
        for (int m = 0; m < R; ++m) {
            acc[m] = fasa_i32x16{} - 128 * sum[m];
        }
        for (int j = 0; j < n_word; ++j) {
            const fasa_i32x16 k = fasa_load<fasa_i32x16>(rows + j * 64);
#pragma GCC unroll 8
            for (int m = 0; m < R; ++m) {
                acc[m] = fasa_dot4(acc[m], k, word[m * n_word + j]);
            }
        }
        const fasa_f32x16 s = fasa_load<fasa_f32x16>(rows + n_word * 64);
#pragma GCC unroll 8
        for (int m = 0; m < R; ++m) {
            const fasa_f32x16 v = fasa_f32_i32(acc[m]) * (s * scale[m]);
            memcpy(x + m * FASA_SPAN + b * 16, &v, sizeof(v));
        }
    }
}

// 2^(x - e) for whole e, 0 where that is not above 2^-FASA_SPAN_RANGE; relative error below 2e-6
static inline fasa_f32x16 fasa_exp2(fasa_f32x16 x, float e) {
    const fasa_i32x16 keep = x > e - FASA_SPAN_RANGE;
    x                      = (fasa_f32x16) ((fasa_i32x16) x & keep);
#if defined(__AVX512F__)
    const fasa_f32x16 n = (fasa_f32x16) _mm512_roundscale_ps((__m512) x, 0);
#else
    const fasa_f32x16 shift = x + FASA_TO_INT;
    const fasa_f32x16 n     = shift - FASA_TO_INT;
#endif
    const fasa_f32x16 r = x - n; // [-0.5, 0.5]
    fasa_f32x16 p       = r * 9.67151315e-3f + 5.55073375e-2f;
    p                   = p * r + 2.40222421e-1f;
    p                   = p * r + 6.93146978e-1f;
    p                   = p * r + 1.0f;
#if defined(__AVX512F__)
    return (fasa_f32x16) _mm512_maskz_scalef_ps(
        _mm512_test_epi32_mask((__m512i) keep, (__m512i) keep), (__m512) p, (__m512) (n - e));
#else
    const fasa_i32x16 pow2 = (((fasa_i32x16) shift - 0x4b400000) + (127 - (int32_t) e)) << 23;
    return (fasa_f32x16) ((fasa_i32x16) (p * (fasa_f32x16) pow2) & keep);
#endif
}

// Logits x [n] of one query over n cells, a multiple of 16, in place, as it sees them: soft-capped and hidden. first:
// from which position on a query sees each cell; nullptr: it sees all of them
static void fasa_tile_see(float * x, int64_t n, float soft_cap, const int32_t * first, int32_t pos) {
    for (int64_t c = 0; c < n; c += 16) {
        fasa_f32x16 v = fasa_load<fasa_f32x16>(x + c);
        v             = soft_cap > 0 ? fasa_soft_cap(v, soft_cap) : v;
        if (first) {
            v = fasa_load<fasa_i32x16>(first + c) <= pos ? v : fasa_f32x16{} - INFINITY; // v may be anything, NaN too
        }
        memcpy(x + c, &v, sizeof(v));
    }
}

// first [n]: from which position on a query of the tile sees each of n cells
static void fasa_tile_first(const int8_t * view, const int32_t * cell_pos, int64_t n, int32_t * first) {
    for (int64_t c = 0; c < n; ++c) {
        first[c] = view[c] == FASA_SEEN_BY_NONE ? INT32_MAX : cell_pos[c];
    }
}

// One span of n cells, a multiple of 16: logits x to 2^(x*log2(e) - e) in out [n], with their e and their sum
static void fasa_tile_span(const float * x, int64_t n, float * out, float * e, float * sum) {
    fasa_f32x16 most = fasa_f32x16{} - INFINITY;
    for (int64_t c = 0; c < n; c += 16) {
        const fasa_f32x16 v = fasa_load<fasa_f32x16>(x + c);
        most                = v > most ? v : most;
    }
    float top = -INFINITY;
    for (int l = 0; l < 16; ++l) {
        top = std::max(top, most[l]);
    }
    *sum = 0.0f;
    if (top == -INFINITY) {
        *e = -INFINITY;
        memset(out, 0, n * sizeof(float));
        return;
    }
    *e               = rintf(top * FASA_LOG2E);
    fasa_f32x16 sums = {};
    for (int64_t c = 0; c < n; c += 16) {
        const fasa_f32x16 y = fasa_exp2(fasa_load<fasa_f32x16>(x + c) * FASA_LOG2E, *e);
        memcpy(out + c, &y, sizeof(y));
        sums += y;
    }
    *sum = fasa_sum(sums);
}

// pool += the softmaxes of the FASA_ROWS_AT_ONCE queries whose exponentials are in w.e
static void fasa_tile_pool(int64_t n_kv, int64_t n_span, fasa_tile_tip_work & w) {
    constexpr int R      = FASA_ROWS_AT_ONCE;
    const int64_t stride = n_span * FASA_SPAN + 2 * n_span;
    fasa_select_factors(w.e.data(), stride, R, n_span * FASA_SPAN, w.factor.data());
    for (int64_t i = 0; i < n_span; ++i) {
        float f[R], any = 0.0f;
        for (int m = 0; m < R; ++m) {
            f[m] = w.factor[m * n_span + i];
            any += f[m];
        }
        if (w.state[i] == FASA_SEEN_BY_NONE || any == 0.0f) {
            continue;
        }
        const int64_t last = std::min((i + 1) * FASA_SPAN, (n_kv + 15) / 16 * 16);
        for (int64_t c = i * FASA_SPAN; c < last; c += 16) {
            fasa_f32x16 sum = fasa_load<fasa_f32x16>(w.pool.data() + c);
#pragma GCC unroll 8
            for (int m = 0; m < R; ++m) {
                sum = fasa_fma(fasa_load<fasa_f32x16>(w.e.data() + m * stride + c), f[m], sum);
            }
            memcpy(w.pool.data() + c, &sum, sizeof(sum));
        }
    }
}

// what a tile sees of every span of n_kv cells
static void fasa_tile_states(const int8_t * view, int64_t n_kv, std::vector<int8_t> & state) {
    state.resize(fasa_n_span(n_kv));
    for (size_t i = 0; i < state.size(); ++i) {
        const int8_t * of = view + i * FASA_SPAN;
        bool none = true, all = true;
        for (int c = 0; c < FASA_SPAN; ++c) {
            none = none && of[c] == FASA_SEEN_BY_NONE;
            all  = all && of[c] == FASA_SEEN_BY_ALL;
        }
        state[i] = none ? FASA_SEEN_BY_NONE : all ? FASA_SEEN_BY_ALL : FASA_SEEN_BY_SOME;
    }
}

// the exponentials of the queries from row r on, with the exponents and sums of their spans
static void fasa_tile_rows(const ggml_tensor * dst, const fasa_op_params & p, const fasa_tile_ref & tile,
    const int8_t * view, int64_t h, int64_t r, fasa_tile_tip_work & w) {
    constexpr int R          = FASA_ROWS_AT_ONCE;
    const ggml_tensor * rows = dst->src[0];
    const auto * cell_pos    = (const int32_t *) fasa_at(dst->src[4], tile.stream, 0, 0);
    const int64_t n_kv = dst->ne[0], n_span = w.state.size(), stride = n_span * FASA_SPAN + 2 * n_span;
    const int n_dom = dst->src[2]->ne[0];
    alignas(64) float x[R * FASA_SPAN];
    alignas(64) int32_t first[FASA_SPAN];
    for (int64_t i = 0; i < n_span; ++i) {
        const int64_t cell = i * FASA_SPAN, n = std::min<int64_t>(FASA_SPAN, n_kv - cell), n_16 = (n + 15) / 16;
        float * e = w.e.data() + n_span * FASA_SPAN + i;
        if (w.state[i] == FASA_SEEN_BY_NONE) {
            for (int m = 0; m < R; ++m) {
                e[m * stride]          = -INFINITY;
                e[m * stride + n_span] = 0.0f;
            }
            continue;
        }
        fasa_tile_dots(fasa_at(rows, cell / 16, h, tile.stream), n_16, n_dom, w, r, x);
        const bool some = w.state[i] == FASA_SEEN_BY_SOME;
        if (some) {
            fasa_tile_first(view + cell, cell_pos + cell, n_16 * 16, first);
        }
        for (int m = 0; m < R; ++m) {
            if (r + m >= tile.count) {
                std::fill(x + m * FASA_SPAN, x + m * FASA_SPAN + n_16 * 16, -INFINITY);
            } else if (some || p.soft_cap > 0) {
                fasa_tile_see(x + m * FASA_SPAN, n_16 * 16, p.soft_cap, some ? first : nullptr, tile.pos[r + m]);
            }
            fasa_tile_span(
                x + m * FASA_SPAN, n_16 * 16, w.e.data() + m * stride + cell, e + m * stride, e + m * stride + n_span);
        }
    }
}

static void fasa_tile_head(
    ggml_tensor * dst, const fasa_op_params & p, int64_t tile_i, int64_t head, fasa_tile_tip_work & w) {
    constexpr int R          = FASA_ROWS_AT_ONCE;
    const fasa_tile_ref tile = fasa_tile_at(dst->src[5], tile_i);
    const int64_t n_kv = dst->ne[0], n_span = fasa_n_span(n_kv), h = head / (dst->ne[1] / dst->src[2]->ne[1]);
    const auto * view = (const int8_t *) fasa_at(dst->src[6], tile_i, 0, 0);
    fasa_tile_states(view, n_kv, w.state);
    fasa_tile_queries(dst, p, tile, head, w);
    w.e.resize(R * (n_span * FASA_SPAN + 2 * n_span));
    w.factor.resize(R * n_span);
    w.pool.assign(n_span * FASA_SPAN, 0.0f);
    for (int64_t r = 0; r < tile.count; r += R) {
        fasa_tile_rows(dst, p, tile, view, h, r, w);
        fasa_tile_pool(n_kv, n_span, w);
    }
    memcpy(fasa_at(dst, head, tile_i, 0), w.pool.data(), n_kv * sizeof(float));
}

void fasa_cpu_tile_tip(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth) {
    // a pointer, because the compiler looks up the address of a thread_local object at every access
    thread_local const auto work = std::make_unique<fasa_tile_tip_work>();
    const int64_t n_head         = dst->ne[1];
    for (int64_t i = ith; i < n_head * dst->ne[2]; i += nth) {
        fasa_tile_head(dst, p, i / n_head, i % n_head, *work);
    }
}
