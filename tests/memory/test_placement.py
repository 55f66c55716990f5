"""Mode device, host or auto: who is asked, what auto picks, what is refused; the native setting never stays behind."""

import contextlib

import pytest

from fasa_gguf import FasaError, FasaParams, runtime
from fasa_gguf import llama as llama_module
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.memory.host import CUDA_KERNELS, GIB, host_memory
from fasa_gguf.memory.model import read_model
from fasa_gguf.memory.placement import choose_mode, chosen_mode, pick, sentence, why_not_host
from fasa_gguf.memory.plan import Memory, device_layers, estimate
from fasa_gguf.profile.embed import rewrite
from fasa_gguf.profile.profile import Profile
from fasa_gguf.runtime.settings import ContextSettings
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

ON = FasaParams(chunks=4, budget=64, min_context=0)
DEVICE = Memory(weights=4 * GIB, kv=8 * GIB, k_dom=GIB, scratch=GIB)
HOST = Memory(weights=4 * GIB, k_dom=GIB, scratch=2 * GIB, row_cache=GIB, kv_pinned=8 * GIB)


NOT_PINNED = runtime.context.not_pinned


@pytest.fixture(scope="module")
def profiled(library, tiny, tmp_path_factory):
    return str(
        rewrite(tiny, synthetic_profile(*model_shape(GGUFFile(tiny))), tmp_path_factory.mktemp("place") / "tiny.gguf")
    )


@pytest.fixture
def gpu(library, monkeypatch):
    """As if there was a GPU: set its free bytes; what was asked of the library is in `modes`."""

    class Gpu:
        free = 80 * GIB
        modes: list[str]

    @contextlib.contextmanager
    def kv_mode(mode):
        Gpu.modes.append(mode)
        yield

    Gpu.modes = []
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
    asked = (None, "device", "host", "auto", "c", "m")
    assert [chosen_mode(x) for x in asked] == ["auto", "device", "host", "auto", "device", "host"]
    monkeypatch.setenv("FASA_MODE", "m")
    assert chosen_mode(None) == "host" and chosen_mode("device") == "device"
    monkeypatch.setenv("FASA_MODE", "M")
    with pytest.raises(FasaError, match=r"environment: FASA_MODE: expected one of auto, device, host .*found 'M'"):
        chosen_mode(None)
    with pytest.raises(FasaError, match=r"fasa_mode: expected one of auto, device, host .*found 1"):
        chosen_mode(1)


@pytest.mark.parametrize(
    "free, loaded, devices, mode",
    [
        (14 * GIB + CUDA_KERNELS, False, 1, "device"),
        (14 * GIB + CUDA_KERNELS - 1, False, 1, "host"),
        (0, False, 1, "host"),
        (10 * GIB + CUDA_KERNELS, True, 1, "device"),
        (10 * GIB, True, 1, "host"),  # the weights are there already
        (15 * GIB + 2 * CUDA_KERNELS, False, 2, "device"),
        (15 * GIB, False, 2, "host"),  # a scratch on each device
    ],
)
def test_device_when_it_fits(free, loaded, devices, mode):
    assert pick(DEVICE, HOST, free, loaded, devices) == mode


def test_the_line_says_what_was_found():
    assert sentence("device", DEVICE, HOST, 20 * GIB) == (
        "mode device (FASA-C): K and V lie on the GPU; it takes 14.10 of 20.00 GiB free there "
        "(4.00 weights, 8.00 K and V, 1.00 dominant keys, 1.00 scratch)"
    )
    line = sentence("host", DEVICE, HOST, 9 * GIB)
    assert line == (
        "mode host (FASA-M): K and V, 8.00 GiB, lie in pinned host memory, because mode device needs 14.10 GiB on the "
        "GPU; it takes 8.10 of 9.00 GiB free there "
        "(4.00 weights, 1.00 dominant keys, 1.00 row cache, 2.00 scratch)"
    )
    assert "; this may not fit the GPU: `fasa-gguf plan` says which context does" in sentence(
        "host", DEVICE, HOST, 3 * GIB, host_free=GIB
    )
    assert "; this may not fit host memory, of which 7.50 GiB are free: `fasa-gguf plan`" in sentence(
        "host", DEVICE, HOST, 9 * GIB, host_free=15 * GIB // 2
    )
    assert sentence("host", DEVICE, HOST, 9 * GIB, host_free=9 * GIB) == line
    assert "weights" not in sentence("host", DEVICE, HOST, 9 * GIB, loaded=True)


@pytest.mark.parametrize(
    "cuda, ngl, nkvo, why",
    [
        ([], -1, False, "there is no CUDA device, or no CUDA in this build; use mode device"),
        (["CUDA0"], 0, False, "fasa_mode host needs layers on the GPU, and there is none"),
        (["CUDA0"], 20, True, "offload_kqv=False (-nkvo) keeps it on the CPU; omit it, or use mode device"),
        (["CUDA0"], -1, False, ""),
        (["CUDA0"], 1, False, ""),
    ],
)
def test_why_not_host(cuda, ngl, nkvo, why):
    found = why_not_host(cuda, ngl, nkvo)
    assert why in found and bool(why) == bool(found)


def test_auto_plans_for_the_largest_arm(gpu, tiny):
    m, auto = read_model(tiny), ContextSettings(n_gpu_layers=-1, mode="auto")

    def choose(mode, arms):
        return choose_mode(auto.replace(mode=mode), lambda: m, arms)

    both = [ON, ON.replace(k_dom="f16", chunks=8)]
    need = [estimate(m, auto, p).device for p in both]
    gpu.free = (need[0] + need[1]) // 2 + CUDA_KERNELS
    assert choose("auto", both[:1])[0] == "device" and choose("auto", both)[0] == "host"
    assert choose("auto", []) == choose("device", both) == ("device", "")
    assert choose("host", []) == ("host", "")


def test_several_gpus(gpu, tiny, monkeypatch):
    m, auto = read_model(tiny), ContextSettings(n_gpu_layers=-1, mode="auto")

    def choose(only):
        return choose_mode(auto, lambda: m, [ON], only=only)[0]

    monkeypatch.setattr(runtime.devices, "cuda_devices", lambda: ["CUDA0", "CUDA1"])
    gpu.free = estimate(m, auto, ON).device + CUDA_KERNELS  # of each: one would do, and two have room
    assert [choose(i) for i in (0, 1, None)] == ["device"] * 3
    gpu.free -= 1
    assert [choose(i) for i in (0, 1, None)] == ["host", "host", "device"]


class TwoGpus:
    """Injected devices with memories of their own."""

    def __init__(self, monkeypatch, *free):
        self.free = dict(zip(("CUDA0", "CUDA1"), free, strict=True))
        monkeypatch.setattr(runtime.devices, "cuda_devices", lambda: list(self.free))
        monkeypatch.setattr(runtime.devices, "device_memory", lambda name: (self.free[name], 80 * GIB))


def test_auto_honours_the_split_and_the_memory_of_each_gpu(library, tiny, monkeypatch):
    """Both GPUs together have room; what counts is whether each has room for its own layers."""
    m, auto = read_model(tiny), ContextSettings(n_gpu_layers=-1, mode="auto")
    whole = estimate(m, auto, ON).device
    halves = [estimate(m, auto, ON, part).device for part in device_layers(3, -1, [1, 1])]

    def choose(free, split=None, mode="auto"):
        TwoGpus(monkeypatch, *[n + CUDA_KERNELS for n in free])
        return choose_mode(auto.replace(mode=mode), lambda: m, [ON], split=split)

    assert choose(halves, [1, 1])[0] == "device"
    for i, name in enumerate(("CUDA0", "CUDA1")):
        tight = [n - (j == i) for j, n in enumerate(halves)]
        tight[1 - i] += whole
        mode, line = choose(tight, [1, 1])
        assert mode == "host" and f" GiB on the GPU ({name} " in line
        assert choose(tight, [1, 1], "device") == ("device", "")
        assert choose(tight, [1, 1], "host") == ("host", "")
    assert choose([whole, 0], [1, 0])[0] == "device"  # all on the first
    assert choose([whole, 0], [1])[0] == "device"  # as llama.cpp: what is not given is 0
    assert choose([0, whole], [1, 0])[0] == "host"
    assert choose([whole, whole])[0] == "device"  # by free memory


def test_llama_passes_its_split_on(llama, profiled, monkeypatch, capfd):
    """tensor_split of llama_cpp.Llama; with split_mode none the one device counts."""
    TwoGpus(monkeypatch, 0, 40 * GIB)
    kwargs = {"n_gpu_layers": -1}
    assert (
        llama_module._choose_mode("auto", profiled, None, ON, kwargs) == "device"
    )  # without a profile nothing is asked
    profile = Profile.load(profiled)
    for given, mode in (
        ({"tensor_split": [1, 0]}, "host"),
        ({"tensor_split": [0, 1]}, "device"),
        ({"split_mode": 0, "main_gpu": 0}, "host"),
        ({"split_mode": 0, "main_gpu": 1}, "device"),
    ):
        assert llama_module._choose_mode("auto", profiled, profile, ON, {**kwargs, **given}) == mode, given
    assert "CUDA0" in capfd.readouterr().err


def test_host_memory():
    found = host_memory()
    assert found is None or 1 << 20 < found < 1 << 60


def test_host_memory_under_control_groups(tmp_path):
    """The least of the machine, the process's own group and those above it; files that may be dropped are free."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    assert host_memory(tmp_path) is None
    write("proc/meminfo", "MemTotal: 99 kB\nMemAvailable: 1000 kB\n")
    assert host_memory(tmp_path) == 1000 * 1024
    write("proc/self/cgroup", "1:name=systemd:/other\n0::/a/b\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    assert host_memory(tmp_path) == 1000 * 1024
    write("sys/fs/cgroup/a/memory.max", "900000\n")
    write("sys/fs/cgroup/a/memory.current", "500000\n")
    assert host_memory(tmp_path) == 400000
    write("sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 300000\n")
    assert host_memory(tmp_path) == 700000
    write("sys/fs/cgroup/a/memory.current", "2000000\n")
    assert host_memory(tmp_path) == 0


# ---- the native setting ----


class Lib:
    """The two calls of the library that kv_mode makes."""

    FASA_MODE_DEVICE, FASA_MODE_HOST = 0, 1

    def __init__(self):
        self.modes, self.error = [], "an old error"

    def fasa_set_mode(self, mode):
        self.modes.append(mode)
        self.error = ""
        return 0


@pytest.fixture
def lib(monkeypatch):
    lib = Lib()
    monkeypatch.setattr(runtime.context, "api", lambda: (None, lib))
    monkeypatch.setattr(runtime.context, "last_error", lambda: lib.error)
    return lib


def test_the_mode_is_set_for_one_context(lib):
    with runtime.context.kv_mode("host"):
        assert lib.modes == [1]
    assert lib.modes == [1, 0]
    with runtime.context.kv_mode("device"):
        pass
    assert lib.modes == [1, 0]


def test_a_failure_resets_the_mode_and_says_why(lib):
    with pytest.raises(ValueError, match="Failed to create"), runtime.context.kv_mode("host"):
        raise ValueError("Failed to create")  # the library has nothing to say about it
    with pytest.raises(FasaError, match="cannot pin 4 GiB"), runtime.context.kv_mode("host"):
        lib.error = "cannot pin 4 GiB"
        raise ValueError("Failed to create")
    assert lib.modes == [1, 0, 1, 0]


# ---- wherever a context is made ----


def test_without_a_gpu(llama, profiled, tiny, monkeypatch, capfd):
    if runtime.devices.cuda_devices():
        pytest.skip("there is a GPU")
    assert llama(profiled, fasa=ON).fasa_mode == "device" and "mode" not in capfd.readouterr().err  # auto, silently
    for make in (lambda: llama(profiled, fasa_mode="m"), lambda: Session(profiled, mode="host")):
        with pytest.raises(FasaError, match="there is no CUDA device, or no CUDA in this build"):
            make()
    monkeypatch.setenv("FASA_MODE", "m")
    with pytest.raises(FasaError, match="there is no CUDA device"):
        llama(profiled)
    assert llama(profiled, fasa_mode="c").fasa_mode == "device"
    with pytest.raises(FasaError, match='fasa_mode host with fasa="off"'):
        llama(profiled, fasa="off")
    with pytest.raises(FasaError, match=r"no FASA profile in .*tiny\.gguf"):  # host asks for FASA
        llama(str(tiny))
    for command in (["run", profiled, "-p", "x"], ["eval", profiled, "-f", __file__, "--fasa-min-context", "0"]):
        assert cli.main([*command, "--fasa-mode", "m"]) == 1 and "there is no CUDA device" in capfd.readouterr().err


def test_auto_with_a_gpu(llama, profiled, gpu, capfd):
    assert llama(profiled, n_gpu_layers=-1).fasa_mode == "device" and gpu.modes == ["device"]
    assert "fasa_gguf: mode device (FASA-C): " in capfd.readouterr().err
    gpu.free = 1000
    assert llama(profiled, n_gpu_layers=-1, fasa=ON).fasa_mode == "host" and gpu.modes[1:] == ["host"]
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "lie in pinned host memory, because mode device needs" in err
    for kwargs in (
        {"n_gpu_layers": 0},
        {"n_gpu_layers": -1, "offload_kqv": False},
        {"n_gpu_layers": -1, "fasa": "off"},
    ):
        assert llama(profiled, **kwargs).fasa_mode == "device"
    assert "mode" not in capfd.readouterr().err


def test_auto_that_picked_host_is_not_dense(llama, profiled, gpu, monkeypatch, capfd):
    """Where FASA cannot run, mode device is dense and says so; mode host would take all of K and V over PCIe."""

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


def test_auto_without_a_plan_is_device_and_says_so(llama, profiled, gpu, monkeypatch, capfd):
    def fail(*a):
        raise FasaError("its heads have two sizes")

    monkeypatch.setattr("fasa_gguf.llama.read_model", fail)
    assert (
        llama(profiled, n_gpu_layers=-1).fasa_mode == "device"
        and "mode device, without a plan: its heads have two sizes" in capfd.readouterr().err
    )


def test_host_with_a_gpu(llama, profiled, gpu, capfd):
    assert (
        llama(profiled, n_gpu_layers=-1, fasa_mode="host").fasa_mode == "host"
        and gpu.modes == ["host"]
        and "mode" not in capfd.readouterr().err
    )
    with pytest.raises(FasaError, match="give n_gpu_layers"):
        llama(profiled, fasa_mode="host")
    with pytest.raises(FasaError, match="offload_kqv=False"):
        llama(profiled, fasa_mode="host", n_gpu_layers=-1, offload_kqv=False)


def test_a_session(profiled, gpu, capfd):
    with Session(profiled, n_ctx=512, n_gpu_layers=-1, mode="auto", arms=[ON]) as s:
        assert s.mode == "device" and gpu.modes == ["device"] and "mode device (FASA-C): " in capfd.readouterr().err
        gpu.free = 1000
        s.reopen(n_ctx=1024)
        assert s.mode == "host" and "mode host (FASA-M): " in capfd.readouterr().err
        s.reopen(n_ctx=2048)
        assert s.mode == "host" and capfd.readouterr().err == ""  # it is told once
        s.reopen(mode="c")
        assert s.mode == "device"
    with Session(profiled, n_ctx=512, n_gpu_layers=-1, mode="auto") as s:  # nothing to plan for
        assert s.mode == "device"


def test_enable_takes_a_mode(monkeypatch):
    import fasa_gguf.llama as drop_in

    with pytest.raises(FasaError, match="fasa_mode: expected one of"):
        drop_in.enable("auto", "x")


def test_a_pickle_keeps_the_mode(llama, profiled):
    assert llama(profiled, fasa_mode="c").__getstate__()["fasa_mode"] == "device"


def test_a_context_of_mode_host_without_pinned_memory_is_refused(profiled, gpu, monkeypatch):
    monkeypatch.setattr(runtime.context, "not_pinned", NOT_PINNED)  # the library's word: nothing here is pinned
    with pytest.raises(FasaError, match="no K and V in pinned host memory; it needs flash attention"):
        Session(profiled, n_ctx=512, n_gpu_layers=-1, mode="host")
