// TIP on the CPU: derives K_dom of the stale cells from the stored K, then estimates the logits of every cell.
// Definition: quantize_k_dom and estimate of fasa_gguf/reference.py.

#include "core/select.h"
#include "cpu/nodes.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

static_assert(FASA_TILE == 32, "the loops take a tile as two vectors of 16 cells");

// ---- refresh ----

// One cell's dominant values x [n_dom], into lane `lane` of its block
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

void fasa_refresh(const ggml_tensor * tip, const fasa_op_params & p, int64_t first, int64_t last) {
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
                        x[d] = (uint64_t) dim[d] < (uint64_t) d_k ? row[dim[d]] : 0.0f; // -1: padding
                    }
                    fasa_k_dom_write(
                        p.k_dom, n_dom, x.data(), fasa_at(k_dom, cell / FASA_TILE, h, s), cell % FASA_TILE);
                }
            }
        }
    }
}

// ---- estimate ----

// The dominant dimensions of one token's query heads, times weight and scale. For K_dom in q8 and q4 also in 8 bits.
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
                x[head * n_dom + d] = (uint64_t) dim[d] < (uint64_t) d_k ? row[dim[d]] * w[d] * p.scale : 0.0f;
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

// Logits of one tile for M query heads from `head` on. out [M][FASA_SPAN], of which FASA_TILE are written.
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
        constexpr int zero   = K_DOM == FASA_K_DOM_Q4 ? 8 : 128; // the unsigned value that stands for 0
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

// A cell whose K is not stored yet has the logit FASA_FRESH, unless it is hidden. hide: of the n cells from `cell` on
static void fasa_hide_fresh(const ggml_tensor * fresh, int64_t s, int64_t cell, int64_t n, float * hide) {
    const int32_t * cells = (const int32_t *) ((const char *) fresh->data + s * fresh->nb[1]);
    for (int64_t i = 0; i < fresh->ne[0]; ++i) {
        const int64_t at = cells[i] - cell;
        if (cells[i] >= 0 && at >= 0 && at < n && hide[at] > -INFINITY) {
            hide[at] = FASA_FRESH;
        }
    }
}

// One span of n cells: logits x [FASA_SPAN] to exp(x)/2^e in out [n], with their e and their sum. hide [FASA_SPAN] is
// the mask, -inf from cell n on.
static void fasa_tip_span(
    float * x, const float * hide, float soft_cap, int64_t n, float * out, float * e, float * sum) {
    if (soft_cap > 0) {
        for (int64_t c = 0; c < n; ++c) {
            x[c] = soft_cap * tanhf(x[c] / soft_cap);
        }
    }
    fasa_f32x16 most = fasa_f32x16{} - INFINITY;
    for (int64_t c = 0; c < n; c += 16) {
        const fasa_f32x16 h = fasa_load<fasa_f32x16>(hide + c);
        const fasa_f32x16 v = h > FASA_FRESH ? fasa_load<fasa_f32x16>(x + c) + h : h; // x may be anything, NaN too
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

void fasa_cpu_tip(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth) {
    const ggml_tensor *k_dom = dst->src[0], *dims = dst->src[4], *mask = dst->src[6], *fresh = dst->src[7];

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
                if (fresh) {
                    fasa_hide_fresh(fresh, s, cell, n, hide);
                }
                for (int64_t head = 0; head < n_head;) {
                    const int64_t m = std::min<int64_t>(4, n_group - head % n_group);
                    const auto f    = fasa_tip_tile_get(p.k_dom, m);
                    for (int64_t c = 0; c < n; c += FASA_TILE) {
                        f(n_dom, fasa_at(k_dom, (cell + c) / FASA_TILE, head / n_group, s), query, head, x[0] + c);
                    }
                    // the exponentials hide the prefetch of the K_dom that the next heads read
                    const int64_t next   = head + m == n_head ? span + 1 : span;
                    const int64_t left   = std::min<int64_t>(FASA_SPAN, n_kv - next * FASA_SPAN);
                    const int64_t n_next = next == last ? 0 : left / FASA_TILE * k_dom->nb[1];
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
