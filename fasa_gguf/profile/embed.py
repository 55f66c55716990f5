"""Put a profile into a model's GGUF file, or take it out: a new header, and every tensor copied byte for byte.

gguf-py's writer packs all keys anew, so a file whose profile is removed would not be the original byte for byte.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from gguf import Keys

from ..errors import FasaError, check_path
from ..gguf.file import GGUFFile, pack_kv, read_header
from ..gguf.shape import first_shard, read_shape, weights_sha256
from .profile import Profile

CHUNK = 64 << 20  # bytes copied at a time
TEMPORARY = ".fasa-gguf-"  # how the names of temporary files begin
_NO_COPY_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def doubts(model: GGUFFile, profile: Profile) -> list[str]:
    """Signs that a profile of the right shape was made for another model; each a sentence, none of them proof."""
    out, shape = [], read_shape(model)
    base = profile.rope.get("base", shape.rope_base)
    if abs(base - shape.rope_base) > 1e-3 * shape.rope_base:
        out.append(
            f"{model.path}: the profile was made under a RoPE base of {base:g}, and the model has {shape.rope_base:g}"
        )
    expected = profile.calibration.get("weights_sha256")
    if expected and profile.calibration.get("source") != "hf":  # those are stored otherwise, and often permuted
        try:
            found = weights_sha256(model)
        except FasaError as e:
            return [*out, f"the profile could not be compared with the model's weights: {e}"]
        if found != expected:
            out.append(
                f"{model.path}: the profile was calibrated on other weights: "
                "another quantisation, or another model of this shape"
            )
    return out


def _check(model: GGUFFile, profile: Profile) -> None:
    """FasaError when the profile is not for this model."""
    where = str(model.path)
    shape = read_shape(model)
    profile.check(shape.n_head_kv, shape.n_chunk, where)
    dims = profile.rope.get("dims", shape.n_rot)
    if dims != shape.n_rot and Keys.Rope.DIMENSION_COUNT_SWA.format(arch=shape.arch) not in model.kv:
        raise FasaError(
            f"{where}: the profile is for another model: "
            f"it has {dims} rotated dimensions per head, the model {shape.n_rot}; "
            "make the profile anew with `fasa-gguf embed-profile MODEL`"
        )
    profile.check_values(where)


# ---- writing ----


def _header(model: GGUFFile, profile: Profile | None) -> bytes:
    """The new header, padded to the alignment."""
    entries = [kv.raw for key, kv in model.kv.items() if not key.startswith("fasa.")]
    if profile is not None:
        entries += [pack_kv(*entry) for entry in profile.to_gguf_kv()]
    head = (
        struct.pack("<4sIQQ", b"GGUF", model.version, len(model.tensors), len(entries))
        + b"".join(entries)
        + model.info_raw
    )
    return head + bytes(-len(head) % model.alignment)


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[tuple[int, Path]]:
    """(descriptor, path) of a new file in `folder` that is removed afterwards unless it was renamed.

    The file is locked while its process lives. One without a lock was left by a killed run, and is removed here.
    """
    for old in folder.glob(TEMPORARY + "*"):
        with contextlib.suppress(OSError):
            fd = os.open(old, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                old.unlink()
            finally:
                os.close(fd)
    fd, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
    try:
        with contextlib.suppress(OSError):  # a file system without locks does not remove what it cannot lock, either
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield fd, Path(name)
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(name)


def _write(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


def _copy(source: int, target: int, at: int, n: int, progress: Callable[[int, int], None] | None) -> None:
    """n bytes from offset `at` of one file descriptor to the end of the other, at disk speed and in constant memory."""
    done, ranged = 0, hasattr(os, "copy_file_range")
    while done < n:
        want = min(CHUNK, n - done)
        sent = 0
        if ranged:
            try:
                sent = os.copy_file_range(source, target, want, at + done)
            except OSError as e:
                if e.errno not in _NO_COPY_RANGE:
                    raise
        if not sent:  # across file systems, or not supported there
            ranged = False
            data = os.pread(source, min(want, 4 << 20), at + done)
            if not data:
                raise OSError(errno.EIO, f"the model was cut short while it was copied, {n - done} bytes are missing")
            _write(target, data)
            sent = len(data)
        done += sent
        if progress:
            progress(done, n)


def _open(model: str | os.PathLike, out: str | os.PathLike | None, force: bool) -> tuple[GGUFFile, Path, Path]:
    """(model, its path, the path to write). Raises what rewrite raises whatever the profile."""
    check_path(model)
    check_path(out or model)
    source = Path(os.path.realpath(model))  # a link is followed: the file behind it changes, the link stays
    header = read_header(model if isinstance(model, GGUFFile) else source)
    first_shard(header)
    target = source if out is None else Path(os.path.realpath(out))
    if out is not None and os.path.lexists(target):
        if not stat.S_ISREG(os.lstat(target).st_mode):
            raise FasaError(f"{out}: expected the name of a file to write, found something else there; give another -o")
        if not force:
            raise FasaError(f"{out}: exists already; use --force to overwrite it")
    if not target.parent.is_dir():
        raise FasaError(f"{out}: the folder does not exist; make it, or give another -o")
    return header, source, target


def check_embeddable(model: str | os.PathLike, out: str | os.PathLike | None = None, force: bool = False) -> GGUFFile:
    """The header. Raises FasaError where `rewrite` would, whatever the profile: to call before a calibration."""
    header = _open(model, out, force)[0]
    read_shape(header)
    return header


def rewrite(
    model: str | os.PathLike,
    profile: Profile | None,
    out: str | os.PathLike | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Path:
    """Write the model with this profile (None: without any), in place or to `out`; returns the path written.

    model: a path, or its GGUFFile. The new file appears under its name only when it is whole; a full disk or a kill
    leaves the old one. progress(done, total) counts bytes. warn(sentence) is told of doubts; by default they go to
    stderr. Raises FasaError, and nothing is written, when the profile does not fit, the model is out of scope or not
    the first file of a split one, `out` exists and not `force`, or the disk has no room.
    """
    header, source, target = _open(model, out, force)
    if profile is None:
        if not any(key.startswith("fasa.") for key in header.kv):
            raise FasaError(f"{model}: there is no FASA profile in this model, so there is nothing to remove")
    else:
        _check(header, profile)
        for text in doubts(header, profile):
            (warn or _warn)(text)
    try:
        _replace(header, _header(header, profile), source, target, progress)
    except OSError as e:
        raise FasaError(f"{target}: cannot be written: {e.strerror or e}; the model is as it was") from None
    return target


def _warn(text: str) -> None:
    print(f"fasa_gguf: {text}", file=sys.stderr)


def _replace(
    model: GGUFFile, head: bytes, source: Path, target: Path, progress: Callable[[int, int], None] | None
) -> None:
    """Write a new header and the tensors of `source` under the name `target`, synced to disk."""
    n_data = max(model.size - model.data_offset, 0) if model.tensors else 0
    free = shutil.disk_usage(target.parent).free
    if free < len(head) + n_data:
        raise FasaError(
            f"{target.parent}: not enough space: {len(head) + n_data} bytes are needed beside the model "
            f"and {free} are free; make room, or write to another disk with -o"
        )
    with open(source, "rb") as f, _temporary(target.parent) as (fd, temporary):
        _write(fd, head)
        _copy(f.fileno(), fd, model.data_offset, n_data, progress)
        old = os.stat(target if target.exists() else source)
        with contextlib.suppress(OSError):
            os.fchown(fd, old.st_uid if target.exists() else -1, old.st_gid if target.exists() else -1)
        os.fchmod(fd, stat.S_IMODE(old.st_mode))
        os.fsync(fd)
        os.replace(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def embed(
    model: str | os.PathLike,
    profile: Profile,
    out: str | os.PathLike | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The model with this profile instead of any it has; see rewrite."""
    return rewrite(model, profile, out, force, progress)


def remove(
    model: str | os.PathLike,
    out: str | os.PathLike | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The model without its `fasa.*` keys, byte for byte what it was before; see rewrite."""
    return rewrite(model, None, out, force, progress)
