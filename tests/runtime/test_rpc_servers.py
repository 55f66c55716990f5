"""RPC servers that a model is to use: which are refused, and what mode auto makes of them."""

import socket
import threading
import time

import pytest

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.cli import main as cli
from fasa_gguf.memory.placement import choose_mode
from fasa_gguf.runtime import devices, library
from fasa_gguf.runtime.settings import ContextSettings

needs_rpc = pytest.mark.skipif(
    not (library.lib_dir() / "libggml-rpc.so").exists(), reason="built without RPC; `make tool-tests` has it"
)


def test_auto_is_device_where_there_are_servers(monkeypatch):
    """It would plan for the layers that are on other machines."""
    monkeypatch.setattr(devices, "devices", lambda: [devices.Device("RPC0", "127.0.0.1:1", True)])
    monkeypatch.setattr(devices, "cuda_devices", lambda: ["CUDA0"])
    settings = ContextSettings(n_gpu_layers=99, mode="auto")
    assert choose_mode(settings, lambda: pytest.fail("planned"), [FasaParams()]) == (
        "device",
        "mode device: some layers are on other machines, of which auto does not know",
    )


def test_servers_without_layers_for_them(tiny, capsys):
    for flags in (["run", str(tiny), "-p", "x"], ["bench", str(tiny), "-ngl", "0"]):
        assert cli.main([*flags, "--rpc", "127.0.0.1:1"]) == 1
        assert "--rpc without -ngl: no layer would go to the servers" in capsys.readouterr().err


def test_layers_for_a_gpu_that_is_not_there(tiny, capsys, monkeypatch):
    """A line says so, and the command goes on."""
    monkeypatch.setattr(devices, "devices", lambda: [devices.Device("CPU", "a CPU", False)])
    assert cli.main(["run", str(tiny), "-p", "x", "-n", "1", "-ngl", "99", "--no-fasa"]) == 0
    assert "-ngl: no GPU, or a build without CUDA; all layers are on the CPU" in capsys.readouterr().err


@needs_rpc
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", None])
def test_a_port_that_is_not_a_server(library, monkeypatch, answer):
    """None: it does not answer, as a server that has a client. ggml would end the process, or wait for ever."""
    monkeypatch.setattr(devices, "RPC_SECONDS", 0.5)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with listener.accept()[0] as client:
            client.recv(64)
            if answer is None:
                time.sleep(2)
            else:
                client.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    with pytest.raises(FasaError, match=r"does not answer as a ggml-rpc-server of this llama.cpp; .* one at a time"):
        devices.add_rpc_servers([f"127.0.0.1:{listener.getsockname()[1]}"])


@needs_rpc
@pytest.mark.parametrize("endpoint", ["127.0.0.1:1", "nowhere", "127.0.0.1:x", ""])
def test_a_server_that_is_not_there(library, endpoint):
    with pytest.raises(FasaError, match="expected host:port of a running ggml-rpc-server"):
        devices.add_rpc_servers([endpoint])
