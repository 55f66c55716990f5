#pragma once

// Arithmetic on tokens, cells and budgets: pure functions, no ggml. Terms: see fasa.h. Definition: fasa_gguf/reference.py.

#include "fasa.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

// ---- how many tokens ----

// length of the list that a selection may need, forced tokens included; a hard one needs every cell
inline uint32_t fasa_list_length(const fasa_params & p, uint32_t budget, uint32_t n_forced, uint32_t n_kv) {
    return p.mass > 0 && p.hard ? n_kv : std::min(n_kv, std::max(p.mass > 0 ? p.cap : budget, n_forced));
}

// a layer's share of the budget; room for the forced tokens and one more
inline uint32_t fasa_layer_budget(const fasa_params & p, float share) {
    const double budget = std::floor(double(p.budget)*share + 0.5);
    return (uint32_t) std::clamp(budget, double(p.sink) + p.recent + 1, double(INT32_MAX));
}

// The target mass of a layer that may miss `miss` times what the others miss. It stays a mass: 0 would mean a fixed budget.
static constexpr float FASA_MASS_LEAST = 0x1p-20f;

inline float fasa_layer_mass(float mass, float miss) {
    return mass > 0 ? (float) std::clamp(1 - (1 - double(mass))*miss, double(FASA_MASS_LEAST), 1.0) : 0.0f;
}

// The mass that takes n_tokens in the mean, by a table of n entries, both columns ascending: between two entries the logarithm of
// what is missed, 1 - mass, is linear in the logarithm of the tokens. 0 when n_tokens lies outside of the table.
inline float fasa_mean_budget_mass(const uint32_t * tokens, const float * mass, size_t n, uint32_t n_tokens) {
    for (size_t i = 0; i < n; ++i) {
        if (tokens[i] == n_tokens) {
            return mass[i];
        }
        if (i > 0 && tokens[i - 1] < n_tokens && n_tokens < tokens[i]) {
            const double at = std::log(double(n_tokens)/tokens[i - 1])/std::log(double(tokens[i])/tokens[i - 1]);
            return (float) (1 - std::exp(std::log(1 - double(mass[i - 1]))*(1 - at) + std::log(1 - double(mass[i]))*at));
        }
    }
    return 0.0f;
}

// fewest and most tokens of a step under a mean budget; tokens beyond the forced ones pay where the forced ones hold the mass, and the
// last ones of a step that needs many do not (docs/measurements.md)
inline uint32_t fasa_mean_budget_floor(uint32_t n) { return std::max(std::min(n, 64u), n/4); }
inline uint32_t fasa_mean_budget_cap  (uint32_t n) { return std::min(n, (uint32_t) INT32_MAX/2)*2; }

// dense or FASA, from what stays the same while a graph is reused; "" = FASA, else the reason
inline const char * fasa_step_dense_reason(const fasa_params & p, uint32_t n_tokens, uint32_t n_outputs, uint32_t n_stream, uint32_t n_kv) {
    if (!p.enabled)                                       { return "FASA is off"; }
    if (n_outputs < n_tokens)                             { return "prefill"; }
    if (n_tokens/std::max(1u, n_stream) > p.max_tokens)   { return "prefill"; }
    if (n_kv < p.min_context)                             { return "the context is shorter than min_context"; }
    return "";
}

// ---- which cells ----

static constexpr uint32_t FASA_KEY_HIDDEN = 0;          // not visible
static constexpr uint32_t FASA_KEY_FORCED = UINT32_MAX; // always attended

// order of a visible cell: its score, which is not negative, as an integer
inline uint32_t fasa_key(float score) {
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof(bits));
    return bits + 1;
}

// a score (times 2^60) in units of 2^-40: whole numbers have the same sum in every order
inline uint64_t fasa_share(float score) {
    return (uint64_t) (score*0x1p-20f);
}

// what the shares of `mass` of the attention of n_group heads add up to
inline uint64_t fasa_mass_need(float mass, int n_group) {
    return (uint64_t) std::floor(double(mass)*0x1p40)*n_group;
}

// Keys with the largest key of every block of FASA_BLOCK cells: most blocks hold nothing that matters, and are skipped whole.
static constexpr uint32_t FASA_BLOCK = 8;

struct fasa_keys_view {
    const uint32_t *      key; // [n_kv]
    uint32_t              n_kv;
    uint32_t              n_visible;
    uint32_t              n_forced;
    std::vector<uint32_t> most; // [n_kv/FASA_BLOCK, rounded up]

    void set(const uint32_t * keys, uint32_t n) {
        key  = keys;
        n_kv = n;
        n_visible = n_forced = 0;
        for (uint32_t i = 0; i < n; ++i) {
            n_visible += keys[i] != FASA_KEY_HIDDEN;
            n_forced  += keys[i] == FASA_KEY_FORCED;
        }
        most.resize((n + FASA_BLOCK - 1)/FASA_BLOCK);
        for (uint32_t b = 0; b < most.size(); ++b) {
            const uint32_t end = std::min(n, (b + 1)*FASA_BLOCK);
            if (end % FASA_BLOCK == 0) {
                add_block(b, FASA_BLOCK); // a constant, so the compiler vectorises it
            } else {
                add_block(b, end - b*FASA_BLOCK);
            }
        }
    }

    inline void add_block(uint32_t b, uint32_t n) {
        const uint32_t * k = key + b*FASA_BLOCK;
        uint32_t m = 0;
        for (uint32_t i = 0; i < n; ++i) {
            m = std::max(m, k[i]);
        }
        most[b] = m;
    }

    // f(cell, key) for every cell whose key is at least `low`, ascending
    template <typename F> void for_each(uint32_t low, F f) const {
        for (uint32_t b = 0; b < most.size(); ++b) {
            if (most[b] < low) {
                continue;
            }
            const uint32_t end = std::min(n_kv, (b + 1)*FASA_BLOCK);
            for (uint32_t j = b*FASA_BLOCK; j < end; ++j) {
                if (key[j] >= low) {
                    f(j, key[j]);
                }
            }
        }
    }
};

// The key of the n-th best cell and how many cells with exactly that key belong to the n best. 1 <= n <= visible cells.
struct fasa_threshold { uint32_t key; uint32_t n_equal; };

inline fasa_threshold fasa_find_threshold(const fasa_keys_view & v, uint32_t n, std::vector<uint32_t> & scratch) {
    // the n-th largest block maximum is no larger than the n-th largest key
    uint32_t low = FASA_KEY_HIDDEN + 1;
    if (v.most.size() >= n) {
        scratch.assign(v.most.begin(), v.most.end());
        std::nth_element(scratch.begin(), scratch.begin() + (n - 1), scratch.end(), std::greater<uint32_t>());
        low = std::max(low, scratch[n - 1]);
    }
    scratch.resize(v.n_kv);
    uint32_t m = 0;
    v.for_each(low, [&, to = scratch.data()](uint32_t, uint32_t key) { to[m++] = key; });
    scratch.resize(m);
    std::nth_element(scratch.begin(), scratch.begin() + (n - 1), scratch.end(), std::greater<uint32_t>());
    const uint32_t k = scratch[n - 1];
    uint32_t greater = 0;
    for (const uint32_t x : scratch) {
        greater += x > k;
    }
    return { k, n - greater };
}

// the cells above the threshold and the lowest ones at it, ascending; returns their number
inline uint32_t fasa_emit(const fasa_keys_view & v, fasa_threshold t, int32_t * list) {
    uint32_t n = 0;
    v.for_each(t.key, [&](uint32_t j, uint32_t key) {
        if (key > t.key) {
            list[n++] = (int32_t) j;
        } else if (t.n_equal > 0) {
            list[n++] = (int32_t) j;
            t.n_equal--;
        }
    });
    return n;
}

// how many of the n_most best cells hold `mass`, n_most + 1: all of them do not; cells are taken forced first, then by score, ties to
// the lower cell
inline uint32_t fasa_mass_count(const fasa_keys_view & v, const float * score, int n_group, float mass, uint32_t n_most,
        std::vector<uint32_t> & scratch) {
    const uint64_t need = fasa_mass_need(mass, n_group);
    std::vector<int32_t> best(n_most);
    best.resize(fasa_emit(v, fasa_find_threshold(v, n_most, scratch), best.data()));
    std::sort(best.begin(), best.end(), [&](int32_t a, int32_t b) { return v.key[a] != v.key[b] ? v.key[a] > v.key[b] : a < b; });
    uint64_t held = 0;
    for (uint32_t i = 0; i < best.size(); ++i) {
        held += fasa_share(score[best[i]]);
        if (held >= need) {
            return i + 1;
        }
    }
    return n_most + 1;
}

// One selection over all cells of v; list has room for fasa_list_length. score [n_kv]. Returns the count, and whether it is of a hard
// step: every visible cell, because `cap` of them do not hold the mass.
struct fasa_budget { uint32_t budget; float mass; uint32_t floor; uint32_t cap; bool hard; };
struct fasa_count  { uint32_t n; bool hard; };

inline fasa_count fasa_select(const fasa_keys_view & v, const float * score, int n_group, fasa_budget b, int32_t * list,
        std::vector<uint32_t> & scratch) {
    const uint32_t n_visible = v.n_visible, n_forced = v.n_forced;
    if (n_visible == 0) {
        return { 0, false };
    }
    bool hard = false;
    uint32_t n = std::min(std::max(b.mass > 0 ? b.cap : b.budget, n_forced), n_visible);
    if (b.mass > 0) {
        const uint32_t need = fasa_mass_count(v, score, n_group, b.mass, n, scratch);
        hard = b.hard && need > n && n < n_visible;
        n = hard ? n_visible : std::min(std::max(std::clamp(need, b.floor, b.cap), n_forced), n_visible);
    }
    n = fasa_emit(v, n == n_visible ? fasa_threshold { FASA_KEY_HIDDEN, 0 } : fasa_find_threshold(v, n, scratch), list);
    return { n, hard };
}

// ---- which dominant keys are stale ----

// A short list of cell ranges [first, second), sorted and apart; when it would get longer than FASA_MAX_RANGES, the two
// ranges with the smallest gap become one (a cell refreshed once too often is not wrong).
static constexpr int FASA_MAX_RANGES = 8;

struct fasa_ranges {
    std::vector<std::pair<uint32_t, uint32_t>> data;

    void add(uint32_t first, uint32_t last) {
        if (first >= last) {
            return;
        }
        data.emplace_back(first, last);
        std::sort(data.begin(), data.end());
        std::vector<std::pair<uint32_t, uint32_t>> merged;
        for (const auto & r : data) {
            if (!merged.empty() && r.first <= merged.back().second) {
                merged.back().second = std::max(merged.back().second, r.second);
            } else {
                merged.push_back(r);
            }
        }
        while (merged.size() > FASA_MAX_RANGES) {
            size_t at = 1;
            for (size_t i = 2; i < merged.size(); ++i) {
                if (merged[i].first - merged[i - 1].second < merged[at].first - merged[at - 1].second) {
                    at = i;
                }
            }
            merged[at - 1].second = merged[at].second;
            merged.erase(merged.begin() + at);
        }
        data = std::move(merged);
    }

    // take away and return the part below `limit`
    fasa_ranges take(uint32_t limit) {
        fasa_ranges taken, rest;
        for (const auto & r : data) {
            if (r.first < limit) {
                taken.data.emplace_back(r.first, std::min(r.second, limit));
            }
            if (r.second > limit) {
                rest.data.emplace_back(std::max(r.first, limit), r.second);
            }
        }
        data = std::move(rest.data);
        return taken;
    }

    uint64_t cells() const {
        uint64_t n = 0;
        for (const auto & r : data) {
            n += r.second - r.first;
        }
        return n;
    }
};
