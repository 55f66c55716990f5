"""Profiles that lack keys of today's, or have keys of before."""

import json

import pytest
from profiles import full_profile
from tiny_gguf import insert

from fasa_gguf import FasaError
from fasa_gguf.gguf.file import ARR, F32, STR, GGUFFile, pack_kv
from fasa_gguf.profile import embed
from fasa_gguf.profile.inspect import format_profile
from fasa_gguf.profile.profile import Profile


def test_a_file_with_a_dropped_key_loads(tiny, tmp_path):
    """fasa.layer_budget is no longer a key; files that have it still load, and it is not written again."""
    old = full_profile().to_flat() | {"layer_budget": [0.5, 1.5, 1]}
    (tmp_path / "p.json").write_text(json.dumps(old))
    assert Profile.load(tmp_path / "p.json").to_flat() == full_profile().to_flat()
    key = pack_kv("fasa.layer_budget", ARR, [0.5, 1.5, 1], F32)
    model = insert(embed.embed(tiny, full_profile(), tmp_path / "m.gguf"), tmp_path / "old.gguf", key)
    assert "fasa.layer_budget" in GGUFFile(model).kv
    assert Profile.load(model).to_flat() == full_profile().to_flat()
    embed.embed(model, Profile.load(model))
    assert "fasa.layer_budget" not in GGUFFile(model).kv
    insert(tiny, tmp_path / "bad.gguf", pack_kv("fasa.layer_budget", STR, "whatever"))
    with pytest.raises(FasaError, match=r"key fasa.version: expected u32, found nothing"):
        Profile.load(tmp_path / "bad.gguf")


def test_profiles_from_before_layers_selected_ahead():
    """They load, and their ranking serves foreseen queries too; `inspect` says so."""
    p = full_profile()
    line = "layers that may select ahead: 1-2, 2 of 3, with a ranking of their own"
    assert line in format_profile(p).splitlines()
    names = ("ahead.layers", "ahead.ranking", "ahead.weight")
    values = {k: v for k, v in p.to_flat().items() if k not in names}
    old = Profile.from_flat(values, "old")
    assert old.ahead is old.ahead_ranking is old.ahead_weight is None and old.to_flat() == values
    line = "layers that may select ahead: 0-2, 3 of 3, with the same ranking, not calibrated for it"
    assert line in format_profile(old).splitlines()
    some = Profile.from_flat(values | {"ahead.layers": [0, 0, 0]}, "some")
    assert "layers that may select ahead: none" in format_profile(some).splitlines()
    plain = {k: v for k, v in p.to_flat().items() if k not in ("weight", "weight_k", "ahead.weight")}
    assert Profile.from_flat(plain, "plain").ahead_weight is None


def test_profiles_without_windows_and_with_bad_ones(tmp_path):
    p = full_profile()
    flat = p.to_flat()
    del flat["window"], flat["rope.base_window"]
    old = Profile.from_flat(flat, "old")
    assert old.window is None and "base_window" not in old.rope
    with pytest.raises(FasaError, match=r"key fasa.window: expected 3 numbers, one a layer, found 2 numbers"):
        Profile.from_flat(flat | {"window": [1, 2]}, "bad")
    with pytest.raises(FasaError, match=r"key fasa.rope.base_window: expected a number above 0, found 0"):
        Profile.from_flat(flat | {"rope.base_window": 0.0}, "bad")
