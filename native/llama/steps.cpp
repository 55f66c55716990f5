#include "llama/state.h"

#include "llama-batch.h"
#include "llama-kv-cache.h"

#include <algorithm>

// the tokens that a ubatch has of one sequence
struct fasa_part {
    uint32_t n_tokens  = 0;
    uint32_t n_outputs = 0;
    llama_pos first    = 0;
    llama_pos last     = 0;
};

static std::map<llama_seq_id, fasa_part> fasa_parts(const llama_ubatch & ubatch) {
    std::map<llama_seq_id, fasa_part> parts;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        for (int32_t s = 0; s < ubatch.n_seq_id[i]; ++s) {
            auto & part = parts[ubatch.seq_id[i][s]];
            part.first  = part.n_tokens == 0 ? ubatch.pos[i] : std::min(part.first, ubatch.pos[i]);
            part.last   = part.n_tokens == 0 ? ubatch.pos[i] : std::max(part.last, ubatch.pos[i]);
            part.n_tokens++;
            part.n_outputs += ubatch.output[i] != 0;
        }
    }
    return parts;
}

bool fasa_steps::decodes(const llama_ubatch & ubatch, const llama_kv_cache & kv, uint32_t max_tokens) {
    const int32_t told = said;
    bool all           = true;
    for (const auto & [seq, part] : fasa_parts(ubatch)) {
        const auto seen      = drafts.find(seq);
        const bool expected  = seen != drafts.end() && part.first <= seen->second;
        const bool outputs   = part.n_outputs == part.n_tokens;
        const bool has_cells = kv.seq_pos_min(seq) < part.first;
        const bool continues = told == FASA_STEP_AUTO ?
            outputs && has_cells && part.n_tokens <= max_tokens && (part.n_tokens == 1 || expected) :
            told == FASA_STEP_DECODE;
        if (continues || !outputs) {
            drafts[seq] = part.last + 1;
        } else {
            drafts.erase(seq);
        }
        all = all && continues;
    }
    return all;
}

static std::vector<fasa_tile> fasa_tiles_of(const llama_ubatch & ubatch, uint32_t size) {
    std::vector<int32_t> seq(ubatch.n_tokens);
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        seq[i] = ubatch.seq_id[i][0];
    }
    return fasa_make_tiles(ubatch.pos, seq.data(), ubatch.n_tokens, size);
}

void fasa_begin_ubatch(fasa_state & state, const llama_ubatch & ubatch, const llama_kv_cache & kv) {
    auto & now  = state.now;
    now         = {};
    now.active  = true;
    now.decodes = state.kinds.decodes(ubatch, kv, state.params.max_tokens);
    if (state.params.enabled && !now.decodes) {
        now.tiles = fasa_tiles_of(ubatch, state.params.prefill_tile);
    }
}
