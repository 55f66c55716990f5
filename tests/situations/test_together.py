"""What the guide says of a second model as draft (docs/guide/together.md), with the code that it shows."""

import re

import numpy as np
import pytest
from paths import ROOT
from reported import ON, sparse_steps
from tiny_gguf import write_tiny

from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile import embed
from fasa_gguf.speed.random_model import synthetic_profile

PROMPT = "the ship sailed on the wide sea; " * 9


@pytest.fixture(scope="module")
def draft_class(library):
    """Draft, as the guide has it."""
    page = (ROOT / "docs" / "guide" / "together.md").read_text()
    code = next(x for x in re.findall(r"```python\n(.*?)```", page, re.S) if "class Draft" in x)
    shown = {}
    exec(code.split("\n\n\ndraft = ")[0], shown)
    return shown["Draft"]


@pytest.fixture(scope="module")
def other(library, tmp_path_factory):
    """A smaller model of the same vocabulary, with a profile."""
    plain, out = (tmp_path_factory.mktemp("draft") / name for name in ("plain.gguf", "small.gguf"))
    write_tiny(plain, seed=4, n_layer=1)
    return str(embed.rewrite(plain, synthetic_profile(*model_shape(GGUFFile(plain))), out))


def greedy(llm, n=40):
    return llm.create_completion(PROMPT, max_tokens=n, temperature=0, repeat_penalty=1.0)["choices"][0]["text"]


@pytest.mark.parametrize("params", [ON, ON.replace(chunks=8, budget=512)], ids=["some", "all"])
@pytest.mark.parametrize("small", ["itself", "another"])
def test_a_second_model_as_draft(make, profiled, other, draft_class, params, small):
    """Both models decode sparse, and the text is that of the large model alone."""
    alone = make(profiled, fasa=params)
    text = greedy(alone)
    steps = sparse_steps(alone)
    draft = make(profiled if small == "itself" else other, fasa=params)
    llm = make(profiled, fasa=params, draft_model=draft_class(draft, 5))
    assert greedy(llm) == text
    with_drafts = sparse_steps(llm)
    assert sparse_steps(draft) > 0 and 0 < with_drafts <= steps
    if small == "itself":  # its drafts are right
        assert with_drafts < steps / 2


def test_a_draft_model_at_the_end_of_the_context(make, profiled, other, draft_class):
    """The draft has no room left: it drafts nothing, and the large model goes on."""
    draft = make(other, n_ctx=512)
    assert len(draft_class(draft)(np.full(512, 5, np.intc))) == 0
    llm = make(profiled, n_ctx=512, draft_model=draft_class(draft))
    done = llm.create_completion("a" * 500, max_tokens=40, temperature=0)
    assert done["choices"][0]["finish_reason"] == "length"
