"""Put a profile into a model's GGUF file, or take it out: a new header, and every tensor copied byte for byte.

gguf-py's writer packs all keys anew, so a file whose profile is removed would not be the original byte for byte.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from gguf import Keys

from ..errors import FasaError, check_path
from ..gguf.file import GGUFFile, pack_kv, read_header
from ..gguf.shape import check_shard_name, first_shard, read_shape, weights_sha256
from .profile import Profile

CHUNK = 64 << 20  # bytes copied at a time
TEMPORARY = ".fasa-gguf-"  # how the names of temporary files begin
# names made of a hash, as Hugging Face, ollama, git-lfs and git-annex give them; shorter ones may be anything
_HASH = re.compile(r"(?:^|[-:.])[0-9a-f]{32,128}(?:\.gguf)?$")
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system that has no such thing
_NO_COPY_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def doubts(model: GGUFFile, profile: Profile, file: BinaryIO | None = None) -> list[str]:
    """Signs that a profile of the right shape was made for another model; each a sentence, none of them proof.

    file: the model, if it is open already.
    """
    out, shape = [], read_shape(model)
    base = profile.rope.get("base", shape.rope_base)
    if abs(base - shape.rope_base) > 1e-3 * shape.rope_base:
        out.append(
            f"{model.path}: the profile was made under a RoPE base of {base:g}, and the model has {shape.rope_base:g}"
        )
    expected = profile.calibration.get("weights_sha256")
    if expected and profile.calibration.get("source") != "hf":  # those are stored otherwise, and often permuted
        try:
            found = weights_sha256(model, file)
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
    while True:
        fd, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
        with contextlib.suppress(OSError):  # a file system without locks does not remove what it cannot lock, either
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.path.exists(name):
            break
        os.close(fd)  # another run removed it before it was locked
    try:
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
                raise FasaError(
                    f"the model was cut short while it was copied, {n - done} bytes are missing; nothing was written"
                )
            _write(target, data)
            sent = len(data)
        done += sent
        if progress:
            progress(done, n)


# ---- which file ----


def _is_named_by_content(path: Path) -> bool:
    """Whether a file is one of a store that names its files by a hash of their content, such as a download cache."""
    cache = path.parent.parent
    return bool(_HASH.search(path.name)) or (
        path.parent.name == "blobs" and any((cache / x).is_dir() for x in ("snapshots", "refs", "manifests"))
    )


def _places(model: str | os.PathLike, out: str | os.PathLike | None, force: bool) -> tuple[Path, Path]:
    """(path of the model, path to write), links followed. Raises FasaError when the second may not be written."""
    check_path(model)
    check_path(model if out is None else out)
    source = Path(os.path.realpath(model))
    target = source if out is None else Path(os.path.realpath(out))
    there = os.path.lexists(target)
    named = model if out is None else out
    if out is not None and there:
        if not stat.S_ISREG(os.lstat(target).st_mode):
            raise FasaError(f"{out}: expected the name of a file to write, found something else there; give another -o")
        if not force:
            raise FasaError(f"{out}: exists already; use --force to overwrite it")
    if there and _is_named_by_content(target):
        via = "" if str(named) == str(target) else f", {target}"
        raise FasaError(
            f"{named}: expected a file that may change, found one of a cache that names files by their content{via}; "
            "write to a file outside the cache with -o"
        )
    if there and not force and not (os.stat(target).st_mode & 0o222 and os.access(target, os.W_OK)):
        raise FasaError(f"{named}: the file is read-only; use --force to replace it, or write to another with -o")
    if not target.parent.is_dir():
        raise FasaError(f"{named}: the folder does not exist; make it, or give another -o")
    return source, target


def _side_effects(named: str | os.PathLike, target: Path) -> list[str]:
    """What replacing a file means for its other names; each a sentence."""
    out = []
    if os.path.islink(named):
        out.append(f"{named} is a symbolic link; the file that it leads to is written: {target}")
    more = os.stat(target).st_nlink - 1 if target.exists() else 0
    if more > 0:
        names = "another name" if more == 1 else f"{more} other names"
        out.append(f"{target} has {names} (hard links), which will keep the old file")
    return out


@contextlib.contextmanager
def _opened(source: Path, lock: int, warn: Callable[[str], None]) -> Iterator[BinaryIO]:
    """The model, open and locked. A run that replaces it holds LOCK_EX, one that only reads it LOCK_SH.

    The second of two runs waits here, and then opens the file that the first has written. Runs on a file system
    without locks go on at once; `_check_unchanged` stops the one that comes too late.
    """
    if not source.is_file():
        GGUFFile(source)  # raises, and says why
    while True:
        try:
            f = open(source, "rb")  # noqa: SIM115 - closed below
        except OSError as e:
            raise FasaError(f"{source}: cannot be read: {e.strerror or e}; check the path") from None
        with f:
            try:
                fcntl.flock(f, lock | fcntl.LOCK_NB)
            except BlockingIOError:
                warn(f"{source}: another run is writing it; waiting for that to end")
                fcntl.flock(f, lock)
            except OSError:
                pass
            if source.exists() and os.path.samestat(os.stat(source), os.fstat(f.fileno())):
                yield f
                return


def _check_unchanged(model: GGUFFile, file: BinaryIO) -> None:
    """FasaError unless the open file is the one whose header was read, and still stands under its name."""
    if not (model.is_open_as(file) and model.is_current()):
        raise FasaError(
            f"{model.path}: the file was changed or replaced while it was read; nothing was written. "
            "Wait until nothing else writes it, and run the command again"
        )


def check_embeddable(model: str | os.PathLike, out: str | os.PathLike | None = None, force: bool = False) -> GGUFFile:
    """The header. Raises FasaError where `rewrite` would, whatever the profile: to call before a calibration."""
    target = _places(model, out, force)[1]
    header = read_header(model)
    first_shard(header)
    check_shard_name(header, target, lambda _: None)
    read_shape(header)
    return header


def check_weights(model: GGUFFile, profile: Profile) -> None:
    """FasaError when the file was replaced, since `model` was read, by one with other weights than were calibrated."""
    if model.is_current() or weights_sha256(GGUFFile(model.path)) == profile.calibration.get("weights_sha256"):
        return
    raise FasaError(
        f"{model.path}: the file was replaced by one with other weights while it was calibrated; nothing was written. "
        "Run the command again"
    )


def rewrite(
    model: str | os.PathLike,
    profile: Profile | None,
    out: str | os.PathLike | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Path:
    """Write the model with this profile (None: without any), in place or to `out`; returns the path written.

    model: a path, or its GGUFFile. A link is followed: the file behind it is replaced, the link stays. The new file
    appears under its name only when it is whole; a full disk or a kill leaves the old one. Of two runs on one model the
    second waits. progress(done, total) counts bytes. warn(sentence) is told of doubts, and of what replacing a file
    changes for its other names; by default they go to stderr. Raises FasaError, and nothing is written, when the
    profile does not fit, the model is out of scope or not the first file of a split one, the file changes meanwhile, it
    is named by its content (a download cache), `out` exists or the file is read-only and not `force`, or the disk has
    no room.
    """
    warn = warn or _warn
    if profile is not None and not isinstance(profile, Profile):
        raise FasaError(
            f"profile: expected a Profile, found {type(profile).__name__}; read one with Profile.load(PATH)"
        )
    source, target = _places(model, out, force)
    lock = fcntl.LOCK_EX if source == target else fcntl.LOCK_SH
    with _opened(source, lock, warn) as f:
        given = isinstance(model, GGUFFile) and model.is_current() and model.is_open_as(f)
        header = model if isinstance(model, GGUFFile) and given else GGUFFile(source, f)
        first_shard(header)
        check_shard_name(header, target, warn)
        if profile is None:
            if not any(key.startswith("fasa.") for key in header.kv):
                raise FasaError(f"{model}: there is no FASA profile in this model, so there is nothing to remove")
        else:
            _check(header, profile)
            for text in doubts(header, profile, f):
                warn(text)
        for text in _side_effects(model if out is None else out, target):
            warn(text)
        try:
            _replace(header, _header(header, profile), f, target, out is not None and not force, progress, warn)
        except OSError as e:
            raise FasaError(f"{target}: cannot be written: {e.strerror or e}; the model is as it was") from None
        _sync_folder(target, warn)
    return target


def _warn(text: str) -> None:
    print(f"fasa_gguf: {text}", file=sys.stderr)


def _replace(
    model: GGUFFile,
    head: bytes,
    file: BinaryIO,
    target: Path,
    must_be_new: bool,
    progress: Callable[[int, int], None] | None,
    warn: Callable[[str], None],
) -> None:
    """Write a new header and the tensors of the open model under the name `target`, synced to disk."""
    n_data = max(model.size - model.data_offset, 0) if model.tensors else 0
    free = shutil.disk_usage(target.parent).free
    if free < len(head) + n_data:
        raise FasaError(
            f"{target.parent}: not enough space: {len(head) + n_data} bytes are needed beside the model "
            f"and {free} are free; make room, or write to another disk with -o"
        )
    with _temporary(target.parent) as (fd, temporary):
        _write(fd, head)
        _copy(file.fileno(), fd, model.data_offset, n_data, progress)
        _keep_owner_and_mode(fd, target, os.fstat(file.fileno()), warn)
        _sync(fd)
        _check_unchanged(model, file)
        if must_be_new and os.path.lexists(target):
            raise FasaError(f"{target}: was made by another program meanwhile; use --force to overwrite it")
        os.replace(temporary, target)


def _keep_owner_and_mode(fd: int, target: Path, source: os.stat_result, warn: Callable[[str], None]) -> None:
    """The new file gets owner and mode of the one that it replaces, or the mode of its source.

    Not every file system can (FAT, many network mounts), and not every user may: the file is whole without.
    """
    old = os.stat(target) if target.exists() else None
    if old is not None:
        with contextlib.suppress(OSError):
            os.fchown(fd, old.st_uid, old.st_gid)
    mode = stat.S_IMODE((old or source).st_mode)
    with contextlib.suppress(OSError):
        os.fchmod(fd, mode)
    new = os.fstat(fd)
    if old is not None and (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        was, now = f"{old.st_uid}:{old.st_gid}", f"{new.st_uid}:{new.st_gid}"
        warn(f"{target}: its owner (user:group) could not be kept; it was {was} and becomes {now}")
    if stat.S_IMODE(new.st_mode) != mode:
        warn(f"{target}: its permissions could not be set to {mode:o}; they are {stat.S_IMODE(new.st_mode):o}")


def _sync(fd: int) -> None:
    """Flush a file or folder to disk, where the file system knows that."""
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in _NO_SYNC:
            raise


def _sync_folder(target: Path, warn: Callable[[str], None]) -> None:
    """Flush the new name to disk. The file is replaced by then, whatever happens here."""
    try:
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            _sync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        warn(
            f"{target}: is written; its folder could not be flushed to disk ({e.strerror or e}), "
            "so a power cut within seconds may bring the old file back"
        )


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
