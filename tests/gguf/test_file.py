"""The header reader: what it reads, and what it says of files that are damaged or lie."""

import os
import struct
import time

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from tiny_gguf import gguf_bytes, write_tiny

from fasa_gguf import FasaError
from fasa_gguf.gguf import file as gguf_file
from fasa_gguf.gguf.cache_types import CACHE_TYPES, cache_type
from fasa_gguf.gguf.file import (
    ARR,
    BOOL,
    F32,
    F64,
    I8,
    I32,
    I64,
    STR,
    U8,
    U16,
    U32,
    U64,
    GGUFFile,
    pack_kv,
)
from fasa_gguf.profile.profile import Profile

ARCH = pack_kv("general.architecture", STR, "llama")
F32_TYPE, Q4_0_TYPE = 0, 2


def text(s):
    return struct.pack("<Q", len(s)) + s.encode()


def strings(key, values):
    """A packed array of strings."""
    return text(key) + struct.pack("<IIQ", ARR, STR, len(values)) + b"".join(map(text, values))


def opened(tmp_path, data):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return GGUFFile(path)


def test_agrees_with_an_independent_reader(tmp_path):
    path = tmp_path / "m.gguf"
    write_tiny(path, n_layer=2, dtype=np.float16, alignment=64)
    ours, theirs = GGUFFile(path), GGUFReader(path)
    assert (ours.alignment, ours.data_offset) == (theirs.alignment, theirs.data_offset) == (64, ours.data_offset)
    assert [k for k in theirs.fields if not k.startswith("GGUF.")] == list(ours.kv)
    for key, entry in ours.kv.items():
        assert entry.value == pytest.approx(theirs.fields[key].contents())
    assert [(t.name, list(t.shape), int(t.tensor_type), t.data_offset, int(t.n_bytes)) for t in theirs.tensors] == [
        (t.name, list(t.shape), t.type, ours.data_offset + t.offset, t.n_bytes) for t in ours.tensors
    ]
    data = path.read_bytes()
    assert data[24 : ours.data_offset].startswith(b"".join(kv.raw for kv in ours.kv.values()) + ours.info_raw)


def test_every_tensor_type_has_ggml_s_size():
    from gguf import GGML_QUANT_SIZES

    ours = gguf_file.TENSOR_TYPES
    theirs = {int(t): size for t, size in GGML_QUANT_SIZES.items()}
    assert len(ours) >= 34 and {k: ours[k] for k in theirs} == theirs | {9: (32, 36)}  # Q8_1: two f16, as ggml has it
    assert ours.keys() - theirs.keys() <= {42}  # Q2_0


def test_tensor_types_are_those_of_the_pinned_source(pinned):
    """The table that corrects the installed gguf-py, and what gguf-py knows, against the copy in the build tree."""
    theirs = {int(t): size for t, size in pinned.GGML_QUANT_SIZES.items()}
    assert theirs == gguf_file.TENSOR_TYPES
    for kind, size in gguf_file.CORRECTED_TYPES.items():
        assert theirs[kind] == size


def test_cache_types_have_ggml_s_numbers():
    assert CACHE_TYPES == {
        "f32": 0,
        "f16": 1,
        "q4_0": 2,
        "q4_1": 3,
        "q5_0": 6,
        "q5_1": 7,
        "q8_0": 8,
        "bf16": 30,
    }
    with pytest.raises(FasaError, match="cache type 'q9': expected one of f32, f16, q4_0"):
        cache_type("q9")


def test_every_value_type(tmp_path):
    values = {
        "a": (U8, 255),
        "b": (I8, -1),
        "c": (U16, 65535),
        "d": (I32, -5),
        "e": (F32, 0.5),
        "f": (BOOL, True),
        "g": (STR, "é\n"),
        "h": (U64, 2**64 - 1),
        "i": (I64, -(2**63)),
        "j": (F64, 1e300),
        "k": (U32, 7),
    }
    g = opened(
        tmp_path,
        gguf_bytes(
            [pack_kv(k, *v) for k, v in values.items()]
            + [strings("s", ["", "x", "yy"]), pack_kv("n", ARR, [1, 2, 3], U16)]
        ),
    )
    assert {k: (g.kv[k].type, g.kv[k].value) for k in values} == values
    assert g.kv["s"].value == ["", "x", "yy"] and g.kv["s"].count == 3 and g.kv["s"].type_name == "array of str"
    assert g.kv["n"].value == [1, 2, 3] and g.kv["a"].count == 1


def test_version_2_and_a_file_without_tensors(tmp_path):
    assert opened(tmp_path, gguf_bytes([ARCH], version=2)).version == 2
    g = opened(tmp_path, gguf_bytes([ARCH]))
    assert g.tensors == [] and g.arch == "llama"


def test_a_big_vocabulary_is_skipped_quickly(tmp_path):
    path = tmp_path / "v.gguf"
    w = GGUFWriter(path, "llama")
    w.add_token_list([f"token-{i}" for i in range(150_000)])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    start = time.perf_counter()
    g = GGUFFile(path)
    assert time.perf_counter() - start < 1.0  # 0.03 s on an idle core
    assert g.kv["tokenizer.ggml.tokens"].count == 150_000 and g.kv["tokenizer.ggml.tokens"].value[-1] == "token-149999"


def test_get_names_the_key_and_both_types(tmp_path):
    g = opened(tmp_path, gguf_bytes([ARCH, pack_kv("n", U32, 1), pack_kv("a", ARR, [1.0], F32)]))
    assert g.get("n", U32) == 1 and g.get("none", U32, default=5) == 5
    with pytest.raises(FasaError, match=r"x.gguf: key n: expected str or u64, found u32; download or convert"):
        g.get("n", STR, U64)
    with pytest.raises(FasaError, match="key a: expected u32, found array of f32"):
        g.get("a", U32)
    with pytest.raises(FasaError, match="key none: expected u32, found nothing"):
        g.get("none", U32, default=...)
    with pytest.raises(FasaError, match=r"key general.architecture: expected str, found nothing"):
        _ = opened(tmp_path, gguf_bytes([])).arch
    with pytest.raises(FasaError, match=r"key general.architecture: expected a short name, found 5 characters"):
        _ = opened(tmp_path, gguf_bytes([pack_kv("general.architecture", STR, "a\x1b[2J")])).arch


def tensor(name="t", shape=(4,), kind=F32_TYPE, offset=0, content=bytes(16)):
    return name, shape, kind, offset, content


def lying(kind, *counts):
    """A key whose value is cut off after its counts."""
    return text("k") + struct.pack("<I", kind) + b"".join(counts)


def u64(n):
    return struct.pack("<Q", n)


def u32(n):
    return struct.pack("<I", n)


HUGE = 2**64 - 1

BAD = {
    "empty": (b"", "it has 0 bytes, expected at least 24"),
    "other format": (
        b"PK\x03\x04" + bytes(100),
        r"expected it to begin with GGUF, found b'PK\\x03\\x04'; convert the model to GGUF first",
    ),
    "version 1": (gguf_bytes([ARCH], version=1), "version 1, expected 2 or 3"),
    "version 9": (gguf_bytes([ARCH], version=9), "version 9, expected 2 or 3"),
    "big-endian": (
        b"GGUF" + bytes([0, 0, 0, 3]) + bytes(100),
        "a big-endian GGUF file, expected little-endian; convert it with gguf_convert_endian.py",
    ),
    "many keys": (gguf_bytes([ARCH], n_kv=HUGE), f"it claims {HUGE} keys and 0 tensors in"),
    "many tensors": (gguf_bytes([ARCH], n_tensors=10**6), "it claims 1 keys and 1000000 tensors in"),
    "one key more": (gguf_bytes([ARCH] * 1 + [pack_kv("n", U32, 1)], n_kv=3), "not a usable GGUF file"),
    "key twice": (gguf_bytes([ARCH, ARCH]), "key general.architecture appears twice"),
    "no key name": (gguf_bytes([pack_kv("", U32, 1)]), "the name of key 0 is empty"),
    "long key name": (
        gguf_bytes([u64(HUGE) + bytes(20)]),
        f"the name of key 0 claims {HUGE} bytes, expected at most 65536",
    ),
    "key type": (gguf_bytes([lying(13) + bytes(8)]), "key k has the unknown type 13"),
    "array of arrays": (
        gguf_bytes([lying(ARR, u32(ARR), u64(1)) + bytes(8)]),
        "key k is an array of the unknown type 9",
    ),
    "long string": (gguf_bytes([lying(STR, u64(2**40))]), f"key k claims {2**40} bytes, expected at most {2**26}"),
    "string past the end": (gguf_bytes([lying(STR, u64(1000))]), "key k at byte .* needs 1000 bytes and the file has"),
    "long array": (
        gguf_bytes([lying(ARR, u32(F64), u64(2**61 + 1))]),
        f"key k claims {2**61 + 1} elements, expected at most {2**24}",
    ),
    "array past the end": (
        gguf_bytes([lying(ARR, u32(U32), u64(1000))]),
        "key k at byte .* needs 4000 bytes and the file has",
    ),
    "many strings": (
        gguf_bytes([lying(ARR, u32(STR), u64(1000))]),
        "key k at byte .* needs 8000 bytes and the file has",
    ),
    "string in an array": (
        gguf_bytes([lying(ARR, u32(STR), u64(2), u64(HUGE), u64(0))]),
        "string 1 of 2 of key k runs past the end of the file",
    ),
    "last string": (
        gguf_bytes([lying(ARR, u32(STR), u64(1), u64(10**6))]),
        "the last string of key k runs past the end of the file",
    ),
    "alignment type": (
        gguf_bytes([pack_kv("general.alignment", U64, 32)]),
        "key general.alignment: expected u32, found u64",
    ),
    "alignment 0": (
        gguf_bytes([pack_kv("general.alignment", U32, 0)]),
        "key general.alignment is 0, expected a power of two",
    ),
    "alignment 48": (
        gguf_bytes([pack_kv("general.alignment", U32, 48)]),
        "key general.alignment is 48, expected a power of two",
    ),
    "alignment 2^31": (
        gguf_bytes([pack_kv("general.alignment", U32, 2**31)]),
        "key general.alignment is 2147483648, expected a power of two",
    ),
    "dimensions": (gguf_bytes([], [tensor(shape=(1,) * 5)]), "tensor t has 5 dimensions, expected at most 4"),
    "tensor type": (gguf_bytes([], [tensor(kind=43)]), "tensor t has the unknown type 43: 35 are known, up to 42"),
    "removed type": (gguf_bytes([], [tensor(kind=37)]), "has the type IQ4_NL_4_8, which llama.cpp has removed; get"),
    "shape overflows": (gguf_bytes([], [tensor(shape=(2**40, 2**40))]), "tensor t claims the shape"),
    "zero times huge": (gguf_bytes([], [tensor(shape=(0, 2**63))]), "tensor t claims the shape"),
    "block": (
        gguf_bytes([], [tensor(shape=(33, 32), kind=Q4_0_TYPE)]),
        "tensor t has rows of 33 values, no multiple of its type's block of 32",
    ),
    "tensor twice": (gguf_bytes([], [tensor(), tensor(offset=32)]), "tensor t appears twice"),
    "tensors overlap": (
        gguf_bytes([], [tensor(), tensor("u", offset=0)]),
        "tensor u begins at byte 0 of the tensor data, expected 32",
    ),
    "tensor far away": (
        gguf_bytes([], [tensor(offset=HUGE)]),
        f"tensor t begins at byte {HUGE} of the tensor data, expected 0",
    ),
    "tensor cut short": (
        gguf_bytes([], [tensor(shape=(1000,))]),
        "tensor t needs bytes up to .* and the file has .*: it is cut short",
    ),
    "control characters": (gguf_bytes([pack_kv("a\x1b[31m\n", 0, 1)] * 2), r"key a\?\[31m\? appears twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files(tmp_path, case):
    data, message = BAD[case]
    with pytest.raises(FasaError, match=message) as e:
        opened(tmp_path, data)
    assert str(e.value).startswith(str(tmp_path / "x.gguf")) and "\n" not in str(e.value)


def test_the_header_has_a_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "MAX_HEADER", 4096)
    opened(tmp_path, gguf_bytes([pack_kv("s", STR, "x" * 3000)]))
    for entry in (pack_kv("s", STR, "x" * 5000), pack_kv("s", ARR, [0] * 5000, U8)):
        with pytest.raises(FasaError, match="key s takes the header past 4096 bytes"):
            opened(tmp_path, gguf_bytes([entry]))
    with pytest.raises(FasaError, match="key s runs past the end of the header"):
        opened(tmp_path, gguf_bytes([strings("s", ["x" * 100] * 50)]))


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FasaError, match="not a GGUF file: expected a regular file"):
        GGUFFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FasaError, match="not a GGUF file: expected a regular file"):  # and does not wait for a writer
        GGUFFile(tmp_path / "pipe")
    with pytest.raises(FasaError, match="none: cannot be read: No such file or directory"):
        GGUFFile(tmp_path / "none")


@pytest.mark.parametrize("left", [0, 10, 5000, 70_000])
def test_a_file_cut_short_while_its_header_is_read(tmp_path, monkeypatch, left):
    """As `cp` onto it does. A mapped file would end the process with SIGBUS."""
    path, real = tmp_path / "x.gguf", os.fstat
    path.write_bytes(gguf_bytes([ARCH, strings("tokens", ["token"] * 20_000), pack_kv("n", ARR, [1] * 50_000, U32)]))

    def fstat(fd):
        status = real(fd)
        os.truncate(path, left)
        return status

    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr(gguf_file, "READ", 4096)
    with pytest.raises(FasaError, match=r"x.gguf: not a usable GGUF file: it was cut short while it was read"):
        GGUFFile(path)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_a_header_read_in_pieces(tmp_path, monkeypatch, size):
    path = tmp_path / "m.gguf"
    write_tiny(path)
    whole = GGUFFile(path)
    monkeypatch.setattr(gguf_file, "READ", size)
    pieces = GGUFFile(path)
    assert [kv.raw for kv in pieces.kv.values()] == [kv.raw for kv in whole.kv.values()]
    assert (pieces.tensors, pieces.info_raw, pieces.data_offset) == (whole.tensors, whole.info_raw, whole.data_offset)


def small():
    """A whole file of about 700 bytes: keys of several types, two tensors, an embedded profile."""
    p = Profile(
        [1, 1],
        [2, 2],
        [np.array([[1, 0]], np.uint16), np.array([[0, 1]], np.uint16)],
        "recall",
        rope={"layout": "norm", "dims": 4, "base": 10000.0},
    )
    keys = [
        ARCH,
        strings("tokens", ["a", "bc"]),
        pack_kv("llama.block_count", U32, 2),
        pack_kv("llama.attention.head_count", ARR, [1, 1], I32),
        pack_kv("llama.embedding_length", U32, 4),
        *(pack_kv(*e) for e in p.to_gguf_kv()),
    ]
    return gguf_bytes(keys, [tensor("a"), tensor("b", (2, 2), offset=32)])


def read_all(path):
    """Everything this package reads of a model; FasaError or a value."""
    from fasa_gguf.gguf.shape import read_shape

    g = GGUFFile(path)
    for kv in g.kv.values():
        _ = kv.value
    for read in (Profile.from_gguf, read_shape):
        try:
            read(g)
        except FasaError as e:
            assert str(e).startswith(str(path)) and "\n" not in str(e) and len(str(e)) < 600


def test_every_truncation_is_refused(tmp_path):
    data, path = small(), tmp_path / "cut.gguf"
    path.write_bytes(data)
    read_all(path)
    whole = GGUFFile(path)
    end = whole.data_offset + whole.tensors[-1].offset + whole.tensors[-1].n_bytes  # behind it is only padding
    for n in range(end):
        path.write_bytes(data[:n])
        with pytest.raises(FasaError):
            GGUFFile(path)


def test_flipped_bytes_are_refused_or_read(tmp_path):
    data, path = small(), tmp_path / "flip.gguf"
    path.write_bytes(data)
    end, rng = GGUFFile(path).data_offset, np.random.default_rng(0)
    changes = [[(at, value)] for at in range(end) for value in (0x00, 0xFF)]
    changes += [[(int(at), int(rng.integers(256))) for at in rng.integers(0, end, 4)] for _ in range(800)]
    refused = 0
    for change in changes:
        flipped = bytearray(data)
        for at, value in change:
            flipped[at] = value
        path.write_bytes(flipped)
        try:
            read_all(path)
        except FasaError as e:
            refused += 1
            assert "\n" not in str(e) and len(str(e)) < 600
    assert 0.1 < refused / len(changes) < 0.99
