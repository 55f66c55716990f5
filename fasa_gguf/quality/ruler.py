"""RULER's synthetic tasks (arXiv 2404.06654): its prompts, record format and string-match metric, made anew and seeded.

A record is one JSON line: task, index, input, answer_prefix (follows the chat template), outputs (the references) and
length, in tokens: the prompt as the model gets it and the tokens that it may write. Every sample is fitted from below
to the length asked for, by bisecting the size of its haystack.

Differences from RULER's scripts, because of which scores compare arms and settings with each other, but not with a
published table: words are nonsense made here (six letters, consonant and vowel in turn, so none is part of another),
not English ones; an essay haystack is the text given, from a place drawn for every sample; needles lie at depths of the
40-step grid in every haystack; freq_words counts its answer in the length; common_words falls back to RULER's form for
short prompts where its long form does not fit.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import string
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import FasaError
from .text import read_utf8

Parts = tuple[str, str, list[str]]  # input, answer prefix, references
Build = Callable[[int], Parts]  # from the size of the haystack
Count = Callable[[str, str], int]  # tokens of (input, answer prefix) as the model gets them

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * i / 39) / 100 for i in range(40)]
ZETA_2 = math.pi**2 / 6  # frequent words follow a zeta distribution with exponent 2

NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {n} variables are assgined the value "
    "{query}, they are: ",
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
    "are the three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)


@dataclass(frozen=True)
class Task:
    """One task as RULER's synthetic.yaml sets it. n_predict: tokens that the answer may take."""

    kind: str
    n_predict: int
    haystack: str = ""  # noise, essay or needle
    key: str = "words"
    value: str = "numbers"
    n_key: int = 1
    n_value: int = 1
    n_query: int = 1
    n_chain: int = 1
    n_hop: int = 4


TASKS = {
    "niah_single_1": Task("niah", 128, "noise"),
    "niah_single_2": Task("niah", 128, "essay"),
    "niah_single_3": Task("niah", 128, "essay", value="uuids"),
    "niah_multikey_1": Task("niah", 128, "essay", n_key=4),
    "niah_multikey_2": Task("niah", 128, "needle"),
    "niah_multikey_3": Task("niah", 128, "needle", key="uuids", value="uuids"),
    "niah_multivalue": Task("niah", 128, "essay", n_value=4),
    "niah_multiquery": Task("niah", 128, "essay", n_query=4),
    "vt": Task("vt", 30, "noise"),
    "cwe": Task("cwe", 120),
    "fwe": Task("fwe", 50),
}


@dataclass(frozen=True)
class Numbers:
    """Numbers of RULER's configuration, by its names; 0: the task's own.

    A number of needles changes the tasks that have more than one of that kind, so num_needle_k 2 changes
    niah_multikey_1 and not niah_single_1. num_chains and num_hops are of vt.
    """

    num_needle_k: int = 0
    num_needle_v: int = 0
    num_needle_q: int = 0
    num_chains: int = 0
    num_hops: int = 0

    def given(self) -> dict[str, int]:
        """Those that are not the tasks' own, by name."""
        return {name: n for name, n in self.__dict__.items() if n}

    def apply(self, task: Task) -> Task:
        """The task with these numbers."""
        if task.kind == "vt":
            return replace(task, n_chain=self.num_chains or task.n_chain, n_hop=self.num_hops or task.n_hop)
        return replace(
            task,
            n_key=self.num_needle_k or task.n_key if task.n_key > 1 else 1,
            n_value=self.num_needle_v or task.n_value if task.n_value > 1 else 1,
            n_query=self.num_needle_q or task.n_query if task.n_query > 1 else 1,
        )

    def changed(self, name: str) -> dict[str, int]:
        """Those that make this task another than RULER's, by their names there; {} for an unknown task."""
        if name not in TASKS:
            return {}
        own, task = TASKS[name], self.apply(TASKS[name])
        fields = {"n_key": "num_needle_k", "n_value": "num_needle_v", "n_query": "num_needle_q"}
        fields |= {"n_chain": "num_chains", "n_hop": "num_hops"}
        return {fields[f]: getattr(task, f) for f in fields if getattr(task, f) != getattr(own, f)}


# ---- metric ----


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The share, 0 to 1, of the references that occur in the prediction, in any case (RULER's metric here)."""
    return sum(r.lower() in prediction.lower() for r in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 when any reference occurs in the prediction (RULER's metric of its question answering tasks), else 0."""
    return float(any(r.lower() in prediction.lower() for r in references))


def score(task: str, prediction: str, references: Sequence[str]) -> float:
    """The task's metric, 0 to 1; tasks named qa* take any reference, the others want all."""
    return (string_match_part if task.startswith("qa") else string_match_all)(prediction, references)


# ---- words and values ----


def _distinct(draw: Callable[[], str]) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        word = draw()
        if word not in seen:
            seen.add(word)
            yield word


def _nonsense(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))


def drawer(kind: str, rng: random.Random) -> Iterator[str]:
    """Endless distinct values: numbers of 7 digits, words (two, hyphened) or uuids."""
    return _distinct(
        {
            "numbers": lambda: str(rng.randint(10**6, 10**7 - 1)),
            "words": lambda: f"{_nonsense(rng)}-{_nonsense(rng)}",
            "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        }[kind]
    )


class _Endless:
    """A list that draws what is asked of it, always in the same order."""

    def __init__(self, source: Iterable[str]) -> None:
        self.source = iter(source)
        self.items: list[str] = []

    def first(self, n: int) -> list[str]:
        while len(self.items) < n:
            self.items.append(next(self.source))
        return self.items[:n]


# ---- tasks ----


def _insert(sentences: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """The needles, in order, at ascending depths (0: before the first sentence, 1: after the last)."""
    out: list[str] = []
    at = 0
    for needle, depth in zip(needles, depths, strict=False):
        end = round(depth * len(sentences))
        out += [*sentences[at:end], needle]
        at = end
    return out + list(sentences[at:])


def _haystack(
    task: Task, rng: random.Random, words: Sequence[str] | None, taken: Sequence[str]
) -> tuple[Callable[[int], list[str]], str]:
    """(sentences by size, what joins them). An essay without a text is noise."""
    if task.haystack == "needle":
        keys, values = drawer(task.key, rng), drawer(task.value, rng)
        pairs = ((k, v) for k, v in zip(keys, values, strict=False) if k not in taken and v not in taken)
        fillers = _Endless(NEEDLE.format(kind=task.value, key=k, value=v) for k, v in pairs)
        return fillers.first, "\n"
    if task.haystack == "essay" and words:
        start = rng.randrange(len(words))
        start = next(
            (i + 1 for i in range(start, len(words) - 1) if words[i][-1] in ".!?"), 0
        )  # where a sentence begins

        def essay(size: int) -> list[str]:  # size words; the text repeats where it ends
            reps = -(-(start + size) // len(words))
            return re.split(r"(?<=[.!?]) ", " ".join((list(words) * reps)[start : start + size]))

        return essay, " "
    return lambda size: [NOISE] * size, "\n"


def _niah(task: Task, rng: random.Random, words: Sequence[str] | None, depths: Sequence[float] | None) -> Build:
    n_key = max(task.n_key, task.n_query)
    text = " ".join(words or ())
    fresh = (v for v in drawer(task.value, rng) if v not in text)
    names = (k for k in drawer(task.key, rng) if k not in text)
    keys = [next(names) for _ in range(n_key)]
    values = [[next(fresh) for _ in range(task.n_value)] for _ in keys]
    needles = [NEEDLE.format(kind=task.value, key=k, value=v) for k, vs in zip(keys, values, strict=True) for v in vs]
    rng.shuffle(needles)
    places = sorted(depths) if depths else sorted(rng.sample(DEPTHS, len(needles)))
    asked = rng.sample(range(n_key), task.n_query)
    queries = [keys[i] for i in asked]
    query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
    template, kind = NIAH, task.value
    if task.n_query * task.n_value == 1:  # RULER's way to the singular
        one, prefix = (t.replace("Some", "A").replace("are all", "is").replace("are", "is") for t in NIAH)
        template = one, prefix
        kind = kind[:-1]
    sentences, glue = _haystack(task, rng, words, [*keys, *itertools.chain.from_iterable(values)])

    def build(size: int) -> Parts:
        names = {"kind": kind, "context": glue.join(_insert(sentences(size), needles, places)), "query": query}
        return template[0].format(**names), template[1].format(**names), [v for i in asked for v in values[i]]

    return build


def _chain(rng: random.Random, letters: int, n_chain: int = 1, n_hop: int = 4) -> Build:
    """Chains of assignments in noise, the first of which is asked for; a variable has that many letters."""
    names = _distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)))
    values = _distinct(lambda: str(rng.randint(10000, 99999)))
    needles, chain, value = [], [], ""
    for i in range(n_chain):
        one, start = [next(names) for _ in range(n_hop + 1)], next(values)
        if i == 0:
            chain, value = one, start
        lines = [f"VAR {one[0]} = {start}"] + [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(one)]
        needles += list(zip(sorted(rng.random() for _ in lines), lines, strict=True))
    needles.sort(key=lambda needle: needle[0])  # every chain stays in its order
    depths, lines = [d for d, _ in needles], [line for _, line in needles]

    def build(size: int) -> Parts:
        context = " ".join(_insert([NOISE + "\n"] * size, lines, depths)).replace(". \n", ".\n")
        return VT[0].format(context=context, query=value), VT[1].format(n=len(chain), query=value), chain

    return build


def _vt(task: Task, rng: random.Random, count: Count, length: int) -> Build:
    """The chains after an answered example of at most 500 tokens (a third of a short prompt), as RULER has it."""
    shot = _chain(rng, 3, task.n_chain, task.n_hop)
    text, prefix, chain = shot(_fit(shot, count, min(500, length // 3), "vt (its example)"))
    example = f"{text}{prefix} {' '.join(chain)}\n\n\n\n"
    main = _chain(rng, 5, task.n_chain, task.n_hop)

    def build(size: int) -> Parts:
        text, prefix, outputs = main(size)
        return example + text, prefix, outputs

    return build


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


def _cwe(rng: random.Random, form: str) -> Build:
    """Ten common words among others, after an answered example.

    form: repeats of a common and of another word, 30/3 or 6/1.
    """
    pool = _Endless(_distinct(lambda: _nonsense(rng)))
    common, often, seed = pool.first(10), [int(x) for x in form.split("/")], rng.getrandbits(64)
    n_other, repeats = (30, (10, 3)) if form == "30/3" else (10, (3, 1))
    words = pool.first(20 + n_other)[10:]
    listed = words[:10] * repeats[0] + words[10:] * repeats[1]
    random.Random(seed).shuffle(listed)
    example = CWE[0].format(context=_numbered(listed)) + CWE[1] + " " + _numbered(words[:10]) + "\n"

    def build(size: int) -> Parts:  # size: other words
        listed = common * often[0] + pool.first(20 + n_other + size)[20 + n_other :] * often[1]
        random.Random(seed).shuffle(listed)
        return example + CWE[0].format(context=_numbered(listed)), CWE[1], common

    return build


def _fwe(rng: random.Random, length: int) -> Build:
    """Coded words by a zeta distribution, the most frequent one shown as dots; the next three are asked for."""
    draw = _distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)))
    vocab = ["..."] + [next(draw) for _ in range(max(length // 50, 8) - 1)]
    seed = rng.getrandbits(64)

    def build(size: int) -> Parts:  # size: words before rounding down
        listed = [w for i, w in enumerate(vocab) for _ in range(int(size / (i + 1) ** 2 / ZETA_2))]
        random.Random(seed).shuffle(listed)
        return FWE[0].format(context=" ".join(listed)), FWE[1], vocab[1:4]

    return build


# ---- samples ----


def _fit(build: Build, count: Count, room: int, name: str, least: int = 1) -> int:
    """The largest size whose prompt has at most `room` tokens, found by doubling and bisecting."""

    def tokens(size: int) -> int:
        return count(*build(size)[:2])

    if (smallest := tokens(least)) > room:
        raise FasaError(
            f"task {name}: the smallest prompt has {smallest} tokens and there is room for {room}; use larger --lengths"
        )
    low, high = least, 2 * least
    while tokens(high) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        mid = (low + high) // 2
        low, high = (mid, high) if tokens(mid) <= room else (low, mid)
    return low


def make_record(
    name: str,
    index: int,
    length: int,
    count: Count,
    seed: int = 42,
    words: Sequence[str] | None = None,
    depth: float | None = None,
    n_predict: int = 0,
    numbers: Numbers = Numbers(),
) -> dict[str, Any]:
    """Sample `index` of a task, at most `length` tokens with its answer.

    count: tokens of a prompt; words: the essay haystack, None is noise; depth: where every needle goes, 0 to 1, None
    draws it; n_predict: tokens for the answer, 0 is the task's own; numbers: of needles and chains. The same arguments
    give the same record. Raises FasaError for an unknown task and for a length that the task does not fit in.
    """
    task = numbers.apply(check_task(name))
    n_predict = n_predict or task.n_predict
    room, key = length - n_predict, f"{seed}/{name}/{length}/{index}" + ("" if depth is None else f"/{depth:g}")
    extra: dict[str, Any] = {} if depth is None else {"depth": depth}
    if task.kind == "niah":
        extra["haystack"] = "noise" if task.haystack == "essay" and not words else task.haystack
        build = _niah(
            task,
            random.Random(key),
            words,
            None if depth is None else [depth] * (max(task.n_key, task.n_query) * task.n_value),
        )
    elif task.kind == "vt":
        build = _vt(task, random.Random(key), count, room)
    elif task.kind == "fwe":
        build = _fwe(random.Random(key), length)
    else:
        form = "30/3" if length >= 4096 else "6/1"
        build = _cwe(random.Random(key), form)
        if form == "30/3" and count(*build(1)[:2]) > room:
            form, build = "6/1", _cwe(random.Random(key), "6/1")
        extra["form"] = form
    text, prefix, outputs = build(_fit(build, count, room, name, 40 if task.kind == "fwe" else 1))
    return {
        "task": name,
        "index": index,
        "input": text,
        "answer_prefix": prefix,
        "outputs": outputs,
        "length": count(text, prefix) + n_predict,
        **extra,
    }


def check_task(name: str) -> Task:
    """The task of this name, or FasaError."""
    if name not in TASKS:
        raise FasaError(f"task {name!r}: expected one of {', '.join(TASKS)}")
    return TASKS[name]


def essay_words(text: str) -> list[str]:
    """A haystack from a text: its words, white space folded."""
    words = text.split()
    if len(words) < 50:
        raise FasaError(f"the haystack's text has {len(words)} words; use one of at least 50")
    return words


def write_records(path: str | os.PathLike, records: Iterable[dict[str, Any]]) -> None:
    """One JSON line each."""
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Records that RULER's scripts or this module wrote; a missing task name is the file's.

    Raises FasaError naming the line.
    """
    lines = read_utf8(path).splitlines()
    out = []
    for i, line in enumerate(lines):
        try:
            r = json.loads(line)
            good = isinstance(r["input"], str) and r["outputs"] and all(isinstance(o, str) and o for o in r["outputs"])
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise FasaError(
                f"{path}: line {i + 1}: expected a JSON object with input (text) and outputs (a list of texts)"
            )
        out.append({"task": Path(path).stem, "index": i, "answer_prefix": "", **r})
    if not out:
        raise FasaError(f"{path}: no records in it")
    return out
