"""Long generation, dense beside FASA: where the texts part, how often the best token agrees, does either degenerate.

A prompt of text is prefilled dense and without its last token. Dense writes n tokens, greedily, end-of-generation
tokens barred. An arm is first fed dense's text, one token a step (teacher forcing). Its best token at every step gives
the agreement, and the first difference is where its own text leaves dense's. From there it goes on by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import runtime
from ..errors import FasaError
from ..profile.profile import Profile
from ..reasons import not_used
from ..report.columns import columns
from ..session import Session
from .arms import COUNTERS, Arm, ArmSwitch, Progress, needed_profile
from .journal import Journal
from .tasks import TaskSettings
from .text import cut_windows

BLOCK = 500  # tokens


def distinct_share(tokens: Sequence[int], n: int = 4) -> float:
    """Different n-grams by all n-grams, 0 to 1; 1 for a text shorter than n."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_repeat(tokens: Sequence[int]) -> int:
    """Tokens of the longest run that occurs at two places; the two may overlap, so a text that loops has a long one."""
    data = np.asarray(tokens, np.int32).tobytes()

    def repeats(n: int) -> bool:
        seen = set()
        for i in range(len(tokens) - n + 1):
            part = hash(data[4 * i : 4 * (i + n)])
            if part in seen:
                return True
            seen.add(part)
        return False

    low, high = 0, len(tokens)  # `low` repeats, `high` cannot
    while high - low > 1:
        mid = (low + high) // 2
        low, high = (mid, high) if repeats(mid) else (low, mid)
    return low


def equal_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens until the first difference; all of b when there is none."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(b))


class _Writer:
    """Best tokens of a session, end-of-generation tokens barred; counts steps for the progress bar."""

    def __init__(self, session: Session, progress: Progress | None, total: int) -> None:
        self.s, self.progress, self.total, self.done = session, progress, total, 0
        self.barred = [t for t in range(session.n_vocab) if session.llama.llama_vocab_is_eog(session.vocab, t)]

    def skip(self, n: int) -> None:
        self.done += n
        if self.progress:
            self.progress("generating", self.done, self.total)

    def best(self, token: int, pos: int) -> int:
        logits = self.s.decode([token], pos)
        logits[self.barred] = -np.inf
        self.skip(1)
        return int(logits.argmax())

    def write(self, token: int, pos: int, n: int) -> list[int]:
        out: list[int] = []
        for i in range(n):
            out.append(token := self.best(token, pos + i))
        return out


def _arm_piece(w: _Writer, switch: ArmSwitch, arm: Arm, prompt: Sequence[int], dense: Sequence[int]) -> dict[str, Any]:
    """forced: the arm's best token at every step of dense's text; tokens: its own text; counters of both.

    The cache holds the prompt without its last token.
    """
    s, at, n, forced = w.s, len(prompt) - 1, len(dense), []
    to_difference: Callable[[], None] | None = None
    switch.use(arm)
    for i, token in enumerate([prompt[-1], *dense[:-1]]):
        forced.append(w.best(token, at + i))
        if to_difference is None and forced[i] != dense[i]:
            to_difference = s.rewinder(at + i + 1)
    equal = equal_prefix(forced, dense)
    tokens = list(forced[: equal + 1])
    if to_difference and len(tokens) < n:
        to_difference()
        tokens += w.write(tokens[-1], at + equal + 1, n - len(tokens))
    w.skip(min(equal + 1, n))  # these it does not write again
    counters = s.fasa.counters()
    if arm.params is not None and not counters["steps_sparse"]:
        raise FasaError(f"arm {arm.name}: {not_used(s.fasa.step_reason_code())}")
    return {"forced": forced, "tokens": tokens, "counters": counters}


def _figures(arm: str, pieces: Sequence[dict[str, Any]], dense: Sequence[Sequence[int]]) -> dict[str, Any]:
    """One result: figures of every text, agreement over all of them."""
    same = [[a == b for a, b in zip(p["forced"], d, strict=True)] for p, d in zip(pieces, dense, strict=True)]
    agree = np.array(same, float)  # [n_text, n]
    texts = [p["tokens"] for p in pieces]
    c = {k: sum(p["counters"].get(k, 0) for p in pieces) for k in COUNTERS}
    return {
        "arm": arm,
        "n": agree.shape[1],
        "n_texts": len(texts),
        "agreement": float(agree.mean()),
        "agreement_blocks": [float(agree[:, i : i + BLOCK].mean()) for i in range(0, agree.shape[1], BLOCK)],
        "equal_prefix": [equal_prefix(t, d) for t, d in zip(texts, dense, strict=True)],
        "distinct_4": [distinct_share(t) for t in texts],
        "longest_repeat": [longest_repeat(t) for t in texts],
        "tokens_attended": c["tokens_attended"] / c["lists"] if c["lists"] else None,
        **{k: c[k] for k in COUNTERS[:4]},
    }


def _write_texts(
    s: Session,
    prompts: Sequence[Sequence[int]],
    arms: Sequence[Arm],
    n: int,
    profile: Profile | None,
    journal: Journal,
    progress: Progress | None,
) -> list[list[dict[str, Any]]]:
    """The pieces [arm][text], dense first: those that the journal has, and what is missing."""
    kept: list[list[dict[str, Any]]] = [[] for _ in range(1 + len(arms))]
    switch, w = ArmSwitch(s, profile), _Writer(s, progress, len(prompts) * n * (1 + 2 * len(arms)))
    for i, prompt in enumerate(prompts):
        rewind: Callable[[], None] | None = None
        for k, arm in enumerate([None, *arms]):
            key = f"{i}/{k}"
            if (piece := journal.get(key)) is not None:
                w.skip(n if arm is None else 2 * n)
                kept[k].append(piece)
                continue
            if rewind is None:
                switch.use(None)
                s.clear()
                s.decode(prompt[:-1], 0, logits="none")
                rewind = s.rewinder(len(prompt) - 1)
            rewind()
            if arm is None:
                tokens = w.write(prompt[-1], len(prompt) - 1, n)
                piece = {"forced": tokens, "tokens": tokens, "counters": {}}
            else:
                piece = _arm_piece(w, switch, arm, prompt, kept[0][i]["tokens"])
            journal.add(key, piece)
            kept[k].append(piece)
    return kept


def run_long(
    model: str | os.PathLike,
    arms: Sequence[Arm],
    n: int = 2000,
    context: int = 2048,
    texts: int = 1,
    settings: TaskSettings | None = None,
    profile: Profile | None = None,
    progress: Progress | None = None,
    resume: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """config, results (`rows`, dense first) and texts. n tokens follow `context` tokens of settings.text, at `texts`
    places.

    resume: a file that keeps the finished text of every arm. Raises FasaError when the text is too short, when the
    model has no room for context + n tokens, when an arm has no profile, and when an arm that asked for FASA ran no
    sparse step.
    """
    settings = settings or TaskSettings()
    if settings.text is None:
        raise FasaError("--task long continues a text: give -f FILE")
    profile = needed_profile(model, arms, profile)
    config = {"task": "long", **settings.describe(model, arms, profile), "n": n, "context": context, "texts": texts}
    with Journal(resume, config) as journal, settings.session(model, context + n, arms, profile) as s:
        if context + n > s.n_ctx_train:
            raise FasaError(
                f"{context} tokens of text and {n} written: {model} was trained on {s.n_ctx_train} tokens of context; "
                "use a smaller --window or -n"
            )
        prompts = [w[:context] for w in cut_windows(s, settings.text, texts, context)]
        kept = _write_texts(s, prompts, arms, n, profile, journal, progress)
        written = [[s.detokenize(p["tokens"]) for p in pieces] for pieces in kept]
    dense = [p["tokens"] for p in kept[0]]
    names = ["dense", *(a.name for a in arms)]
    return {
        "config": {**config, "llama_cpp_python": runtime.library.upstream_version()},
        "rows": [_figures(name, pieces, dense) for name, pieces in zip(names, kept, strict=True)],
        "texts": [{"arm": name, "texts": t} for name, t in zip(names, written, strict=True)],
    }


def format_long_text(results: Sequence[dict[str, Any]]) -> str:
    """For people: one line an arm; figures of several texts are means, the equal prefix is the shortest."""
    n = results[0]["n"]
    ends = [f"to {min(i + BLOCK, n)}" for i in range(0, n, BLOCK)]
    lines = [["arm", "tokens", "equal prefix", "same top", *ends, "distinct 4-grams", "longest repeat"]]
    for i, r in enumerate(results):
        used = "all" if i == 0 or r["tokens_attended"] is None else f"{r['tokens_attended']:.0f}"
        same = [str(min(r["equal_prefix"])), *(f"{share:.3f}" for share in [r["agreement"], *r["agreement_blocks"]])]
        degenerate = [f"{np.mean(r['distinct_4']):.3f}", f"{np.mean(r['longest_repeat']):.0f}"]
        lines.append([r["arm"], used, *(same if i else [""] * len(same)), *degenerate])
    dense = [
        f"{r['arm']}: {r['steps_dense']} of {r['steps_sparse'] + r['steps_dense']} steps were dense"
        for r in results[1:]
        if r["steps_sparse"] and r["steps_dense"]
    ]
    return "\n".join(columns(lines) + dense)
