// SELECT on the CPU: the keys of every list from the scores of TIP, then the cells to attend (core/select.h).
// Definition: group_score and select of fasa_gguf/reference.py.

#include "core/select.h"
#include "cpu/nodes.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

// 2^e of a whole number e, -127 < e < 128
static inline float fasa_pow2(float e) {
    const int32_t bits = ((int32_t) e + 127) << 23;
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

void fasa_select_factors(const float * row, int64_t stride, int64_t n_group, int64_t n_kv, float * factor) {
    const int64_t n_span = fasa_n_span(n_kv);
    for (int64_t g = 0; g < n_group; ++g) {
        const float *e = row + g * stride + n_kv, *sum = e + n_span;
        const float most               = *std::max_element(e, e + n_span);
        float lane[FASA_SUM_PARTS][32] = {}, total = 0.0f; // summed in the order of the CUDA kernel
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

// most [2]: the largest key of each half of v. Keys are below 2^31.
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

// The keys of 16 cells, from TIP's scores of n_group query heads. The group's score is the sum of their softmaxes,
// times 2^FASA_SCORE_EXP. Returns -1 for every hidden cell: those are -1 for every head.
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

struct fasa_select_work {            // one per thread: the op has no work buffer
    std::vector<float> factor, last; // last [n_group][16]: the cells that do not fill a vector
    fasa_keys keys;
    fasa_candidates candidates;
};

// The keys of one list, from TIP's scores of n_group query heads from `head` on
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

void fasa_cpu_select(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth) {
    // a pointer, because the compiler looks up the address of a thread_local object at every access
    thread_local const auto work = std::make_unique<fasa_select_work>();
    fasa_select_lists(dst, p, ith, nth, *work);
}
