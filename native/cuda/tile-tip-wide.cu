// TIP of sparse prefill of more than 48 dominant dimensions: cuda/tile-tip.cuh.

#include "cuda/tile-tip.cuh"

void fasa_tile_tip_wide(ggml_backend_cuda_context & ctx, const fasa_tile_tip_args & a, int n_step, int n_pair) {
    switch (n_step) {
        case 4: fasa_tile_tip_run<4>(ctx, a, n_pair); break;
        case 6: fasa_tile_tip_run<6>(ctx, a, n_pair); break;
        case 8: fasa_tile_tip_run<8>(ctx, a, n_pair); break;
        default: fasa_tile_tip_run<16>(ctx, a, n_pair); break;
    }
}
