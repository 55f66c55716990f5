// FASA (Frequency-aware Sparse Attention, arXiv 2602.03152) for llama.cpp: the one C interface.
//
// Python reads this very file with cffi, so it holds plain C declarations only: no macros beyond the include guard and
// FASA_API, no inline code. Every struct starts with its size in bytes, which the caller sets; a size that the library
// does not know is refused, so an old caller and a new library never misread each other.
//
// Every function that can fail returns 0 on success and -1 on failure; fasa_error() then gives one sentence. NULL where
// a pointer is needed, and numbers that are out of range, are failures too.

#ifndef FASA_H
#define FASA_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#    define FASA_API __declspec(dllexport)
#else
#    define FASA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;

// how the dominant keys are stored; groups of 8 dimensions share one f16 scale in the quantised types
enum fasa_k_dom_type {
    FASA_K_DOM_F16 = 0,
    FASA_K_DOM_Q8  = 1,
    FASA_K_DOM_Q4  = 2,
};

// whether a layer selects its tokens while the feed-forward before it runs, by queries that are foreseen
enum fasa_ahead_type {
    FASA_AHEAD_AUTO = 0, // layers on a GPU do
    FASA_AHEAD_OFF  = 1,
    FASA_AHEAD_ON   = 2,
};

// whether prompts are processed sparsely
enum fasa_prefill_type {
    FASA_PREFILL_AUTO = 0, // from prefill_min_context cells on
    FASA_PREFILL_OFF  = 1,
    FASA_PREFILL_ON   = 2,
};

// where the K and V of a context's layers on GPUs lie
enum fasa_mode {
    FASA_MODE_DEVICE = 0, // FASA-C: on the layer's device, as in the stock library
    FASA_MODE_HOST   = 1, // FASA-M: in pinned host memory that the device reads and writes in place; the dominant keys
                          // stay on the device
};

// what a ubatch is: a prompt, or a decode step, whose tokens continue sequences that are being
// generated
enum fasa_step {
    FASA_STEP_AUTO   = 0, // decided sequence by sequence: fasa_set_step
    FASA_STEP_PROMPT = 1,
    FASA_STEP_DECODE = 2,
};

// The ranking of the frequency chunks. All arrays are copied by fasa_set_profile, which refuses a length that does not
// fit the shape. The flat arrays run over the layers that are ranked, then KV heads, then ranks.
typedef struct fasa_profile {
    uint64_t size;
    uint32_t n_layer;
    const uint32_t * n_head_kv;     // [n_layer]
    const uint32_t * n_chunk;       // [n_layer], 0: the layer has no ranking and stays dense
    uint64_t n_ranking;             // entries of ranking: the sum over ranked layers of n_head_kv*n_chunk
    const uint16_t * ranking;       // [n_ranking] chunk ids, best first
    uint32_t weight_k;              // number of leading chunks that have a weight, 0: none
    uint64_t n_weight;              // entries of weight: the sum over ranked layers of n_head_kv*weight_k
    const float * weight;           // [n_weight] finite, or NULL
    uint64_t n_layer_miss;          // entries of layer_miss: n_layer, or 0
    const float * layer_miss;       // [n_layer_miss] > 0: with a target mass a layer's is 1 - (1 - mass)*layer_miss
    uint32_t n_mean_budget;         // entries of the table of mean budgets, 0: none
    const uint32_t * mean_budget;   // [n_mean_budget] mean number of tokens, ascending
    const float * mean_budget_mass; // [n_mean_budget] the target mass that takes as many, ascending, between 0 and 1
    // Of layers that select ahead. None: every layer may, with the ranking above.
    uint32_t n_ahead;               // entries of ahead: n_layer, or 0
    const uint8_t * ahead;          // [n_ahead] 1: the layer may select ahead, 0: it keeps its own queries
    const uint16_t * ahead_ranking; // [n_ranking] for foreseen queries, or NULL: as ranking
    const float * ahead_weight;     // [n_weight] likewise
} fasa_profile;

// How to decode. The defaults are in fasa_params_default; units are tokens (= KV cells) unless said otherwise.
// begin settings: written by native/generate.py
typedef struct fasa_params {
    uint64_t size;
    // 0: the stock library's graphs, bit for bit
    int32_t enabled;
    // frequency chunks per KV head, from 0: dominant chunks that score the tokens; 0: 3/8 of the head's chunks, rounded
    // down to a multiple of 4, at least 4
    uint32_t chunks;
    // tokens per step and KV head, from 1: tokens attended; sinks and recent tokens count in it
    uint32_t budget;
    // share, 0 to 1: take tokens until this share of the estimated attention is held; 0: fixed budget
    float mass;
    // tokens, from 0: fewest tokens attended when mass > 0
    uint32_t floor;
    // tokens, from 0: most tokens attended when mass > 0
    uint32_t cap;
    // tokens, from 0 to 65536: first tokens of a sequence, always attended
    uint32_t sink;
    // tokens, from 0 to 65536: last tokens of a sequence, always attended
    uint32_t recent;
    // cells, from 0: a step that sees fewer cached cells than this is dense
    uint32_t min_context;
    // cells, from -1: the same for a layer on a GPU; -1: found by a short probe of the GPU; without effect when
    // min_context is 0
    int32_t min_context_gpu;
    // tokens per sequence, from 1: a ubatch with more tokens of one sequence than this is a prompt
    uint32_t max_tokens;
    // enum fasa_k_dom_type: how the dominant keys are stored
    int32_t k_dom;
    // 0 or 1: 1: every query head selects for itself, as published; 0: those of a KV head together
    uint32_t per_head;
    // tokens on average, from 0: > 0: tokens attended on average; mass is then looked up in the profile, floor is a
    // quarter of it (at least 64), cap twice
    uint32_t mean_budget;
    // MiB, from -1: FASA-M: device memory, over all layers, that keeps recently attended rows; 0: none, -1: twice what
    // a step attends
    int32_t row_cache;
    // enum fasa_ahead_type: select a layer's tokens while the feed-forward before it runs, by foreseen queries; auto:
    // on a GPU, in steps of one token, where the dominant keys are no more bytes than the feed-forward
    int32_t ahead;
    // enum fasa_prefill_type: process prompts sparsely; auto: from prefill_min_context cells on, and not in layers on
    // the CPU whose prompts a GPU computes
    int32_t prefill;
    // cells, from 0: with prefill auto, a ubatch of a prompt that sees fewer cells than this is dense
    uint32_t prefill_min_context;
    // cells, from 0: for layers on a GPU: the same, and the larger of the two counts; in mode host twice this
    uint32_t prefill_min_context_gpu;
    // tokens, from 16 to 1024: tokens of a prompt that share a list of cells per KV head
    uint32_t prefill_tile;
    // share, 0 to 1: a tile takes cells until this share of the estimated attention is held; 0: prefill_budget cells
    float prefill_mass;
    // cells, from 1: cells that a tile attends when prefill_mass is 0; those always attended count in it
    uint32_t prefill_budget;
    // cells, from 1: fewest cells that a tile attends when prefill_mass > 0
    uint32_t prefill_floor;
    // cells, from 1: most cells that a tile attends when prefill_mass > 0
    uint32_t prefill_cap;
    // cells, from 0 to 65536: cells before a tile that it always attends, beside sinks and its own
    uint32_t prefill_band;
} fasa_params;
// end settings

// What happened since the context was made or fasa_reset_counters.
// begin counters: written by native/generate.py
typedef struct fasa_counters {
    uint64_t size;
    uint64_t steps_sparse;          // ubatches: decode steps in which at least one layer ran sparse
    uint64_t steps_dense;           // ubatches: decode steps in which every layer was dense
    uint64_t steps_prefill;         // ubatches: ubatches of prompts
    uint64_t steps_prefill_sparse;  // ubatches: those of them in which at least one layer ran sparse
    uint64_t layers_sparse;         // layers x steps: layers that ran with FASA
    uint64_t layers_ahead;          // layers x steps: layers that ran with FASA and selected ahead
    uint64_t layers_dense;          // layers x steps: layers that ran without FASA in decode steps
    uint64_t layers_prefill;        // layers x steps: layers that ran in ubatches of prompts
    uint64_t layers_prefill_sparse; // layers x steps: those of them that ran sparse
    uint64_t tiles_sparse;          // tiles x layers: tiles of prompts in layers that ran sparse
    uint64_t tiles_dense;           // tiles x layers: tiles of prompts in layers that ran dense while FASA was on
    uint64_t prefill_attended;      // cells x lists: cells that the lists of tiles hold
    uint64_t prefill_visible;       // cells x lists: cells that dense attention would have attended instead
    uint64_t tokens_attended;       // tokens x lists: tokens that the lists hold
    uint64_t tokens_visible;        // tokens x lists: tokens that dense attention would have attended instead
    // lists: lists selected: layers that select x KV heads (query heads with per_head) x tokens of the step
    uint64_t lists;
    uint64_t bytes_tip; // bytes: dominant keys read
    uint64_t bytes_fac; // bytes: K and V rows read by sparse layers
    // bytes: K and V rows that dense attention would have read in their place: of cells that a token sees
    uint64_t bytes_dense;
    // bytes: K and V rows that dense layers read in decode steps: of cells that a token sees
    uint64_t bytes_layers_dense;
    uint64_t cells_refreshed; // cells: cells whose dominant keys were derived from the stored K
    uint64_t rebuilds;        // ubatches: steps that derived more cells than they had written
    uint64_t bytes_k_dom;     // bytes: the dominant keys
    uint64_t bytes_kv;        // bytes: the K and V cache
    uint64_t bytes_kv_host;   // bytes: the part of bytes_kv in pinned host memory (FASA-M)
    uint64_t bytes_row_cache; // bytes: device memory that keeps recently attended rows
    uint64_t rows_fetched; // rows: rows (K and V of a cell and KV head) that sparse layers read from pinned host memory
    uint64_t rows_reused;  // rows: rows that they found in the row cache instead
    uint64_t bytes_fetched; // bytes: the bytes of rows_fetched
    // bytes: K and V that dense layers copied from pinned host memory to their device while FASA was on
    uint64_t bytes_staged;
} fasa_counters;
// end counters

// Why a step or a layer is dense.
// begin reasons: written by native/generate.py
enum fasa_reason {
    FASA_REASON_NONE                    = 0,  // it is sparse
    FASA_REASON_OFF                     = 1,  // FASA is off
    FASA_REASON_MIN_CONTEXT_GPU         = 2,  // the context is shorter than min_context_gpu
    FASA_REASON_NOT_STARTED             = 3,  // nothing was computed yet
    FASA_REASON_PREFILL                 = 4,  // the last step was a prompt
    FASA_REASON_MIN_CONTEXT             = 5,  // the context is shorter than min_context
    FASA_REASON_NO_LAYER                = 6,  // no layer can run sparse
    FASA_REASON_UNKNOWN_CONTEXT         = 7,  // this context has no KV cache that FASA knows
    FASA_REASON_PREFILL_OFF             = 8,  // sparse prefill is off
    FASA_REASON_PREFILL_MIN_CONTEXT     = 9,  // the prompt is shorter than prefill_min_context so far
    FASA_REASON_PREFILL_SHORT           = 10, // the ubatch has fewer than 32 tokens of a sequence
    FASA_REASON_PREFILL_EMBEDDINGS      = 11, // embeddings are computed
    FASA_REASON_PREFILL_POSITIONS       = 12, // tokens of the ubatch share a position, as those of an image do
    FASA_REASON_PREFILL_OBSERVED        = 13, // an observer sees queries and keys, as in calibration
    // its attention runs on a GPU, and the prompt is shorter than prefill_min_context_gpu so far
    FASA_REASON_PREFILL_MIN_CONTEXT_GPU = 14,
    // it is on the CPU, and a GPU computes its prompts, as llama.cpp does without `op_offload` false
    FASA_REASON_PREFILL_OFFLOAD         = 15,
    FASA_REASON_PREFILL_REMOTE          = 16, // it is on another machine, where prompts are dense
    FASA_REASON_PREFILL_HEAD_DIM        = 17, // the GPU's flash attention does not know its head dimension
    FASA_REASON_PREFILL_WINDOW          = 18, // the layer has a sliding window
    FASA_REASON_NO_SUCH_LAYER           = 19, // no such layer
    FASA_REASON_NO_CACHE                = 20, // it has no KV cache that FASA knows
    // no graph has asked FASA for it: nothing was decoded yet, or its architecture builds attention another way
    FASA_REASON_NOT_BUILT               = 21,
    FASA_REASON_SMALL_WINDOW            = 22, // its sliding window is not longer than what it would attend
    FASA_REASON_NOT_RANKED              = 23, // the profile has no ranking for it
    FASA_REASON_LENDER_DENSE            = 24, // the layer whose list it borrows is dense
    FASA_REASON_SHARED_CACHE            = 25, // its cache is shared with another context
    FASA_REASON_LATENT                  = 26, // multi-head latent attention has no keys per head
    FASA_REASON_ODD_HEAD                = 27, // its head dimension is odd
    FASA_REASON_CACHE_TYPE              = 28, // its cache type cannot be read back
    FASA_REASON_NO_KERNELS              = 29, // its cache is on a device that FASA has no kernels for
    // it is on another machine, whose RPC server is not of this build of fasa_gguf
    FASA_REASON_REMOTE_BUILD            = 30,
    FASA_REASON_REMOTE_DEVICE           = 31, // it is on a device of another machine that is no CPU
    FASA_REASON_NO_CPU_OPS              = 32, // the CPU backend has no FASA ops
    FASA_REASON_NO_FLASH_ATTENTION      = 33, // flash attention is off
    FASA_REASON_TRAINING                = 34, // training
    FASA_REASON_NOT_CAUSAL              = 35, // its attention is not causal
    FASA_REASON_BIAS                    = 36, // its attention has a bias
    FASA_REASON_ALIBI                   = 37, // ALiBi moves the scores
    FASA_REASON_QUERY_TYPE              = 38, // its queries are not f32
    FASA_REASON_QUERY_HEADS             = 39, // its query heads are no multiple of its KV heads
    FASA_REASON_MASK_TYPE               = 40, // its mask is not f16
    FASA_REASON_MASK_COMPUTED           = 41, // its mask is computed
    FASA_REASON_CUDA_DEVICE             = 42, // its device is not one of CUDA's
    // its GPU has no FASA kernels: they need an NVIDIA GPU of compute capability 7.5 or later
    FASA_REASON_CUDA_CAPABILITY         = 43,
    // the CUDA kernels read caches in f32, f16, bf16, q8_0 and q4_0, and this one has another type
    FASA_REASON_CUDA_CACHE_TYPE         = 44,
    // the CUDA kernels need the same head dimension for K and V, a multiple of 8 and at most 256
    FASA_REASON_CUDA_HEAD_DIM           = 45,
    FASA_REASON_CUDA_GROUP              = 46, // more than 128 query heads share a KV head
    FASA_REASON_AHEAD_OFF               = 47, // selecting ahead is off
    FASA_REASON_AHEAD_AUTO              = 48, // it is on the CPU, where selecting ahead saves no time
    FASA_REASON_AHEAD_TOKENS            = 49, // the step has several tokens, with which selecting ahead is slower
    // selecting among so many cells takes longer than the feed-forward beside it
    FASA_REASON_AHEAD_LONG              = 50,
    FASA_REASON_AHEAD_BORROWS           = 51, // it borrows its list
    FASA_REASON_AHEAD_PROFILE           = 52, // the profile says that foreseen queries lose too much there
    FASA_REASON_AHEAD_FIRST             = 53, // no block lies before it
    // no feed-forward lies between the attention or other block before it and its queries
    FASA_REASON_AHEAD_NO_FEED_FORWARD   = 54,
    FASA_REASON_AHEAD_UNKNOWN           = 55, // how its queries follow from the layer before is not recognised
    FASA_REASON_AHEAD_DEVICE            = 56, // the feed-forward before it runs on another device
    // its rows on the device have no room for a list with all tokens of the batch
    FASA_REASON_AHEAD_ROOM              = 57,
};
// end reasons

FASA_API const char * fasa_version(void);          // "0.1.0"
FASA_API const char * fasa_upstream_version(void); // the version of llama-cpp-python whose llama.cpp this is
// "NAME:HASH NAME:HASH ...": the patches of this build, with 12 digits of each one's SHA-256
FASA_API const char * fasa_patches(void);
FASA_API const char * fasa_error(void); // the last error of this thread, one sentence; "" if none
FASA_API fasa_params fasa_params_default(void);
// The chunks that the setting 0 stands for in a head that has n_chunk: 3/8 of them, in whole groups of 4.
FASA_API uint32_t fasa_default_chunks(uint32_t n_chunk);

// Where the caches of contexts that this thread makes from now on lie: enum fasa_mode. Layers on the CPU, and on
// devices that FASA has no kernels for, are not affected. A cache that cannot be pinned fails the making of the
// context; fasa_error() says why. Clears fasa_error().
FASA_API int fasa_set_mode(int32_t mode);

// For programs that know nothing of FASA, before they load a model: contexts that are made later take the profile in
// their model's file, its defaults, and the variables FASA_* (docs/guide/native-tools.md). A line on stderr says
// whether FASA is on, and with which settings or why not. The tools of `make tools` call it.
FASA_API void fasa_use_environment(void);

// Attach a profile to a context. Fails when a shape does not fit the model (both shapes are named).
FASA_API int fasa_set_profile(struct llama_context * ctx, const fasa_profile * profile);

// Settings of a live context; allocates the dominant keys when enabled, and may be called between any two decodes.
// While llama_decode runs on another thread it fails, as everything does that changes what a decode uses
// (fasa_set_profile, fasa_borrow_list, fasa_invalidate, fasa_set_observer, fasa_reset_counters); what only reads may be
// called at any time.
FASA_API int fasa_set_params(struct llama_context * ctx, const fasa_params * params);
FASA_API int fasa_get_params(const struct llama_context * ctx, fasa_params * params); // params->size set by the caller
// The same with the budget, mass, floor and cap that layer il really has: its shares of the profile and a mean budget
// applied.
FASA_API int fasa_get_layer_params(
    const struct llama_context * ctx, int32_t il, fasa_params * params); // size set by the caller

// What the ubatches of a context are until the next call: enum fasa_step. FASA_STEP_AUTO: a decode step when every
// token asks for output and every sequence in it has cells before these tokens and at most max_tokens of them, which
// are one, or drafts. Several are drafts once a single token continued the sequence behind its last prompt, or when
// that prompt had tokens that asked for no output; after a prompt whose tokens all ask for output they are more of it.
FASA_API int fasa_set_step(struct llama_context * ctx, int32_t step);

// Layer il attends from now on to the cells that layer `lender`, one before it, selects; with -1 to those that it
// selects itself. Stays so until the next call for this layer. Fails when FASA is off, when the lender does not select,
// and when the two differ in heads, cache or device. Where the lender is dense, the borrower is dense too.
FASA_API int fasa_borrow_list(struct llama_context * ctx, int32_t il, int32_t lender);

// Mark every dominant key stale, so that the next sparse step derives all of them again from the stored K.
FASA_API int fasa_invalidate(struct llama_context * ctx);

FASA_API int fasa_get_counters(const struct llama_context * ctx, fasa_counters * counters); // size set by the caller
FASA_API int fasa_reset_counters(struct llama_context * ctx);

// Why layer il is dense even in a sparse step: one clause; NULL when it can run sparse. il outside the model: "no such
// layer". A layer on a GPU has a reason while the context is shorter than min_context_gpu too. Known once a graph was
// built with FASA on, which the first decode does.
FASA_API const char * fasa_layer_reason(const struct llama_context * ctx, int32_t il);
FASA_API int32_t fasa_layer_reason_code(const struct llama_context * ctx, int32_t il); // enum fasa_reason
// Why layer il selects with its own queries in a sparse step instead of ahead: FASA_REASON_NONE when it selects ahead.
FASA_API int32_t fasa_layer_ahead_code(const struct llama_context * ctx, int32_t il); // enum fasa_reason
// Why the last ubatch as a whole was dense: "" when it was sparse.
FASA_API const char * fasa_step_reason(const struct llama_context * ctx);
FASA_API int32_t fasa_step_reason_code(const struct llama_context * ctx); // enum fasa_reason
// Why the last ubatch of a prompt was dense, or layers in it: enum fasa_reason; FASA_REASON_NONE: none was.
FASA_API int32_t fasa_prefill_reason_code(const struct llama_context * ctx);
FASA_API const char * fasa_reason_text(int32_t reason); // NULL: no reason has this number

// What attention sees in one layer of one ubatch, for calibration. Pointers are valid during the call only.
// q is post-RoPE; k is the cache of the ubatch's stream, this ubatch's rows included: for a single sequence decoded
// from an empty cache, cell = position. Only f16 and f32 caches without Hadamard rotation are handed out.
typedef struct fasa_observation {
    int32_t il;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_embd_head;
    int32_t n_tokens; // tokens of this ubatch
    int32_t n_kv;     // cells of k, a padded count: cells past the last token are not written yet
    const float * q;  // f32 [n_tokens, n_head, n_embd_head]
    const void * k;   // f16 or f32 [n_kv, n_head_kv, n_embd_head]
    int32_t k_is_f16;
    float scale;           // of the logits
    float soft_cap;        // 0: none
    const float * q_ahead; // as q, foreseen from the residual before the feed-forward; NULL: they cannot be foreseen
    int32_t ahead_reason;  // enum fasa_reason, why not
} fasa_observation;
typedef void (*fasa_observer)(const fasa_observation * seen, void * user);
// Called from a compute thread for every attention layer of every ubatch; NULL removes it.
FASA_API int fasa_set_observer(struct llama_context * ctx, fasa_observer observer, void * user);

// The RoPE pairing of a context's model: dims of chunk i are (2i, 2i+1) when layout is 0 (NORM), (i, i + n_rot/2) when
// it is 1 (NEOX); chunks from n_rot/2 on are the pairs (n_rot + 2j, n_rot + 2j + 1) of dimensions that do not rotate.
typedef struct fasa_model_info {
    uint64_t size;
    int32_t n_layer;
    int32_t rope_layout; // 0 NORM, 1 NEOX, -1: the model has no RoPE
    float rope_base;
    float rope_scale;
    int32_t is_mla;
    float rope_base_window; // of layers with a sliding window; without any, rope_base
} fasa_model_info;
FASA_API int fasa_get_model_info(const struct llama_context * ctx, fasa_model_info * info);
// shape of one attention layer: out[0..3] = n_head, n_head_kv, n_embd_head_k, n_rot; n_head_kv = 0: no attention there
FASA_API int fasa_get_layer_shape(const struct llama_context * ctx, int32_t il, int32_t * out);

// Every sequence of the context gets n_cells cells of random K and V (standard normal) at the positions from 0 on; all
// before is forgotten, recurrent state too. Nothing is computed. Sequence = stream: of a unified cache only sequence 0.
FASA_API int fasa_fill_random(struct llama_context * ctx, uint32_t n_cells, uint64_t seed);
// Bytes read plus bytes written per second when the backend ("CPU", "CUDA0") copies `bytes` from one of its tensors to
// another; n_threads of a CPU do it.
FASA_API int fasa_copy_rate(const char * backend, int32_t n_threads, uint64_t bytes, double * bytes_per_second);
// Bytes per second at which the context's threads read the first n_cells cells of K and V of every layer and stream,
// and do nothing else with them. A cache in device memory is an error.
FASA_API int fasa_read_rate(struct llama_context * ctx, uint32_t n_cells, double * bytes_per_second);

// Bytes per second that the device takes from the K and V of a FASA-M context, in pinned host memory: as one copy; and,
// layer by layer, each behind `between` bytes of device memory as in a decode step behind weights, the rows of n_rows
// random cells of the first n_cells, K and V of every KV head: by a kernel that does nothing else (gather), and by the
// one that brings FAC its rows (fetch).
typedef struct fasa_rates {
    uint64_t size; // sizeof(fasa_rates)
    double copy, gather, fetch;
} fasa_rates;
FASA_API int fasa_host_rates(
    struct llama_context * ctx, uint32_t n_cells, uint32_t n_rows, uint64_t between, fasa_rates * rates);
// Bytes that a device needs beside the compute buffer for n_tokens, estimated; n_act: the largest of n_embd and n_ff.
FASA_API uint64_t fasa_pool_bytes(uint32_t n_act, uint32_t n_tokens);
FASA_API int fasa_device_memory(const char * backend, uint64_t * free, uint64_t * total); // bytes, by its driver

// The ops of one layer on given host arrays, through a ggml graph on the named backend ("CPU", "CUDA0"): for tests
// against fasa_gguf/reference.py. Outputs may be NULL.
typedef struct fasa_op_case {
    uint64_t size;
    const char * backend;
    const char * tip_backend; // runs TIP, whose scores `backend` then selects from; NULL: `backend` does
    int32_t n_threads;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_embd_head_k;
    int32_t n_embd_head_v;
    int32_t n_kv;     // cells per stream
    int32_t n_tokens; // per stream
    int32_t n_stream;
    int32_t n_hadamard;  // block of the Hadamard rotation that q and k are stored under, 0: none
    const char * type_k; // ggml type names: "f16", "q8_0", ...
    const char * type_v;
    int32_t k_dom;        // enum fasa_k_dom_type
    int32_t n_dom;        // dominant dimensions per KV head, a multiple of 8
    const int32_t * dims; // [n_head_kv, n_dom] dimension numbers, -1: padding
    const float * weight; // [n_head_kv, n_dom]
    float scale;
    float soft_cap;
    uint32_t budget;
    float mass;
    uint32_t floor;
    uint32_t cap;
    int32_t mode;      // enum fasa_mode of k and v
    int32_t row_slots; // FASA_MODE_HOST: slots of a row cache, in eights; the ops then run again, with no cell stale
    int32_t per_head;  // n_list below: n_head when 1, n_head_kv when 0
    int32_t n_forced;  // forced cells per token
    const int32_t * forced; // [n_stream, n_tokens, n_forced] cells, -1: none
    int32_t n_fresh;        // cells per stream that the estimate leaves out, because their K is not stored yet
    const int32_t * fresh;  // [n_stream, n_fresh] cells, -1: none
    int32_t list_length;    // cells that a given list has room for
    const int32_t * list; // [n_stream, n_tokens, n_list, 1 + list_length] the count, then the cells: FAC runs alone on
                          // these lists, and what only TIP and SELECT read is ignored; NULL: SELECT makes the lists
    const float * q;      // [n_stream, n_tokens, n_head, n_embd_head_k]
    const float * k;      // [n_stream, n_kv, n_head_kv, n_embd_head_k], converted to type_k
    const float * v;      // [n_stream, n_kv, n_head_kv, n_embd_head_v]
    const float * mask;   // [n_stream, n_tokens, n_kv] 0 or -inf
    const float * sinks;  // [n_head] attention sinks or NULL
    uint64_t beside;      // fasa_op_time: bytes of the weights of a feed-forward that TIP and SELECT also run beside
    float * out_est;      // [n_stream, n_tokens, n_head, n_kv] must be NULL with a given list
    int32_t * out_count;  // [n_stream, n_tokens, n_list]
    int32_t * out_list;   // [n_stream, n_tokens, n_list, length] -1 behind the count; length: as SELECT's, list_length
    float * out;          // [n_stream, n_tokens, n_head, n_embd_head_v]
} fasa_op_case;
FASA_API int fasa_op_run(const fasa_op_case * test);

// The same of sparse prefill, for tests against fasa_gguf/reference_prefill.py. op->forced is [n_tile, n_forced],
// op->out_count [n_tile, n_list], op->out_list [n_tile, n_list, length]; mask, fresh, list, out_est: unused.
typedef struct fasa_tile_case {
    uint64_t size;
    const fasa_op_case * op;
    int32_t n_tile, tile_size;
    const int32_t * tiles;    // [n_tile, 2 + 2*tile_size] as in ops/tile.h, tokens by number in [n_stream, n_tokens]
    const int32_t * cell_pos; // [n_stream, n_kv] the position of every cell, -1: it is empty
    const uint8_t * own;      // [n_tile, n_kv] not 0: the cell is of the tile's sequence
    float * out_score; // [n_tile, n_head, n_kv] softmaxes of its queries, added up, times 2^60; on a device a list's
} fasa_tile_case;
FASA_API int fasa_tile_run(const fasa_tile_case * test);

// Seconds of one layer's attention on the case's backend: dense flash attention (over k and v where they lie), TIP and
// SELECT, and all three ops, each timed as a graph of n_layer layers with caches of their own, n_rep times, the
// fastest. k and v of 16,384 cells are given, [16384, n_head_kv, n_embd_head]; the caches repeat them, each time from
// another row on. With `beside`: a feed-forward alone, and one with TIP and SELECT beside it and FAC behind. dense is
// infinite where the device has no flash attention for the shape.
typedef struct fasa_op_times {
    uint64_t size;
    double dense, select, fasa;
    double beside, ahead; // 0 without `beside`; attention adds ahead - beside to the feed-forward
} fasa_op_times;
FASA_API int fasa_op_time(const fasa_op_case * test, int32_t n_layer, int32_t n_rep, fasa_op_times * times);

// Rank the chunks of one KV head as a set (method `recall`): chunks are added one at a time, each time the one that
// raises most the true attention mass held by the top `budget` tokens under the shared score of the chosen set. Ties:
// lower id. Definition: fasa_gguf/reference.py rank_recall.
typedef struct fasa_rank_case {
    uint64_t size;
    int32_t n_group; // query heads of the KV head
    int32_t n_query;
    int32_t n_kv;
    int32_t n_embd_head;
    int32_t n_chunk;
    int32_t n_rank; // how many chunks to choose greedily, <= n_chunk
    int32_t budget;
    int32_t sink;
    int32_t recent;
    int32_t n_threads;
    float scale;
    float soft_cap;
    const int32_t * chunk_dims; // [n_chunk, 2]
    const float * q;            // [n_group, n_query, n_embd_head]
    const float * q_est;        // as q, the queries that score: foreseen ones; NULL: q
    const float * k;            // [n_kv, n_embd_head]
    const int32_t * q_pos;      // [n_query] position of each query: cells <= it are visible
    const uint8_t * candidate;  // [n_chunk] 1: may be chosen; NULL: all
    int32_t * out_order;        // [n_rank]
    float * out_recall;         // [n_rank] mean attention mass kept after each choice, 0..1
} fasa_rank_case;
FASA_API int fasa_rank_recall(const fasa_rank_case * test);
#include "fasa-limit.h"

#ifdef __cplusplus
}
#endif

#endif // FASA_H
