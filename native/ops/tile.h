#pragma once

// The nodes of sparse prefill. A tile is up to T tokens of one sequence; a tile and a KV head (a query head with
// per_head) share a list of cells. Definition: fasa_gguf/reference_prefill.py.
//
// No node reads llama.cpp's mask, so a graph without dense layers has none: at 131,072 cells, filling it takes longer
// than many a layer. A query sees the cells of its sequence up to its own position. The inputs of a graph say which:
//
//   tiles    i32 [2 + 2*T, n_tile]: of every tile its stream, the number of its tokens, their numbers in the ubatch;
//            from 2 + T on their positions
//   VIEW     i8 [n_kv rounded up to FASA_SPAN, n_tile], enum fasa_seen (core/tiles.h): what a tile sees of a cell
//   cell_pos i32 [n_kv rounded up to FASA_SPAN, n_stream]: the position of every cell. A query sees a cell that is not
//            FASA_SEEN_BY_NONE iff the cell's position is not above its own.
//
//   REFRESH  derives K_dom of the stale cells, then the dominant keys of all cells in 8 bits with one scale a cell
//     dst    i8 [fasa_rows_16_bytes, n_kv/16 rounded up, n_head_kv, n_stream]
//     src    as TIP: K_dom, k, ranges, q (only where it lies in the list), dims
//   TIP      the softmaxes of a tile's queries, added up
//     dst    f32 [n_kv, n_head, n_tile], times 2^FASA_SCORE_EXP
//     src    REFRESH, q f32 [d, n_head, n_tokens], dims, weight, cell_pos, tiles, VIEW
//   SELECT   the cells that a tile attends
//     dst    i32 [1 + length, n_list, n_tile]: the count, then the cells, ascending
//     src    TIP, forced i32 [n_forced, n_tile] (-1: none), tiles, VIEW
//            On a device REFRESH has f16 [fasa_tile_pad, 16 cells] instead of 16 cells' rows, and TIP f32 [n_kv,
//            n_list, n_tile], the heads of a list added up; SELECT writes keys over TIP's scores.
//   FAC      exact attention of a tile over its list
//     dst    f32 [d_v, n_head, n_tps, n_stream]
//     src    the list, q, k, v, cell_pos, sinks f32 [n_head] or none, tiles; where k and v lie in pinned host memory
//            (FASA-M) also ranges, whose cells fall out of the row cache. A list holds no cell that no query sees.

#include "core/tiles.h"
#include "ops/ops.h"

struct fasa_tile_ref {
    int32_t stream, count;
    const int32_t * token; // [count] numbers in the ubatch
    const int32_t * pos;   // [count] positions
};

// T, the most tokens of a tile
inline int64_t fasa_tile_size(const ggml_tensor * tiles) {
    return (tiles->ne[0] - 2) / 2;
}

inline fasa_tile_ref fasa_tile_at(const ggml_tensor * tiles, int64_t i) {
    const int32_t * row = (const int32_t *) ((const char *) tiles->data + i * tiles->nb[1]);
    return { row[0], row[1], row + 2, row + 2 + fasa_tile_size(tiles) };
}

// 16 cells of REFRESH: u8 value[n_dom/4][16][4], 128 stands for 0; then f32 scale[16]
constexpr int64_t fasa_rows_16_bytes(int64_t n_dom) {
    return n_dom * 16 + 64;
}

// on a device: the dominant dimensions of a cell, with zeros up to a number that there are kernels for
constexpr int64_t fasa_tile_pad(int64_t n_dom) {
    return n_dom <= 64 ? (n_dom + 15) / 16 * 16 : n_dom <= 96 ? 96 : n_dom <= 128 ? 128 : 256;
}

// what the nodes of one graph share
struct fasa_tile_inputs {
    ggml_tensor * tiles;    // i32 [2 + 2*T, n_tile]
    ggml_tensor * forced;   // i32 [n_forced, n_tile]
    ggml_tensor * view;     // VIEW
    ggml_tensor * cell_pos; // i32 [n_kv rounded up, n_stream]
};

// SELECT; its src[0] is TIP, whose src[0] is REFRESH. op.params has the budget, mass, floor and cap of a tile.
ggml_tensor * fasa_build_tile_select(ggml_context * ctx, const fasa_select_op & op, const fasa_tile_inputs & in);
ggml_tensor * fasa_build_tile_fac(ggml_context * ctx, const fasa_fac_op & op, const fasa_tile_inputs & in);
