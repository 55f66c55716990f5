"""The devices that ggml found, their memory and their speed."""

from __future__ import annotations

import contextlib
import functools
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import FasaError
from .library import api, check, find_library
from .settings import thread_count

MAX_THREADS = 512  # GGML_MAX_N_THREADS
RPC_HELLO, RPC_CAPABILITIES = 14, bytes(24)  # RPC_CMD_HELLO and an empty rpc_msg_hello_req of ggml-rpc
RPC_SECONDS = 10.0  # in which a server answers


@dataclass
class Device:
    """A device of ggml: its name ("CPU", "CUDA0"), what it is, and whether it is a GPU."""

    name: str
    description: str
    is_gpu: bool


def devices() -> list[Device]:
    """What ggml's backends found on this machine, in their order."""
    api()
    ffi, lib = _ggml()
    found = [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]

    def text(pointer: Any) -> str:
        return ffi.string(pointer).decode("utf-8", "replace")

    return [
        Device(
            text(lib.ggml_backend_dev_name(d)),
            text(lib.ggml_backend_dev_description(d)),
            lib.ggml_backend_dev_type(d) in (1, 2),  # GPU, integrated GPU
        )
        for d in found
    ]


def features() -> dict[str, dict[str, str]]:
    """What each of ggml's backends was built with, by its own names: {"CPU": {"AVX2": "1", ...}}."""
    api()
    ffi, lib = _ggml()
    found: dict[str, dict[str, str]] = {}
    for i in range(lib.ggml_backend_reg_count()):
        reg = lib.ggml_backend_reg_get(i)
        mine = found.setdefault(ffi.string(lib.ggml_backend_reg_name(reg)).decode(), {})
        get = lib.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_get_features")
        at = ffi.cast("struct feature * (*)(void *)", get)(reg) if get else ffi.NULL
        while at and at.name:  # ends with a name that is NULL
            mine[ffi.string(at.name).decode()] = ffi.string(at.value).decode()
            at += 1
    return found


@functools.cache
def _ggml() -> tuple[Any, Any]:
    """(ffi, lib): some of ggml-backend.h, which llama_cpp's ctypes API lacks."""
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(
        "size_t ggml_backend_dev_count(void);"
        "void * ggml_backend_dev_get(size_t);"
        "const char * ggml_backend_dev_name(void *);"
        "const char * ggml_backend_dev_description(void *);"
        "int ggml_backend_dev_type(void *);"
        "size_t ggml_backend_reg_count(void);"
        "void * ggml_backend_reg_get(size_t);"
        "const char * ggml_backend_reg_name(void *);"
        "void * ggml_backend_reg_get_proc_address(void *, const char *);"
        "void * ggml_backend_reg_by_name(const char *);"
        "void ggml_backend_register(void *);"
        "struct feature { const char * name; const char * value; };"  # struct ggml_backend_feature
    )
    return ffi, ffi.dlopen(str(find_library("ggml")))


@functools.cache
def copy_rate(device: str, n_bytes: int, n_threads: int = 0) -> float:
    """Bytes read plus bytes written per second when `device` copies n_bytes within its memory.

    Measured once per process. Raises FasaError.
    """
    ffi, lib = api()
    rate = ffi.new("double *")
    check(lib.fasa_copy_rate(device.encode(), min(thread_count(n_threads), MAX_THREADS), n_bytes, rate))
    return rate[0]


def device_memory(device: str) -> tuple[int, int]:
    """(free, total) bytes of a device ("CUDA0"), by the driver's count. Raises FasaError."""
    ffi, lib = api()
    free, total = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    check(lib.fasa_device_memory(device.encode(), free, total))
    return free[0], total[0]


def cuda_devices() -> list[str]:
    """Names of the CUDA devices of this machine; none with a build that has no CUDA."""
    return [d.name for d in devices() if d.is_gpu and d.name.startswith("CUDA")]


def _greet(endpoint: str) -> None:
    """Raises FasaError unless an RPC server answers there: ggml would end the process, or wait for ever."""
    host, _, port = endpoint.rpartition(":")
    try:
        server = socket.create_connection((host, int(port)), timeout=RPC_SECONDS)
    except (OSError, ValueError, OverflowError) as e:
        raise FasaError(f"RPC server {endpoint!r}: expected host:port of a running ggml-rpc-server: {e}") from None
    with server:
        size, answer = b"", b""
        with contextlib.suppress(OSError):
            server.sendall(struct.pack("<BQ", RPC_HELLO, len(RPC_CAPABILITIES)) + RPC_CAPABILITIES)
            size = server.recv(8, socket.MSG_WAITALL)
            answer = server.recv(1, socket.MSG_WAITALL)
    if len(size) < 8 or struct.unpack("<Q", size)[0] > 1024 or not answer:
        raise FasaError(
            f"RPC server {endpoint!r}: it does not answer as a ggml-rpc-server of this llama.cpp; another program may "
            "use it, since it has clients one at a time"
        )


def add_rpc_servers(endpoints: Sequence[str]) -> None:
    """Take the devices of llama.cpp's RPC servers ("host:port") for all models that are loaded from now on.

    Layers that n_gpu_layers puts on a device go to them first. They stay until the process ends, and it ends when one
    of the servers does. Raises FasaError when the library has no RPC or a server cannot be reached.
    """
    api()
    ffi, lib = _ggml()
    rpc = lib.ggml_backend_reg_by_name(b"RPC")
    if not rpc:
        raise FasaError("this library has no RPC backend; build it with `make build CMAKE_ARGS=-DGGML_RPC=ON`")
    add = ffi.cast(
        "void * (*)(const char *)", lib.ggml_backend_reg_get_proc_address(rpc, b"ggml_backend_rpc_add_server")
    )
    for endpoint in endpoints:
        _greet(endpoint)
        reg = add(endpoint.encode())
        if not reg:
            raise FasaError(f"RPC server {endpoint!r}: it has no devices")
        lib.ggml_backend_register(reg)
