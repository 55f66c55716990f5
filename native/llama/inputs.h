#pragma once

// Which cells a step needs, from the state of a llama_kv_cache: those whose dominant keys are stale, those that the
// ubatch writes, those that are always attended, and the mask.

#include "core/counters.h"
#include "core/select.h"
#include "core/tiles.h"

#include "ggml.h"
#include "llama.h"

#include <map>
#include <vector>

class llama_kv_cache;
struct llama_ubatch;

// ranges of cells, of every stream of a ubatch
struct fasa_stream_ranges {
    std::vector<fasa_ranges> of; // [n_stream]

    void write(int32_t * to) const; // i32 [n_stream][2*FASA_MAX_RANGES]
};

// the cells whose dominant keys a sparse step derives
struct fasa_stale {
    fasa_stream_ranges own;   // in layers that select with their own queries, and so behind the cache write
    fasa_stream_ranges ahead; // in layers that select ahead: without what the ubatch writes
};

struct fasa_inputs {
    explicit fasa_inputs(llama_kv_cache & kv);

    void all_stale(); // stored K changed behind our back
    // A ubatch is placed: its streams, the cells of each [n_stream][n_tokens of it], and the cells that it sees. What
    // it writes is stale.
    void begin(const std::vector<llama_seq_id> & strm, const std::vector<std::vector<uint32_t>> & idxs, uint32_t n_kv);

    uint32_t n_kv() const { return n_visible; } // of the ubatch being computed
    uint64_t ubatch() const { return number; }  // its number
    const uint64_t * ubatch_at() const { return &number; }

    // The cells that a sparse step refreshes, which are not stale from then on. some_wait: some layers are dense in it
    // (on GPUs, or in a prompt); they get what the others refresh now in the first step in which none are. ahead: the
    // layers that select ahead; they get what the ubatch writes in the next step.
    fasa_stale take_stale(
        uint32_t n_stream, bool some_wait, const std::vector<int32_t> & ahead, fasa_step_counts & counts);
    fasa_stream_ranges written() const;    // the cells that the ubatch writes
    void set_fresh(int32_t * cells) const; // the same, [n_stream][n_tps]
    // the cells that each token always attends, [n_tokens][n_forced], -1: none
    void set_forced(int32_t * forced, uint32_t n_forced, const llama_ubatch & ubatch, const fasa_params & params) const;
    // The same of a layer that selects ahead: all that the ubatch writes as well. A token that does not see a cell does
    // not attend it.
    void set_forced_ahead(
        int32_t * forced, uint32_t n_forced, const llama_ubatch & ubatch, const fasa_params & params) const;
    // the cells that each tile of a prompt always attends, [n_tile][n_forced], -1: none
    void set_tile_forced(int32_t * forced, uint32_t n_forced, const std::vector<fasa_tile> & tiles, uint32_t n_sink,
        uint32_t n_band) const;
    // what each tile of a prompt sees of every cell, [n_tile][n_row], enum fasa_seen
    void set_tile_view(int8_t * view, int64_t n_row, const std::vector<fasa_tile> & tiles) const;
    void set_cell_pos(int32_t * pos, int64_t n_row, uint32_t n_stream) const; // of every cell, [n_stream][n_row]
    // With positions in 2D (M-RoPE) llama.cpp orders tokens that share one, as those of an image do, by where they lie
    // in it. Whether the ubatch has such tokens, or a token of its shares one with a cell.
    bool repeats_positions(const llama_ubatch & ubatch) const;
    // Whether the mask needs no more from llama.cpp. The mask of a decode step, with FASA enabled, in which every
    // stream holds one sequence without holes, is filled by its length, and that of a graph without dense layers is not
    // needed. false: some other step, for which llama.cpp looks at every cell (0.1 ms and more of a step at 131,072).
    bool set_mask(ggml_tensor * mask, const llama_ubatch & ubatch, bool causal, bool enabled) const;
    // Under a sliding window: the ubatch sees no cell below. A multiple of 256, so that it seldom changes; 0: no
    // window.
    uint32_t first_seen(const llama_ubatch & ubatch) const;

private:
    llama_kv_cache & kv;

    std::vector<fasa_ranges> stale;            // [n_stream]
    std::vector<fasa_ranges> owed;             // [n_stream] no longer stale, but for the layers that waited
    std::vector<fasa_ranges> left;             // [n_stream] no longer stale, but for the layers that selected ahead
    std::vector<std::vector<int32_t>> left_in; // [n_stream] these layers

    uint32_t n_visible = 0;
    uint64_t number    = 0;
    std::vector<llama_seq_id> strm; // streams of the ubatch being computed
    std::vector<int64_t> new_cells; // [n_tokens] the cells that it writes
    std::vector<fasa_ranges> fresh; // [n_stream of the ubatch] the same

    mutable std::map<llama_seq_id, int64_t> first_cell; // where each sequence began when last looked

    bool has_no_holes(llama_seq_id seq, uint32_t n_kv) const;
    std::vector<int8_t> cells_of(llama_seq_id seq) const; // [n_visible] FASA_SEEN_BY_ALL where a cell is of it

    bool holds(llama_seq_id seq, int64_t cell, llama_pos pos) const;
    bool find_forced(
        int32_t * forced, llama_seq_id seq, llama_pos pos, int64_t new_cell, uint32_t n_sink, uint32_t n_recent) const;
    void scan_forced(int32_t * forced, llama_seq_id seq, llama_pos pos, uint32_t n_sink, uint32_t n_recent) const;
};
