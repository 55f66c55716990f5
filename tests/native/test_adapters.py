"""LoRA adapters and control vectors with FASA: lists, foreseen queries, and adapters that come and go."""

import numpy as np
import pytest
from tiny_adapters import control_vector, load_lora, set_control_vector, set_loras, write_lora
from tiny_gguf import write_tiny

from fasa_gguf import FasaParams
from fasa_gguf.reasons import Reason
from fasa_gguf.runtime.devices import cuda_devices
from fasa_gguf.speed.random_model import synthetic_profile

SOME = FasaParams(chunks=4, budget=40, min_context=0, k_dom="f16")
N_PROMPT, N_STEPS = 300, 24
TOKENS = np.random.default_rng(2).integers(3, 259, 40).tolist()


@pytest.fixture(params=["CPU", "GPU"])
def n_gpu_layers(request):
    if request.param == "GPU":
        request.getfixturevalue("cuda")
    return 99 if request.param == "GPU" else 0


@pytest.fixture(scope="module")
def still(tmp_path_factory, library):
    """A model whose feed-forwards add nothing: foreseen queries are the true ones."""
    path = tmp_path_factory.mktemp("still") / "still.gguf"
    write_tiny(path, feed_forward=0)
    return path


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "lora.gguf"
    write_lora(path)
    return path


@pytest.fixture(scope="module")
def lora_q(tmp_path_factory):
    """Of W_q alone."""
    path = tmp_path_factory.mktemp("lora") / "q.gguf"
    write_lora(path, parts=("attn_q",), seed=9)
    return path


def open_session(model, **kw):
    from fasa_gguf.session import Session

    s = Session(model, **{"n_ctx": 1024, "n_threads": 2, **kw})
    s.fasa.set_profile(synthetic_profile([2] * 3, [8] * 3, seed=3))
    return s


def generate(s, params):
    """Logits of a prompt's end and of N_STEPS steps, [1 + N_STEPS, n_vocab], and the counters."""
    s.fasa.set_params(params)
    s.fasa.reset_counters()
    s.clear()
    logits = [s.decode([i * 7 % 250 + 3 for i in range(N_PROMPT)], 0)]
    for i in range(N_STEPS):
        logits.append(s.decode([40 + 5 * i], N_PROMPT + i))
    return np.stack(logits), s.fasa.counters()


def observed(s, tokens=TOKENS):
    """By layer what an observer sees of a prompt: (q, q_ahead or None, why)."""
    seen = {}
    s.clear()
    s.fasa.observe(lambda o: seen.update({o.il: (o.q, o.q_ahead, o.ahead_reason)}))
    s.decode(tokens, 0, logits="none")
    s.fasa.observe(None)
    s.fasa.raise_observed()
    return seen


# how a context is adapted: by name what is done to a session
def adapt(s, how, lora, lora_q):
    if how == "control vector":
        set_control_vector(s, control_vector())
    elif how == "both":
        set_control_vector(s, control_vector())
        set_loras(s, [(load_lora(s, lora), 1.0)])
    else:
        files = {"lora": [lora], "lora of W_q": [lora_q], "two loras": [lora, lora_q]}[how]
        set_loras(s, [(load_lora(s, path), 0.8) for path in files])


HOW = ["lora", "lora of W_q", "two loras", "control vector", "both"]


@pytest.mark.parametrize("how", HOW)
def test_true_queries_give_the_same_steps(still, lora, lora_q, n_gpu_layers, how):
    """Selecting ahead takes an adapter of W_q along, bit for bit; two on one W_q leave the layer its own queries."""
    params = SOME.replace(per_head=1)
    with open_session(still, n_gpu_layers=n_gpu_layers) as s:
        plain, _ = generate(s, params.replace(ahead="on"))
        adapt(s, how, lora, lora_q)
        own, _ = generate(s, params.replace(ahead="off"))
        ahead, counted = generate(s, params.replace(ahead="on"))
        codes = s.fasa.layer_ahead_codes()
    two = how == "two loras"
    assert codes == ([Reason.AHEAD_UNKNOWN] * 3 if two else [Reason.AHEAD_FIRST, Reason.NONE, Reason.NONE])
    assert counted["layers_ahead"] == (0 if two else 2 * N_STEPS)
    assert np.array_equal(own, ahead) and not np.array_equal(plain, ahead)


@pytest.mark.parametrize("how", ["lora", "lora of W_q", "control vector", "both"])
def test_foreseen_queries_are_those_of_a_model_without_the_feed_forward(tiny, tmp_path, lora, lora_q, how):
    with open_session(tiny, n_ctx=256) as s:
        before = observed(s)
        adapt(s, how, lora, lora_q)
        seen = observed(s)
    for il in (1, 2):
        write_tiny(
            other := tmp_path / f"{il}.gguf",
            change=lambda name, x, at=f"blk.{il - 1}.ffn_down.weight": x * (name != at),
        )
        with open_session(other, n_ctx=256) as s:
            adapt(s, how, lora, lora_q)
            other = observed(s)
        # where a GPU helps with the prompt, another kernel multiplies the dominant rows alone
        error = np.abs(seen[il][1] - other[il][0]).max()
        assert seen[il][2] == Reason.NONE and error <= (1e-2 * np.abs(other[il][0]).max() if cuda_devices() else 0)
        # what a control vector adds behind layer 1 is the first that llama.cpp applies
        assert np.array_equal(seen[il][1], before[il][1]) == (how == "control vector" and il == 1)


def test_lists_follow_the_adapted_queries(library, tmp_path, n_gpu_layers):
    """The same steps as those of a model into which the adapter was merged, for the lists too."""
    added = write_lora(tmp_path / "lora.gguf")
    write_tiny(tmp_path / "plain.gguf")
    merged = tmp_path / "merged.gguf"
    write_tiny(merged, change=lambda name, x: x + added.get(key_of(name), 0))
    got = []
    for model in (tmp_path / "plain.gguf", merged):
        with open_session(model, n_gpu_layers=n_gpu_layers) as s:
            if model != merged:
                set_loras(s, [(load_lora(s, tmp_path / "lora.gguf"), 1.0)])
            params = SOME.replace(mass=0.6, floor=1, cap=300)
            got.append(generate(s, params.replace(ahead="off")))
    (logits, c), (wanted, of_merged) = got
    # sums in another order choose other tokens in a near-tie, in some steps; without the adapter the median is 1
    errors = np.abs(logits - wanted).max(-1) / np.abs(wanted).max()
    assert np.median(errors) < 1e-2
    assert abs(c["tokens_attended"] - of_merged["tokens_attended"]) < 0.03 * of_merged["tokens_attended"]


def key_of(name):
    """(layer, part) of blk.N.PART.weight"""
    words = name.split(".")
    return (int(words[1]), words[2]) if words[0] == "blk" else None


@pytest.mark.parametrize("how", HOW)
def test_all_tokens_attended_is_dense(tiny, lora, lora_q, n_gpu_layers, how):
    """With a budget of all cells the logits are those of dense attention, but for the order of sums."""
    got = []
    for params in (SOME.replace(chunks=8, budget=1024), None):
        with open_session(tiny, n_gpu_layers=n_gpu_layers) as s:
            adapt(s, how, lora, lora_q)
            logits, counted = generate(s, params)
            got.append(logits)
            assert counted["steps_sparse"] == (N_STEPS if params else 0)
    assert np.abs(got[0] - got[1]).max() < 1e-2 * np.abs(got[1]).max()


@pytest.mark.parametrize("ahead", ["off", "on"])
def test_adapters_that_come_and_go(tiny, lora, n_gpu_layers, ahead):
    """In a live context dominant keys are never stale: those of the cells that are stored, whoever wrote them."""
    params, got = FasaParams(chunks=4, budget=40, min_context=0, k_dom="f16", ahead=ahead), []
    for invalidate in (False, True):
        with open_session(tiny, n_gpu_layers=n_gpu_layers) as s:
            pointer, rows = load_lora(s, lora), []
            s.fasa.set_params(params)
            s.decode([i * 7 % 250 + 3 for i in range(N_PROMPT)], 0, logits="none")
            for i in range(12):
                set_loras(s, [(pointer, 1.0)] if i % 4 < 2 else [])
                set_control_vector(s, control_vector() if i % 3 == 0 else None)
                if invalidate:
                    s.fasa.invalidate()
                rows.append(s.decode([40 + i], N_PROMPT + i))
            assert s.fasa.counters()["steps_sparse"] == 12
            got.append(np.stack(rows))
    assert np.array_equal(got[0], got[1]) and len(np.unique(got[0][:, 0])) == 12
