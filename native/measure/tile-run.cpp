// fasa_tile_run: the ops of sparse prefill of one layer on arrays of the caller, for tests against
// fasa_gguf/reference_prefill.py.

#include "core/error.h"
#include "core/select.h"
#include "measure/op-case.h"
#include "ops/tile.h"

#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cstring>
#include <vector>

static int fasa_tile_check(const fasa_tile_case & c) {
    const fasa_op_case & op = *c.op;
    if (fasa_check_given(c.tiles, "tiles") != 0 || fasa_check_given(op.mask, "mask") != 0 ||
        fasa_check_range("n_tile", c.n_tile, 1, 1 << 20) != 0 ||
        fasa_check_range("tile_size", c.tile_size, 1, 1 << 20) != 0) {
        return -1;
    }
    if (op.list || op.mode != FASA_MODE_DEVICE) {
        return fasa_set_error("fasa_tile_case: expected no list, and mode %d", FASA_MODE_DEVICE);
    }
    for (int64_t i = 0; i < c.n_tile; ++i) {
        const int32_t * tile = c.tiles + i * (2 + (int64_t) c.tile_size);
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

static int fasa_tile_run_case(const fasa_tile_case * c) {
    if (fasa_check_size(c, "fasa_tile_case") != 0) {
        return -1;
    }
    ggml_type type_k, type_v;
    if (fasa_op_check(c->op, type_k, type_v) != 0 || fasa_tile_check(*c) != 0) {
        return -1;
    }
    const fasa_op_case & op = *c->op;
    ggml_backend_ptr backend(ggml_backend_init_by_name("CPU", nullptr));
    ggml_backend_cpu_set_n_threads(backend.get(), op.n_threads);
    ggml_context_ptr ctx(ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    fasa_op_layer_case layer;
    layer.make(op, type_k, type_v, ctx.get(), ctx.get());
    layer.select.layer  = &layer.fixed;
    fasa_tile_inputs in = {};
    in.tiles            = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 2 + (int64_t) c->tile_size, c->n_tile);
    in.forced           = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, op.n_forced, c->n_tile);
    in.view             = fasa_build_tile_view(ctx.get(), layer.select.mask, in.tiles);
    ggml_tensor *select = fasa_build_tile_select(ctx.get(), layer.select, in), *tip = select->src[0];
    layer.build_fac(ctx.get(), select); // fills layer.fac
    ggml_tensor * fac = fasa_build_tile_fac(ctx.get(), layer.fac, in);

    ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
    if (!buf) {
        return fasa_set_error("fasa_tile_case: out of memory");
    }
    ggml_backend_buffer_clear(buf.get(), 0xff); // poison, as in fasa_op_run
    layer.write(op);
    fasa_case_write(in.tiles, c->tiles);
    fasa_case_write(in.forced, op.forced);
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    for (ggml_tensor * node : { in.view, tip->src[0], tip, select, fac }) {
        node->flags |= GGML_TENSOR_FLAG_COMPUTE;
        ggml_graph_add_node(graph, node);
    }
    if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
        return fasa_set_error("fasa_tile_case: the graph failed");
    }
    if (c->out_score) {
        ggml_backend_tensor_get(tip, c->out_score, 0, ggml_nbytes(tip));
    }
    if (op.out) {
        ggml_backend_tensor_get(fac, op.out, 0, ggml_nbytes(fac));
    }
    std::vector<int32_t> lists(ggml_nelements(select));
    ggml_backend_tensor_get(select, lists.data(), 0, ggml_nbytes(select));
    fasa_op_get_lists(lists, select->ne[0] - 1, op.out_count, op.out_list);
    return 0;
}

int fasa_tile_run(const fasa_tile_case * c) {
    return fasa_guard("fasa_tile_run", [&] { return fasa_tile_run_case(c); });
}
