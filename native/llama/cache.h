#pragma once

// FASA's part of a llama_kv_cache: the dominant keys of its layers and what each layer does with the settings. A cache
// always owns one (llama_kv_cache::fasa); while FASA is off it holds no memory of its own and changes no graph.

#include "core/reasons.h"
#include "llama/ahead.h"
#include "llama/inputs.h"
#include "llama/residence.h"
#include "llama/state.h"

#include "ggml-cpp.h"
#include "llama.h"

#include <map>
#include <memory>
#include <vector>

class llama_kv_cache;
class llama_kv_cache_context;
struct llama_memory_i;
struct llama_model;
struct llama_ubatch;

// where the cells come from that a layer attends to in a sparse step
enum fasa_layer_source {
    FASA_LAYER_DENSE,   // from nowhere: it attends to all
    FASA_LAYER_SELECTS, // from its own TIP and SELECT
    FASA_LAYER_BORROWS, // from the list of a layer before it
};

struct fasa_layer {
    fasa_layer_source source = FASA_LAYER_DENSE;
    int32_t lender           = -1;         // FASA_LAYER_BORROWS: the layer whose list it takes
    ggml_tensor * k_dom      = nullptr;    // i8  [block, n_tile, n_head_kv, n_stream]; nullptr: it cannot run sparse
    ggml_tensor * dims       = nullptr;    // i32 [n_dom, n_head_kv]
    ggml_tensor * weight     = nullptr;    // f32 [n_dom, n_head_kv]
    fasa_dominant_rows dominant;           // of W_q, where it selects ahead
    bool for_foreseen = false;             // dims and weight, and so k_dom, are those for foreseen queries
    fasa_layer_const fixed;                // what its nodes need beside their src tensors
    fasa_reason reason = FASA_REASON_NONE; // why it is dense in every step
    fasa_reason now    = FASA_REASON_NOT_BUILT; // why it was dense in the last graph, had that been a sparse step
    fasa_reason ahead  = FASA_REASON_NOT_BUILT; // why it selected with its own queries in the last sparse graph
    fasa_foreseen foreseen;                     // of the graph being built, for an observer
};

// bytes of the weights that a feed-forward of one token reads
uint64_t fasa_feed_forward_bytes(const llama_model & model, uint32_t il);

struct fasa_cache {
    fasa_cache(llama_kv_cache & kv);

    std::shared_ptr<fasa_state> state;
    bool is_first = true; // of the caches of its context: it begins every ubatch
    fasa_residence residence;
    fasa_inputs inputs;

    size_t n_row_layers() const; // layers that keep attended rows with the settings in `state`

    // what min_context_gpu is found by: gpu-limit.cpp
    std::map<ggml_backend_dev_t, int32_t> gpu_layers() const;
    fasa_gpu_case gpu_case(ggml_backend_dev_t dev, int32_t il, const llama_model & model) const;
    uint32_t n_cells() const; // of a stream

    // build the dominant keys for the settings in `state`, or free them; -1: fasa_error() says why
    int configure();

    // ---- what the cache tells us ----

    // a ubatch is about to be computed: its cells are placed; false: it must not be
    bool on_apply(const llama_kv_cache_context & mctx);
    void on_changed(); // stored K changed behind our back: everything is stale
    bool set_mask(ggml_tensor * mask, const llama_ubatch & ubatch, bool causal) const; // as fasa_inputs
    void memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const;

    // ---- what a graph asks ----

    static fasa_cache * of(const llama_kv_cache_context * mctx);

    fasa_layer & layer(int32_t il);
    bool has_layer(int32_t il) const;
    size_t n_layers() const;              // that attend to it
    bool is_shared(int32_t il) const;     // another layer attends to the same K and V
    ggml_tensor * work(int32_t il) const; // what counts on its device; nullptr: nothing runs sparse there
    bool gpu_waits(uint32_t n_kv) const;  // whether its layers on GPUs stay dense in a step that sees n_kv cells
    // Cells from which on prompts of layers on GPUs are sparse. In mode host a tile's rows come over PCIe, and it pays
    // from twice as many on.
    uint32_t prefill_min_context_gpu() const;
    // by settings and profile: why it does not select ahead in a ubatch of n_tokens that sees n_kv cells
    fasa_reason ahead_reason(int32_t il, uint32_t n_tokens, uint32_t n_kv);
    // A layer has one ranking, by which k_dom is derived: the one for foreseen queries where it is to select ahead,
    // until a graph shows that its queries cannot be foreseen. A change makes all cells stale; the devices must be
    // idle.
    bool has_ranking(int32_t il, bool for_foreseen); // or both are the same
    void set_ranking(int32_t il, bool for_foreseen);
    // The dominant rows of W_q, made when they are asked for first. nullptr: they cannot be had, and the whole W_q
    // serves.
    const fasa_dominant_rows * dominant_rows(int32_t il, const fasa_query_rows & rows);
    size_t cell_bytes(int32_t il) const; // K and V of one cell of one stream
    int32_t n_hadamard() const;          // block of the rotation of the stored K, 0: none

    // what `fasa-gguf bench` does with the cells of a cache: measure/fill.cpp and measure/rates.cpp
    struct random_fill;
    struct pinned_rows;
    struct all_rows;

    // ---- reasons, as of the last ubatch that was computed: of state->reading ----

    void publish_reasons();
    fasa_reason reason(int32_t il) const;
    fasa_reason published_ahead(int32_t il) const; // why it selects with its own queries

    // ---- counters: bytes by the names of the table ----

    void collect_counters(); // add what the devices have counted to state->stats; the context must be idle
    size_t bytes_kv() const;
    size_t bytes_kv_host() const;
    size_t bytes_k_dom() const;
    size_t bytes_row_cache() const;

private:
    using contexts = std::map<ggml_backend_buffer_type_t, ggml_context_ptr>;

    llama_kv_cache & kv;
    std::vector<fasa_layer> layers;           // by index in the KV cache
    std::vector<fasa_reason> reasons, aheads; // [layers] published

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
    std::map<ggml_backend_buffer_type_t, ggml_tensor *> works;  // of the devices
    std::map<ggml_backend_buffer_type_t, ggml_tensor *> counts; // of devices of other machines

    fasa_reason cache_reason(size_t ikv) const;
    bool is_short(uint32_t il) const;
    fasa_reason layer_reason(size_t ikv) const;
    void add_layer(size_t ikv, contexts & ctxs);
    fasa_row_layout row_of(size_t ikv) const;
    uint32_t list_length(size_t ikv) const;
    void add_rows(contexts & ctxs);
    int allocate(contexts & ctxs);
    void upload_tables(size_t ikv);
    void clear();
    // what tiles of this ubatch take beside the compute buffer, in FASA-M, the most of a layer; 0: there are none
    size_t tile_pool_bytes(const llama_ubatch & ubatch) const;
};

// Where a layer's K and V are to lie, asked by the cache when it is made: `buft`, or the pinned memory of fasa_set_mode
ggml_backend_buffer_type_t fasa_kv_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft);

// all caches of a memory module that FASA knows; they have one state from then on
std::vector<fasa_cache *> fasa_caches(llama_memory_i * memory);
// the same of a context; none: fasa_error() says so
std::vector<fasa_cache *> fasa_caches_of(const llama_context * ctx);
// configure all of them, in a turn; -1: FASA is off, and fasa_error() says why
int fasa_configure(llama_context * ctx, const std::vector<fasa_cache *> & caches);
// find state->gpu_limit for the settings in `state`
void fasa_find_gpu_limit(const llama_context * ctx, const std::vector<fasa_cache *> & caches);
// Wait until the devices have done what was computed. It writes nothing, unlike llama_context::synchronize, so that it
// may run while another thread reads logits.
void fasa_wait(const llama_context * ctx);

// Held while what a decode uses is changed. False: a decode is running, or there is no cache; fasa_error() says which.
struct fasa_change {
    fasa_change(const std::vector<fasa_cache *> & caches);
    ~fasa_change();
    fasa_change(const fasa_change &)             = delete;
    fasa_change & operator=(const fasa_change &) = delete;

    explicit operator bool() const { return state != nullptr; }

    std::shared_ptr<fasa_state> state;
};

// held while llama_decode runs: settings do not change, and the caches have one state
struct fasa_decoding {
    fasa_decoding(llama_memory_i * memory);
    ~fasa_decoding();
    fasa_decoding(const fasa_decoding &)             = delete;
    fasa_decoding & operator=(const fasa_decoding &) = delete;

private:
    std::shared_ptr<fasa_state> state; // nullptr: nothing that FASA knows
};

// a ubatch was computed, so it counts
void fasa_on_computed(llama_memory_i * memory);
// a ubatch failed, so what it was to refresh is stale
void fasa_on_failed(llama_memory_i * memory);
