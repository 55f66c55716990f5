#include "measure/op-case.h"

#include "core/error.h"
#include "core/select.h"
#include "llama/cache.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

static bool fasa_type_by_name(const char * name, ggml_type & type) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        if (name && ggml_type_name((ggml_type) i) && strcmp(ggml_type_name((ggml_type) i), name) == 0) {
            type = (ggml_type) i;
            return true;
        }
    }
    return false;
}

std::vector<uint8_t> fasa_convert(const float * x, ggml_type type, int64_t n_row, int64_t n_per_row) {
    std::vector<uint8_t> out(ggml_row_size(type, n_per_row) * n_row);
    if (type == GGML_TYPE_F32) {
        memcpy(out.data(), x, out.size());
    } else {
        ggml_quantize_chunk(type, x, out.data(), 0, n_row, n_per_row, nullptr);
    }
    return out;
}

// ---- a layer ----

void fasa_op_layer_case::make(
    const fasa_op_case & c, ggml_type type_k, ggml_type type_v, ggml_context * ctx, ggml_context * kv_ctx) {
    auto & op = select;

    op.q      = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.n_embd_head_k, c.n_head, (int64_t) c.n_tokens * c.n_stream);
    op.k      = ggml_new_tensor_4d(kv_ctx, type_k, c.n_embd_head_k, c.n_head_kv, c.n_kv, c.n_stream);
    op.mask   = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, c.n_kv, c.n_tokens, 1, c.n_stream);
    op.ranges = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2 * FASA_MAX_RANGES, c.n_stream);
    op.scale = fac.scale = c.scale;
    op.soft_cap = fac.soft_cap = c.soft_cap;
    fac.v                      = ggml_new_tensor_4d(kv_ctx, type_v, c.n_embd_head_v, c.n_head_kv, c.n_kv, c.n_stream);
    fac.sinks                  = c.sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.n_head) : nullptr;
    if (c.list) {
        fac.list = ggml_new_tensor_4d(
            ctx, GGML_TYPE_I32, 1 + (int64_t) c.list_length, fasa_op_n_list(c), c.n_tokens, c.n_stream);
    } else {
        const int64_t n_tile = (c.n_kv + FASA_TILE - 1) / FASA_TILE;
        op.k_dom =
            ggml_new_tensor_4d(ctx, GGML_TYPE_I8, fasa_block_bytes(c.k_dom, c.n_dom), n_tile, c.n_head_kv, c.n_stream);
        op.dims            = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, c.n_dom, c.n_head_kv);
        op.weight          = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, c.n_dom, c.n_head_kv);
        op.forced          = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, c.n_forced, c.n_tokens, c.n_stream);
        op.fresh           = c.n_fresh > 0 ? ggml_new_tensor_2d(ctx, GGML_TYPE_I32, c.n_fresh, c.n_stream) : nullptr;
        op.k_dom_type      = c.k_dom;
        op.n_hadamard      = c.n_hadamard;
        op.params.budget   = c.budget;
        op.params.mass     = c.mass;
        op.params.floor    = c.floor;
        op.params.cap      = c.cap;
        op.params.per_head = c.per_head;
    }
    if (c.mode == FASA_MODE_HOST) {
        make_rows(c, ctx);
    }
}

void fasa_op_layer_case::make_rows(const fasa_op_case & c, ggml_context * ctx) {
    const fasa_row_layout row(select.k->type, fac.v->type, c.n_embd_head_k, c.n_embd_head_v);
    const int64_t length = c.list ? c.list_length : fasa_list_length(select.params, c.n_forced, c.n_kv);
    fixed.rows           = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, fasa_rows_bytes(row, length, fasa_op_n_list(c)));
    fixed.row_cache      = c.row_slots ?
        ggml_new_tensor_4d(ctx, GGML_TYPE_I8, FASA_ROW_HEAD + row.stride, c.row_slots, c.n_head_kv, c.n_stream) :
        nullptr;
}

void fasa_op_layer_case::write(const fasa_op_case & c) const {
    const auto & op     = select;
    const int64_t n_row = (int64_t) c.n_kv * c.n_stream * c.n_head_kv;
    fasa_case_write(op.q, c.q);
    fasa_case_write(op.k, fasa_convert(c.k, op.k->type, n_row, c.n_embd_head_k).data());
    fasa_case_write(fac.v, fasa_convert(c.v, fac.v->type, n_row, c.n_embd_head_v).data());
    if (c.mask) { // tiles have none
        fasa_case_write(op.mask, fasa_convert(c.mask, GGML_TYPE_F16, (int64_t) c.n_tokens * c.n_stream, c.n_kv).data());
    }
    if (fac.sinks) {
        fasa_case_write(fac.sinks, c.sinks);
    }
    std::vector<int32_t> ranges(ggml_nelements(op.ranges), 0);
    for (int s = 0; s < c.n_stream; ++s) { // two ranges that meet: all cells
        ranges[s * 2 * FASA_MAX_RANGES + 1] = ranges[s * 2 * FASA_MAX_RANGES + 2] = c.n_kv / 3;
        ranges[s * 2 * FASA_MAX_RANGES + 3]                                       = c.n_kv;
    }
    fasa_case_write(op.ranges, ranges.data());
    if (op.dims) {
        fasa_case_write(op.dims, c.dims);
        fasa_case_write(op.weight, c.weight);
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

ggml_backend_buffer_t fasa_op_alloc_kv(const fasa_op_case & c, ggml_context * kv_ctx, ggml_backend_t backend) {
    const auto buft = ggml_backend_get_default_buffer_type(backend);
    fasa_set_mode(c.mode);
    const auto chosen = fasa_kv_buft(ggml_backend_get_device(backend), buft);
    fasa_set_mode(FASA_MODE_DEVICE);
    if (c.mode == FASA_MODE_HOST && chosen == buft) {
        return nullptr;
    }
    return ggml_backend_alloc_ctx_tensors_from_buft(kv_ctx, chosen);
}

void fasa_op_get_lists(const std::vector<int32_t> & lists, int64_t length, int32_t * count, int32_t * cells) {
    for (int64_t i = 0; i < (int64_t) lists.size() / (length + 1); ++i) {
        const int32_t * list = lists.data() + i * (length + 1);
        if (count) {
            count[i] = list[0];
        }
        for (int64_t j = 0; cells && j < length; ++j) {
            cells[i * length + j] = j < list[0] ? list[1 + j] : -1;
        }
    }
}

// ---- checks ----

static constexpr int64_t FASA_OP_MOST = 1 << 24; // of each number of a case

static int fasa_op_check_list(const fasa_op_case & c) {
    if (fasa_check_range("list_length", c.list_length, 1, FASA_OP_MOST) != 0) {
        return -1;
    }
    const int64_t n = (int64_t) c.n_stream * c.n_tokens * fasa_op_n_list(c);
    for (int64_t i = 0; i < n; ++i) {
        const int32_t *list = c.list + i * (1 + (int64_t) c.list_length), count = *list++;
        if (count < 0 || count > c.list_length) {
            return fasa_set_error("fasa_op_case: list %lld has a count of %d, outside of 0 to list_length %d",
                (long long) i, count, c.list_length);
        }
        for (int32_t j = 0; j < count; ++j) {
            if (list[j] < 0 || list[j] >= c.n_kv) {
                return fasa_set_error(
                    "fasa_op_case: list %lld names cell %d, outside of 0 to %d", (long long) i, list[j], c.n_kv - 1);
            }
        }
    }
    return 0;
}

// rows of n_per_row values can be had in this type from f32
static bool fasa_op_type_fits(ggml_type type, int64_t n_per_row) {
    const auto * traits = ggml_get_type_traits(type);
    return (type == GGML_TYPE_F32 || (traits->from_float_ref && !ggml_quantize_requires_imatrix(type))) &&
        n_per_row % ggml_blck_size(type) == 0;
}

static int fasa_op_check_types(const fasa_op_case & c, ggml_type & type_k, ggml_type & type_v) {
    if (!fasa_type_by_name(c.type_k, type_k) || !fasa_type_by_name(c.type_v, type_v)) {
        return fasa_set_error(
            "fasa_op_case: unknown cache type %s or %s", c.type_k ? c.type_k : "NULL", c.type_v ? c.type_v : "NULL");
    }
    if (!fasa_op_type_fits(type_k, c.n_embd_head_k) || !fasa_op_type_fits(type_v, c.n_embd_head_v)) {
        return fasa_set_error("fasa_op_case: rows of %d and %d values cannot be stored as %s and %s", c.n_embd_head_k,
            c.n_embd_head_v, c.type_k, c.type_v);
    }
    return 0;
}

// what is read whatever the case is
static int fasa_op_check_given(const fasa_op_case & c) {
    const std::pair<const void *, const char *> pointers[] = { { c.backend, "backend" }, { c.q, "q" }, { c.k, "k" },
        { c.v, "v" } };
    for (const auto & [pointer, name] : pointers) {
        if (fasa_check_given(pointer, name) != 0) {
            return -1;
        }
    }
    const std::tuple<const char *, int64_t, int64_t, int64_t> numbers[] = {
        { "n_threads", c.n_threads, 1, FASA_MOST_THREADS },
        { "n_head", c.n_head, 1, FASA_OP_MOST },
        { "n_embd_head_k", c.n_embd_head_k, 1, FASA_OP_MOST },
        { "n_embd_head_v", c.n_embd_head_v, 1, FASA_OP_MOST },
        { "n_kv", c.n_kv, 1, FASA_OP_MOST },
        { "n_tokens", c.n_tokens, 1, FASA_OP_MOST },
        { "n_stream", c.n_stream, 1, FASA_OP_MOST },
        { "mode", c.mode, FASA_MODE_DEVICE, FASA_MODE_HOST },
        { "row_slots", c.row_slots, 0, FASA_OP_MOST },
    };
    for (const auto & [name, value, low, high] : numbers) {
        if (fasa_check_range(name, value, low, high) != 0) {
            return -1;
        }
    }
    return 0;
}

// what only TIP and SELECT read
static int fasa_op_check_select(const fasa_op_case & c) {
    if (fasa_check_given(c.dims, "dims") != 0 || fasa_check_given(c.weight, "weight") != 0 ||
        fasa_check_given(c.forced, "forced") != 0 ||
        fasa_check_range("k_dom", c.k_dom, FASA_K_DOM_F16, FASA_K_DOM_Q4) != 0 ||
        fasa_check_range("n_dom", c.n_dom, 1, FASA_OP_MOST) != 0 ||
        fasa_check_range("n_forced", c.n_forced, 1, FASA_OP_MOST) != 0 ||
        fasa_check_range("n_fresh", c.n_fresh, 0, FASA_OP_MOST) != 0 ||
        (c.n_fresh > 0 && fasa_check_given(c.fresh, "fresh") != 0) ||
        fasa_check_range("budget", c.budget, 0, INT32_MAX) != 0) {
        return -1;
    }
    if (!(c.mass >= 0 && c.mass <= 1) || (c.mass > 0 && (c.floor < 1 || c.floor > c.cap || c.cap > INT32_MAX))) {
        return fasa_set_error("fasa_op_case: expected a mass from 0 to 1 and 1 <= floor <= cap, found %g, %u and %u",
            (double) c.mass, c.floor, c.cap);
    }
    if (c.n_hadamard < 0 || (c.n_hadamard & (c.n_hadamard - 1)) != 0 ||
        (c.n_hadamard > 0 && c.n_embd_head_k % c.n_hadamard != 0)) {
        return fasa_set_error("fasa_op_case: n_hadamard %d must be a power of 2 that divides the head dimension %d",
            c.n_hadamard, c.n_embd_head_k);
    }
    for (int64_t i = 0; i < (int64_t) c.n_dom * c.n_head_kv; ++i) {
        if (c.dims[i] < -1 || c.dims[i] >= c.n_embd_head_k) {
            return fasa_set_error("fasa_op_case: dimension %d, outside of -1 to %d", c.dims[i], c.n_embd_head_k - 1);
        }
    }
    return 0;
}

int fasa_op_check(const fasa_op_case * c, ggml_type & type_k, ggml_type & type_v) {
    if (fasa_check_size(c, "fasa_op_case") != 0 || fasa_op_check_given(*c) != 0 ||
        fasa_op_check_types(*c, type_k, type_v) != 0) {
        return -1;
    }
    if (c->row_slots < 0 || c->row_slots % FASA_ROW_WAYS != 0) {
        return fasa_set_error("fasa_op_case: row_slots %d must be a multiple of %d", c->row_slots, FASA_ROW_WAYS);
    }
    const bool selects = c->list == nullptr;
    if (c->n_head_kv < 1 || c->n_head % c->n_head_kv != 0 || c->n_kv < 1 || c->n_tokens < 1 || c->n_stream < 1 ||
        (selects && (c->n_dom < 1 || c->n_dom % FASA_GROUP != 0 || c->n_forced < 1))) {
        return fasa_set_error("fasa_op_case: n_dom %d must be a multiple of %d, n_head %d of n_head_kv %d, and "
                              "n_forced, n_kv, n_tokens, n_stream at least 1",
            c->n_dom, FASA_GROUP, c->n_head, c->n_head_kv);
    }
    return selects ? fasa_op_check_select(*c) : fasa_op_check_list(*c);
}
