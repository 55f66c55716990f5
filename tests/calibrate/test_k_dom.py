"""Keys with a huge pair: in 4 bits it takes the scale of its group, and calibration notices."""

import numpy as np
import pytest
from tiny_gguf import write_tiny

from fasa_gguf import reference as R
from fasa_gguf.calibrate.gguf import calibrate
from fasa_gguf.calibrate.ranking import CalibrationParams, k_dom_for

HEAD = 16
PARAMS = CalibrationParams(context=1024, queries=32)


def qwen2(path, bias):
    """Biases of the keys: 0 but for the pair of the slowest frequency of both KV heads."""
    k = np.zeros((2, HEAD))
    k[:, [HEAD // 2 - 1, HEAD - 1]] = bias
    write_tiny(
        path,
        arch="qwen2",
        biases={"attn_q": np.zeros(4 * HEAD), "attn_k": k.ravel(), "attn_v": np.zeros(2 * HEAD)},
    )
    return path


@pytest.mark.parametrize("bias, k_dom", [(0, None), (100, "q8")])
def test_a_bias_of_the_keys_is_noticed(library, tmp_path, capsys, bias, k_dom):
    model = qwen2(tmp_path / "m.gguf", bias)
    profile = calibrate(model, params=PARAMS, n_threads=1)
    assert profile.defaults.get("k_dom") == k_dom
    told = capsys.readouterr().err
    assert ("m.gguf: in 4 bits the dominant keys of layer " in told) == bool(bias)
    assert ("the profile's default is k_dom q8" in told) == bool(bias)
    assert profile.params().k_dom == (k_dom or "q4")


def test_the_type_is_the_smallest_that_loses_little():
    assert k_dom_for({}) == ("q4", "")
    assert k_dom_for({0: [[0.9, 0.9, 0.895]], 1: [[0.9, 0.9, 0.9]]}) == ("q4", "")
    assert k_dom_for({0: [[0.8825, 0.8826, 0.8626]], 1: [[0.9, 0.9, 0.9]]})[0] == "q8"  # Gemma3-270M, the pydoc topics
    kind, why = k_dom_for({0: [[0.9, 0.9, 0.9]], 3: [[0.9, 0.88, 0.7], [0.9, 0.9, 0.8]]})
    assert kind == "q8" and why.startswith("in 4 bits the dominant keys of layer 3 keep 15% of the attention less")
    assert k_dom_for({0: [[0.9, 0.8, 0.7]]})[0] == "f16"


def test_a_huge_pair_flattens_its_group_in_4_bits():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 4, 8)), rng.standard_normal((200, 8))
    k[:, 0], q[..., 0] = 100.0, 0.0  # says nothing, and takes the scale
    case = (q, k, np.arange(196, 200), np.arange(8), np.ones(8, np.float32))
    f16, q8, q4 = (R.kept_share(*case, kind, 2.0, 0.0, 20, 0, 0) for kind in ("f16", "q8", "q4"))
    assert f16 > 0.9 and q8 > f16 - 0.05 and q4 < f16 - 0.3
