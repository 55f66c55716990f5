"""Needles whose question stands somewhere in a prompt: at the end, in the middle, or over a tile's edge.

Behind a question that is not at the end text follows, so no answer can be generated there. It stands in the prompt
instead, and the prompt's own logits tell whether the model found it: `found` is 1 when each token of the answer is the
model's first choice where it stands, `logp` is the mean of their log probabilities. An arm processes the whole prompt,
question and answer too, with its own settings.

A prompt has exactly the tokens asked for: the haystack is cut between tokens. The words are RULER's
(`niah_single_2`), as turns of a conversation where the model has a chat template.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FasaError
from ..params import FasaParams
from ..report.columns import columns
from . import ruler
from .arms import Arm, ArmSwitch, prompt_reason
from .perplexity import log_softmax
from .prompts import Prompter

PLACES = {  # where the question stands, and what a row is called
    "end": "needle_end",
    "middle": "needle_middle",
    "edge": "needle_edge",
}
INTRO, QUESTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n",
    "\nWhat is the special magic number for {key} mentioned in the provided text?",
)
PREFIX = " The special magic number for {key} mentioned in the provided text is:"


@dataclass(frozen=True)
class Placed:
    """A prompt with its answer in it, which begins at position `at` and has n_answer tokens; `asked`: position of the
    question's first token."""

    tokens: list[int]
    value: str
    asked: int
    at: int
    n_answer: int
    haystack: str


def shared_tile(arms: Sequence[Arm]) -> int:
    """prefill_tile of the arms. Raises FasaError when they differ: a question cannot be inside the tiles of all."""
    tiles = sorted({a.params.prefill_tile for a in arms if a.params})
    if len(tiles) > 1:
        raise FasaError(
            f"--question: expected arms with one prefill_tile, found {', '.join(map(str, tiles))}; run them one by one"
        )
    return tiles[0] if tiles else FasaParams().prefill_tile


def _asked_at(place: str, rng: random.Random, length: int, n_span: int, n_answer: int, tile: int) -> int:
    """The position of the question's first token; n_span: tokens from there to the answer's last."""
    near = int(length * rng.uniform(0.4, 0.8)) // tile * tile  # where a tile begins
    if place == "edge":  # anywhere between its first token and the answer's last
        return near - rng.randint(1, n_span - 1)
    if n_span <= tile:
        return near + (tile - n_span) // 2
    return near + (tile + n_answer) // 2 - n_span  # at least the answer is inside


def place_question(
    prompter: Prompter,
    place: str,
    length: int,
    index: int,
    depth: float,
    tile: int,
    seed: int = 42,
    words: Sequence[str] | None = None,
) -> Placed:
    """The prompt of `length` tokens, its needle at `depth` (0 to 1) of the text before the question.

    middle: question and answer are inside one tile of `tile` tokens, or the answer is if they are longer; edge: a tile
    ends inside them; both lie at 40 to 80% of the prompt. words: the haystack, None is RULER's noise. The same
    arguments give the same prompt. Raises FasaError for a length in which it has no room.
    """
    rng = random.Random(f"{seed}/question/{place}/{length}/{index}/{depth:g}")
    key = next(k for k in ruler.drawer("words", rng) if k not in (words or ()))
    value = next(v for v in ruler.drawer("numbers", rng) if v not in (words or ()))
    head, question, turn, tail = prompter.around(
        INTRO, QUESTION.format(key=key), PREFIX.format(key=key), place != "end"
    )
    needle = prompter.piece(" " + ruler.NEEDLE.format(kind="numbers", key=key, value=value))
    answer = prompter.piece(f" {value}")
    n_hay = length - sum(map(len, (head, question, turn, tail, needle, answer)))
    n_span = len(question) + len(answer)
    asked = _asked_at(place, rng, length, n_span, len(answer), tile) if place != "end" else length - n_span
    before = asked - len(head) - len(needle)
    if not 0 <= before <= n_hay:
        raise FasaError(
            f"--lengths {length}: a question {'at the end' if place == 'end' else 'in the middle'} and its needle have "
            f"no room there; use larger --lengths{'' if place == 'end' else f' or a prefill_tile below {tile}'}"
        )
    start, source = rng.randrange(len(words or [0])), words or ruler.NOISE.split()
    text = " ".join(itertools.islice(itertools.cycle(source), start, start + n_hay))  # a word has one token or more
    hay = prompter.piece(text)[:n_hay]
    at = round(depth * before)
    tokens = [*head, *hay[:at], *needle, *hay[at:before], *question, *answer, *turn, *hay[before:], *tail]
    return Placed(tokens, value, asked, asked + len(question), len(answer), "essay" if words else "noise")


def run_placed(switch: ArmSwitch, arms: Sequence[Arm], placed: Placed) -> list[dict[str, Any]]:
    """What every arm, dense first, makes of the prompt: text (its first choices), score (found), logp and counters."""
    s, out = switch.session, []
    first, last = placed.at - 1, placed.at + placed.n_answer - 1  # whose logits are the answer's
    answer = placed.tokens[placed.at : placed.at + placed.n_answer]
    for arm in [Arm("dense"), *arms]:
        switch.use(arm)
        rows = arm.read_prompt(s, placed.tokens, range(first, last))
        chosen = [int(np.argmax(row)) for row in rows]
        out.append(
            {
                "arm": arm.name,
                "text": s.detokenize(chosen),
                "n_tokens": len(chosen),
                "score": float(chosen == answer),
                "logp": float(log_softmax(np.stack(rows).astype(np.float64))[range(len(answer)), answer].mean()),
                "counters": s.fasa.counters(),
                "min_context": arm.params.min_context if arm.params else None,
                "prefill_reason": prompt_reason(s, arm),
            }
        )
    return out


def format_questions(results: Sequence[dict[str, Any]]) -> str:
    """For people: found and log p by place, length and arm; +- is the standard error of the paired difference."""
    lines = [["task", "length", "n", "arm", "cells", "found", "lost", "gained", "p", "log p", "to dense"]]
    for r in results:
        for i, a in enumerate(r["arms"]):
            first = [r["task"], str(r["length"] or "all"), str(r["n"])] if i == 0 else ["", "", ""]
            share = a["prefill_share"]
            rest = [str(a["lost"]), str(a["gained"]), f"{a['sign_p']:.2g}"]
            diff = [f"{a['logp_diff']:+.3f} +-{a['logp_diff_se']:.3f}"]
            lines.append(
                [
                    *first,
                    a["arm"],
                    "all" if share is None else f"{100 * share:.0f}%",
                    f"{a['score']:.1f}",
                    *(rest if i else ["", "", ""]),
                    f"{a['logp']:.3f}",
                    *(diff if i else [""]),
                ]
            )
    return "\n".join(columns(lines, 4))
