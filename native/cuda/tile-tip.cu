// TIP of sparse prefill of up to 48 dominant dimensions: cuda/tile-tip.cuh.

#include "cuda/tile-tip.cuh"

void fasa_cuda_tile_tip(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fasa_op_params & p) {
    const ggml_tensor *keys = dst->src[0], *q = dst->src[1], *dims = dst->src[2], *tiles = dst->src[5],
                      *view = dst->src[6];
    fasa_tile_tip_args a    = { (const char *) keys->data, (int64_t) keys->nb[2], (int64_t) keys->nb[3],
        (const char *) q->data, (int64_t) q->nb[1], (int64_t) q->nb[2], (const int32_t *) dims->data,
        (const float *) dst->src[3]->data, (const int8_t *) view->data, view->ne[0], fasa_tile_mask(dst->src[4]),
        fasa_tiles_ref(tiles) };
    a.dst                   = (float *) dst->data;
    a.n_kv                  = dst->ne[0];
    a.n_cell                = keys->ne[1] * 16;
    a.n_list                = dst->ne[1];
    a.n_group               = q->ne[1] / a.n_list;
    a.n_per_kv              = a.n_list / dims->ne[1];
    a.d                     = q->ne[0];
    a.n_dom                 = dims->ne[0];
    a.n_hadamard            = p.n_hadamard;
    a.n_row                 = fasa_tile_size(tiles) * a.n_group;
    a.scale                 = p.scale;
    a.soft_cap              = p.soft_cap;

    const int n_pair = a.n_list * dst->ne[2], n_step = fasa_tile_pad(a.n_dom) / 16;
    switch (n_step) {
        case 1: fasa_tile_tip_run<1>(ctx, a, n_pair); break;
        case 2: fasa_tile_tip_run<2>(ctx, a, n_pair); break;
        case 3: fasa_tile_tip_run<3>(ctx, a, n_pair); break;
        default: fasa_tile_tip_wide(ctx, a, n_step, n_pair); break;
    }
}
