"""The demo's table: each arm's bytes are its own."""

import pytest

from fasa_gguf import FasaParams, Llama
from fasa_gguf.cli import demo
from fasa_gguf.profile import embed


@pytest.fixture(scope="module")
def profiled(tiny, profile, tmp_path_factory):
    return str(embed.rewrite(tiny, profile, tmp_path_factory.mktemp("demo") / "tiny.gguf"))


def test_bytes_are_those_of_each_arm(library, profiled, monkeypatch, capsys):
    """K and V of the tiny model: 3 layers x 2 x 2 KV heads x 16 values of 2 bytes, of about 600 cells."""
    monkeypatch.setitem(demo.ARMS, "FASA", FasaParams(budget=60, min_context=0))
    llm = Llama(profiled, n_ctx=1024, n_threads=1, verbose=False)
    llm.eval([5] * 600)
    speed, counted = demo.time_arms(llm, 600)
    steps = demo.TURNS * (demo.TOKENS + 1)
    assert counted["dense"]["steps_dense"] == steps == counted["FASA"]["steps_sparse"]
    assert counted["dense"]["steps_sparse"] == counted["FASA"]["steps_dense"] == 0
    demo.print_results({"dense": demo.ANSWER, "FASA": demo.ANSWER}, speed, counted, 600)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.split()}
    assert float(lines["dense"][-1]) == pytest.approx(3 * 2 * 2 * 16 * 2 * 613 / 1e6, abs=0.06)
    assert float(lines["FASA"][-1]) < float(lines["dense"][-1])
