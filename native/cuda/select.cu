// TIP and SELECT with nothing beside them: blocks that have an SM for themselves.

#include "cuda/select.cuh"

void fasa_cuda_select(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p) {
    fasa_select_args a = fasa_select_args_make(dst, p);
    fasa_select_together(ctx, a, fasa_op_get(dst->src[0])->k_dom, p.flags & FASA_SCORES_KEPT);
}
