// fasa_find_gpu_limit: from how many cells on a layer on this device is faster with FASA than dense.

#include "core/crossover.h"
#include "core/error.h"
#include "core/notebook.h"
#include "llama/residence.h"
#include "measure/op-time.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <string>

#if !defined(_WIN32)
#    include <dlfcn.h>
#endif

static constexpr int FASA_PROBE_FORMAT     = 1;   // of what is kept: a probe that measures otherwise is another one
static constexpr double FASA_PROBE_SECONDS = 1.2; // no depth is begun after that
static constexpr int FASA_PROBE_REPEAT     = 5;
static constexpr size_t FASA_PROBE_BYTES   = 1ull << 30; // of device memory, at most; and a quarter of what is free
static const std::vector<uint32_t> FASA_PROBE_DEPTHS = { 2048, 4096, 8192, 16384, 32768, 65536 };

// ---- measuring ----

// what a case of the probe points to
struct fasa_probe_data {
    std::vector<float> q, weight;
    std::vector<int32_t> dims, forced;
    std::vector<uint8_t> k, v; // FASA_TIME_CELLS rows of the caches' types
};

static std::vector<float> fasa_probe_noise(size_t n) {
    std::vector<float> out(n);
    uint32_t x = 2463534242u;
    for (float & value : out) { // xorshift; the sum of two is nearer to how keys are spread than one
        x ^= x << 13, x ^= x >> 17, x ^= x << 5;
        value = (float) (x & 0xffff) / 65536.0f + (float) (x >> 16) / 65536.0f - 1.0f;
    }
    return out;
}

// the case but for n_kv and forced
static fasa_op_case fasa_probe_case(const fasa_gpu_case & g, fasa_probe_data & data) {
    fasa_op_case c = {};
    c.size         = sizeof(c);
    c.backend = c.tip_backend = g.backend;
    c.n_threads               = g.n_threads;
    c.n_head                  = g.n_head;
    c.n_head_kv               = g.n_head_kv;
    c.n_embd_head_k = c.n_embd_head_v = g.n_embd_head;
    c.n_tokens = c.n_stream = 1;
    c.type_k                = g.type_k;
    c.type_v                = g.type_v;
    c.k_dom                 = g.k_dom;
    c.n_dom                 = g.n_dom;
    c.scale                 = 1.0f / std::sqrt((float) g.n_embd_head);
    c.budget                = g.attended;
    c.cap                   = 1024;
    c.per_head              = g.per_head;
    c.n_forced              = g.n_forced;
    c.beside                = g.ahead ? g.beside : 0;
    data.q                  = fasa_probe_noise((size_t) g.n_head * g.n_embd_head);
    data.weight.assign((size_t) g.n_head_kv * g.n_dom, 1.0f);
    for (int h = 0; h < g.n_head_kv; ++h) {
        for (int i = 0; i < g.n_dom; ++i) {
            data.dims.push_back(i < g.n_embd_head ? i : -1);
        }
    }
    data.forced.resize(g.n_forced);
    c.q      = data.q.data();
    c.weight = data.weight.data();
    c.dims   = data.dims.data();
    c.forced = data.forced.data();
    return c;
}

static size_t fasa_probe_room(const fasa_gpu_case & g) {
    if (g.max_bytes > 0) {
        return g.max_bytes;
    }
    size_t free = 0, total = 0;
    ggml_backend_dev_t dev = ggml_backend_dev_by_name(g.backend);
    if (dev) {
        ggml_backend_dev_memory(dev, &free, &total);
    }
    return std::min(FASA_PROBE_BYTES, free / 4);
}

// Times depths on the device. It makes its data when it is first asked.
struct fasa_probe {
    const fasa_gpu_case & given;
    size_t room;
    std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
    fasa_probe_data data                        = {};
    fasa_op_case c                              = {};
    ggml_type type_k = GGML_TYPE_F16, type_v = GGML_TYPE_F16;
    std::string error = {}; // why a depth was not measured

    bool begin();
    bool time(fasa_depth_times & t);
};

bool fasa_probe::begin() {
    c                = fasa_probe_case(given, data);
    const auto noise = fasa_probe_noise((size_t) FASA_TIME_CELLS * given.n_head_kv * given.n_embd_head);
    c.n_kv           = FASA_PROBE_DEPTHS[0];
    c.k = c.v = noise.data();
    if (fasa_op_check(&c, type_k, type_v) != 0) {
        error = fasa_error();
        return false;
    }
    data.k = fasa_convert(noise.data(), type_k, FASA_TIME_CELLS * given.n_head_kv, given.n_embd_head);
    data.v = fasa_convert(noise.data(), type_v, FASA_TIME_CELLS * given.n_head_kv, given.n_embd_head);
    return true;
}

bool fasa_probe::time(fasa_depth_times & t) {
    const std::chrono::duration<double> so_far = std::chrono::steady_clock::now() - start;
    if (so_far.count() > FASA_PROBE_SECONDS || (data.k.empty() && !begin())) {
        return false;
    }
    c.n_kv            = t.n_cells;
    const size_t cell = (data.k.size() + data.v.size()) / FASA_TIME_CELLS, layer = cell * t.n_cells * 5 / 4;
    const size_t weights = (c.beside ? std::max<size_t>(c.beside, FASA_BESIDE_BYTES) : 0) * 5 / 4;
    if (weights + 2 * layer > room) {
        error = "the device has no room for more";
        return false;
    }
    for (int32_t i = 0; i < c.n_forced; ++i) { // the newest ones
        data.forced[i] = c.n_kv - 1 - i;
    }
    const size_t wanted = std::clamp<size_t>(FASA_TIME_BYTES / layer, 2, 16);
    const int n_layer   = (int) std::min(wanted, (room - weights) / layer);
    fasa_op_time_run run;
    if (run.init(c, n_layer, type_k, type_v, data.k, data.v) != 0) {
        error = fasa_error();
        return false;
    }
    t.dense = run.time(FASA_TIME_DENSE, FASA_PROBE_REPEAT);
    const double fasa   = run.time(c.beside ? FASA_TIME_AHEAD : FASA_TIME_FASA, FASA_PROBE_REPEAT);
    const double beside = c.beside ? run.time(FASA_TIME_BESIDE, FASA_PROBE_REPEAT) : 0.0;
    if (std::min({ t.dense, fasa, beside }) < 0) {
        error = fasa_error();
        return false;
    }
    t.fasa = std::max(fasa - beside, 0.0);
    return true;
}

// ---- what it depends on ----

// a library's file, by size and time: another build measures anew
static std::string fasa_build_of(const void * function) {
#if !defined(_WIN32)
    Dl_info info = {};
    std::error_code error;
    if (function && dladdr(function, &info) && info.dli_fname) {
        const auto size = std::filesystem::file_size(info.dli_fname, error);
        const auto time = std::filesystem::last_write_time(info.dli_fname, error).time_since_epoch().count();
        return std::to_string(size) + ":" + std::to_string((long long) time);
    }
#endif
    return function ? "unknown" : "none";
}

static std::string fasa_probe_key(const fasa_gpu_case & g) {
    using describe_t       = const char * (*)(ggml_backend_dev_t);
    ggml_backend_dev_t dev = ggml_backend_dev_by_name(g.backend);
    const auto describe    = fasa_device_proc<describe_t>(dev, "fasa_device_versions");
    char text[512];
    snprintf(text, sizeof(text),
        "format=%d version=%s device=%s driver=%s build=%s,%s heads=%d kv=%d dim=%d k=%s v=%s k_dom=%d n_dom=%d "
        "attended=%u forced=%d per_head=%d ahead=%d beside=%llu",
        FASA_PROBE_FORMAT, fasa_version(), dev ? ggml_backend_dev_description(dev) : g.backend,
        describe ? describe(dev) : "none", fasa_build_of((const void *) &fasa_version).c_str(),
        fasa_build_of((const void *) describe).c_str(), g.n_head, g.n_head_kv, g.n_embd_head, g.type_k, g.type_v,
        g.k_dom, g.n_dom, g.attended, g.n_forced, g.per_head, g.ahead, (unsigned long long) (g.ahead ? g.beside : 0));
    return text;
}

// ---- finding it ----

static void fasa_limit_set(fasa_gpu_limit * out, uint32_t cells, int32_t source, const std::string & note) {
    out->cells  = cells;
    out->source = source;
    snprintf(out->note, sizeof(out->note), "%s", note.c_str());
}

static std::vector<fasa_depth_times> fasa_probe_measure(const fasa_gpu_case & g, std::string & why) {
    if (g.timer) {
        return fasa_measure_depths(FASA_PROBE_DEPTHS,
            [&](fasa_depth_times & t) { return g.timer(t.n_cells, &t.dense, &t.fasa, g.user) == 0; });
    }
    fasa_probe probe = { g, fasa_probe_room(g) };
    const auto found = fasa_measure_depths(FASA_PROBE_DEPTHS, [&](fasa_depth_times & t) { return probe.time(t); });
    why              = probe.error;
    return found;
}

static int fasa_find_gpu_limit_case(const fasa_gpu_case * g, fasa_gpu_limit * out) {
    if (fasa_check_size(g, "fasa_gpu_case") != 0 || fasa_check_size(out, "fasa_gpu_limit") != 0 ||
        fasa_check_given(g->backend, "backend") != 0 || fasa_check_given(g->type_k, "type_k") != 0 ||
        fasa_check_given(g->type_v, "type_v") != 0) {
        return -1;
    }
    if (fasa_check_range("n_head", g->n_head, 1, 1 << 16) != 0 ||
        fasa_check_range("n_head_kv", g->n_head_kv, 1, g->n_head) != 0 ||
        fasa_check_range("n_embd_head", g->n_embd_head, 1, 1 << 16) != 0 ||
        fasa_check_range("n_dom", g->n_dom, 1, 1 << 16) != 0 ||
        fasa_check_range("n_forced", g->n_forced, 1, 1 << 18) != 0) {
        return -1;
    }
    static std::mutex lock; // a probe at a time, and none twice in a process
    std::lock_guard<std::mutex> held(lock);
    const fasa_notebook book("min_context_gpu", fasa_probe_key(*g));
    uint32_t cells = 0;
    if (book.read(cells)) {
        fasa_limit_set(out, cells, FASA_LIMIT_KEPT, "");
        return 0;
    }
    const fasa_notebook::turn turn(book);
    if (book.read(cells)) { // by now
        fasa_limit_set(out, cells, FASA_LIMIT_KEPT, "");
        return 0;
    }
    std::string why;
    cells = fasa_crossover_of(fasa_probe_measure(*g, why));
    if (cells == 0) {
        fasa_limit_set(out, FASA_GPU_LIMIT, FASA_LIMIT_DEFAULT,
            "the device could not be probed" + (why.empty() ? "" : ": " + why));
        return 0;
    }
    why.clear();
    fasa_limit_set(out, cells, FASA_LIMIT_PROBED, book.write(cells, why) ? "" : "it is not kept: " + why);
    return 0;
}

int fasa_find_gpu_limit(const fasa_gpu_case * g, fasa_gpu_limit * out) {
    return fasa_guard("fasa_find_gpu_limit", [&] { return fasa_find_gpu_limit_case(g, out); });
}
