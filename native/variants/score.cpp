// Whether this CPU can run ggml-cpu-sapphirerapids, and how good it is: compiled into that variant alone, without its
// instruction sets. Upstream asks for AMX; we leave AMX out and use AVX512-FP16 (CMakeLists.txt).

#include "ggml-backend-impl.h"

#include <cpuid.h>

extern "C" int fasa_upstream_score(void); // cpu-feats.cpp of this variant, without AMX

static int fasa_score(void) {
    unsigned a, b, c, d;
    const bool has_fp16 = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 23 & 1) != 0;
    const int score     = fasa_upstream_score();
    return has_fp16 && score > 0 ? score + (1 << 12) : 0; // above upstream's bits, so above ggml-cpu-zen4
}

GGML_BACKEND_DL_SCORE_IMPL(fasa_score)
