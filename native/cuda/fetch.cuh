#pragma once

// The kernel that brings FAC its rows from pinned host memory (cuda/fetch.cu), for cuda/rates.cu to time too.

#include "cuda/device.cuh"
#include "ops/ops.h"

static constexpr int N_WARP = 8; // of a block
static constexpr int AHEAD  = 4; // rows that a warp asks for together

struct fasa_fetch_args {
    const int32_t * list;   // of the token: [n_list_len, n_list], the count, then the cells
    const int32_t * ranges; // [2*FASA_MAX_RANGES] stale cells of the stream; nullptr: seen already
    const int32_t * fresh;  // the cell that stays out, whose K and V are not stored yet; nullptr: none
    const char *k, *v;      // of the stream
    char * rows;            // [n_list_len - 1, n_list] rows
    int32_t * slots;        // [n_list_len - 1, n_list]
    char * cache;           // of the stream
    fasa_work * work;
    int64_t k_nb1, k_nb2, v_nb1, v_nb2, cache_nb2;
    int n_list_len, n_list, n_per_head, n_slot, bytes_k, bytes_v, v_at, stride;
};

// f(T()), T: the widest type that a lane may copy at once
template <typename F>
static void fasa_fetch_units(const fasa_fetch_args & a, const F & f) {
    const size_t any = a.bytes_k | a.bytes_v | a.k_nb1 | a.k_nb2 | a.v_nb1 | a.v_nb2 | (uintptr_t) a.k |
        (uintptr_t) a.v; // its lowest bit is their alignment
    any % 16 == 0 ? f(uint4()) : any % 8 == 0 ? f(uint2()) : any % 4 == 0 ? f(uint32_t()) : f(uint16_t());
}

void fasa_fetch_launch(const fasa_fetch_args & a, cudaStream_t stream);
