"""Selecting ahead: the foreseen queries, the laws that lists keep, and which cells they hold."""

import numpy as np
import pytest
from tiny_gguf import write_tiny

from fasa_gguf import FasaParams
from fasa_gguf.reasons import Reason
from fasa_gguf.speed.random_model import synthetic_profile

SOME = FasaParams(chunks=4, budget=40, min_context=0, k_dom="f16")
N_PROMPT, N_STEPS = 300, 24


def open_session(model, **kw):
    from fasa_gguf.session import Session

    s = Session(model, **{"n_ctx": 1024, "n_threads": 2, **kw})
    shapes = [s.fasa.layer_shape(il) for il in range(s.fasa.model_info()["n_layer"])]
    s.fasa.set_profile(synthetic_profile([h[1] for h in shapes], [h[2] // 2 if h[1] else 0 for h in shapes], seed=3))
    return s


def generate(s, params, n_steps=N_STEPS):
    """Logits of a prompt's end and n_steps steps, [1 + n_steps, n_vocab], and the counters."""
    s.fasa.set_params(params)
    s.fasa.reset_counters()
    s.clear()
    rng = np.random.default_rng(1)
    logits = [s.decode(list(rng.integers(3, 259, N_PROMPT)), 0)]
    for i in range(n_steps):
        logits.append(s.decode([int(logits[-1].argmax())], N_PROMPT + i))
    return np.stack(logits), s.fasa.counters()


@pytest.fixture(scope="module")
def still(tmp_path_factory, library):
    """A model whose feed-forwards add nothing: foreseen queries are the true ones."""
    path = tmp_path_factory.mktemp("ahead") / "still.gguf"
    write_tiny(path, feed_forward=0)
    return path


@pytest.fixture(params=["CPU", "GPU"])
def n_gpu_layers(request):
    if request.param == "GPU":
        request.getfixturevalue("cuda")
    return 99 if request.param == "GPU" else 0


@pytest.mark.parametrize("how", [{"budget": 40}, {"budget": 100}, {"k_dom": "q8"}, {"k_dom": "q4"}])
def test_true_queries_give_the_same_steps(still, n_gpu_layers, how):
    """With lists of one query head: of several, the newest cell moves the heads' shares of a score."""
    params = SOME.replace(per_head=1, **how)
    with open_session(still, n_gpu_layers=n_gpu_layers) as s:
        own, counted = generate(s, params.replace(ahead="off"))
        ahead, of_ahead = generate(s, params.replace(ahead="on"))
        assert counted["layers_ahead"] == 0 and of_ahead["layers_ahead"] == 2 * N_STEPS
        assert s.fasa.layer_ahead_codes() == [Reason.AHEAD_FIRST, Reason.NONE, Reason.NONE]
    assert np.array_equal(own, ahead)
    names = ("tokens_attended", "tokens_visible", "lists", "layers_sparse", "cells_refreshed", "rebuilds")
    assert [counted[n] for n in names] == [of_ahead[n] for n in names]


def test_foreseen_queries_select_otherwise(tiny, n_gpu_layers):
    with open_session(tiny, n_gpu_layers=n_gpu_layers) as s:
        own, _ = generate(s, SOME.replace(ahead="off"))
        ahead, _ = generate(s, SOME.replace(ahead="on"))
    assert not np.array_equal(own, ahead)
