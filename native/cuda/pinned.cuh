#pragma once

// A buffer of FASA-M's pinned host memory (cuda/pinned.cu), and the copies that are under way from it (cuda/stage.cu).

#include "common.cuh"

// What the next layer stages, copied on a stream of its own
struct fasa_ahead {
    cudaStream_t stream = nullptr;
    cudaEvent_t begin = nullptr, end = nullptr;
    struct {
        const void *from = nullptr, *to = nullptr;
        size_t size     = 0;
        uint64_t ubatch = 0;
    } done[2]; // K and V

    void init() {
        CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CUDA_CHECK(cudaEventCreateWithFlags(&begin, cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreateWithFlags(&end, cudaEventDisableTiming));
        CUDA_CHECK(cudaEventRecord(end, stream));
    }
    void free() {
        CUDA_CHECK(cudaStreamDestroy(stream));
        CUDA_CHECK(cudaEventDestroy(begin));
        CUDA_CHECK(cudaEventDestroy(end));
    }
};

struct fasa_host_buffer {
    int device;
    char * mem;
    size_t size; // as mapped
    fasa_ahead ahead = {};
};
