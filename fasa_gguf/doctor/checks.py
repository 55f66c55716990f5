"""The self-test of `doctor`: a tiny random model and single ops, against what they must give."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import reference as R
from .. import runtime
from ..errors import FasaError
from ..gguf.file import GGUFFile
from ..params import FasaParams
from ..profile.find import find_profile
from ..profile.profile import Profile
from ..reasons import Reason
from ..session import Session
from ..speed.results import SLOW_READ, dense_layers
from ..speed.timing import Timer
from ..speed.traffic import read_rate
from .facts import checkout_patches
from .nano import nano_profile, write_nano

OK, NOTE, FAILED = "ok", "note", "failed"
FILLED = 700  # cells of the laws; no multiple of a tile, a span or a page
STEPS = 6
DEPTH = 16384  # cells of the timing: 64 MiB of K and V of nano.py's model
BUDGET = 64
MOST_IDENTITY = 0.1  # of the logits' deviation. Rounding gives 0.02, 10 cells of 700 that are missing 0.2
COPY_BYTES = 128 << 20


@dataclass(frozen=True)
class Check:
    """One line of the self-test. status: OK, NOTE (worth a look, nothing is broken) or FAILED."""

    name: str
    status: str
    text: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


Progress = Callable[[str, int, int], None]


def run_checks(model: str | None, profile: str | None, n_threads: int, progress: Progress) -> list[Check]:
    """Every check in turn, about ten seconds without a model. One that cannot be made has FAILED, with its error."""
    out: list[Check] = []
    try:
        runtime.library.api()
    except FasaError as e:
        return [Check("library", FAILED, str(e))]
    out += [library_check(), patches_check()]
    backends = ["CPU", *runtime.devices.cuda_devices()]
    with tempfile.TemporaryDirectory() as folder:
        nano = Path(folder) / "nano.gguf"
        todo: list[tuple[str, Callable[[], list[Check]]]] = []
        for backend in backends:
            todo.append((f"lists, {backend}", lambda b=backend: [lists_check(b)]))  # type: ignore[misc]
        for backend in backends[:2]:
            todo.append((f"laws, {backend}", lambda b=backend: laws_checks(nano, b, n_threads)))  # type: ignore[misc]
        todo.append(("dense speed", lambda: [speed_check(str(nano), nano_profile(), DEPTH, n_threads)]))
        if model is not None:
            todo.append(("model", lambda: model_checks(model, profile, n_threads)))
        write_nano(nano)
        for i, (name, make) in enumerate(todo):
            progress("checking", i, len(todo))
            try:
                out += make()
            except (FasaError, OSError) as e:
                out.append(Check(name, FAILED, str(e)))
        progress("checking", len(todo), len(todo))
    return out


# ---- installation ----


def library_check() -> Check:
    """The library is loaded, and llama-cpp-python's structs are those of its llama.h (load() compares them)."""
    lib = runtime.library
    from .. import __version__

    if lib.version() != __version__:
        return Check(
            "library", FAILED, f"the library is of {lib.version()}, the package {__version__}; build or install it anew"
        )
    return Check("library", OK, f"{lib.version()}; llama-cpp-python {lib.upstream_version()}, whose structs fit")


def patches_check() -> Check:
    """The library is built from the patches that lie beside the package; without a checkout there are none."""
    try:
        built = runtime.library.patches()
    except AttributeError:
        return Check("patches", FAILED, "this library does not say which patches it has; build it anew")
    here = checkout_patches()
    other = sorted(name for name in {*built, *here} if built.get(name) != here.get(name)) if here else []
    if other:
        return Check("patches", NOTE, f"the library was built with others than this checkout has: {', '.join(other)}")
    return Check("patches", OK, f"{len(built)}" + (", those of this checkout" if here else ""))


# ---- ops ----


def lists_check(backend: str, n_kv: int = 333, seed: int = 1) -> Check:
    """TIP, SELECT and FAC of one layer on random cells, against reference.py: cells of the lists, and the output."""
    rng = np.random.default_rng(seed)
    n_head, n_head_kv, d, n_dom, budget = 4, 2, 64, 24, 40
    q = 2 * rng.standard_normal((1, 1, n_head, d)).astype(np.float32)
    k, v = (rng.standard_normal((1, n_kv, n_head_kv, d)).astype(np.float16).astype(np.float32) for _ in range(2))
    mask = np.zeros((1, 1, n_kv), np.float32)
    mask[:, :, n_kv - 30 :] = -np.inf
    dims = np.stack([rng.permutation(d)[:n_dom] for _ in range(n_head_kv)]).astype(np.int32)
    weight = rng.random((n_head_kv, n_dom)).astype(np.float32) + 0.5
    forced = np.arange(8, dtype=np.int32).reshape(1, 1, 8)
    got = runtime.ops.op_run(
        q=q, k=k, v=v, mask=mask, dims=dims, weight=weight, forced=forced, budget=budget, scale=d**-0.5, backend=backend
    )
    visible, must = np.isfinite(mask[0, 0]), np.arange(n_kv) < 8
    wrong, group = [], n_head // n_head_kv
    for h in range(n_head_kv):
        heads = slice(h * group, (h + 1) * group)
        keys = R.quantize_k_dom(k[0, :, h], dims[h], "q4")
        est = R.estimate(q[0, 0, heads], keys, dims[h], weight[h], d**-0.5, 0, "q4")
        cells = R.select(R.group_score(est, visible), visible, must, group, budget, 0.0, 0, 0)
        listed = got["list"][0, 0, h, : got["count"][0, 0, h]]
        out = R.attend(q[0, 0, heads], k[0, :, h], v[0, :, h], listed, d**-0.5, 0.0, None)
        if len(set(listed.tolist()) ^ set(np.asarray(cells).tolist())) > 2:  # near-equal scores at the edge
            wrong.append(f"KV head {h}: lists differ")
        if not np.allclose(got["out"][0, 0, heads], out, atol=2e-3):
            wrong.append(f"KV head {h}: outputs differ by {np.abs(got['out'][0, 0, heads] - out).max():.2g}")
    what = f"{n_head_kv} lists of {budget} cells equal the reference's"
    return Check(f"lists, {backend}", FAILED if wrong else OK, "; ".join(wrong) or what)


# ---- a model ----


def laws_checks(model: Path, backend: str, n_threads: int) -> list[Check]:
    """With a budget that takes all cells FASA is dense attention, and the counters say what was done."""
    gpu = backend != "CPU"
    all_cells = FasaParams(chunks=32, budget=4096, k_dom="f16", min_context=0, min_context_gpu=0)
    some = FasaParams(budget=BUDGET, min_context=0, min_context_gpu=0)
    with Session(model, n_ctx=1024, n_threads=n_threads, n_gpu_layers=-1 if gpu else 0) as s:
        s.fasa.set_profile(nano_profile())
        tokens = np.random.default_rng(0).integers(1, s.n_vocab, FILLED + STEPS).tolist()
        s.decode(tokens[:FILLED], 0, logits="none")
        rows, counters = [], []
        for params in (None, all_cells, some):
            s.fasa.set_params(params)
            s.remove(0, FILLED)
            s.fasa.reset_counters()
            rows.append(np.stack([s.decode([t], FILLED + i) for i, t in enumerate(tokens[FILLED:])]))
            counters.append(s.fasa.counters())
        n_layer = s.fasa.model_info()["n_layer"]
        reasons = dense_layers(s.fasa.layer_reason_codes())
    same, other = (float(np.abs(row - rows[0]).max() / rows[0].std()) for row in rows[1:])
    law = Check(
        f"identity, {backend}",
        OK if same <= MOST_IDENTITY < other else FAILED,
        f"with a budget for all cells logits differ from dense by {same:.1g} of their deviation ({MOST_IDENTITY:g} "
        f"allowed), with {BUDGET} of {FILLED} by {other:.1g}",
    )
    return [law, _counters_check(backend, counters[1], counters[2], n_layer, reasons)]


def _counters_check(backend: str, full: dict[str, int], part: dict[str, int], n_layer: int, reasons: str) -> Check:
    name, wrong = f"counters, {backend}", []
    for c in (full, part):
        if (c["steps_sparse"], c["steps_dense"], c["layers_sparse"]) != (STEPS, 0, STEPS * n_layer):
            wrong.append(f"{c['steps_sparse']} of {STEPS} steps sparse{f', {reasons}' if reasons else ''}")
    if full["tokens_attended"] != full["tokens_visible"]:
        wrong.append(f"{full['tokens_attended']} tokens attended of {full['tokens_visible']} with a budget for all")
    if part["tokens_attended"] != BUDGET * part["lists"]:
        wrong.append(f"{part['tokens_attended']} tokens in {part['lists']} lists of {BUDGET}")
    return Check(name, FAILED if wrong else OK, "; ".join(wrong) or f"{STEPS} of {STEPS} steps sparse, {BUDGET} tokens")


def speed_check(model: str, profile: Profile | None, depth: int, n_threads: int) -> Check:
    """How fast dense attention reads a cache of `depth` random cells, against a plain read by the same threads."""
    with Session(model, n_ctx=-(-(depth + 64) // 256) * 256, n_threads=n_threads) as s:
        if profile is not None:
            s.fasa.set_profile(profile)
        timer = Timer(s, 1, "random", lambda what, done, total: None)
        base = min(timer.empty_step(4) for _ in range(3))
        timer.fill(depth)
        dense = min(1 / timer.generate(None, depth, 4).speed for _ in range(3))
        n_bytes = s.fasa.counters()["bytes_kv"] * depth // s.n_ctx
        plain = max(read_rate(s.fasa, depth) or 0.0 for _ in range(3))
    copy = runtime.devices.copy_rate("CPU", COPY_BYTES, n_threads)
    if base > 0.75 * dense:  # what the cache adds to a step is noise, as Result.kv_rate has it
        text = f"not measured: a step takes {1000 * base:.2f} ms without a cache, {1000 * dense:.2f} with {depth} cells"
        return Check("dense speed", NOTE, text + _busy())
    rate = n_bytes / (dense - base)
    text = (
        f"dense reads {n_bytes / 1e6:.0f} MB of K and V at {rate / 1e9:.1f} GB/s, a plain read {plain / 1e9:.1f}, "
        f"a copy moves {copy / 1e9:.1f}"
    )
    if plain and rate < SLOW_READ * plain:
        more = ": dense attention is far below what the memory allows; FASA's gain over it is not memory alone"
        return Check("dense speed", NOTE, text + more + _busy())
    return Check("dense speed", OK, text)


def _busy() -> str:
    """That others use the CPUs too, which a timing cannot tell from slow memory; "" when they do not."""
    load, cores = os.getloadavg()[0], runtime.cpus.usable_cores()
    return f"; the machine is busy (load {load:.1f} on {cores} cores): measure again when it is not" * (
        load > cores + 1
    )


def model_checks(model: str, profile: str | None, n_threads: int) -> list[Check]:
    """A user's model: its file, its profile, and which layers run sparse."""
    gguf = GGUFFile(model)
    size = sum(t.n_bytes for t in gguf.tensors)
    out = [Check("model", OK, f"{model}: {gguf.arch}, {size / 1e9:.2f} GB")]
    found = find_profile(gguf, profile)
    if found is None:
        what = f"none; make one with `fasa-gguf embed-profile {model}`"
        return [*out, Check("profile", NOTE, what)]
    out.append(Check("profile", OK, f"{found.ranking_method}, {sum(n > 0 for n in found.n_chunk)} layers ranked"))
    params = found.params().replace(min_context=0, min_context_gpu=0)
    with Session(model, n_ctx=1024, n_threads=n_threads) as s:
        s.fasa.set_profile(found)
        s.fasa.set_params(params)
        tokens: Sequence[int] = [1 + i % (s.n_vocab - 1) for i in range(FILLED)]
        s.decode(tokens, 0, logits="none")
        rows: Any = [s.decode([1 + i], FILLED + i) for i in range(STEPS)]
        c, reasons = s.fasa.counters(), s.fasa.layer_reason_codes()
        why = s.fasa.step_reason_code()
    sparse, dense = sum(x == Reason.NONE for x in reasons), dense_layers(reasons)
    if not np.isfinite(np.stack(rows)).all():
        return [*out, Check("sparse layers", FAILED, "the logits are not finite numbers")]
    if c["steps_sparse"] != STEPS:
        return [*out, Check("sparse layers", FAILED, f"no step was sparse: {why.text or dense}")]
    out.append(Check("sparse layers", OK, f"{sparse}{f'; {dense}' if dense else ''}"))
    return [*out, speed_check_of(model, found, n_threads)]


def speed_check_of(model: str, profile: Profile, n_threads: int) -> Check:
    """The same as speed_check with the user's model, at a depth that takes a second or two."""
    start = time.perf_counter()
    check = speed_check(model, profile, 4096, n_threads)
    return Check("dense speed, model", check.status, f"{check.text} ({time.perf_counter() - start:.0f} s)")
