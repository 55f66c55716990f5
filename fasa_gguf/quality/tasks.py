"""Tasks with an answer, dense beside FASA, through the shipped library: RULER's synthetic tasks and needles.

A prompt is prefilled without its last token, dense and once for all arms, or with `own_prompt` by each arm with its own
settings. Then every arm, dense first, decodes from that cache: its first step takes the prompt's last token, so the
first token of the answer is the arm's own. Its tokens are forgotten before the next arm. Decoding is greedy. It ends at
an end-of-generation token, at n_predict tokens, or once every reference is there, when no further token can change the
score.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import runtime
from ..errors import FasaError
from ..profile.profile import Profile
from ..reasons import Reason, not_used
from ..runtime.settings import ContextSettings
from ..session import Session
from . import ruler
from .answers import summarize
from .arms import Arm, ArmSwitch, Progress, check_ubatches, describe, needed_profile, prompt_reason
from .journal import Journal, text_print
from .prompts import Prompter, greedy
from .questions import place_question, run_placed


@dataclass(frozen=True)
class TaskSettings:
    """How to run, whatever the task. text: the essay haystack; n_predict: 0 is the task's own; raw: no chat template.

    own_prompt: every arm processes the prompt with its own settings. numbers: of needles and chains. context: of the
    session; its n_ctx becomes what the prompts need."""

    text: str | None = field(default=None, repr=False)
    seed: int = 42
    raw: bool = False
    n_predict: int = 0
    own_prompt: bool = False
    context: ContextSettings = field(default_factory=lambda: ContextSettings(mode="auto"))
    numbers: ruler.Numbers = field(default_factory=ruler.Numbers)

    def session(
        self, model: str | os.PathLike, n_ctx: int, arms: Sequence[Arm] = (), profile: Profile | None = None
    ) -> Session:
        """A session with room for n_ctx tokens, in which `arms` will decode. Without arms its mode is device."""
        settings = self.context.replace(n_ctx=-(-n_ctx // 256) * 256, mode=self.context.mode if arms else "device")
        return Session(model, settings, arms=[a.params for a in arms if a.params], profile=profile)

    def describe(self, model: str | os.PathLike, arms: Sequence[Arm], profile: Profile | None) -> dict[str, Any]:
        """What a finished sample depends on besides its key."""
        own = {"seed": self.seed, "raw": self.raw, "n_predict": self.n_predict}
        own |= ({"own_prompt": True} if self.own_prompt else {}) | self.numbers.given()
        return describe(model, arms, profile, self.text, self.context) | own

    def words(self) -> list[str] | None:
        """The essay haystack's words; None without a text."""
        return None if self.text is None else ruler.essay_words(self.text)


@dataclass(frozen=True)
class Question:
    """One sample to run: made by ruler.make_record, or a `record` that was read. length: tokens with the answer.

    place: where in the prompt a needle's question stands (questions.PLACES), with respect to tiles of `tile` tokens.
    """

    task: str
    length: int
    index: int
    depth: float | None = None
    record: dict[str, Any] | None = None
    place: str = ""
    tile: int = 0

    @property
    def key(self) -> str:
        """Its name in a journal."""
        what = text_print(repr(self.record)) if self.record else "none" if self.depth is None else f"{self.depth:g}"
        return f"{self.task}/{self.length}/{what}/{self.index}" + (f"/{self.tile}" if self.place else "")

    def make_record(
        self, prompter: Prompter, settings: TaskSettings, words: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Its own record, or the one that RULER's generator makes."""
        return self.record or ruler.make_record(
            self.task,
            self.index,
            self.length,
            lambda *x: len(prompter(*x)),
            settings.seed,
            words,
            self.depth,
            settings.n_predict,
            settings.numbers,
        )


# ---- running ----


def used(counters: dict[str, int]) -> int:
    """Ubatches in which FASA was at work, of decoding and of prompts."""
    return counters["steps_sparse"] + counters.get("steps_prefill_sparse", 0)


def _run_sample(
    s: Session,
    switch: ArmSwitch,
    arms: Sequence[Arm],
    prompt: Sequence[int],
    record: dict[str, Any],
    n_predict: int,
    own_prompt: bool = False,
) -> dict[str, Any]:
    """Answer, score and counters of every arm for one prompt."""

    def mark(out: Sequence[int]) -> float:
        return ruler.score(record["task"], s.detokenize(out), record["outputs"])

    switch.use(None)
    s.clear()
    s.decode(prompt[:-1], 0, logits="none")
    rewind, answers = s.rewinder(len(prompt) - 1), []
    for i, arm in enumerate([Arm("dense"), *arms]):
        if own_prompt and i:
            switch.use(arm)
            arm.read_prompt(s, prompt[:-1])
        else:
            rewind()
            switch.use(arm)
        out = greedy(s, prompt[-1], len(prompt) - 1, n_predict, lambda out: mark(out) == 1)
        counters = s.fasa.counters()
        reason = s.fasa.step_reason_code()
        least = arm.params.least_above(len(prompt), reason, s.fasa.gpu_limit().cells) if arm.params else 0
        if arm.params is not None and not used(counters) and not least:
            raise FasaError(f"arm {arm.name}: {not_used(reason)}")
        answers.append(
            {
                "arm": arm.name,
                "text": s.detokenize(out),
                "n_tokens": len(out),
                "score": mark(out),
                "logp": None,
                "counters": counters,
                "min_context": least or arm.params.min_context if arm.params else None,
                "prefill_reason": prompt_reason(s, arm) if own_prompt else None,
            }
        )
    return {
        "task": record["task"],
        "index": record["index"],
        "haystack": record.get("haystack"),
        "n_prompt": len(prompt),
        "outputs": record["outputs"],
        "asked_at": None,
        "answer_at": None,
        "arms": answers,
    }


def _refuse_unused(arm: Arm, least: int) -> None:
    gpu = "_gpu" if arm.params and least > arm.params.min_context else ""
    raise FasaError(
        f"arm {arm.name}: FASA was asked for and no step could use it: no prompt reaches min_context{gpu}, "
        f"{least}; use a smaller --fasa-min-context{gpu.replace('_', '-')} or larger --lengths"
    )


def _check_lengths(arms: Sequence[Arm], longest: int, own_prompt: bool) -> None:
    """Before a run: an arm that asks for FASA must reach its min_context somewhere, or process its prompts sparsely."""
    for arm in arms:
        if own_prompt and arm.params and arm.params.prefill != "off":
            continue
        if arm.params and -(-longest // 256) * 256 < arm.params.min_context:
            _refuse_unused(arm, arm.params.min_context)


def _check_used(arms: Sequence[Arm], samples: Sequence[dict[str, Any]]) -> None:
    """After a run: an arm that asks for FASA must have run a sparse step somewhere."""
    for i, arm in enumerate(arms, 1):
        if arm.params and not any(used(r["arms"][i]["counters"]) for r in samples):
            if reason := samples[-1]["arms"][i].get("prefill_reason"):
                raise FasaError(f"arm {arm.name}: {not_used(Reason[reason])}")
            _refuse_unused(arm, max(r["arms"][i]["min_context"] for r in samples))


def _place_and_run(
    question: Question,
    prompter: Prompter,
    switch: ArmSwitch,
    arms: Sequence[Arm],
    seed: int,
    words: Sequence[str] | None,
) -> dict[str, Any]:
    """The sample of a question inside a prompt."""
    q = question
    placed = place_question(prompter, q.place, q.length, q.index, q.depth or 0.0, q.tile, seed, words)
    return {
        "task": q.task,
        "index": q.index,
        "haystack": placed.haystack,
        "n_prompt": len(placed.tokens),
        "outputs": [placed.value],
        "asked_at": placed.asked,
        "answer_at": placed.at,
        "arms": run_placed(switch, arms, placed),
    }


def run_questions(
    model: str | os.PathLike,
    questions: Sequence[Question],
    arms: Sequence[Arm],
    settings: TaskSettings | None = None,
    profile: Profile | None = None,
    progress: Progress | None = None,
    resume: str | os.PathLike | None = None,
) -> list[dict[str, Any]]:
    """A sample for every question: its task, length, index and depth, n_prompt, outputs, and answers of the arms.

    An answer, dense's first, has text, score and counters. resume: a file that keeps finished samples; a rerun skips
    those. Raises FasaError when a prompt does not fit, when an arm has no profile, when an arm that asked for FASA ran
    no sparse step, and when `resume` was begun with other settings.
    """
    settings = settings or TaskSettings()
    for name in {q.task for q in questions if not q.record and not q.place}:  # before anything is run
        ruler.check_task(name)
    if not questions:
        raise FasaError("nothing to evaluate: no samples were asked for")
    profile = needed_profile(model, arms, profile)
    longest = max(q.length for q in questions)
    if not all(q.place for q in questions):  # a question inside the prompt asks for no decoding
        _check_lengths(arms, longest, settings.own_prompt)
    check_ubatches(arms, settings.own_prompt, settings.context)
    words = settings.words()
    journal = Journal(resume, {"task": "ruler", **settings.describe(model, arms, profile)})
    samples = []
    with journal, settings.session(model, longest, arms, profile) as s:
        if longest > s.n_ctx_train:
            raise FasaError(
                f"--lengths {longest}: {model} was trained on {s.n_ctx_train} tokens of context; use a shorter one"
            )
        prompter, switch = Prompter(s, settings.raw), ArmSwitch(s, profile)
        for n, question in enumerate(questions):
            sample = journal.get(question.key)
            if sample is None and question.place:
                sample = _place_and_run(question, prompter, switch, arms, settings.seed, words)
                journal.add(question.key, sample)
            elif sample is None:
                record = question.make_record(prompter, settings, words)
                prompt = prompter(record["input"], record["answer_prefix"])
                n_predict = settings.n_predict or predicts(question.task)
                sample = _run_sample(s, switch, arms, prompt, record, n_predict, settings.own_prompt)
                journal.add(question.key, sample)
            samples.append({**sample, "length": question.length, "depth": question.depth})
            if progress:
                progress("evaluating", n + 1, len(questions))
    _check_used(arms, samples)
    return samples


def result(
    model: str | os.PathLike,
    arms: Sequence[Arm],
    settings: TaskSettings,
    samples: Sequence[dict[str, Any]],
    profile: Profile | None = None,
) -> dict[str, Any]:
    """Everything for --json: the config, the summary as `rows`, and every sample."""
    described = settings.describe(model, arms, needed_profile(model, arms, profile))
    config = {**described, "llama_cpp_python": runtime.library.upstream_version()}
    return {"config": config, "rows": summarize(samples, settings.numbers), "samples": list(samples)}


# ---- records ----


def predicts(task: str) -> int:
    """Tokens that a task's answer may take; RULER's 32 for its question answering, 128 for an unknown name."""
    return ruler.TASKS[task].n_predict if task in ruler.TASKS else 32 if task.startswith("qa") else 128


def make_records(
    model: str | os.PathLike, questions: Sequence[Question], settings: TaskSettings
) -> list[dict[str, Any]]:
    """The records of these questions, without running them."""
    words = settings.words()
    with settings.session(model, 256) as s:
        prompter = Prompter(s, settings.raw)
        return [q.make_record(prompter, settings, words) for q in questions]


def record_questions(
    model: str | os.PathLike, records: Iterable[dict[str, Any]], settings: TaskSettings
) -> list[Question]:
    """Questions of records that were read. The length of a task is its longest, counted with this model's tokens."""
    with settings.session(model, 256) as s:
        prompter = Prompter(s, settings.raw)
        sizes = [
            (r, len(prompter(r["input"], r["answer_prefix"])) + (settings.n_predict or predicts(r["task"])))
            for r in records
        ]
    longest: dict[str, int] = {}
    for r, n in sizes:
        longest[r["task"]] = max(n, longest.get(r["task"], 0))
    return [Question(r["task"], longest[r["task"]], r["index"], record=r) for r, _ in sizes]
