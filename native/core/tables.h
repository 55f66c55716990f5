#pragma once

// Written by native/generate.py from the tables in fasa_gguf/: change a row there, then run `make tables`.

// clang-format off

// X(name, C type, default, lowest, highest, names of the values)
#define FASA_SETTINGS(X) \
    X(chunks, uint32_t, 0, 0, 2147483647, "") \
    X(budget, uint32_t, 512, 1, 2147483647, "") \
    X(mass, float, 0.0, 0, 1, "") \
    X(floor, uint32_t, 64, 0, 2147483647, "") \
    X(cap, uint32_t, 1024, 0, 2147483647, "") \
    X(sink, uint32_t, 4, 0, 65536, "") \
    X(recent, uint32_t, 32, 0, 65536, "") \
    X(min_context, uint32_t, 1024, 0, 2147483647, "") \
    X(min_context_gpu, int32_t, -1, -1, 2147483647, "") \
    X(max_tokens, uint32_t, 64, 1, 2147483647, "") \
    X(k_dom, int32_t, FASA_K_DOM_Q4, FASA_K_DOM_F16, FASA_K_DOM_Q4, "f16 q8 q4") \
    X(per_head, uint32_t, 0, 0, 1, "") \
    X(mean_budget, uint32_t, 0, 0, 2147483647, "") \
    X(row_cache, int32_t, -1, -1, 2147483647, "") \
    X(ahead, int32_t, FASA_AHEAD_AUTO, FASA_AHEAD_AUTO, FASA_AHEAD_ON, "auto off on") \
    X(prefill, int32_t, FASA_PREFILL_AUTO, FASA_PREFILL_AUTO, FASA_PREFILL_ON, "auto off on") \
    X(prefill_min_context, uint32_t, 1024, 0, 2147483647, "") \
    X(prefill_min_context_gpu, uint32_t, 8192, 0, 2147483647, "") \
    X(prefill_tile, uint32_t, 128, 16, 1024, "") \
    X(prefill_mass, float, 0.98, 0, 1, "") \
    X(prefill_budget, uint32_t, 1024, 1, 2147483647, "") \
    X(prefill_floor, uint32_t, 256, 1, 2147483647, "") \
    X(prefill_cap, uint32_t, 4096, 1, 2147483647, "") \
    X(prefill_band, uint32_t, 128, 0, 65536, "")

#define FASA_QUALITY_NAMES "fast, balanced, careful"
// X(quality, setting, value)
#define FASA_QUALITIES(X) \
    X(fast, mass, 0.9) \
    X(fast, floor, 64) \
    X(fast, cap, 1024) \
    X(balanced, mass, 0.95) \
    X(balanced, floor, 64) \
    X(balanced, cap, 2048) \
    X(careful, mass, 0.985) \
    X(careful, floor, 128) \
    X(careful, cap, 8192)

// counted by: the ops, on the CPU and on a device
// X(name, NAME)
#define FASA_COUNTERS_OP(X) \
    X(prefill_attended, PREFILL_ATTENDED) \
    X(prefill_visible, PREFILL_VISIBLE) \
    X(tokens_attended, TOKENS_ATTENDED) \
    X(tokens_visible, TOKENS_VISIBLE) \
    X(lists, LISTS) \
    X(bytes_tip, BYTES_TIP) \
    X(bytes_fac, BYTES_FAC)

// counted by: the ops of a device only
// X(name, NAME)
#define FASA_COUNTERS_DEVICE(X) \
    X(rows_fetched, ROWS_FETCHED) \
    X(rows_reused, ROWS_REUSED) \
    X(bytes_fetched, BYTES_FETCHED) \
    X(bytes_staged, BYTES_STAGED)

// counted by: the host, once for every ubatch that was computed
// X(name, NAME)
#define FASA_COUNTERS_STEP(X) \
    X(steps_sparse, STEPS_SPARSE) \
    X(steps_dense, STEPS_DENSE) \
    X(steps_prefill, STEPS_PREFILL) \
    X(steps_prefill_sparse, STEPS_PREFILL_SPARSE) \
    X(layers_sparse, LAYERS_SPARSE) \
    X(layers_ahead, LAYERS_AHEAD) \
    X(layers_dense, LAYERS_DENSE) \
    X(layers_prefill, LAYERS_PREFILL) \
    X(layers_prefill_sparse, LAYERS_PREFILL_SPARSE) \
    X(tiles_sparse, TILES_SPARSE) \
    X(tiles_dense, TILES_DENSE) \
    X(bytes_dense, BYTES_DENSE) \
    X(bytes_layers_dense, BYTES_LAYERS_DENSE) \
    X(cells_refreshed, CELLS_REFRESHED) \
    X(rebuilds, REBUILDS)

// counted by: nobody: a size, read when it is asked for, which a reset leaves
// X(name, NAME)
#define FASA_COUNTERS_MEMORY(X) \
    X(bytes_k_dom, BYTES_K_DOM) \
    X(bytes_kv, BYTES_KV) \
    X(bytes_kv_host, BYTES_KV_HOST) \
    X(bytes_row_cache, BYTES_ROW_CACHE)

// X(NAME, text)
#define FASA_REASONS(X) \
    X(NONE, "") \
    X(OFF, "FASA is off") \
    X(MIN_CONTEXT_GPU, "the context is shorter than min_context_gpu") \
    X(NOT_STARTED, "nothing was computed yet") \
    X(PREFILL, "the last step was a prompt") \
    X(MIN_CONTEXT, "the context is shorter than min_context") \
    X(NO_LAYER, "no layer can run sparse") \
    X(UNKNOWN_CONTEXT, "this context has no KV cache that FASA knows") \
    X(PREFILL_OFF, "sparse prefill is off") \
    X(PREFILL_MIN_CONTEXT, "the prompt is shorter than prefill_min_context so far") \
    X(PREFILL_SHORT, "the ubatch has fewer than 32 tokens of a sequence") \
    X(PREFILL_EMBEDDINGS, "embeddings are computed") \
    X(PREFILL_POSITIONS, "tokens of the ubatch share a position, as those of an image do") \
    X(PREFILL_OBSERVED, "an observer sees queries and keys, as in calibration") \
    X(PREFILL_MIN_CONTEXT_GPU, "its attention runs on a GPU, and the prompt is shorter than " \
        "prefill_min_context_gpu so far") \
    X(PREFILL_OFFLOAD, "it is on the CPU, and a GPU computes its prompts, as llama.cpp does without `op_offload` " \
        "false") \
    X(PREFILL_REMOTE, "it is on another machine, where prompts are dense") \
    X(PREFILL_HEAD_DIM, "the GPU's flash attention does not know its head dimension") \
    X(PREFILL_WINDOW, "the layer has a sliding window") \
    X(NO_SUCH_LAYER, "no such layer") \
    X(NO_CACHE, "it has no KV cache that FASA knows") \
    X(NOT_BUILT, "no graph has asked FASA for it: nothing was decoded yet, or its architecture builds attention " \
        "another way") \
    X(SMALL_WINDOW, "its sliding window is not longer than what it would attend") \
    X(NOT_RANKED, "the profile has no ranking for it") \
    X(LENDER_DENSE, "the layer whose list it borrows is dense") \
    X(SHARED_CACHE, "its cache is shared with another context") \
    X(LATENT, "multi-head latent attention has no keys per head") \
    X(ODD_HEAD, "its head dimension is odd") \
    X(CACHE_TYPE, "its cache type cannot be read back") \
    X(NO_KERNELS, "its cache is on a device that FASA has no kernels for") \
    X(REMOTE_BUILD, "it is on another machine, whose RPC server is not of this build of fasa_gguf") \
    X(REMOTE_DEVICE, "it is on a device of another machine that is no CPU") \
    X(NO_CPU_OPS, "the CPU backend has no FASA ops") \
    X(NO_FLASH_ATTENTION, "flash attention is off") \
    X(TRAINING, "training") \
    X(NOT_CAUSAL, "its attention is not causal") \
    X(BIAS, "its attention has a bias") \
    X(ALIBI, "ALiBi moves the scores") \
    X(QUERY_TYPE, "its queries are not f32") \
    X(QUERY_HEADS, "its query heads are no multiple of its KV heads") \
    X(MASK_TYPE, "its mask is not f16") \
    X(MASK_COMPUTED, "its mask is computed") \
    X(CUDA_DEVICE, "its device is not one of CUDA's") \
    X(CUDA_CAPABILITY, "its GPU has no FASA kernels: they need an NVIDIA GPU of compute capability 7.5 or later") \
    X(CUDA_CACHE_TYPE, "the CUDA kernels read caches in f32, f16, bf16, q8_0 and q4_0, and this one has another " \
        "type") \
    X(CUDA_HEAD_DIM, "the CUDA kernels need the same head dimension for K and V, a multiple of 8 and at most 256") \
    X(CUDA_GROUP, "more than 128 query heads share a KV head") \
    X(AHEAD_OFF, "selecting ahead is off") \
    X(AHEAD_AUTO, "it is on the CPU, where selecting ahead saves no time") \
    X(AHEAD_TOKENS, "the step has several tokens, with which selecting ahead is slower") \
    X(AHEAD_LONG, "selecting among so many cells takes longer than the feed-forward beside it") \
    X(AHEAD_BORROWS, "it borrows its list") \
    X(AHEAD_PROFILE, "the profile says that foreseen queries lose too much there") \
    X(AHEAD_FIRST, "no block lies before it") \
    X(AHEAD_NO_FEED_FORWARD, "no feed-forward lies between the attention or other block before it and its queries") \
    X(AHEAD_UNKNOWN, "how its queries follow from the layer before is not recognised") \
    X(AHEAD_DEVICE, "the feed-forward before it runs on another device") \
    X(AHEAD_ROOM, "its rows on the device have no room for a list with all tokens of the batch")

// clang-format on
