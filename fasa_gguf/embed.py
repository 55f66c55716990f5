"""Put a profile into a model's GGUF file, or take it out: the header is written anew, every tensor is copied byte for byte."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
from pathlib import Path
from typing import Callable, Iterator

from .errors import FasaError
from .gguf_file import ARR, I32, U16, U32, GGUFFile, pack_kv
from .profile import Profile

CHUNK = 64 << 20  # bytes copied at a time


def model_shape(model: GGUFFile) -> tuple[list[int], list[int]]:
    """(KV heads, frequency chunks) per layer, from the metadata. FasaError for a model that is out of FASA's scope."""
    arch = model.arch
    if f"{arch}.attention.kv_lora_rank" in model.kv:
        raise FasaError(f"{model.path}: architecture {arch} has multi-head latent attention, which has no keys per head to rank; FASA does not apply")
    n_layer = model.get(f"{arch}.block_count", U32, default=...)
    if not 1 <= n_layer <= 4096:
        raise FasaError(f"{model.path}: key {arch}.block_count: expected 1 to 4096, found {n_layer}")

    def per_layer(key: str, default: list[int] | None) -> list[int]:
        value = model.get(key, U32, I32, ARR, default=default if default is not None else ...)
        value = value if isinstance(value, list) else [value] * n_layer
        if len(value) != n_layer or not all(isinstance(x, int) and 0 <= x < 1 << 20 for x in value):
            raise FasaError(f"{model.path}: key {key}: expected {n_layer} head counts, found {len(value)} values")
        return value

    n_head = per_layer(f"{arch}.attention.head_count", None)
    n_head_kv = per_layer(f"{arch}.attention.head_count_kv", n_head)
    width = model.get(f"{arch}.attention.key_length", U32, default=0)
    if not width:
        n_embd = model.get(f"{arch}.embedding_length", U32, default=...)
        width = n_embd // max(max(n_head), 1)
    return n_head_kv, [width // 2 if h else 0 for h in n_head_kv]


def weights_sha256(model: GGUFFile) -> str:
    """Hash of the q and k projection weights; two models of one shape differ in it."""
    h = hashlib.sha256()
    with open(model.path, "rb") as f:
        for t in model.tensors:
            if any(part in t.name for part in ("attn_q.weight", "attn_k.weight", "attn_qkv.weight")):
                h.update(t.name.encode())
                f.seek(model.data_offset + t.offset)
                left = t.n_bytes
                while left:
                    data = f.read(min(left, 1 << 22))
                    if not data:
                        raise FasaError(f"{model.path}: tensor {t.name} is cut short")
                    h.update(data)
                    left -= len(data)
    return h.hexdigest()


def first_shard(model: GGUFFile) -> None:
    """A split model keeps its metadata in its first file: FasaError, naming that file, for any other."""
    number = model.get("split.no", U16, default=0)
    if number:
        count = model.get("split.count", U16, default=0)
        stem = model.path.name.replace(f"-{number + 1:05d}-of-", "-00001-of-")
        raise FasaError(f"{model.path}: this is file {number + 1} of {count} of a split model, and the profile belongs in the first; use {model.path.with_name(stem)}")


def _header(model: GGUFFile, profile: Profile | None) -> bytes:
    """The new header, padded to the alignment."""
    entries = [kv.raw for key, kv in model.kv.items() if not key.startswith("fasa.")]
    if profile is not None:
        entries += [pack_kv(*entry) for entry in profile.to_gguf_kv()]
    head = struct.pack("<4sIQQ", b"GGUF", model.version, len(model.tensors), len(entries)) + b"".join(entries) + model.info_raw
    return head + bytes(-len(head) % model.alignment)


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A file beside the target that is gone afterwards, whatever happens; what a killed run left is removed first."""
    for old in target.parent.glob(f".{target.name}.fasa-*"):
        pid = old.name.rsplit("-", 1)[1]
        if not (pid.isdigit() and Path(f"/proc/{pid}").exists()):
            old.unlink(missing_ok=True)
    path = target.with_name(f".{target.name}.fasa-{os.getpid()}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _copy(source: int, target: int, at: int, n: int, progress: Callable[[int, int], None] | None) -> None:
    """n bytes from offset `at` of one file descriptor to the end of the other, at disk speed and in constant memory."""
    done = 0
    while done < n:
        want = min(CHUNK, n - done)
        try:
            sent = os.copy_file_range(source, target, want, at + done) if hasattr(os, "copy_file_range") else 0
        except OSError as e:
            if e.errno not in (18, 22, 38, 95):  # across file systems, or not supported there: read and write
                raise
            sent = 0
        if not sent:
            data = os.pread(source, min(want, 1 << 22), at + done)
            if not data:
                raise FasaError(f"the model was cut short while it was copied: {n - done} bytes are missing")
            sent = os.write(target, data)
        done += sent
        if progress:
            progress(done, n)


def rewrite(model: str | os.PathLike, profile: Profile | None, out: str | os.PathLike | None = None, force: bool = False,
            progress: Callable[[int, int], None] | None = None) -> Path:
    """Write the model with this profile (None: without any), in place or to `out`; returns the path written.

    The new file appears under its name only when it is whole; a full disk or a kill leaves the old one. progress(done, total)
    counts bytes. Raises FasaError: the profile does not fit, `out` exists and not force, no room, cannot be written.
    """
    source = Path(model).resolve()  # a link is followed: the file behind it changes, the link stays
    header = GGUFFile(source)
    first_shard(header)
    if profile is not None:
        profile.check(*model_shape(header), where=str(model))
    target = source if out is None else Path(out)
    if out is not None and target.exists() and not force:
        raise FasaError(f"{target}: exists already; use --force to overwrite it")
    head = _header(header, profile)
    n_data = header.size - header.data_offset if header.tensors else 0
    try:
        free = shutil.disk_usage(target.parent).free
        if free < len(head) + n_data:
            raise FasaError(f"{target.parent}: not enough space: {len(head) + n_data} bytes are needed beside the model and {free} are free")
        with _temporary(target) as temporary:
            with open(source, "rb") as f, open(temporary, "wb", buffering=0) as g:
                g.write(head)
                _copy(f.fileno(), g.fileno(), header.data_offset, n_data, progress)
                os.fsync(g.fileno())
            shutil.copymode(source, temporary)
            os.replace(temporary, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        raise FasaError(f"{target}: cannot be written: {e.strerror or e}; the model is as it was") from None
    return target
