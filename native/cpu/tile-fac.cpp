// FAC of sparse prefill: exact attention of a tile's queries over the list that they share, a block of cells after the
// other, as flash attention does it. Definition: tile_attend of fasa_gguf/reference_prefill.py.
//
// Matrices have the tile's queries innermost: scores are [cells][queries] and the output is [d_v][queries]. So the rows
// of K and V are broadcast value by value and need no transposition, and the softmax has no sums across a vector.

#include "cpu/nodes.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "ops/tile.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

static constexpr int64_t FASA_FAC_CELLS = 64; // of a block

#if defined(__AVX512F__)
static constexpr int FASA_GEMM_M = 4, FASA_GEMM_N = 4; // 16 of 32 registers are sums
#else
static constexpr int FASA_GEMM_M = 6, FASA_GEMM_N = 1; // 12 of 16, a vector being two of them
#endif

// c [M][16*N, of rows of n] (+)= a [M][n_k] * b [n_k][n]; a's value (m, k) lies at a[m*a_m + k*a_k]
template <int M, int N, bool ADD>
static inline void fasa_gemm_at(
    const float * a, int64_t a_m, int64_t a_k, const float * b, int64_t n, int64_t n_k, float * c) {
    fasa_f32x16 acc[M][N] = {};
    for (int64_t k = 0; k < n_k; ++k) {
        fasa_f32x16 col[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
            col[j] = fasa_load<fasa_f32x16>(b + k * n + 16 * j);
        }
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            const float x = a[m * a_m + k * a_k];
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) {
                acc[m][j] += col[j] * x;
            }
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
            float * to = c + m * n + 16 * j;
            if (ADD) {
                acc[m][j] += fasa_load<fasa_f32x16>(to);
            }
            memcpy(to, &acc[m][j], sizeof(fasa_f32x16));
        }
    }
}

template <int N, bool ADD>
static inline void fasa_gemm_rows(
    const float * a, int64_t a_m, int64_t a_k, const float * b, int64_t n, int64_t n_k, int64_t n_m, float * c) {
    int64_t m = 0;
    for (; m + FASA_GEMM_M <= n_m; m += FASA_GEMM_M) {
        fasa_gemm_at<FASA_GEMM_M, N, ADD>(a + m * a_m, a_m, a_k, b, n, n_k, c + m * n);
    }
    for (; m < n_m; ++m) {
        fasa_gemm_at<1, N, ADD>(a + m * a_m, a_m, a_k, b, n, n_k, c + m * n);
    }
}

// the same for n_m rows and all n columns, a multiple of 16
template <bool ADD>
static void fasa_gemm(
    const float * a, int64_t a_m, int64_t a_k, const float * b, int64_t n, int64_t n_k, int64_t n_m, float * c) {
    int64_t j = 0;
    for (; j + 16 * FASA_GEMM_N <= n; j += 16 * FASA_GEMM_N) {
        fasa_gemm_rows<FASA_GEMM_N, ADD>(a, a_m, a_k, b + j, n, n_k, n_m, c + j);
    }
    for (; j < n; j += 16) {
        fasa_gemm_rows<1, ADD>(a, a_m, a_k, b + j, n, n_k, n_m, c + j);
    }
}

struct fasa_tile_fac_work {         // one per thread: the op has no work buffer
    int64_t n;                      // queries, rounded up to 16
    std::vector<float> q, out;      // [d_k][n], [d_v][n]
    std::vector<float> rows, score; // [FASA_FAC_CELLS][d], [FASA_FAC_CELLS][n]
    std::vector<float> most, sum;   // [n] of the softmax so far
    std::vector<float> line;        // [max(d_k, d_v)]
};

// q [d_k][n]: the tile's queries of one head, times scale
static void fasa_tile_fac_begin(
    const ggml_tensor * t, const fasa_op_params & p, const fasa_tile_ref & tile, int64_t head, fasa_tile_fac_work & w) {
    const ggml_tensor *q = t->src[1], *k = t->src[2], *v = t->src[3];
    const int64_t d_k = k->ne[0], d_v = v->ne[0];
    w.n = (tile.count + 15) / 16 * 16;
    w.q.assign(d_k * w.n, 0.0f);
    w.out.assign(d_v * w.n, 0.0f);
    w.rows.resize(FASA_FAC_CELLS * std::max(d_k, d_v));
    w.score.resize(FASA_FAC_CELLS * w.n);
    w.most.assign(w.n, -INFINITY);
    w.sum.assign(w.n, 0.0f);
    for (int32_t i = 0; i < tile.count; ++i) {
        const float * from = (const float *) fasa_at(q, head, tile.token[i], 0);
        for (int64_t d = 0; d < d_k; ++d) {
            w.q[d * w.n + i] = from[d] * p.scale;
        }
    }
}

// rows [n][d] of the n listed cells, as f32. The list may go on to `last`: those are prefetched.
static void fasa_tile_fac_read(
    const ggml_tensor * t, int64_t h, int64_t s, const int32_t * list, int64_t n, const int32_t * last, float * rows) {
    const size_t bytes = ggml_row_size(t->type, t->ne[0]);
    for (int64_t i = 0; i < n; ++i) {
        if (list + i + 12 < last) {
            fasa_prefetch(fasa_at(t, h, list[i + 12], s), bytes);
        }
        fasa_row_to_f32(fasa_at(t, h, list[i], s), rows + i * t->ne[0], t->type, t->ne[0]);
    }
}

// soft-capping, and what a query does not see, on scores of n_cell cells
static void fasa_tile_fac_see(const int32_t * cell_pos, const fasa_tile_ref & tile, float soft_cap,
    const int32_t * list, int64_t n_cell, fasa_tile_fac_work & w) {
    const int32_t first = *std::min_element(tile.pos, tile.pos + tile.count);
    for (int64_t c = 0; soft_cap > 0 && c < n_cell * w.n; c += 16) {
        const fasa_f32x16 x = fasa_soft_cap(fasa_load<fasa_f32x16>(w.score.data() + c), soft_cap);
        memcpy(w.score.data() + c, &x, sizeof(x));
    }
    for (int64_t c = 0; c < n_cell; ++c) {
        const int32_t pos = cell_pos[list[c]];
        float * x         = w.score.data() + c * w.n;
        for (int32_t i = 0; pos > first && i < tile.count; ++i) {
            x[i] = pos <= tile.pos[i] ? x[i] : -INFINITY;
        }
    }
}

// One step of the softmax: scores to exponentials, relative to the largest so far; sums and output follow
static void fasa_tile_fac_softmax(int64_t n_cell, int64_t d_v, fasa_tile_fac_work & w) {
    for (int64_t j = 0; j < w.n; j += 16) {
        const fasa_f32x16 before = fasa_load<fasa_f32x16>(w.most.data() + j);
        fasa_f32x16 most         = before;
        for (int64_t c = 0; c < n_cell; ++c) {
            const fasa_f32x16 x = fasa_load<fasa_f32x16>(w.score.data() + c * w.n + j);
            most                = x > most ? x : most;
        }
        const fasa_f32x16 base  = most > -INFINITY ? most : fasa_f32x16{}; // a query that sees nothing yet
        const fasa_f32x16 shift = fasa_exp(before - base, 0.0f);
        fasa_f32x16 sum         = fasa_load<fasa_f32x16>(w.sum.data() + j) * shift;
        for (int64_t c = 0; c < n_cell; ++c) {
            float * x           = w.score.data() + c * w.n + j;
            const fasa_f32x16 y = fasa_exp(fasa_load<fasa_f32x16>(x) - base, 0.0f);
            memcpy(x, &y, sizeof(y));
            sum += y;
        }
        memcpy(w.sum.data() + j, &sum, sizeof(sum));
        memcpy(w.most.data() + j, &most, sizeof(most));
        bool moved = false;
        for (int l = 0; l < 16; ++l) {
            moved = moved || most[l] > before[l];
        }
        for (int64_t d = 0; moved && d < d_v; ++d) {
            const fasa_f32x16 x = fasa_load<fasa_f32x16>(w.out.data() + d * w.n + j) * shift;
            memcpy(w.out.data() + d * w.n + j, &x, sizeof(x));
        }
    }
}

// the tile's rows of one head, by the sums; `sink` is a logit that takes mass and gives nothing, -inf: there is none
static void fasa_tile_fac_end(
    ggml_tensor * dst, const fasa_tile_ref & tile, int64_t head, float sink, fasa_tile_fac_work & w) {
    for (int32_t i = 0; i < tile.count; ++i) {
        const float base  = std::max(w.most[i], sink);
        const float shift = w.most[i] == -INFINITY ? 0.0f : expf(w.most[i] - base);
        const float total = w.sum[i] * shift + (sink == -INFINITY ? 0.0f : expf(sink - base));
        const float by    = total > 0.0f ? shift / total : 0.0f;
        float * to        = (float *) fasa_at(dst, head, tile.token[i] % dst->ne[2], tile.token[i] / dst->ne[2]);
        for (int64_t d = 0; d < dst->ne[0]; ++d) {
            to[d] = w.out[d * w.n + i] * by;
        }
    }
}

static void fasa_tile_fac_head(
    ggml_tensor * dst, const fasa_op_params & p, int64_t tile_i, int64_t head, fasa_tile_fac_work & w) {
    const ggml_tensor *lists = dst->src[0], *k = dst->src[2], *v = dst->src[3], *sinks = dst->src[5];
    const fasa_tile_ref tile = fasa_tile_at(dst->src[6], tile_i);
    const auto * cell_pos    = (const int32_t *) fasa_at(dst->src[4], tile.stream, 0, 0);
    const int64_t n_head = dst->ne[1], h = head / (n_head / k->ne[1]), d_k = k->ne[0], d_v = v->ne[0];

    const int32_t * list = (const int32_t *) fasa_at(lists, head / (n_head / lists->ne[1]), tile_i, 0);
    const int64_t n      = *list++;
    fasa_tile_fac_begin(dst, p, tile, head, w);
    for (int64_t i = 0; i < n; i += FASA_FAC_CELLS) {
        const int64_t n_cell = std::min(FASA_FAC_CELLS, n - i);
        fasa_tile_fac_read(k, h, tile.stream, list + i, n_cell, list + n, w.rows.data());
        fasa_gemm<false>(w.rows.data(), d_k, 1, w.q.data(), w.n, d_k, n_cell, w.score.data());
        fasa_tile_fac_see(cell_pos, tile, p.soft_cap, list + i, n_cell, w);
        fasa_tile_fac_softmax(n_cell, d_v, w);
        fasa_tile_fac_read(v, h, tile.stream, list + i, n_cell, list + n, w.rows.data());
        fasa_gemm<true>(w.rows.data(), 1, d_v, w.score.data(), w.n, n_cell, d_v, w.out.data());
    }
    fasa_tile_fac_end(dst, tile, head, sinks ? ((const float *) sinks->data)[head] : -INFINITY, w);
}

void fasa_cpu_tile_fac(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth) {
    thread_local const auto work = std::make_unique<fasa_tile_fac_work>();
    const int64_t n_head = dst->ne[1], n_tile = dst->src[6]->ne[1];
    for (int64_t i = ith; i < n_head * n_tile; i += nth) {
        fasa_tile_fac_head(dst, p, i / n_head, i % n_head, *work);
    }
}
