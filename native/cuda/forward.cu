// Which nodes the CUDA backend takes, and who runs them.

#include "cuda/fasa-hooks.cuh"
#include "cuda/nodes.cuh"

#include "common.cuh"

#include <cstdio>
#include <cstring>

bool fasa_cuda_has_kernels(int device) {
    const int cc = ggml_cuda_info().devices[device].cc;
    return GGML_CUDA_CC_IS_NVIDIA(cc) && cc >= GGML_CUDA_CC_TURING;
}

static fasa_reason fasa_cuda_reason(int device, const fasa_layer_shape & s) {
    if (!fasa_cuda_has_kernels(device)) {
        return FASA_REASON_CUDA_CAPABILITY;
    }
    for (const ggml_type type : { s.type_k, s.type_v }) {
        if (type != GGML_TYPE_F32 && type != GGML_TYPE_F16 && type != GGML_TYPE_BF16 && type != GGML_TYPE_Q8_0 &&
            type != GGML_TYPE_Q4_0) {
            return FASA_REASON_CUDA_CACHE_TYPE;
        }
    }
    if (s.n_embd_head_k != s.n_embd_head_v || s.n_embd_head_k % 8 != 0 || s.n_embd_head_k > 256) {
        return FASA_REASON_CUDA_HEAD_DIM;
    }
    if (s.n_group > 128) {
        return FASA_REASON_CUDA_GROUP;
    }
    return FASA_REASON_NONE;
}

// FAC of a prompt's tiles is llama.cpp's flash attention over gathered rows
static fasa_reason fasa_cuda_tile_reason(int device, const fasa_layer_shape & s) {
    const auto reason = fasa_cuda_reason(device, s);
    if (reason != FASA_REASON_NONE) {
        return reason;
    }
    for (const int d : { 64, 80, 96, 112, 128, 256 }) {
        if (s.n_embd_head_k == d) {
            return FASA_REASON_NONE;
        }
    }
    return FASA_REASON_PREFILL_HEAD_DIM;
}

// type: fasa_dense_reason_t
template <fasa_reason (*REASON)(int device, const fasa_layer_shape & shape)>
static fasa_reason fasa_cuda_reason_of(ggml_backend_dev_t dev, const fasa_layer_shape * shape) {
    int device = -1;
    if (sscanf(ggml_backend_dev_name(dev), GGML_CUDA_NAME "%d", &device) != 1) {
        return FASA_REASON_CUDA_DEVICE;
    }
    return REASON(device, *shape);
}

// of driver and runtime, and what else makes times differ between devices of one name
static const char * fasa_cuda_versions(ggml_backend_dev_t dev) {
    static thread_local char text[160];
    int driver = 0, runtime = 0, device = -1, clock = 0, memory = 0, bus = 0;
    (void) cudaDriverGetVersion(&driver);
    (void) cudaRuntimeGetVersion(&runtime);
    if (sscanf(ggml_backend_dev_name(dev), GGML_CUDA_NAME "%d", &device) == 1) {
        (void) cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, device);
        (void) cudaDeviceGetAttribute(&memory, cudaDevAttrMemoryClockRate, device);
        (void) cudaDeviceGetAttribute(&bus, cudaDevAttrGlobalMemoryBusWidth, device);
    }
    const int n_sm = device >= 0 ? ggml_cuda_info().devices[device].nsm : 0;
    snprintf(text, sizeof(text), "%d/%d sm=%d clock=%d memory=%d bus=%d", driver, runtime, n_sm, clock, memory, bus);
    return text;
}

void * fasa_cuda_proc_address(const char * name) {
    if (strcmp(name, "fasa_dense_reason") == 0) {
        return (void *) fasa_cuda_reason_of<fasa_cuda_reason>;
    }
    if (strcmp(name, "fasa_tile_reason") == 0) {
        return (void *) fasa_cuda_reason_of<fasa_cuda_tile_reason>;
    }
    if (strcmp(name, "fasa_device_versions") == 0) {
        return (void *) fasa_cuda_versions;
    }
    if (strcmp(name, "fasa_host_buft") == 0) {
        return (void *) fasa_cuda_host_buft;
    }
    if (strcmp(name, "fasa_host_rates") == 0) {
        return (void *) fasa_cuda_host_rates;
    }
    return nullptr;
}

bool fasa_cuda_supported(int device, const ggml_tensor * op) {
    const fasa_op_params * p = fasa_op_get(op);
    if (p == nullptr || p->kind == FASA_OP_OBSERVE || !p->flags) {
        return false;
    }
    if (p->kind == FASA_OP_TILE_FAC) {
        const ggml_tensor *k = op->src[2], *v = op->src[3];
        const fasa_layer_shape s = { k->type, v->type, k->ne[0], v->ne[0], int32_t(op->ne[1] / k->ne[1]) };
        return fasa_cuda_tile_reason(device, s) == FASA_REASON_NONE;
    }
    if (p->kind != FASA_OP_TIP && p->kind != FASA_OP_SELECT && p->kind != FASA_OP_FAC) {
        return true; // whatever the shapes are
    }
    const bool fac         = p->kind == FASA_OP_FAC;
    const ggml_tensor *tip = p->kind == FASA_OP_SELECT ? op->src[0] : op, *k = fac ? op->src[2] : tip->src[1],
                      *v     = fac ? op->src[3] : k;
    const fasa_layer_shape s = { k->type, v->type, k->ne[0], v->ne[0], int32_t(tip->ne[1] / k->ne[1]) };
    return fasa_cuda_reason(device, s) == FASA_REASON_NONE;
}

// behind the node that may be the last one of a side stream
static void fasa_end_side(ggml_backend_cuda_context & ctx, const fasa_op_params & p) {
    if ((p.flags & FASA_FORKED) && fasa_cuda_is_forked(ctx)) {
        fasa_cuda_return(ctx);
    }
}

bool fasa_cuda_forward(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const fasa_op_params * p = fasa_op_get(dst);
    switch (p ? p->kind : 0) {
        case FASA_OP_TIP: return true; // SELECT does it
        case FASA_OP_SELECT:
            if (fasa_cuda_is_forked(ctx)) {
                fasa_cuda_select_side(ctx, dst, *p);
            } else {
                fasa_cuda_select(ctx, dst, *p);
            }
            fasa_end_side(ctx, *p);
            return true;
        case FASA_OP_FETCH:
            fasa_cuda_fetch(ctx, dst, 0);
            fasa_end_side(ctx, *p);
            return true;
        case FASA_OP_SPREAD: fasa_cuda_spread(ctx, dst); return true;
        case FASA_OP_FORK: fasa_cuda_fork(ctx, dst); return true;
        case FASA_OP_JOIN: fasa_cuda_join(ctx); return true;
        case FASA_OP_FAC: fasa_cuda_fac(ctx, dst, *p); return true;
        case FASA_OP_STAGE: fasa_cuda_stage(ctx, dst); return true;
        case FASA_OP_TILE_REFRESH: fasa_cuda_tile_refresh(ctx, dst, *p); return true;
        case FASA_OP_TILE_TIP: fasa_cuda_tile_tip(ctx, dst, *p); return true;
        case FASA_OP_TILE_SELECT: fasa_cuda_tile_select(ctx, dst, *p); return true;
        case FASA_OP_TILE_FAC: fasa_cuda_tile_fac(ctx, dst, *p); return true;
        case FASA_OP_AHEAD: fasa_cuda_ahead(ctx, dst); return true;
        default: return false;
    }
}
