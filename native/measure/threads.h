#pragma once

#include "ggml-backend.h"

// Sets the threads of a CPU backend; false: it is another device's. libllama asks for the function by name, since the
// CPU backend of a wheel is loaded when the program runs.
inline bool fasa_cpu_set_threads(ggml_backend_t backend, int n_threads) {
    const auto dev = ggml_backend_get_device(backend);
    if (dev == nullptr || ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU) {
        return false;
    }
    const auto set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(dev), "ggml_backend_set_n_threads");
    set(backend, n_threads);
    return true;
}
