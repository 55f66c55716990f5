// FASA-M's buffer type: pinned, mapped host memory that ggml's scheduler takes for the CUDA device's own. Kernels read
// and write it in place over PCIe, and nothing copies a whole cache.

#include "cuda/fasa-hooks.cuh"
#include "cuda/nodes.cuh"
#include "cuda/pinned.cuh"

#include "common.cuh"
#include "ggml-backend-impl.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#    include <sys/mman.h>
#endif

// ---- memory ----

static constexpr size_t FASA_HUGE_PAGE = 2u << 20;
static constexpr size_t FASA_TELL_FROM = (size_t) 4 << 30; // bytes; pinning this many or more logs its progress

static fasa_on_error_t fasa_on_error = nullptr;

static void fasa_pin_error(size_t size, const char * why) {
    char text[512];
    snprintf(text, sizeof(text),
        "the K and V cache needs %.1f GiB of pinned host memory: %s; use a smaller context (-c), a quantised cache "
        "(-ctk q8_0 -ctv q8_0), or the device's memory (mode c)",
        size / 1073741824.0, why);
    GGML_LOG_ERROR("fasa: %s\n", text);
    if (fasa_on_error) {
        fasa_on_error(text);
    }
}

// run f(begin, end) over [0, size) on several threads
template <typename F>
static void fasa_in_pieces(size_t size, const F & f) {
    const size_t n = std::max<size_t>(1, std::min<size_t>({ 8, std::thread::hardware_concurrency(), size >> 24 }));
    std::vector<std::thread> threads;
    const auto piece = [=](size_t i) {
        f(size / n * i, i + 1 == n ? size : size / n * (i + 1));
    };
    for (size_t i = 1; i < n; ++i) {
        try {
            threads.emplace_back(piece, i);
        } catch (const std::system_error &) { // no more threads can be had
            piece(i);
        }
    }
    piece(0);
    for (auto & t : threads) {
        t.join();
    }
}

#if defined(__linux__)
static size_t fasa_read_number(const std::string & path, const char * format) {
    unsigned long long value = 0;
    if (FILE * f = fopen(path.c_str(), "r")) {
        char line[256];
        bool found = false;
        while (!found && fgets(line, sizeof(line), f)) {
            found = sscanf(line, format, &value) == 1;
        }
        fclose(f);
        return found ? value : SIZE_MAX;
    }
    return SIZE_MAX;
}

// Bytes that a process may still take before the kernel kills one: of the machine's memory, and of its control group's
// and those above it.
static size_t fasa_host_free() {
    const size_t kib = fasa_read_number("/proc/meminfo", "MemAvailable: %llu kB");
    size_t room      = kib == SIZE_MAX ? SIZE_MAX : kib * 1024;
    char path[4096]  = "";
    if (FILE * f = fopen("/proc/self/cgroup", "r")) {
        char line[4200];
        while (!path[0] && fgets(line, sizeof(line), f)) {
            sscanf(line, "0::%4095s", path);
        }
        fclose(f);
    }
    for (std::string group = path;; group.resize(group.find_last_of('/'))) {
        const std::string at = "/sys/fs/cgroup" + group;
        const size_t limit   = fasa_read_number(at + "/memory.max", "%llu"),
                     used    = fasa_read_number(at + "/memory.current", "%llu");
        if (limit != SIZE_MAX && used != SIZE_MAX) {
            const size_t files = fasa_read_number(at + "/memory.stat", "inactive_file %llu"); // which may be dropped
            room = std::min(room, limit - std::min(limit, used - std::min(used, files == SIZE_MAX ? 0 : files)));
        }
        if (group.find('/') == std::string::npos) {
            return room;
        }
    }
}

// Huge pages, touched before they are pinned. This is faster than cudaHostAlloc, and can log its progress.
static char * fasa_pin(size_t size) {
    const size_t room = fasa_host_free();
    if (size > room) {
        char why[128];
        snprintf(why, sizeof(why), "only %.1f GiB of host memory are free", room / 1073741824.0);
        fasa_pin_error(size, why);
        return nullptr;
    }
    char * const all = (char *) mmap(
        nullptr, size + FASA_HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) {
        fasa_pin_error(size, "the system has no address space for it (see ulimit -v)");
        return nullptr;
    }
    char * const mem = (char *) (((uintptr_t) all + FASA_HUGE_PAGE - 1) / FASA_HUGE_PAGE * FASA_HUGE_PAGE);
    if (mem > all) {
        munmap(all, mem - all);
    }
    if (all + FASA_HUGE_PAGE > mem) {
        munmap(mem + size, all + FASA_HUGE_PAGE - mem);
    }
    madvise(mem, size, MADV_HUGEPAGE); // without them it works too
    madvise(mem, size, MADV_DONTFORK); // a fork would copy what is pinned
    for (size_t done = 0; done < size; done += FASA_TELL_FROM) {
        const size_t n = std::min(FASA_TELL_FROM, size - done);
        fasa_in_pieces(n, [=](size_t begin, size_t end) {
            for (size_t i = begin; i < end; i += 4096) {
                ((volatile char *) mem)[done + i] = 0;
            }
        });
        if (size >= FASA_TELL_FROM) {
            GGML_LOG_INFO(
                "fasa: pinning host memory: %.0f of %.0f GiB\n", (done + n) / 1073741824.0, size / 1073741824.0);
        }
    }
    const cudaError_t err = cudaHostRegister(mem, size, cudaHostRegisterMapped | cudaHostRegisterPortable);
    if (err != cudaSuccess) {
        (void) cudaGetLastError();
        munmap(mem, size);
        fasa_pin_error(size, (std::string("the driver refuses to pin it (") + cudaGetErrorString(err) + ")").c_str());
        return nullptr;
    }
    return mem;
}

static void fasa_unpin(char * mem, size_t size) {
    CUDA_CHECK(cudaHostUnregister(mem));
    munmap(mem, size);
}
#else
static char * fasa_pin(size_t size) {
    void * mem            = nullptr;
    const cudaError_t err = cudaHostAlloc(&mem, size, cudaHostAllocMapped | cudaHostAllocPortable);
    if (err != cudaSuccess) {
        (void) cudaGetLastError();
        fasa_pin_error(size, (std::string("the driver refuses to pin it (") + cudaGetErrorString(err) + ")").c_str());
        return nullptr;
    }
    return (char *) mem;
}

static void fasa_unpin(char * mem, size_t) {
    CUDA_CHECK(cudaFreeHost(mem));
}
#endif

// ---- the buffer ----

// Where the CPU reads or writes a tensor: it waits for the copies of AHEAD. The caller has waited for the backend's
// stream, as it must for any tensor.
static char * fasa_host_at(const fasa_host_buffer * b, const ggml_tensor * t, size_t offset) {
    CUDA_CHECK(cudaStreamSynchronize(b->ahead.stream));
    return (char *) t->data + offset;
}

static void fasa_host_free_buffer(ggml_backend_buffer_t buffer) {
    auto * b = (fasa_host_buffer *) buffer->context;
    ggml_cuda_set_device(b->device);
    CUDA_CHECK(cudaDeviceSynchronize());
    b->ahead.free();
    fasa_unpin(b->mem, b->size);
    delete b;
}

static void * fasa_host_get_base(ggml_backend_buffer_t buffer) {
    return ((fasa_host_buffer *) buffer->context)->mem;
}

static void fasa_host_memset_tensor(
    ggml_backend_buffer_t buffer, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    memset(fasa_host_at((fasa_host_buffer *) buffer->context, t, offset), value, size);
}

static void fasa_host_set_tensor(
    ggml_backend_buffer_t buffer, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    memcpy(fasa_host_at((fasa_host_buffer *) buffer->context, t, offset), data, size);
}

static void fasa_host_get_tensor(
    ggml_backend_buffer_t buffer, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    memcpy(data, fasa_host_at((fasa_host_buffer *) buffer->context, t, offset), size);
}

static bool fasa_host_cpy_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * src, ggml_tensor * dst) {
    if (!fasa_cuda_is_host_buft(src->buffer->buft)) {
        return false;
    }
    memcpy(fasa_host_at((fasa_host_buffer *) buffer->context, dst, 0), src->data, ggml_nbytes(src));
    return true;
}

static void fasa_host_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    auto * b = (fasa_host_buffer *) buffer->context;
    CUDA_CHECK(cudaStreamSynchronize(b->ahead.stream));
    char * const mem = b->mem;
    fasa_in_pieces(buffer->size, [=](size_t begin, size_t end) { memset(mem + begin, value, end - begin); });
}

static const ggml_backend_buffer_i fasa_host_buffer_interface = {
    /* .free_buffer   = */ fasa_host_free_buffer,
    /* .get_base      = */ fasa_host_get_base,
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */ fasa_host_memset_tensor,
    /* .set_tensor    = */ fasa_host_set_tensor,
    /* .get_tensor    = */ fasa_host_get_tensor,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ fasa_host_cpy_tensor,
    /* .clear         = */ fasa_host_clear,
    /* .reset         = */ nullptr,
};

// ---- the buffer type ----

struct fasa_host_buft {
    int device;
    std::string name;
};

static const char * fasa_host_buft_name(ggml_backend_buffer_type_t buft) {
    return ((fasa_host_buft *) buft->context)->name.c_str();
}

static ggml_backend_buffer_t fasa_host_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    const int device = ((fasa_host_buft *) buft->context)->device;
    ggml_cuda_set_device(device);
    const size_t mapped = (size + FASA_HUGE_PAGE - 1) / FASA_HUGE_PAGE * FASA_HUGE_PAGE;
    char * mem          = fasa_pin(mapped);
    if (mem == nullptr) {
        return nullptr;
    }
    auto * b = new fasa_host_buffer{ device, mem, mapped };
    b->ahead.init();
    return ggml_backend_buffer_init(buft, fasa_host_buffer_interface, b, size);
}

static size_t fasa_host_alignment(ggml_backend_buffer_type_t) {
    return 128;
}

static size_t fasa_host_alloc_size(ggml_backend_buffer_type_t buft, const ggml_tensor * t) {
    return ggml_backend_buft_get_alloc_size(
        ggml_backend_cuda_buffer_type(((fasa_host_buft *) buft->context)->device), t);
}

bool fasa_cuda_is_host_buft(ggml_backend_buffer_type_t buft) {
    return buft->iface.get_name == fasa_host_buft_name;
}

static bool fasa_reads_host_in_place(int device) {
#if defined(__linux__)
    int yes               = 0;
    const cudaError_t err = cudaDeviceGetAttribute(
        &yes, cudaDevAttrCanUseHostPointerForRegisteredMem, ggml_cuda_info().devices[device].physical_device);
    (void) cudaGetLastError();
    return err == cudaSuccess && yes;
#else
    GGML_UNUSED(device);
    return true; // cudaHostAlloc's memory
#endif
}

ggml_backend_buffer_type_t fasa_cuda_host_buft(ggml_backend_dev_t dev, fasa_on_error_t on_error) {
    static ggml_backend_buffer_type types[GGML_CUDA_MAX_DEVICES];
    static fasa_host_buft names[GGML_CUDA_MAX_DEVICES];
    static const int n_device = [] {
        const int n = ggml_backend_cuda_get_device_count();
        for (int i = 0; i < n; ++i) {
            names[i] = { i, GGML_CUDA_NAME + std::to_string(i) + "_FASA_Host" };
            types[i] = { { fasa_host_buft_name, fasa_host_alloc_buffer, fasa_host_alignment, nullptr,
                             fasa_host_alloc_size, nullptr },
                ggml_backend_reg_dev_get(ggml_backend_cuda_reg(), i), &names[i] };
        }
        return n;
    }();
    fasa_on_error = on_error;
    for (int i = 0; i < n_device; ++i) {
        if (types[i].device == dev && fasa_cuda_has_kernels(i) && fasa_reads_host_in_place(i)) {
            return &types[i];
        }
    }
    return nullptr;
}
