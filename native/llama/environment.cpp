// fasa_use_environment: the profile in the model's file, and settings from variables, for programs that know nothing of
// FASA. What is wrong is one line on stderr, and the context stays dense.

#include "llama/environment.h"
#include "core/error.h"
#include "core/settings.h"
#include "core/tables.h"
#include "llama/fasa-hooks.h"
#include "llama/file-profile.h"

#include "llama-context.h"
#include "llama-model.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

static std::atomic<bool> fasa_is_used{ false };
static std::mutex fasa_models_lock;
// by model, whose address a later model may have: every model that is loaded writes its entry
static std::map<const llama_model *, std::shared_ptr<fasa_file_profile>> fasa_models;

void fasa_use_environment(void) {
    fasa_is_used = true;
}

// ---- variables ----

// nullptr: not set, or empty
static const char * fasa_variable(const std::string & name) {
    const char * value = getenv(("FASA_" + name).c_str());
    return value && *value ? value : nullptr;
}

static std::string fasa_variable_of(const fasa_setting & row) {
    std::string name = row.name;
    for (char & c : name) {
        c = (char) toupper((unsigned char) c);
    }
    return name;
}

// is FASA asked for: 1, 0, or -1: fasa_error() says what is wrong
static int fasa_asked() {
    if (const char * enable = fasa_variable("ENABLE")) {
        return strcmp(enable, "1") == 0 ? 1 :
            strcmp(enable, "0") == 0    ? 0 :
                                          fasa_set_error("FASA_ENABLE: expected 0 or 1, found '%.60s'", enable);
    }
    for (size_t i = 0; i < FASA_N_SETTINGS; ++i) {
        if (fasa_variable(fasa_variable_of(FASA_SETTING_ROWS[i]))) {
            return 1;
        }
    }
    return fasa_variable("MODE") || fasa_variable("PROFILE") || fasa_variable("QUALITY") ? 1 : 0;
}

bool fasa_environment_host() {
    const char * mode = fasa_is_used ? fasa_variable("MODE") : nullptr;
    return mode && (strcmp(mode, "host") == 0 || strcmp(mode, "m") == 0) && fasa_asked() == 1;
}

static int fasa_check_mode() {
    const char * mode = fasa_variable("MODE");
    for (const char * known : { "auto", "device", "host", "c", "m" }) {
        if (mode == nullptr || strcmp(mode, known) == 0) {
            return 0;
        }
    }
    return fasa_set_error("FASA_MODE: expected auto, device or host, found '%.60s'", mode);
}

// what FASA_QUALITY stands for
static int fasa_read_quality(fasa_changes & changes) {
    const char * wanted = fasa_variable("QUALITY");
#define X(name, setting, value)                                                                                        \
    if (wanted && strcmp(wanted, #name) == 0) {                                                                        \
        changes[#setting] = value;                                                                                     \
    }
    FASA_QUALITIES(X)
#undef X
    return wanted && changes.empty() ?
        fasa_set_error("FASA_QUALITY: expected one of " FASA_QUALITY_NAMES ", found '%.60s'", wanted) :
        0;
}

static int fasa_read_variables(fasa_changes & changes) {
    for (size_t i = 0; i < FASA_N_SETTINGS; ++i) {
        const auto & row = FASA_SETTING_ROWS[i];
        const auto name  = fasa_variable_of(row);
        if (const char * text = fasa_variable(name)) {
            double value = 0;
            if (fasa_read_setting(row, text, value) != 0) {
                return fasa_set_error("FASA_%s: %s", name.c_str(), std::string(fasa_error()).c_str());
            }
            changes[row.name] = value;
        }
    }
    return 0;
}

// ---- a context ----

static std::shared_ptr<fasa_file_profile> fasa_profile_of(const llama_model & model) {
    std::lock_guard<std::mutex> lock(fasa_models_lock);
    const auto found = fasa_models.find(&model);
    return found == fasa_models.end() ? nullptr : found->second;
}

// the settings in force, and how many layers they are for
static std::string fasa_describe(llama_context * ctx, const fasa_file_profile & file) {
    fasa_params p = fasa_params_default();
    fasa_get_params(ctx, &p);
    std::string out = "on: ";
    for (size_t i = 0; i < FASA_N_SETTINGS; ++i) {
        const auto & row = FASA_SETTING_ROWS[i];
        out += std::string(i ? ", " : "") + row.name + " " + row.text(row.get(p));
    }
    size_t n_ranked = 0;
    for (const uint32_t n : file.n_chunk) {
        n_ranked += n > 0;
    }
    out += "; " + std::to_string(n_ranked) + " of " + std::to_string(file.n_chunk.size()) + " layers ranked";
    if (llama_n_ctx_seq(ctx) < p.min_context) {
        out += "; every step is dense: the context is shorter than min_context";
    }
    fasa_gpu_limit limit = {};
    limit.size           = sizeof(limit);
    if (fasa_get_gpu_limit(ctx, &limit) == 0 && limit.source != FASA_LIMIT_NONE) {
        static const char * const how[] = { "", "set", "by a probe of the GPU", "by an earlier probe of the GPU",
            "not measured", "the context is shorter than any that a probe measures" };
        out += limit.cells == INT32_MAX ? "; layers on a GPU never use FASA" :
                                          "; layers on a GPU use FASA from " + std::to_string(limit.cells) + " cells";
        out += std::string(" (") + how[limit.source] + (limit.note[0] ? std::string("; ") + limit.note : "") + ")";
    }
    fasa_model_info info = {};
    info.size            = sizeof(info);
    if (fasa_get_model_info(ctx, &info) == 0 && file.rope_base > 0 &&
        std::fabs(info.rope_base - file.rope_base) > 1e-3 * file.rope_base) {
        char text[160];
        snprintf(text, sizeof(text),
            "; the profile was made under RoPE base %.7g, and this context has %.7g: its ranking may not hold",
            file.rope_base, (double) info.rope_base);
        out += text;
    }
    return out;
}

// -1: fasa_error() says why the context stays dense
static int fasa_enable(llama_context * ctx, const fasa_file_profile * file) {
    if (fasa_variable("PROFILE")) {
        return fasa_set_error(
            "FASA_PROFILE: this program reads the profile in the model's file only; put it there with "
            "`fasa-gguf embed-profile`, and unset FASA_PROFILE");
    }
    if (fasa_check_mode() != 0) {
        return -1;
    }
    if (file == nullptr || (file->n_chunk.empty() && file->error.empty())) {
        return fasa_set_error("there is no FASA profile in this model; run `fasa-gguf embed-profile MODEL`");
    }
    if (!file->error.empty()) {
        return fasa_set_error("%s", file->error.c_str());
    }
    fasa_params p = fasa_params_default();
    fasa_changes quality, given;
    if (fasa_read_quality(quality) != 0 || fasa_read_variables(given) != 0) {
        return -1;
    }
    fasa_apply(p, file->defaults);
    fasa_apply(p, quality);
    fasa_apply(p, given);
    p.enabled               = 1;
    const auto profile      = file->as_struct();
    fasa_counters counters  = {};
    counters.size           = sizeof(counters);
    const bool must_be_host = fasa_environment_host();
    if (must_be_host && fasa_get_counters(ctx, &counters) == 0 && counters.bytes_kv_host == 0) {
        return fasa_set_error(
            "FASA_MODE host: this context has no K and V in pinned host memory; it needs layers on an "
            "NVIDIA GPU (-ngl) and flash attention");
    }
    return fasa_set_profile(ctx, &profile) != 0 ? -1 : fasa_set_params(ctx, &p);
}

// a line, once while it stays the same: some programs make many contexts
static void fasa_say(const std::string & text) {
    static std::mutex lock;
    static std::string last;
    std::lock_guard<std::mutex> held(lock);
    if (text != last) {
        fprintf(stderr, "fasa: %s\n", text.c_str());
        last = text;
    }
}

void fasa_on_model(const llama_model * model, const gguf_context * metadata) {
    if (!fasa_is_used) {
        return;
    }
    auto found = std::make_shared<fasa_file_profile>();
    if (fasa_guard("the profile", [&] { return found->read(metadata); }) != 0) {
        found->error = std::string(fasa_error()) + "; make the profile anew with `fasa-gguf embed-profile MODEL`";
    }
    std::lock_guard<std::mutex> lock(fasa_models_lock);
    fasa_models[model] = found;
}

void fasa_on_context(llama_context * ctx) {
    if (!fasa_is_used || ctx->get_model().hparams.no_alloc) { // made only to see how much memory it takes
        return;
    }
    const auto file = fasa_profile_of(ctx->get_model());
    const int asked = fasa_asked();
    if (asked == 0) {
        fasa_say("off: not asked for; FASA_ENABLE=1 turns it on");
        return;
    }
    const int done = asked < 0 ? -1 : fasa_guard("fasa", [&] { return fasa_enable(ctx, file.get()); });
    fasa_say(done == 0 ? fasa_describe(ctx, *file) : std::string("off: ") + fasa_error());
}

void fasa_on_free(llama_context * ctx) {
    const char * wanted = fasa_is_used && ctx ? fasa_variable("STATS") : nullptr;
    if (wanted == nullptr || strcmp(wanted, "1") != 0 || ctx->get_model().hparams.no_alloc) {
        return;
    }
    fasa_counters c = {};
    c.size          = sizeof(c);
    if (fasa_get_counters(ctx, &c) != 0) {
        return;
    }
    std::string out = "fasa: stats:";
#define X(name, NAME) out += std::string(" " #name "=") + std::to_string(c.name);
    FASA_COUNTERS_STEP(X)
    FASA_COUNTERS_OP(X)
    FASA_COUNTERS_DEVICE(X)
    FASA_COUNTERS_MEMORY(X)
#undef X
    fprintf(stderr, "%s\n", out.c_str());
}
