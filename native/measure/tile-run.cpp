// fasa_tile_run: the ops of sparse prefill of one layer on arrays of the caller, for tests against
// fasa_gguf/reference_prefill.py.

#include "core/error.h"
#include "core/select.h"
#include "measure/op-case.h"
#include "measure/threads.h"
#include "ops/tile.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <vector>

static int fasa_tile_check(const fasa_tile_case & c) {
    const fasa_op_case & op = *c.op;
    if (fasa_check_given(c.tiles, "tiles") != 0 || fasa_check_given(c.cell_pos, "cell_pos") != 0 ||
        fasa_check_given(c.own, "own") != 0 || fasa_check_range("n_tile", c.n_tile, 1, 1 << 20) != 0 ||
        fasa_check_range("tile_size", c.tile_size, 1, 1 << 20) != 0) {
        return -1;
    }
    if (op.list) {
        return fasa_set_error("fasa_tile_case: expected no list");
    }
    for (int64_t i = 0; i < c.n_tile; ++i) {
        const int32_t * tile = c.tiles + i * (2 + 2 * (int64_t) c.tile_size);
        bool fits            = tile[0] >= 0 && tile[0] < op.n_stream && tile[1] >= 0 && tile[1] <= c.tile_size;
        for (int32_t t = 0; fits && t < tile[1]; ++t) {
            fits = tile[2 + t] >= 0 && tile[2 + t] / op.n_tokens == tile[0];
        }
        if (!fits) {
            return fasa_set_error("fasa_tile_case: tile %lld names a stream or a token that the case does not have, or "
                                  "more than tile_size %d of them",
                (long long) i, c.tile_size);
        }
    }
    return 0;
}

// the tensors and nodes of a case on one backend
struct fasa_tile_run_graph {
    ggml_backend_ptr backend;
    ggml_context_ptr ctx, kv_ctx;
    ggml_backend_buffer_ptr buf, kv_buf;
    fasa_op_layer_case layer;
    fasa_tile_inputs in = {};
    ggml_tensor *select = nullptr, *tip = nullptr, *fac = nullptr;

    int init(const fasa_tile_case & c, const char * name, ggml_type type_k, ggml_type type_v);
    int compute(std::initializer_list<ggml_tensor *> nodes);
    // [n_tile, n_list, n_kv] of a TIP that was computed: the heads of a list added up
    std::vector<float> scores() const;

private:
    int build(const fasa_tile_case & c);
    void write_view(const fasa_tile_case & c) const;
};

int fasa_tile_run_graph::init(const fasa_tile_case & c, const char * name, ggml_type type_k, ggml_type type_v) {
    backend.reset(ggml_backend_init_by_name(name, nullptr));
    if (!backend) {
        return fasa_set_error("fasa_tile_case: there is no backend %s", name);
    }
    fasa_op_case op   = *c.op;
    const bool on_cpu = fasa_cpu_set_threads(backend.get(), op.n_threads);
    if (on_cpu) {
        op.mode = FASA_MODE_DEVICE; // host memory is the CPU's own
    }
    ctx.reset(ggml_init({ 64 * ggml_tensor_overhead() + 2 * ggml_graph_overhead(), nullptr, true }));
    kv_ctx.reset(ggml_init({ 4 * ggml_tensor_overhead(), nullptr, true }));
    layer.make(op, type_k, type_v, ctx.get(), kv_ctx.get());
    layer.fixed.work = on_cpu ? nullptr : ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, sizeof(fasa_work));
    if (build(c) != 0) {
        return -1;
    }
    buf.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
    kv_buf.reset(fasa_op_alloc_kv(op, kv_ctx.get(), backend.get()));
    if (!buf || !kv_buf) {
        return fasa_set_error("fasa_tile_case: out of memory, or the device has no mode %d", op.mode);
    }
    ggml_backend_buffer_clear(buf.get(), 0xff); // poison, as in fasa_op_run
    for (ggml_tensor * t : { layer.fixed.work, layer.fixed.row_cache }) {
        if (t) {
            ggml_backend_tensor_memset(t, 0, 0, ggml_nbytes(t));
        }
    }
    layer.write(op);
    fasa_case_write(in.tiles, c.tiles);
    fasa_case_write(in.forced, op.forced);
    write_view(c);
    return 0;
}

void fasa_tile_run_graph::write_view(const fasa_tile_case & c) const {
    const int64_t n_kv = c.op->n_kv, n_row = in.view->ne[0];
    std::vector<int32_t> pos(ggml_nelements(in.cell_pos), 0);
    for (int64_t s = 0; s < c.op->n_stream; ++s) {
        std::copy_n(c.cell_pos + s * n_kv, n_kv, pos.data() + s * n_row);
    }
    std::vector<int8_t> view(ggml_nelements(in.view), FASA_SEEN_BY_NONE);
    for (int64_t i = 0; i < c.n_tile; ++i) {
        const int32_t *tile = c.tiles + i * (2 + 2 * (int64_t) c.tile_size), *at = tile + 2 + c.tile_size,
                      *of        = c.cell_pos + tile[0] * n_kv;
        const auto [first, last] = std::minmax_element(at, at + tile[1]);
        for (int64_t j = 0; tile[1] > 0 && j < n_kv; ++j) {
            view[i * n_row + j] =
                c.own[i * n_kv + j] && of[j] >= 0 ? fasa_seen_at(of[j], *first, *last) : FASA_SEEN_BY_NONE;
        }
    }
    fasa_case_write(in.cell_pos, pos.data());
    fasa_case_write(in.view, view.data());
}

int fasa_tile_run_graph::build(const fasa_tile_case & c) {
    layer.select.layer  = &layer.fixed;
    const int64_t n_row = fasa_n_span(c.op->n_kv) * FASA_SPAN;
    in.tiles            = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 2 + 2 * (int64_t) c.tile_size, c.n_tile);
    in.forced           = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, c.op->n_forced, c.n_tile);
    in.view             = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I8, n_row, c.n_tile);
    in.cell_pos         = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, n_row, c.op->n_stream);
    select              = fasa_build_tile_select(ctx.get(), layer.select, in);
    tip                 = select->src[0];
    layer.build_fac(ctx.get(), select); // fills layer.fac
    fac = fasa_build_tile_fac(ctx.get(), layer.fac, in);
    for (ggml_tensor * t : { tip->src[0], tip, select, fac }) {
        if (!ggml_backend_supports_op(backend.get(), t)) {
            return fasa_set_error("fasa_tile_case: backend %s does not support %s for these shapes and types",
                ggml_backend_name(backend.get()), t->name);
        }
    }
    return 0;
}

int fasa_tile_run_graph::compute(std::initializer_list<ggml_tensor *> nodes) {
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    for (ggml_tensor * node : nodes) {
        node->flags |= GGML_TENSOR_FLAG_COMPUTE;
        ggml_graph_add_node(graph, node);
    }
    if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
        return fasa_set_error("fasa_tile_case: the graph failed on %s", ggml_backend_name(backend.get()));
    }
    return 0;
}

std::vector<float> fasa_tile_run_graph::scores() const {
    std::vector<float> x(ggml_nelements(tip)), sums(tip->ne[0] * ggml_nrows(select));
    ggml_backend_tensor_get(tip, x.data(), 0, ggml_nbytes(tip));
    const int64_t n_kv = tip->ne[0], n_add = ggml_nrows(tip) / ggml_nrows(select);
    for (int64_t i = 0; i < ggml_nrows(tip) * n_kv; ++i) { // in SELECT's order
        sums[i / n_kv / n_add * n_kv + i % n_kv] += x[i];
    }
    return sums;
}

// out [n_tile, n_head, n_kv]; on a device TIP has the sum over a list's heads, which is given as its first one's
static void fasa_tile_get_scores(const fasa_tile_run_graph & run, float * out) {
    const int64_t n_kv = run.tip->ne[0], n_row = ggml_nrows(run.tip), n_head = run.layer.select.q->ne[1];
    const int64_t n_each = n_head * run.tip->ne[2] / n_row;
    std::vector<float> x(ggml_nelements(run.tip));
    ggml_backend_tensor_get(run.tip, x.data(), 0, ggml_nbytes(run.tip));
    std::fill(out, out + n_row * n_each * n_kv, 0.0f);
    for (int64_t i = 0; i < n_row; ++i) {
        std::copy(&x[i * n_kv], &x[i * n_kv] + n_kv, out + i * n_each * n_kv);
    }
}

static int fasa_tile_run_case(const fasa_tile_case * c) {
    if (fasa_check_size(c, "fasa_tile_case") != 0) {
        return -1;
    }
    ggml_type type_k, type_v;
    if (fasa_op_check(c->op, type_k, type_v) != 0 || fasa_tile_check(*c) != 0) {
        return -1;
    }
    const fasa_op_case & op = *c->op;
    fasa_tile_run_graph run;
    if (run.init(*c, op.backend, type_k, type_v) != 0 || run.compute({ run.tip->src[0], run.tip }) != 0) {
        return -1;
    }
    if (c->out_score) {
        fasa_tile_get_scores(run, c->out_score);
    }
    if (op.tip_backend && strcmp(op.tip_backend, op.backend) != 0) {
        fasa_tile_run_graph other;
        if (other.init(*c, op.tip_backend, type_k, type_v) != 0 ||
            other.compute({ other.tip->src[0], other.tip }) != 0) {
            return -1;
        }
        const auto scores = other.scores();
        if (scores.size() != (size_t) ggml_nelements(run.tip)) {
            return fasa_set_error("fasa_tile_case: scores can be given to a device only");
        }
        fasa_case_write(run.tip, scores.data());
    }
    if (run.compute({ run.select, run.fac }) != 0) {
        return -1;
    }
    if (op.out) {
        ggml_backend_tensor_get(run.fac, op.out, 0, ggml_nbytes(run.fac));
    }
    std::vector<int32_t> lists(ggml_nelements(run.select));
    ggml_backend_tensor_get(run.select, lists.data(), 0, ggml_nbytes(run.select));
    fasa_op_get_lists(lists, run.select->ne[0] - 1, op.out_count, op.out_list);
    return 0;
}

int fasa_tile_run(const fasa_tile_case * c) {
    return fasa_guard("fasa_tile_run", [&] { return fasa_tile_run_case(c); });
}
