// fasa_op_run: the ops of one layer on arrays of the caller, for tests against fasa_gguf/reference.py.

#include "fasa-error.h"
#include "fasa-ops.h"
#include "fasa-select.h"

#include "ggml-cpp.h"
#include "ggml-cpu.h"

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
    std::vector<uint8_t> out(ggml_row_size(type, n_per_row)*n_row);
    if (type == GGML_TYPE_F32) {
        memcpy(out.data(), x, out.size());
    } else {
        ggml_quantize_chunk(type, x, out.data(), 0, n_row, n_per_row, nullptr);
    }
    return out;
}

int fasa_op_run(const fasa_op_case * c) {
    if (c == nullptr || c->size != sizeof(*c)) {
        return fasa_set_error("fasa_op_case: the header and the library differ");
    }
    ggml_type type_k, type_v;
    if (!fasa_type_by_name(c->type_k, type_k) || !fasa_type_by_name(c->type_v, type_v)) {
        return fasa_set_error("fasa_op_case: unknown cache type %s or %s", c->type_k, c->type_v);
    }
    if (c->n_dom % FASA_GROUP != 0 || c->n_head % c->n_head_kv != 0 || c->n_forced < 1 || c->n_tokens < 1 || c->n_stream < 1) {
        return fasa_set_error("fasa_op_case: n_dom %d must be a multiple of %d, n_head %d of n_head_kv %d, and n_forced, n_tokens, n_stream at least 1",
                c->n_dom, FASA_GROUP, c->n_head, c->n_head_kv);
    }
    ggml_backend_ptr backend(ggml_backend_init_by_name(c->backend, nullptr));
    if (!backend) {
        return fasa_set_error("fasa_op_case: there is no backend %s", c->backend);
    }
    if (ggml_backend_is_cpu(backend.get())) {
        ggml_backend_cpu_set_n_threads(backend.get(), c->n_threads);
    }

    ggml_context_ptr ctx(ggml_init({ 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    const int64_t n_tile = (c->n_kv + FASA_TILE - 1)/FASA_TILE;

    fasa_layer_op op = {};
    op.q      = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, c->n_embd_head_k, c->n_head, (int64_t) c->n_tokens*c->n_stream);
    op.k      = ggml_new_tensor_4d(ctx.get(), type_k, c->n_embd_head_k, c->n_head_kv, c->n_kv, c->n_stream);
    op.v      = ggml_new_tensor_4d(ctx.get(), type_v, c->n_embd_head_v, c->n_head_kv, c->n_kv, c->n_stream);
    op.mask   = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, c->n_kv, c->n_tokens, 1, c->n_stream);
    op.sinks  = c->sinks ? ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, c->n_head) : nullptr;
    op.k_dom  = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_I8, fasa_block_bytes(c->k_dom, c->n_dom), n_tile, c->n_head_kv, c->n_stream);
    op.dims   = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, c->n_dom, c->n_head_kv);
    op.weight = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, c->n_dom, c->n_head_kv);
    op.ranges = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 2*FASA_MAX_RANGES, c->n_stream);
    op.forced = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_I32, c->n_forced, c->n_tokens, c->n_stream);
    op.k_dom_type   = c->k_dom;
    op.n_hadamard   = c->n_hadamard;
    op.scale        = c->scale;
    op.soft_cap     = c->soft_cap;
    op.budget       = c->budget;
    op.params.mass  = c->mass;
    op.params.floor = c->floor;
    op.params.cap   = c->cap;
    op.params.per_head = c->per_head;
    op.params.hard     = c->hard;

    const fasa_layer_nodes nodes = fasa_build_layer(ctx.get(), op, nullptr);
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, nodes.fac);
    for (ggml_tensor * t : { nodes.tip, nodes.select, nodes.fac }) {
        if (!ggml_backend_supports_op(backend.get(), t)) {
            return fasa_set_error("fasa_op_case: backend %s does not support %s for these shapes and types", c->backend, t->name);
        }
    }
    ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
    if (!buf) {
        return fasa_set_error("fasa_op_case: out of memory");
    }
    ggml_backend_buffer_clear(buf.get(), 0xff); // poison: outputs that nobody writes show as NaN or -1

    const auto set = [](ggml_tensor * t, const void * data) { ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t)); };
    const int64_t n_row = (int64_t) c->n_kv*c->n_stream*c->n_head_kv;
    set(op.q, c->q);
    set(op.k, fasa_convert(c->k, type_k, n_row, c->n_embd_head_k).data());
    set(op.v, fasa_convert(c->v, type_v, n_row, c->n_embd_head_v).data());
    set(op.mask, fasa_convert(c->mask, GGML_TYPE_F16, (int64_t) c->n_tokens*c->n_stream, c->n_kv).data());
    set(op.dims, c->dims);
    set(op.weight, c->weight);
    set(op.forced, c->forced);
    if (op.sinks) {
        set(op.sinks, c->sinks);
    }
    std::vector<int32_t> ranges(ggml_nelements(op.ranges), 0);
    for (int s = 0; s < c->n_stream; ++s) { // two ranges that meet: all cells
        ranges[s*2*FASA_MAX_RANGES + 1] = ranges[s*2*FASA_MAX_RANGES + 2] = c->n_kv/3;
        ranges[s*2*FASA_MAX_RANGES + 3] = c->n_kv;
    }
    set(op.ranges, ranges.data());

    if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
        return fasa_set_error("fasa_op_case: the graph failed on %s", c->backend);
    }

    const auto get = [](ggml_tensor * t, void * data) { if (data) { ggml_backend_tensor_get(t, data, 0, ggml_nbytes(t)); } };
    get(nodes.fac, c->out);
    if (c->out_est) {
        std::vector<float> tip(ggml_nelements(nodes.tip));
        get(nodes.tip, tip.data());
        const int64_t n_row = ggml_nrows(nodes.tip);
        for (int64_t i = 0; i < n_row; ++i) {
            const float * e = tip.data() + i*nodes.tip->ne[0];
            for (int64_t j = 0; j < c->n_kv; ++j) {
                c->out_est[i*c->n_kv + j] = e[j] < 0 ? -INFINITY : logf(e[j]) + e[c->n_kv + j/FASA_SPAN]*0.69314718f;
            }
        }
    }
    std::vector<int32_t> lists(ggml_nelements(nodes.select));
    get(nodes.select, lists.data());
    const int64_t length = nodes.select->ne[0] - 1;
    for (int64_t i = 0; i < (int64_t) lists.size()/(length + 1); ++i) {
        const int32_t * list = lists.data() + i*(length + 1);
        if (c->out_count) {
            c->out_count[i] = list[0];
        }
        for (int64_t j = 0; c->out_list && j < length; ++j) {
            c->out_list[i*length + j] = j < list[0] ? list[1 + j] : -1;
        }
    }
    return 0;
}
