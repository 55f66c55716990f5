"""In a sparse step on the CPU, layers with a sliding window read from the first cell that it shows: the same logits.

Everything is attended (the budget is the context), so what is left to differ is the window layers' attention.
"""

import numpy as np
import pytest

from fasa_gguf import FasaParams
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

ALL = FasaParams(chunks=8, budget=4096, sink=2, recent=8, min_context=0, k_dom="f16")
TOKENS = np.random.default_rng(3).integers(1, 60, 1200).tolist()


def both(model, feed, n_ctx=1024, kind="bf16", **context):
    """What `feed` returns with FASA off and on. With a bf16 cache upstream sums in f32, as FASA does."""
    out = []
    for params in (None, ALL):
        with Session(model, n_ctx=n_ctx, n_threads=1, type_k=kind, type_v=kind, **context) as s:
            s.fasa.set_profile(synthetic_profile([2] * 4, [8] * 4))
            s.fasa.set_params(params)
            out.append(np.array(feed(s)))
            c = s.fasa.counters()
            assert bool(params) == bool(c["steps_sparse"]) and (
                not params or c["layers_dense"] >= 3 * c["steps_sparse"]
            )
    return out


def close(a, b):
    assert a.shape == b.shape and a.std() > 0.5 and np.abs(a - b).max() < 1e-2  # the global layer alone: 3e-3


def test_steps_across_a_block_of_256_cells(library, sliding):
    def feed(s):
        s.decode(TOKENS[:540], 0, logits="none")
        return [s.decode([TOKENS[i]], i) for i in range(540, 640)]  # the window's first cell passes 512

    close(*both(sliding, feed))


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_drafts(library, sliding, kind):
    def feed(s):
        s.decode(TOKENS[:600], 0, logits="none")
        with s.fasa.step_kind("decode"):
            return np.concatenate([s.decode(TOKENS[i : i + 5], i, logits="all") for i in range(600, 640, 5)])

    close(*both(sliding, feed, kind=kind))


@pytest.mark.parametrize("unified", [True, False])
def test_sequences_of_different_lengths(library, sliding, unified):
    """The first cell is the lowest of all sequences of the ubatch; alone the longer one reads from a later one on."""

    def feed(s):
        for seq, n in ((0, 400), (1, 560)):
            s.decode(TOKENS[seq : seq + n], 0, seq, logits="none")
        rows = []
        for i in range(4):
            s.decode_batch([(5 + i, 400 + i, 0, True), (9 + i, 560 + i, 1, True)])
            rows += [s.logits(0), s.logits(1)]
        rows += [s.decode([3 + i], 564 + i, 1) for i in range(3)]
        s.decode_batch([(1, 404, 0, True), (2, 567, 1, True)])
        return [*rows, s.logits(0), s.logits(1)]

    close(*both(sliding, feed, n_ctx=2048, n_seq_max=2, kv_unified=unified))


def test_late_positions_in_early_cells(library, sliding):
    """Cells that were freed at the cache's begin take the newest tokens: the window shows both ends."""

    def feed(s):
        s.decode(TOKENS[:300], 0, 1, logits="none")
        s.decode(TOKENS[:700], 0, 0, logits="none")
        s.remove(1, 0)
        return [s.decode([TOKENS[i]], i) for i in range(700, 740)]

    close(*both(sliding, feed, n_seq_max=2, kv_unified=True))
