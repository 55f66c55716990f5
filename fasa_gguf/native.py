"""The native library: where it is, how llama_cpp is made to load it, and FASA's C interface (native/fasa.h) through cffi."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np

from .errors import FasaError
from .params import K_DOM_TYPES, FasaParams

LLAMA_CPP_VERSION = "0.3.36"  # the llama-cpp-python whose ctypes mirror fits our library; patches/UPSTREAM pins the same


def lib_dir() -> Path:
    """The folder of libllama and libggml*; FASA_LIB_PATH takes another build."""
    return Path(os.environ.get("FASA_LIB_PATH") or Path(__file__).parent / "lib").resolve()


def _library(name: str) -> Path:
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    path = lib_dir() / (("" if sys.platform == "win32" else "lib") + name + suffix)
    if not path.exists():
        raise FasaError(f"{path}: the native library is missing; run `make build` in a checkout, or `pip install --force-reinstall fasa_gguf`")
    return path


def _loaded_library(llama_cpp: Any) -> Path:
    return Path(llama_cpp.llama_cpp._lib._name).resolve()


@functools.lru_cache(maxsize=None)
def load() -> Any:
    """llama_cpp with our library underneath.

    Returns the module. Raises FasaError when llama_cpp was imported before with another library, when its version is not
    the one our library was built for, or when the library is missing.
    """
    ours = _library("llama")
    if "llama_cpp" in sys.modules:
        found = _loaded_library(sys.modules["llama_cpp"])
        if found != ours:
            raise FasaError(f"llama_cpp was imported first and uses {found}; import fasa_gguf, or call fasa_gguf.enable(), before llama_cpp")
        return sys.modules["llama_cpp"]
    try:
        version = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        raise FasaError(f"llama-cpp-python is not installed; run `pip install llama-cpp-python=={LLAMA_CPP_VERSION}`") from None
    if version != LLAMA_CPP_VERSION:
        raise FasaError(f"llama-cpp-python {version} is installed and {LLAMA_CPP_VERSION} is needed; "
                        f"run `pip install llama-cpp-python=={LLAMA_CPP_VERSION}`")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(ours.parent)
    import llama_cpp

    return llama_cpp


def _header() -> str:
    here = Path(__file__).parent
    for path in (here / "fasa.h", here.parent / "native" / "fasa.h"):
        if path.exists():
            return path.read_text()
    raise FasaError(f"{here / 'fasa.h'}: the C header is missing; run `pip install --force-reinstall fasa_gguf`")


@functools.lru_cache(maxsize=None)
def _api() -> tuple[Any, Any]:
    """(ffi, lib): cffi's view of native/fasa.h, on the library that llama_cpp uses."""
    import cffi

    load()
    text = re.sub(r"^\s*#.*$", "", _header(), flags=re.M)                       # preprocessor lines
    text = re.sub(r'extern "C" \{', "", text).replace("FASA_API", "")
    text = text.rstrip()[:-1] if text.rstrip().endswith("}") else text          # the brace of extern "C"
    ffi = cffi.FFI()
    ffi.cdef(text)
    return ffi, ffi.dlopen(str(_library("llama")))


def version() -> str:
    """The version of the native library."""
    ffi, lib = _api()
    return ffi.string(lib.fasa_version()).decode()


def last_error() -> str:
    """The last complaint of the native library on this thread; "" when there was none."""
    ffi, lib = _api()
    return ffi.string(lib.fasa_error()).decode("utf-8", "replace")


def _check(code: int) -> None:
    if code != 0:
        raise FasaError(last_error())


@contextlib.contextmanager
def kv_place(host: bool) -> Iterator[None]:
    """Where K and V of a context that this thread makes inside lie: with `host` in pinned host memory (FASA-M), else on their device.

    Raises FasaError in place of an exception raised inside when the library says why the memory could not be had.
    """
    if not host:
        yield
        return
    _, lib = _api()
    _check(lib.fasa_set_kv_place(lib.FASA_KV_HOST))                                  # which clears the last error
    try:
        yield
    except Exception as e:
        if last_error():
            raise FasaError(last_error()) from e
        raise
    finally:
        lib.fasa_set_kv_place(lib.FASA_KV_DEVICE)


def _struct(name: str, **values: Any) -> Any:
    ffi, _ = _api()
    s = ffi.new(f"{name} *")
    s.size = ffi.sizeof(name)
    for key, value in values.items():
        setattr(s, key, value)
    return s


def _array(ctype: str, values: Any, dtype: Any) -> tuple[Any, np.ndarray]:
    """(pointer, the array that owns the memory)."""
    ffi, _ = _api()
    a = np.ascontiguousarray(values, dtype)
    return ffi.cast(f"{ctype} *", a.ctypes.data), a


@dataclass
class Observation:
    """Post-RoPE q and k of one layer of one ubatch (struct fasa_observation)."""

    il: int
    q: np.ndarray  # float32 [n_tokens, n_head, head_dim], a copy
    k: np.ndarray  # float16 or float32 [n_kv, n_head_kv, head_dim], valid during the call only
    scale: float
    soft_cap: float


def not_pinned(context: "Context") -> str:
    """Why a context of mode m has nothing in pinned host memory; "" when it has."""
    if context.counters()["bytes_kv_host"]:
        return ""
    return ("fasa_mode m: this context has no K and V in pinned host memory; it needs flash attention, keys per head, a GPU of compute capability 7.5 "
            "or later and layers split by layer; use mode c")


class Context:
    """FASA's side of a llama_context: profile, settings, counters, observer. `ctx_ptr` is its address."""

    def __init__(self, ctx_ptr: int) -> None:
        self._ffi, self._lib = _api()
        self._ctx = self._ffi.cast("struct llama_context *", ctx_ptr)
        self._observer = None
        self._observer_error: BaseException | None = None

    def set_profile(self, profile: Any) -> None:
        """Attach a Profile; raises FasaError naming both shapes when it does not fit the model."""
        n_layer = len(profile.n_chunk)
        ranked = [il for il in range(n_layer) if profile.n_chunk[il]]
        flat = np.concatenate([np.asarray(profile.ranking[il]).ravel() for il in ranked]) if ranked else np.zeros(0)
        heads, _a = _array("uint32_t", profile.n_head_kv, np.uint32)
        chunks, _b = _array("uint32_t", profile.n_chunk, np.uint32)
        ranking, _c = _array("uint16_t", flat, np.uint16)
        p = _struct("fasa_profile", n_layer=n_layer, n_head_kv=heads, n_chunk=chunks, ranking=ranking)
        if profile.weight is not None and profile.weight_k:
            p.weight_k = profile.weight_k
            p.weight, _d = _array("float", np.concatenate([np.asarray(profile.weight[il]).ravel() for il in ranked]), np.float32)
        if profile.layer_budget is not None:
            p.layer_budget, _e = _array("float", profile.layer_budget, np.float32)
        if profile.layer_miss is not None:
            p.layer_miss, _f = _array("float", profile.layer_miss, np.float32)
        if profile.mean_budget:
            p.n_mean_budget = len(profile.mean_budget)
            p.mean_budget, _g = _array("uint32_t", list(profile.mean_budget), np.uint32)
            p.mean_budget_mass, _h = _array("float", list(profile.mean_budget.values()), np.float32)
        _check(self._lib.fasa_set_profile(self._ctx, p))

    def set_params(self, params: FasaParams | None) -> None:
        """Turn FASA on with these settings, or off with None; the context stays live."""
        p = self._ffi.new("fasa_params *", self._lib.fasa_params_default())
        p.enabled = params is not None
        if params is not None:
            for f in fields(params.check()):
                value = getattr(params, f.name)
                setattr(p, f.name, K_DOM_TYPES.index(value) if f.name == "k_dom" else value)
        _check(self._lib.fasa_set_params(self._ctx, p))

    def params(self) -> FasaParams | None:
        """The settings in force; None when FASA is off."""
        p = _struct("fasa_params")
        _check(self._lib.fasa_get_params(self._ctx, p))
        return self._from_struct(p) if p.enabled else None

    def layer_params(self, il: int) -> FasaParams | None:
        """The settings in force in one layer, with the budget and the mass that it really has; None when FASA is off."""
        p = _struct("fasa_params")
        _check(self._lib.fasa_get_layer_params(self._ctx, il, p))
        return self._from_struct(p) if p.enabled else None

    @staticmethod
    def _from_struct(p: Any) -> FasaParams:
        values = {f.name: getattr(p, f.name) for f in fields(FasaParams)}
        return FasaParams(**{**values, "k_dom": K_DOM_TYPES[p.k_dom], "mass": float(p.mass)})

    def counters(self) -> dict[str, int]:
        """struct fasa_counters by name."""
        c = _struct("fasa_counters")
        _check(self._lib.fasa_get_counters(self._ctx, c))
        return {name: getattr(c, name) for name, _ in self._ffi.typeof("fasa_counters").fields if name != "size"}

    def reset_counters(self) -> None:
        """All counters but the memory sizes go to zero."""
        _check(self._lib.fasa_reset_counters(self._ctx))

    def invalidate(self) -> None:
        """Mark all dominant keys stale: the next sparse step derives them anew from the stored K."""
        _check(self._lib.fasa_invalidate(self._ctx))

    def fill_random(self, n_cells: int, seed: int = 0) -> None:
        """Give every sequence `n_cells` cells of random K and V instead of what it has (fasa_fill_random)."""
        _check(self._lib.fasa_fill_random(self._ctx, n_cells, seed))

    def host_rates(self, n_cells: int, n_rows: int, between: int) -> tuple[float, float, float]:
        """(copy, gather, fetch): bytes per second that the device takes from K and V in pinned host memory (FASA-M).

        copy: in one piece. gather: the rows of n_rows random cells of the first n_cells, K and V of every KV head, layer by layer, each behind
        `between` bytes of device memory (a layer's weights), by a kernel that does nothing else. fetch: the same by the one that fetches rows
        for attention. Raises FasaError.
        """
        rates = _struct("fasa_rates")
        _check(self._lib.fasa_host_rates(self._ctx, n_cells, n_rows, between, rates))
        return rates.copy, rates.gather, rates.fetch

    def layer_reasons(self) -> list[str | None]:
        """Per layer, why it stays dense in a sparse step; None where it runs sparse."""
        out = []
        for il in range(self.model_info()["n_layer"]):
            reason = self._lib.fasa_layer_reason(self._ctx, il)
            out.append(self._ffi.string(reason).decode() if reason != self._ffi.NULL else None)
        return out

    def step_reason(self) -> str:
        """Why the last decode step was dense as a whole; "" when it was sparse."""
        return self._ffi.string(self._lib.fasa_step_reason(self._ctx)).decode()

    def model_info(self) -> dict[str, Any]:
        """n_layer, rope_layout (0 NORM, 1 NEOX, -1 none), rope_base, rope_scale, is_mla."""
        i = _struct("fasa_model_info")
        _check(self._lib.fasa_get_model_info(self._ctx, i))
        return {name: getattr(i, name) for name, _ in self._ffi.typeof("fasa_model_info").fields if name != "size"}

    def layer_shape(self, il: int) -> tuple[int, int, int, int]:
        """(n_head, n_head_kv, head_dim, n_rot) of one layer; n_head_kv is 0 where there is no attention."""
        out = self._ffi.new("int32_t[4]")
        _check(self._lib.fasa_get_layer_shape(self._ctx, il, out))
        return tuple(out)  # type: ignore[return-value]

    def observe(self, fn: Callable[[Observation], None] | None) -> None:
        """Call fn for every attention layer of every ubatch, from a compute thread; None takes it away.

        An exception in fn does not stop the decode: it is kept, and `raise_observed` raises it.
        """
        if fn is None:
            _check(self._lib.fasa_set_observer(self._ctx, self._ffi.NULL, self._ffi.NULL))
            self._observer = None
            return

        def call(seen: Any, _user: Any) -> None:
            try:
                nq = seen.n_tokens * seen.n_head * seen.n_embd_head
                q = np.frombuffer(self._ffi.buffer(seen.q, nq * 4), np.float32).reshape(seen.n_tokens, seen.n_head, -1).copy()
                dtype = np.dtype(np.float16 if seen.k_is_f16 else np.float32)
                nk = seen.n_kv * seen.n_head_kv * seen.n_embd_head
                k = np.frombuffer(self._ffi.buffer(seen.k, nk * dtype.itemsize), dtype).reshape(seen.n_kv, seen.n_head_kv, -1)
                fn(Observation(seen.il, q, k, seen.scale, seen.soft_cap))
            except BaseException as e:  # must not cross the C frame; raise_observed raises it
                self._observer_error = self._observer_error or e

        self._observer = self._ffi.callback("fasa_observer", call)
        _check(self._lib.fasa_set_observer(self._ctx, self._observer, self._ffi.NULL))

    def raise_observed(self) -> None:
        """Raise the first exception that an observer left, if any."""
        error, self._observer_error = self._observer_error, None
        if error is not None:
            raise error


@dataclass
class Device:
    """A device of ggml: its name ("CPU", "CUDA0"), what it is, and whether it is a GPU."""

    name: str
    description: str
    is_gpu: bool


def devices() -> list[Device]:
    """What ggml's backends found on this machine, in their order."""
    _api()
    ffi, lib = _ggml()
    found = [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]
    text = lambda p: ffi.string(p).decode("utf-8", "replace")
    return [Device(text(lib.ggml_backend_dev_name(d)), text(lib.ggml_backend_dev_description(d)), lib.ggml_backend_dev_type(d) in (1, 2)) for d in found]


@functools.lru_cache(maxsize=None)
def _ggml() -> tuple[Any, Any]:
    """(ffi, lib): some of ggml-backend.h, which llama_cpp's ctypes API lacks."""
    import cffi

    ffi = cffi.FFI()
    ffi.cdef("size_t ggml_backend_dev_count(void); void * ggml_backend_dev_get(size_t); const char * ggml_backend_dev_name(void *);"
             "const char * ggml_backend_dev_description(void *); int ggml_backend_dev_type(void *);")
    return ffi, ffi.dlopen(str(_library("ggml")))


@functools.lru_cache(maxsize=None)
def copy_rate(device: str, n_bytes: int, n_threads: int = 0) -> float:
    """Bytes read plus bytes written per second when `device` copies n_bytes within its memory; measured once per process."""
    ffi, lib = _api()
    rate = ffi.new("double *")
    _check(lib.fasa_copy_rate(device.encode(), n_threads or os.cpu_count() or 1, n_bytes, rate))
    return rate[0]


def device_memory(device: str) -> tuple[int, int]:
    """(free, total) bytes of a device ("CUDA0"), by the driver's count. Raises FasaError."""
    ffi, lib = _api()
    free, total = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    _check(lib.fasa_device_memory(device.encode(), free, total))
    return free[0], total[0]


def cuda_devices() -> list[str]:
    """Names of the CUDA devices of this machine; none with a build that has no CUDA."""
    return [d.name for d in devices() if d.is_gpu and d.name.startswith("CUDA")]


def rank_recall(q: np.ndarray, k: np.ndarray, q_pos: Sequence[int], chunk_dims: np.ndarray, n_rank: int, budget: int,
                sink: int, recent: int, scale: float, soft_cap: float = 0.0, candidate: np.ndarray | None = None,
                n_threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Greedy set ranking of one KV head's chunks (reference.rank_recall, in C++).

    q float32 [n_group, n_query, head_dim], k float32 [n_kv, head_dim], chunk_dims int32 [n_chunk, 2].
    Returns (order int32 [n_rank], share of the attention mass kept float32 [n_rank]).
    """
    pq, q = _array("float", q, np.float32)
    pk, k = _array("float", k, np.float32)
    pp, pos = _array("int32_t", q_pos, np.int32)
    pd, dims = _array("int32_t", chunk_dims, np.int32)
    po, order = _array("int32_t", np.zeros(n_rank), np.int32)
    pr, recall = _array("float", np.zeros(n_rank), np.float32)
    c = _struct("fasa_rank_case", n_group=q.shape[0], n_query=q.shape[1], n_kv=k.shape[0], n_embd_head=k.shape[1],
                n_chunk=dims.shape[0], n_rank=n_rank, budget=budget, sink=sink, recent=recent,
                n_threads=n_threads or os.cpu_count() or 1, scale=scale, soft_cap=soft_cap,
                q=pq, k=pk, q_pos=pp, chunk_dims=pd, out_order=po, out_recall=pr)
    if candidate is not None:
        c.candidate, _keep = _array("uint8_t", candidate, np.uint8)
    _check(_api()[1].fasa_rank_recall(c))
    return order, recall


def _op_case(keep: list[Any], *, q: np.ndarray, k: np.ndarray, v: np.ndarray, dims: np.ndarray, weight: np.ndarray, forced: np.ndarray,
             budget: int, scale: float, n_kv: int, mask: np.ndarray | None = None, mass: float = 0.0, floor: int = 64, cap: int = 1024,
             soft_cap: float = 0.0, k_dom: str = "q4", type_k: str = "f16", type_v: str = "f16", n_hadamard: int = 0,
             sinks: np.ndarray | None = None, per_head: bool = False, backend: str = "CPU", tip_backend: str | None = None,
             n_threads: int = 2, kv_place: int = 0, row_slots: int = 0) -> Any:
    """struct fasa_op_case; what it points to goes into `keep`."""
    ffi, _ = _api()
    n_stream, n_tokens, n_head, d_k = q.shape

    def array(ctype: str, values: Any, dtype: Any) -> Any:
        pointer, owner = _array(ctype, values, dtype)
        keep.append(owner)
        return pointer

    def text(value: str) -> Any:
        keep.append(ffi.new("char[]", value.encode()))
        return keep[-1]

    c = _struct("fasa_op_case", backend=text(backend), tip_backend=text(tip_backend or backend), n_threads=n_threads, n_head=n_head,
                n_head_kv=v.shape[-2], n_embd_head_k=d_k, n_embd_head_v=v.shape[-1], n_kv=n_kv, n_tokens=n_tokens, n_stream=n_stream,
                n_hadamard=n_hadamard, type_k=text(type_k), type_v=text(type_v), k_dom=K_DOM_TYPES.index(k_dom), n_dom=dims.shape[-1],
                dims=array("int32_t", dims, np.int32), weight=array("float", weight, np.float32), scale=scale, soft_cap=soft_cap,
                budget=budget, mass=mass, floor=floor, cap=cap, per_head=per_head, kv_place=kv_place, row_slots=row_slots, n_forced=forced.shape[-1],
                forced=array("int32_t", forced, np.int32), q=array("float", q, np.float32), k=array("float", k, np.float32),
                v=array("float", v, np.float32))
    if mask is not None:
        c.mask = array("float", mask, np.float32)
    if sinks is not None:
        c.sinks = array("float", sinks, np.float32)
    return c


def op_run(*, q: np.ndarray, v: np.ndarray, forced: np.ndarray, **case: Any) -> dict[str, np.ndarray]:
    """The ops of one layer on host arrays, shapes as in struct fasa_op_case; returns est, count, list and out.
    tip_backend: TIP runs there, and `backend` selects from its scores and attends. Raises FasaError."""
    n_stream, n_tokens, n_head, _ = q.shape
    _, n_kv, n_head_kv, d_v = v.shape
    n_list = n_head if case.get("per_head") else n_head_kv
    longest = min(n_kv, max(case.get("cap", 1024) if case.get("mass", 0) > 0 else case["budget"], forced.shape[-1]))
    out = {"est": np.full((n_stream, n_tokens, n_head, n_kv), np.nan, np.float32),
           "count": np.full((n_stream, n_tokens, n_list), -1, np.int32),
           "list": np.full((n_stream, n_tokens, n_list, longest), -1, np.int32),
           "out": np.full((n_stream, n_tokens, n_head, d_v), np.nan, np.float32)}
    keep: list[Any] = []
    c = _op_case(keep, q=q, v=v, forced=forced, n_kv=n_kv, **case)
    for field, name, ctype in (("out_est", "est", "float"), ("out_count", "count", "int32_t"), ("out_list", "list", "int32_t"), ("out", "out", "float")):
        pointer, _ = _array(ctype, out[name], out[name].dtype)
        setattr(c, field, pointer)
    _check(_api()[1].fasa_op_run(c))
    return out


TIME_CELLS = 16384  # FASA_TIME_CELLS of fasa-op-run.cpp


def op_time(*, n_layer: int = 4, n_rep: int = 20, **case: Any) -> dict[str, float]:
    """Seconds a layer of dense flash attention ("dense"), of TIP and SELECT ("select"), and of all of FASA ("fasa"), the fastest of n_rep
    runs over n_layer caches. k and v float32 [1, 16384, n_head_kv, head_dim] are repeated over n_kv cells. Raises FasaError."""
    for name in ("k", "v"):
        if case[name].shape[:2] != (1, TIME_CELLS):
            raise FasaError(f"op_time: expected {name} of shape [1, {TIME_CELLS}, n_head_kv, head_dim], found {list(case[name].shape)}")
    keep: list[Any] = []
    times = _struct("fasa_op_times")
    _check(_api()[1].fasa_op_time(_op_case(keep, **case), n_layer, n_rep, times))
    return {name: getattr(times, name) for name, _ in _api()[0].typeof("fasa_op_times").fields if name != "size"}
