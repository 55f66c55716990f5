#pragma once

// FASA's part of a llama_kv_cache: the dominant keys of its layers, which of them are stale, and the settings. A cache
// always owns one (llama_kv_cache::fasa); while FASA is off it holds no memory and changes no graph.

#include "core/select.h"
#include "ops/ops.h"

#include "ggml-cpp.h"
#include "llama.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

class llama_kv_cache;
class llama_kv_cache_context;
struct llama_memory_i;
struct llama_ubatch;

// What belongs to a context; shared by its caches (sliding-window models have two).
struct fasa_state {
    fasa_params params = fasa_params_default(); // mean_budget > 0: with the mass that it means

    // the profile; offset[il]: where layer il begins in ranking
    std::vector<uint32_t> n_head_kv, n_chunk, offset;
    std::vector<uint16_t> ranking;
    std::vector<float> weight, layer_budget, layer_miss, mean_budget_mass;
    std::vector<uint32_t> mean_budget;
    uint32_t weight_k = 0;

    fasa_stats stats;
    fasa_observer_slot observer;

    size_t n_row_layers = 0; // layers, of all caches, that share params.row_cache

    uint64_t epoch = 0; // goes up with every change that a built graph depends on

    uint64_t steps_sparse = 0, steps_dense = 0, steps_prefill = 0, cells_refreshed = 0, rebuilds = 0;
    std::string step_reason = "no attention layer has asked FASA yet";

    bool has_profile() const { return !n_chunk.empty(); }

    // the settings of one layer: its own budget and mass, and those that a mean budget means
    fasa_params layer_params(uint32_t il) const {
        fasa_params p = params;
        p.budget      = fasa_layer_budget(params, il < layer_budget.size() ? layer_budget[il] : 1.0f);
        p.mass        = fasa_layer_mass(params.mass, il < layer_miss.size() ? layer_miss[il] : 1.0f);
        if (p.mean_budget > 0) {
            p.floor       = fasa_mean_budget_floor(p.mean_budget);
            p.cap         = fasa_mean_budget_cap(p.mean_budget);
            p.mean_budget = 0;
        }
        return p;
    }
};

// where the cells come from that a layer attends to in a sparse step
enum fasa_layer_source {
    FASA_LAYER_DENSE,   // from nowhere: it attends to all
    FASA_LAYER_SELECTS, // from its own TIP and SELECT
    FASA_LAYER_BORROWS, // from the list of a layer before it
};

struct fasa_layer {
    fasa_layer_source source = FASA_LAYER_DENSE;
    int32_t lender           = -1;      // FASA_LAYER_BORROWS: the layer whose list it takes
    ggml_tensor * k_dom      = nullptr; // i8  [block, n_tile, n_head_kv, n_stream]; nullptr: it does not select
    ggml_tensor * dims       = nullptr; // i32 [n_dom, n_head_kv]
    ggml_tensor * weight     = nullptr; // f32 [n_dom, n_head_kv]
    fasa_layer_const fixed;             // what its nodes have beside their sources
    std::string reason;                 // why it is dense, "" when it is not
    bool asked = false; // fasa_build_attn was called for it: a graph builds this attention where the hook is
    bool waits = false; // dense in the last graph, because it is on a GPU and the context is short
};

struct fasa_cache {
    fasa_cache(llama_kv_cache & kv);

    std::shared_ptr<fasa_state> state;
    bool counts_steps = true; // the first cache of a context counts for all

    size_t n_row_layers() const; // layers that keep attended rows with the settings in `state`

    // build the dominant keys for the settings in `state`, or free them; -1: fasa_error() says why
    int configure();

    // ---- what the cache tells us ----

    bool on_apply(const llama_kv_cache_context &
            mctx);     // a ubatch is about to be computed: its cells are placed; false: it must not be
    void on_changed(); // stored K changed behind our back: everything is stale
    void memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const;

    // add what the devices have counted to state->stats; the context must be idle
    void collect_counters();

    // ---- what a graph asks ----

    static fasa_cache * of(const llama_kv_cache_context * mctx);

    fasa_layer & layer(int32_t il);
    bool has_layer(int32_t il) const;
    ggml_backend_dev_t device_of(int32_t il) const; // where its kernels run; nullptr: the CPU
    bool is_pinned(int32_t il) const;               // FASA-M: its K and V lie in pinned host memory
    ggml_tensor * stage(
        int32_t il) const; // then: i8, room on its device for its K and V, for dense attention; nullptr: in a dry run
    ggml_tensor * work(
        int32_t il) const; // what counts on its device; nullptr: FASA is off, or nothing runs sparse there
    size_t stage_v_at(int32_t il) const;   // where V begins there
    int32_t next_pinned(int32_t il) const; // the next layer that uses the same room; -1: none
    bool gpu_waits(uint32_t n_kv) const;   // whether its layers on GPUs stay dense in a step that sees n_kv cells
    int32_t n_hadamard() const;            // block of the rotation of the stored K, 0: none

    // fill the inputs of a sparse step; ranges [n_stream][2*FASA_MAX_RANGES], forced [n_tokens][n_forced]; gpu_waits:
    // some layers on GPUs are dense in it, and get what the others are to refresh now in the first step in which they
    // are not
    void set_ranges(int32_t * ranges, uint32_t n_stream, bool gpu_waits);
    void set_forced(int32_t * forced, uint32_t n_forced, const llama_ubatch & ubatch) const;

    void set_fresh(
        int32_t * ranges, uint32_t n_stream) const; // the cells that the ubatch writes; [n_stream][2*FASA_MAX_RANGES]

    // The mask of a decode step in which every stream holds one sequence without holes, by its length. false: some
    // other step, for which llama.cpp looks at every cell (0.1 ms and more of a step at 131,072)
    bool set_mask(ggml_tensor * mask, const llama_ubatch & ubatch, bool causal) const;

    // what `fasa-gguf bench` does with the cells of a cache: measure/fill.cpp and measure/rates.cpp
    struct random_fill;
    struct pinned_rows;

    uint32_t n_kv   = 0; // of the ubatch being computed
    uint64_t ubatch = 0; // its number
    size_t size_kv() const;
    size_t size_kv_pinned() const;
    size_t size_k_dom() const;
    size_t size_row_cache() const;

private:
    llama_kv_cache & kv;

    std::vector<fasa_layer> layers; // by index in the KV cache
    std::vector<fasa_ranges> stale; // [n_stream]
    std::vector<fasa_ranges> owed;  // [n_stream] no longer stale, but for the layers on GPUs that waited

    std::vector<llama_seq_id> strm; // streams of the ubatch being computed
    std::vector<int64_t> new_cells; // [n_tokens] the cells that it writes
    std::vector<fasa_ranges> fresh; // [n_stream of the ubatch] the same

    mutable std::map<llama_seq_id, int64_t> first_cell; // where each sequence began when last looked

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
    std::map<ggml_backend_buffer_type_t, ggml_tensor *> works; // of the devices
    bool any_pinned = false;
    std::map<ggml_backend_dev_t, ggml_tensor *> stages; // of FASA-M, as long as the cache
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> stage_bufs;
    std::map<ggml_backend_dev_t, size_t> room; // of FASA-M: bytes for computing that were found free

    ggml_backend_buffer_type_t buft_of(size_t ikv) const; // of what FASA keeps for a layer: its device's memory
    const char * layer_dense_reason(size_t ikv) const;
    void make_stages();
    bool has_room(uint32_t n_tokens);
    void add_rows(std::map<ggml_backend_buffer_type_t, ggml_context_ptr> & ctxs);
    void upload_tables(size_t ikv);
    void clear();
};

// Where a layer's K and V are to lie, asked by the cache when it is made: `buft`, or the pinned memory of
// fasa_set_kv_place
ggml_backend_buffer_type_t fasa_kv_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft);

// all caches of a memory module that FASA knows, the one that counts steps first
std::vector<fasa_cache *> fasa_caches(llama_memory_i * memory);

// a ubatch failed, so what it was to refresh is stale
void fasa_on_failed(llama_memory_i * memory);
