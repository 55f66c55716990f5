"""Quality: teacher-forced decoding through the library that ships, FASA beside dense.

Of every window the prefix is prefilled, dense as always; then each arm decodes the same last tokens, one per step, from the
same cache (the scored tail is forgotten between arms). The dense arm takes its tail as one batch: the same attention, up to
rounding (`batched_dense=False` decodes it step by step). Figures as llama-perplexity defines them.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Sequence

import numpy as np

from .errors import FasaError
from .params import FasaParams
from .profile import Profile
from .session import Session


def detokenize_wikitext(text: str) -> str:
    """Undo WikiText's word tokenisation, so that a model reads prose."""
    for a, b in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" <unk> ", " "), ("( ", "("), (" 's", "'s")):
        text = text.replace(a, b)
    return re.sub(r" ([,.;:!?)])", r"\1", text)


@dataclass
class Arm:
    """What is decoded: params None is dense; profile None is the model's own."""

    name: str
    params: FasaParams | None = None
    profile: Profile | None = None


@dataclass
class Score:
    """Per scored token, then summed up: nll and kl in nats, hit: the arm's best token is dense's."""

    arm: str
    nll: list[np.ndarray] = field(default_factory=list)   # [n_scored] per window
    kl: list[np.ndarray] = field(default_factory=list)
    hit: list[np.ndarray] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)

    def add_counters(self, new: dict[str, int]) -> None:
        for key, n in new.items():
            self.counters[key] = n if key in ("bytes_k_dom", "bytes_kv") else self.counters.get(key, 0) + n

    def row(self, dense: "Score") -> dict[str, Any]:
        """The figures of one arm by name; *_se is the standard error over tokens."""
        nll, base = np.concatenate(self.nll), np.concatenate(dense.nll)
        kl, hit = np.concatenate(self.kl), np.concatenate(self.hit)
        root = math.sqrt(len(nll))
        ratio = math.exp(float((nll - base).mean()))
        c = self.counters
        sparse = c.get("layers_sparse", 0) > 0
        return {"arm": self.arm, "n_scored": len(nll), "ppl": math.exp(float(nll.mean())), "ppl_se": math.exp(float(nll.mean())) * float(nll.std(ddof=1)) / root,
                "ppl_ratio": ratio, "ppl_ratio_se": ratio * float((nll - base).std(ddof=1)) / root,
                "kl": float(kl.mean()), "kl_se": float(kl.std(ddof=1)) / root, "same_top": float(hit.mean()), "same_top_se": float(hit.std(ddof=1)) / root,
                "tokens_attended": c["rows_attended"] / c["lists"] if sparse else None,
                "kv_read_share": (c["bytes_fac"] + c["bytes_tip"]) / c["bytes_dense"] if sparse else 1.0,
                "k_dom_share": c["bytes_k_dom"] / c["bytes_kv"] if sparse else 0.0,
                "steps_sparse": c.get("steps_sparse", 0), "steps_dense": c.get("steps_dense", 0)}


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, float32 [..., n_vocab]."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def score_tokens(dense: np.ndarray, arm: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(nll, KL(dense || arm), same top token), each [n], from log-probabilities [n, n_vocab] and next tokens [n]."""
    nll = -np.take_along_axis(arm, target[:, None], -1)[:, 0]
    kl = (np.exp(dense) * (dense - arm)).sum(-1)
    return nll, kl, (dense.argmax(-1) == arm.argmax(-1)).astype(np.float64)


def cut_windows(session: Session, text: str, windows: int, window: int) -> list[list[int]]:
    """Token windows of window + 1 tokens, spread evenly over the text."""
    size, out = len(text), []
    span = max(1, size - 8 * window)
    for i in range(windows):
        at = min(2000, span // 4) + int(i * (span - min(2000, span // 4)) / max(1, windows))
        tokens = session.tokenize(text[at : at + 8 * window])[: window + 1]
        if len(tokens) < window + 1:
            raise FasaError(f"the text has {size} characters, which is too short for {windows} windows of {window} tokens; use a longer -f TEXT, fewer --windows or a shorter --window")
        out.append(tokens)
    return out


def evaluate(model: str | os.PathLike, text: str, arms: Sequence[Arm], windows: int = 10, window: int = 4096, score: int = 384,
             n_threads: int = 0, n_gpu_layers: int = 0, type_k: str = "f16", type_v: str = "f16", batched_dense: bool = True,
             profile: Profile | None = None, progress: Callable[[str, int, int], None] | None = None) -> list[dict[str, Any]]:
    """One row of figures per arm, dense first. window and score in tokens.

    Raises FasaError when the text is too short, when no profile is there, and when an arm that asked for FASA ran no sparse step.
    """
    if not 1 <= score < window:
        raise FasaError(f"--score {score}: expected 1 to {window - 1} (shorter than the window)")
    if profile is None and any(a.params and not a.profile for a in arms):
        profile = Profile.load(model)
    results = [Score("dense")] + [Score(a.name) for a in arms]
    report = progress or (lambda what, n, total: None)
    with Session(model, n_ctx=window, n_threads=n_threads, n_gpu_layers=n_gpu_layers, type_k=type_k, type_v=type_v) as s:
        texts = cut_windows(s, text, windows, window)
        prefix, total, done = window - score, windows * (1 + len(arms)), 0
        attached: Profile | None = None
        for tokens in texts:
            s.fasa.set_params(None)
            s.clear()
            s.decode(tokens[:prefix], 0, logits="none")
            tail, target = tokens[prefix:window], np.array(tokens[prefix + 1 : window + 1])

            def by_steps() -> np.ndarray:
                return log_softmax(np.stack([s.decode([t], prefix + i) for i, t in enumerate(tail)]))

            dense = log_softmax(s.decode(tail, prefix, logits="all")) if batched_dense else by_steps()
            for result, arm in zip(results, [None, *arms]):
                if arm is None:
                    logp = dense
                else:
                    s.remove(0, prefix)
                    wanted = arm.profile or profile
                    if arm.params is not None and attached is not wanted:
                        s.fasa.set_params(None)
                        s.fasa.set_profile(wanted)
                        attached = wanted
                    s.fasa.set_params(arm.params)
                    s.fasa.reset_counters()
                    logp = by_steps()
                    result.add_counters(s.fasa.counters())
                    if arm.params is not None and result.counters["steps_sparse"] == 0:
                        raise FasaError(f"arm {arm.name}: FASA was asked for and no step used it: {s.fasa.step_reason()}")
                nll, kl, hit = score_tokens(dense, logp, target)
                result.nll.append(nll)
                result.kl.append(kl)
                result.hit.append(hit)
                done += 1
                report("evaluating", done, total)
    return [r.row(results[0]) for r in results]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people: one line an arm, +- is the standard error."""
    head = f"{'arm':<28} {'tokens':>7} {'ppl':>8} {'ppl ratio':>16} {'KL':>16} {'same top':>15} {'KV read':>8} {'K_dom/KV':>9}"
    lines = [head]
    for r in rows:
        tokens = "all" if r["tokens_attended"] is None else f"{r['tokens_attended']:.0f}"
        lines.append(f"{r['arm']:<28} {tokens:>7} {r['ppl']:>8.3f} {100 * (r['ppl_ratio'] - 1):>+8.2f} +-{100 * r['ppl_ratio_se']:.2f} %"
                     f" {r['kl']:>8.4f} +-{r['kl_se']:.4f} {r['same_top']:>7.3f} +-{r['same_top_se']:.3f} {100 * r['kv_read_share']:>7.1f}% {100 * r['k_dom_share']:>8.1f}%")
    return "\n".join(lines)
