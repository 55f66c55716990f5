// The part of fasa.h, which includes it, that is about the depth from which FASA pays on a GPU.

#ifndef FASA_LIMIT_H
#define FASA_LIMIT_H

// From how many cells on a layer on a device is faster with FASA than dense: min_context_gpu when that is -1. Where it
// came from:
enum fasa_limit_source {
    FASA_LIMIT_NONE    = 0, // there is none: no layer is on a GPU in mode device, or min_context is 0
    FASA_LIMIT_SET     = 1, // from the setting
    FASA_LIMIT_PROBED  = 2, // from a probe of the device, now
    FASA_LIMIT_KEPT    = 3, // from an earlier one, which the user's cache keeps
    FASA_LIMIT_DEFAULT = 4, // the device could not be probed; `note` says why
    FASA_LIMIT_SHORT   = 5, // the context is shorter than any, so nothing was probed
};
typedef struct fasa_gpu_limit {
    uint64_t size;
    uint32_t cells; // 2147483647: never
    int32_t source; // enum fasa_limit_source
    char note[256]; // what the user should know, or ""
} fasa_gpu_limit;
// Seconds at a depth, for tests: 0, or -1 when it cannot be measured
typedef int (*fasa_timer)(uint32_t n_cells, double * dense, double * fasa, void * user);
// A layer, as in fasa_op_case, and what its time depends on. Steps of one token are measured.
typedef struct fasa_gpu_case {
    uint64_t size;
    const char * backend; // "CUDA0"
    int32_t n_threads;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_embd_head;
    const char * type_k;
    const char * type_v;
    int32_t k_dom;
    int32_t n_dom;
    uint32_t attended; // tokens: the budget, or the cap of a mass
    int32_t n_forced;  // sinks and recent tokens
    int32_t per_head;
    int32_t ahead;      // 1: it selects ahead, beside a feed-forward
    uint64_t beside;    // whose weights have so many bytes
    uint64_t max_bytes; // of device memory for the probe; 0: a quarter of what is free, at most 1 GiB
    fasa_timer timer;   // NULL: the device
    void * user;
} fasa_gpu_case;
// Takes up to 2 s when no earlier probe is kept for the same device, driver, library and case.
FASA_API int fasa_find_gpu_limit(const fasa_gpu_case * layer, fasa_gpu_limit * limit);
FASA_API int fasa_get_gpu_limit(const struct llama_context * ctx, fasa_gpu_limit * limit);

// For measurements: 0 leaves attention out of the steps (its output is the queries), so that a step's time without it
// can be told; what is decoded meanwhile means nothing. 1: as usual.
FASA_API int fasa_set_attention(struct llama_context * ctx, int32_t on);

#endif // FASA_LIMIT_H
