#pragma once

// Arithmetic on tokens, cells and budgets: pure functions, no ggml. Terms: see fasa.h. Definition:
// fasa_gguf/reference.py.

#include "fasa.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

// ---- how many tokens ----

// length of the list that a selection may need, forced tokens included
inline uint32_t fasa_list_length(const fasa_params & p, uint32_t n_forced, uint32_t n_kv) {
    return std::min(n_kv, std::max(p.mass > 0 ? p.cap : p.budget, n_forced));
}

// The target mass of a layer that may miss `miss` times what the others miss. It stays a mass: 0 would mean a fixed
// budget.
static constexpr float FASA_MASS_LEAST = 0x1p-20f;

inline float fasa_layer_mass(float mass, float miss) {
    return mass > 0 ? (float) std::clamp(1 - (1 - double(mass)) * miss, double(FASA_MASS_LEAST), 1.0) : 0.0f;
}

// The mass that takes n_tokens in the mean, by a table of n entries, both columns ascending: between two entries the
// logarithm of what is missed, 1 - mass, is linear in the logarithm of the tokens. 0 when n_tokens lies outside of the
// table.
inline float fasa_mean_budget_mass(const uint32_t * tokens, const float * mass, size_t n, uint32_t n_tokens) {
    for (size_t i = 0; i < n; ++i) {
        if (tokens[i] == n_tokens) {
            return mass[i];
        }
        if (i > 0 && tokens[i - 1] < n_tokens && n_tokens < tokens[i]) {
            const double at = std::log(double(n_tokens) / tokens[i - 1]) / std::log(double(tokens[i]) / tokens[i - 1]);
            return (float) (1 -
                std::exp(std::log(1 - double(mass[i - 1])) * (1 - at) + std::log(1 - double(mass[i])) * at));
        }
    }
    return 0.0f;
}

// fewest and most tokens of a step under a mean budget; tokens beyond the forced ones pay where the forced ones hold
// the mass, and the last ones of a step that needs many do not (docs/lab/settings.md)
inline uint32_t fasa_mean_budget_floor(uint32_t n) {
    return std::max(std::min(n, 64u), n / 4);
}
inline uint32_t fasa_mean_budget_cap(uint32_t n) {
    return std::min(n, (uint32_t) INT32_MAX / 2) * 2;
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

// the score of a key that is neither hidden nor forced
inline float fasa_key_score(uint32_t key) {
    const uint32_t bits = key - 1;
    float score;
    std::memcpy(&score, &bits, sizeof(score));
    return score;
}

// a score (times 2^60) in units of 2^-40: whole numbers have the same sum in every order
inline uint64_t fasa_share(float score) {
    return (uint64_t) (score * 0x1p-20f);
}

// what the shares of `mass` of the attention of n_group heads add up to
inline uint64_t fasa_mass_need(float mass, int n_group) {
    return (uint64_t) std::floor(double(mass) * 0x1p40) * n_group;
}

// The largest key of every block of FASA_BLOCK cells tells where the best cells can be: most blocks are skipped whole.
static constexpr uint32_t FASA_BLOCK = 8;
static constexpr uint32_t FASA_FEW   = 512; // cells that are looked at first for a target mass

// one list's keys
struct fasa_keys {
    std::vector<uint32_t> key;  // [n_kv, rounded up to 16, hidden behind n_kv]
    std::vector<uint32_t> most; // [key.size()/FASA_BLOCK]
    uint32_t n_visible    = 0;
    uint32_t n_forced     = 0;
    uint64_t forced_share = 0; // of the forced cells, whose keys no longer tell

    // all hidden; whoever writes key and most counts n_visible
    void reset(uint32_t n_kv) {
        key.resize((n_kv + 15) / 16 * 16);
        most.resize(key.size() / FASA_BLOCK);
        n_visible = n_forced = 0;
        forced_share         = 0;
    }

    // a hidden cell stays hidden
    void force(uint32_t cell) {
        if (key[cell] == FASA_KEY_HIDDEN || key[cell] == FASA_KEY_FORCED) {
            return;
        }
        forced_share += fasa_share(fasa_key_score(key[cell]));
        key[cell] = most[cell / FASA_BLOCK] = FASA_KEY_FORCED;
        n_forced++;
    }
};

// The loops below have no branch that depends on a key: it would be mispredicted at every other cell that matters.

// how many of x [n] are at least `low`
inline uint32_t fasa_count(const uint32_t * x, uint32_t n, uint32_t low) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < n; ++i) {
        count += x[i] >= low;
    }
    return count;
}

// A key that at least n of x [m] reach, none of them hidden, and n + slack at the most unless they are equal. Slack 0:
// only keys equal to the result can be too many.
inline uint32_t fasa_find_key(const uint32_t * x, uint32_t m, uint32_t n, uint32_t slack) {
    uint64_t low = FASA_KEY_HIDDEN + 1, high = (uint64_t) FASA_KEY_FORCED + 1; // n reach low and do not reach high
    while (high - low > 1) {
        const uint64_t mid   = (low + high) / 2;
        const uint32_t count = fasa_count(x, m, (uint32_t) mid);
        if (count < n) {
            high = mid;
        } else {
            low = mid;
            if (count - n <= slack) {
                break;
            }
        }
    }
    return (uint32_t) low;
}

// a superset of the best cells, ascending
struct fasa_candidates {
    std::vector<int32_t> cell;
    std::vector<uint32_t> key;
    std::vector<uint32_t> block;
    std::vector<uint64_t> share; // these two only for a target mass
    std::vector<uint32_t> rest;
    uint32_t n = 0;

    // the n_best best cells and few more
    void find(const fasa_keys & keys, uint32_t n_best) {
        const uint32_t n_block = keys.most.size();
        // n_best blocks reach it, so at least as many cells do
        const uint32_t low =
            n_block < n_best ? FASA_KEY_HIDDEN + 1 : fasa_find_key(keys.most.data(), n_block, n_best, n_best / 16);
        collect(keys, low);
    }

    void collect(const fasa_keys & keys, uint32_t low) {
        block.resize(keys.most.size() + 1); // one more: what is not wanted is written, and then written over
        cell.resize(keys.key.size() + 1);
        key.resize(keys.key.size() + 1);
        const uint32_t *from = keys.key.data(), *most = keys.most.data();
        uint32_t *to_block = block.data(), *to_key = key.data(), n_block = 0, count = 0;
        int32_t * to_cell = cell.data();
        for (uint32_t b = 0; b < keys.most.size(); ++b) {
            to_block[n_block] = b * FASA_BLOCK;
            n_block += most[b] >= low;
        }
        for (uint32_t b = 0; b < n_block; ++b) {
            for (uint32_t i = 0; i < FASA_BLOCK; ++i) {
                const uint32_t j = to_block[b] + i, k = from[j];
                to_cell[count] = (int32_t) j;
                to_key[count]  = k;
                count += k >= low;
            }
        }
        n = count;
    }

    // the n_best best ones, ascending, ties to the lower cell
    void emit(uint32_t n_best, int32_t * list) const {
        const uint32_t t = fasa_find_key(key.data(), n, n_best, 0);
        uint32_t equal =
            n_best - (t == FASA_KEY_FORCED ? 0 : fasa_count(key.data(), n, t + 1)); // how many of the key t
        for (uint32_t i = 0, m = 0; m < n_best && i < n; ++i) { // fewer: of scores that are no numbers
            const uint32_t at = key[i] == t && equal > 0;
            list[m]           = cell[i];
            m += key[i] > t || at;
            equal -= at;
        }
    }
};

// How many of the best cells hold `need` units: cells are taken forced first, then by score, ties to the lower cell.
// 0: the candidates do not hold as much. The forced ones alone do not.
inline uint32_t fasa_mass_count(fasa_candidates & c, const fasa_keys & keys, uint64_t need) {
    c.share.resize(c.n);
    c.rest.assign(c.key.begin(), c.key.begin() + c.n);
    uint64_t * share = c.share.data();
    uint32_t * key   = c.rest.data();
    uint32_t n = c.n, above = 0; // candidates that may be the last one taken; those that are taken before all of these
    uint64_t held = keys.forced_share, sum = 0; // by the forced ones and those taken before; by the others
    for (uint32_t i = 0; i < n; ++i) {
        share[i] = key[i] == FASA_KEY_FORCED ? 0 : fasa_share(fasa_key_score(key[i]));
        sum += share[i];
    }
    if (held + sum < need) {
        return 0;
    }
    while (true) { // a round drops one side of the middle of the keys; neither side is empty
        uint32_t low = UINT32_MAX, high = 0;
        for (uint32_t i = 0; i < n; ++i) {
            low  = std::min(low, key[i]);
            high = std::max(high, key[i]);
        }
        if (low == high) {
            break;
        }
        const uint32_t mid = low + (high - low) / 2 + 1;
        uint64_t upper     = 0;
        for (uint32_t i = 0; i < n; ++i) {
            upper += key[i] >= mid ? share[i] : 0;
        }
        const bool is_upper = held + upper >= need;
        uint32_t m          = 0;
        for (uint32_t i = 0; i < n; ++i) {
            const uint32_t k = key[i];
            key[m]           = k;
            share[m]         = share[i];
            m += (k >= mid) == is_upper;
        }
        held += is_upper ? 0 : upper;
        above += is_upper ? 0 : n - m;
        n = m;
    }
    return above + (uint32_t) ((need - held + share[0] - 1) / share[0]); // equal keys have equal shares
}

// Find the candidates, and how many of them hold `mass`: n_most at the most, and where the forced ones suffice all of
// them, since fewer are never attended. Most steps need few of n_most, so few are looked at first.
inline uint32_t fasa_mass_find(
    fasa_candidates & c, const fasa_keys & keys, int n_group, float mass, uint32_t n_least, uint32_t n_most) {
    const uint64_t need = fasa_mass_need(mass, n_group);
    const bool enough   = keys.forced_share >= need;
    for (uint32_t n = std::max({ n_least, keys.n_forced, FASA_FEW });; n = n > n_most / 4 ? n_most : n * 4) {
        c.find(keys, std::min(n, n_most));
        const uint32_t count = enough ? std::max(1u, keys.n_forced) : fasa_mass_count(c, keys, need);
        if (count > 0 || n >= n_most) {
            return count > 0 ? std::min(count, n_most) : n_most;
        }
    }
}

// One selection over all cells; list has room for fasa_list_length. Returns the count.
struct fasa_budget {
    uint32_t budget;
    float mass;
    uint32_t floor;
    uint32_t cap;
};

inline uint32_t fasa_select(const fasa_keys & keys, int n_group, fasa_budget b, int32_t * list, fasa_candidates & c) {
    const uint32_t n_visible = keys.n_visible, n_forced = keys.n_forced;
    if (n_visible == 0) {
        return 0;
    }
    uint32_t n = std::min(std::max(b.mass > 0 ? b.cap : b.budget, n_forced), n_visible);
    if (b.mass > 0) {
        const uint32_t need = fasa_mass_find(c, keys, n_group, b.mass, std::min(b.floor, n), n);
        n                   = std::min(std::max(std::clamp(need, b.floor, b.cap), n_forced), n_visible);
    } else {
        c.find(keys, n);
    }
    c.emit(n, list);
    return n;
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

    void add(const fasa_ranges & more) {
        for (const auto & r : more.data) {
            add(r.first, r.second);
        }
    }

    // What is in none of `other`. Where that would be too many ranges, gaps between them are filled.
    fasa_ranges without(const fasa_ranges & other) const {
        fasa_ranges out;
        for (const auto & r : data) {
            uint32_t at = r.first;
            for (const auto & o : other.data) {
                if (o.second > at && o.first < r.second) {
                    out.add(at, o.first);
                    at = std::max(at, o.second);
                }
            }
            out.add(at, r.second);
        }
        return out;
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
