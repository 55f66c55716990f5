#pragma once

// What is counted where, from the table in fasa_gguf/counters.py.

#include "core/tables.h"

#include <atomic>
#include <cstdint>

// what the ops add up; one per context
struct fasa_stats {
#define X(name, NAME) std::atomic<uint64_t> name{ 0 };
    FASA_COUNTERS_OP(X) FASA_COUNTERS_DEVICE(X)
#undef X
};

// what the host counts, once for every step; one per context
struct fasa_step_counts {
#define X(name, NAME) uint64_t name = 0;
    FASA_COUNTERS_STEP(X)
#undef X

    void add(const fasa_step_counts & more) {
#define X(name, NAME) name += more.name;
        FASA_COUNTERS_STEP(X)
#undef X
    }
};
