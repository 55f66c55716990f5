"""The C code that checks what callers give, under the address and undefined-behaviour sanitizers.

native/core, native/llama/profile.cpp and the parameters of a node are compiled with a driver and stubs of llama.cpp;
a read beyond an array, or through a misaligned pointer, ends the driver.
"""

import shutil
import subprocess

import pytest
from paths import ROOT

LLAMA = ROOT / "build" / "native" / "llama.cpp-src"
GGML = LLAMA / "ggml" / "include"
STUBS = {
    "llama-model.h": """
#pragma once
#include <cstdint>
struct llama_hparams {
    uint32_t n_layer() const { return 3; }
    uint32_t n_head_kv(uint32_t) const { return 2; }
    uint32_t n_embd_head_k(uint32_t) const { return 16; }
};
struct llama_model { llama_hparams hparams; };
""",
    "llama-context.h": """
#pragma once
#include "llama-model.h"
struct llama_context { llama_model model; const llama_model & get_model() const { return model; } };
""",
    "llama/cache.h": """
#pragma once
#include "llama/state.h"
#include <memory>
struct fasa_cache { std::shared_ptr<fasa_state> state = std::make_shared<fasa_state>(); };
std::vector<fasa_cache *> fasa_caches_of(const llama_context * ctx);
int fasa_configure(llama_context * ctx, const std::vector<fasa_cache *> & caches);
struct fasa_change {
    fasa_change(const std::vector<fasa_cache *> & caches);
    ~fasa_change();
    explicit operator bool() const { return state != nullptr; }
    std::shared_ptr<fasa_state> state;
};
""",
}
DRIVER = """
#include "llama/cache.h"
#include "llama-context.h"
#include "ops/ops.h"
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

static fasa_cache cache;
std::vector<fasa_cache *> fasa_caches_of(const llama_context *) { return { &cache }; }
int fasa_configure(llama_context *, const std::vector<fasa_cache *> &) { return 0; }
fasa_change::fasa_change(const std::vector<fasa_cache *> & caches) {
    if (caches[0]->state->turn.try_take()) {
        state = caches[0]->state;
    }
}
fasa_change::~fasa_change() {
    if (state) {
        state->turn.give();
    }
}

#define EXPECT(x) if (!(x)) { printf("line %d: %s: %s\\n", __LINE__, #x, fasa_error()); exit(1); }

struct owned { // arrays on the heap, exactly as long as they are said to be
    std::vector<uint32_t> heads, chunks, tokens;
    std::vector<uint16_t> ranking;
    std::vector<float> weight, miss, mass;
    fasa_profile p = {};
    owned(size_t n_ranking, uint32_t weight_k, size_t n_weight, size_t n_miss)
        : heads(3, 2), chunks(3, 8), tokens{ 100, 200 }, ranking(n_ranking), weight(n_weight, 1.0f), miss(n_miss, 1.0f),
          mass{ 0.5f, 0.9f } {
        for (size_t i = 0; i < n_ranking; ++i) {
            ranking[i] = i % 8;
        }
        p.size = sizeof(p), p.n_layer = 3, p.n_head_kv = heads.data(), p.n_chunk = chunks.data();
        p.n_ranking = n_ranking, p.ranking = ranking.data(), p.weight_k = weight_k, p.n_weight = n_weight;
        p.weight = weight.data(), p.n_layer_miss = n_miss, p.layer_miss = miss.data(), p.n_mean_budget = 2;
        p.mean_budget = tokens.data(), p.mean_budget_mass = mass.data();
    }
};

static void profiles() {
    llama_context ctx;
    for (size_t n_ranking : { 0, 1, 47, 48, 49 }) {
        for (uint32_t weight_k : { 0u, 2u, 8u, 9u, 1000u, 1u << 31, UINT32_MAX }) {
            for (size_t n_weight : { 0, 12, 48 }) {
                for (size_t n_miss : { 0, 1, 3, 4 }) {
                    owned o(n_ranking, weight_k, n_weight, n_miss);
                    const bool good = n_ranking == 48 && weight_k <= 8 && n_weight == 6 * weight_k && n_miss % 3 == 0;
                    EXPECT((fasa_set_profile(&ctx, &o.p) == 0) == good);
                }
            }
        }
    }
    owned o(48, 2, 12, 3);
    o.ranking[7] = 65535;
    EXPECT(fasa_set_profile(&ctx, &o.p) == -1);
    o.ranking[7] = 7, o.weight[11] = NAN;
    EXPECT(fasa_set_profile(&ctx, &o.p) == -1);
    o.weight[11] = 0, o.chunks[1] = UINT32_MAX;
    EXPECT(fasa_set_profile(&ctx, &o.p) == -1);
    o.chunks[1] = 0, o.heads[1] = UINT32_MAX; // not ranked: its heads do not matter
    o.p.n_ranking = 32, o.p.n_weight = 8;
    EXPECT(fasa_set_profile(&ctx, &o.p) == 0);
    EXPECT(fasa_set_profile(&ctx, nullptr) == -1);
    cache.state->turn.take(); // as a decode does
    EXPECT(fasa_set_profile(&ctx, &o.p) == -1);
    cache.state->turn.give();
    EXPECT(fasa_set_profile(&ctx, &o.p) == 0);
}

static void settings() {
    EXPECT(fasa_default_chunks(32) == 12 && fasa_default_chunks(UINT32_MAX) == 1610612732u);
    EXPECT(fasa_pool_bytes(UINT32_MAX, UINT32_MAX) > 0 && fasa_reason_text(-1) == nullptr);
    EXPECT(fasa_mean_budget_cap(UINT32_MAX) > 0 && fasa_reason_text(1000) == nullptr);
}

static void ranking() {
    std::vector<float> q(2 * 3 * 6, 0.5f), k(9 * 6, 0.25f), recall(3);
    std::vector<int32_t> dims{ 0, 1, 2, 3, 4, 5 }, pos{ 0, 4, 8 }, order(3);
    fasa_rank_case c = {};
    c.size = sizeof(c), c.n_group = 2, c.n_query = 3, c.n_kv = 9, c.n_embd_head = 6, c.n_chunk = 3, c.n_rank = 3;
    c.budget = 4, c.sink = INT32_MAX, c.recent = 1, c.n_threads = 2, c.scale = 1, c.chunk_dims = dims.data();
    c.q = q.data(), c.k = k.data(), c.q_pos = pos.data(), c.out_order = order.data(), c.out_recall = recall.data();
    EXPECT(fasa_rank_recall(&c) == 0);
    c.sink = 0, c.recent = INT32_MAX, c.budget = INT32_MAX;
    EXPECT(fasa_rank_recall(&c) == 0);
    k[3] = NAN;
    EXPECT(fasa_rank_recall(&c) == -1);
    k[3] = 3e38f, k[4] = -3e38f;
    fasa_rank_recall(&c);
    dims[5] = 6;
    EXPECT(fasa_rank_recall(&c) == -1);
}

static void nodes() {
    ggml_tensor t = {};
    fasa_op_params p = {};
    p.magic = FASA_OP_MAGIC, p.budget = 512, p.userdata = &t;
    t.op = GGML_OP_CUSTOM;
    memcpy(t.op_params, &p, sizeof(p));
    const fasa_op_params * got = fasa_op_get(&t);
    EXPECT(got && got->userdata == &t && got->fun == nullptr && got->budget == 512);
    const fasa_op_params copy = *got;
    EXPECT(copy.cap == 0);
}

int main() {
    profiles();
    settings();
    ranking();
    nodes();
    puts("good");
}
"""


def test_under_sanitizers(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not GGML.exists():
        pytest.skip("needs g++ or clang++ and the source that `make build` unpacks")
    for name, text in {**STUBS, "driver.cpp": DRIVER}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    native = ROOT / "native"
    sources = [tmp_path / "driver.cpp", native / "llama" / "profile.cpp", *sorted((native / "core").glob("*.cpp"))]
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
    # the clones of a function are chosen before the sanitizer has started
    flags += ["-Dtarget_clones(...)=unused", "-Wno-attributes", f"-I{tmp_path}", f"-I{native}"]
    flags += [f"-I{LLAMA / 'include'}", f"-I{GGML}"]
    built = subprocess.run(
        [compiler, *flags, *map(str, sources), "-o", tmp_path / "driver"], capture_output=True, text=True
    )
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip(f"{compiler} has no sanitizers here")
    assert built.returncode == 0, built.stderr[-3000:]
    ran = subprocess.run([tmp_path / "driver"], capture_output=True, text=True)
    assert ran.stdout == "good\n", ran.stdout + ran.stderr[-3000:]
