#pragma once

// The ops of FASA: GGML_OP_CUSTOM nodes marked by a magic and a kind in op_params, with a CPU function (native/cpu/,
// compiled into ggml-cpu) and, where ggml-cuda has them, CUDA kernels.
//
// FAC takes any list of cells: that of its layer's own TIP and SELECT, or that of another layer (fasa_layer_source). A
// node has at most nine tensors as inputs (src). What changes only with the settings (fasa_layer_const) lies outside of
// the graph and takes up none of them.
//
// One layer's decode step, in this order. d: head dimension, n_tps: tokens per stream.
//
//   TIP      refreshes K_dom of the stale cells from the stored K, then estimates logits from the dominant dimensions
//     dst    f32 [n_kv + 2*n_span, n_head, n_tps, n_stream]: exp(logit)/2^e of every cell, e the exponent of its
//            span of FASA_SPAN cells, or -1 where the mask hides the cell; then e of every span; then the sum of each
//     src    K_dom i8 [block, n_tile, n_head_kv, n_stream], k [d, n_head_kv, n_kv, n_stream],
//            ranges i32 [2*FASA_MAX_RANGES, n_stream], q f32 [d, n_head, n_tokens], dims i32 [n_dom, n_head_kv],
//            weight f32 [n_dom, n_head_kv], mask f16 [n_kv, n_tps, 1, n_stream]; where it selects ahead also fresh
//            i32 [n_fresh, n_stream], -1: none: cells whose K is not stored yet. A visible one has the score 0.
//   SELECT   the cells to attend, per list and token
//     dst    i32 [1 + length, n_list, n_tps, n_stream]: the count, then the cells, ascending; n_list is n_head_kv, or
//            n_head when every query head has a list of its own (fasa_params::per_head)
//     src    TIP, forced i32 [n_forced, n_tps, n_stream], -1: none; on a device also ranges and fresh, which its launch
//            reads for TIP
//   FETCH    on a device, where a layer selects ahead for one token and k and v lie in pinned host memory (FASA-M):
//            brings FAC the rows of the list, but for the fresh cell
//     dst    the list, in place
//     src    the list, k, v, ranges, fresh i32 [1]
//   FAC      exact attention over those cells
//     dst    f32 [d_v, n_head, n_tps, n_stream]
//     src    a list of SELECT's shape, its cells in any order, q, k, v [d_v, n_head_kv, n_kv, n_stream], mask,
//            sinks f32 [n_head] or none; where k and v lie in pinned host memory (FASA-M) also ranges, whose cells fall
//            out of the row cache; behind FETCH (FASA_FETCHED) fresh instead, whose rows are read in place
//   STAGE    a layer's k or v of pinned host memory, copied to a place on the device for dense attention
//     dst    as k or v, in that place
//     src    k or v, fresh i32 [2*FASA_MAX_RANGES, n_stream] (the cells that this ubatch writes), work or none
//   AHEAD    starts to copy what the next layer stages, behind the attention that read the place before; in a CUDA
//            graph it does nothing
//     dst    f32 [1]
//     src    that attention's result, k and v of the next layer, and their places
//   FORK     on a device: what follows, up to the node with FASA_FORKED, runs on a side stream, behind what came before
//     dst    i8 [1]
//     src    the residual
//   SPREAD   foreseen queries of which only the dominant dimensions were multiplied out: rotated (RoPE), each in its
//   place
//     dst    f32 [d, n_head, n_tokens], 0 in all other dimensions
//     src    their values f32 [n_dom*n_head, n_tokens], dims, positions i32 [n_tokens], RoPE's frequency factors f32
//            [n_rot/2] or none
//   JOIN     the list of a layer that selects ahead, behind the side stream. What that stream reads and writes is among
//            its sources, since the allocator thinks in one stream.
//     dst    the list, in place
//     src    the list, FORK, and what else is held; where that is too much, several nodes behind each other
//   A prompt that is processed sparsely, in tiles of tokens: ops/tile.h
//   OBSERVE  hands q and k to an observer on the host
//     dst    f32 [1]
//     src    q, k, foreseen q or none

#include "ggml-backend.h"
#include "ggml.h"

#include "core/counters.h"
#include "core/layout.h"
#include "fasa.h"

#include <cstddef>
#include <cstdint>
#include <vector>

enum fasa_op_kind {
    FASA_OP_TIP = 1,
    FASA_OP_SELECT,
    FASA_OP_FAC,
    FASA_OP_OBSERVE,
    FASA_OP_STAGE,
    FASA_OP_AHEAD,
    FASA_OP_FORK,
    FASA_OP_SPREAD,
    FASA_OP_JOIN,
    FASA_OP_FETCH,
    FASA_OP_TILE_REFRESH,
    FASA_OP_TILE_TIP,
    FASA_OP_TILE_SELECT,
    FASA_OP_TILE_FAC,
    FASA_OP_ASK // no node: what a client asks a server of ggml-rpc (llama/remote.h)
};

// The softmax over all cells is put together from spans that different threads, or thread blocks, work on. A span's
// exponent is a whole number, so this rounds nothing: equal logits get equal scores, wherever their cells lie.
static constexpr int FASA_SPAN = 256; // cells

constexpr int64_t fasa_n_span(int64_t n_kv) {
    return (n_kv + FASA_SPAN - 1) / FASA_SPAN;
}
constexpr int64_t fasa_tip_length(int64_t n_kv) {
    return n_kv + 2 * fasa_n_span(n_kv);
}

// n_kv of a TIP node
inline int64_t fasa_tip_n_kv(const ggml_tensor * tip) {
    return tip->src[1]->ne[2];
}

// bytes of dominant keys that a TIP node reads, counted once for all its tokens
inline uint64_t fasa_tip_bytes(const ggml_tensor * tip) {
    const ggml_tensor *k_dom = tip->src[0], *k = tip->src[1];
    return (k->ne[2] + FASA_TILE - 1) / FASA_TILE * k_dom->ne[0] * k->ne[1] * k->ne[3];
}

// SELECT adds up the shares of a KV head's query heads, times 2^FASA_SCORE_EXP, and drops what is smaller than
// 2^-FASA_SCORE_RANGE of a head's largest exponent. So no float is ever subnormal, and machines that flush subnormals
// take the same cells as those that do not.
static constexpr int FASA_SCORE_EXP   = 60;
static constexpr int FASA_SCORE_RANGE = 64;
// SELECT sums a head's spans in FASA_SUM_PARTS interleaved parts (span i goes to part i / 32 % 4), in the order of the
// CUDA kernel.
static constexpr int FASA_SUM_PARTS   = 4;
static constexpr float FASA_FRESH     = -1e30f; // TIP: the logit of a visible cell whose K is not stored yet
static constexpr int FASA_SPAN_RANGE  = 100;    // TIP: a score below 2^-FASA_SPAN_RANGE of its span's exponent is 0

// What the kernels of a device keep across launches. It is zeroed once; kernels leave counts and tickets zero.
struct fasa_work {
    static constexpr int BINS = 2048, EDGE = 128, PARTS = 64, LISTS_AT_ONCE = 64, TICKETS = 4096;

    enum {
#define X(name, NAME) NAME,
        FASA_COUNTERS_OP(X) FASA_COUNTERS_DEVICE(X)
#undef X
            N_COUNTER
    };
    uint64_t counter[16];       // as in fasa_stats
    uint32_t clock, unused[31]; // FASA-M: goes up with every fetch of a token's rows
    uint32_t ticket[TICKETS];   // FAC: blocks of a list that are done
    struct histogram {
        uint64_t mass[BINS];
        uint32_t count[BINS];
    };
    struct list_state { // SELECT: one list of those that it makes at a time
        histogram bins[3];
        uint64_t edge[EDGE];
        uint32_t part[PARTS], equal[PARTS];
        uint32_t n_edge, unused_1[31]; // cache lines of their own: every block of a list writes to them
        uint32_t arrived, unused_2[31];
        uint32_t ticket, unused_3[31]; // of a list that is made by several launches: its blocks that are done
        uint64_t found[8];             // and where it ends
    } lists[LISTS_AT_ONCE];
};

// ---- FASA-M: a row is K and V of a cell and KV head, side by side on the device ----

struct fasa_row_layout {
    int bytes_k, bytes_v, v_at, stride; // v_at and stride are multiples of 16

    fasa_row_layout(ggml_type type_k, ggml_type type_v, int64_t d_k, int64_t d_v)
        : bytes_k(ggml_row_size(type_k, d_k)), bytes_v(ggml_row_size(type_v, d_v)), v_at((bytes_k + 15) / 16 * 16),
          stride(v_at + (bytes_v + 15) / 16 * 16) {}
};

// Where FAC finds the rows of one token's lists: the slot of every row in the row cache, then the rows without a slot
inline size_t fasa_rows_slots(int64_t length, int64_t n_list) {
    return (size_t) (length * n_list * sizeof(int32_t) + 255) / 256 * 256;
}
inline size_t fasa_rows_bytes(const fasa_row_layout & row, int64_t length, int64_t n_list) {
    return fasa_rows_slots(length, n_list) + (size_t) length * n_list * row.stride;
}

// The row cache of a layer keeps, for every stream and KV head: i32 tag [n_slot], the cell + 1 or 0; u32 used [n_slot],
// the clock's time of its last use; the rows [n_slot]. Zeroed, it is empty. Stale cells (`ranges`) fall out of it.
static constexpr int FASA_ROW_WAYS  = 8; // slots that a cell may be in; n_slot is a multiple
static constexpr int FASA_ROW_HEAD  = 8; // bytes of tag and used
// bit set in a slot number: the slot is reserved and its row is still to be fetched
static constexpr int FASA_ROW_FETCH = 1 << 30;

static constexpr uint32_t FASA_OP_MAGIC = 0x41534146; // "FASA"

// where an OBSERVE node sends what it sees
struct fasa_observer_ref {
    fasa_observer fn = nullptr;
    void * user      = nullptr;
};

// What TIP, SELECT and FAC of one layer need beside their src tensors. It changes only with the settings. Every graph
// is then built anew, and `serial` changes: a captured CUDA graph compares op_params, and is captured anew too.
struct fasa_layer_const {
    fasa_stats * stats      = nullptr; // nullptr: nothing is counted on the CPU
    // i8 [sizeof(fasa_work)] on the layer's device, one for all its layers; nullptr: the layer is on the CPU
    ggml_tensor * work      = nullptr;
    // i8 [fasa_rows_bytes] on the device, where k and v lie in pinned host memory; else nullptr
    ggml_tensor * rows      = nullptr;
    // i8 [FASA_ROW_HEAD + stride, n_slot, n_head_kv, streams of the cache] or nullptr
    ggml_tensor * row_cache = nullptr;
    // i8 [sizeof(fasa_stats)] on the other machine, where the layer is on one: its CPU counts there
    ggml_tensor * counts    = nullptr;
    uint32_t serial         = 0;
};

// Where a node for another machine has fasa_layer_const::counts: behind the nine sources that nodes use.
static constexpr int FASA_COUNTS_AT = GGML_MAX_SRC - 1;

// Flags of fasa_op_params::flags. With FASA_ON_DEVICE one launch of SELECT computes TIP too; the TIP node's data is
// then undefined unless FASA_SCORES_KEPT.
enum fasa_op_flags {
    FASA_ON_DEVICE    = 1,  // the tensors lie on a device whose backend has kernels
    FASA_SCORES_KEPT  = 2,  // the TIP node holds the scores afterwards, as on the CPU
    FASA_SCORES_GIVEN = 4,  // the TIP node holds scores already
    FASA_FORKED       = 8,  // SELECT or FETCH: the last node of a side stream that FORK began; FAC: behind its JOIN
    FASA_FETCHED      = 16, // FAC: FETCH has brought the rows that lie in pinned host memory
    FASA_REMOTE       = 32, // the node runs on the CPU of another machine (rpc/rpc.h); none of the others is set
};

// ggml's RoPE of a head, without what depends on position and dimension
struct fasa_rope {
    float theta_scale, freq_scale, ext_factor, attn_factor;
    float corr[2]; // of YaRN
    int32_t n_rot; // dimensions that rotate, the first ones of a head
    int32_t neox;  // pairs are (i, i + n_rot/2); else (2i, 2i + 1)
};

// The whole of ggml_tensor::op_params; fun, n_tasks and userdata are ggml's own (struct ggml_custom_op_params).
// op_params is an array of int32_t at 84 bytes into a tensor, so the struct must not want more than their alignment.
#pragma pack(push, 4)
struct fasa_op_params {
    ggml_custom_op_t fun;
    int32_t n_tasks;
    uint32_t magic; // in what is padding there
    // fasa_layer_const; OBSERVE: fasa_observer_ref; STAGE and AHEAD: uint64_t, the number of the ubatch
    void * userdata;
    uint8_t kind;
    uint8_t flags;   // enum fasa_op_flags; 0: a CPU node
    int16_t k_dom;   // enum fasa_k_dom_type; OBSERVE: the layer, and in stream0 why its queries cannot be foreseen
    uint32_t serial; // of fasa_layer_const
    union {
        struct {
            float scale;
            float soft_cap;
            int32_t n_hadamard; // block of the rotation that q and k are stored under, 0: none
            int32_t stream0;    // FAC: the first of the cache's streams that k and v show
            uint32_t budget;
            float mass;
            uint32_t floor;
            uint32_t cap;
        };
        fasa_rope rope; // SPREAD
    };
};
#pragma pack(pop)
static_assert(alignof(fasa_op_params) <= alignof(int32_t) && offsetof(ggml_tensor, op_params) % alignof(int32_t) == 0,
    "nodes are read where they lie");
static_assert(sizeof(fasa_op_params) <= GGML_MAX_OP_PARAMS, "op_params is the only room a node has");
static_assert(offsetof(fasa_op_params, userdata) == 16, "where ggml's own struct has it");

// the parameters of a node; nullptr when the node is not one of ours
inline const fasa_op_params * fasa_op_get(const ggml_tensor * t) {
    const auto * p = (const fasa_op_params *) t->op_params;
    return t->op == GGML_OP_CUSTOM && p->magic == FASA_OP_MAGIC ? p : nullptr;
}

// of a TIP, SELECT or FAC node
inline const fasa_layer_const & fasa_op_layer(const ggml_tensor * t) {
    return *(const fasa_layer_const *) fasa_op_get(t)->userdata;
}

// what TIP and SELECT of one layer are built from
struct fasa_select_op {
    ggml_tensor * q;      // f32 [d, n_head, n_tokens]
    ggml_tensor * k;      // [d, n_head_kv, n_kv, n_stream]
    ggml_tensor * mask;   // f16 [n_kv, n_tps, 1, n_stream]
    ggml_tensor * k_dom;  // i8  [block, n_tile, n_head_kv, n_stream]
    ggml_tensor * dims;   // i32 [n_dom, n_head_kv]
    ggml_tensor * weight; // f32 [n_dom, n_head_kv]
    ggml_tensor * ranges; // i32 [2*FASA_MAX_RANGES, n_stream]
    ggml_tensor * forced; // i32 [n_forced, n_tps, n_stream]
    ggml_tensor * fresh;  // i32 [n_fresh, n_stream] or nullptr
    int32_t flags;        // FASA_SCORES_KEPT, FASA_SCORES_GIVEN, FASA_FORKED; on a device
    int32_t k_dom_type;
    int32_t n_hadamard;
    float scale;
    float soft_cap;
    fasa_params params; // of this layer: budget, mass, floor, cap, per_head
    const fasa_layer_const * layer;
};

// what FAC of one layer is built from
struct fasa_fac_op {
    ggml_tensor * list;   // i32 [1 + length, n_list, n_tps, n_stream], of any origin
    ggml_tensor * q;      // f32 [d, n_head, n_tokens]
    ggml_tensor * k;      // [d, n_head_kv, n_kv, n_stream]
    ggml_tensor * v;      // [d_v, n_head_kv, n_kv, n_stream]
    ggml_tensor * mask;   // f16 [n_kv, n_tps, 1, n_stream]
    ggml_tensor * sinks;  // f32 [n_head] or nullptr
    ggml_tensor * ranges; // i32 [2*FASA_MAX_RANGES, n_stream]
    ggml_tensor * fresh;  // i32 [1], where the list comes from FETCH; else nullptr
    int32_t stream0;      // the first of the cache's streams that k and v show
    bool joined;          // the list is not from a SELECT right before it in the same stream
    float scale;
    float soft_cap;
    const fasa_layer_const * layer;
};

// what FETCH of one layer is built from
struct fasa_fetch_op {
    ggml_tensor * list;   // i32 [1 + length, n_list], of one token
    ggml_tensor * k;      // [d, n_head_kv, n_kv]
    ggml_tensor * v;      // [d_v, n_head_kv, n_kv]
    ggml_tensor * ranges; // i32 [2*FASA_MAX_RANGES], with the fresh cell
    ggml_tensor * fresh;  // i32 [1]
    int32_t stream0;      // the cache's stream that k and v show
    const fasa_layer_const * layer;
};

// What a device's kernels must be able to read; a backend with kernels hands out a fasa_dense_reason_t as
// "fasa_dense_reason".
struct fasa_layer_shape {
    ggml_type type_k, type_v;
    int64_t n_embd_head_k, n_embd_head_v;
    int32_t n_group; // query heads of a KV head
};
typedef fasa_reason (*fasa_dense_reason_t)(ggml_backend_dev_t dev, const fasa_layer_shape * shape);

// What a server of ggml-rpc answers to FASA_OP_ASK, in place of a tensor's size; no tensor is that large.
static constexpr uint64_t FASA_ANSWER = 0xfa5aull << 48;

constexpr uint64_t fasa_remote_answer(fasa_reason reason) {
    return FASA_ANSWER | (uint64_t) reason;
}
constexpr fasa_reason fasa_remote_answered(uint64_t size) {
    return (size >> 48) == (FASA_ANSWER >> 48) ? (fasa_reason) (size & 0xffff) : FASA_REASON_REMOTE_BUILD;
}

// The type of pinned host memory that a device reads and writes in place; a backend with kernels hands it out as
// "fasa_host_buft". on_error gets the reason when memory cannot be pinned. nullptr: the device cannot.
typedef void (*fasa_on_error_t)(const char * text);
typedef ggml_backend_buffer_type_t (*fasa_host_buft_t)(ggml_backend_dev_t dev, fasa_on_error_t on_error);
// fasa_host_rates of fasa.h, as "fasa_host_rates": k and v are views [d, n_head_kv, n_cell] of n_layer layers alike;
// nullptr, or why not
typedef const char * (*fasa_host_rates_t)(ggml_backend_dev_t dev, const ggml_tensor * const * k,
    const ggml_tensor * const * v, int n_layer, int n_cells, int n_rows, uint64_t between, fasa_rates * rates);

// the function that runs our nodes on the CPU, from the CPU backend; nullptr when that backend has none
ggml_custom_op_t fasa_cpu_op_get(void);

// SELECT; its src[0] is the TIP
ggml_tensor * fasa_build_select(ggml_context * ctx, const fasa_select_op & op);
ggml_tensor * fasa_build_fetch(ggml_context * ctx, const fasa_fetch_op & op);
ggml_tensor * fasa_build_fac(ggml_context * ctx, const fasa_fac_op & op);

// `rows` as they lie behind each other at `offset` of `room`, which is allocated
ggml_tensor * fasa_place_in(ggml_context * ctx, ggml_tensor * rows, ggml_tensor * room, size_t offset);
// k or v in `place`, of fasa_place_in; work: what counts the bytes, or nullptr; ubatch: the number of the one that is
// computed
ggml_tensor * fasa_build_stage(ggml_context * ctx, ggml_tensor * rows, ggml_tensor * place, ggml_tensor * fresh,
    ggml_tensor * work, const uint64_t * ubatch);
ggml_tensor * fasa_build_ahead(ggml_context * ctx, ggml_tensor * behind, ggml_tensor * k, ggml_tensor * v,
    ggml_tensor * k_place, ggml_tensor * v_place, const uint64_t * ubatch);

ggml_tensor * fasa_build_spread(ggml_context * ctx, ggml_tensor * values, ggml_tensor * dims, ggml_tensor * pos,
    ggml_tensor * factors, int64_t d, int64_t n_head, const fasa_rope & rope, const fasa_layer_const * layer);
ggml_tensor * fasa_build_fork(ggml_context * ctx, ggml_tensor * residual, const fasa_layer_const * layer);
// held: what stays allocated until then, FORK first
ggml_tensor * fasa_build_join(
    ggml_context * ctx, ggml_tensor * list, const std::vector<ggml_tensor *> & held, const fasa_layer_const * layer);

// q_ahead: nullptr where queries cannot be foreseen, for `ahead_reason`
ggml_tensor * fasa_build_observe(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * q_ahead,
    int32_t il, float scale, float soft_cap, fasa_reason ahead_reason, fasa_observer_ref * observer);
