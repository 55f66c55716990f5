// fasa_op_time: how long the attention of one layer takes, dense and with FASA.

#include "measure/op-time.h"
#include "core/error.h"
#include "core/select.h"
#include "measure/op-case.h"
#include "measure/threads.h"
#include "ops/ops.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <chrono>
#include <cmath>

// Fills a cache tensor with the given rows, again and again, each time from another row on
static void fasa_op_time_fill(ggml_tensor * t, const std::vector<uint8_t> & rows, size_t seed) {
    const int64_t n_cell = t->ne[2] * t->ne[3];
    for (int64_t cell = 0; cell < n_cell;) {
        const int64_t from = (seed++ * 389) % FASA_TIME_CELLS, n = std::min(FASA_TIME_CELLS - from, n_cell - cell);
        ggml_backend_tensor_set(t, rows.data() + from * t->nb[2], cell * t->nb[2], n * t->nb[2]);
        cell += n;
    }
}

// ---- graphs ----

// a layer's dense attention
static ggml_tensor * fasa_op_time_dense(ggml_context * ctx, const fasa_op_layer_case & layer) {
    const auto & op        = layer.select;
    const int64_t n_stream = op.k->ne[3];
    ggml_tensor * q        = ggml_reshape_4d(ctx, op.q, op.q->ne[0], op.q->ne[1], op.q->ne[2] / n_stream, n_stream);
    return ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), ggml_permute(ctx, op.k, 0, 2, 1, 3),
        ggml_permute(ctx, layer.fac.v, 0, 2, 1, 3), op.mask, op.scale, 0.0f, op.soft_cap);
}

// x + a feed-forward of x
static ggml_tensor * fasa_op_time_beside(ggml_context * ctx, const fasa_op_beside & w, ggml_tensor * x) {
    return ggml_add(ctx, x, ggml_mul_mat(ctx, w.down, ggml_mul_mat(ctx, w.up, x)));
}

// What a layer computes, behind each other in the graph. x: the residual that feed-forwards add to, moved on.
static void fasa_op_time_layer(ggml_context * ctx, ggml_cgraph * graph, fasa_op_layer_case & layer,
    const fasa_op_beside & w, fasa_op_time_kind kind, ggml_tensor *& x) {
    const auto add = [&](ggml_tensor * t) {
        ggml_build_forward_expand(graph, t);
        return t;
    };
    switch (kind) {
        case FASA_TIME_DENSE: add(fasa_op_time_dense(ctx, layer)); return;
        case FASA_TIME_SELECT: add(layer.build_select(ctx)); return;
        case FASA_TIME_FASA: add(layer.build_fac(ctx, layer.build_select(ctx))); return;
        case FASA_TIME_BESIDE: x = add(fasa_op_time_beside(ctx, w, x)); return;
        case FASA_TIME_AHEAD: break;
    }
    layer.select.flags     = FASA_FORKED;
    const auto & op        = layer.select;
    ggml_tensor * residual = x;
    ggml_tensor * fork     = add(fasa_build_fork(ctx, residual, &layer.fixed));
    ggml_tensor * foreseen = add(ggml_mul_mat(ctx, w.query, residual)); // as long as it takes; the case has its q
    ggml_tensor * list     = add(layer.build_select(ctx));
    x                      = add(fasa_op_time_beside(ctx, w, residual));
    const auto held        = { fork, residual, foreseen, list->src[0], op.mask, op.ranges, op.forced };
    layer.select.flags     = 0;
    layer.fac.joined       = true;
    add(layer.build_fac(ctx, add(fasa_build_join(ctx, list, held, &layer.fixed))));
    layer.fac.joined = false;
}

// the first node that the backend cannot run, or nullptr
static const ggml_tensor * fasa_op_time_unsupported(ggml_backend_t backend, ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        if (!ggml_backend_supports_op(backend, ggml_graph_node(graph, i))) {
            return ggml_graph_node(graph, i);
        }
    }
    return nullptr;
}

// Seconds per layer of a graph of these ops, the fastest of n_rep runs. Its nodes share memory as in a model's graph.
// Infinity: the device has no dense attention for this shape. -1: fasa_error() says why
double fasa_op_time_run::time(fasa_op_time_kind kind, int n_rep) {
    ggml_context_ptr ctx(
        ggml_init({ (12 * layers.size() + 8) * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_tensor * x     = residual;
    for (size_t i = 0; i < layers.size(); ++i) {
        const fasa_op_beside none = {};
        fasa_op_time_layer(ctx.get(), graph, layers[i], beside.empty() ? none : beside[i % beside.size()], kind, x);
    }
    if (const ggml_tensor * node = fasa_op_time_unsupported(backend.get(), graph)) {
        if (kind == FASA_TIME_DENSE) {
            return INFINITY;
        }
        fasa_set_error("fasa_op_time: %s does not support %s for these shapes and types",
            ggml_backend_name(backend.get()), *node->name ? node->name : ggml_op_desc(node));
        return -1.0;
    }
    ggml_gallocr_ptr alloc(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend.get())));
    if (!ggml_gallocr_alloc_graph(alloc.get(), graph)) {
        fasa_set_error("fasa_op_time: out of memory");
        return -1.0;
    }
    double best = INFINITY;
    for (int i = 0; i < n_rep + 3; ++i) { // a device captures its graph in the first runs
        const auto start = std::chrono::steady_clock::now();
        ggml_backend_graph_compute(backend.get(), graph);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        best                                     = i < 3 ? best : std::min(best, took.count());
    }
    return best / layers.size();
}

// ---- a case ----

// the weights beside n_layer layers, those of a feed-forward of that many bytes, for a residual of n_embd numbers
void fasa_op_time_run::make_beside(uint64_t bytes, int n_layer, int64_t n_embd, int64_t n_query) {
    const int64_t n_ff = std::max<int64_t>(256, bytes / (2 * n_embd * ggml_type_size(GGML_TYPE_F16)) / 256 * 256);
    const int n        = (int) std::clamp<int64_t>(FASA_BESIDE_BYTES / (int64_t) bytes, 1, n_layer);
    residual           = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, 1);
    for (int i = 0; i < n; ++i) {
        beside.push_back({ ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, n_embd, n_ff),
            ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, n_ff, n_embd),
            ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, n_embd, n_query) });
    }
}

int fasa_op_time_run::init(const fasa_op_case & c, int n_layer, ggml_type type_k, ggml_type type_v,
    const std::vector<uint8_t> & k, const std::vector<uint8_t> & v) {
    backend.reset(ggml_backend_init_by_name(c.backend, nullptr));
    if (!backend) {
        return fasa_set_error("fasa_op_time: there is no backend %s", c.backend);
    }
    const bool on_cpu = fasa_cpu_set_threads(backend.get(), c.n_threads);
    ctx.reset(ggml_init({ (20 * (size_t) n_layer + 2) * ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor * work = on_cpu ? nullptr : ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, sizeof(fasa_work));
    kv_ctx.reset(ggml_init({ 2 * (size_t) n_layer * ggml_tensor_overhead(), nullptr, true }));
    layers.resize(n_layer);
    for (auto & layer : layers) {
        layer.make(c, type_k, type_v, ctx.get(), kv_ctx.get());
        layer.fixed.work = work;
    }
    if (c.beside > 0) {
        make_beside(c.beside, n_layer, (int64_t) c.n_head * c.n_embd_head_k, (int64_t) c.n_dom * c.n_head);
    }
    buf.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
    kv_buf.reset(fasa_op_alloc_kv(c, kv_ctx.get(), backend.get()));
    if (!buf || !kv_buf) {
        return fasa_set_error("fasa_op_time: out of memory, or the device has no mode %d", c.mode);
    }
    ggml_backend_buffer_clear(buf.get(), 0);
    return set_inputs(c, k, v);
}

// and derives the dominant keys, so that no cell is stale when the time is taken
int fasa_op_time_run::set_inputs(
    const fasa_op_case & c, const std::vector<uint8_t> & k, const std::vector<uint8_t> & v) {
    std::vector<int32_t> all(2 * FASA_MAX_RANGES * c.n_stream, 0);
    for (int s = 0; s < c.n_stream; ++s) {
        all[s * 2 * FASA_MAX_RANGES + 1] = c.n_kv;
    }
    for (size_t i = 0; i < layers.size(); ++i) {
        fasa_op_time_fill(layers[i].select.k, k, 7 * i);
        fasa_op_time_fill(layers[i].fac.v, v, 7 * i + 3);
        fasa_case_write(layers[i].select.q, c.q);
        fasa_case_write(layers[i].select.dims, c.dims);
        fasa_case_write(layers[i].select.weight, c.weight);
        fasa_case_write(layers[i].select.forced, c.forced);
        if (layers[i].select.fresh) {
            fasa_case_write(layers[i].select.fresh, c.fresh);
        }
        fasa_case_write(layers[i].select.ranges, all.data());
    }
    if (time(FASA_TIME_SELECT, 1) < 0) {
        return -1;
    }
    for (auto & layer : layers) {
        ggml_backend_tensor_memset(layer.select.ranges, 0, 0, ggml_nbytes(layer.select.ranges));
    }
    return 0;
}

static int fasa_op_time_case(const fasa_op_case * c, int32_t n_layer, int32_t n_rep, fasa_op_times * times) {
    ggml_type type_k, type_v;
    if (fasa_op_check(c, type_k, type_v) != 0 || fasa_check_size(times, "fasa_op_times") != 0) {
        return -1;
    }
    if (n_layer < 1 || n_layer > 100 || n_rep < 1) {
        return fasa_set_error("fasa_op_time: n_layer (1 to 100) or n_rep (from 1) is out of range");
    }
    if (c->beside > 0 && (c->n_tokens != 1 || c->n_stream != 1 || c->mode == FASA_MODE_HOST)) {
        return fasa_set_error("fasa_op_time: a feed-forward beside (`beside`) is timed with one token, in mode device");
    }
    if (c->list) {
        return fasa_set_error("fasa_op_time: it times SELECT too, and takes no given list");
    }
    const auto k = fasa_convert(c->k, type_k, FASA_TIME_CELLS * c->n_head_kv, c->n_embd_head_k);
    const auto v = fasa_convert(c->v, type_v, FASA_TIME_CELLS * c->n_head_kv, c->n_embd_head_v);
    fasa_op_time_run run;
    if (run.init(*c, n_layer, type_k, type_v, k, v) != 0) {
        return -1;
    }
    times->dense  = run.time(FASA_TIME_DENSE, n_rep);
    times->select = run.time(FASA_TIME_SELECT, n_rep);
    times->fasa   = run.time(FASA_TIME_FASA, n_rep);
    times->beside = c->beside > 0 ? run.time(FASA_TIME_BESIDE, n_rep) : 0.0;
    times->ahead  = c->beside > 0 ? run.time(FASA_TIME_AHEAD, n_rep) : 0.0;
    if (std::min({ times->dense, times->select, times->fasa, times->beside, times->ahead }) < 0) {
        return -1;
    }
    return 0;
}

int fasa_op_time(const fasa_op_case * c, int32_t n_layer, int32_t n_rep, fasa_op_times * times) {
    return fasa_guard("fasa_op_time", [&] { return fasa_op_time_case(c, n_layer, n_rep, times); });
}
