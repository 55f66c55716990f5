#include "llama/remote.h"

#include "ggml-cpp.h"

#include <cstring>

#ifndef FASA_BUILD_HASH // without ggml-rpc nobody is asked
#    define FASA_BUILD_HASH 0ull
#endif

bool fasa_is_remote(ggml_backend_dev_t dev) {
    return dev && strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "RPC") == 0;
}

// The question is how large a tensor would be, which every server answers, whatever its version: one without FASA says
// so by the true size. ggml-rpc asks the server for quantised rows that are no multiple of 512.
fasa_reason fasa_remote_reason(ggml_backend_dev_t dev) {
    ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor * t  = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_Q8_0, ggml_blck_size(GGML_TYPE_Q8_0));
    fasa_op_params p = {};
    p.magic          = FASA_OP_MAGIC;
    p.kind           = FASA_OP_ASK;
    p.flags          = FASA_REMOTE;
    static_assert(sizeof(p.userdata) == sizeof(FASA_BUILD_HASH), "a number travels in place of the pointer");
    const uint64_t build = FASA_BUILD_HASH;
    memcpy(&p.userdata, &build, sizeof(build));
    t->op = GGML_OP_CUSTOM;
    memcpy(t->op_params, &p, sizeof(p));
    return fasa_remote_answered(ggml_backend_buft_get_alloc_size(ggml_backend_dev_buffer_type(dev), t));
}
