#pragma once

// Layers whose K and V lie on another machine, behind llama.cpp's RPC backend.

#include "ops/ops.h"

bool fasa_is_remote(ggml_backend_dev_t dev);

// why layers on `dev` of another machine are dense; NONE: its server is of this very build, and the device is a CPU
fasa_reason fasa_remote_reason(ggml_backend_dev_t dev);
