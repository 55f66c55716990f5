"""Settings, profiles and statistics from a second thread while the first one decodes, under the thread sanitizer.

`make thread-tests` builds the library with -fsanitize=thread into build/threads. The driver's control changes a setting
behind the library's back, which the sanitizer must see: where it is blind, nothing is proven.
"""

import os
import platform
import re
import shutil
import subprocess

import pytest
from paths import ROOT
from tiny_archs import write_sliding
from tiny_gguf import write_tiny

LIBS = ROOT / "build" / "threads" / "bin"
LLAMA = ROOT / "build" / "threads" / "llama.cpp-src"
DRIVER = r"""
#include "llama/cache.h"
#include "llama-context.h"
#include "llama.h"
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

std::vector<fasa_cache *> fasa_caches_of(const llama_context * ctx);

#define EXPECT(x) if (!(x)) { printf("line %d: %s: %s\n", __LINE__, #x, fasa_error()); exit(1); }

struct profile { // every layer, chunks in order
    std::vector<uint32_t> heads, chunks;
    std::vector<uint16_t> ranking;
    fasa_profile p = {};
    explicit profile(const llama_context * ctx) {
        fasa_model_info info = {};
        info.size = sizeof(info);
        EXPECT(fasa_get_model_info(ctx, &info) == 0);
        for (uint32_t il = 0; il < info.n_layer; ++il) {
            int32_t shape[4];
            EXPECT(fasa_get_layer_shape(ctx, il, shape) == 0);
            heads.push_back(shape[1]);
            chunks.push_back(shape[2] / 2);
            for (uint32_t i = 0; i < heads[il] * chunks[il]; ++i) {
                ranking.push_back(i % chunks[il]);
            }
        }
        p.size = sizeof(p), p.n_layer = info.n_layer, p.n_head_kv = heads.data(), p.n_chunk = chunks.data();
        p.n_ranking = ranking.size(), p.ranking = ranking.data();
    }
};

static fasa_params settings(uint32_t budget, uint32_t k_dom) {
    fasa_params p = fasa_params_default();
    p.enabled = 1, p.min_context = 0, p.budget = budget, p.sink = 2, p.recent = 4, p.chunks = 4, p.k_dom = k_dom;
    return p;
}

static void seen(const fasa_observation *, void * user) { ++*static_cast<std::atomic<int> *>(user); }

static std::atomic<bool> stop{ false };
static std::atomic<int> changed{ 0 }, refused{ 0 }, read_{ 0 }, observed{ 0 };

static void count(int result) { ++(result == 0 ? changed : refused); }

// a turn of someone who changes everything that may be changed
static void change(llama_context * ctx, const profile & known, int i) {
    fasa_params p = settings(16 + i % 3 * 8, i % 3), off = fasa_params_default();
    count(fasa_set_params(ctx, i % 5 == 4 ? &off : &p));
    count(fasa_set_profile(ctx, &known.p));
    count(fasa_invalidate(ctx));
    count(fasa_reset_counters(ctx));
    count(fasa_set_observer(ctx, i % 2 ? seen : nullptr, &observed));
    fasa_borrow_list(ctx, 2, 1); // refused where layers do not fit, too
    fasa_borrow_list(ctx, 2, -1);
    fasa_set_step(ctx, FASA_STEP_AUTO);
}

static void read(llama_context * ctx) {
    fasa_counters c = {};
    fasa_params p = {};
    c.size = sizeof(c), p.size = sizeof(p);
    EXPECT(fasa_get_counters(ctx, &c) == 0 && fasa_get_params(ctx, &p) == 0);
    EXPECT(fasa_get_layer_params(ctx, 1, &p) == 0);
    fasa_step_reason(ctx);
    for (int il = 0; il < 3; ++il) {
        fasa_layer_reason(ctx, il);
    }
    ++read_;
}

static void decode(llama_context * ctx, std::vector<llama_token> tokens, int n) {
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    for (int i = 0; i < n; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(2)); // others get their turn
        EXPECT(llama_decode(ctx, llama_batch_get_one(tokens.data(), tokens.size())) == 0);
        const float * logits = llama_get_logits_ith(ctx, -1);
        tokens = { 0 };
        for (int t = 1; t < n_vocab; ++t) {
            tokens[0] = logits[t] > logits[tokens[0]] ? t : tokens[0];
        }
    }
}

int main(int argc, char ** argv) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx = 512, cparams.n_threads = cparams.n_threads_batch = 2;
    cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED, cparams.swa_full = true;
    llama_context * ctx = model ? llama_init_from_model(model, cparams) : nullptr;
    EXPECT(ctx);
    const profile known(ctx);
    fasa_params p = settings(16, 0);
    EXPECT(fasa_set_profile(ctx, &known.p) == 0 && fasa_set_params(ctx, &p) == 0);
    const std::vector<llama_token> prompt(40, 5);
    const std::string what = argv[2];
    std::thread other([&] {
        for (int i = 0; !stop; ++i) {
            if (what == "change") {
                change(ctx, known, i);
            }
            if (what == "control") { // as a fasa_set_params without its turn would
                fasa_caches_of(ctx)[0]->state->params.budget = 16 + i % 8;
            }
            read(ctx);
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    });
    for (int round = 0; round < 3; ++round) {
        llama_memory_clear(llama_get_memory(ctx), true);
        decode(ctx, prompt, 25);
    }
    stop = true;
    other.join();
    EXPECT(fasa_set_params(ctx, &p) == 0);
    decode(ctx, prompt, 20);
    fasa_counters c = {};
    c.size = sizeof(c);
    EXPECT(fasa_get_counters(ctx, &c) == 0);
    llama_free(ctx);
    llama_model_free(model);
    printf("good: %d changes, %d refused, %d reads, %d sparse steps\n", changed.load(), refused.load(), read_.load(),
        (int) c.steps_sparse);
}
"""
WITHOUT_ASLR = ["setarch", platform.machine(), "-R"]  # the sanitizer of older compilers dies of many random bits


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if not (LIBS / "libllama.so").exists():
        pytest.skip("no library with the thread sanitizer; run `make thread-tests`")
    if (ROOT / "native" / "fasa.h").stat().st_mtime > (LIBS / "libllama.so").stat().st_mtime:
        pytest.skip("the library with the thread sanitizer is older than native/fasa.h; run `make thread-tests`")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("threads")
    (folder / "driver.cpp").write_text(DRIVER)
    includes = [LLAMA / "include", LLAMA / "src", LLAMA / "ggml" / "include", ROOT / "native"]
    command = [compiler, "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", *(f"-I{i}" for i in includes)]
    libraries = [f"-L{LIBS}", "-lllama", "-lggml", "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{LIBS}"]
    built = subprocess.run(
        [*command, folder / "driver.cpp", "-o", folder / "driver", *libraries], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-3000:]
    return folder / "driver"


def run(driver, model, what):
    """The driver under the sanitizer, whose report goes to stderr and whose exit code is 66."""
    env = {**os.environ, "TSAN_OPTIONS": "exitcode=66 halt_on_error=0 report_signal_unsafe=0"}
    prefix = WITHOUT_ASLR if shutil.which("setarch") else []
    ran = subprocess.run([*prefix, driver, model, what], capture_output=True, text=True, env=env, timeout=300)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("the thread sanitizer cannot map its memory here: " + ran.stderr.strip().splitlines()[0])
    return ran


@pytest.fixture(scope="module", params=["one cache", "two caches"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("threads") / "model.gguf"
    {"one cache": write_tiny, "two caches": write_sliding}[request.param](path)
    return path


@pytest.mark.parametrize("what", ["read", "change"])
def test_a_second_thread_while_one_decodes(driver, model, what):
    ran = run(driver, model, what)
    assert ran.returncode == 0 and "WARNING" not in ran.stderr, ran.stdout + ran.stderr[:6000]
    changes, refused, reads, sparse = map(int, re.findall(r"\d+", ran.stdout))
    assert ran.stdout.startswith("good: ") and reads > 20 and sparse > 0
    assert (changes > 20 and refused > 20) if what == "change" else sparse > 70


def test_the_sanitizer_sees_a_change_without_its_turn(driver, model):
    ran = run(driver, model, "control")
    assert ran.returncode == 66 and "data race" in ran.stderr, ran.stdout + ran.stderr[:2000]
