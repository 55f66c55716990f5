"""bench of prompts alone: which of them are sparse, and why others are not."""

import re
from dataclasses import replace

import pytest
from benching import ON, QUICK, run

from fasa_gguf import FasaError
from fasa_gguf.reasons import Reason


def test_prompts_only(library, tiny, profile):
    on = ON.replace(prefill="on", prefill_mass=0, prefill_budget=100, min_context=4096)
    settings = replace(QUICK, depths=[0], n_gen=0, n_prompt=[400])
    dense, fasa = run(tiny, settings, profile, on)
    assert (dense.test, fasa.test, dense.note) == ("pp400 @ d0", "pp400 @ d0", "") and fasa.ratio > 0
    assert re.fullmatch(r"\d\d% of the cells attended", fasa.note) and fasa.sparse_share == 1
    with pytest.raises(FasaError, match=f"no step used it: prompt dense: {Reason.PREFILL_MIN_CONTEXT.text}"):
        run(tiny, settings, profile, on.replace(prefill="auto", prefill_min_context=1024))
    with pytest.raises(FasaError, match="-n 0 and -p 0: nothing to measure"):
        run(tiny, replace(settings, n_prompt=[0]), profile, on)


def test_what_prompts_alone_cannot_measure(tiny, profile):
    """Prompts are timed in one sequence alone, and with prefill off FASA has no part in them."""
    for n_parallel in ([4], [1, 4]):
        with pytest.raises(FasaError, match="-n 0 and -np: a prompt is timed in one sequence alone"):
            run(tiny, replace(QUICK, depths=[0], n_gen=0, n_prompt=[400], n_parallel=n_parallel), profile, ON)
    with pytest.raises(FasaError, match="-n 0 and prefill off: every prompt would be dense; give --fasa-prefill auto"):
        run(tiny, replace(QUICK, depths=[0], n_gen=0, n_prompt=[400]), profile, ON.replace(prefill="off"))
