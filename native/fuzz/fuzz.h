#pragma once

// What the fuzzers share: a tiny model, whose path is in FUZZ_MODEL, and a context of it.

#include "fasa.h"
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

#define FUZZ_EXPECT(x)                                                                                                 \
    if (!(x)) {                                                                                                        \
        fprintf(stderr, "%s:%d: expected %s; fasa_error: %s\n", __FILE__, __LINE__, #x, fasa_error());                 \
        abort();                                                                                                       \
    }

inline llama_model * fuzz_model() {
    static llama_model * const model = [] {
        const char * path = getenv("FUZZ_MODEL");
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        auto * loaded = path ? llama_model_load_from_file(path, llama_model_default_params()) : nullptr;
        if (loaded == nullptr) {
            fprintf(stderr, "FUZZ_MODEL: expected the path of a model, found %s\n", path ? path : "nothing");
            exit(1);
        }
        return loaded;
    }();
    return model;
}

inline llama_context * fuzz_context(uint32_t n_ctx = 256) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = n_ctx;
    params.n_batch = params.n_ubatch = 64;
    params.n_seq_max                 = 2;
    params.kv_unified                = true;
    params.n_threads = params.n_threads_batch = 1;
    params.flash_attn_type                    = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    llama_context * ctx                       = llama_init_from_model(fuzz_model(), params);
    FUZZ_EXPECT(ctx);
    return ctx;
}

// n tokens of sequence 0 behind those that are there; forgets them where there is no room
inline void fuzz_decode(llama_context * ctx, int n) {
    std::vector<llama_token> tokens(n);
    for (int i = 0; i < n; ++i) {
        tokens[i] = 3 + i % 200;
    }
    if (llama_decode(ctx, llama_batch_get_one(tokens.data(), n)) != 0) {
        llama_memory_clear(llama_get_memory(ctx), true);
    }
}

inline fasa_counters fuzz_counters(const llama_context * ctx) {
    fasa_counters c = {};
    c.size          = sizeof(c);
    FUZZ_EXPECT(fasa_get_counters(ctx, &c) == 0);
    return c;
}
