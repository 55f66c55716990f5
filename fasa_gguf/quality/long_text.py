"""Long generation, dense beside FASA: how far the texts are equal, how often the best token is, and does either degenerate.

A prompt of text is prefilled dense and without its last token. Dense writes n tokens, greedily, end-of-generation tokens barred. An
arm is first fed dense's text, one token a step (teacher forcing): its best token at every step gives the agreement, and
the first difference is where its own text leaves dense's. From there it goes on by itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import runtime
from ..errors import FasaError
from ..reasons import not_used
from ..profile.profile import Profile
from ..report.columns import columns
from ..session import Session
from .arms import Arm, ArmSwitch
from .journal import Journal
from .perplexity import cut_windows
from .tasks import COUNTERS, Progress, Setup

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
    """forced: the arm's best token at every step of dense's text; tokens: its own text; counters of both."""
    s, at, n = w.s, len(prompt) - 1, len(dense)
    s.remove(0, at)
    switch.use(arm)
    forced = [w.best(t, at + i) for i, t in enumerate([prompt[-1], *dense[:-1]])]
    equal = next((i for i, (a, b) in enumerate(zip(forced, dense)) if a != b), n)
    tokens = list(forced[: equal + 1])
    if len(tokens) < n:
        s.remove(0, at + equal + 1)
        tokens += w.write(tokens[-1], at + equal + 1, n - len(tokens))
    w.skip(min(equal + 1, n))  # what it need not write again
    counters = s.fasa.counters()
    if arm.params is not None and not counters["steps_sparse"]:
        raise FasaError(f"arm {arm.name}: {not_used(s.fasa.step_reason_code())}")
    return {"forced": forced, "tokens": tokens, "counters": counters}


def _figures(arm: str, pieces: Sequence[dict[str, Any]], dense: Sequence[Sequence[int]]) -> dict[str, Any]:
    """One row: figures of every text, agreement over all of them."""
    agree = np.array([[a == b for a, b in zip(p["forced"], d)] for p, d in zip(pieces, dense)], float)  # [n_text, n]
    texts = [p["tokens"] for p in pieces]
    c = {k: sum(p["counters"].get(k, 0) for p in pieces) for k in COUNTERS}
    return {
        "arm": arm,
        "n": agree.shape[1],
        "n_texts": len(texts),
        "agreement": float(agree.mean()),
        "agreement_blocks": [float(agree[:, i : i + BLOCK].mean()) for i in range(0, agree.shape[1], BLOCK)],
        "equal_prefix": [
            next((i for i, (a, b) in enumerate(zip(t, d)) if a != b), len(d)) for t, d in zip(texts, dense)
        ],
        "distinct_4": [distinct_share(t) for t in texts],
        "longest_repeat": [longest_repeat(t) for t in texts],
        "tokens_attended": c["tokens_attended"] / c["lists"] if c["lists"] else None,
        **{k: c[k] for k in COUNTERS[:4]},
    }


def run_long(
    model: str | os.PathLike,
    arms: Sequence[Arm],
    n: int = 2000,
    context: int = 2048,
    texts: int = 1,
    setup: Setup = Setup(),
    profile: Profile | None = None,
    progress: Progress | None = None,
    resume: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """config, rows (dense first) and texts. n tokens are written behind `context` tokens of setup.text, from `texts` places in it.

    resume: a file that keeps the finished text of every arm. Raises FasaError when the text is too short, when the model has no room
    for context + n tokens, when no profile is there, and when an arm that asked for FASA ran no sparse step.
    """
    if setup.text is None:
        raise FasaError("--task long continues a text: give -f FILE")
    if profile is None and any(a.params and not a.profile for a in arms):
        profile = Profile.load(model)
    settings = {"task": "long", **setup.settings(model, arms, profile), "n": n, "context": context, "texts": texts}
    kept: list[list[dict[str, Any]]] = [[] for _ in range(1 + len(arms))]  # [arm][text]
    with Journal(resume, settings) as journal, setup.session(model, context + n, arms, profile) as s:
        if context + n > s.n_ctx_train:
            raise FasaError(
                f"{context} tokens of text and {n} written: {model} was trained on {s.n_ctx_train} tokens of context; "
                "use a smaller --window or -n"
            )
        prompts = [w[:context] for w in cut_windows(s, setup.text, texts, context)]
        switch, w = ArmSwitch(s, profile), _Writer(s, progress, texts * n * (1 + 2 * len(arms)))
        for i, prompt in enumerate(prompts):
            ready = False
            for k, arm in enumerate([None, *arms]):
                key, piece = f"{i}/{k}", journal.get(f"{i}/{k}")
                if piece is not None:
                    w.skip(n if arm is None else 2 * n)
                else:
                    if not ready:
                        switch.use(None)
                        s.clear()
                        s.decode(prompt[:-1], 0, logits="none")
                        ready = True
                    if arm is None:
                        tokens = w.write(prompt[-1], context - 1, n)
                        piece = {"forced": tokens, "tokens": tokens, "counters": {}}
                    else:
                        piece = _arm_piece(w, switch, arm, prompt, kept[0][i]["tokens"])
                    journal.add(key, piece)
                kept[k].append(piece)
        written = [[s.detokenize(p["tokens"]) for p in arm] for arm in kept]
    dense = [p["tokens"] for p in kept[0]]
    rows = [_figures(name, pieces, dense) for name, pieces in zip(["dense", *(a.name for a in arms)], kept)]
    return {
        "config": {**settings, "llama_cpp_python": runtime.library.LLAMA_CPP_VERSION},
        "rows": rows,
        "texts": [{"arm": r["arm"], "texts": t} for r, t in zip(rows, written)],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people: one line an arm; figures of several texts are means, the equal prefix is the shortest."""
    ends = [min(i + BLOCK, rows[0]["n"]) for i in range(0, rows[0]["n"], BLOCK)]
    lines = [
        [
            "arm",
            "tokens",
            "equal prefix",
            "same top",
            *(f"to {end}" for end in ends),
            "distinct 4-grams",
            "longest repeat",
        ]
    ]
    for i, r in enumerate(rows):
        used = "all" if i == 0 else "all" if r["tokens_attended"] is None else f"{r['tokens_attended']:.0f}"
        same = [str(min(r["equal_prefix"])), *(f"{share:.3f}" for share in [r["agreement"], *r["agreement_blocks"]])]
        lines.append(
            [
                r["arm"],
                used,
                *(same if i else [""] * len(same)),
                f"{np.mean(r['distinct_4']):.3f}",
                f"{np.mean(r['longest_repeat']):.0f}",
            ]
        )
    dense = [
        f"{r['arm']}: {r['steps_dense']} of {r['steps_sparse'] + r['steps_dense']} steps were dense"
        for r in rows[1:]
        if r["steps_sparse"] and r["steps_dense"]
    ]
    return "\n".join(columns(lines) + dense)
