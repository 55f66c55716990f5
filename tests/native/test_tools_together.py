"""llama-server with what people run beside FASA: adapters, a draft model, experts on the CPU."""

import json
import os
import re
import socket
import subprocess
import time
import urllib.request

import pytest
from paths import ROOT
from tiny_adapters import control_vector, write_control_vector, write_lora
from tiny_gguf import write_tiny

from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile import embed
from fasa_gguf.speed.random_model import synthetic_profile

BIN = ROOT / "build" / "tools" / "bin"
pytestmark = pytest.mark.skipif(not (BIN / "llama-server").exists(), reason="no native tools; run `make tools`")
PROMPT = "the ship sailed on the wide sea; " * 9


def with_profile(folder, name, **kw):
    write_tiny(folder / f"{name}.plain", **kw)
    profile = synthetic_profile(*model_shape(GGUFFile(folder / f"{name}.plain")))
    return embed.rewrite(folder / f"{name}.plain", profile, folder / f"{name}.gguf")


@pytest.fixture(scope="module")
def files(library, tmp_path_factory):
    """By name: models of one vocabulary with profiles, an adapter, a control vector."""
    folder = tmp_path_factory.mktemp("together")
    write_lora(folder / "lora.gguf")
    write_control_vector(folder / "vector.gguf", control_vector(seed=6))
    return {
        "model": with_profile(folder, "model"),
        "experts": with_profile(folder, "experts", experts=4),
        "draft": with_profile(folder, "draft", seed=4, n_layer=1),
        "lora": folder / "lora.gguf",
        "vector": folder / "vector.gguf",
    }


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve(tmp_path, model, *argv, **variables):
    """(greedy text, counters of all contexts) of one completion."""
    port = free_port()
    command = [BIN / "llama-server", "-m", model, "-c", 512, "-np", 1, "-t", 1, "--port", port, "--no-warmup", *argv]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASA_", "LLAMA_"))}
    given = {f"FASA_{k}": str(v) for k, v in variables.items()}
    with open(tmp_path / "err", "w+") as log:
        server = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env={**kept, "OMP_WAIT_POLICY": "passive", **given}
        )
        try:
            body = json.dumps({"prompt": PROMPT, "n_predict": 24, "temperature": 0, "cache_prompt": False}).encode()
            for _ in range(240):
                try:
                    url = urllib.request.Request(f"http://127.0.0.1:{port}/completion", body)
                    answer = json.load(urllib.request.urlopen(url, timeout=60))
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "err").read_text()[-2000:]
                    time.sleep(0.25)
        finally:
            server.terminate()
            server.wait(60)
        log.seek(0)
        err = log.read()
    counted = [
        {k: int(v) for k, v in (part.split("=") for part in line.split())}
        for line in re.findall(r"^fasa: stats: (.*)$", err, re.M)
    ]
    return answer["content"], counted


ALL = {"CHUNKS": 8, "BUDGET": 512, "MIN_CONTEXT": 0, "STATS": 1}
OPTIONS = {
    "lora": ("model", "--lora", "lora"),
    "control vector": ("model", "--control-vector", "vector"),
    "draft": ("model", "--spec-draft-model", "draft", "--spec-type", "draft-simple"),
    "experts": ("experts", "--n-cpu-moe", "2"),
    "all experts": ("experts", "--cpu-moe"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_llama_server(files, tmp_path, option):
    """All tokens attended: the text is that of dense attention. Few: what
    FASA writes without a draft, and with experts anywhere."""
    name, *argv = OPTIONS[option]
    argv = [files.get(word, word) for word in argv]
    dense, _ = serve(tmp_path, files[name], *argv, ENABLE=0)
    text, counted = serve(tmp_path, files[name], *argv, **ALL)
    assert text == dense
    assert sum(c["steps_sparse"] for c in counted) >= (8 if option == "draft" else 20)
    if option == "draft":
        assert len(counted) == 2 and all(c["steps_sparse"] > 0 for c in counted)
    few = {**ALL, "CHUNKS": 4, "BUDGET": 48}
    text, counted = serve(tmp_path, files[name], *argv, **few)
    alone, _ = serve(tmp_path, files[name], *(() if option in ("draft", "experts", "all experts") else argv), **few)
    assert text == alone and sum(c["tokens_attended"] for c in counted) > 0
    if option in ("lora", "control vector"):
        assert dense != serve(tmp_path, files[name], ENABLE=0)[0]


@pytest.mark.skipif(not (BIN / "ggml-rpc-server").exists(), reason="built without RPC; see docs/guide/rpc.md")
def test_layers_on_another_machine(files, tmp_path):
    """llama-server --rpc: the same text and counters as here, in sparse steps."""
    port, few = free_port(), {**ALL, "CHUNKS": 4, "BUDGET": 48}
    with open(tmp_path / "rpc", "w") as log:
        other = subprocess.Popen(
            [BIN / "ggml-rpc-server", "-d", "CPU", "-t", "1", "-p", str(port)], stdout=log, stderr=log
        )
        try:
            for _ in range(100):
                if other.poll() is None and "transport" in (tmp_path / "rpc").read_text():
                    break
                time.sleep(0.1)
            remote = serve(tmp_path, files["model"], "--rpc", f"127.0.0.1:{port}", "-ngl", 99, **few)
        finally:
            other.kill()
            other.wait()
    text, counted = serve(tmp_path, files["model"], **few)
    assert remote == (text, counted) and counted[0]["layers_sparse"] >= 60
