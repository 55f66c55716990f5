"""Selecting ahead where a graph is cut: experts on the CPU beside layers on a GPU, and ggml-cuda's own branches."""

import numpy as np
import pytest
from reported import python
from tiny_archs import write_experts
from tiny_gguf import write_tiny

from fasa_gguf import FasaParams
from fasa_gguf.reasons import Reason
from fasa_gguf.speed.random_model import synthetic_profile

SOME = FasaParams(chunks=4, budget=40, min_context=0, k_dom="f16", per_head=1)
N_PROMPT, N_STEPS = 300, 24


@pytest.fixture(params=["CPU", "GPU"])
def n_gpu_layers(request):
    if request.param == "GPU":
        request.getfixturevalue("cuda")
    return 99 if request.param == "GPU" else 0


def generate(model, params, invalidate=False, **settings):
    """Logits of a prompt's end and N_STEPS steps, layers ahead a step, and why each layer is not."""
    from fasa_gguf.session import Session

    rng = np.random.default_rng(1)
    with Session(model, n_ctx=1024, n_threads=2, **settings) as s:
        shapes = [s.fasa.layer_shape(il) for il in range(s.fasa.model_info()["n_layer"])]
        s.fasa.set_profile(synthetic_profile([h[1] for h in shapes], [h[2] // 2 for h in shapes], seed=3))
        s.fasa.set_params(params)
        logits = [s.decode(list(rng.integers(3, 60, N_PROMPT)), 0)]
        for i in range(N_STEPS):
            if invalidate:
                s.fasa.invalidate()
            logits.append(s.decode([int(logits[-1].argmax())], N_PROMPT + i))
        return np.stack(logits), s.fasa.counters()["layers_ahead"] / N_STEPS, s.fasa.layer_ahead_codes()


@pytest.mark.parametrize("n_cpu_moe", [0, 1, 2, 4])
def test_experts_on_the_cpu(library, tmp_path, n_gpu_layers, n_cpu_moe):
    """A layer behind experts on another device has its own queries; with experts that add nothing, all steps are the
    same, and with others never stale."""
    write_experts(tmp_path / "still.gguf", still=True)
    write_experts(tmp_path / "moe.gguf")
    where = {"n_gpu_layers": n_gpu_layers, "n_cpu_moe": n_cpu_moe}
    off, _, _ = generate(tmp_path / "still.gguf", SOME.replace(ahead="off"), **where)
    on, n_ahead, why = generate(tmp_path / "still.gguf", SOME.replace(ahead="on"), **where)
    n_behind = min(n_cpu_moe, 3) if n_gpu_layers else 0
    assert why == [Reason.AHEAD_FIRST] + n_behind * [Reason.AHEAD_DEVICE] + (3 - n_behind) * [Reason.NONE]
    assert n_ahead == 3 - n_behind and np.array_equal(off, on)
    mine, n_ahead, _ = generate(tmp_path / "moe.gguf", SOME.replace(ahead="on"), **where)
    fresh, _, _ = generate(tmp_path / "moe.gguf", SOME.replace(ahead="on"), invalidate=True, **where)
    assert n_ahead == 3 - n_behind and np.array_equal(mine, fresh) and np.isfinite(mine).all()


CODE = """
import sys
sys.path.insert(0, "tests/native"); sys.path.insert(0, "tests/helpers")
import numpy as np
from test_ahead_placed import SOME, generate
for ahead in ("off", "on"):
    logits, n_ahead, _ = generate(sys.argv[1], SOME.replace(ahead=ahead), n_gpu_layers=99)
    np.save(f"{sys.argv[2]}-{ahead}.npy", logits)
    print(int(n_ahead))
"""


@pytest.mark.parametrize("opt", ["0", "1"])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_branches_of_ggml_cuda(cuda, tmp_path, opt, kind):
    """With GGML_CUDA_GRAPH_OPT=1 ggml-cuda has branches of its own, and nothing is forked: the same steps, again and
    again. It also orders nodes anew, so that others are fused in a graph of experts: the steps of one setting are equal
    bit for bit, those of both up to rounding."""
    import os

    path = tmp_path / "still.gguf"
    if kind == "dense":
        write_tiny(path, feed_forward=0)
    else:
        write_experts(path, still=True)
    got = []
    for name in "ab":
        run = python(CODE, path, tmp_path / name, env=os.environ | {"GGML_CUDA_GRAPH_OPT": opt})
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == ["0", "2" if kind == "dense" else "3"]
        got += [np.load(tmp_path / f"{name}-{ahead}.npy") for ahead in ("off", "on")]
    off, on, off_again, on_again = got
    assert np.array_equal(off, off_again) and np.array_equal(on, on_again)
    rounding = 1e-5 if (kind, opt) == ("experts", "1") else 0
    assert np.abs(off - on).max() <= rounding * np.abs(off).max()


def test_steps_of_two_sequences_that_are_ahead_and_not(cuda, tmp_path):
    """Under auto steps of one token select ahead and others do not; sequences in buffers of their own take turns."""
    from fasa_gguf.session import Session

    write_tiny(tmp_path / "m.gguf")
    order = [(0, 1), (0, 1), (1, 2), (0, 2), (1, 1), (0, 1), (1, 2), (0, 3), (1, 1), (1, 2), (0, 2), (1, 1)]
    got = []
    for invalidate in (False, True):
        with Session(tmp_path / "m.gguf", n_ctx=2048, n_seq_max=2, n_threads=2, n_gpu_layers=99) as s:
            s.fasa.set_profile(synthetic_profile([2] * 3, [8] * 3, seed=3))
            s.fasa.set_params(SOME.replace(budget=100, sink=1, recent=1, ahead="auto"))
            at, rows = [200, 200], []
            for seq in (0, 1):
                s.decode([i * (7 + seq) % 250 + 3 for i in range(200)], 0, seq, logits="none")
            for seq, n in order:
                if invalidate:
                    s.fasa.invalidate()
                before = s.fasa.counters()["layers_ahead"]
                with s.fasa.step_kind("decode"):
                    s.decode_batch([(9 + (at[seq] + i) % 200, at[seq] + i, seq, True) for i in range(n)])
                assert s.fasa.counters()["layers_ahead"] - before == (2 if n == 1 else 0)
                rows += [s.logits(i) for i in range(n)]
                at[seq] += n
            got.append(np.stack(rows))
    assert np.array_equal(*got)


def test_experts_on_the_cpu_in_bench(library, tmp_path):
    from fasa_gguf.speed.bench import BenchSettings, bench

    write_experts(tmp_path / "moe.gguf")
    settings = BenchSettings(depths=(300,), n_gen=4, n_prompt=(), repetitions=1, n_threads=1, n_cpu_moe=2)
    profile = synthetic_profile([2] * 4, [8] * 4, seed=3)
    results = bench(tmp_path / "moe.gguf", settings, {"fasa": SOME}, profile)
    assert [r.config["n_cpu_moe"] for r in results] == [2, 2] and results[1].sparse_share == 1
