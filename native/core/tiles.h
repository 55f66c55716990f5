#pragma once

// Which tokens of a prompt's ubatch are a tile: pure functions, no ggml. Definition: tile_numbers of
// fasa_gguf/reference_prefill.py.

#include <algorithm>
#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

// fewer tokens of a sequence than this are processed densely: reading the list would not pay, and the last token of a
// prompt, which callers may evaluate alone, stays dense
static constexpr uint32_t FASA_TILE_LEAST = 32;

// of a cell, in the eyes of a tile
enum fasa_seen : int8_t {
    FASA_SEEN_BY_NONE = 0,
    FASA_SEEN_BY_ALL  = 1,
    FASA_SEEN_BY_SOME = 2, // the queries whose position is not below the cell's
};

struct fasa_tile {
    int32_t seq;                 // sequence
    int32_t first, last;         // lowest and highest position
    std::vector<int32_t> tokens; // numbers in the ubatch
};

// pos, seq [n]: position and sequence of every token. Tokens of one sequence whose positions have the same quotient by
// `size` are a tile, or several of `size` tokens where they share positions.
inline std::vector<fasa_tile> fasa_make_tiles(const int32_t * pos, const int32_t * seq, uint32_t n, uint32_t size) {
    std::map<std::pair<int32_t, int32_t>, uint32_t> count;
    std::map<std::tuple<int32_t, int32_t, uint32_t>, size_t> found;
    std::vector<fasa_tile> tiles;
    for (uint32_t i = 0; i < n; ++i) {
        const int32_t quotient = pos[i] / (int32_t) size;
        const uint32_t part    = count[{ seq[i], quotient }]++ / size;
        const auto at          = found.try_emplace({ seq[i], quotient, part }, tiles.size());
        if (at.second) {
            tiles.push_back({ seq[i], pos[i], pos[i], {} });
        }
        auto & tile = tiles[at.first->second];
        tile.first  = std::min(tile.first, pos[i]);
        tile.last   = std::max(tile.last, pos[i]);
        tile.tokens.push_back((int32_t) i);
    }
    return tiles;
}

// What a tile whose positions are from `first` to `last` sees of a cell of its sequence at `pos`
inline fasa_seen fasa_seen_at(int32_t pos, int32_t first, int32_t last) {
    return pos <= first ? FASA_SEEN_BY_ALL : pos <= last ? FASA_SEEN_BY_SOME : FASA_SEEN_BY_NONE;
}

// the most tiles that n tokens of n_seq sequences are, where they share no positions
inline uint32_t fasa_max_tiles(uint32_t n, uint32_t n_seq, uint32_t size) {
    return n / size + 2 * n_seq;
}
