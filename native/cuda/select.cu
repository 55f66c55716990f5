#include "cuda/select.cuh"

void fasa_cuda_select(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p) {
    static const char * env = getenv("FASA_SIDE");
    if ((p.flags & FASA_FORKED) && env && env[0] == '8') {
        fasa_cuda_select_8(ctx, dst, p);
        return;
    }
    if ((p.flags & FASA_FORKED) && env && env[0] == '4') {
        fasa_cuda_select_4(ctx, dst, p);
        return;
    }
    if ((p.flags & FASA_FORKED) && (!env || env[0] == 'c')) {
        fasa_cuda_select_side(ctx, dst, p);
        return;
    }
    fasa_select_args a = fasa_select_args_make(dst, p);
    fasa_select_together(ctx, a, fasa_op_get(dst->src[0])->k_dom, p.flags & FASA_SCORES_KEPT);
}
