// fasa_op_run: the ops of one layer on arrays of the caller, for tests against fasa_gguf/reference.py.

#include "core/error.h"
#include "core/select.h"
#include "measure/op-case.h"
#include "measure/threads.h"
#include "ops/ops.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <vector>

// the tensors and nodes of a case on one backend
struct fasa_op_run_graph {
    ggml_backend_ptr backend;
    ggml_context_ptr ctx, kv_ctx;
    ggml_backend_buffer_ptr buf, kv_buf;
    fasa_op_layer_case layer;
    ggml_tensor *tip = nullptr, *select = nullptr; // nullptr: the case gives the list
    ggml_tensor *list = nullptr, *fac = nullptr;   // list: what FAC attends to

    int init(const fasa_op_case & c, const char * name, int scores, ggml_type type_k, ggml_type type_v);

    // Runs these nodes, and with a row cache runs them twice: no cell is stale the second time.
    int compute(std::initializer_list<ggml_tensor *> steps);

private:
    int run(std::initializer_list<ggml_tensor *> steps);
    int build(const char * name, int scores);
    void set_inputs(const fasa_op_case & c);
};

int fasa_op_run_graph::init(
    const fasa_op_case & given, const char * name, int scores, ggml_type type_k, ggml_type type_v) {
    backend.reset(ggml_backend_init_by_name(name, nullptr));
    if (!backend) {
        return fasa_set_error("fasa_op_case: there is no backend %s", name);
    }
    const bool on_cpu = fasa_cpu_set_threads(backend.get(), given.n_threads);
    fasa_op_case c    = given;
    if (on_cpu) {
        c.mode = FASA_MODE_DEVICE; // host memory is the CPU's own
    }
    // room for up to two graphs, which compute makes
    ctx.reset(ggml_init({ 64 * ggml_tensor_overhead() + 2 * ggml_graph_overhead(), nullptr, true }));
    kv_ctx.reset(ggml_init({ 4 * ggml_tensor_overhead(), nullptr, true }));
    layer.make(c, type_k, type_v, ctx.get(), kv_ctx.get());
    layer.fixed.work = on_cpu ? nullptr : ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, sizeof(fasa_work));
    if (build(name, scores) != 0) {
        return -1;
    }
    buf.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
    kv_buf.reset(fasa_op_alloc_kv(c, kv_ctx.get(), backend.get()));
    if (!buf || !kv_buf) {
        return fasa_set_error("fasa_op_case: out of memory, or the device has no mode %d", c.mode);
    }
    set_inputs(c);
    return 0;
}

int fasa_op_run_graph::build(const char * name, int scores) {
    list = layer.fac.list;
    if (list == nullptr) {
        layer.select.flags = scores;
        list = select = layer.build_select(ctx.get());
        tip           = select->src[0];
    }
    fac = layer.build_fac(ctx.get(), list);
    for (ggml_tensor * t : { tip, select, fac }) {
        if (t && !ggml_backend_supports_op(backend.get(), t)) {
            return fasa_set_error(
                "fasa_op_case: backend %s does not support %s for these shapes and types", name, t->name);
        }
    }
    return 0;
}

void fasa_op_run_graph::set_inputs(const fasa_op_case & c) {
    ggml_backend_buffer_clear(buf.get(), 0xff); // poison: outputs that nobody writes show as NaN or -1
    for (ggml_tensor * t : { layer.fixed.work, layer.fixed.row_cache }) {
        if (t) {
            ggml_backend_tensor_memset(t, 0, 0, ggml_nbytes(t));
        }
    }
    layer.write(c);
    const auto & op = layer.select;
    if (select == nullptr) {
        fasa_case_write(list, c.list);
    } else {
        fasa_case_write(op.forced, c.forced);
        if (op.fresh) {
            fasa_case_write(op.fresh, c.fresh);
        }
    }
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

// ---- outputs ----

static void fasa_case_read(ggml_tensor * t, void * data) {
    ggml_backend_tensor_get(t, data, 0, ggml_nbytes(t));
}

// out [n_row, n_kv]: the estimated logits, from TIP's exponentials and the exponents of their spans
static void fasa_op_get_logits(ggml_tensor * tip, int64_t n_kv, float * out) {
    std::vector<float> rows(ggml_nelements(tip));
    fasa_case_read(tip, rows.data());
    const int64_t length = tip->ne[0];
    for (size_t i = 0; i < rows.size() / length; ++i) {
        const float * e = rows.data() + i * length;
        for (int64_t j = 0; j < n_kv; ++j) {
            out[i * n_kv + j] = e[j] < 0 ? -INFINITY : logf(e[j]) + e[n_kv + j / FASA_SPAN] * 0.69314718f;
        }
    }
}

// ---- runs ----

// A context's nodes on a device do not keep the scores. Where these fit in shared memory that is another kernel, which
// must take the same cells as the one that keeps them.
static int fasa_op_run_as_contexts(
    const fasa_op_case & c, ggml_type type_k, ggml_type type_v, const std::vector<int32_t> & kept) {
    fasa_op_run_graph run;
    if (run.init(c, c.backend, 0, type_k, type_v) != 0 || run.compute({ run.tip, run.select }) != 0) {
        return -1;
    }
    std::vector<int32_t> lists(kept.size());
    fasa_case_read(run.select, lists.data());
    const size_t length = run.select->ne[0];
    for (size_t i = 0; i < lists.size(); i += length) {
        if (lists[i] != kept[i] || !std::equal(&lists[i], &lists[i] + 1 + kept[i], &kept[i])) {
            return fasa_set_error(
                "fasa_op_run: list %zu on %s has other cells when the scores are not kept", i / length, c.backend);
        }
    }
    return 0;
}

// all ops on the case's backend, or SELECT and FAC with the scores that TIP gives on tip_backend
static int fasa_op_run_steps(
    const fasa_op_case & c, fasa_op_run_graph & run, bool given, ggml_type type_k, ggml_type type_v) {
    if (run.init(c, c.backend, given ? FASA_SCORES_GIVEN : FASA_SCORES_KEPT, type_k, type_v) != 0) {
        return -1;
    }
    if (run.select == nullptr) {
        return run.compute({ run.fac });
    }
    if (!given) {
        return run.compute({ run.tip, run.select, run.fac });
    }
    fasa_op_run_graph tip_run;
    if (tip_run.init(c, c.tip_backend, FASA_SCORES_KEPT, type_k, type_v) != 0 ||
        tip_run.compute({ tip_run.tip }) != 0) {
        return -1;
    }
    std::vector<float> scores(ggml_nelements(run.tip));
    fasa_case_read(tip_run.tip, scores.data());
    fasa_case_write(run.tip, scores.data());
    return run.compute({ run.select, run.fac });
}

static int fasa_op_run_case(const fasa_op_case * c) {
    ggml_type type_k, type_v;
    if (fasa_op_check(c, type_k, type_v) != 0 || fasa_check_given(c->mask, "mask") != 0) {
        return -1;
    }
    if (c->list && c->out_est) {
        return fasa_set_error("fasa_op_run: there are no estimated logits (out_est) where the list is given");
    }
    const bool given = !c->list && c->tip_backend && strcmp(c->tip_backend, c->backend) != 0;
    fasa_op_run_graph run;
    if (fasa_op_run_steps(*c, run, given, type_k, type_v) != 0) {
        return -1;
    }
    if (c->out) {
        fasa_case_read(run.fac, c->out);
    }
    if (c->out_est) {
        fasa_op_get_logits(run.tip, c->n_kv, c->out_est);
    }
    std::vector<int32_t> lists(ggml_nelements(run.list));
    fasa_case_read(run.list, lists.data());
    if (run.layer.fixed.work && run.select && !given && fasa_op_run_as_contexts(*c, type_k, type_v, lists) != 0) {
        return -1;
    }
    fasa_op_get_lists(lists, run.list->ne[0] - 1, c->out_count, c->out_list);
    return 0;
}

int fasa_op_run(const fasa_op_case * c) {
    return fasa_guard("fasa_op_run", [&] { return fasa_op_run_case(c); });
}
