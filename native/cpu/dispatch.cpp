// The function that ggml-cpu calls for the nodes of ops/ops.h. This folder is compiled into ggml-cpu, so that dense
// attention and FASA use the same instruction set.

#include "cpu/nodes.h"

extern "C" void fasa_cpu_op(ggml_tensor * dst, int ith, int nth, void * userdata);

extern "C" void fasa_cpu_op(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(userdata);
    const fasa_op_params p = *fasa_op_get(dst);
    switch (p.kind) {
        case FASA_OP_TIP: fasa_cpu_tip(dst, p, ith, nth); break;
        case FASA_OP_SELECT: fasa_cpu_select(dst, p, ith, nth); break;
        case FASA_OP_FAC: fasa_cpu_fac(dst, p, ith, nth); break;
        case FASA_OP_OBSERVE: fasa_cpu_observe(dst, p, ith); break;
        case FASA_OP_SPREAD: fasa_cpu_spread(dst, p, ith, nth); break;
        case FASA_OP_TILE_REFRESH: fasa_cpu_tile_refresh(dst, p, ith, nth); break;
        case FASA_OP_TILE_TIP: fasa_cpu_tile_tip(dst, p, ith, nth); break;
        case FASA_OP_TILE_SELECT: fasa_cpu_tile_select(dst, p, ith, nth); break;
        case FASA_OP_TILE_FAC: fasa_cpu_tile_fac(dst, p, ith, nth); break;
        case FASA_OP_FORK:
        case FASA_OP_JOIN: break; // a CPU computes in order
        default: GGML_ABORT("unknown FASA op");
    }
}
