#pragma once

// Random rows for a KV cache: see fasa_fill_random.

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

// Random blocks of one type, made once. A row of a tensor is as many blocks in succession; every round through the pool begins
// one block further on, so no two rows of a stream are equal: equal keys would tie in the selection.
struct fasa_pool {
    std::vector<uint8_t> data;

    void make(ggml_type type, size_t bytes, uint64_t seed);
    void write(ggml_tensor * t, uint32_t stream, uint32_t n, uint64_t start) const; // rows [0, n) of a stream, from row `start` of the pool on
};
