// fasa_op_run: the ops of one layer on arrays of the caller, for tests against fasa_gguf/reference.py; fasa_op_time:
// how long they take.

#include "core/error.h"
#include "core/select.h"
#include "llama/cache.h"
#include "ops/ops.h"

#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

static bool fasa_type_by_name(const char * name, ggml_type & type) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        if (name && ggml_type_name((ggml_type) i) && strcmp(ggml_type_name((ggml_type) i), name) == 0) {
            type = (ggml_type) i;
            return true;
        }
    }
    return false;
}

// n values as `type`
static std::vector<uint8_t> fasa_convert(const float * x, ggml_type type, int64_t n_row, int64_t n_per_row) {
    std::vector<uint8_t> out(ggml_row_size(type, n_per_row) * n_row);
    if (type == GGML_TYPE_F32) {
        memcpy(out.data(), x, out.size());
    } else {
        ggml_quantize_chunk(type, x, out.data(), 0, n_row, n_per_row, nullptr);
    }
    return out;
}

// a layer of a case
struct fasa_op_layer_case {
    fasa_select_op select = {};
    fasa_fac_op fac       = {};
    fasa_layer_const fixed;

    // its tensors, but for `work`; k and v in kv_ctx
    void make(const fasa_op_case & c, ggml_type type_k, ggml_type type_v, ggml_context * ctx, ggml_context * kv_ctx);

    ggml_tensor * build_select(ggml_context * ctx);
    ggml_tensor * build_fac(ggml_context * ctx, ggml_tensor * list);
};

void fasa_op_layer_case::make(
    const fasa_op_case & c, ggml_type type_k, ggml_type type_v, ggml_context * ctx, ggml_context * kv_ctx) {
    auto & op            = select;
    const int64_t n_tile = (c.n_kv + FASA_TILE - 1) / FASA_TILE;

    op.q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.n_embd_head_k, c.n_head, (int64_t) c.n_tokens * c.n_stream);
    op.k    = ggml_new_tensor_4d(kv_ctx, type_k, c.n_embd_head_k, c.n_head_kv, c.n_kv, c.n_stream);
    op.mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, c.n_kv, c.n_tokens, 1, c.n_stream);
    op.k_dom =
        ggml_new_tensor_4d(ctx, GGML_TYPE_I8, fasa_block_bytes(c.k_dom, c.n_dom), n_tile, c.n_head_kv, c.n_stream);
    op.dims       = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, c.n_dom, c.n_head_kv);
    op.weight     = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, c.n_dom, c.n_head_kv);
    op.ranges     = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2 * FASA_MAX_RANGES, c.n_stream);
    op.forced     = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, c.n_forced, c.n_tokens, c.n_stream);
    op.k_dom_type = c.k_dom;
    op.n_hadamard = c.n_hadamard;
    op.scale = fac.scale = c.scale;
    op.soft_cap = fac.soft_cap = c.soft_cap;
    op.params.budget           = c.budget;
    op.params.mass             = c.mass;
    op.params.floor            = c.floor;
    op.params.cap              = c.cap;
    op.params.per_head         = c.per_head;
    fac.v                      = ggml_new_tensor_4d(kv_ctx, type_v, c.n_embd_head_v, c.n_head_kv, c.n_kv, c.n_stream);
    fac.sinks                  = c.sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.n_head) : nullptr;
    if (c.mode == FASA_MODE_HOST) {
        const fasa_row_layout row(type_k, type_v, c.n_embd_head_k, c.n_embd_head_v);
        const int64_t length = fasa_list_length(op.params, c.n_forced, c.n_kv),
                      n_list = c.per_head ? c.n_head : c.n_head_kv;
        fixed.rows           = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, fasa_rows_bytes(row, length, n_list));
        fixed.row_cache      = c.row_slots ?
            ggml_new_tensor_4d(ctx, GGML_TYPE_I8, FASA_ROW_HEAD + row.stride, c.row_slots, c.n_head_kv, c.n_stream) :
            nullptr;
    }
}

ggml_tensor * fasa_op_layer_case::build_select(ggml_context * ctx) {
    select.layer = &fixed;
    return fasa_build_select(ctx, select);
}

ggml_tensor * fasa_op_layer_case::build_fac(ggml_context * ctx, ggml_tensor * list) {
    fac.list   = list;
    fac.q      = select.q;
    fac.k      = select.k;
    fac.mask   = select.mask;
    fac.ranges = select.ranges;
    fac.layer  = &fixed;
    return fasa_build_fac(ctx, fac);
}

// memory for k and v
static ggml_backend_buffer_t fasa_op_alloc_kv(const fasa_op_case & c, ggml_context * kv_ctx, ggml_backend_t backend) {
    const auto buft = ggml_backend_get_default_buffer_type(backend);
    fasa_set_mode(c.mode);
    const auto placed = fasa_kv_buft(ggml_backend_get_device(backend), buft);
    fasa_set_mode(FASA_MODE_DEVICE);
    return c.mode == FASA_MODE_HOST && placed == buft ? nullptr :
                                                          ggml_backend_alloc_ctx_tensors_from_buft(kv_ctx, placed);
}

// the tensors and nodes of a case on one backend
struct fasa_op_run_graph {
    ggml_backend_ptr backend;
    ggml_context_ptr ctx, kv_ctx;
    ggml_backend_buffer_ptr buf, kv_buf;
    fasa_op_layer_case layer;
    ggml_tensor *tip = nullptr, *select = nullptr, *fac = nullptr;

    int init(const fasa_op_case & c, const char * name, int scores, ggml_type type_k, ggml_type type_v);
    int compute(std::initializer_list<ggml_tensor *> steps); // with a row cache twice, the second time without ranges

private:
    int run(std::initializer_list<ggml_tensor *> steps);
    void set_inputs(const fasa_op_case & c);
};

int fasa_op_run_graph::init(
    const fasa_op_case & given, const char * name, int scores, ggml_type type_k, ggml_type type_v) {
    backend.reset(ggml_backend_init_by_name(name, nullptr));
    if (!backend) {
        return fasa_set_error("fasa_op_case: there is no backend %s", name);
    }
    const bool on_cpu = ggml_backend_is_cpu(backend.get());
    fasa_op_case c    = given;
    if (on_cpu) {
        ggml_backend_cpu_set_n_threads(backend.get(), c.n_threads);
        c.mode = FASA_MODE_DEVICE; // which this is
    }
    ctx.reset(ggml_init(
        { 64 * ggml_tensor_overhead() + 2 * ggml_graph_overhead(), nullptr, true })); // compute makes up to two
    kv_ctx.reset(ggml_init({ 4 * ggml_tensor_overhead(), nullptr, true }));
    layer.make(c, type_k, type_v, ctx.get(), kv_ctx.get());
    layer.fixed.work    = on_cpu ? nullptr : ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, sizeof(fasa_work));
    layer.select.scores = scores;
    select              = layer.build_select(ctx.get());
    tip                 = select->src[0];
    fac                 = layer.build_fac(ctx.get(), select);

    for (ggml_tensor * t : { tip, select, fac }) {
        if (!ggml_backend_supports_op(backend.get(), t)) {
            return fasa_set_error(
                "fasa_op_case: backend %s does not support %s for these shapes and types", name, t->name);
        }
    }
    buf.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
    kv_buf.reset(fasa_op_alloc_kv(c, kv_ctx.get(), backend.get()));
    if (!buf || !kv_buf) {
        return fasa_set_error("fasa_op_case: out of memory, or the device has no mode %d", c.mode);
    }
    set_inputs(c);
    return 0;
}

void fasa_op_run_graph::set_inputs(const fasa_op_case & c) {
    const auto & op = layer.select;
    ggml_backend_buffer_clear(buf.get(), 0xff); // poison: outputs that nobody writes show as NaN or -1
    if (layer.fixed.work) {
        ggml_backend_tensor_memset(layer.fixed.work, 0, 0, ggml_nbytes(layer.fixed.work));
    }
    if (layer.fixed.row_cache) {
        ggml_backend_tensor_memset(layer.fixed.row_cache, 0, 0, ggml_nbytes(layer.fixed.row_cache));
    }
    const auto set = [](ggml_tensor * t, const void * data) {
        ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
    };
    const int64_t n_row = (int64_t) c.n_kv * c.n_stream * c.n_head_kv;
    set(op.q, c.q);
    set(op.k, fasa_convert(c.k, op.k->type, n_row, c.n_embd_head_k).data());
    set(layer.fac.v, fasa_convert(c.v, layer.fac.v->type, n_row, c.n_embd_head_v).data());
    set(op.mask, fasa_convert(c.mask, GGML_TYPE_F16, (int64_t) c.n_tokens * c.n_stream, c.n_kv).data());
    set(op.dims, c.dims);
    set(op.weight, c.weight);
    set(op.forced, c.forced);
    if (layer.fac.sinks) {
        set(layer.fac.sinks, c.sinks);
    }
    std::vector<int32_t> ranges(ggml_nelements(op.ranges), 0);
    for (int s = 0; s < c.n_stream; ++s) { // two ranges that meet: all cells
        ranges[s * 2 * FASA_MAX_RANGES + 1] = ranges[s * 2 * FASA_MAX_RANGES + 2] = c.n_kv / 3;
        ranges[s * 2 * FASA_MAX_RANGES + 3]                                       = c.n_kv;
    }
    set(op.ranges, ranges.data());
}

int fasa_op_run_graph::compute(std::initializer_list<ggml_tensor *> steps) {
    if (layer.fixed.row_cache) {
        if (run(steps) != 0) {
            return -1;
        }
        ggml_backend_tensor_memset(layer.select.ranges, 0, 0, ggml_nbytes(layer.select.ranges));
    }
    return run(steps);
}

int fasa_op_run_graph::run(std::initializer_list<ggml_tensor *> steps) {
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    for (ggml_tensor * step : steps) {
        step->flags |= GGML_TENSOR_FLAG_COMPUTE;
        ggml_graph_add_node(graph, step);
    }
    if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
        return fasa_set_error("fasa_op_case: the graph failed on %s", ggml_backend_name(backend.get()));
    }
    return 0;
}

// logits from a TIP row's spans
static void fasa_op_run_logits(const std::vector<float> & tip, int64_t length, int64_t n_kv, float * out) {
    for (size_t i = 0; i < tip.size() / length; ++i) {
        const float * e = tip.data() + i * length;
        for (int64_t j = 0; j < n_kv; ++j) {
            out[i * n_kv + j] = e[j] < 0 ? -INFINITY : logf(e[j]) + e[n_kv + j / FASA_SPAN] * 0.69314718f;
        }
    }
}

static int fasa_op_check(const fasa_op_case * c, ggml_type & type_k, ggml_type & type_v) {
    if (c == nullptr || c->size != sizeof(*c)) {
        return fasa_set_error("fasa_op_case: the header and the library differ");
    }
    if (!fasa_type_by_name(c->type_k, type_k) || !fasa_type_by_name(c->type_v, type_v)) {
        return fasa_set_error("fasa_op_case: unknown cache type %s or %s", c->type_k, c->type_v);
    }
    if (c->row_slots < 0 || c->row_slots % FASA_ROW_WAYS != 0) {
        return fasa_set_error("fasa_op_case: row_slots %d must be a multiple of %d", c->row_slots, FASA_ROW_WAYS);
    }
    if (c->n_dom < 1 || c->n_dom % FASA_GROUP != 0 || c->n_head_kv < 1 || c->n_head % c->n_head_kv != 0 ||
        c->n_forced < 1 || c->n_kv < 1 || c->n_tokens < 1 || c->n_stream < 1) {
        return fasa_set_error("fasa_op_case: n_dom %d must be a multiple of %d, n_head %d of n_head_kv %d, and "
                              "n_forced, n_kv, n_tokens, n_stream at least 1",
            c->n_dom, FASA_GROUP, c->n_head, c->n_head_kv);
    }
    return 0;
}

// On a device contexts do not keep the scores, which is another kernel where they fit in shared memory: it must take
// the same cells.
static int fasa_op_run_as_contexts(
    const fasa_op_case & c, ggml_type type_k, ggml_type type_v, const std::vector<int32_t> & kept) {
    fasa_op_run_graph run;
    if (run.init(c, c.backend, 0, type_k, type_v) != 0 || run.compute({ run.tip, run.select }) != 0) {
        return -1;
    }
    std::vector<int32_t> lists(kept.size());
    ggml_backend_tensor_get(run.select, lists.data(), 0, ggml_nbytes(run.select));
    const size_t length = run.select->ne[0];
    for (size_t i = 0; i < lists.size(); i += length) {
        if (lists[i] != kept[i] || !std::equal(&lists[i], &lists[i] + 1 + kept[i], &kept[i])) {
            return fasa_set_error(
                "fasa_op_run: list %zu on %s has other cells when the scores are not kept", i / length, c.backend);
        }
    }
    return 0;
}

int fasa_op_run(const fasa_op_case * c) {
    ggml_type type_k, type_v;
    if (fasa_op_check(c, type_k, type_v) != 0) {
        return -1;
    }
    const bool given = c->tip_backend && strcmp(c->tip_backend, c->backend) != 0;
    fasa_op_run_graph run, tip_run;
    if (run.init(*c, c->backend, given ? FASA_SCORES_GIVEN : FASA_SCORES_KEPT, type_k, type_v) != 0) {
        return -1;
    }
    ggml_tensor *tip = run.tip, *select = run.select, *fac = run.fac;
    std::vector<float> scores(ggml_nelements(tip));
    if (given) {
        if (tip_run.init(*c, c->tip_backend, FASA_SCORES_KEPT, type_k, type_v) != 0 ||
            tip_run.compute({ tip_run.tip }) != 0) {
            return -1;
        }
        ggml_backend_tensor_get(tip_run.tip, scores.data(), 0, ggml_nbytes(tip));
        ggml_backend_tensor_set(tip, scores.data(), 0, ggml_nbytes(tip));
        if (run.compute({ select, fac }) != 0) {
            return -1;
        }
    } else if (run.compute({ tip, select, fac }) != 0) {
        return -1;
    }

    const auto get = [](ggml_tensor * t, void * data) {
        if (data) {
            ggml_backend_tensor_get(t, data, 0, ggml_nbytes(t));
        }
    };
    get(fac, c->out);
    if (c->out_est) {
        get(tip, scores.data());
        fasa_op_run_logits(scores, tip->ne[0], c->n_kv, c->out_est);
    }
    std::vector<int32_t> lists(ggml_nelements(select));
    get(select, lists.data());
    if (run.layer.fixed.work && !given && fasa_op_run_as_contexts(*c, type_k, type_v, lists) != 0) {
        return -1;
    }
    const int64_t length = select->ne[0] - 1;
    for (int64_t i = 0; i < (int64_t) lists.size() / (length + 1); ++i) {
        const int32_t * list = lists.data() + i * (length + 1);
        if (c->out_count) {
            c->out_count[i] = list[0];
        }
        for (int64_t j = 0; c->out_list && j < length; ++j) {
            c->out_list[i * length + j] = j < list[0] ? list[1 + j] : -1;
        }
    }
    return 0;
}

// ---- time ----

static constexpr int64_t FASA_TIME_CELLS = 16384; // that the caller gives

// rows of a cache tensor from those given, every FASA_TIME_CELLS cells from another row on
static void fasa_op_time_fill(ggml_tensor * t, const std::vector<uint8_t> & rows, size_t seed) {
    const int64_t n_cell = t->ne[2] * t->ne[3];
    for (int64_t cell = 0; cell < n_cell;) {
        const int64_t from = (seed++ * 389) % FASA_TIME_CELLS, n = std::min(FASA_TIME_CELLS - from, n_cell - cell);
        ggml_backend_tensor_set(t, rows.data() + from * t->nb[2], cell * t->nb[2], n * t->nb[2]);
        cell += n;
    }
}

enum fasa_op_time_kind { FASA_TIME_DENSE, FASA_TIME_SELECT, FASA_TIME_FASA };

// seconds a layer of a graph of these ops, the fastest of n_rep; its nodes share memory as in a model's graph. -1: out
// of memory
static double fasa_op_time_graph(
    ggml_backend_t backend, std::vector<fasa_op_layer_case> & layers, fasa_op_time_kind kind, int n_rep) {
    ggml_context_ptr ctx(
        ggml_init({ (8 * layers.size() + 8) * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    for (auto & layer : layers) {
        const auto & op        = layer.select;
        const int64_t n_stream = op.k->ne[3];
        if (kind == FASA_TIME_DENSE) {
            ggml_tensor * q =
                ggml_reshape_4d(ctx.get(), op.q, op.q->ne[0], op.q->ne[1], op.q->ne[2] / n_stream, n_stream);
            ggml_build_forward_expand(graph,
                ggml_flash_attn_ext(ctx.get(), ggml_permute(ctx.get(), q, 0, 2, 1, 3),
                    ggml_permute(ctx.get(), op.k, 0, 2, 1, 3), ggml_permute(ctx.get(), layer.fac.v, 0, 2, 1, 3),
                    op.mask, op.scale, 0.0f, op.soft_cap));
        } else {
            ggml_tensor * select = layer.build_select(ctx.get());
            ggml_build_forward_expand(graph, kind == FASA_TIME_SELECT ? select : layer.build_fac(ctx.get(), select));
        }
    }
    ggml_gallocr_ptr alloc(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
    if (!ggml_gallocr_alloc_graph(alloc.get(), graph)) {
        return -1.0;
    }
    double best = INFINITY;
    for (int i = 0; i < n_rep + 3; ++i) { // a device captures its graph in the first runs
        const auto start = std::chrono::steady_clock::now();
        ggml_backend_graph_compute(backend, graph);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        best                                     = i < 3 ? best : std::min(best, took.count());
    }
    return best / layers.size();
}

int fasa_op_time(const fasa_op_case * c, int32_t n_layer, int32_t n_rep, fasa_op_times * times) {
    ggml_type type_k, type_v;
    if (fasa_op_check(c, type_k, type_v) != 0) {
        return -1;
    }
    if (times == nullptr || times->size != sizeof(*times) || n_layer < 1 || n_layer > 100 || n_rep < 1) {
        return fasa_set_error(
            "fasa_op_time: the header and the library differ, or n_layer (1 to 100) or n_rep (from 1) is out of range");
    }
    ggml_backend_ptr backend(ggml_backend_init_by_name(c->backend, nullptr));
    if (!backend) {
        return fasa_set_error("fasa_op_time: there is no backend %s", c->backend);
    }
    const bool on_cpu = ggml_backend_is_cpu(backend.get());
    if (on_cpu) {
        ggml_backend_cpu_set_n_threads(backend.get(), c->n_threads);
    }
    ggml_context_ptr ctx(ggml_init({ (16 * (size_t) n_layer + 1) * ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor * work = on_cpu ? nullptr : ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, sizeof(fasa_work));
    ggml_context_ptr kv_ctx(ggml_init({ 2 * (size_t) n_layer * ggml_tensor_overhead(), nullptr, true }));
    std::vector<fasa_op_layer_case> layers(n_layer);
    for (auto & layer : layers) {
        layer.make(*c, type_k, type_v, ctx.get(), kv_ctx.get());
        layer.fixed.work = work;
    }
    ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get())),
        kv_buf(fasa_op_alloc_kv(*c, kv_ctx.get(), backend.get()));
    if (!buf || !kv_buf) {
        return fasa_set_error("fasa_op_time: out of memory, or the device has no mode %d", c->mode);
    }
    ggml_backend_buffer_clear(buf.get(), 0);

    const auto k = fasa_convert(c->k, type_k, FASA_TIME_CELLS * c->n_head_kv, c->n_embd_head_k);
    const auto v = fasa_convert(c->v, type_v, FASA_TIME_CELLS * c->n_head_kv, c->n_embd_head_v);
    std::vector<int32_t> all(2 * FASA_MAX_RANGES * c->n_stream, 0);
    for (int s = 0; s < c->n_stream; ++s) {
        all[s * 2 * FASA_MAX_RANGES + 1] = c->n_kv;
    }
    const auto set = [](ggml_tensor * t, const void * data) {
        ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
    };
    for (int i = 0; i < n_layer; ++i) {
        fasa_op_time_fill(layers[i].select.k, k, 7 * i);
        fasa_op_time_fill(layers[i].fac.v, v, 7 * i + 3);
        set(layers[i].select.q, c->q);
        set(layers[i].select.dims, c->dims);
        set(layers[i].select.weight, c->weight);
        set(layers[i].select.forced, c->forced);
        set(layers[i].select.ranges, all.data());
    }
    fasa_op_time_graph(backend.get(), layers, FASA_TIME_SELECT, 1); // derives the dominant keys
    for (auto & layer : layers) {
        ggml_backend_tensor_memset(layer.select.ranges, 0, 0, ggml_nbytes(layer.select.ranges));
    }
    times->dense  = fasa_op_time_graph(backend.get(), layers, FASA_TIME_DENSE, n_rep);
    times->select = fasa_op_time_graph(backend.get(), layers, FASA_TIME_SELECT, n_rep);
    times->fasa   = fasa_op_time_graph(backend.get(), layers, FASA_TIME_FASA, n_rep);
    return std::min({ times->dense, times->select, times->fasa }) < 0 ? fasa_set_error("fasa_op_time: out of memory") :
                                                                        0;
}
