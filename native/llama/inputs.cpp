#include "llama/inputs.h"

#include "llama-hparams.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>

fasa_inputs::fasa_inputs(llama_kv_cache & kv)
    : kv(kv), stale(kv.n_stream), owed(kv.n_stream), left(kv.n_stream), left_in(kv.n_stream) {
    all_stale();
}

void fasa_inputs::all_stale() {
    for (auto & s : stale) {
        s.add(0, kv.get_size());
    }
}

void fasa_inputs::begin(
    const std::vector<llama_seq_id> & strm, const std::vector<std::vector<uint32_t>> & idxs, uint32_t n_kv) {
    number++;
    n_visible  = n_kv;
    this->strm = strm;
    new_cells.clear();
    fresh.assign(strm.size(), {});
    for (size_t s = 0; s < strm.size(); ++s) {
        const auto & cells = idxs[s];
        new_cells.insert(new_cells.end(), cells.begin(), cells.end());
        for (size_t i = 0; i < cells.size();) {
            size_t j = i + 1;
            while (j < cells.size() && cells[j] == cells[j - 1] + 1) {
                j++;
            }
            stale[strm[s]].add(cells[i], cells[j - 1] + 1);
            fresh[s].add(cells[i], cells[j - 1] + 1);
            i = j;
        }
    }
}

// ---- cells to refresh ----

void fasa_stream_ranges::write(int32_t * to) const {
    std::fill(to, to + of.size() * 2 * FASA_MAX_RANGES, 0);
    for (size_t s = 0; s < of.size(); ++s) {
        int32_t * at = to + s * 2 * FASA_MAX_RANGES;
        for (const auto & r : of[s].data) {
            *at++ = (int32_t) r.first;
            *at++ = (int32_t) r.second;
        }
    }
}

fasa_stream_ranges fasa_inputs::written() const {
    const llama_seq_id s0 = *std::min_element(strm.begin(), strm.end());
    fasa_stream_ranges out;
    out.of.resize(fresh.size());
    for (size_t s = 0; s < fresh.size(); ++s) {
        out.of[strm[s] - s0] = fresh[s];
    }
    return out;
}

fasa_stale fasa_inputs::take_stale(
    uint32_t n_stream, bool some_wait, const std::vector<int32_t> & ahead, fasa_step_counts & counts) {
    const llama_seq_id s0 = *std::min_element(strm.begin(), strm.end());
    const auto now        = written();
    fasa_stale out;
    out.own.of.resize(n_stream);
    out.ahead.of.resize(n_stream);
    uint64_t cells = 0;
    for (uint32_t s = 0; s < n_stream; ++s) {
        auto &own = out.own.of[s], &later = owed[s0 + s], &behind = left[s0 + s];
        if (!some_wait) {
            stale[s0 + s].add(later);
            later = {};
        }
        // cells behind the last used one are empty, and are marked again when they are written
        own           = stale[s0 + s].take(kv.v_cells[s0 + s].used_max_p1());
        stale[s0 + s] = {};
        cells += own.cells();
        const bool moved = ahead != left_in[s0 + s]; // a layer that selected ahead may not do so any more
        auto all         = own;
        all.add(behind);
        out.ahead.of[s] = all.without(now.of[s]);
        own             = moved ? all : own;
        if (some_wait) {
            later.add(all);
        }
        behind          = ahead.empty() ? fasa_ranges{} : now.of[s];
        left_in[s0 + s] = ahead;
    }
    counts.cells_refreshed += cells;
    counts.rebuilds += cells > new_cells.size();
    return out;
}

void fasa_inputs::set_fresh(int32_t * cells) const {
    std::copy(new_cells.begin(), new_cells.end(), cells);
}

// ---- who sees which cell ----

// the cells of its stream that are in use are [0, n), all of them its own
bool fasa_inputs::has_no_holes(llama_seq_id seq, uint32_t n_kv) const {
    const auto & cells = kv.v_cells[kv.seq_to_stream[seq]];
    const auto n       = cells.get_used();
    return n == cells.used_max_p1() && n == cells.seq_pos_get(seq).size() && n <= n_kv;
}

bool fasa_inputs::set_mask(ggml_tensor * mask, const llama_ubatch & ubatch, bool causal, bool enabled) const {
    if (mask->buffer == nullptr) {
        return true;
    }
    const int64_t n_kv = mask->ne[0];
    if (!ggml_backend_buffer_is_host(mask->buffer) || !enabled || !causal || mask->type != GGML_TYPE_F16 ||
        kv.swa_type != LLAMA_SWA_TYPE_NONE || kv.hparams.use_alibi || ubatch.is_pos_2d()) {
        return false;
    }
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (!has_no_holes(ubatch.seq_id[i][0], n_kv)) {
            return false;
        }
    }
    const ggml_fp16_t seen = ggml_fp32_to_fp16(0.0f), hidden = ggml_fp32_to_fp16(-INFINITY);
    auto * row = (ggml_fp16_t *) mask->data;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i, row += n_kv) {
        const auto seq   = ubatch.seq_id[i][0];
        const auto & all = kv.v_cells[kv.seq_to_stream[seq]].seq_pos_get(seq);
        std::fill(row, row + all.size(), seen);
        std::fill(row + all.size(), row + n_kv, hidden);
        for (auto last = all.rbegin(); last != all.rend() && last->first > ubatch.pos[i]; ++last) {
            row[last->second] = hidden;
        }
    }
    return true;
}

std::vector<int8_t> fasa_inputs::cells_of(llama_seq_id seq) const {
    const auto & cells = kv.v_cells[kv.seq_to_stream[seq]];
    std::vector<int8_t> out(n_visible, FASA_SEEN_BY_NONE);
    if (has_no_holes(seq, n_visible)) {
        std::fill_n(out.begin(), cells.get_used(), FASA_SEEN_BY_ALL);
        return out;
    }
    for (uint32_t c = 0; c < n_visible; ++c) {
        out[c] = !cells.is_empty(c) && cells.seq_has(c, seq) ? FASA_SEEN_BY_ALL : FASA_SEEN_BY_NONE;
    }
    return out;
}

// A sequence is looked at once: its tiles differ in the cells behind the first tile's beginning alone.
void fasa_inputs::set_tile_view(int8_t * view, int64_t n_row, const std::vector<fasa_tile> & tiles) const {
    struct of_seq {
        std::vector<int8_t> cells;
        std::vector<std::pair<llama_pos, uint32_t>> late;
    };
    std::map<llama_seq_id, llama_pos> first;
    for (const auto & tile : tiles) {
        auto & pos = first.try_emplace(tile.seq, tile.first).first->second;
        pos        = std::min(pos, tile.first);
    }
    std::map<llama_seq_id, of_seq> seen;
    for (const auto & [seq, pos] : first) {
        auto & of        = seen[seq];
        of.cells         = cells_of(seq);
        const auto & all = kv.v_cells[kv.seq_to_stream[seq]].seq_pos_get(seq); // (position, cell), ascending
        for (auto c = all.rbegin(); c != all.rend() && c->first > pos; ++c) {
            if (c->second < n_visible) {
                of.late.push_back(*c);
            }
        }
    }
    for (const auto & tile : tiles) {
        const auto & of = seen.at(tile.seq);
        std::copy(of.cells.begin(), of.cells.end(), view);
        std::fill(view + n_visible, view + n_row, FASA_SEEN_BY_NONE);
        for (const auto & [pos, cell] : of.late) {
            view[cell] = fasa_seen_at(pos, tile.first, tile.last);
        }
        view += n_row;
    }
}

void fasa_inputs::set_cell_pos(int32_t * pos, int64_t n_row, uint32_t n_stream) const {
    const llama_seq_id s0 = *std::min_element(strm.begin(), strm.end());
    for (uint32_t s = 0; s < n_stream; ++s, pos += n_row) {
        const auto & cells = kv.v_cells[s0 + s];
        for (uint32_t c = 0; c < n_visible; ++c) {
            pos[c] = cells.is_empty(c) ? -1 : cells.pos_get(c);
        }
        std::fill(pos + n_visible, pos + n_row, -1);
    }
}

// first and last position of each sequence
static std::map<llama_seq_id, std::pair<llama_pos, llama_pos>> fasa_ends(const llama_ubatch & ubatch) {
    std::map<llama_seq_id, std::pair<llama_pos, llama_pos>> ends;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const auto pos = ubatch.pos[i];
        auto & end     = ends.try_emplace(ubatch.seq_id[i][0], pos, pos).first->second;
        end            = { std::min(end.first, pos), std::max(end.second, pos) };
    }
    return ends;
}

bool fasa_inputs::repeats_positions(const llama_ubatch & ubatch) const {
    if (!ubatch.is_pos_2d()) {
        return false;
    }
    for (const auto & [seq, end] : fasa_ends(ubatch)) {
        const auto & all = kv.v_cells[kv.seq_to_stream[seq]].seq_pos_get(seq);
        llama_pos before = -1;
        for (auto c = all.lower_bound({ end.first, 0 }); c != all.end() && c->first <= end.second; ++c) {
            if (c->first == before) {
                return true;
            }
            before = c->first;
        }
    }
    return false;
}

uint32_t fasa_inputs::first_seen(const llama_ubatch & ubatch) const {
    if (kv.swa_type != LLAMA_SWA_TYPE_STANDARD && kv.swa_type != LLAMA_SWA_TYPE_CHUNKED) {
        return 0;
    }
    uint32_t first = n_visible;
    for (const auto & [seq, end] : fasa_ends(ubatch)) {
        const auto & all = kv.v_cells[kv.seq_to_stream[seq]].seq_pos_get(seq); // (position, cell), ascending
        for (auto c = all.rbegin(); c != all.rend(); ++c) {
            if (c->first <= end.first && llama_hparams::is_masked_swa(kv.n_swa, kv.swa_type, c->first, end.first)) {
                break; // and so are those before
            }
            first = c->first <= end.second ? std::min(first, c->second) : first;
        }
    }
    return first / 256 * 256;
}

// ---- forced cells ----

// The `sink` lowest positions of a token's sequence and the `recent` highest up to its own, ties to the lower cell.
// Usually position p + 1 lies in the cell behind p; where it does not, one scan over the cells finds them.
void fasa_inputs::set_forced(
    int32_t * forced, uint32_t n_forced, const llama_ubatch & ubatch, const fasa_params & params) const {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i, forced += n_forced) {
        const auto seq = ubatch.seq_id[i][0];
        const auto pos = ubatch.pos[i];
        std::fill(forced, forced + n_forced, -1);
        if (!find_forced(forced, seq, pos, new_cells[i], params.sink, params.recent)) {
            std::fill(forced, forced + n_forced, -1);
            scan_forced(forced, seq, pos, params.sink, params.recent);
        }
    }
}

void fasa_inputs::set_forced_ahead(
    int32_t * forced, uint32_t n_forced, const llama_ubatch & ubatch, const fasa_params & params) const {
    const uint32_t n_own = std::max(1u, params.sink + params.recent), n_tps = n_forced - n_own;
    std::vector<int32_t> own((size_t) ubatch.n_tokens * n_own);
    set_forced(own.data(), n_own, ubatch, params);
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i, forced += n_forced) {
        std::copy_n(own.begin() + i * n_own, n_own, forced);
        std::copy_n(new_cells.begin() + i / n_tps * n_tps, n_tps, forced + n_own); // of its stream
    }
}

// as set_forced of the token before the tile, and the tile's own cells
void fasa_inputs::set_tile_forced(
    int32_t * forced, uint32_t n_forced, const std::vector<fasa_tile> & tiles, uint32_t n_sink, uint32_t n_band) const {
    for (const auto & tile : tiles) {
        const auto before = new_cells[tile.tokens[0]] - 1;
        std::fill(forced, forced + n_forced, -1);
        if (!find_forced(forced, tile.seq, tile.first - 1, before, n_sink, n_band)) {
            std::fill(forced, forced + n_forced, -1);
            scan_forced(forced, tile.seq, tile.first - 1, n_sink, n_band);
        }
        for (size_t i = 0; i < tile.tokens.size(); ++i) {
            forced[n_sink + n_band + i] = (int32_t) new_cells[tile.tokens[i]];
        }
        forced += n_forced;
    }
}

bool fasa_inputs::holds(llama_seq_id seq, int64_t cell, llama_pos pos) const {
    const auto & cells = kv.v_cells[kv.seq_to_stream[seq]];
    return cell >= 0 && cell < (int64_t) n_visible && !cells.is_empty(cell) && cells.pos_get(cell) == pos &&
        cells.seq_has(cell, seq);
}

// false: the positions do not lie in successive cells, and `forced` may hold anything
bool fasa_inputs::find_forced(
    int32_t * forced, llama_seq_id seq, llama_pos pos, int64_t new_cell, uint32_t n_sink, uint32_t n_recent) const {
    const auto first = kv.v_cells[kv.seq_to_stream[seq]].seq_pos_min(seq);
    if (kv.hparams.n_pos_per_embd() != 1 || // several cells can share a position
        pos - first + 1 < (llama_pos) (n_sink + n_recent)) {
        return false;
    }
    auto & hint = first_cell[seq];
    if (!holds(seq, hint, first)) {
        hint = 0;
        while (hint < n_visible && !holds(seq, hint, first)) {
            hint++;
        }
    }
    for (int64_t j = 0; j < (int64_t) n_sink; ++j) {
        if (!holds(seq, hint + j, first + j)) {
            return false;
        }
        *forced++ = (int32_t) (hint + j);
    }
    for (int64_t j = 0; j < (int64_t) n_recent; ++j) {
        if (!holds(seq, new_cell - j, pos - j)) {
            return false;
        }
        *forced++ = (int32_t) (new_cell - j);
    }
    return true;
}

void fasa_inputs::scan_forced(
    int32_t * forced, llama_seq_id seq, llama_pos pos, uint32_t n_sink, uint32_t n_recent) const {
    const auto & cells = kv.v_cells[kv.seq_to_stream[seq]];
    std::vector<std::pair<llama_pos, int32_t>> all; // (position, cell)
    for (uint32_t c = 0; c < n_visible; ++c) {
        if (!cells.is_empty(c) && cells.seq_has(c, seq) && cells.pos_get(c) <= pos) {
            all.emplace_back(cells.pos_get(c), c);
        }
    }
    const auto n_low  = std::min<size_t>(n_sink, all.size());
    const auto n_high = std::min<size_t>(n_recent, all.size());
    std::partial_sort(all.begin(), all.begin() + n_low, all.end());
    for (size_t j = 0; j < n_low; ++j) {
        *forced++ = all[j].second;
    }
    std::partial_sort(all.begin(), all.begin() + n_high, all.end(),
        [](const auto & a, const auto & b) { return a.first != b.first ? a.first > b.first : a.second < b.second; });
    for (size_t j = 0; j < n_high; ++j) {
        *forced++ = all[j].second;
    }
}
