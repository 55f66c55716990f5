#pragma once

// The profile in a model's GGUF, for programs that attach none themselves. Its keys are those of
// docs/reference/profile.md; every length is checked before it is used, and fasa_set_profile checks the values.

#include "core/settings.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

struct gguf_context;

using fasa_changes = std::map<std::string, double>; // settings by name, each within its range

// the value of a setting from text; -1: fasa_error() says what was expected
int fasa_read_setting(const fasa_setting & row, const char * text, double & value);
// Put them into p. Of budget, mass and mean_budget the one that is given takes the place of the others.
void fasa_apply(fasa_params & p, fasa_changes changes);

struct fasa_file_profile {
    std::string error;                        // why it cannot be used; "": it can
    std::vector<uint32_t> n_head_kv, n_chunk; // [n_layer]; empty: there is no profile
    std::vector<uint16_t> ranking;
    uint32_t weight_k = 0;
    std::vector<float> weight, layer_miss, mean_budget_mass;
    std::vector<uint32_t> mean_budget;
    std::vector<uint8_t> ahead; // as in fasa_profile, like the next two
    std::vector<uint16_t> ahead_ranking;
    std::vector<float> ahead_weight;
    double rope_base = 0; // 0: not known
    fasa_changes defaults;

    // -1: fasa_error() says which key is wrong, and how
    int read(const gguf_context * meta);
    // which points to what is in here
    fasa_profile as_struct() const;

private:
    int read_arrays(const gguf_context * meta);
    int read_ahead(const gguf_context * meta);
    int read_defaults(const gguf_context * meta);
};
