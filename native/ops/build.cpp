// Builds the nodes of ops/ops.h.

#include "core/select.h"
#include "ops/ops.h"
#include "ops/tile.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <vector>

ggml_custom_op_t fasa_cpu_op_get(void) {
    static const ggml_custom_op_t fun = [] {
        ggml_backend_reg_t reg = ggml_backend_reg_by_name("CPU");
        return reg ? (ggml_custom_op_t) ggml_backend_reg_get_proc_address(reg, "fasa_cpu_op") : nullptr;
    }();
    return fun;
}

static fasa_op_params fasa_op_make(fasa_op_kind kind, void * userdata, int flags = 0) {
    fasa_op_params p = {};
    p.fun            = fasa_cpu_op_get();
    p.n_tasks        = GGML_N_TASKS_MAX;
    p.userdata       = userdata;
    p.magic          = FASA_OP_MAGIC;
    p.kind           = kind;
    p.flags          = flags;
    return p;
}

static void fasa_op_set(ggml_tensor * t, const fasa_op_params & p, const char * name) {
    memcpy(t->op_params, &p, sizeof(p));
    ggml_set_name(t, name);
}

// a node of a layer
static ggml_tensor * fasa_layer_node(ggml_context * ctx, ggml_type type, const int64_t (&ne)[4],
    std::initializer_list<ggml_tensor *> src, const fasa_op_params & p, const char * name) {
    std::vector<ggml_tensor *> args(src);
    while (args.back() == nullptr) { // one in between has its place
        args.pop_back();
    }
    ggml_tensor * t = ggml_custom_4d(
        ctx, type, ne[0], ne[1], ne[2], ne[3], args.data(), args.size(), p.fun, GGML_N_TASKS_MAX, p.userdata);
    fasa_op_set(t, p, name);
    t->src[FASA_COUNTS_AT] = ((const fasa_layer_const *) p.userdata)->counts;
    return t;
}

static fasa_op_params fasa_layer_params(
    fasa_op_kind kind, const fasa_layer_const * layer, int32_t flags, float scale, float soft_cap) {
    fasa_op_params p = fasa_op_make(kind, const_cast<fasa_layer_const *>(layer),
        layer->work       ? FASA_ON_DEVICE | flags :
            layer->counts ? FASA_REMOTE :
                            0);
    p.serial         = layer->serial;
    p.scale          = scale;
    p.soft_cap       = soft_cap;
    return p;
}

ggml_tensor * fasa_build_select(ggml_context * ctx, const fasa_select_op & op) {
    const int64_t n_kv     = op.k->ne[2];
    const int64_t n_stream = op.k->ne[3];
    const int64_t n_head   = op.q->ne[1];
    const int64_t n_tps    = op.q->ne[2] / n_stream;

    fasa_op_params p  = fasa_layer_params(FASA_OP_TIP, op.layer, op.flags, op.scale, op.soft_cap);
    p.k_dom           = op.k_dom_type;
    p.n_hadamard      = op.n_hadamard;
    ggml_tensor * tip = fasa_layer_node(ctx, GGML_TYPE_F32, { fasa_tip_length(n_kv), n_head, n_tps, n_stream },
        { op.k_dom, op.k, op.ranges, op.q, op.dims, op.weight, op.mask, op.fresh }, p, "fasa_tip");

    const int64_t length = fasa_list_length(op.params, op.forced->ne[0], n_kv);
    const int64_t n_list = op.params.per_head ? n_head : op.k->ne[1];

    p                                              = fasa_layer_params(FASA_OP_SELECT, op.layer, op.flags, 0.0f, 0.0f);
    p.budget                                       = op.params.budget;
    p.mass                                         = op.params.mass;
    p.floor                                        = op.params.floor;
    p.cap                                          = op.params.cap;
    // On a device SELECT runs TIP too. Without ranges among its sources, the allocator could reuse their memory for its
    // dst in the last layer.
    std::initializer_list<ggml_tensor *> on_cpu    = { tip, op.forced },
                                         on_device = { tip, op.forced, op.ranges, op.fresh };
    return fasa_layer_node(ctx, GGML_TYPE_I32, { 1 + length, n_list, n_tps, n_stream },
        op.layer->work ? on_device : on_cpu, p, "fasa_select");
}

// the list once more, behind what else is among the sources
static ggml_tensor * fasa_list_node(ggml_context * ctx, ggml_tensor * list, const std::vector<ggml_tensor *> & src,
    const fasa_op_params & p, const char * name) {
    ggml_tensor * t = ggml_view_tensor(ctx, list);
    t->op           = GGML_OP_CUSTOM;
    t->src[0]       = list;
    std::copy(src.begin(), src.end(), t->src + 1);
    fasa_op_set(t, p, name);
    return t;
}

ggml_tensor * fasa_build_fetch(ggml_context * ctx, const fasa_fetch_op & op) {
    GGML_ASSERT(op.layer->rows && op.list->ne[2] == 1 && op.list->ne[3] == 1 && ggml_nelements(op.fresh) == 1);
    fasa_op_params p = fasa_layer_params(FASA_OP_FETCH, op.layer, FASA_FORKED, 0.0f, 0.0f);
    p.stream0        = op.stream0;
    return fasa_list_node(ctx, op.list, { op.k, op.v, op.ranges, op.fresh }, p, "fasa_fetch");
}

ggml_tensor * fasa_build_fac(ggml_context * ctx, const fasa_fac_op & op) {
    fasa_op_params p = fasa_layer_params(
        FASA_OP_FAC, op.layer, (op.fresh ? FASA_FETCHED : 0) | (op.joined ? FASA_FORKED : 0), op.scale, op.soft_cap);
    p.stream0           = op.stream0;
    const int64_t ne[4] = { op.v->ne[0], op.q->ne[1], op.list->ne[2], op.list->ne[3] };
    ggml_tensor * cells = !op.layer->rows ? nullptr : op.fresh ? op.fresh : op.ranges;
    return fasa_layer_node(
        ctx, GGML_TYPE_F32, ne, { op.list, op.q, op.k, op.v, op.mask, op.sinks, cells }, p, "fasa_fac");
}

ggml_tensor * fasa_place_in(ggml_context * ctx, ggml_tensor * rows, ggml_tensor * room, size_t offset) {
    ggml_tensor * t = ggml_new_tensor(ctx, rows->type, GGML_MAX_DIMS, rows->ne);
    GGML_ASSERT(offset + ggml_nbytes(t) <= ggml_nbytes(room));
    t->buffer = room->buffer;
    t->data   = (char *) room->data + offset;
    return t;
}

ggml_tensor * fasa_build_stage(ggml_context * ctx, ggml_tensor * rows, ggml_tensor * place, ggml_tensor * fresh,
    ggml_tensor * work, const uint64_t * ubatch) {
    ggml_tensor * src[] = { rows, fresh, work };
    ggml_tensor * t     = ggml_custom_4d(ctx, rows->type, rows->ne[0], rows->ne[1], rows->ne[2], rows->ne[3], src,
        work ? 3 : 2, fasa_cpu_op_get(), 1, nullptr);
    t->buffer           = place->buffer;
    t->data             = place->data;
    fasa_op_set(t, fasa_op_make(FASA_OP_STAGE, const_cast<uint64_t *>(ubatch), FASA_ON_DEVICE), "fasa_stage");
    return t;
}

ggml_tensor * fasa_build_ahead(ggml_context * ctx, ggml_tensor * behind, ggml_tensor * k, ggml_tensor * v,
    ggml_tensor * k_place, ggml_tensor * v_place, const uint64_t * ubatch) {
    ggml_tensor * src[] = { behind, k, v, k_place, v_place };
    ggml_tensor * t     = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, src, 5, fasa_cpu_op_get(), 1, nullptr);
    // Nothing is written there. The allocator never takes back what nobody reads, so its own memory would be lost to
    // large tensors.
    t->buffer           = k_place->buffer;
    t->data             = k_place->data;
    fasa_op_set(t, fasa_op_make(FASA_OP_AHEAD, const_cast<uint64_t *>(ubatch), FASA_ON_DEVICE), "fasa_ahead");
    return t;
}

ggml_tensor * fasa_build_spread(ggml_context * ctx, ggml_tensor * values, ggml_tensor * dims, ggml_tensor * pos,
    ggml_tensor * factors, int64_t d, int64_t n_head, const fasa_rope & rope, const fasa_layer_const * layer) {
    fasa_op_params p = fasa_layer_params(FASA_OP_SPREAD, layer, 0, 0.0f, 0.0f);
    p.rope           = rope;
    return fasa_layer_node(
        ctx, GGML_TYPE_F32, { d, n_head, values->ne[1], 1 }, { values, dims, pos, factors }, p, "fasa_spread");
}

ggml_tensor * fasa_build_fork(ggml_context * ctx, ggml_tensor * residual, const fasa_layer_const * layer) {
    const fasa_op_params p = fasa_layer_params(FASA_OP_FORK, layer, 0, 0.0f, 0.0f);
    return fasa_layer_node(ctx, GGML_TYPE_I8, { 1, 1, 1, 1 }, { residual }, p, "fasa_fork");
}

// A node has nine sources, so there may be several behind each other; the first one waits.
ggml_tensor * fasa_build_join(
    ggml_context * ctx, ggml_tensor * list, const std::vector<ggml_tensor *> & held, const fasa_layer_const * layer) {
    const fasa_op_params p = fasa_layer_params(FASA_OP_JOIN, layer, 0, 0.0f, 0.0f);
    for (size_t i = 0; i < held.size(); i += GGML_MAX_SRC - 2) {
        const auto first = held.begin() + i, last = first + std::min<size_t>(GGML_MAX_SRC - 2, held.size() - i);
        list = fasa_list_node(ctx, list, { first, last }, p, "fasa_join");
    }
    return list;
}

// ---- sparse prefill ----

ggml_tensor * fasa_build_tile_select(ggml_context * ctx, const fasa_select_op & op, const fasa_tile_inputs & in) {
    const int64_t n_kv = op.k->ne[2], n_head_kv = op.k->ne[1], n_head = op.q->ne[1], n_tile = in.tiles->ne[1];
    const int64_t n_list = op.params.per_head ? n_head : n_head_kv, n_dom = op.dims->ne[0];
    const bool on_device = op.layer->work != nullptr;

    fasa_op_params p      = fasa_layer_params(FASA_OP_TILE_REFRESH, op.layer, 0, 0.0f, 0.0f);
    p.k_dom               = op.k_dom_type;
    p.n_hadamard          = op.n_hadamard;
    ggml_tensor * refresh = fasa_layer_node(ctx, GGML_TYPE_I8,
        { on_device ? fasa_tile_pad(n_dom) * 32 : fasa_rows_16_bytes(n_dom), (n_kv + 15) / 16, n_head_kv, op.k->ne[3] },
        { op.k_dom, op.k, op.ranges, op.q, op.dims }, p, "fasa_tile_refresh");

    p                 = fasa_layer_params(FASA_OP_TILE_TIP, op.layer, 0, op.scale, op.soft_cap);
    p.n_hadamard      = op.n_hadamard;
    ggml_tensor * tip = fasa_layer_node(ctx, GGML_TYPE_F32, { n_kv, on_device ? n_list : n_head, n_tile, 1 },
        { refresh, op.q, op.dims, op.weight, in.cell_pos, in.tiles, in.view }, p, "fasa_tile_tip");

    p                    = fasa_layer_params(FASA_OP_TILE_SELECT, op.layer, 0, 0.0f, 0.0f);
    p.budget             = op.params.budget;
    p.mass               = op.params.mass;
    p.floor              = op.params.floor;
    p.cap                = op.params.cap;
    const int64_t length = fasa_list_length(op.params, in.forced->ne[0], n_kv);
    return fasa_layer_node(ctx, GGML_TYPE_I32, { 1 + length, n_list, n_tile, 1 }, { tip, in.forced, in.tiles, in.view },
        p, "fasa_tile_select");
}

ggml_tensor * fasa_build_tile_fac(ggml_context * ctx, const fasa_fac_op & op, const fasa_tile_inputs & in) {
    fasa_op_params p    = fasa_layer_params(FASA_OP_TILE_FAC, op.layer, 0, op.scale, op.soft_cap);
    p.stream0           = op.stream0;
    const int64_t ne[4] = { op.v->ne[0], op.q->ne[1], op.q->ne[2] / op.k->ne[3], op.k->ne[3] };
    return fasa_layer_node(ctx, GGML_TYPE_F32, ne,
        { op.list, op.q, op.k, op.v, in.cell_pos, op.sinks, in.tiles, op.layer->rows ? op.ranges : nullptr }, p,
        "fasa_tile_fac");
}

ggml_tensor * fasa_build_observe(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * q_ahead,
    int32_t il, float scale, float soft_cap, fasa_reason ahead_reason, fasa_observer_ref * observer) {
    ggml_tensor * src[] = { q, k, q_ahead };
    ggml_tensor * t =
        ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, src, q_ahead ? 3 : 2, fasa_cpu_op_get(), 1, observer);

    fasa_op_params p = fasa_op_make(FASA_OP_OBSERVE, observer);
    p.n_tasks        = 1;
    p.scale          = scale;
    p.soft_cap       = soft_cap;
    p.k_dom          = il;
    p.stream0        = ahead_reason;
    fasa_op_set(t, p, "fasa_observe");
    return t;
}
