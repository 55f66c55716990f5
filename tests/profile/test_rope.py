"""A profile made under another RoPE than the context's: one line that names both."""

import pytest
from tiny_gguf import write_tiny

from fasa_gguf import FasaParams
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile.rope import rope_note
from fasa_gguf.quality.arms import Arm, ArmSwitch
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

ON = FasaParams(chunks=4, budget=64, min_context=0)


@pytest.fixture(scope="module")
def model(library, tmp_path_factory):
    path = tmp_path_factory.mktemp("rope") / "m.gguf"
    write_tiny(path, rope_base=100000.0)
    return path


def made_under(model, **rope):
    p = synthetic_profile(*model_shape(GGUFFile(model)))
    p.rope = {"layout": "norm", "dims": 16, **rope}
    return p


def test_the_same_is_not_mentioned(model):
    info = {"rope_base": 123456.789, "rope_scale": 0.25}
    assert rope_note(made_under(model, base=123460.0, scale=0.25), info) == ""  # five digits of JSON
    assert rope_note(made_under(model), info) == ""  # a profile need not say
    assert rope_note(made_under(model), info, {"yarn_beta_fast": 32.0, "rope_scaling_type": -1, "n_ctx": 9}) == ""


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"rope_freq_base": 400000.0}, "RoPE base 100000, and this context has base 400000: "),
        ({"rope_freq_scale": 0.5}, "RoPE scale 1, and this context has scale 0.5: "),
        (
            {"rope_freq_base": 400000.0, "rope_freq_scale": 0.5},
            "RoPE base 100000 and scale 1, and this context has base 400000 and scale 0.5: ",
        ),
        (
            {"rope_scaling_type": 2, "rope_freq_scale": 0.25, "yarn_orig_ctx": 2048},
            "RoPE scale 1 and the model's own scaling, and this context has scale 0.25 and rope_scaling_type yarn, "
            "yarn_orig_ctx 2048: ",
        ),
        ({"yarn_ext_factor": 1.0}, "RoPE the model's own scaling, and this context has yarn_ext_factor 1: "),
        ({"rope_scaling_type": 1}, ""),  # what the model has
        ({}, ""),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_the_drop_in_says_it(model, capfd, changes, expected, late):
    from fasa_gguf import Llama

    profile = made_under(model, base=100000.0, scale=1.0)
    llm = Llama(
        str(model), n_ctx=256, n_threads=1, verbose=False, fasa="off" if late else ON, fasa_profile=profile,
        flash_attn=True, **changes,
    )  # fmt: skip
    if late:
        assert "RoPE" not in capfd.readouterr().err
        llm.fasa = ON
        llm.fasa = "off"
        llm.fasa = ON
    llm.close()
    said = [line for line in capfd.readouterr().err.splitlines() if "RoPE" in line]
    assert len(said) == bool(expected) and all(f"m.gguf: the profile was made under {expected}" in x for x in said)


def test_arms_say_it_once(model, capsys):
    """A profile of another model of the same shape."""
    other = made_under(model, base=10000.0)
    with Session(model, n_ctx=256, n_threads=1) as s:
        switch = ArmSwitch(s, made_under(model, base=100000.0))
        for arm in (Arm("a", ON), Arm("b", ON, other), Arm("a", ON), Arm("b", ON, other)):
            switch.use(arm)
    err = capsys.readouterr().err
    assert err.count("RoPE") == 1 and "made under RoPE base 10000, and this context has base 100000" in err
