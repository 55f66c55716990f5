"""A layer's list has a source: its own selection, or that of a layer before it."""

import numpy as np
import pytest

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.quality.perplexity import log_softmax
from fasa_gguf.reasons import Reason
from fasa_gguf.speed.random_model import synthetic_profile

SOME = FasaParams(chunks=4, budget=64, min_context=0)
ALL = SOME.replace(budget=10**6)
PREFIX = 300


@pytest.fixture
def profile():
    return synthetic_profile([2] * 3, [8] * 3, seed=2)


@pytest.fixture
def session(tiny, profile):
    from fasa_gguf.session import Session

    with Session(tiny, n_ctx=512, n_threads=1) as s:
        s.fasa.set_profile(profile)
        s.fasa.set_params(SOME)
        yield s


def steps(s, n=4):
    """(logits [n, n_vocab] of n decode steps behind a prefix, counters of these steps)."""
    s.clear()
    s.decode([1 + i * 37 % 250 for i in range(PREFIX)], 0, logits="none")
    s.fasa.reset_counters()
    return np.stack([s.decode([7 + i], PREFIX + i) for i in range(n)]), s.fasa.counters()


def test_a_borrowed_list_is_not_selected_again(session):
    s = session
    own, before = steps(s)
    assert before["lists"] == 4 * 3 * 2 and before["tokens_attended"] == 64 * before["lists"]
    s.fasa.borrow_list(1, 0)
    borrowed, after = steps(s)
    assert after["lists"] == 4 * 2 * 2 and after["tokens_attended"] == 64 * after["lists"]
    assert after["layers_sparse"] == before["layers_sparse"] == 12 and after["layers_dense"] == 0
    assert after["bytes_fac"] == before["bytes_fac"] and 3 * after["bytes_tip"] == 2 * before["bytes_tip"]
    assert np.isfinite(borrowed).all() and (borrowed != own).any()
    assert s.fasa.layer_reason_codes() == [Reason.NONE] * 3

    s.fasa.borrow_list(2, 0)
    assert steps(s)[1]["lists"] == 4 * 2
    s.fasa.borrow_list(2, None)
    assert (steps(s)[0] == borrowed).all()
    s.fasa.borrow_list(1, None)
    again, counters = steps(s)
    assert (again == own).all() and counters == before


def test_the_keys_of_a_borrower_are_derived_again(session):
    """While a layer borrows, nobody keeps its dominant keys fresh: with its own list it derives all of them."""
    s = session
    own, _ = steps(s, 6)
    s.fasa.borrow_list(1, 0)
    steps(s, 3)
    s.fasa.borrow_list(1, None)
    s.remove(0, PREFIX)
    assert (np.stack([s.decode([7 + i], PREFIX + i) for i in range(6)]) == own).all()


def test_a_borrowed_list_of_everything_is_dense_attention(session):
    s = session
    s.fasa.set_params(None)
    dense, _ = steps(s)
    s.fasa.set_params(ALL)
    own, _ = steps(s)
    s.fasa.borrow_list(1, 0)
    s.fasa.borrow_list(2, 0)
    borrowed, counters = steps(s)
    assert (borrowed == own).all() and counters["tokens_attended"] == counters["tokens_visible"] > 0
    a, b = log_softmax(dense), log_softmax(borrowed)
    assert (np.exp(a) * (a - b)).sum(-1).max() < 1e-4


@pytest.mark.parametrize(
    "params", [SOME.replace(mass=0.5, floor=40), SOME.replace(per_head=1)], ids=["mass", "per_head"]
)
def test_every_kind_of_list_can_be_borrowed(session, params):
    s = session
    s.fasa.set_params(params)
    own, before = steps(s)
    s.fasa.borrow_list(1, 0)
    borrowed, after = steps(s)
    assert 3 * after["lists"] == 2 * before["lists"] and (borrowed != own).any()
    s.fasa.borrow_list(1, None)
    assert (steps(s)[0] == own).all()


def test_borrowing_outlasts_the_settings(session):
    s = session
    s.fasa.borrow_list(1, 0)
    borrowed, _ = steps(s)
    s.fasa.set_params(None)
    s.fasa.set_params(SOME)
    again, counters = steps(s)
    assert (again == borrowed).all() and counters["lists"] == 4 * 2 * 2


def test_a_borrower_is_dense_where_its_lender_is(session, profile):
    s = session
    s.fasa.borrow_list(1, 0)
    profile.n_chunk = [0, 8, 8]
    profile.ranking[0] = profile.ranking[0][:0, :0]
    s.fasa.set_profile(profile)
    _, counters = steps(s)
    assert s.fasa.layer_reason_codes() == [Reason.NOT_RANKED, Reason.LENDER_DENSE, Reason.NONE]
    assert s.fasa.layer_reasons()[1] == "the layer whose list it borrows is dense"
    assert counters["layers_dense"] == 8 and counters["lists"] == 4 * 2
    with pytest.raises(FasaError, match="layer 0 does not select: the profile has no ranking for it"):
        s.fasa.borrow_list(2, 0)
    s.fasa.borrow_list(1, None)
    assert steps(s)[1]["lists"] == 4 * 2 * 2


def test_what_cannot_be_borrowed_says_why(session):
    s = session
    for il, lender, message in (
        (3, 0, "layer 3: no such layer"),
        (-1, 0, "layer -1: no such layer"),
        (1, 1, "layer 1 borrows from a layer before it, and 1 is none"),
        (1, 2, "layer 1 borrows from a layer before it, and 2 is none"),
        (1, -2, "layer 1 borrows from a layer before it, and -2 is none"),
    ):
        with pytest.raises(FasaError, match=message):
            s.fasa.borrow_list(il, lender)
    s.fasa.borrow_list(1, 0)
    with pytest.raises(FasaError, match="layer 1 does not select: it borrows its list itself"):
        s.fasa.borrow_list(2, 1)
    s.fasa.borrow_list(1, None)
    s.fasa.borrow_list(2, 1)
    with pytest.raises(FasaError, match="layer 1 lends its list to layer 2"):
        s.fasa.borrow_list(1, 0)
    s.fasa.set_params(None)
    with pytest.raises(FasaError, match="layer 2 cannot borrow a list: FASA is off"):
        s.fasa.borrow_list(2, 0)
    s.fasa.borrow_list(2, None)


def test_layers_of_two_caches_share_no_list(sliding):
    from fasa_gguf.gguf.file import GGUFFile
    from fasa_gguf.gguf.shape import model_shape
    from fasa_gguf.session import Session

    with Session(sliding, n_ctx=512, n_threads=1) as s:
        s.fasa.set_profile(synthetic_profile(*model_shape(GGUFFile(sliding)), seed=2))
        s.fasa.set_params(SOME.replace(budget=48))
        s.fasa.borrow_list(1, 0)  # both have a window
        with pytest.raises(FasaError, match="layers 3 and 0 have no KV cache in common"):
            s.fasa.borrow_list(3, 0)
