#pragma once

// Where K and V of a cache's layers lie, and what their devices keep beside them.
//
// FASA-C: on the layer's device. FASA-M: in pinned host memory that the device reads and writes in place; dense
// attention then runs over a copy of one layer at a time, the stage.

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <map>
#include <utility>
#include <vector>

class llama_kv_cache;

struct fasa_residence {
    // Allocates the stages. Throws, as the cache that is being made does, when there is no room.
    explicit fasa_residence(llama_kv_cache & kv);

    ggml_backend_dev_t device_of(int32_t il) const;         // where a layer's kernels run; nullptr: the CPU
    ggml_backend_buffer_type_t memory_of(int32_t il) const; // of what FASA keeps for a layer: its device's memory
    bool is_pinned(int32_t il) const;                       // FASA-M: its K and V lie in pinned host memory
    bool any_pinned() const { return pinned; }
    bool offloads(int64_t n_tokens) const; // whether a device computes this many tokens of layers on the CPU

    // i8, room on a pinned layer's device for its K and V; nullptr: in a dry run
    ggml_tensor * stage(int32_t il) const;
    size_t stage_v_at(int32_t il) const;   // where V begins there
    int32_t next_pinned(int32_t il) const; // the next layer that uses the same room; -1: none

    // Whether the devices of FASA-M have memory left for what ggml-cuda takes while it computes n_tokens, beside the
    // compute buffer: the process would end where it finds none. tiles: bytes that sparse prefill takes. false:
    // fasa_error() says so.
    bool has_room(uint32_t n_tokens, size_t tiles);

    void memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const;

private:
    llama_kv_cache & kv;
    bool pinned = false;
    std::map<ggml_backend_dev_t, ggml_tensor *> stages; // as long as the cache
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> stage_bufs;
    std::map<ggml_backend_dev_t, size_t> room; // bytes for computing that were found free

    void make_stages();
};

// A function that a device's backend hands out. nullptr: it has none of that name, or, as the backend that splits
// tensors over devices, is in no registry.
template <typename F>
F fasa_device_proc(ggml_backend_dev_t dev, const char * name) {
    const auto reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
    return reg ? (F) ggml_backend_reg_get_proc_address(reg, name) : nullptr;
}
