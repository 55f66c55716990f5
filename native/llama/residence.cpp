#include "llama/residence.h"
#include "core/error.h"
#include "llama/environment.h"
#include "llama/fasa-hooks.h"
#include "ops/ops.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

fasa_residence::fasa_residence(llama_kv_cache & kv) : kv(kv) {
    for (const auto & l : kv.layers) {
        pinned = pinned || is_pinned(l.il);
    }
    make_stages();
}

// ---- the mode of caches to come ----

static thread_local int32_t fasa_next_mode = FASA_MODE_DEVICE;

static ggml_backend_buffer_type_t fasa_pinned_buft(ggml_backend_dev_t dev) {
    const auto get = fasa_device_proc<fasa_host_buft_t>(dev, "fasa_host_buft");
    return get ? get(dev, [](const char * text) { fasa_set_error("%s", text); }) : nullptr;
}

int fasa_set_mode(int32_t mode) {
    if (mode != FASA_MODE_DEVICE && mode != FASA_MODE_HOST) {
        return fasa_set_error("fasa_set_mode: expected %d or %d, found %d", FASA_MODE_DEVICE, FASA_MODE_HOST, mode);
    }
    fasa_next_mode = mode;
    fasa_set_error("%s", ""); // what it says after a context could not be made is about that context
    return 0;
}

ggml_backend_buffer_type_t fasa_kv_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    const bool is_host = fasa_next_mode == FASA_MODE_HOST || fasa_environment_host();
    const auto pinned  = is_host ? fasa_pinned_buft(dev) : nullptr;
    return pinned ? pinned : buft;
}

// ---- a layer ----

// as ggml's scheduler asks, of a product with weights in the CPU's memory
bool fasa_residence::offloads(int64_t n_tokens) const {
    ggml_tensor product  = {};
    product.op           = GGML_OP_MUL_MAT;
    const int64_t ne[]   = { 1, n_tokens, 1, 1 };
    const auto & devices = kv.model.devices;
    std::copy(ne, ne + GGML_MAX_DIMS, product.ne);
    return std::any_of(devices.begin(), devices.end(),
        [&](const llama_device & x) { return ggml_backend_dev_offload_op(x.dev, &product); });
}

ggml_backend_dev_t fasa_residence::device_of(int32_t il) const {
    const auto buft = ggml_backend_buffer_get_type(kv.layers[kv.map_layer_ids.at(il)].k->buffer);
    return ggml_backend_buft_is_host(buft) ? nullptr : ggml_backend_buft_get_device(buft);
}

ggml_backend_buffer_type_t fasa_residence::memory_of(int32_t il) const {
    const auto dev = device_of(il);
    return dev ? ggml_backend_dev_buffer_type(dev) :
                 ggml_backend_buffer_get_type(kv.layers[kv.map_layer_ids.at(il)].k->buffer);
}

bool fasa_residence::is_pinned(int32_t il) const {
    const auto dev = device_of(il);
    return dev &&
        ggml_backend_buffer_get_type(kv.layers[kv.map_layer_ids.at(il)].k->buffer) != ggml_backend_dev_buffer_type(dev);
}

// ---- the stages ----

size_t fasa_residence::stage_v_at(int32_t il) const {
    return (ggml_nbytes(kv.layers[kv.map_layer_ids.at(il)].k) + 255) / 256 * 256;
}

ggml_tensor * fasa_residence::stage(int32_t il) const {
    const auto found = stages.find(device_of(il));
    return found == stages.end() ? nullptr : found->second;
}

int32_t fasa_residence::next_pinned(int32_t il) const {
    for (size_t ikv = kv.map_layer_ids.at(il) + 1; ikv < kv.layers.size(); ++ikv) {
        const int32_t next = kv.layers[ikv].il;
        if (is_pinned(next) && device_of(next) == device_of(il)) {
            return next;
        }
    }
    return -1;
}

// room for the largest layer's K and V on every device
void fasa_residence::make_stages() {
    std::map<ggml_backend_dev_t, size_t> most;
    for (const auto & l : kv.layers) {
        if (!kv.hparams.no_alloc && is_pinned(l.il)) {
            most[device_of(l.il)] = std::max(most[device_of(l.il)], stage_v_at(l.il) + ggml_nbytes(l.v));
        }
    }
    for (const auto & [dev, bytes] : most) {
        ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
        stages[dev] = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, bytes);
        ggml_backend_buffer_ptr buf(
            ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_dev_buffer_type(dev)));
        if (!buf) {
            fasa_set_error("one layer's K and V need %.1f MiB in %s beside the pinned cache, which cannot be "
                           "allocated; use a smaller context or a quantised cache",
                bytes / 1048576.0, ggml_backend_dev_name(dev));
            throw std::runtime_error(fasa_error());
        }
        stage_bufs.emplace_back(std::move(ctx), std::move(buf));
    }
}

void fasa_residence::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const {
    for (const auto & [ctx, buf] : stage_bufs) {
        sizes[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
    }
}

// ---- room to compute ----

// asked of the driver when a ubatch needs more than any before it
bool fasa_residence::has_room(uint32_t n_tokens, size_t tiles) {
    static constexpr size_t KERNELS = 100u << 20;        // loaded when they first run
    uint32_t n_act                  = kv.hparams.n_embd; // values of a token that go into a matrix product
    for (uint32_t il = 0; il < kv.hparams.n_layer(); ++il) {
        n_act = std::max(n_act, kv.hparams.n_ff(il));
    }
    const size_t need = fasa_pool_bytes(n_act, n_tokens) + tiles;
    for (const auto & [dev, stage] : stages) {
        if (need <= room[dev]) {
            continue;
        }
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(dev, &free, &total);
        const size_t wanted = need + (room[dev] ? 0 : KERNELS);
        if (free < wanted) {
            fasa_set_error("%s has %.0f MiB of memory free, and computing %u tokens together takes about %.0f; free "
                           "some (other programs, other contexts), "
                           "or use a smaller ubatch (-ub) or context (-c)",
                ggml_backend_dev_name(dev), free / 1048576.0, n_tokens, wanted / 1048576.0);
            LLAMA_LOG_ERROR("fasa: %s\n", fasa_error());
            return false;
        }
        room[dev] = need;
    }
    return true;
}
