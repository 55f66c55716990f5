"""Put a profile into a model's GGUF file, or take it out: the header is written anew, every tensor is copied byte for byte."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

from .errors import FasaError
from .gguf_file import ARR, BOOL, F32, I32, STR, U16, U32, GGUFFile, pack_kv, printable
from .profile import Profile

CHUNK = 64 << 20  # bytes copied at a time
TEMPORARY = ".fasa-gguf-"  # how the names of temporary files begin
_NO_COPY_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

# llama_model_rope_type of the pinned llama.cpp (src/llama-model.cpp): architectures without RoPE, and those that rotate
# neighbours (2i, 2i+1); every other one pairs (i, i + dims/2).
NO_ROPE = frozenset("""arwkv7 bloom clip glm5-next gpt2 gptj jais jamba jina-bert-v2 kimi-k3 kimi-linear mamba mamba2 mpt nemotron_h
    nemotron_h_moe refact rwkv6 rwkv6qwen2 rwkv7 t5 t5encoder wavtokenizer-dec""".split())
NORM = frozenset("""arcee arctic baichuan bailingmoe bailingmoe3 chameleon chatglm cohere2 cohere2moe command-r deci deepseek deepseek2
    deepseek2-ocr deepseek32 deepseek4 dots3note eagle3 ernie4_5 ernie4_5-moe glm-dsa glm4 granite granite_swa granitehybrid granitemoe
    graniteswitch hy_v4 internlm2 llada llama llama-embed llama4 maincoder minicpm mistral3 mistral4 muse-glimmer nanbeige neo-bert olmo
    plm pockettts smollm3 starcoder xverse""".split())
# architectures that keep latent keys when the metadata say so (kv_lora_rank, key_length_mla)
LATENT = frozenset("""bailingmoe3 deepseek2 deepseek2-ocr deepseek32 dots3note glm-dsa glm5-next hy_v4 kimi-k3 kimi-linear minicpm3 mistral4
    plm""".split())
# where llama.cpp keeps a sliding window, the period of its layers when the metadata have no pattern: every n-th attends to all
SWA_PERIOD = {"afmoe": 4, "cohere2": 4, "exaone-moe": 4, "exaone4": 4, "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2,
              "mellum": 4, "muse-glimmer": 4, "olmo2": 4, "plamo3": 8}
# encoders and diffusion models: attention looks both ways and nothing is cached
NO_CACHE = frozenset("""bert dream eurobert gemma-embedding jina-bert-v3 llada llada-moe llama-embed modern-bert neo-bert nomic-bert
    nomic-bert-moe rnd1""".split())


@dataclass
class ModelShape:
    """What a profile must fit, from a model's metadata."""

    arch: str
    n_head: list[int]        # [n_layer] query heads
    n_head_kv: list[int]     # [n_layer], 0: no attention there
    head_dim: list[int]      # [n_layer] of the keys, 0: no attention there; -1: only the loader knows which of two it is
    n_rot: int               # rotated dimensions per head
    layout: str              # norm or neox
    rope_base: float
    rope_scaling: str        # none, linear, yarn, longrope, ...

    @property
    def n_chunk(self) -> list[int]:
        """[n_layer] frequency chunks per head; -1 where head_dim is."""
        return [d // 2 for d in self.head_dim]  # -1 // 2 is -1


def read_shape(model: GGUFFile) -> ModelShape:
    """The shape by the metadata; FasaError for a model that is out of FASA's scope, or when a key is missing or out of range."""
    arch, path = model.arch, model.path

    def refuse(why: str) -> FasaError:
        return FasaError(f"{path}: architecture {arch} {why}; FASA does not apply")

    if arch in LATENT and any(f"{arch}.attention.{key}" in model.kv for key in ("kv_lora_rank", "key_length_mla")):
        raise refuse("has multi-head latent attention, which has no keys per head to rank")
    if arch in NO_ROPE:
        raise refuse("has no RoPE, so it has no frequency chunks")
    if arch in NO_CACHE or not model.get(f"{arch}.attention.causal", BOOL, default=True):
        raise refuse("has no attention layer with a KV cache")

    def number(key: str, most: int, default: Any = ..., least: int = 1) -> int:
        value = model.get(f"{arch}.{key}", U32, default=default)
        if not least <= value <= most:
            raise FasaError(f"{path}: key {arch}.{key}: expected {least} to {most}, found {value}; download or convert the model again")
        return value

    n_block = number("block_count", 4096)
    n_layer = n_block - number("nextn_predict_layers", n_block - 1, 0, 0)  # layers that draft are not the model's own

    def per_layer(key: str, default: list[int] | None) -> list[int]:
        full = f"{arch}.{key}"
        entry = model.kv.get(full)
        what = f"{n_block} whole numbers from 0 to 65535, or one for all layers"
        if entry is not None and entry.type == ARR and entry.count != n_block:
            raise FasaError(f"{path}: key {full}: expected {what}, found {entry.count} values; download or convert the model again")
        value = model.get(full, U32, I32, ARR, default=... if default is None else default)
        value = value if isinstance(value, list) else [value] * n_block
        bad = next((x for x in value if isinstance(x, (str, float)) or not 0 <= x < 1 << 16), None)
        if bad is not None:
            shown = printable(bad) if isinstance(bad, str) else bad
            raise FasaError(f"{path}: key {full}: expected {what}, found {shown}; download or convert the model again")
        return [int(x) for x in value]

    n_head = per_layer("attention.head_count", None)
    n_head_kv = per_layer("attention.head_count_kv", n_head)
    if not any(n_head_kv[:n_layer]):
        raise refuse("has no attention layer with a KV cache")
    # llama.cpp: embedding_length / head_count of the first layer, unless the key is there
    width = number("embedding_length", 1 << 20) // n_head[0] if n_head[0] else 0
    width = number("attention.key_length", 1 << 16, width, 0)
    swa = number("attention.key_length_swa", 1 << 16, width, 0)
    widths = [width] * n_layer
    if swa != width:  # layers with a sliding window have heads of another size
        pattern = model.kv.get(f"{arch}.attention.sliding_window_pattern")
        known = pattern is not None and pattern.type == ARR and pattern.item_type != STR and pattern.count == n_block
        widths = [swa if x else width for x in pattern.value[:n_layer]] if known else [-1] * n_layer
    dims = model.kv.get(f"{arch}.rope.dimension_count")
    sections = model.kv.get(f"{arch}.rope.dimension_sections")  # of image positions; with them these two pair halves
    halves = arch in ("glm4", "bailingmoe3") and sections is not None and sections.type == ARR and 2 <= sections.count <= 4
    halves = halves and all(sections.value[:2])
    return ModelShape(
        arch, n_head[:n_layer], n_head_kv[:n_layer], [d if h else 0 for d, h in zip(widths, n_head_kv)],
        n_rot=number("rope.dimension_count", 1 << 16, width, 0) if dims is None or dims.type == U32 else width,
        layout="norm" if arch in NORM and not halves else "neox", rope_base=model.get(f"{arch}.rope.freq_base", F32, default=10000.0),
        rope_scaling=model.get(f"{arch}.rope.scaling.type", STR, default="none"))


def model_shape(model: GGUFFile) -> tuple[list[int], list[int]]:
    """(KV heads, frequency chunks) per layer, as a Profile has them. Raises as read_shape does."""
    shape = read_shape(model)
    return shape.n_head_kv, shape.n_chunk


def sliding_windows(model: GGUFFile, n_layer: int) -> list[int]:
    """[n_layer] the last tokens that a query of each layer attends, 0: all; as llama.cpp runs the model."""
    key = f"{model.arch}.attention.sliding_window"
    window, pattern = model.get(key, U32, default=0), model.kv.get(key + "_pattern")
    if pattern is not None and pattern.type == ARR:
        local = [pattern.item_type != STR and il < pattern.count and bool(pattern.value[il]) for il in range(n_layer)]
    else:
        period = pattern.value if pattern is not None and pattern.type == U32 else SWA_PERIOD.get(model.arch, 1)
        local = [period == 0 or il % period < period - 1 for il in range(n_layer)]
    return [window if x and (pattern is not None or model.arch in SWA_PERIOD) else 0 for x in local]


# ---- split models ----


def _split(model: GGUFFile) -> tuple[int, int]:
    """(number from 0, count) of a file of a split model; (0, 1) otherwise."""
    return model.get("split.no", U16, U32, I32, default=0), max(model.get("split.count", U16, U32, I32, default=1), 1)


def _shard(model: GGUFFile, number: int) -> Path:
    """The path of another file of the same split model; llama.cpp's names end in -00001-of-00003.gguf."""
    own, count = _split(model)
    return model.path.with_name(model.path.name.replace(f"-{own + 1:05d}-of-{count:05d}", f"-{number + 1:05d}-of-{count:05d}"))


def first_shard(model: GGUFFile) -> None:
    """A split model keeps its metadata in its first file: FasaError, naming that file, for any other."""
    number, count = _split(model)
    if number:
        raise FasaError(f"{model.path}: this is file {number + 1} of {count} of a split model, and the profile belongs in the first; use {_shard(model, 0)}")


def shards(model: GGUFFile) -> Iterator[GGUFFile]:
    """The files of a model, one or several, the first one first. Raises FasaError when `model` is not the first, or a file is not usable."""
    first_shard(model)
    yield model
    for i in range(1, _split(model)[1]):
        yield GGUFFile(_shard(model, i))


def weights_sha256(model: GGUFFile) -> str:
    """Hash of the q and k projection weights as stored, in file order, whether split or not: two models of one shape differ in it."""
    h = hashlib.sha256()
    for part in shards(model):
        with open(part.path, "rb") as f:
            for t in part.tensors:
                if any(name in t.name for name in ("attn_q.weight", "attn_k.weight", "attn_qkv.weight")):
                    h.update(t.name.encode())
                    f.seek(part.data_offset + t.offset)
                    left = t.n_bytes
                    while left:
                        data = f.read(min(left, 1 << 22))
                        if not data:
                            raise FasaError(f"{part.path}: tensor {t.name} is cut short; download the model again")
                        h.update(data)
                        left -= len(data)
    return h.hexdigest()


def doubts(model: GGUFFile, profile: Profile) -> list[str]:
    """Signs that a profile of the right shape was made for another model; each a sentence, none of them proof."""
    out, shape = [], read_shape(model)
    base = profile.rope.get("base", shape.rope_base)
    if abs(base - shape.rope_base) > 1e-3 * shape.rope_base:
        out.append(f"{model.path}: the profile was made under a RoPE base of {base:g}, and the model has {shape.rope_base:g}")
    expected = profile.calibration.get("weights_sha256")
    if expected and profile.calibration.get("source") != "hf":                       # those are stored otherwise, and often permuted
        try:
            found = weights_sha256(model)
        except FasaError as e:
            return [*out, f"the profile could not be compared with the model's weights: {e}"]
        if found != expected:
            out.append(f"{model.path}: the profile was calibrated on other weights: another quantisation, or another model of this shape")
    return out


def _check(model: GGUFFile, profile: Profile) -> None:
    """FasaError when the profile is not for this model."""
    where = str(model.path)
    shape = read_shape(model)
    profile.check(shape.n_head_kv, shape.n_chunk, where)
    dims = profile.rope.get("dims", shape.n_rot)
    if dims != shape.n_rot and f"{shape.arch}.rope.dimension_count_swa" not in model.kv:
        raise FasaError(f"{where}: the profile is for another model: it has {dims} rotated dimensions per head, the model {shape.n_rot}; "
                        "make the profile anew with `fasa-gguf embed-profile MODEL`")
    profile.check_values(where)


# ---- writing ----


def _header(model: GGUFFile, profile: Profile | None) -> bytes:
    """The new header, padded to the alignment."""
    entries = [kv.raw for key, kv in model.kv.items() if not key.startswith("fasa.")]
    if profile is not None:
        entries += [pack_kv(*entry) for entry in profile.to_gguf_kv()]
    head = struct.pack("<4sIQQ", b"GGUF", model.version, len(model.tensors), len(entries)) + b"".join(entries) + model.info_raw
    return head + bytes(-len(head) % model.alignment)


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[tuple[int, Path]]:
    """(descriptor, path) of a new file in `folder` that is gone afterwards unless it was renamed.

    The file is locked while its process lives; one without a lock was left by a killed run, and is removed here.
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
        view = view[os.write(target, view):]


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
    """(model, its path, the path to write): what rewrite refuses whatever the profile."""
    source = Path(os.path.realpath(model))  # a link is followed: the file behind it changes, the link stays
    header = GGUFFile(source)
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


def check_embeddable(model: str | os.PathLike, out: str | os.PathLike | None = None, force: bool = False) -> None:
    """Raises FasaError where `rewrite` would, whatever the profile: to be asked before a calibration."""
    read_shape(_open(model, out, force)[0])


def rewrite(model: str | os.PathLike, profile: Profile | None, out: str | os.PathLike | None = None, force: bool = False,
            progress: Callable[[int, int], None] | None = None, warn: Callable[[str], None] | None = None) -> Path:
    """Write the model with this profile (None: without any), in place or to `out`; returns the path written.

    The new file appears under its name only when it is whole; a full disk or a kill leaves the old one. progress(done, total)
    counts bytes; warn(sentence) hears of doubts, default: to stderr. Raises FasaError, and nothing is written: the profile
    does not fit, the model is out of scope or not the first file of a split one, `out` exists and not force, no room.
    """
    header, source, target = _open(model, out, force)
    if profile is None:
        if not any(key.startswith("fasa.") for key in header.kv):
            raise FasaError(f"{model}: there is no FASA profile in this model, so there is nothing to remove")
    else:
        _check(header, profile)
    if profile is not None:
        for text in doubts(header, profile):
            (warn or (lambda text: print(f"fasa_gguf: {text}", file=sys.stderr)))(text)
    head = _header(header, profile)
    n_data = max(header.size - header.data_offset, 0) if header.tensors else 0
    try:
        free = shutil.disk_usage(target.parent).free
        if free < len(head) + n_data:
            raise FasaError(f"{target.parent}: not enough space: {len(head) + n_data} bytes are needed beside the model and {free} are free; "
                            "make room, or write to another disk with -o")
        with open(source, "rb") as f, _temporary(target.parent) as (fd, temporary):
            _write(fd, head)
            _copy(f.fileno(), fd, header.data_offset, n_data, progress)
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
    except OSError as e:
        raise FasaError(f"{target}: cannot be written: {e.strerror or e}; the model is as it was") from None
    return target


def embed(model: str | os.PathLike, profile: Profile, out: str | os.PathLike | None = None, force: bool = False,
          progress: Callable[[int, int], None] | None = None) -> Path:
    """The model with this profile instead of any it has; see rewrite."""
    return rewrite(model, profile, out, force, progress)


def remove(model: str | os.PathLike, out: str | os.PathLike | None = None, force: bool = False,
           progress: Callable[[int, int], None] | None = None) -> Path:
    """The model without its `fasa.*` keys, byte for byte what it was before; see rewrite."""
    return rewrite(model, None, out, force, progress)
