// TIP and SELECT on the side stream (cuda/side.cu), beside the feed-forward of the layer before: half the warps, and
// one block of them an SM, so that the blocks of other kernels find room there too.

#define FASA_TIP_WARPS 8
#include "cuda/select.cuh"

void fasa_cuda_select_side(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p) {
    fasa_select_args a = fasa_select_args_make(dst, p);
    a.per_sm           = 1;
    fasa_select_together(ctx, a, fasa_op_get(dst->src[0])->k_dom, false);
}
