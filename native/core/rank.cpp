// fasa_rank_recall: the greedy ranking of one KV head's chunks. Definition: fasa_gguf/reference.py rank_recall.
// The hot loops run over cells and are written so that the compiler vectorises them for several instruction sets.

#include "core/error.h"
#include "fasa.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

// not under the sanitizers of threads and addresses, which start only after a clone was chosen
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) &&                \
    !defined(__SANITIZE_ADDRESS__)
#    define FASA_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#    define FASA_CLONES
#endif

static constexpr int LANES = 16;

// e^x for x <= 0, relative error below 2e-7; 0 below -87
static inline float fasa_exp_scalar(float x) {
    const float y     = x > -87.0f ? x : -87.0f;
    const float shift = y * 1.44269504f + 12582912.0f; // 1.5*2^23: the integer part lands in the low bits
    const float n     = shift - 12582912.0f;
    const float r     = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p           = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p                 = p * r + 8.3334519073e-3f;
    p                 = p * r + 4.1665795894e-2f;
    p                 = p * r + 1.6666665459e-1f;
    p                 = p * r + 5.0000001201e-1f;
    p                 = p * r * r + r + 1.0f;
    int32_t bits;
    memcpy(&bits, &shift, sizeof(bits));
    bits = (bits - 0x4b400000 + 127) << 23;
    float pow2;
    memcpy(&pow2, &bits, sizeof(pow2));
    return x > -87.0f ? p * pow2 : 0.0f;
}

// score[j] += softmax(x)[j] over the first n cells; the arrays have room for a multiple of LANES. x is overwritten.
FASA_CLONES static void fasa_add_softmax(float * __restrict x, float * __restrict score, int n) {
    const int n_pad = (n + LANES - 1) / LANES * LANES;
    for (int j = n; j < n_pad; ++j) {
        x[j] = -INFINITY;
    }
    float most[LANES], sum[LANES] = {};
    std::fill(most, most + LANES, -INFINITY);
    for (int j = 0; j < n_pad; j += LANES) {
        for (int l = 0; l < LANES; ++l) {
            most[l] = x[j + l] > most[l] ? x[j + l] : most[l];
        }
    }
    const float m = *std::max_element(most, most + LANES);
    for (int j = 0; j < n_pad; j += LANES) {
        for (int l = 0; l < LANES; ++l) {
            const float e = fasa_exp_scalar(x[j + l] - m);
            x[j + l]      = e;
            sum[l] += e;
        }
    }
    float total = 0.0f;
    for (const float s : sum) {
        total += s;
    }
    const float inv = 1.0f / total;
    for (int j = 0; j < n; ++j) {
        score[j] += x[j] * inv;
    }
}

// out = est + scale*(q0*k0 + q1*k1) over n cells
FASA_CLONES static void fasa_add_chunk(float * __restrict out, const float * __restrict est,
    const float * __restrict k0, const float * __restrict k1, float q0, float q1, int n) {
    for (int j = 0; j < n; ++j) {
        out[j] = est[j] + (q0 * k0[j] + q1 * k1[j]);
    }
}

// Order of a cell as a positive integer: the bits of its score, which is not negative, and one more; forced cells come
// first.
static constexpr int32_t KEY_FORCED = INT32_MAX;

FASA_CLONES static void fasa_keys(const float * __restrict score, int32_t * __restrict key, int n) {
    for (int j = 0; j < n; ++j) {
        int32_t bits;
        memcpy(&bits, score + j, sizeof(bits));
        key[j] = bits + 1;
    }
}

FASA_CLONES static int fasa_count(const int32_t * key, int32_t least, int n) {
    int count = 0;
    for (int j = 0; j < n; ++j) {
        count += key[j] >= least;
    }
    return count;
}

// mass of the cells whose key is at least `least`
FASA_CLONES static double fasa_sum(
    const float * __restrict mass, const int32_t * __restrict key, int32_t least, int n) {
    double lane[LANES] = {};
    int j              = 0;
    for (; j + LANES <= n; j += LANES) {
        for (int l = 0; l < LANES; ++l) {
            lane[l] += key[j + l] >= least ? mass[j + l] : 0.0f;
        }
    }
    double sum = 0.0;
    for (; j < n; ++j) {
        sum += key[j] >= least ? mass[j] : 0.0f;
    }
    for (const double x : lane) {
        sum += x;
    }
    return sum;
}

// mass of the n_take best cells, n_forced < n_take <= n, ties to the lower cell. The threshold is found by halving:
// counting a row is a few hundred vector compares, less than any partial sort of it.
static double fasa_best_mass(const float * mass, const int32_t * key, int n, int n_take) {
    int32_t low = 1, high = KEY_FORCED; // n_take or more cells are at least `low`, fewer are at least `high`
    while (high - low > 1) {
        const int32_t mid = low + (high - low) / 2;
        const int count   = fasa_count(key, mid, n);
        if (count == n_take) {
            return fasa_sum(mass, key, mid, n);
        }
        (count > n_take ? low : high) = mid;
    }
    double sum  = fasa_sum(mass, key, high, n);
    int n_equal = n_take - fasa_count(key, high, n);
    for (int j = 0; j < n && n_equal > 0; ++j) {
        if (key[j] == low) {
            sum += mass[j];
            n_equal--;
        }
    }
    return sum;
}

namespace {

struct ranker {
    const fasa_rank_case & c;
    const int n_pad; // cells of a row, a multiple of LANES

    std::vector<float> k_pair; // [n_chunk, 2, n_pad]
    std::vector<float> est;    // [n_query, n_group, n_pad] scaled logits of the chosen set
    std::vector<float> mass;   // [n_query, n_pad] true attention, summed over the group

    explicit ranker(const fasa_rank_case & c) : c(c), n_pad((c.n_kv + LANES - 1) / LANES * LANES) {
        k_pair.assign(size_t(c.n_chunk) * 2 * n_pad, 0.0f);
        for (int i = 0; i < c.n_chunk * 2; ++i) {
            for (int j = 0; j < c.n_kv; ++j) {
                k_pair[size_t(i) * n_pad + j] = c.k[size_t(j) * c.n_embd_head + c.chunk_dims[i]];
            }
        }
        est.assign(size_t(c.n_query) * c.n_group * n_pad, 0.0f);
        mass.assign(size_t(c.n_query) * n_pad, 0.0f);
    }

    const float * query(const float * q, int i, int g) const { return q + (size_t(g) * c.n_query + i) * c.n_embd_head; }
    float * row(int i, int g) { return est.data() + (size_t(i) * c.n_group + g) * n_pad; }

    void add(const float * from, float * to, int i, int g, int chunk) const {
        const float * q = query(c.q_est ? c.q_est : c.q, i, g);
        const float * k = k_pair.data() + size_t(chunk) * 2 * n_pad;
        fasa_add_chunk(to, from, k, k + n_pad, q[c.chunk_dims[2 * chunk]] * c.scale,
            q[c.chunk_dims[2 * chunk + 1]] * c.scale, c.q_pos[i] + 1);
    }

    void cap(float * x, int n) const {
        for (int j = 0; c.soft_cap > 0 && j < n; ++j) {
            x[j] = c.soft_cap * std::tanh(x[j] / c.soft_cap);
        }
    }

    // the true attention of query i, from the sum of all chunks
    void set_mass(int i) {
        std::vector<float> x(n_pad);
        const int n = c.q_pos[i] + 1;
        for (int g = 0; g < c.n_group; ++g) {
            std::fill(x.begin(), x.end(), 0.0f);
            for (int d = 0; d < c.n_embd_head; ++d) {
                for (int j = 0; j < n; ++j) {
                    x[j] += query(c.q, i, g)[d] * c.k[size_t(j) * c.n_embd_head + d];
                }
            }
            for (int j = 0; j < n; ++j) {
                x[j] *= c.scale;
            }
            cap(x.data(), n);
            fasa_add_softmax(x.data(), mass.data() + size_t(i) * n_pad, n);
        }
    }

    // true mass held by the budget's tokens when `chunk` joins the set, for query i
    double kept(int i, int chunk, std::vector<float> & x, std::vector<float> & score, std::vector<int32_t> & key) {
        const int n = c.q_pos[i] + 1;
        std::fill(score.begin(), score.begin() + n, 0.0f);
        for (int g = 0; g < c.n_group; ++g) {
            add(row(i, g), x.data(), i, g, chunk);
            cap(x.data(), n);
            fasa_add_softmax(x.data(), score.data(), n);
        }
        fasa_keys(score.data(), key.data(), n);
        std::fill(key.begin(), key.begin() + std::min(n, c.sink), KEY_FORCED);
        std::fill(key.begin() + std::max(0, n - c.recent), key.begin() + n, KEY_FORCED);
        const int n_forced = std::min<int64_t>(n, int64_t(c.sink) + c.recent);
        const float * m    = mass.data() + size_t(i) * n_pad;
        return c.budget > n_forced ? fasa_best_mass(m, key.data(), n, std::min(n, c.budget)) :
                                     fasa_sum(m, key.data(), KEY_FORCED, n);
    }

    // f(query) for every query, on all threads
    template <typename F>
    void for_queries(F f) const {
        const int n_threads = std::clamp<int64_t>(c.n_threads, 1, std::min<int64_t>(c.n_query, FASA_MOST_THREADS));
        std::vector<std::thread> threads;
        const auto part = [&](int t) {
            return int(int64_t(c.n_query) * t / n_threads);
        };
        try {
            for (int t = 1; t < n_threads; ++t) {
                threads.emplace_back(f, part(t), part(t + 1));
            }
        } catch (const std::system_error &) { // the system has no more: this one does the rest
        }
        f(part(threads.size() + 1), c.n_query);
        f(0, part(1));
        for (auto & t : threads) {
            t.join();
        }
    }

    bool is_finite() const {
        const auto all = [](const float * x, size_t n) {
            return std::all_of(x, x + n, [](float v) { return std::isfinite(v); });
        };
        const size_t n_q = size_t(c.n_group) * c.n_query * c.n_embd_head;
        return std::isfinite(c.scale) && std::isfinite(c.soft_cap) && all(c.q, n_q) &&
            (c.q_est == nullptr || all(c.q_est, n_q)) && all(c.k, size_t(c.n_kv) * c.n_embd_head);
    }

    int run() {
        if (!is_finite()) {
            return fasa_set_error("fasa_rank_case: q, q_est, k, scale or soft_cap is not finite");
        }
        for_queries([&](int first, int last) {
            for (int i = first; i < last; ++i) {
                set_mass(i);
            }
        });
        std::vector<bool> chosen(c.n_chunk);
        std::vector<double> held(size_t(c.n_chunk) * c.n_query); // summed in one order, so threads do not matter
        for (int r = 0; r < c.n_rank; ++r) {
            for_queries([&](int first, int last) {
                std::vector<float> x(n_pad), score(n_pad);
                std::vector<int32_t> key(n_pad);
                for (int i = first; i < last; ++i) {
                    for (int chunk = 0; chunk < c.n_chunk; ++chunk) {
                        if (!chosen[chunk] && (c.candidate == nullptr || c.candidate[chunk])) {
                            held[size_t(chunk) * c.n_query + i] = kept(i, chunk, x, score, key);
                        }
                    }
                }
            });
            int best         = -1;
            double best_held = -1.0;
            for (int chunk = 0; chunk < c.n_chunk; ++chunk) {
                if (chosen[chunk] || (c.candidate != nullptr && !c.candidate[chunk])) {
                    continue;
                }
                double sum = 0.0;
                for (int i = 0; i < c.n_query; ++i) {
                    sum += held[size_t(chunk) * c.n_query + i];
                }
                if (sum > best_held) {
                    best      = chunk;
                    best_held = sum;
                }
            }
            if (best < 0) {
                return fasa_set_error("fasa_rank_case: the logits are not finite");
            }
            chosen[best]    = true;
            c.out_order[r]  = best;
            c.out_recall[r] = float(best_held / (double(c.n_query) * c.n_group));
            for_queries([&](int first, int last) {
                for (int i = first; i < last; ++i) {
                    for (int g = 0; g < c.n_group; ++g) {
                        add(row(i, g), row(i, g), i, g, best);
                    }
                }
            });
        }
        return 0;
    }
};

} // namespace

static int fasa_rank_check(const fasa_rank_case * c) {
    if (fasa_check_size(c, "fasa_rank_case") != 0 || fasa_check_given(c->chunk_dims, "chunk_dims") != 0 ||
        fasa_check_given(c->q, "q") != 0 || fasa_check_given(c->k, "k") != 0 ||
        fasa_check_given(c->q_pos, "q_pos") != 0 || fasa_check_given(c->out_order, "out_order") != 0 ||
        fasa_check_given(c->out_recall, "out_recall") != 0 ||
        fasa_check_range("n_chunk", c->n_chunk, 1, UINT16_MAX + 1) != 0) {
        return -1;
    }
    int n_candidate = 0;
    for (int i = 0; i < c->n_chunk; ++i) {
        n_candidate += c->candidate == nullptr || c->candidate[i];
    }
    if (c->n_group < 1 || c->n_query < 1 || c->n_kv < 1 || c->n_rank < 1 || c->n_rank > n_candidate || c->budget < 1 ||
        c->sink < 0 || c->recent < 0) {
        return fasa_set_error("fasa_rank_case: n_group %d, n_query %d, n_kv %d and budget %d must be at least 1, and "
                              "n_rank %d from 1 to the %d candidates",
            c->n_group, c->n_query, c->n_kv, c->budget, c->n_rank, n_candidate);
    }
    for (int i = 0; i < c->n_query; ++i) {
        if (c->q_pos[i] < 0 || c->q_pos[i] >= c->n_kv) {
            return fasa_set_error(
                "fasa_rank_case: query %d is at position %d, outside of the %d cells", i, c->q_pos[i], c->n_kv);
        }
    }
    for (int i = 0; i < 2 * c->n_chunk; ++i) {
        if (c->chunk_dims[i] < 0 || c->chunk_dims[i] >= c->n_embd_head) {
            return fasa_set_error("fasa_rank_case: chunk %d has dimension %d, outside of the head's %d", i / 2,
                c->chunk_dims[i], c->n_embd_head);
        }
    }
    return 0;
}

int fasa_rank_recall(const fasa_rank_case * c) {
    return fasa_rank_check(c) != 0 ? -1 : fasa_guard("fasa_rank_recall", [&] { return ranker(*c).run(); });
}
