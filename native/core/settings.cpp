#include "core/settings.h"
#include "core/error.h"
#include "core/tables.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <type_traits>

template <typename T>
static constexpr fasa_setting::kind fasa_kind_of() {
    return std::is_same_v<T, float> ? fasa_setting::FLOAT :
        std::is_same_v<T, int32_t>  ? fasa_setting::INT32 :
                                      fasa_setting::UINT32;
}

const fasa_setting FASA_SETTING_ROWS[] = {
#define X(name, type, initial, low, high, names)                                                                       \
    { #name, fasa_kind_of<type>(), offsetof(fasa_params, name), initial, low, high, names },
    FASA_SETTINGS(X)
#undef X
};
const size_t FASA_N_SETTINGS = sizeof(FASA_SETTING_ROWS) / sizeof(FASA_SETTING_ROWS[0]);

template <typename T>
static double fasa_read(const char * at) {
    T value;
    memcpy(&value, at, sizeof(value));
    return value;
}

double fasa_setting::get(const fasa_params & p) const {
    const char * at = (const char *) &p + offset;
    return type == FLOAT ? fasa_read<float>(at) : type == INT32 ? fasa_read<int32_t>(at) : fasa_read<uint32_t>(at);
}

void fasa_setting::set(fasa_params & p, double value) const {
    char * at           = (char *) &p + offset;
    const float number  = (float) value;
    const int64_t whole = (int64_t) value;
    static_assert(sizeof(float) == 4, "every setting has four bytes");
    if (type == FLOAT) {
        memcpy(at, &number, 4);
    } else {
        const uint32_t bits = (uint32_t) whole; // of a negative int32_t too
        memcpy(at, &bits, 4);
    }
}

std::vector<std::string> fasa_words(const char * names) {
    std::vector<std::string> out;
    std::istringstream in(names);
    for (std::string word; in >> word;) {
        out.push_back(word);
    }
    return out;
}

std::string fasa_setting::text(double value) const {
    if (is_named()) {
        return fasa_words(names).at((size_t) value);
    }
    char out[32];
    snprintf(out, sizeof(out), "%.6g", value);
    return out;
}

fasa_params fasa_params_default(void) {
    fasa_params p = {};
    p.size        = sizeof(p);
    for (size_t i = 0; i < FASA_N_SETTINGS; ++i) {
        FASA_SETTING_ROWS[i].set(p, FASA_SETTING_ROWS[i].initial);
    }
    return p;
}

int fasa_check_params(const fasa_params & p) {
    for (size_t i = 0; i < FASA_N_SETTINGS; ++i) {
        const auto & row   = FASA_SETTING_ROWS[i];
        const double value = row.get(p);
        if (!(value >= row.low && value <= row.high)) { // NaN too
            return fasa_set_error("setting %s: expected a %s from %.10g to %.10g, found %.10g", row.name,
                row.type == fasa_setting::FLOAT ? "number" : "whole number", row.low, row.high, value);
        }
    }
    if (p.mass > 0 && p.mean_budget > 0) {
        return fasa_set_error(
            "settings mass and mean_budget: expected one of them, found %g and %u", (double) p.mass, p.mean_budget);
    }
    if (p.mass > 0 && (p.floor < 1 || p.floor > p.cap)) {
        return fasa_set_error("settings floor and cap: expected 1 <= floor <= cap, found %u and %u", p.floor, p.cap);
    }
    if (p.prefill_floor > p.prefill_cap) {
        return fasa_set_error(
            "settings prefill_floor and prefill_cap: expected prefill_floor <= prefill_cap, found %u and %u",
            p.prefill_floor, p.prefill_cap);
    }
    return 0;
}

uint32_t fasa_default_chunks(uint32_t n_chunk) {
    return std::max(4u, uint32_t(uint64_t(3) * n_chunk / 8 / 4 * 4)); // whole groups of FASA_GROUP dimensions
}
