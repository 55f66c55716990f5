"""What programs that know nothing of FASA get: fasa_use_environment, the profile in the file and FASA_* variables."""

import os
import re

import numpy as np
import pytest
from reported import python

from fasa_gguf.params import SETTINGS, FasaParams
from fasa_gguf.profile import embed
from fasa_gguf.reasons import Reason
from fasa_gguf.speed.random_model import synthetic_profile

CODE = """
import sys
from fasa_gguf.runtime.library import api
api()[1].fasa_use_environment()
from fasa_gguf.session import Session
with Session(sys.argv[1], n_ctx=512, n_threads=1) as s:
    s.decode([i % 50 + 3 for i in range(200)], 0)
    s.decode([7], 200)
    print([int(x) for x in s.fasa.layer_ahead_codes()])
"""


def decoded(model, **variables):
    """(what the context says of FASA, why each layer does not select ahead)"""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FASA_")}
    run = python(CODE, model, env=kept | {f"FASA_{k}": str(v) for k, v in variables.items()})
    assert run.returncode == 0, run.stderr
    said = re.findall(r"^fasa: (o[nf].*)$", run.stderr, re.M)
    return said[0], eval(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def ahead_of_its_own(tiny, tmp_path_factory):
    """A profile of which layer 1 must keep its own queries, with a ranking and weights for foreseen ones."""
    p = synthetic_profile([2] * 3, [8] * 3, seed=2)
    p.weight_k, p.weight = 8, [np.ones((2, 8), np.float32) for _ in range(3)]
    p.ahead, p.ahead_weight = np.array([1, 0, 1], np.uint8), [2 * w for w in p.weight]
    p.ahead_ranking = synthetic_profile([2] * 3, [8] * 3, seed=5).ranking
    p.defaults = {"ahead": "on", "k_dom": "f16"}
    return embed.rewrite(tiny, p, tmp_path_factory.mktemp("environment") / "m.gguf")


def test_every_setting_has_its_variable(library, ahead_of_its_own):
    """All that differ from the default, by name: `ahead` and `k_dom` are words."""
    wanted = {}
    for s in SETTINGS:
        if s.name != "mean_budget":  # in place of mass
            another = s.choices[(s.choices.index(s.default) + 1) % len(s.choices)] if s.choices else s.default + 1
            wanted[s.name] = another
    wanted |= {"mass": 0.5, "per_head": 1, "floor": 20, "cap": 200}
    if hasattr(FasaParams(), "prefill_mass"):
        wanted |= {"prefill_mass": 0.5, "prefill_floor": 20, "prefill_cap": 200}
    FasaParams().replace(**wanted).check()
    said, _ = decoded(ahead_of_its_own, **{k.upper(): v for k, v in wanted.items()})
    for name, value in wanted.items():
        assert f"{name} {value}" in re.split(r"[,;] ", said.removeprefix("on: ")), name
    for word in ("AHEAD", "K_DOM"):
        assert f"FASA_{word}: expected one of " in decoded(ahead_of_its_own, **{word: "7"})[0]


def test_the_file_says_which_layers_select_ahead(library, ahead_of_its_own):
    said, why = decoded(ahead_of_its_own, MIN_CONTEXT=0, BUDGET=64, ENABLE=1)
    assert "ahead on" in said and "k_dom f16" in said
    assert why == [Reason.AHEAD_FIRST, Reason.AHEAD_PROFILE, Reason.NONE]


def test_weights_for_foreseen_queries_alone_are_refused(library, ahead_of_its_own, tmp_path):
    bytes_ = ahead_of_its_own.read_bytes()
    assert bytes_.count(b"fasa.ahead.ranking") == 1
    (tmp_path / "m.gguf").write_bytes(bytes_.replace(b"fasa.ahead.ranking", b"fasa.ahead.xanking"))
    said, _ = decoded(tmp_path / "m.gguf", ENABLE=1)
    assert said.startswith("off: key fasa.ahead.weight: expected it where both")
