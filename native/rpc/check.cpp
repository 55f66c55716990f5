// Whether a node from the wire is sound: kinds, types, shapes, strides and parameters agree, and all that its CPU
// function touches lies within the buffers. What the tensors hold is checked by the functions themselves (cells of a
// list, dimensions of a head).

#include "core/select.h"
#include "rpc/rpc.h"

#include "ggml-backend-impl.h"

#include <cmath>

namespace {

// A tensor with rows of whole elements behind each other, all of it in a buffer that the CPU reads. No product of sizes
// from the wire is taken that could overflow.
bool is_sound(const ggml_tensor * t) {
    if (t == nullptr || t->data == nullptr || t->buffer == nullptr || !ggml_backend_buffer_is_host(t->buffer)) {
        return false;
    }
    const size_t size = ggml_type_size(t->type), room = ggml_backend_buffer_get_size(t->buffer);
    const size_t align = t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_I32 ? 4 : t->type == GGML_TYPE_I8 ? 1 : 2;
    const int64_t n    = t->ne[0] / ggml_blck_size(t->type); // blocks of a row
    if (t->nb[0] != size || t->ne[0] < 1 || t->ne[0] % ggml_blck_size(t->type) != 0 || (size_t) n > room / size) {
        return false;
    }
    size_t bytes = n * size;
    for (int i = 1; i < GGML_MAX_DIMS; ++i) {
        if (t->ne[i] < 1 || t->nb[i] % align != 0 || (t->nb[i] > 0 && (size_t) (t->ne[i] - 1) > room / t->nb[i])) {
            return false;
        }
        bytes += (t->ne[i] - 1) * t->nb[i];
    }
    const auto base = (uintptr_t) ggml_backend_buffer_get_base(t->buffer), data = (uintptr_t) t->data;
    return data % align == 0 && data >= base && data - base <= room && bytes <= room - (data - base);
}

// of this type, with this shape; a size of -1: any
bool is(const ggml_tensor * t, ggml_type type, int64_t n0, int64_t n1 = 1, int64_t n2 = 1, int64_t n3 = 1) {
    const int64_t want[] = { n0, n1, n2, n3 };
    if (!is_sound(t) || t->type != type) {
        return false;
    }
    for (int i = 0; i < GGML_MAX_DIMS; ++i) {
        if (want[i] >= 0 && t->ne[i] != want[i]) {
            return false;
        }
    }
    return true;
}

// k or v: rows that the CPU can read as f32
bool is_rows(const ggml_tensor * t, int64_t n_head_kv, int64_t n_kv, int64_t n_stream) {
    return is_sound(t) && (t->type == GGML_TYPE_F32 || ggml_get_type_traits(t->type)->to_float) &&
        (n_head_kv < 0 || t->ne[1] == n_head_kv) && (n_kv < 0 || t->ne[2] == n_kv) &&
        (n_stream < 0 || t->ne[3] == n_stream);
}

// the mask of n_tps tokens a stream; llama.cpp may pad its rows
bool is_mask(const ggml_tensor * t, int64_t n_kv, int64_t n_tps, int64_t n_stream) {
    return is(t, GGML_TYPE_F16, n_kv, -1, 1, n_stream) && t->ne[1] >= n_tps;
}

bool is_block(int n, int64_t d) {
    return n == 0 || (n > 1 && n <= d && (n & (n - 1)) == 0);
}

bool is_number(float x) {
    return std::isfinite(x);
}

const char * tip_fault(const ggml_tensor * t, const fasa_op_params & p) {
    const ggml_tensor *k_dom = t->src[0], *k = t->src[1], *ranges = t->src[2], *q = t->src[3], *dims = t->src[4],
                      *weight = t->src[5], *mask = t->src[6], *fresh = t->src[7];
    if (!is_rows(k, -1, -1, -1)) {
        return "k";
    }
    const int64_t n_kv = k->ne[2], n_head_kv = k->ne[1], n_stream = k->ne[3];
    if (!is(dims, GGML_TYPE_I32, -1, n_head_kv) || dims->ne[0] % FASA_GROUP != 0 || dims->ne[0] > 2 * k->ne[0]) {
        return "dims";
    }
    const int64_t n_dom = dims->ne[0];
    if (!is(weight, GGML_TYPE_F32, n_dom, n_head_kv)) {
        return "weight";
    }
    if (p.k_dom < FASA_K_DOM_F16 || p.k_dom > FASA_K_DOM_Q4) {
        return "k_dom type";
    }
    if (!is(k_dom, GGML_TYPE_I8, fasa_block_bytes(p.k_dom, n_dom), -1, n_head_kv, n_stream) ||
        k_dom->ne[1] < (n_kv + FASA_TILE - 1) / FASA_TILE || k_dom->nb[1] % 4 != 0 || k_dom->nb[2] % 4 != 0 ||
        k_dom->nb[3] % 4 != 0 || (uintptr_t) k_dom->data % 4 != 0) {
        return "k_dom";
    }
    if (!is(ranges, GGML_TYPE_I32, 2 * FASA_MAX_RANGES, n_stream)) {
        return "ranges";
    }
    if (!is(q, GGML_TYPE_F32, k->ne[0], -1, -1) || q->ne[1] % n_head_kv != 0 || q->ne[2] % n_stream != 0) {
        return "q";
    }
    const int64_t n_tps = q->ne[2] / n_stream;
    if (!is_mask(mask, n_kv, n_tps, n_stream)) {
        return "mask";
    }
    if (fresh && !is(fresh, GGML_TYPE_I32, -1, n_stream)) {
        return "fresh";
    }
    if (!is(t, GGML_TYPE_F32, fasa_tip_length(n_kv), q->ne[1], n_tps, n_stream)) {
        return "scores";
    }
    if (!is_block(p.n_hadamard, k->ne[0]) || !is_number(p.scale) || !is_number(p.soft_cap)) {
        return "parameters";
    }
    return nullptr;
}

const char * select_fault(const ggml_tensor * t, const fasa_op_params & p) {
    const ggml_tensor *tip = t->src[0], *forced = t->src[1];
    const fasa_op_params * of_tip = tip ? fasa_op_get(tip) : nullptr;
    if (of_tip == nullptr || of_tip->kind != FASA_OP_TIP || tip_fault(tip, *of_tip)) {
        return "scores";
    }
    const int64_t n_kv = fasa_tip_n_kv(tip), n_head = tip->ne[1], n_tps = tip->ne[2], n_stream = tip->ne[3];
    if (!is(forced, GGML_TYPE_I32, -1, n_tps, n_stream)) {
        return "forced";
    }
    if (!(p.mass >= 0 && p.mass <= 1) || p.budget < 1 || (p.mass > 0 && (p.floor > p.cap || p.cap < 1)) ||
        p.budget > INT32_MAX || p.cap > INT32_MAX || p.floor > INT32_MAX || n_kv > INT32_MAX) {
        return "parameters";
    }
    fasa_params budget = {};
    budget.mass = p.mass, budget.cap = p.cap, budget.budget = p.budget;
    const int64_t length = fasa_list_length(budget, forced->ne[0], n_kv);
    if (!is(t, GGML_TYPE_I32, 1 + length, -1, n_tps, n_stream) ||
        (t->ne[1] != n_head && t->ne[1] != tip->src[1]->ne[1])) {
        return "list";
    }
    return nullptr;
}

const char * fac_fault(const ggml_tensor * t, const fasa_op_params & p) {
    const ggml_tensor *list = t->src[0], *q = t->src[1], *k = t->src[2], *v = t->src[3], *mask = t->src[4],
                      *sinks = t->src[5];
    if (!is_rows(k, -1, -1, -1)) {
        return "k";
    }
    const int64_t n_kv = k->ne[2], n_head_kv = k->ne[1], n_stream = k->ne[3];
    if (!is_rows(v, n_head_kv, n_kv, n_stream)) {
        return "v";
    }
    if (!is(q, GGML_TYPE_F32, k->ne[0], -1, -1) || q->ne[1] % n_head_kv != 0 || q->ne[2] % n_stream != 0) {
        return "q";
    }
    const int64_t n_head = q->ne[1], n_tps = q->ne[2] / n_stream;
    if (!is(list, GGML_TYPE_I32, -1, -1, n_tps, n_stream) || (list->ne[1] != n_head && list->ne[1] != n_head_kv)) {
        return "list";
    }
    if (!is_mask(mask, n_kv, n_tps, n_stream)) {
        return "mask";
    }
    if (sinks && (!is(sinks, GGML_TYPE_F32, -1) || sinks->ne[0] < n_head)) {
        return "sinks";
    }
    if (!is(t, GGML_TYPE_F32, v->ne[0], n_head, n_tps, n_stream)) {
        return "result";
    }
    return is_number(p.scale) && is_number(p.soft_cap) ? nullptr : "parameters";
}

const char * spread_fault(const ggml_tensor * t, const fasa_op_params & p) {
    const ggml_tensor *values = t->src[0], *dims = t->src[1], *pos = t->src[2], *factors = t->src[3];
    if (!is(t, GGML_TYPE_F32, -1, -1, -1)) {
        return "result";
    }
    const int64_t n_head = t->ne[1], n_tokens = t->ne[2];
    if (!is(dims, GGML_TYPE_I32, -1, -1) || n_head % dims->ne[1] != 0 || !ggml_is_contiguous(dims)) {
        return "dims";
    }
    if (!is(values, GGML_TYPE_F32, dims->ne[0] * n_head, n_tokens)) {
        return "values";
    }
    if (!is(pos, GGML_TYPE_I32, -1) || pos->ne[0] < n_tokens) {
        return "positions";
    }
    if (p.rope.n_rot < 0 || p.rope.n_rot > t->ne[0]) {
        return "parameters";
    }
    if (factors && (!is(factors, GGML_TYPE_F32, -1) || factors->ne[0] < p.rope.n_rot / 2)) {
        return "frequency factors";
    }
    return nullptr;
}

} // namespace

const char * fasa_node_fault(const ggml_tensor * t) {
    const fasa_op_params * p = fasa_op_get(t);
    if (p == nullptr) {
        return "it is not of FASA";
    }
    if (p->flags != FASA_REMOTE) {
        return "it is not for another machine";
    }
    switch (p->kind) {
        case FASA_OP_TIP: return tip_fault(t, *p);
        case FASA_OP_SELECT: return select_fault(t, *p);
        case FASA_OP_FAC: return fac_fault(t, *p);
        case FASA_OP_SPREAD: return spread_fault(t, *p);
        case FASA_OP_FORK:
        case FASA_OP_JOIN: return nullptr; // a CPU does nothing there
        default: return "its kind";
    }
}
