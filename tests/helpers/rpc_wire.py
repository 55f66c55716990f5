"""ggml-rpc's protocol, spoken by hand: a client that can send nodes which no library would."""

import ctypes
import functools
import socket
import struct

import numpy as np

from fasa_gguf.counters import COUNTERS
from fasa_gguf.runtime.library import find_library

ALLOC, BASE, SET, GET, COMPUTE, RECOMPUTE, HELLO = 0, 3, 6, 8, 10, 16, 14  # enum rpc_cmd
TENSOR = struct.Struct("<QIQ4I4II64si10QQQQ64si")  # rpc_tensor
PARAMS = struct.Struct("<QiIQBBhIffiiIfII")  # fasa_op_params
MAGIC, REMOTE = 0x41534146, 32
TIP, SELECT, FAC, SPREAD = 1, 2, 3, 8  # enum fasa_op_kind
COMPUTED = 16  # GGML_TENSOR_FLAG_COMPUTE
F32, F16, I8, I32 = 0, 1, 24, 26  # enum ggml_type
SIZES = {F32: 4, F16: 2, I8: 1, I32: 4}
NUMPY = {F32: np.float32, F16: np.float16, I8: np.int8, I32: np.int32}


COUNTED = [c.name for kind in ("op", "device") for c in COUNTERS if c.counted_by == kind]  # struct fasa_stats


@functools.cache
def op_number(name):
    lib = ctypes.CDLL(str(find_library("ggml-base")))
    lib.ggml_op_name.restype = ctypes.c_char_p
    return next(i for i in range(200) if lib.ggml_op_name(i) == name)


def params(kind, flags=REMOTE, k_dom=0, **given):
    """op_params of a node of FASA. The pointers in it point nowhere."""
    names = ("scale", "soft_cap", "n_hadamard", "stream0", "budget", "mass", "floor", "cap")
    values = [given.pop(name, 0) for name in names]
    assert not given
    return PARAMS.pack(0x6660, -1, MAGIC, 0x6661, kind, flags, k_dom, 1, *values)


class Tensor:
    """A tensor of a graph; nb follows from ne unless it is given."""

    def __init__(self, key, kind, ne, src=(), op_params=b"", op="NONE", values=None):
        self.key, self.type, self.ne = key, kind, list(ne) + [1] * (4 - len(ne))
        self.nb, self.src, self.values = [SIZES[kind]], list(src), values
        for n in self.ne[:3]:
            self.nb.append(self.nb[-1] * n)
        self.op, self.op_params = op_number(op.encode()), op_params
        self.at, self.has_buffer = 0, True

    def n_bytes(self):
        return int(np.prod(self.ne)) * SIZES[self.type]

    def packed(self, ids, buffer, base):
        src = [ids.get(name, 0) for name in self.src] + [0] * (10 - len(self.src))
        where = (buffer, base + self.at) if self.has_buffer else (0, 0)
        head = (ids[self.key], self.type, where[0], *self.ne, *self.nb, self.op, self.op_params.ljust(64, b"\0"))
        return TENSOR.pack(*head, COMPUTED, *src, 0, 0, where[1], self.key.encode(), 1)


class Refused(Exception):
    """The server has closed the connection."""


class Client:
    """A connection with one buffer, in which the tensors of a graph lie."""

    def __init__(self, port, n_bytes=1 << 20):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ask(HELLO, bytes(24), 28)
        self.buffer, size = struct.unpack("<QQ", self.ask(ALLOC, struct.pack("<IQ", 0, n_bytes), 16))
        assert size >= n_bytes
        (self.base,) = struct.unpack("<Q", self.ask(BASE, struct.pack("<Q", self.buffer), 8))

    def close(self):
        self.socket.close()

    def tell(self, command, data):
        try:
            self.socket.sendall(struct.pack("<BQ", command, len(data)) + data)
        except OSError as e:
            raise Refused from e

    def ask(self, command, data, n):
        self.tell(command, data)
        got = b""
        while len(got) < 8 + n:
            try:
                more = self.socket.recv(8 + n - len(got))
            except ConnectionError as e:
                raise Refused from e
            if not more:
                raise Refused
            got += more
        return got[8:]

    def place(self, tensors):
        """Lay the tensors into the buffer and send what they hold."""
        at = 0
        for t in tensors:
            t.at, at = at, at + (t.n_bytes() + 63) // 64 * 64
        for t in tensors:
            if t.values is not None:
                self.send(t, t.values)

    def send(self, t, values):
        data = np.ascontiguousarray(values, NUMPY[t.type]).tobytes()
        self.tell(SET, t.packed({t.key: 1}, self.buffer, self.base) + struct.pack("<BQ", 0, 0) + data)

    def compute(self, tensors, nodes):
        """Compute the nodes (keys); returns when it is done. Raises Refused."""
        ids = {t.key: 1 + i for i, t in enumerate(tensors)}
        graph = struct.pack(f"<II{len(nodes)}QI", 0, len(nodes), *[ids[key] for key in nodes], len(tensors))
        self.tell(COMPUTE, graph + b"".join(t.packed(ids, self.buffer, self.base) for t in tensors))
        self.ask(BASE, struct.pack("<Q", self.buffer), 8)  # answered behind it

    def read(self, t):
        """The values of a tensor, in numpy's order of axes."""
        request = t.packed({t.key: 1}, self.buffer, self.base) + struct.pack("<QQ", 0, t.n_bytes())
        return np.frombuffer(self.ask(GET, request, t.n_bytes()), NUMPY[t.type]).reshape(t.ne[::-1])


def layer_graph(seed=0, n_kv=70, d=16, n_head=4, n_head_kv=2, n_dom=8, budget=20):
    """The tensors of one layer's step: TIP, SELECT and FAC, and a SPREAD; and the keys of the nodes."""
    rng = np.random.default_rng(seed)
    spans, tiles = -(-n_kv // 256), -(-n_kv // 32)
    at = {"ranges": np.full((1, 16), -1)}
    at["ranges"][0, :2] = 0, n_kv  # all cells are stale
    dims = np.stack([rng.permutation(d)[:n_dom] for _ in range(n_head_kv)])
    mask = np.zeros((1, 1, 1, n_kv))
    leaves = [
        Tensor("k_dom", I8, [n_dom * 64, tiles, n_head_kv], values=np.zeros(n_dom * 64 * tiles * n_head_kv)),
        Tensor("k", F16, [d, n_head_kv, n_kv], values=rng.standard_normal((n_kv, n_head_kv, d))),
        Tensor("v", F16, [d, n_head_kv, n_kv], values=rng.standard_normal((n_kv, n_head_kv, d))),
        Tensor("ranges", I32, [16, 1], values=at["ranges"]),
        Tensor("q", F32, [d, n_head, 1], values=rng.standard_normal((1, n_head, d))),
        Tensor("dims", I32, [n_dom, n_head_kv], values=dims),
        Tensor("weight", F32, [n_dom, n_head_kv], values=np.ones((n_head_kv, n_dom))),
        Tensor("mask", F16, [n_kv, 1], values=mask),
        Tensor("fresh", I32, [2, 1], values=[[-1, -1]]),
        Tensor("forced", I32, [3, 1, 1], values=[[[0, n_kv - 1, -1]]]),
        Tensor("sinks", F32, [n_head], values=np.zeros(n_head)),
        Tensor("counts", I8, [8 * len(COUNTED)], values=np.zeros(8 * len(COUNTED))),
        Tensor("values", F32, [n_dom * n_head, 1], values=rng.standard_normal(n_dom * n_head)),
        Tensor("pos", I32, [1], values=[7]),
        Tensor("factors", F32, [d // 2], values=np.ones(d // 2)),
    ]

    def sources(*names):
        return [*names, *[""] * (9 - len(names)), "counts"]

    tip = sources("k_dom", "k", "ranges", "q", "dims", "weight", "mask", "fresh")
    rope = struct.pack("<ffffffii", 0.5, 1, 0, 1, 0, 0, d, 0)
    nodes = [
        Tensor("tip", F32, [n_kv + 2 * spans, n_head, 1, 1], tip, params(TIP, scale=0.25), "CUSTOM"),
        Tensor(
            "select",
            I32,
            [1 + budget, n_head_kv, 1, 1],
            sources("tip", "forced"),
            params(SELECT, budget=budget),
            "CUSTOM",
        ),
        Tensor(
            "fac",
            F32,
            [d, n_head, 1, 1],
            sources("select", "q", "k", "v", "mask", "sinks"),
            params(FAC, scale=0.25),
            "CUSTOM",
        ),
        Tensor(
            "spread",
            F32,
            [d, n_head, 1],
            sources("values", "dims", "pos", "factors"),
            params(SPREAD)[:32] + rope,
            "CUSTOM",
        ),
    ]
    return leaves + nodes, ["tip", "select", "fac", "spread"]
