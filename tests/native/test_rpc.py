"""Layers on other machines, behind llama.cpp's RPC backend, on loopback; and what a server refuses."""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import rpc_wire as W
from paths import ROOT
from tiny_gguf import write_tiny

from fasa_gguf import reference as R
from fasa_gguf.memory.plan import device_layers
from fasa_gguf.reasons import Reason
from fasa_gguf.runtime import library
from fasa_gguf.speed.random_model import synthetic_profile

SERVER = ROOT / "build" / "tools" / "bin" / "ggml-rpc-server"
pytestmark = [
    pytest.mark.skipif(not SERVER.exists(), reason="no RPC server; `make tool-tests` has one"),
    pytest.mark.skipif(
        not (library.lib_dir() / "libggml-rpc.so").exists(), reason="built without RPC; `make tool-tests` has it"
    ),
]
ENV = {"PYTHONPATH": str(ROOT), **{k: v for k, v in os.environ.items() if k == "FASA_LIB_PATH"}}
SOME = {"chunks": 4, "budget": 40, "min_context": 0}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def server(log):
    """The port and the process of a server on this machine's CPU."""
    port = free_port()
    with open(log, "w") as out:
        process = subprocess.Popen([SERVER, "-d", "CPU", "-t", "1", "-p", str(port)], stdout=out, stderr=out)
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield port, process
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def model(library, tmp_path_factory):
    path = tmp_path_factory.mktemp("rpc") / "m.gguf"
    write_tiny(path, n_layer=4)
    return path


def run(model, out, ports, settings, observe=False, n_gpu_layers=99):
    """(logits by setting, what was counted and said) of tests/helpers/rpc_run.py."""
    job = {"model": str(model), "out": str(out), "servers": [f"127.0.0.1:{p}" for p in ports], "observe": observe}
    job |= {"settings": settings, "n_gpu_layers": n_gpu_layers if ports else 0}
    command = [sys.executable, ROOT / "tests" / "helpers" / "rpc_run.py", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENV, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(out), json.loads(done.stdout)


# ---- servers of this build ----


def test_layers_on_two_machines_are_as_here(model, tmp_path):
    """Bit for bit, with all counters, dense and sparse; an observer sees the queries of remote layers."""
    settings = {
        "dense": None,
        "some": SOME,
        "mass": {**SOME, "mass": 0.7, "floor": 8, "cap": 90, "budget": 512, "k_dom": "q8"},
        "heads": {**SOME, "per_head": 1, "k_dom": "f16"},
    }
    with server(tmp_path / "1") as (one, _), server(tmp_path / "2") as (two, _):
        logits, said = run(model, tmp_path / "remote.npz", [one, two], settings, observe=True)
    here, local = run(model, tmp_path / "local.npz", [], settings, observe=True)
    for name in settings:
        assert np.array_equal(logits[name], here[name]), name
        assert said[name]["counters"] == local[name]["counters"]
    assert said["some"]["reasons"] == [Reason.NONE] * 4 and said["some"]["counters"]["layers_sparse"] == 4 * 12
    assert said["observed"] == local["observed"] and len(said["observed"]) == 4


def test_some_layers_here_and_some_on_another_machine(model, tmp_path):
    settings = {"some": SOME}
    with server(tmp_path / "1") as (port, _):
        logits, said = run(model, tmp_path / "remote.npz", [port], settings, n_gpu_layers=2)
    here, local = run(model, tmp_path / "local.npz", [], settings)
    assert np.array_equal(logits["some"], here["some"])
    assert said["some"]["counters"] == local["some"]["counters"]


def test_prompts_are_dense_on_another_machine(model, tmp_path):
    """With a reason of their own; layers on this machine go on sparse: an RPC server takes no products of theirs."""
    tiles = {"prefill_tile": 64, "prefill_band": 32, "prefill_mass": 0, "prefill_budget": 100}
    settings = {
        "on": {**SOME, **tiles, "prefill": "on"},
        "auto": {**SOME, **tiles, "prefill_min_context": 0, "prefill_min_context_gpu": 0},
    }
    with server(tmp_path / "1") as (port, _):
        _, remote = run(model, tmp_path / "remote.npz", [port], settings)
        _, mixed = run(model, tmp_path / "mixed.npz", [port], settings, n_gpu_layers=2)
    for name in settings:
        assert remote[name]["prompt"] == mixed[name]["prompt"] == Reason.PREFILL_REMOTE
        assert remote[name]["reasons"] == [Reason.NONE] * 4 and not remote[name]["counters"]["layers_prefill_sparse"]
        assert mixed[name]["counters"]["layers_prefill_sparse"] in (2, 3)


def test_selecting_ahead_on_another_machine(model, tmp_path):
    settings = {"ahead": {**SOME, "per_head": 1, "ahead": "on"}}
    with server(tmp_path / "1") as (port, _):
        logits, said = run(model, tmp_path / "remote.npz", [port], settings)
    here, local = run(model, tmp_path / "local.npz", [], settings)
    assert np.array_equal(logits["ahead"], here["ahead"]) and said == local
    assert said["ahead"]["ahead"] == [Reason.AHEAD_FIRST, Reason.NONE, Reason.NONE, Reason.NONE]


def test_plan_splits_layers_as_llama_cpp_does(model, tmp_path):
    """Two devices, as `plan` and auto assume of two GPUs."""
    splits = [(s, n) for s in ([1, 1], [3, 1], [1, 0], [0, 1], [1, 2.5]) for n in (99, 5, 3, 2, 1)]
    with server(tmp_path / "1") as (one, _), server(tmp_path / "2") as (two, _):
        job = {"model": str(model), "servers": [f"127.0.0.1:{p}" for p in (one, two)], "splits": splits}
        command = [sys.executable, ROOT / "tests" / "helpers" / "rpc_run.py", json.dumps(job)]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENV)
    wanted = [[list(part) for part in device_layers(4, n, split)] for split, n in splits]
    assert json.loads(found.stdout) == wanted


# ---- servers of another build ----


def without_fasa(port):
    """The port of a server in front of another, which answers what a tensor's size is as llama.cpp does."""
    listener = socket.create_server(("127.0.0.1", 0))

    def forward(a, b):
        with contextlib.suppress(OSError):
            while data := a.recv(1 << 16):
                b.sendall(data)
        for s in (a, b):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def read(s, n):
        data = b""
        while len(data) < n:
            more = s.recv(n - len(data))
            if not more:
                raise ConnectionError
            data += more
        return data

    def serve(client):
        behind = socket.create_connection(("127.0.0.1", port))
        threading.Thread(target=forward, args=(behind, client), daemon=True).start()
        with contextlib.suppress(OSError):
            while True:
                head = read(client, 9)
                body = read(client, struct.unpack("<Q", head[1:])[0])
                op = struct.unpack_from("<I", body, 4 + 52)[0] if head[0] == 13 else 0  # GET_ALLOC_SIZE
                if op == W.op_number(b"CUSTOM"):
                    client.sendall(struct.pack("<QQ", 8, 34))  # a block of q8_0
                else:
                    behind.sendall(head + body)
        with contextlib.suppress(OSError):
            behind.shutdown(socket.SHUT_RDWR)  # a server has one client at a time

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


def test_layers_on_a_server_without_fasa_are_dense(model, tmp_path):
    """With the reason, and the logits of dense attention; layers on this machine go on sparse."""
    settings = {"dense": None, "some": SOME}
    with server(tmp_path / "1") as (port, _):
        logits, said = run(model, tmp_path / "remote.npz", [without_fasa(port)], settings)
        _, mixed = run(model, tmp_path / "mixed.npz", [without_fasa(port)], {"some": SOME}, n_gpu_layers=2)
    here, _ = run(model, tmp_path / "local.npz", [], settings)
    assert np.array_equal(logits["some"], here["dense"]) and np.array_equal(logits["dense"], here["dense"])
    assert said["some"]["reasons"] == [Reason.REMOTE_BUILD] * 4 and said["some"]["counters"]["steps_sparse"] == 0
    assert mixed["some"]["reasons"].count(Reason.REMOTE_BUILD) in (1, 2)
    assert mixed["some"]["counters"]["layers_sparse"] > 0


def test_the_command_line(model, tmp_path):
    """The layers of -ngl go to the server, where steps are sparse and prompts dense."""
    profile = tmp_path / "p.json"
    synthetic_profile([2] * 4, [8] * 4, seed=3).save(profile)
    flags = "-ngl 99 -t 1 -d 300 -n 4 -r 1 -p 64 --json --fasa-budget 40 --fasa-min-context 0 --fasa-prefill on"
    command = [sys.executable, "-m", "fasa_gguf", "bench", model, "--profile", profile, *flags.split()]
    with server(tmp_path / "log") as (port, _):
        command += ["--rpc", f"127.0.0.1:{port}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    prompt, step = (r for r in json.loads(done.stdout) if r["fasa"])
    assert prompt["note"] == f"prompt dense: {Reason.PREFILL_REMOTE.text}" and step["sparse_share"] == 1


# ---- what comes over the wire ----


@pytest.fixture(scope="module")
def wire(tmp_path_factory):
    """(port, process, log) of a server to send anything to."""
    log = tmp_path_factory.mktemp("wire") / "log"
    with server(log) as (port, process):
        yield port, process, log


def computed(port, change=None, fill=None, again=None):
    """(fac, list) of a layer's step after change(tensors by key); fill and again: values by key, sent before the graph
    and before it is computed a second time. Raises Refused."""
    client = W.Client(port)
    try:
        tensors, nodes = W.layer_graph()
        client.place(tensors)
        by_key = {t.key: t for t in tensors}
        sizes = {t.key: as_it_is(t) for t in tensors}
        if change:
            change(by_key)
        for key, values in (fill or {}).items():
            client.send(sizes[key], values)
        client.compute(tensors, nodes)
        if again:
            for key, values in again.items():
                client.send(sizes[key], values)
            client.tell(W.RECOMPUTE, struct.pack("<I", 0))
        return client.read(sizes["fac"]), client.read(sizes["select"]), client.read(sizes["counts"])
    finally:
        client.close()


def as_it_is(t):
    """The tensor as it is now, for sending and reading when the graph has a changed one."""
    copy = W.Tensor(t.key, t.type, t.ne)
    copy.at = t.at
    return copy


def test_a_sound_graph_is_computed(wire):
    """By the definition, with the counts of the ops."""
    fac, cells, counts = computed(wire[0])
    tensors = {t.key: t for t in W.layer_graph()[0]}
    k, v = (tensors[x].values.astype(np.float16).astype(np.float32) for x in ("k", "v"))
    q = tensors["q"].values.astype(np.float32)[0]
    n = cells[0, 0, :, 0]
    assert (n == 20).all()
    for head in range(4):
        at = cells[0, 0, head // 2, 1:]
        assert {0, 69} <= set(at.tolist()) and (np.diff(at) > 0).all()
        logits = np.append(k[at, head // 2] @ q[head] * 0.25, 0.0)  # a sink of 0
        assert np.allclose(R.softmax(logits)[:-1] @ v[at, head // 2], fac[0, 0, head], atol=1e-3)
    counted = dict(zip(W.COUNTED, np.frombuffer(counts.tobytes(), np.uint64).tolist(), strict=True))
    assert [counted[name] for name in ("tokens_attended", "tokens_visible", "lists")] == [40, 140, 2]


def refused(wire, change, why):
    port, process, log = wire
    before = log.read_text()
    with pytest.raises(W.Refused):
        computed(port, change)
    assert process.poll() is None
    said = log.read_text()[len(before) :]
    assert "from the wire is refused" in said and said.split("is refused: ")[1].startswith(why), said


def other(key, **fields):
    def change(t):
        for name, value in fields.items():
            if isinstance(value, tuple):
                getattr(t[key], name)[value[0]] = value[1]
            else:
                setattr(t[key], name, value)

    return change


@pytest.mark.parametrize(
    "change, why",
    [
        (other("fac", op_params=bytes(64)), "it is not of FASA"),
        (other("fac", op_params=W.params(W.FAC, flags=0)), "it is not for another machine"),
        (other("fac", op_params=W.params(W.FAC, flags=W.REMOTE | 1)), "it is not for another machine"),
        (other("fac", op_params=W.params(4)), "its kind"),  # OBSERVE calls a function
        (other("fac", op_params=W.params(200)), "its kind"),
        (other("tip", op_params=W.params(W.TIP, k_dom=3)), "k_dom type"),
        (other("tip", op_params=W.params(W.TIP, n_hadamard=3)), "parameters"),
        (other("tip", op_params=W.params(W.TIP, n_hadamard=32)), "parameters"),
        (other("tip", op_params=W.params(W.TIP, scale=float("nan"))), "parameters"),
        (other("k_dom", ne=(1, 2)), "k_dom"),  # 70 cells are three tiles
        (other("k", ne=(2, 60)), "mask"),
        (other("k", nb=(0, 4)), "k"),
        (other("q", ne=(0, 15)), "q"),
        (other("q", type=W.I32), "q"),
        (other("dims", ne=(0, 7)), "dims"),
        (other("mask", ne=(0, 69)), "mask"),
        (other("ranges", ne=(0, 14)), "ranges"),
        (other("tip", ne=(0, 70)), "scores"),
        (other("select", op_params=W.params(W.SELECT, budget=21)), "list"),
        (other("select", op_params=W.params(W.SELECT, budget=0)), "parameters"),
        (other("select", op_params=W.params(W.SELECT, budget=20, mass=float("nan"))), "parameters"),
        (other("select", op_params=W.params(W.SELECT, budget=20, mass=0.5, floor=30, cap=20)), "parameters"),
        (other("select", src=(0, "mask")), "scores"),
        (other("select", src=(0, "")), "scores"),
        (other("fac", src=(0, "forced")), "list"),
        (other("fac", src=(3, "")), "v"),
        (other("v", has_buffer=False), "v"),
        (other("sinks", ne=(0, 3)), "sinks"),
        (other("counts", ne=(0, 16)), "counts"),
        (other("counts", at=4), "counts"),
        (other("pos", type=W.F32), "positions"),
        (other("factors", ne=(0, 2)), "frequency factors"),
    ],
)
def test_a_node_that_is_not_sound_is_refused(wire, change, why):
    refused(wire, change, why)


@pytest.mark.parametrize("op", ["CUSTOM", "MAP_CUSTOM1", "MAP_CUSTOM2", "MAP_CUSTOM3"])
def test_a_custom_op_of_somebody_else_is_refused(wire, op):
    """ggml would call the function that op_params points to."""
    refused(wire, other("spread", op=W.op_number(op.encode()), op_params=struct.pack("<Q", 0x4141414141)), "it is not")


WORDS = [
    0,
    1,
    2,
    3,
    5,
    7,
    8,
    15,
    16,
    17,
    31,
    33,
    64,
    69,
    70,
    71,
    255,
    256,
    1 << 15,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
]


def a_change(rng, tensors):
    """Change one thing of one tensor, such that it stays within the buffer: ggml ends the process where it does not."""
    t = tensors[rng.choice(list(tensors))]
    field = rng.choice(["ne", "nb", "type", "at", "op_params", "op_params", "op_params", "src", "has_buffer"])
    if field in ("ne", "nb"):
        i = rng.integers(4)
        getattr(t, field)[i] = int(rng.choice([*WORDS, getattr(t, field)[i] + 1, max(0, getattr(t, field)[i] - 1)]))
    elif field == "type":
        t.type = int(rng.choice(list(W.SIZES)))
    elif field == "at":
        t.at += int(rng.integers(1, 130))
    elif field == "has_buffer":
        t.has_buffer = False
    elif field == "src" and t.src:
        t.src[rng.integers(len(t.src))] = str(rng.choice(["", *tensors]))
    elif t.op_params:
        data = bytearray(t.op_params)
        if rng.random() < 0.5:
            data[rng.integers(len(data))] = rng.integers(256)
        else:
            struct.pack_into("<I", data, 4 * int(rng.integers(len(data) // 4)), int(rng.choice(WORDS)))
        t.op_params = bytes(data)


def fits(t, room):
    """Whether ggml takes the tensor: its bytes are in the buffer."""
    bytes_ = row_bytes(t) + sum((n - 1) * nb for n, nb in zip(t.ne[1:], t.nb[1:], strict=True))
    return min(t.ne) > 0 and max(t.ne) < 1 << 31 and t.at + bytes_ < room


def row_bytes(t):
    return W.SIZES[t.type] + (t.ne[0] - 1) * t.nb[0]


def is_loop(tensors):
    """Whether a tensor is a source of itself; ggml's reading of a graph does not end then."""

    def reaches(key, seen):
        return key in seen or any(reaches(s, seen | {key}) for s in tensors[key].src if s)

    return any(reaches(key, set()) for key in tensors)


@pytest.mark.parametrize("seed", range(8))
def test_broken_nodes_do_not_end_the_server(wire, seed):
    """One to three changes of a sound graph, 300 times: it is refused or computed."""
    rng, n = np.random.default_rng(seed), {"refused": 0, "computed": 0}

    def change(tensors):
        before = {k: (t.type, list(t.ne), list(t.nb), t.at, list(t.src)) for k, t in tensors.items()}
        for _ in range(rng.integers(1, 4)):
            a_change(rng, tensors)
        for key, t in tensors.items():
            if not fits(t, 1 << 20):
                t.type, t.ne, t.nb, t.at = before[key][:4]
        if is_loop(tensors):
            for key, t in tensors.items():
                t.src = before[key][4]

    for _ in range(300):
        try:
            computed(wire[0], change)
            n["computed"] += 1
        except W.Refused:
            n["refused"] += 1
        assert wire[1].poll() is None, wire[2].read_text()[-2000:]
    assert n["refused"] > 80 and n["computed"] > 20, n


@pytest.mark.parametrize("seed", range(4))
def test_values_that_are_no_cells_do_not_end_the_server(wire, seed):
    """Dimensions, ranges, cells, scores: what a tensor holds is the client's, in every step."""
    rng = np.random.default_rng(seed)
    wild = [-(1 << 31), -2, -1, 0, 1, 15, 16, 69, 70, 1 << 20, (1 << 31) - 1]

    def values(t):
        if t.type == W.I32:
            return rng.choice(wild, t.ne[::-1])
        x = rng.standard_normal(t.ne[::-1]) * 10.0 ** rng.integers(-3, 5)
        return np.where(rng.random(x.shape) < 0.1, rng.choice([np.nan, np.inf, -np.inf, 1e30]), x)

    for _ in range(30):
        tensors = {t.key: t for t in W.layer_graph()[0]}
        names = ["ranges", "dims", "fresh", "forced", "pos", "q", "weight", "values", "select", "tip"]
        some = [{name: values(tensors[name]) for name in rng.choice(names, 3)} for _ in range(2)]
        with np.errstate(over="ignore"):
            computed(wire[0], fill=some[0], again=some[1])
        assert wire[1].poll() is None, wire[2].read_text()[-2000:]


def test_a_list_of_a_client_is_not_followed_out_of_the_cache(wire):
    """FAC alone, over lists that name cells which are not there: they count as empty."""
    port = wire[0]
    for cells in ([20, *range(100, 120)], [20, *[-1] * 20], [1 << 30, *range(20)], [-5, *range(20)]):
        client = W.Client(port)
        tensors, _ = W.layer_graph()
        client.place(tensors)
        by_key = {t.key: t for t in tensors}
        by_key["select"].op, by_key["select"].src, by_key["select"].op_params = 0, [], b""
        client.send(by_key["select"], [[cells, cells]])
        client.compute(tensors, ["fac"])
        assert not client.read(by_key["fac"]).any()
        client.close()
    assert wire[1].poll() is None
