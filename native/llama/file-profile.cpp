#include "llama/file-profile.h"
#include "core/error.h"

#include "gguf.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>

// as in fasa_gguf/profile/keys.py
static constexpr uint64_t FASA_MAX_LAYERS = 4096, FASA_MAX_HEADS = 4096, FASA_MAX_CHUNKS = 4096;
static constexpr uint64_t FASA_MAX_NUMBERS = 1 << 22, FASA_MAX_BUDGETS = 4096;
static constexpr double FASA_U32 = 4294967295.0, FASA_F32 = 3.4028234663852886e38;

// ---- settings ----

static int fasa_check_setting(const fasa_setting & row, double value) {
    const bool whole = row.type == fasa_setting::FLOAT || value == std::floor(value);
    return value >= row.low && value <= row.high && whole ?
        0 :
        fasa_set_error("expected a %s from %.10g to %.10g, found %.10g",
            row.type == fasa_setting::FLOAT ? "number" : "whole number", row.low, row.high, value);
}

int fasa_read_setting(const fasa_setting & row, const char * text, double & value) {
    if (row.is_named()) {
        const auto words = fasa_words(row.names);
        const auto found = std::find(words.begin(), words.end(), text);
        std::string expected;
        for (const auto & word : words) {
            expected += (expected.empty() ? "" : ", ") + word;
        }
        value = (double) (found - words.begin());
        return found != words.end() ? 0 :
                                      fasa_set_error("expected one of %s, found '%.60s'", expected.c_str(), text);
    }
    char * end = nullptr;
    value      = strtod(text, &end);
    if (end == text || *end != '\0' || !std::isfinite(value)) {
        return fasa_set_error(
            "expected a %s, found '%.60s'", row.type == fasa_setting::FLOAT ? "number" : "whole number", text);
    }
    return fasa_check_setting(row, value);
}

void fasa_apply(fasa_params & p, fasa_changes changes) {
    const auto more = [&](const char * name) {
        return changes.count(name) && changes[name] > 0;
    };
    const bool has_budget = changes.count("budget"), has_mass = changes.count("mass");
    const bool has_mean = changes.count("mean_budget");
    const bool no_mean  = more("mass") || (has_budget && !has_mass);
    const bool no_mass  = more("mean_budget") || (has_budget && !has_mean);
    if (no_mean && !has_mean) {
        changes["mean_budget"] = 0;
    }
    if (no_mass && !has_mass) {
        changes["mass"] = 0;
    }
    for (size_t i = 0; i < FASA_N_SETTINGS; ++i) {
        const auto found = changes.find(FASA_SETTING_ROWS[i].name);
        if (found != changes.end()) {
            FASA_SETTING_ROWS[i].set(p, found->second);
        }
    }
}

// ---- values of a GGUF ----

template <typename T>
static double fasa_at(const void * data, size_t i) {
    T value;
    memcpy(&value, (const char *) data + i * sizeof(T), sizeof(T));
    return (double) value;
}

// number i of an array or a scalar of this type; NaN: it has no numbers
static double fasa_number_at(gguf_type type, const void * data, size_t i) {
    switch (type) {
        case GGUF_TYPE_UINT8: return fasa_at<uint8_t>(data, i);
        case GGUF_TYPE_INT8: return fasa_at<int8_t>(data, i);
        case GGUF_TYPE_UINT16: return fasa_at<uint16_t>(data, i);
        case GGUF_TYPE_INT16: return fasa_at<int16_t>(data, i);
        case GGUF_TYPE_UINT32: return fasa_at<uint32_t>(data, i);
        case GGUF_TYPE_INT32: return fasa_at<int32_t>(data, i);
        case GGUF_TYPE_UINT64: return fasa_at<uint64_t>(data, i);
        case GGUF_TYPE_INT64: return fasa_at<int64_t>(data, i);
        case GGUF_TYPE_FLOAT32: return fasa_at<float>(data, i);
        case GGUF_TYPE_FLOAT64: return fasa_at<double>(data, i);
        default: return NAN;
    }
}

// A number from low to high. 1: it is there, 0: it is not, -1: it is wrong
static int fasa_scalar(const gguf_context * meta, const char * key, double low, double high, double & out) {
    const int64_t id = gguf_find_key(meta, key);
    if (id < 0) {
        return 0;
    }
    const auto type = gguf_get_kv_type(meta, id);
    const bool has  = type != GGUF_TYPE_ARRAY && type != GGUF_TYPE_STRING && type != GGUF_TYPE_BOOL;
    out             = has ? fasa_number_at(type, gguf_get_val_data(meta, id), 0) : NAN;
    if (!(out >= low && out <= high)) {
        return fasa_set_error("key %s: expected a number from %.10g to %.10g, found %s", key, low, high,
            has ? std::to_string(out).c_str() : gguf_type_name(type));
    }
    return 1;
}

// `n` numbers from low to high; n = 0: 1 to `most` of them. 1: they are there, 0: they are not, -1: wrong
template <typename T>
static int fasa_array(const gguf_context * meta, const char * key, uint64_t n, uint64_t most, double low, double high,
    std::vector<T> & out) {
    const int64_t id = gguf_find_key(meta, key);
    if (id < 0) {
        return 0;
    }
    if (gguf_get_kv_type(meta, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(meta, id) == GGUF_TYPE_STRING) {
        return fasa_set_error("key %s: expected an array of numbers, found another type", key);
    }
    const uint64_t found = gguf_get_arr_n(meta, id);
    if (found == 0 || found > most || (n > 0 && found != n)) {
        return fasa_set_error("key %s: expected %s%llu numbers, found %llu", key, n ? "" : "1 to ",
            (unsigned long long) (n ? n : most), (unsigned long long) found);
    }
    out.resize(found);
    const void * data = gguf_get_arr_data(meta, id);
    for (uint64_t i = 0; i < found; ++i) {
        const double value = fasa_number_at(gguf_get_arr_type(meta, id), data, i);
        const bool whole   = std::is_same_v<T, float> || value == std::floor(value);
        if (!(value >= low && value <= high) || !whole) {
            return fasa_set_error("key %s: expected numbers from %.10g to %.10g, found %.10g at index %llu", key, low,
                high, value, (unsigned long long) i);
        }
        out[i] = (T) value;
    }
    return 1;
}

// ---- the profile ----

static int fasa_missing(const char * key) {
    return fasa_set_error("key %s: expected it, found nothing", key);
}

int fasa_file_profile::read(const gguf_context * meta) {
    double version = 0, n_layer = 0;
    const int found = meta ? fasa_scalar(meta, "fasa.version", 1, FASA_U32, version) : 0;
    if (found <= 0) {
        return found; // there is no profile, or a bad one
    }
    if (version > 1) {
        return fasa_set_error("key fasa.version: expected at most 1, found %.10g", version);
    }
    const int layers = fasa_scalar(meta, "fasa.n_layer", 1, FASA_MAX_LAYERS, n_layer);
    if (layers <= 0) {
        return layers < 0 ? -1 : fasa_missing("fasa.n_layer");
    }
    const auto n    = (uint64_t) n_layer;
    const int heads = fasa_array(meta, "fasa.n_head_kv", n, FASA_MAX_LAYERS, 0, FASA_MAX_HEADS, n_head_kv);
    if (heads <= 0) {
        return heads < 0 ? -1 : fasa_missing("fasa.n_head_kv");
    }
    std::vector<uint32_t> chunks; // n_chunk says that there is a profile, so it is set when all is well
    const int has = fasa_array(meta, "fasa.n_chunk", n, FASA_MAX_LAYERS, 0, FASA_MAX_CHUNKS, chunks);
    if (has <= 0) {
        return has < 0 ? -1 : fasa_missing("fasa.n_chunk");
    }
    n_chunk = chunks;
    return read_arrays(meta) != 0 || read_ahead(meta) != 0 ? -1 : read_defaults(meta);
}

int fasa_file_profile::read_arrays(const gguf_context * meta) {
    uint64_t n_ranking = 0, n_heads = 0;
    for (size_t il = 0; il < n_chunk.size(); ++il) {
        n_ranking += uint64_t(n_head_kv[il]) * n_chunk[il];
        n_heads += n_chunk[il] ? n_head_kv[il] : 0;
    }
    if (n_ranking == 0 || n_ranking > FASA_MAX_NUMBERS) {
        return fasa_set_error("key fasa.ranking: expected 1 to %llu numbers for this shape, it has %llu",
            (unsigned long long) FASA_MAX_NUMBERS, (unsigned long long) n_ranking);
    }
    const int ranked =
        fasa_array(meta, "fasa.ranking", n_ranking, FASA_MAX_NUMBERS, 0, double(FASA_MAX_CHUNKS - 1), ranking);
    if (ranked <= 0) {
        return ranked < 0 ? -1 : fasa_missing("fasa.ranking");
    }
    double k = 0;
    if (fasa_scalar(meta, "fasa.weight_k", 0, FASA_MAX_CHUNKS, k) < 0) {
        return -1;
    }
    weight_k = (uint32_t) k;
    if (weight_k > 0) {
        const int has =
            fasa_array(meta, "fasa.weight", n_heads * weight_k, FASA_MAX_NUMBERS, -FASA_F32, FASA_F32, weight);
        if (has <= 0) {
            return has < 0 ? -1 : fasa_missing("fasa.weight");
        }
    }
    if (fasa_array(meta, "fasa.layer_miss", n_chunk.size(), FASA_MAX_LAYERS, 0, 100, layer_miss) < 0) {
        return -1;
    }
    const int has = fasa_array(meta, "fasa.mean_budget", 0, FASA_MAX_BUDGETS, 1, FASA_U32, mean_budget);
    if (has > 0) {
        const int masses =
            fasa_array(meta, "fasa.mean_budget_mass", mean_budget.size(), FASA_MAX_BUDGETS, 0, 1, mean_budget_mass);
        return masses > 0 ? 0 : masses < 0 ? -1 : fasa_missing("fasa.mean_budget_mass");
    }
    return has;
}

int fasa_file_profile::read_ahead(const gguf_context * meta) {
    if (fasa_array(meta, "fasa.ahead.layers", n_chunk.size(), FASA_MAX_LAYERS, 0, 1, ahead) < 0) {
        return -1;
    }
    const int ranked = fasa_array(
        meta, "fasa.ahead.ranking", ranking.size(), FASA_MAX_NUMBERS, 0, double(FASA_MAX_CHUNKS - 1), ahead_ranking);
    if (ranked < 0) {
        return -1;
    }
    const bool wanted = ranked > 0 && !weight.empty();
    const int has     = fasa_array(
        meta, "fasa.ahead.weight", weight.size(), FASA_MAX_NUMBERS, -FASA_F32, FASA_F32, ahead_weight);
    return has < 0 || wanted == (has > 0) ?
        std::min(has, 0) :
        fasa_set_error("key fasa.ahead.weight: expected it where both fasa.ahead.ranking and fasa.weight are, and "
                       "only there; found %s",
            has ? "it" : "nothing");
}

int fasa_file_profile::read_defaults(const gguf_context * meta) {
    for (size_t i = 0; i < FASA_N_SETTINGS; ++i) {
        const auto & row = FASA_SETTING_ROWS[i];
        const auto key   = std::string("fasa.default.") + row.name;
        const auto id    = gguf_find_key(meta, key.c_str());
        double value     = 0;
        if (id >= 0 && gguf_get_kv_type(meta, id) == GGUF_TYPE_STRING) {
            if (fasa_read_setting(row, gguf_get_val_str(meta, id), value) != 0) {
                return fasa_set_error("key %s: %s", key.c_str(), std::string(fasa_error()).c_str());
            }
            defaults[row.name] = value;
            continue;
        }
        const int has = fasa_scalar(meta, key.c_str(), row.low, row.high, value);
        if (has > 0 && row.is_named()) {
            return fasa_set_error("key %s: expected a name, found a number", key.c_str());
        }
        if (has < 0) {
            return -1;
        }
        if (has > 0 && fasa_check_setting(row, value) != 0) {
            return fasa_set_error("key %s: %s", key.c_str(), std::string(fasa_error()).c_str());
        }
        if (has > 0) {
            defaults[row.name] = value;
        }
    }
    return fasa_scalar(meta, "fasa.rope.base", 0, FASA_F32, rope_base) < 0 ? -1 : 0;
}

fasa_profile fasa_file_profile::as_struct() const {
    fasa_profile p     = {};
    p.size             = sizeof(p);
    p.n_layer          = (uint32_t) n_chunk.size();
    p.n_head_kv        = n_head_kv.data();
    p.n_chunk          = n_chunk.data();
    p.n_ranking        = ranking.size();
    p.ranking          = ranking.data();
    p.weight_k         = weight_k;
    p.n_weight         = weight.size();
    p.weight           = weight.empty() ? nullptr : weight.data();
    p.n_layer_miss     = layer_miss.size();
    p.layer_miss       = layer_miss.empty() ? nullptr : layer_miss.data();
    p.n_mean_budget    = (uint32_t) mean_budget.size();
    p.mean_budget      = mean_budget.data();
    p.mean_budget_mass = mean_budget_mass.data();
    p.n_ahead          = (uint32_t) ahead.size();
    p.ahead            = ahead.empty() ? nullptr : ahead.data();
    p.ahead_ranking    = ahead_ranking.empty() ? nullptr : ahead_ranking.data();
    p.ahead_weight     = ahead_weight.empty() ? nullptr : ahead_weight.data();
    return p;
}
