// FAC on the CPU: exact attention over the cells of a list. Definition: attend of fasa_gguf/reference.py.

#include "cpu/nodes.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

// x [n] = softmax of x. The logit `sink` adds to the sum only; -inf: there is none.
static void fasa_softmax(float * x, int64_t n, float sink) {
    const float most = std::max(fasa_max(x, n), sink);
    if (most == -INFINITY) {
        std::fill(x, x + n, 0.0f); // an empty list, or one of hidden cells only: the output is 0
        return;
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

// The rows of a list lie anywhere in the cache, so they are prefetched some rows ahead.
static constexpr int64_t FASA_AHEAD = 12; // rows
static constexpr int64_t FASA_ROWS  = 16; // converted at a time, for all heads that share them

// The first m of a list's n remaining cells, from t, as f32 in rows [m, d]. Prefetches the cells after them, and at the
// end of the list the first ones of `next`.
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

// x [M, stride], of which n are written: the dot products of the query heads q [M][d] with rows [n, d]
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

// out [M][d] += x [M, stride] * rows [n, d], for 16*W dimensions from j on, which stay in registers
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

struct fasa_fac_work {            // one per thread: the op has no work buffer
    std::vector<float> logit;     // [heads][n]
    std::vector<float> rows;      // [FASA_ROWS][d]
    std::vector<const float *> q; // [heads]
    std::vector<float *> out;     // [heads]
};

// The cells of a list, which has room for `most`; 0: it names one that is not there. That list was not made by SELECT,
// but came over the wire (rpc/rpc.h), and is not to be followed.
static int64_t fasa_fac_count(const int32_t * list, int64_t most, int64_t n_kv) {
    const int64_t n = *list++;
    uint32_t bad    = n < 0 || n > most;
    for (int64_t i = 0; i < n && !bad; i += 16) {
        for (int64_t j = i; j < std::min(i + 16, n); ++j) {
            bad |= (uint32_t) list[j] >= (uint32_t) n_kv;
        }
    }
    return bad ? 0 : n;
}

// Query heads [g0, g1) of KV head h over the list that they share, for one token
static void fasa_fac_heads(const ggml_tensor * t, const fasa_op_params & p, int64_t h, int64_t tok, int64_t s,
    int64_t g0, int64_t g1, fasa_fac_work & w) {
    const ggml_tensor *q = t->src[1], *k = t->src[2], *v = t->src[3], *mask = t->src[4], *sinks = t->src[5];

    const int64_t d_k = k->ne[0], d_v = v->ne[0], n_tps = t->ne[2], m = g1 - g0;
    const int64_t n_group = t->ne[1] / k->ne[1];

    const int64_t own = n_group * t->src[0]->ne[1] / t->ne[1]; // query heads of a KV head over those that share a list
    const int32_t * list     = (const int32_t *) fasa_at(t->src[0], h * own + g0 * own / n_group, tok, s);
    const ggml_fp16_t * hide = (const ggml_fp16_t *) fasa_at(mask, tok, 0, s);
    const int64_t n          = fasa_fac_count(list++, t->src[0]->ne[0] - 1, k->ne[2]);

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

void fasa_cpu_fac(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth) {
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
        stats->bytes_fac += rows * row_bytes;
    }
}
