"""Perplexity and KL: teacher-forced decoding through the shipped library, FASA beside dense.

The prefix of every window is prefilled dense, once for all arms, or with `own_prompt` by each arm with its own settings
(the figures are then those of the whole: prompt and decoding). Then each arm decodes the same last tokens, one per
step; the scored tail is forgotten between arms. The dense arm takes its tail as one batch (of a large vocabulary,
LOGITS bytes of it at a time), which is the same attention up to rounding: for one token on several threads upstream
sums f16 values in f16, for a batch in f32, and a quantised model's products differ too. `batched_dense=False` decodes
it as the arms decode: step by step, or score_batch tokens at a time. Figures as llama-perplexity defines them.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..counters import bytes_read, read_share
from ..errors import FasaError
from ..profile.profile import Profile
from ..reasons import not_used
from ..report.columns import columns
from ..runtime.machine import Machine
from ..runtime.settings import ContextSettings
from ..session import Session
from .arms import Arm, ArmSwitch, Progress, check_ubatches, dense_share, describe, describe_arm, needed_profile
from .journal import Journal, text_print
from .text import cut_windows

LOGITS = 128 << 20  # bytes of logits of one batch of dense: all scored tokens, unless the vocabulary is large


@dataclass(frozen=True)
class WindowSettings:
    """Which tokens of a text are scored, and how they are decoded."""

    windows: int = 10
    window: int = 4096  # tokens
    score: int = 384  # last tokens of a window that are decoded and scored
    batched_dense: bool = True  # dense decodes the tail as one batch; False: score_batch tokens at a time, as the arms
    own_prompt: bool = False  # every arm processes the prefix with its own settings, sparsely where `prefill` says so
    score_batch: int = 1  # tokens that an arm decodes at once, each with lists of its own, as drafts are

    def check(self) -> WindowSettings:
        """Returns self, or raises FasaError naming the first setting that is out of range."""
        if self.windows < 1:
            raise FasaError(f"--windows {self.windows}: expected at least 1")
        if self.score_batch < 1:
            raise FasaError(f"--score-batch {self.score_batch}: expected at least 1")
        if not 1 <= self.score < self.window:
            raise FasaError(f"--score {self.score}: expected 1 to {self.window - 1} (shorter than the window)")
        return self

    def as_dict(self) -> dict[str, Any]:
        """What a finished window depends on, for its journal."""
        out = {
            "windows": self.windows,
            "window": self.window,
            "score": self.score,
            "batched_dense": self.batched_dense,
        }
        out |= {"own_prompt": True} if self.own_prompt else {}
        if self.score_batch > 1:
            out |= {"score_batch": self.score_batch} | ({} if self.batched_dense else {"dense_batch": self.score_batch})
        return out


@dataclass
class Score:
    """Per scored token, then summed up: nll and kl in nats, hit: the arm's best token is dense's."""

    arm: str
    nll: list[np.ndarray] = field(default_factory=list)  # [n_scored] per window
    kl: list[np.ndarray] = field(default_factory=list)
    hit: list[np.ndarray] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)

    def add_counters(self, new: dict[str, int]) -> None:
        for key, n in new.items():
            self.counters[key] = n if key in ("bytes_k_dom", "bytes_kv") else self.counters.get(key, 0) + n

    def add(self, part: dict[str, Any]) -> None:
        """One more window: nll, kl and hit, lists of numbers, and counters."""
        for name in ("nll", "kl", "hit"):
            getattr(self, name).append(np.array(part[name]))
        self.add_counters(part["counters"])

    def figures(self, dense: Score) -> dict[str, Any]:
        """The figures of one arm by name; *_se is the standard error over tokens."""

        def se(x: np.ndarray) -> float:
            return float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else 0.0

        nll, base = np.concatenate(self.nll), np.concatenate(dense.nll)
        kl, hit = np.concatenate(self.kl), np.concatenate(self.hit)
        ppl, ratio = math.exp(float(nll.mean())), math.exp(float((nll - base).mean()))
        dp = np.exp(-nll) - np.exp(-base)  # change of the true token's probability
        rms = math.sqrt(float((dp**2).mean()))
        c = self.counters
        sparse = c.get("layers_sparse", 0) > 0
        return {
            "arm": self.arm,
            "n_scored": len(nll),
            "ppl": ppl,
            "ppl_se": ppl * se(nll),
            "ppl_ratio": ratio,
            "ppl_ratio_se": ratio * se(nll - base),
            "kl": float(kl.mean()),
            "kl_se": se(kl),
            "kl_median": float(np.median(kl)),
            "kl_99": float(np.quantile(kl, 0.99)),
            "dp_mean": float(dp.mean()),
            "dp_mean_se": se(dp),
            "dp_rms": rms,
            "dp_rms_se": 0.5 / rms * se(dp**2) if rms > 0 else 0.0,
            "same_top": float(hit.mean()),
            "same_top_se": se(hit),
            "tokens_attended": c["tokens_attended"] / c["lists"] if sparse else None,
            "prefill_share": c.get("prefill_attended", 0) / c["prefill_visible"] if c.get("prefill_visible") else None,
            "kv_read_share": read_share(c) if sparse else 1.0,
            "kv_bytes_per_token": bytes_read(c) / max(c.get("steps_sparse", 0) + c.get("steps_dense", 0), 1)
            if sparse
            else None,
            "k_dom_share": c["bytes_k_dom"] / c["bytes_kv"] if sparse else 0.0,
            "steps_sparse": c.get("steps_sparse", 0),
            "steps_dense": c.get("steps_dense", 0),
            "layers_sparse": c.get("layers_sparse", 0),
            "layers_dense": c.get("layers_dense", 0),
        }


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, float32 [..., n_vocab]."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def score_tokens(dense: np.ndarray, arm: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(nll, KL(dense || arm), same top token), each [n].

    dense and arm: log-probabilities [n, n_vocab]; target: the next tokens [n].
    """
    nll = -np.take_along_axis(arm, target[:, None], -1)[:, 0]
    kl = (np.exp(dense) * (dense - arm)).sum(-1)
    return nll, kl, (dense.argmax(-1) == arm.argmax(-1)).astype(np.float64)


def one_by_one(counters: dict[str, int], n_tokens: int) -> dict[str, int]:
    """Counters of n_tokens decoded in a few batches, as if each token had been a step of its own.

    What a batch counts once is counted for every token.
    """
    n = counters["steps_sparse"] + counters["steps_dense"]
    steps, layers = ("steps_sparse", "steps_dense"), ("layers_sparse", "layers_dense")
    once = (*steps, *layers, "bytes_tip", "bytes_dense", "bytes_layers_dense")
    return {**counters, **{key: counters[key] * n_tokens // n for key in once if key in counters}}


# ---- decoding ----


class _Rows:
    """Log-probabilities of dense, a row a token; beyond MEMORY bytes in a temporary file, not in memory."""

    MEMORY = 128 << 20

    def __init__(self, n_vocab: int) -> None:
        self.n_bytes = 4 * n_vocab
        self._file = tempfile.SpooledTemporaryFile(self.MEMORY)  # noqa: SIM115, closed with its last reference

    def add(self, row: np.ndarray) -> None:
        """The next token's, float32 [n_vocab]. Raises FasaError when the file's disk is full."""
        try:
            self._file.write(row.astype(np.float32).tobytes())
        except OSError as e:
            raise FasaError(
                f"{tempfile.gettempdir()}: dense's logits cannot be kept there: {e.strerror or e}; set TMPDIR to a "
                f"folder with more room, or use a smaller --score (a token takes {self.n_bytes / 2**20:.2g} MiB)"
            ) from None

    def __getitem__(self, i: int) -> np.ndarray:
        self._file.seek(i * self.n_bytes)
        return np.frombuffer(self._file.read(self.n_bytes), np.float32)


def _score_window(
    s: Session, switch: ArmSwitch, arms: Sequence[Arm | None], tokens: Sequence[int], windows: WindowSettings
) -> Iterator[dict[str, Any]]:
    """nll, kl, hit and counters of one window's tail for every arm, None being dense.

    tokens: the window and one more. One token's logits are held at a time, beside a batch's in llama.cpp.
    """
    prefix = windows.window - windows.score
    switch.use(None)
    s.clear()
    s.decode(tokens[:prefix], 0, logits="none")
    tail, target = tokens[prefix:-1], np.array(tokens[prefix + 1 :])
    rewind, dense = s.rewinder(prefix), _Rows(s.n_vocab)
    at_once = max(LOGITS // dense.n_bytes, 1) if windows.batched_dense else windows.score_batch
    for row in s.decode_rows(tail, prefix, n=at_once):
        dense.add(log_softmax(row))
    for arm in arms:
        counters: dict[str, int] = {}
        if arm is None:
            parts = [score_tokens(dense[i][None], dense[i][None], target[i : i + 1]) for i in range(len(tail))]
        else:
            if windows.own_prompt:
                switch.use(arm)
                arm.read_prompt(s, tokens[:prefix])
            else:
                rewind()
                switch.use(arm)
            with s.fasa.step_kind("decode"):
                as_dense = arm.params is None and windows.batched_dense  # shows the noise of decoding by steps
                rows = s.decode_rows(tail, prefix, n=1 if as_dense else windows.score_batch)
                parts = [
                    score_tokens(dense[i][None], log_softmax(row)[None], target[i : i + 1])
                    for i, row in enumerate(rows)
                ]
            counters = s.fasa.counters()
            if arm.params is not None and not counters["steps_sparse"] + counters["steps_prefill_sparse"]:
                raise FasaError(f"arm {arm.name}: {not_used(s.fasa.step_reason_code())}")
            if windows.score_batch > 1 and arm.params is not None:
                counters = one_by_one(counters, len(tail))
        nll, kl, hit = (np.concatenate(x).tolist() for x in zip(*parts, strict=True))
        yield {"nll": nll, "kl": kl, "hit": hit, "counters": counters}


def _score_all(
    s: Session,
    texts: Sequence[Sequence[int]],
    keys: Sequence[str],
    arms: Sequence[Arm | None],
    windows: WindowSettings,
    switch: ArmSwitch,
    journal: Journal,
    progress: Progress | None,
) -> list[Score]:
    """The scores of all arms over all windows. Windows that the journal has by an arm's key are not run again."""
    total, done = len(texts) * len(arms), 0
    scores = [Score(arm.name if arm else "dense") for arm in arms]
    for i_window, tokens in enumerate(texts):
        parts = [journal.get(f"{i_window} {key}") for key in keys]
        missing = [i for i, part in enumerate(parts) if part is None]
        done += len(keys) - len(missing)
        if missing:
            found = _score_window(s, switch, [arms[i] for i in missing], tokens, windows)
            for i, part in zip(missing, found, strict=True):
                parts[i] = part
                journal.add(f"{i_window} {keys[i]}", part)
                done += 1
                if progress:
                    progress("evaluating", done, total)
        elif progress:
            progress("evaluating", done, total)
        for score, part in zip(scores, parts, strict=True):
            score.add(part)
    return scores


def _config(model: str | os.PathLike, windows: WindowSettings, settings: ContextSettings, mode: str) -> dict[str, Any]:
    """What every result says about its run, by llama-bench's names where it has them."""
    machine = Machine.here(settings.n_threads)
    return {
        "build_commit": machine.build,
        "model_filename": str(model),
        "n_threads": machine.n_threads,
        "n_gpu_layers": settings.n_gpu_layers,
        "type_k": settings.type_k,
        "type_v": settings.type_v,
        "flash_attn": settings.flash_attn,
        "fasa_mode": mode,
        "n_ctx": windows.window,
        "n_windows": windows.windows,
        "dense": "batch" if windows.batched_dense else "steps",
        "score_batch": windows.score_batch,
    }


def evaluate(
    model: str | os.PathLike,
    text: str,
    arms: Sequence[Arm],
    windows: WindowSettings | None = None,
    settings: ContextSettings | None = None,
    *,
    profile: Profile | None = None,
    progress: Progress | None = None,
    resume: str | os.PathLike | None = None,
) -> list[dict[str, Any]]:
    """The figures of every arm, dense first. All arms share a window's prefill and dense pass.

    settings: of the context, whose n_ctx becomes the window; default: mode auto. resume: a file that keeps every arm's
    finished windows; a rerun may ask for other arms too, and runs only what is missing. Arms' max_tokens is raised to
    windows.score_batch.

    Raises FasaError when the text is too short, when an arm has no profile, and when an arm that asked for FASA ran no
    sparse step.
    """
    windows = (windows or WindowSettings()).check()
    settings = (settings or ContextSettings(mode="auto")).replace(n_ctx=windows.window)
    check_ubatches(arms, windows.own_prompt, settings)
    most = windows.score_batch
    arms = [
        a if a.params is None else replace(a, params=a.params.replace(max_tokens=max(a.params.max_tokens, most)))
        for a in arms
    ]
    profile = needed_profile(model, arms, profile)
    every: list[Arm | None] = [None, *arms]
    prints = [text_print(json.dumps(describe_arm(a, profile), sort_keys=True)) for a in arms]
    keys = ["dense", *(f"{a.name} {p}" for a, p in zip(arms, prints, strict=True))]
    journal = Journal(resume, {"task": "ppl", **describe(model, [], profile, text, settings), **windows.as_dict()})
    with journal, Session(model, settings, arms=[a.params for a in arms if a.params], profile=profile) as s:
        if windows.window > s.n_ctx_train:
            raise FasaError(
                f"--window {windows.window}: {model} was trained on {s.n_ctx_train} tokens of context; "
                "use a shorter --window"
            )
        texts = cut_windows(s, text, windows.windows, windows.window, windows.score)
        scores = _score_all(s, texts, keys, every, windows, ArmSwitch(s, profile), journal, progress)
        config = _config(model, windows, settings, s.mode)
    return [
        {**config, **x.figures(scores[0]), "fasa": None if a is None or a.params is None else dict(a.params.__dict__)}
        for x, a in zip(scores, every, strict=True)
    ]


# ---- for people ----


def loss_text(result: dict[str, Any]) -> str:
    """Perplexity against dense, with its standard error, in percent."""
    return f"{100 * (result['ppl_ratio'] - 1):+.2f} +-{100 * result['ppl_ratio_se']:.2f}%"


def _notes(result: dict[str, Any]) -> list[str]:
    """What was dense in an arm that asked for FASA."""
    out, dense = [], result["steps_dense"]
    if dense and result["steps_sparse"]:
        out.append(f"{result['arm']}: {dense} of {result['steps_sparse'] + dense} steps were dense")
    if result.get("prefill_share") is not None:
        out.append(f"{result['arm']}: its prompts attended {100 * result['prefill_share']:.0f}% of the cells")
    if (share := dense_share(result)) > 0:
        out.append(f"{result['arm']}: {100 * share:.0f}% of the layers were dense; tokens are the sparse layers'")
    return out


def format_scores(results: Sequence[dict[str, Any]]) -> str:
    """For people: one line an arm, +- is the standard error; below it, what was dense in an arm that asked for FASA."""
    head = ["arm", "tokens", "ppl", "ppl ratio", "KL", "same top", "KV read", "K_dom/KV"]
    head += ["RMS dp", "KL median", "KL 99%"]
    lines = [
        [
            r["arm"],
            "all" if r["tokens_attended"] is None else f"{r['tokens_attended']:.0f}",
            f"{r['ppl']:.3f} +-{r['ppl_se']:.3f}",
            loss_text(r),
            f"{r['kl']:.4f} +-{r['kl_se']:.4f}",
            f"{r['same_top']:.3f} +-{r['same_top_se']:.3f}",
            f"{100 * r['kv_read_share']:.1f}%",
            f"{100 * r['k_dom_share']:.1f}%",
            f"{100 * r['dp_rms']:.2f} +-{100 * r['dp_rms_se']:.2f}%",
            f"{r['kl_median']:.4f}",
            f"{r['kl_99']:.4f}",
        ]
        for r in results
    ]
    return "\n".join(columns([head, *lines]) + [note for r in results for note in _notes(r)])
