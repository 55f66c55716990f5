#pragma once

// One layer of a struct fasa_op_case: its tensors and nodes, for op-run.cpp and op-time.cpp.

#include "ops/ops.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

struct fasa_op_layer_case {
    fasa_select_op select = {};
    fasa_fac_op fac       = {};
    fasa_layer_const fixed;

    // Makes its tensors in ctx, but for fixed.work, and k and v in kv_ctx.
    void make(const fasa_op_case & c, ggml_type type_k, ggml_type type_v, ggml_context * ctx, ggml_context * kv_ctx);

    // what the case gives, into the tensors, whose memory is allocated; all cells are stale. A list, forced and fresh
    // cells are left to the caller.
    void write(const fasa_op_case & c) const;

    ggml_tensor * build_select(ggml_context * ctx);
    ggml_tensor * build_fac(ggml_context * ctx, ggml_tensor * list);

private:
    void make_rows(const fasa_op_case & c, ggml_context * ctx);
};

// Checks sizes and shapes, and finds the cache types. -1: fasa_error() says why.
int fasa_op_check(const fasa_op_case * c, ggml_type & type_k, ggml_type & type_v);

// lists of a token: one per KV head, or one per query head
inline int64_t fasa_op_n_list(const fasa_op_case & c) {
    return c.per_head ? c.n_head : c.n_head_kv;
}

// n_row rows of n_per_row f32 values as `type`
std::vector<uint8_t> fasa_convert(const float * x, ggml_type type, int64_t n_row, int64_t n_per_row);

// Memory for k and v by the case's mode; nullptr: out of memory, or the device does not have that mode
ggml_backend_buffer_t fasa_op_alloc_kv(const fasa_op_case & c, ggml_context * kv_ctx, ggml_backend_t backend);

// lists [n][1 + length] as SELECT writes them, to counts [n] and cells [n][length], -1 behind the last one
void fasa_op_get_lists(const std::vector<int32_t> & lists, int64_t length, int32_t * count, int32_t * cells);

inline void fasa_case_write(ggml_tensor * t, const void * data) {
    ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
}
