"""Quality: teacher-forced decoding through the library that ships, FASA beside dense.

Of every window the prefix is prefilled, dense as always; then each arm decodes the same last tokens, one per step, from the
same cache (the scored tail is forgotten between arms). The dense arm takes its tail as one batch: the same attention, up to
rounding (`batched_dense=False` decodes it step by step): for one token on several threads upstream sums f16 values in f16, for
a batch in f32, and a quantised model's products differ too. Figures as llama-perplexity defines them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import runtime
from ..errors import FasaError
from ..reasons import not_used
from ..profile.profile import Profile
from ..report.columns import columns
from ..session import Session
from .arms import Arm, ArmSwitch, describe
from .journal import Journal, text_print


def detokenize_wikitext(text: str) -> str:
    """Undo WikiText's word tokenisation, so that a model reads prose."""
    for a, b in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" <unk> ", " "), ("( ", "("), (" 's", "'s")):
        text = text.replace(a, b)
    return re.sub(r" ([,.;:!?)])", r"\1", text)


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

    def row(self, dense: Score) -> dict[str, Any]:
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
            "kv_read_share": (c["bytes_fac"] + c["bytes_tip"]) / c["bytes_dense"] if sparse else 1.0,
            "kv_bytes_per_token": (c["bytes_fac"] + c["bytes_tip"]) / max(c.get("steps_sparse", 0), 1)
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


def score_tokens(
    dense: np.ndarray, arm: np.ndarray, target: np.ndarray, p: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(nll, KL(dense || arm), same top token), each [n], from log-probabilities [n, n_vocab] and next tokens [n]; p: exp(dense)."""
    nll = -np.take_along_axis(arm, target[:, None], -1)[:, 0]
    kl = ((np.exp(dense) if p is None else p) * (dense - arm)).sum(-1)
    return nll, kl, (dense.argmax(-1) == arm.argmax(-1)).astype(np.float64)


def one_by_one(counters: dict[str, int], n_tokens: int) -> dict[str, int]:
    """Counters of n_tokens decoded in a few batches as if each had been a step: what a batch counts once is counted for every token."""
    n = counters["steps_sparse"] + counters["steps_dense"]
    once = ("steps_sparse", "steps_dense", "layers_sparse", "layers_dense", "bytes_tip", "bytes_dense")
    return {**counters, **{key: counters[key] * n_tokens // n for key in once}}


def cut_windows(session: Session, text: str, windows: int, window: int, score: int = 1) -> list[list[int]]:
    """Token windows of window + 1 tokens, spread evenly over the text; their last `score` tokens do not overlap."""
    span = max(1, len(text) - 8 * window)  # a token has 8 characters at the most, taken together
    first = min(2000, span // 4)
    stride, out = (span - first) / windows, []
    for i in range(windows):
        part = text[first + int(i * stride) :][: 8 * window]
        tokens = session.tokenize(part)
        if len(tokens) < window + 1 or (windows > 1 and stride < score * len(part) / len(tokens)):
            raise FasaError(
                f"the text has {len(text)} characters, which is too short for {windows} windows of {window} tokens; "
                "use a longer -f TEXT, fewer --windows or a shorter --window"
            )
        out.append(tokens[: window + 1])
    return out


def _score_window(
    s: Session,
    switch: ArmSwitch,
    arms: Sequence[Arm | None],
    tokens: Sequence[int],
    prefix: int,
    batched_dense: bool,
    batch: int,
) -> Iterator[dict[str, Any]]:
    """nll, kl, hit and counters of one window's tail for every arm, None being dense. tokens: the window and one more."""
    switch.use(None)
    s.clear()
    s.decode(tokens[:prefix], 0, logits="none")
    tail, target = tokens[prefix:-1], np.array(tokens[prefix + 1 :])

    def by_steps(
        n: int = 1,
    ) -> Iterator[tuple[slice, np.ndarray]]:  # n tokens at a time, log-probabilities [n, n_vocab]
        for i in range(0, len(tail), n):
            yield slice(i, i + n), log_softmax(s.decode(tail[i : i + n], prefix + i, logits="all"))

    dense = (
        log_softmax(s.decode(tail, prefix, logits="all"))
        if batched_dense
        else np.concatenate([x for _, x in by_steps()])
    )
    p = np.exp(dense)
    for arm in arms:
        counters = {}
        if arm is None:
            nll, kl, hit = score_tokens(dense, dense, target, p)
        else:
            s.remove(0, prefix)
            switch.use(arm)
            each = [score_tokens(dense[at], x, target[at], p[at]) for at, x in by_steps(batch if arm.params else 1)]
            nll, kl, hit = (np.concatenate(x) for x in zip(*each))
            counters = s.fasa.counters()
            if arm.params is not None and counters["steps_sparse"] == 0:
                raise FasaError(f"arm {arm.name}: {not_used(s.fasa.step_reason_code())}")
            if batch > 1 and arm.params is not None:
                counters = one_by_one(counters, len(tail))
        yield {"nll": nll.tolist(), "kl": kl.tolist(), "hit": hit.tolist(), "counters": counters}


def evaluate(
    model: str | os.PathLike,
    text: str,
    arms: Sequence[Arm],
    windows: int = 10,
    window: int = 4096,
    score: int = 384,
    n_threads: int = 0,
    n_gpu_layers: int = 0,
    type_k: str = "f16",
    type_v: str = "f16",
    batched_dense: bool = True,
    profile: Profile | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    resume: str | os.PathLike | None = None,
    batch: int = 1,
    mode: str = "auto",
) -> list[dict[str, Any]]:
    """One row of figures per arm, dense first. window and score in tokens; all arms share a window's prefill and dense pass. mode: Session's.
    resume: a file that keeps every arm's finished windows; a rerun may ask for other arms too, and runs what is not there.
    batch: tokens that a FASA arm decodes at once, each with a selection of its own, as drafts are; max_tokens is raised to it.

    Raises FasaError when the text is too short, when no profile is there, and when an arm that asked for FASA ran no sparse step.
    """
    if windows < 1:
        raise FasaError(f"--windows {windows}: expected at least 1")
    if batch < 1:
        raise FasaError(f"--score-batch {batch}: expected at least 1")
    arms = [
        a if a.params is None else replace(a, params=a.params.replace(max_tokens=max(a.params.max_tokens, batch)))
        for a in arms
    ]
    if not 1 <= score < window:
        raise FasaError(f"--score {score}: expected 1 to {window - 1} (shorter than the window)")
    if profile is None and any(a.params and not a.profile for a in arms):
        profile = Profile.load(model)
    results = [Score("dense")] + [Score(a.name) for a in arms]
    report = progress or (lambda what, n, total: None)
    every: list[Arm | None] = [None, *arms]
    own = [describe(model, [a], profile, None, n_threads, n_gpu_layers, type_k, type_v)["arms"][0] for a in arms]
    keys = ["dense", *(f"{a.name} {text_print(json.dumps(d, sort_keys=True))}" for a, d in zip(arms, own))]
    journal = Journal(
        resume,
        {
            "task": "ppl",
            **describe(model, [], profile, text, n_threads, n_gpu_layers, type_k, type_v),
            "windows": windows,
            "window": window,
            "score": score,
            "batched_dense": batched_dense,
            **({"score_batch": batch} if batch > 1 else {}),
        },
    )
    with (
        journal,
        Session(
            model,
            n_ctx=window,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            type_k=type_k,
            type_v=type_v,
            mode=mode,
            arms=[a.params for a in arms if a.params],
            profile=profile,
        ) as s,
    ):
        if window > s.n_ctx_train:
            raise FasaError(
                f"--window {window}: {model} was trained on {s.n_ctx_train} tokens of context; use a shorter --window"
            )
        texts = cut_windows(s, text, windows, window, score)
        prefix, total, done = window - score, windows * (1 + len(arms)), 0
        switch = ArmSwitch(s, profile)
        for i_window, tokens in enumerate(texts):
            parts = [journal.get(f"{i_window} {key}") for key in keys]
            missing = [i for i, part in enumerate(parts) if part is None]
            done += len(keys) - len(missing)
            if missing:
                for i, part in zip(
                    missing, _score_window(s, switch, [every[i] for i in missing], tokens, prefix, batched_dense, batch)
                ):
                    parts[i] = part
                    journal.add(f"{i_window} {keys[i]}", part)
                    done += 1
                    report("evaluating", done, total)
            else:
                report("evaluating", done, total)
            for result, part in zip(results, parts):
                result.add(part)
        setup = {
            "build_commit": f"fasa_gguf {runtime.library.version()}, llama-cpp-python {runtime.library.LLAMA_CPP_VERSION}",
            "model_filename": str(model),
            "n_threads": n_threads or os.cpu_count() or 1,
            "n_gpu_layers": n_gpu_layers,
            "type_k": type_k,
            "type_v": type_v,
            "flash_attn": True,
            "fasa_mode": s.mode,
            "n_ctx": window,
            "n_windows": windows,
            "dense": "batch" if batched_dense else "steps",
            "score_batch": batch,
        }
    return [
        {**setup, **r.row(results[0]), "fasa": None if a is None or a.params is None else dict(a.params.__dict__)}
        for r, a in zip(results, every)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people: one line an arm, +- is the standard error; below it, what was dense in an arm that asked for FASA."""
    head = [
        "arm",
        "tokens",
        "ppl",
        "ppl ratio",
        "KL",
        "same top",
        "KV read",
        "K_dom/KV",
        "RMS dp",
        "KL median",
        "KL 99%",
    ]
    lines, notes = [head], []
    for r in rows:
        dense, steps, layers = (
            r["steps_dense"],
            r["steps_sparse"] + r["steps_dense"],
            r["layers_sparse"] + r["layers_dense"],
        )
        if dense and r["steps_sparse"]:
            notes.append(f"{r['arm']}: {dense} of {steps} steps were dense")
        if r["layers_dense"]:
            notes.append(
                f"{r['arm']}: {100 * r['layers_dense'] / layers:.0f}% of the layers were dense; tokens and KV read are the sparse layers'"
            )
        lines.append(
            [
                r["arm"],
                "all" if r["tokens_attended"] is None else f"{r['tokens_attended']:.0f}",
                f"{r['ppl']:.3f} +-{r['ppl_se']:.3f}",
                f"{100 * (r['ppl_ratio'] - 1):+.2f} +-{100 * r['ppl_ratio_se']:.2f}%",
                f"{r['kl']:.4f} +-{r['kl_se']:.4f}",
                f"{r['same_top']:.3f} +-{r['same_top_se']:.3f}",
                f"{100 * r['kv_read_share']:.1f}%",
                f"{100 * r['k_dom_share']:.1f}%",
                f"{100 * r['dp_rms']:.2f} +-{100 * r['dp_rms_se']:.2f}%",
                f"{r['kl_median']:.4f}",
                f"{r['kl_99']:.4f}",
            ]
        )
    return "\n".join(columns(lines) + notes)
