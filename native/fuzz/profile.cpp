// A foreign GGUF header into the profile reader of the native tools, and the profile into a context: `make fuzz`.
// Whatever the bytes are, they are refused with a sentence, or the context decodes with them.

#include "core/settings.h"
#include "fuzz.h"
#include "llama/file-profile.h"

#include "gguf.h"

#include <cstring>
#include <memory>

static void attach(llama_context * ctx, const fasa_file_profile & file) {
    const fasa_profile profile = file.as_struct();
    if (fasa_set_profile(ctx, &profile) != 0) {
        FUZZ_EXPECT(*fasa_error());
        return;
    }
    fasa_params p = fasa_params_default();
    p.min_context = 0;
    fasa_apply(p, file.defaults);
    p.enabled = 1;
    if (fasa_set_params(ctx, &p) != 0) {
        FUZZ_EXPECT(*fasa_error());
        return;
    }
    fuzz_decode(ctx, 40);
    fuzz_decode(ctx, 1);
    fuzz_decode(ctx, 2);
    fuzz_counters(ctx);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static llama_context * const ctx = fuzz_context();
    const gguf_init_params params    = { /*.no_alloc =*/true, /*.ctx =*/nullptr };
    const std::unique_ptr<gguf_context, decltype(&gguf_free)> meta(
        gguf_init_from_buffer(data, size, params), gguf_free);
    if (meta == nullptr) {
        return 0;
    }
    fasa_file_profile file;
    if (file.read(meta.get()) != 0) {
        FUZZ_EXPECT(*fasa_error());
        return 0;
    }
    if (file.n_chunk.empty()) {
        return 0;
    }
    attach(ctx, file);
    fasa_params off = fasa_params_default();
    FUZZ_EXPECT(fasa_set_params(ctx, &off) == 0);
    llama_memory_clear(llama_get_memory(ctx), true);
    return 0;
}
