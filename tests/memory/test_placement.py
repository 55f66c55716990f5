"""Mode c, m or auto: who is asked, what auto picks, what is refused, and that the native setting never stays behind."""

import pytest

from fasa_gguf import FasaError, FasaParams, runtime
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.memory import placement
from fasa_gguf.memory.placement import chosen_mode, decide, place, sentence, why_not_m
from fasa_gguf.memory.plan import CUDA_KERNELS, GIB, Memory, Setup, read_model
from fasa_gguf.profile.embed import rewrite
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

ON = FasaParams(chunks=4, budget=64, min_context=0)
C = Memory(weights=4 * GIB, kv=8 * GIB, k_dom=GIB, scratch=GIB)
M = Memory(weights=4 * GIB, k_dom=GIB, scratch=2 * GIB, row_cache=GIB, kv_pinned=8 * GIB)


NOT_PINNED = runtime.context.not_pinned


@pytest.fixture(scope="module")
def profiled(library, tiny, tmp_path_factory):
    return str(
        rewrite(tiny, synthetic_profile(*model_shape(GGUFFile(tiny))), tmp_path_factory.mktemp("place") / "tiny.gguf")
    )


@pytest.fixture
def gpu(library, monkeypatch):
    """As if there was a GPU: set its free bytes; what was asked of the library is in `places`."""

    class Gpu:
        free, places = 80 * GIB, []

    import contextlib

    @contextlib.contextmanager
    def kv_mode(mode):
        Gpu.places.append("m" if mode == "host" else "c")
        yield

    Gpu.places = []
    monkeypatch.setattr(runtime.devices, "cuda_devices", lambda: ["CUDA0"])
    monkeypatch.setattr(runtime.devices, "device_memory", lambda name: (Gpu.free, 80 * GIB))
    monkeypatch.setattr(runtime.context, "kv_mode", kv_mode)
    monkeypatch.setattr(runtime.context, "not_pinned", lambda context: "")
    return Gpu


@pytest.fixture
def llama(library):
    from fasa_gguf import Llama

    made = []

    def make(path, **kwargs):
        made.append(Llama(path, verbose=False, **{"n_ctx": 512, **kwargs}))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


# ---- the decision ----


def test_the_mode_that_was_asked_for(monkeypatch):
    monkeypatch.delenv("FASA_MODE", raising=False)
    assert [chosen_mode(x) for x in (None, "c", "m", "auto")] == ["auto", "c", "m", "auto"]
    monkeypatch.setenv("FASA_MODE", "m")
    assert chosen_mode(None) == "m" and chosen_mode("c") == "c"
    monkeypatch.setenv("FASA_MODE", "M")
    with pytest.raises(FasaError, match="environment: FASA_MODE: expected one of auto, device, host, found 'M'"):
        chosen_mode(None)
    with pytest.raises(FasaError, match="fasa_mode: expected one of auto, device, host, found 1"):
        chosen_mode(1)


@pytest.mark.parametrize(
    "free, loaded, devices, mode",
    [
        (14 * GIB + CUDA_KERNELS, False, 1, "c"),
        (14 * GIB + CUDA_KERNELS - 1, False, 1, "m"),
        (0, False, 1, "m"),
        (10 * GIB + CUDA_KERNELS, True, 1, "c"),
        (10 * GIB, True, 1, "m"),  # the weights are there already
        (15 * GIB + 2 * CUDA_KERNELS, False, 2, "c"),
        (15 * GIB, False, 2, "m"),  # a scratch on each device
    ],
)
def test_c_when_it_fits(free, loaded, devices, mode):
    assert decide(C, M, free, loaded, devices) == mode


def test_the_line_says_what_was_found():
    assert sentence("c", C, M, 20 * GIB) == (
        "mode c: 14.10 of 20.00 GiB free on the GPU (4.00 weights, 8.00 K and V, 1.00 dominant keys, 1.00 scratch)"
    )
    line = sentence("m", C, M, 9 * GIB)
    assert line == (
        "mode m: 8.10 of 9.00 GiB free on the GPU (4.00 weights, 1.00 dominant keys, 1.00 row cache, 2.00 scratch), "
        "8.00 GiB of host memory pinned; mode c needs 14.10 GiB"
    )
    assert "; this may not fit the GPU: `fasa-gguf plan` says which context does" in sentence(
        "m", C, M, 3 * GIB, host=GIB
    )
    assert "; this may not fit host memory, of which 7.50 GiB are free: `fasa-gguf plan`" in sentence(
        "m", C, M, 9 * GIB, host=15 * GIB // 2
    )
    assert sentence("m", C, M, 9 * GIB, host=9 * GIB) == line
    assert "weights" not in sentence("m", C, M, 9 * GIB, loaded=True)


@pytest.mark.parametrize(
    "cuda, ngl, nkvo, why",
    [
        ([], -1, False, "there is no CUDA device, or no CUDA in this build; use mode c"),
        (["CUDA0"], 0, False, "no layer is on the GPU"),
        (["CUDA0"], 20, True, "offload_kqv=False (-nkvo) keeps attention on the CPU"),
        (["CUDA0"], -1, False, ""),
        (["CUDA0"], 1, False, ""),
    ],
)
def test_why_not_m(cuda, ngl, nkvo, why):
    found = why_not_m(cuda, ngl, nkvo)
    assert why in found and bool(why) == bool(found)


def test_auto_plans_for_the_largest_arm(gpu, tiny):
    m, s = read_model(tiny), Setup(n_ctx=4096)
    both = [ON, ON.replace(k_dom="f16", chunks=8)]
    need = [placement.memory(m, s, p).device for p in both]
    gpu.free = (need[0] + need[1]) // 2 + CUDA_KERNELS
    assert place("auto", m, s, both[:1])[0] == "c" and place("auto", m, s, both)[0] == "m"
    assert place("auto", None, s, both) == place("auto", m, s, []) == place("c", m, s, both) == ("c", "")
    assert place("m", None, s, []) == ("m", "")


def test_several_gpus(gpu, tiny, monkeypatch):
    m, s = read_model(tiny), Setup(n_ctx=4096)
    c = placement.memory(m, s, ON)
    monkeypatch.setattr(runtime.devices, "cuda_devices", lambda: ["CUDA0", "CUDA1"])
    gpu.free = c.device + CUDA_KERNELS  # of each: one would do, and two have room
    assert [place("auto", m, s, [ON], only=i)[0] for i in (0, 1, None)] == ["c"] * 3
    gpu.free -= 1
    assert [place("auto", m, s, [ON], only=i)[0] for i in (0, 1, None)] == ["m", "m", "c"]


def test_host_memory():
    found = placement.host_memory()
    assert found is None or 1 << 20 < found < 1 << 60


# ---- the native setting ----


class Lib:
    """The two calls of the library that kv_mode makes."""

    FASA_MODE_DEVICE, FASA_MODE_HOST = 0, 1

    def __init__(self):
        self.places, self.error = [], "an old error"

    def fasa_set_mode(self, mode):
        self.places.append(mode)
        self.error = ""
        return 0


@pytest.fixture
def lib(monkeypatch):
    lib = Lib()
    monkeypatch.setattr(runtime.context, "api", lambda: (None, lib))
    monkeypatch.setattr(runtime.context, "last_error", lambda: lib.error)
    return lib


def test_the_place_is_set_for_one_context(lib):
    with runtime.context.kv_mode("host"):
        assert lib.places == [1]
    assert lib.places == [1, 0]
    with runtime.context.kv_mode("device"):
        pass
    assert lib.places == [1, 0]


def test_a_failure_resets_the_place_and_says_why(lib):
    with pytest.raises(ValueError, match="Failed to create"), runtime.context.kv_mode("host"):
        raise ValueError("Failed to create")  # the library has nothing to say about it
    with pytest.raises(FasaError, match="cannot pin 4 GiB"), runtime.context.kv_mode("host"):
        lib.error = "cannot pin 4 GiB"
        raise ValueError("Failed to create")
    assert lib.places == [1, 0, 1, 0]


# ---- wherever a context is made ----


def test_without_a_gpu(llama, profiled, tiny, monkeypatch, capfd):
    if runtime.devices.cuda_devices():
        pytest.skip("there is a GPU")
    assert llama(profiled, fasa=ON).fasa_mode == "c" and "mode" not in capfd.readouterr().err  # auto, silently
    for make in (lambda: llama(profiled, fasa_mode="m"), lambda: Session(profiled, mode="m")):
        with pytest.raises(FasaError, match="there is no CUDA device, or no CUDA in this build"):
            make()
    monkeypatch.setenv("FASA_MODE", "m")
    with pytest.raises(FasaError, match="there is no CUDA device"):
        llama(profiled)
    assert llama(profiled, fasa_mode="c").fasa_mode == "c"
    with pytest.raises(FasaError, match='fasa_mode m with fasa="off"'):
        llama(profiled, fasa="off")
    with pytest.raises(FasaError, match="no FASA profile in .*tiny.gguf"):  # m asks for FASA
        llama(str(tiny))
    for command in (["run", profiled, "-p", "x"], ["eval", profiled, "-f", __file__, "--fasa-min-context", "0"]):
        assert cli.main([*command, "--fasa-mode", "m"]) == 1 and "there is no CUDA device" in capfd.readouterr().err


def test_auto_with_a_gpu(llama, profiled, gpu, capfd):
    assert llama(profiled, n_gpu_layers=-1).fasa_mode == "c" and gpu.places == ["c"]
    assert "fasa_gguf: mode c: " in capfd.readouterr().err
    gpu.free = 1000
    assert llama(profiled, n_gpu_layers=-1, fasa=ON).fasa_mode == "m" and gpu.places[1:] == ["m"]
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "GiB of host memory pinned; mode c needs" in err
    for kwargs in (
        {"n_gpu_layers": 0},
        {"n_gpu_layers": -1, "offload_kqv": False},
        {"n_gpu_layers": -1, "fasa": "off"},
    ):
        assert llama(profiled, **kwargs).fasa_mode == "c"
    assert "mode" not in capfd.readouterr().err


def test_auto_that_picked_m_is_not_dense(llama, profiled, gpu, monkeypatch, capfd):
    """Where FASA cannot run, mode c is dense and says so; in mode m dense decoding would take everything over PCIe."""

    def fail(self, params):
        raise FasaError("no room for the dominant keys")

    monkeypatch.setattr(runtime.context.Context, "set_params", fail)
    llama(profiled, n_gpu_layers=-1)
    assert "no room for the dominant keys; decoding is dense" in capfd.readouterr().err
    gpu.free = 1000
    with pytest.raises(FasaError, match="no room for the dominant keys"):
        llama(profiled, n_gpu_layers=-1)


def test_a_bad_environment_is_told_once(llama, profiled, gpu, monkeypatch, capfd):
    monkeypatch.setenv("FASA_BUDGET", "many")
    assert llama(profiled, n_gpu_layers=-1).fasa == "off" and capfd.readouterr().err.count("setting budget") == 1


def test_auto_without_a_plan_is_c_and_says_so(llama, profiled, gpu, monkeypatch, capfd):
    def fail(*a):
        raise FasaError("its heads have two sizes")

    monkeypatch.setattr(placement, "read_model", fail)
    assert (
        llama(profiled, n_gpu_layers=-1).fasa_mode == "c"
        and "mode c, without a plan: its heads have two sizes" in capfd.readouterr().err
    )


def test_m_with_a_gpu(llama, profiled, gpu, capfd):
    assert (
        llama(profiled, n_gpu_layers=-1, fasa_mode="m").fasa_mode == "m"
        and gpu.places == ["m"]
        and "mode" not in capfd.readouterr().err
    )
    with pytest.raises(FasaError, match="give n_gpu_layers"):
        llama(profiled, fasa_mode="m")
    with pytest.raises(FasaError, match="offload_kqv=False"):
        llama(profiled, fasa_mode="m", n_gpu_layers=-1, offload_kqv=False)


def test_a_session(profiled, gpu, capfd):
    with Session(profiled, n_ctx=512, n_gpu_layers=-1, mode="auto", arms=[ON]) as s:
        assert s.mode == "c" and gpu.places == ["c"] and "mode c: " in capfd.readouterr().err
        gpu.free = 1000
        s.reopen(n_ctx=1024)
        assert s.mode == "m" and "mode m: " in capfd.readouterr().err
        s.reopen(n_ctx=2048)
        assert s.mode == "m" and capfd.readouterr().err == ""  # it is told once
        s.reopen(mode="c")
        assert s.mode == "c"
    with Session(profiled, n_ctx=512, n_gpu_layers=-1, mode="auto") as s:  # nothing to plan for
        assert s.mode == "c"


def test_enable_takes_a_mode(monkeypatch):
    import fasa_gguf.llama as drop_in

    with pytest.raises(FasaError, match="fasa_mode: expected one of"):
        drop_in.enable("auto", "x")


def test_a_pickle_keeps_the_mode(llama, profiled):
    assert llama(profiled, fasa_mode="c").__getstate__()["fasa_mode"] == "c"


def test_a_context_of_mode_m_without_pinned_memory_is_refused(profiled, gpu, monkeypatch):
    monkeypatch.setattr(runtime.context, "not_pinned", NOT_PINNED)  # the library's word: nothing here is pinned
    with pytest.raises(FasaError, match="no K and V in pinned host memory; it needs flash attention"):
        Session(profiled, n_ctx=512, n_gpu_layers=-1, mode="m")
