"""Two profiles side by side, and which layers of a GGUF have a sliding window."""

import json

import numpy as np
import pytest
from tiny_gguf import gguf_bytes, write_tiny

from fasa_gguf import FasaError
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf.file import ARR, BOOL, STR, U32, GGUFFile, pack_kv
from fasa_gguf.gguf.shape import sliding_windows
from fasa_gguf.profile.agreement import compare_profiles, format_agreement
from fasa_gguf.profile.embed import doubts
from fasa_gguf.profile.profile import Profile


def profile(*layers):
    """Of rankings [n_head_kv][n_chunk] per layer; [] is a dense layer."""
    rows = [np.array(x, np.uint16).reshape(len(x), -1) if x else np.zeros((0, 0), np.uint16) for x in layers]
    return Profile([max(len(x), 1) for x in rows], [x.shape[1] for x in rows], rows)


A = profile([[0, 1, 2, 3], [3, 2, 1, 0]], [[0, 1, 2, 3], [0, 1, 2, 3]])


def test_planted_agreement():
    b = profile([[0, 1, 2, 3], [0, 1, 2, 3]], [[1, 0, 3, 2], [2, 0, 1, 3]])
    found = compare_profiles(A, b, k=2)
    assert found.layers == [0, 1] and found.k == [2, 2] and found.only == []
    assert np.allclose(found.spearman[0], [1, -1]) and np.allclose(found.spearman[1], [1 - 6 * 4 / 60, 1 - 6 * 6 / 60])
    assert found.overlap[0].tolist() == [1, 0] and found.overlap[1].tolist() == [1, 0.5]
    assert np.allclose(found.mean(), [(1 - 1 + 0.6 + 0.4) / 4, 2.5 / 4])
    lines = format_agreement(found).splitlines()
    assert (
        len(lines) == 4
        and lines[1].split() == ["0", "2", "0.000", "50.0%", "0.0%"]
        and lines[3].split() == ["all", "0.250", "62.5%", "0.0%"]
    )
    assert found.as_dict()["layers"][1] == {
        "layer": 1,
        "k": 2,
        "spearman": found.spearman[1].tolist(),
        "overlap": [1.0, 0.5],
    }


def test_the_rank_correlation_is_pearsons_of_the_places():
    rng = np.random.default_rng(0)
    x, y = (profile([rng.permutation(32).tolist()]) for _ in range(2))
    places = [np.argsort(p.ranking[0][0]) for p in (x, y)]
    assert np.isclose(compare_profiles(x, y).spearman[0][0], np.corrcoef(*places)[0, 1])
    assert compare_profiles(x, y).k == [12]  # 3/8 of the head's


def test_layers_of_one_only_and_k_beyond_the_chunks():
    found = compare_profiles(A, profile([[0, 1, 2, 3], [3, 2, 1, 0]], []), k=9)
    assert found.layers == [0] and found.only == [1] and found.k == [4] and found.mean() == (1, 1)
    assert format_agreement(found).endswith("ranked by one of the two only: layers 1")


def test_profiles_of_other_models_are_named():
    with pytest.raises(
        FasaError,
        match="different models: one has 2 layers, 2 KV heads, 4 chunks, the other 1 layers, 1 KV heads, 2 chunks",
    ):
        compare_profiles(A, profile([[0, 1]]))
    with pytest.raises(FasaError, match="no layer in common"):
        compare_profiles(profile([[0, 1]], []), profile([], [[0, 1]]))


def test_inspect_against(tmp_path, capsys):
    for name, p in (("a.json", A), ("b.json", A)):
        p.save(tmp_path / name)
    assert cli.main(["inspect", str(tmp_path / "a.json"), "--against", str(tmp_path / "b.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "1.000", "100.0%", "100.0%"]
    assert cli.main(["inspect", str(tmp_path / "a.json"), "--against", str(tmp_path / "b.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overlap"] == 1


@pytest.mark.parametrize(
    "arch, entries, expected",
    [
        ("gemma2", [("sliding_window", U32, 128)], [128, 0, 128]),
        ("gemma3", [("sliding_window", U32, 128), ("sliding_window_pattern", U32, 3)], [128, 128, 0]),
        (
            "cohere2",
            [("sliding_window", U32, 128), ("sliding_window_pattern", ARR, [False, True, False], BOOL)],
            [0, 128, 0],
        ),
        ("phi3", [("sliding_window", U32, 128)], [0, 0, 0]),  # llama.cpp attends to all there
        ("gemma2", [], [0, 0, 0]),
        ("cohere2", [("sliding_window", U32, 128), ("sliding_window_pattern", U32, 0)], [128, 128, 128]),
    ],
)
def test_sliding_windows_as_llama_cpp_has_them(tmp_path, arch, entries, expected):
    packed = [pack_kv("general.architecture", STR, arch)] + [
        pack_kv(f"{arch}.attention.{key}", *rest) for key, *rest in entries
    ]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(packed))
    assert sliding_windows(GGUFFile(path), 3) == expected


def test_a_profile_from_hf_weights_is_not_doubted_for_their_hash(tmp_path):
    path = tmp_path / "t.gguf"
    write_tiny(path)
    p = profile(*[[list(range(8))] * 2] * 3)
    p.calibration = {"source": "gguf", "weights_sha256": "0" * 64}
    assert len(doubts(GGUFFile(path), p)) == 1 and "calibrated on other weights" in doubts(GGUFFile(path), p)[0]
    p.calibration["source"] = "hf"
    assert doubts(GGUFFile(path), p) == []
    p.rope = {"layout": "neox", "dims": 16, "base": 5000.0}  # the layout is no reason, the base is
    assert doubts(GGUFFile(path), p) == [
        f"{path}: the profile was made under a RoPE base of 5000, and the model has 10000"
    ]
