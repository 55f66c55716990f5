"""Mode host end to end on a GPU: its text is that of mode device, and memory is what the plan says."""

import pytest

from fasa_gguf import FasaParams, runtime
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.memory.host import MIB
from fasa_gguf.memory.model import read_model
from fasa_gguf.profile.embed import rewrite
from fasa_gguf.profile.profile import Profile
from fasa_gguf.runtime.settings import ContextSettings
from fasa_gguf.speed import random_model as synthetic
from fasa_gguf.speed.plan_check import check, format_check

ON = FasaParams(budget=256, min_context=0)


@pytest.fixture(scope="module")
def profiled(cuda, smollm2, tmp_path_factory):
    profile = synthetic.synthetic_profile(*model_shape(GGUFFile(smollm2)), seed=1)
    return str(rewrite(smollm2, profile, tmp_path_factory.mktemp("mode") / "m.gguf"))


@pytest.mark.parametrize("row_cache", [0, 8])
def test_the_text_is_that_of_mode_device(cuda, profiled, row_cache):
    from fasa_gguf import Llama

    prompt, texts = "The history of the old town begins with a river. " * 120, {}
    for mode in ("device", "host"):
        llm = Llama(
            profiled, n_ctx=4096, n_gpu_layers=-1, fasa=ON.replace(row_cache=row_cache), fasa_mode=mode, verbose=False
        )
        texts[mode] = llm.create_completion(prompt, max_tokens=200, temperature=0)["choices"][0]["text"]
        s = llm.fasa_stats()
        assert llm.fasa_mode == mode and s["steps_sparse"] > 0 and s["layers_dense"] == 0
        assert s["bytes_kv_host"] == (s["bytes_kv"] if mode == "host" else 0) and (s["rows_fetched"] > 0) == (
            mode == "host"
        )
        assert s["bytes_staged"] > 0 if mode == "host" else s["bytes_staged"] == 0  # the prefill's
        if mode == "host":
            assert (s["rows_reused"] > 0) == (row_cache > 0)
        llm.close()
    assert texts["device"] == texts["host"]


def test_auto_stays_on_the_device_where_there_is_room(cuda, profiled, capfd):
    from fasa_gguf import Llama

    llm = Llama(profiled, n_ctx=2048, n_gpu_layers=-1, verbose=False)
    assert llm.fasa_mode == "device" and "fasa_gguf: mode device (FASA-C): " in capfd.readouterr().err
    llm.close()


@pytest.mark.parametrize("n_ctx", [32768, 131072])
def test_planned_memory_is_what_the_driver_counts(cuda, tmp_path_factory, n_ctx):
    """Within 3% (issue 5) of the model, its context, and scratch.

    The plan does not count the kernels that CUDA loads late: 200 MiB at the most.
    """
    path = tmp_path_factory.getbasetemp() / "random-1b.gguf"
    if not path.exists():
        synthetic.write_model(path, "1b")
    free = runtime.devices.device_memory(cuda)[0]
    if free < 12 << 30:
        pytest.skip(f"12 GiB of free device memory are needed, and there are {free / 2**30:.1f}")
    profile = Profile.load(path)
    m = read_model(path, profile)
    settings = ContextSettings(n_ctx=n_ctx, n_batch=2048, n_gpu_layers=-1)
    rows = check(path, m, settings, ON.replace(row_cache=64), profile, ("device", "host"))
    print(format_check(rows))
    for r in rows:
        for name in ("kv", "k_dom", "pinned", "row_cache"):
            assert r[f"{name}_planned"] == r[f"{name}_counted"], name
        kernels = r["weights_measured"] - r["weights_planned"]
        assert -4 * MIB < kernels < 200 * MIB
        assert r["device_planned"] == pytest.approx(r["device_measured"] - kernels, rel=0.03)
