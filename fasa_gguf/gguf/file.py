"""A strict, bounded reader of GGUF headers: every count is checked against the file before it is used.

Only the header is read. The raw bytes of each key-value pair are kept, so a rewrite copies what it does not change.

Value types, tensor types and key names are gguf-py's. Two things that it does not do are done here:
- Reading untrusted headers. Its GGUFReader maps the whole file and trusts every count and length in it: a damaged file
  can cost time and memory without bound, or end in an error that names no key. A mapped file that another program cuts
  short ends the process, so this one is read.
- Rewriting in constant memory. Its GGUFWriter packs every key and tensor anew, so a file whose FASA keys are removed
  would not be the original byte for byte. `pack_kv` makes single entries, and profile/embed.py copies the rest.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGUFValueType, Keys

from ..errors import FasaError, check_path

U8, I8 = GGUFValueType.UINT8, GGUFValueType.INT8
U16, I16 = GGUFValueType.UINT16, GGUFValueType.INT16
U32, I32 = GGUFValueType.UINT32, GGUFValueType.INT32
U64, I64 = GGUFValueType.UINT64, GGUFValueType.INT64
F32, F64 = GGUFValueType.FLOAT32, GGUFValueType.FLOAT64
BOOL, STR, ARR = GGUFValueType.BOOL, GGUFValueType.STRING, GGUFValueType.ARRAY
# fmt: off
TYPE_NAMES: dict[int, str] = {
    U8: "u8", I8: "i8", U16: "u16", I16: "i16", U32: "u32", I32: "i32", U64: "u64", I64: "i64",
    F32: "f32", F64: "f64", BOOL: "bool", STR: "str", ARR: "array",
}
SCALARS: dict[int, str] = {  # letters of struct
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", U64: "Q", I64: "q", F32: "f", F64: "d", BOOL: "?",
}
# fmt: on
INTEGERS = frozenset([U8, I8, U16, I16, U32, I32, U64, I64])
SIZES = {t: struct.calcsize("<" + c) for t, c in SCALARS.items()}  # bytes

# Where gguf 0.19 differs from the pinned source (ggml-common.h): Q8_1 has two f16 before its 32 bytes, not two f32;
# Q2_0 is missing.
CORRECTED_TYPES = {9: (32, 36), 42: (64, 18)}
# (values per block, bytes per block) of the tensor types by ggml's number
TENSOR_TYPES: dict[int, tuple[int, int]] = {int(t): size for t, size in GGML_QUANT_SIZES.items()} | CORRECTED_TYPES

# types that llama.cpp no longer reads, and the type that took their place
REMOVED_TYPES = {4: ("Q4_2", "Q4_0"), 5: ("Q4_3", "Q4_1")}
REMOVED_TYPES |= {31 + i: (f"Q4_0_{name}", "Q4_0") for i, name in enumerate(("4_4", "4_8", "8_8"))}
REMOVED_TYPES |= {36 + i: (f"IQ4_NL_{name}", "IQ4_NL") for i, name in enumerate(("4_4", "4_8", "8_8"))}
# what files that are taken for GGUF begin with, and what they are
_PAGE = "this is a web page: download the file itself (Hugging Face: with /resolve/ for /blob/ in the link)"
_OLD = "this is a GGML file, older than GGUF: download or convert the model again"
NOT_GGUF = {
    b"vers": "this is a pointer of Git LFS: fetch the file itself with `git lfs pull`",
    **dict.fromkeys((b"<!do", b"<htm"), _PAGE),
    **dict.fromkeys((b"tjgg", b"fmgg", b"lmgg"), _OLD),
}

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_NAME = 1 << 16  # bytes of a key or a tensor name
MAX_STRING = 1 << 26  # bytes; a chat template is far below
MAX_ARRAY = 1 << 24  # elements; the largest vocabularies have 2^18
MAX_HEADER = 1 << 28  # bytes of all keys and tensor infos together; a tokenizer has 2^23
MAX_ALIGNMENT = 1 << 20
READ = 1 << 20  # bytes read at a time
NEXT = "download or convert the model again"


def printable(name: str, most: int = 80) -> str:
    """A name from a file, safe in a message: one line, no control characters, not too long."""
    text = "".join(c if c.isprintable() else "?" for c in name[:most])
    return text if len(name) <= most else text + "..."


def what_is_there(path: str | os.PathLike) -> str:
    """Why a path is no file to read, as the end of a sentence with the next step; "" for a regular file."""
    if stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
        return ""
    if not os.path.isdir(path):
        return "; give the path of a model in GGUF format"
    models = sorted(p.name for p in Path(path).glob("*.gguf"))
    if models:
        names = ", ".join(printable(name) for name in models[:3]) + (", ..." if len(models) > 3 else "")
        return f", found a folder with {names}; give the path of one of them"
    if (Path(path) / "config.json").exists():
        return ", found a folder of Hugging Face weights, for `fasa-gguf calibrate` alone; convert it to GGUF first"
    return ", found a folder; give the path of a model in GGUF format"


def check_is_file(path: str | os.PathLike) -> None:
    """Raises FasaError for a path that is no regular file: a folder, a pipe."""
    if why := what_is_there(path):
        raise FasaError(f"{path}: not a GGUF file: expected a regular file{why}")


@dataclass
class KeyValue:
    """One metadata entry. `value` decodes it anew each time it is asked for; types are numbers of GGUFValueType."""

    key: str
    type: int
    item_type: int  # of an array's elements; the type itself for anything else
    raw: bytes  # the whole entry as it stands in the file
    _value_at: int  # offset of the value in raw

    @property
    def value(self) -> Any:
        """A number, a bool, a str, or a list of these."""
        at = self._value_at
        if self.type == STR:
            return self.raw[at + 8 :].decode("utf-8", "replace")
        if self.type != ARR:
            return struct.unpack_from("<" + SCALARS[self.type], self.raw, at)[0]
        n = struct.unpack_from("<Q", self.raw, at + 4)[0]
        at += 12
        if self.item_type != STR:
            return list(struct.unpack_from(f"<{n}{SCALARS[self.item_type]}", self.raw, at))
        out = []
        for _ in range(n):
            size = struct.unpack_from("<Q", self.raw, at)[0]
            out.append(self.raw[at + 8 : at + 8 + size].decode("utf-8", "replace"))
            at += 8 + size
        return out

    @property
    def count(self) -> int:
        """Elements of an array, without decoding it; 1 for anything else."""
        return struct.unpack_from("<Q", self.raw, self._value_at + 4)[0] if self.type == ARR else 1

    @property
    def type_name(self) -> str:
        """The type for messages, as in "u32" or "array of f32"."""
        return f"array of {TYPE_NAMES[self.item_type]}" if self.type == ARR else TYPE_NAMES[self.type]


@dataclass
class TensorInfo:
    """One tensor as the header describes it."""

    name: str
    shape: tuple[int, ...]  # innermost dimension first
    type: int  # ggml's number, a key of TENSOR_TYPES
    offset: int  # bytes from the start of the data section
    n_bytes: int


class _Reader:
    """Reads forward through a header. Lengths are checked against the file before they are used.

    data: as much of the file's beginning as was needed so far; at: the offset to read next; end: the file's size.
    """

    def __init__(self, file: BinaryIO, size: int, where: str) -> None:
        self.file, self.data, self.where, self.at, self.end = file, bytearray(), where, 0, size

    def load(self, end: int) -> None:
        """Have at least the first `end` bytes of the file in `data`; `end` is within the file."""
        while len(self.data) < end:
            want = min(max(end - len(self.data), READ), self.end - len(self.data))
            more = os.pread(self.file.fileno(), want, len(self.data))
            if not more:
                raise self.fail("it was cut short while it was read")
            self.data += more

    def fail(self, what: str) -> FasaError:
        return FasaError(f"{self.where}: not a usable GGUF file: {what}; {NEXT}")

    def need(self, n: int, what: str) -> None:
        if n > self.end - self.at:
            raise self.fail(f"{what} at byte {self.at} needs {n} bytes and the file has {self.end - self.at} left")
        if self.at + n > MAX_HEADER:
            raise self.fail(f"{what} takes the header past {MAX_HEADER} bytes")
        self.load(self.at + n)

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size, what)
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += size
        return value

    def string(self, what: str, most: int = MAX_STRING) -> bytearray:
        n = self.number("Q", f"the length of {what}")
        if n > most:
            raise self.fail(f"{what} claims {n} bytes, expected at most {most}")
        self.need(n, what)
        value = self.data[self.at : self.at + n]
        self.at += n
        return value

    def name(self, what: str) -> str:
        name = self.string(what, MAX_NAME).decode("utf-8", "replace")
        if not name:
            raise self.fail(f"{what} is empty")
        return name

    def skip_value(self, kind: int, key: str) -> int:
        """Step over a value; returns the type of an array's elements, `kind` for anything else."""
        if kind in SIZES:
            self.need(SIZES[kind], key)
            self.at += SIZES[kind]
        elif kind == STR:
            self.string(key)
        elif kind == ARR:
            return self.skip_array(key)
        else:
            raise self.fail(f"{key} has the unknown type {kind}")
        return kind

    def skip_array(self, key: str) -> int:
        item = self.number("I", key)
        n = self.number("Q", key)
        if n > MAX_ARRAY:
            raise self.fail(f"{key} claims {n} elements, expected at most {MAX_ARRAY}")
        if item in SIZES:
            self.need(n * SIZES[item], key)
            self.at += n * SIZES[item]
        elif item == STR:
            self.need(n * 8, key)
            unpack, data, at, loaded = struct.Struct("<Q").unpack_from, self.data, self.at, 0
            last = min(self.end, MAX_HEADER) - 8
            place = "file" if self.end <= MAX_HEADER else "header"
            for i in range(n):
                if at > last:
                    raise self.fail(f"string {i} of {n} of {key} runs past the end of the {place}")
                if at + 8 > loaded:
                    self.load(at + 8)
                    loaded = len(data)
                at += 8 + unpack(data, at)[0]
            if at > last + 8:
                raise self.fail(f"the last string of {key} runs past the end of the {place}")
            self.load(at)
            self.at = at
        else:
            raise self.fail(f"{key} is an array of the unknown type {item}")
        return item


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class GGUFFile:
    """The header of a GGUF file. It can stand wherever its path can, and `read_header` does not parse it a second time.

    version; kv: KeyValue by name, in file order; tensors: list of TensorInfo, in file order; in bytes: size of the
    file, alignment, and data_offset, where the tensor data begin; info_raw: the tensor infos as they stand in the file.
    file: the same file, if it is open already. Raises FasaError when the file is not GGUF, is cut short, or lies about
    counts.
    """

    def __init__(self, path: str | os.PathLike, file: BinaryIO | None = None) -> None:
        check_path(path)
        self.path = Path(path)
        try:
            if file is not None:
                self._read(file)
                return
            check_is_file(self.path)
            with open(self.path, "rb") as f:
                self._read(f)
        except OSError as e:
            raise FasaError(f"{self.path}: cannot be read: {e.strerror or e}; check the path") from None
        except ValueError as e:  # a path with a null byte
            raise FasaError(f"{str(self.path)!r}: cannot be read: {e}; check the path") from None

    def _read(self, f: BinaryIO) -> None:
        status = os.fstat(f.fileno())
        self.size, self._stamp = status.st_size, _stamp(status)
        if self.size < 24:
            raise FasaError(
                f"{self.path}: not a GGUF file: it has {self.size} bytes, expected at least 24; "
                "give a model in GGUF format"
            )
        self._parse(_Reader(f, self.size, str(self.path)))

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def is_current(self) -> bool:
        """Whether the file is still the one that was read: same inode, size and time of change."""
        try:
            return _stamp(os.stat(self.path)) == self._stamp
        except OSError:
            return False

    def is_open_as(self, file: BinaryIO) -> bool:
        """Whether `file` is the file that was read, and unchanged since."""
        return _stamp(os.fstat(file.fileno())) == self._stamp

    def _parse(self, r: _Reader) -> None:
        n_kv, n_tensors = self._counts(r)
        self.kv = self._keys(r, n_kv)
        self.alignment = self.get(Keys.General.ALIGNMENT, U32, default=32)
        if not 1 <= self.alignment <= MAX_ALIGNMENT or self.alignment & (self.alignment - 1):
            raise r.fail(f"key general.alignment is {self.alignment}, expected a power of two up to {MAX_ALIGNMENT}")
        start = r.at
        self.tensors = [self._tensor(r, i) for i in range(n_tensors)]
        self.info_raw = bytes(r.data[start : r.at])
        self.data_offset = r.at + -r.at % self.alignment
        self._check_layout(r)

    def _counts(self, r: _Reader) -> tuple[int, int]:
        """(keys, tensors) that the first 24 bytes claim."""
        r.load(24)
        magic = bytes(r.data[:4])
        if magic != b"GGUF":
            what = NOT_GGUF.get(magic.lower(), "convert the model to GGUF first")
            raise FasaError(f"{self.path}: not a GGUF file: expected it to begin with GGUF, found {magic!r}; {what}")
        r.at = 4
        self.version = r.number("I", "the version")
        if self.version & 0xFFFF == 0 and self.version != 0:
            raise FasaError(
                f"{self.path}: a big-endian GGUF file, expected little-endian; "
                "convert it with gguf_convert_endian.py of llama.cpp"
            )
        if self.version not in (2, 3):
            raise r.fail(f"it has version {self.version}, expected 2 or 3")
        n_tensors = r.number("Q", "the tensor count")
        n_kv = r.number("Q", "the key count")
        # a key takes at least 14 bytes, a tensor info 25
        if n_kv > min(MAX_KEYS, self.size // 14) or n_tensors > min(MAX_TENSORS, self.size // 25):
            raise r.fail(f"it claims {n_kv} keys and {n_tensors} tensors in {self.size} bytes")
        return n_kv, n_tensors

    @staticmethod
    def _keys(r: _Reader, n: int) -> dict[str, KeyValue]:
        kv: dict[str, KeyValue] = {}
        for i in range(n):
            start = r.at
            key = r.name(f"the name of key {i}")
            shown = f"key {printable(key)}"
            kind = r.number("I", shown)
            value_at = r.at - start
            item = r.skip_value(kind, shown)
            if key in kv:
                raise r.fail(f"{shown} appears twice")
            kv[key] = KeyValue(key, kind, item, bytes(r.data[start : r.at]), value_at)
        return kv

    def _check_layout(self, r: _Reader) -> None:
        """The tensors have different names, follow each other without gaps, and end within the file."""
        at, names = 0, set()  # at: where the next tensor must begin
        for t in self.tensors:
            shown = f"tensor {printable(t.name)}"
            if t.name in names:
                raise r.fail(f"{shown} appears twice")
            names.add(t.name)
            if t.offset != at:
                raise r.fail(f"{shown} begins at byte {t.offset} of the tensor data, expected {at}")
            end = self.data_offset + at + t.n_bytes
            if end > self.size:
                raise r.fail(f"{shown} needs bytes up to {end} and the file has {self.size}: it is cut short")
            at += t.n_bytes + -t.n_bytes % self.alignment

    @staticmethod
    def _tensor(r: _Reader, i: int) -> TensorInfo:
        name = r.name(f"the name of tensor {i}")
        shown = f"tensor {printable(name)}"
        n_dims = r.number("I", shown)
        if n_dims > 4:
            raise r.fail(f"{shown} has {n_dims} dimensions, expected at most 4")
        shape = tuple(r.number("Q", shown) for _ in range(n_dims))
        kind = r.number("I", shown)
        offset = r.number("Q", shown)
        if kind in REMOVED_TYPES:
            old, new = REMOVED_TYPES[kind]
            raise r.fail(f"{shown} has the type {old}, which llama.cpp has removed; get the model as {new}")
        if kind not in TENSOR_TYPES:
            raise r.fail(
                f"{shown} has the unknown type {kind}: {len(TENSOR_TYPES)} are known, up to {max(TENSOR_TYPES)}; "
                "a newer gguf package may know more"
            )
        n = math.prod(shape)
        if max(shape, default=1) >= 1 << 48 or n >= 1 << 48:
            raise r.fail(f"{shown} claims the shape {list(shape)}")
        per, size = TENSOR_TYPES[kind]
        if (shape[0] if shape else 1) % per:
            raise r.fail(
                f"{shown} has rows of {shape[0] if shape else 1} values, no multiple of its type's block of {per}"
            )
        return TensorInfo(name, shape, kind, offset, n // per * size)

    def get(self, key: str, *types: int, default: Any = None) -> Any:
        """The value of `key`, `default` when it is missing.

        Raises FasaError when the key has none of `types`, or when it is missing and `default` is `...`.
        """
        entry = self.kv.get(key)
        expected = " or ".join(TYPE_NAMES[t] for t in types)
        if entry is None:
            if default is ...:
                raise FasaError(f"{self.path}: key {key}: expected {expected}, found nothing; {NEXT}")
            return default
        if entry.type not in types:
            raise FasaError(f"{self.path}: key {key}: expected {expected}, found {entry.type_name}; {NEXT}")
        return entry.value

    @property
    def arch(self) -> str:
        """The architecture's name, as in "llama". Raises FasaError when it is missing or not a short printable name."""
        number = self.get(Keys.Split.LLM_KV_SPLIT_NO, U16, U32, I32, default=0)
        if number and Keys.General.ARCHITECTURE not in self.kv:
            raise FasaError(
                f"{self.path}: this is file {number + 1} of a split model; give the first, whose name has -00001-of-"
            )
        name = self.get(Keys.General.ARCHITECTURE, STR, default=...)
        if not 0 < len(name) <= 64 or not name.isprintable():
            raise FasaError(
                f"{self.path}: key general.architecture: expected a short name, found {len(name)} characters; {NEXT}"
            )
        return name


def read_header(model: str | os.PathLike) -> GGUFFile:
    """The header of a model. A GGUFFile is returned as it is, unless its file has changed since it was read."""
    return model if isinstance(model, GGUFFile) and model.is_current() else GGUFFile(model)


def pack_kv(key: str, kind: int, value: Any, item: int | None = None) -> bytes:
    """One metadata entry as bytes; `item` is the type of an array's elements, which must be numbers."""
    name = key.encode()
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", kind)
    if kind == STR:
        text = value.encode()
        return head + struct.pack("<Q", len(text)) + text
    if kind == ARR and item is not None:
        return head + struct.pack(f"<IQ{len(value)}{SCALARS[item]}", item, len(value), *value)
    return head + struct.pack("<" + SCALARS[kind], value)
