"""Tasks with an answer, dense beside FASA, through the library that ships: RULER's synthetic tasks and the needle grid.

A prompt is prefilled once, dense and without its last token. Then every arm, dense first, decodes from that cache: the
prompt's last token is its first step, so that the first token of the answer is the arm's own; what it wrote is forgotten before
the next arm. Decoding is greedy and ends at an end-of-generation token, at n_predict tokens, or once every reference is there (no
further token could change the score).

Differences are paired, sample by sample. Their 95% interval is Student's t over samples; where all samples differ by the same (by
nothing, as a rule) that has no width, and the exact bound on the share of samples that may differ (Clopper-Pearson) is given
instead. p is the exact sign test over the samples that were lost and gained (McNemar's, where a sample is found or not).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import runtime
from ..errors import FasaError
from ..reasons import not_used
from ..profile.profile import Profile
from ..report.columns import columns
from ..session import Session
from . import ruler
from .arms import Arm, ArmSwitch, describe
from .journal import Journal, text_print

Progress = Callable[[str, int, int], None]
COUNTERS = (
    "steps_sparse",
    "steps_dense",
    "layers_sparse",
    "layers_dense",
    "tokens_attended",
    "lists",
    "bytes_fac",
    "bytes_tip",
    "bytes_dense",
)


@dataclass(frozen=True)
class Setup:
    """How to run, whatever the task. text: the essay haystack; n_predict: 0 is the task's own; raw: no chat template; mode: Session's."""

    text: str | None = field(default=None, repr=False)
    seed: int = 42
    raw: bool = False
    n_predict: int = 0
    n_threads: int = 0
    n_gpu_layers: int = 0
    type_k: str = "f16"
    type_v: str = "f16"
    mode: str = "auto"

    def session(
        self, model: str | os.PathLike, n_ctx: int, arms: Sequence[Arm] = (), profile: Profile | None = None
    ) -> Session:
        """A session with room for n_ctx tokens, in which `arms` will decode; without any it stays in mode c."""
        return Session(
            model,
            n_ctx=-(-n_ctx // 256) * 256,
            n_threads=self.n_threads,
            n_gpu_layers=self.n_gpu_layers,
            type_k=self.type_k,
            type_v=self.type_v,
            mode=self.mode if arms else "c",
            arms=[a.params for a in arms if a.params],
            profile=profile,
        )

    def settings(self, model: str | os.PathLike, arms: Sequence[Arm], profile: Profile | None) -> dict[str, Any]:
        """What a finished sample depends on besides its key."""
        return {
            **describe(model, arms, profile, self.text, self.n_threads, self.n_gpu_layers, self.type_k, self.type_v),
            "seed": self.seed,
            "raw": self.raw,
            "n_predict": self.n_predict,
        }


@dataclass(frozen=True)
class Job:
    """One sample to run: made by ruler.make_record, or a `record` that was read. length: tokens with the answer."""

    task: str
    length: int
    index: int
    depth: float | None = None
    record: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        what = text_print(repr(self.record)) if self.record else "none" if self.depth is None else f"{self.depth:g}"
        return f"{self.task}/{self.length}/{what}/{self.index}"


# ---- prompts and decoding ----


class Prompter:
    """Records into tokens: with the model's chat template when it has one and `raw` is off, the answer's prefix behind it."""

    def __init__(self, session: Session, raw: bool = False) -> None:
        self.session, self.format = session, None
        template = None if raw else session.llama.llama_model_chat_template(session.model, None)
        if template:
            from llama_cpp.llama_chat_format import Jinja2ChatFormatter

            ends = [
                self._text(get(session.vocab)) for get in (session.llama.llama_vocab_bos, session.llama.llama_vocab_eos)
            ]
            self.bos = ends[0]
            try:
                self.format = Jinja2ChatFormatter(
                    template.decode("utf-8", "replace"), bos_token=ends[0], eos_token=ends[1]
                )
            except Exception as e:  # jinja2 raises whatever the template does
                raise FasaError(f"{session.path}: its chat template cannot be read ({e}); use --raw") from None

    def _text(self, token: int) -> str:
        return (
            ""
            if token < 0
            else self.session.llama.llama_vocab_get_text(self.session.vocab, token).decode("utf-8", "replace")
        )

    def __call__(self, text: str, prefix: str = "") -> list[int]:
        """Tokens of a prompt, the answer's prefix last."""
        if self.format is None:
            return self.session.tokenize(text + prefix)
        try:
            prompt = self.format(messages=[{"role": "user", "content": text}]).prompt
        except Exception as e:
            raise FasaError(f"{self.session.path}: its chat template failed ({e}); use --raw") from None
        return self.session.tokenize(prompt + prefix, bos=not (self.bos and prompt.startswith(self.bos)))


def greedy(
    session: Session, token: int, pos: int, n_predict: int, finished: Callable[[list[int]], bool] = lambda out: False
) -> list[int]:
    """At most n_predict best tokens, `token` at position `pos` being decoded first; ends at an end-of-generation token."""
    out: list[int] = []
    while len(out) < n_predict:
        token = int(np.argmax(session.decode([token], pos + len(out))))
        if session.llama.llama_vocab_is_eog(session.vocab, token):
            break
        out.append(token)
        if finished(out):
            break
    return out


def _run_sample(
    s: Session, switch: ArmSwitch, arms: Sequence[Arm], prompt: Sequence[int], record: dict[str, Any], n_predict: int
) -> dict[str, Any]:
    """Answer, score and counters of every arm for one prompt."""

    def mark(out: Sequence[int]) -> float:
        return ruler.score(record["task"], s.detokenize(out), record["outputs"])

    switch.use(None)
    s.clear()
    s.decode(prompt[:-1], 0, logits="none")
    results = []
    for arm in [Arm("dense"), *arms]:
        s.remove(0, len(prompt) - 1)
        switch.use(arm)
        out = greedy(s, prompt[-1], len(prompt) - 1, n_predict, lambda out: mark(out) == 1)
        counters = s.fasa.counters()
        reason = s.fasa.step_reason_code()
        least = arm.params.least_above(len(prompt), reason) if arm.params else 0
        if arm.params is not None and not counters["steps_sparse"] and not least:
            raise FasaError(f"arm {arm.name}: {not_used(reason)}")
        results.append(
            {
                "arm": arm.name,
                "text": s.detokenize(out),
                "n_tokens": len(out),
                "score": mark(out),
                "counters": counters,
                "min_context": least or arm.params.min_context if arm.params else None,
            }
        )
    return {
        "task": record["task"],
        "index": record["index"],
        "haystack": record.get("haystack"),
        "n_prompt": len(prompt),
        "outputs": record["outputs"],
        "arms": results,
    }


def _record(job: Job, prompter: Prompter, setup: Setup, words: Sequence[str] | None) -> dict[str, Any]:
    return ruler.make_record(
        job.task, job.index, job.length, lambda *x: len(prompter(*x)), setup.seed, words, job.depth, setup.n_predict
    )


def _check_used(arms: Sequence[Arm], longest: int, samples: Sequence[dict[str, Any]] | None) -> None:
    """An arm that asks for FASA must use it somewhere: before the run by the lengths, after it by the counters."""
    for i, arm in enumerate(arms):
        if arm.params is None:
            continue
        if (samples is None and -(-longest // 256) * 256 < arm.params.min_context) or (
            samples is not None and not any(r["arms"][1 + i]["counters"]["steps_sparse"] for r in samples)
        ):
            least = max((r["arms"][1 + i]["min_context"] for r in samples or ()), default=arm.params.min_context)
            gpu = "_gpu" if least > arm.params.min_context else ""
            raise FasaError(
                f"arm {arm.name}: FASA was asked for and no step could use it: no prompt reaches min_context{gpu}, "
                f"{least}; use a smaller --fasa-min-context{gpu.replace('_', '-')} or larger --lengths"
            )


def run_jobs(
    model: str | os.PathLike,
    jobs: Sequence[Job],
    arms: Sequence[Arm],
    setup: Setup = Setup(),
    profile: Profile | None = None,
    progress: Progress | None = None,
    resume: str | os.PathLike | None = None,
) -> list[dict[str, Any]]:
    """One result per job: the job's task, length, index and depth, n_prompt, outputs, and per arm (dense first) text, score, counters.

    resume: a file that keeps finished samples; a rerun skips those. Raises FasaError when a prompt does not fit, when no profile
    is there, when an arm that asked for FASA ran no sparse step, and when `resume` was begun with other settings.
    """
    for name in {j.task for j in jobs if not j.record}:  # before anything was run
        ruler.check_task(name)
    if not jobs:
        raise FasaError("nothing to evaluate: no samples were asked for")
    if profile is None and any(a.params and not a.profile for a in arms):
        profile = Profile.load(model)
    longest = max(j.length for j in jobs)
    _check_used(arms, longest, None)
    words = ruler.essay_words(setup.text) if setup.text is not None else None
    journal = Journal(resume, {"task": "ruler", **setup.settings(model, arms, profile)})
    samples = []
    with journal, setup.session(model, longest, arms, profile) as s:
        if longest > s.n_ctx_train:
            raise FasaError(
                f"--lengths {longest}: {model} was trained on {s.n_ctx_train} tokens of context; use a shorter one"
            )
        prompter, switch = Prompter(s, setup.raw), ArmSwitch(s, profile)
        for n, job in enumerate(jobs):
            result = journal.get(job.key)
            if result is None:
                record = job.record or _record(job, prompter, setup, words)
                prompt = prompter(record["input"], record["answer_prefix"])
                result = _run_sample(s, switch, arms, prompt, record, setup.n_predict or predicts(job.task))
                journal.add(job.key, result)
            samples.append({**result, "length": job.length, "depth": job.depth})
            if progress:
                progress("evaluating", n + 1, len(jobs))
    _check_used(arms, longest, samples)
    return samples


def predicts(task: str) -> int:
    """Tokens that a task's answer may take; RULER's 32 for its question answering, 128 for a name that is not known."""
    return ruler.TASKS[task].n_predict if task in ruler.TASKS else 32 if task.startswith("qa") else 128


def make_records(model: str | os.PathLike, jobs: Sequence[Job], setup: Setup) -> list[dict[str, Any]]:
    """The records of these jobs, without running them."""
    words = ruler.essay_words(setup.text) if setup.text is not None else None
    with setup.session(model, 256) as s:
        prompter = Prompter(s, setup.raw)
        return [j.record or _record(j, prompter, setup, words) for j in jobs]


def record_jobs(model: str | os.PathLike, records: Iterable[dict[str, Any]], setup: Setup) -> list[Job]:
    """Jobs for records that were read: the length of a task is its longest, counted with this model's tokens."""
    with setup.session(model, 256) as s:
        prompter = Prompter(s, setup.raw)
        sizes = [
            (r, len(prompter(r["input"], r["answer_prefix"])) + (setup.n_predict or predicts(r["task"])))
            for r in records
        ]
    longest = {r["task"]: max(n for other, n in sizes if other["task"] == r["task"]) for r, _ in sizes}
    return [Job(r["task"], longest[r["task"]], r["index"], record=r) for r, _ in sizes]


# ---- figures ----


def t_quantile(df: int) -> float:
    """The 97.5% quantile of Student's t."""
    x = np.linspace(0, 13, 130001)  # 12.706 with one degree of freedom
    density = (
        math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2))
        / math.sqrt(df * math.pi)
        * (1 + x**2 / df) ** (-(df + 1) / 2)
    )
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)]) * (x[1] - x[0])
    return float(np.interp(0.475, mass, x))


def paired(diff: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of paired differences in [-1, 1], 95%: see the top of this file."""
    d = np.asarray(diff, float)
    mean, n = float(d.mean()), len(d)
    if np.ptp(d) == 0:
        share = 1 - 0.025 ** (1 / n)  # at most this share may be otherwise
        return mean, mean - share * (1 + mean), mean + share * (1 - mean)
    half = t_quantile(n - 1) * float(d.std(ddof=1)) / math.sqrt(n)
    return mean, max(-1.0, mean - half), min(1.0, mean + half)


def sign_test(lost: int, gained: int) -> float:
    """Two-sided exact p of so uneven a split, when either side is as likely."""
    n = lost + gained
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(lost, gained) + 1)) / 2**n)


def _arm_figures(samples: Sequence[dict[str, Any]], i: int) -> dict[str, Any]:
    """Score and paired difference, in percent, of arm i over samples; tasks and lengths weigh the same."""
    diff = np.array([r["arms"][i]["score"] - r["arms"][0]["score"] for r in samples])
    of = [(r["task"], r["length"]) for r in samples]
    groups = [diff[[o == g for o in of]] for g in dict.fromkeys(of)]
    mean, low, high = paired(diff)
    if len(groups) > 1 and min(map(len, groups)) > 1 and any(np.ptp(g) for g in groups):
        mean = float(np.mean([g.mean() for g in groups]))
        half = (
            t_quantile(len(diff) - len(groups)) * math.sqrt(sum(g.var(ddof=1) / len(g) for g in groups)) / len(groups)
        )
        low, high = max(-1.0, mean - half), min(1.0, mean + half)
    lost, gained = int((diff < 0).sum()), int((diff > 0).sum())
    c = {k: sum(r["arms"][i]["counters"][k] for r in samples) for k in COUNTERS}
    scores = [np.mean([r["arms"][i]["score"] for r, o in zip(samples, of) if o == g]) for g in dict.fromkeys(of)]
    first = samples[0]["arms"][i]
    return {
        "arm": first["arm"],
        "min_context": first["min_context"],
        "score": 100 * float(np.mean(scores)),
        "diff": 100 * mean,
        "diff_ci": [100 * low, 100 * high],
        "lost": lost,
        "gained": gained,
        "sign_p": sign_test(lost, gained),
        **{k: c[k] for k in COUNTERS[:4]},
        "tokens_attended": c["tokens_attended"] / c["lists"] if c["lists"] else None,
        "kv_read_share": (c["bytes_fac"] + c["bytes_tip"]) / c["bytes_dense"] if c["lists"] else 1.0,
    }


def summarize(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each length and task: n, n_prompt (mean tokens) and the arms' figures, dense first.

    A row 'mean' stands for several tasks of a length, one with length None for everything; tasks and lengths weigh the same in them.
    """

    def row(task: str, length: int | None, part: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "task": task,
            "length": length,
            "n": len(part),
            "haystack": part[0]["haystack"],
            "n_prompt": float(np.mean([r["n_prompt"] for r in part])),
            "arms": [_arm_figures(part, i) for i in range(len(part[0]["arms"]))],
        }

    rows, lengths = [], sorted({r["length"] for r in samples})
    for length in lengths:
        here = [r for r in samples if r["length"] == length]
        names = list(dict.fromkeys(r["task"] for r in here))
        rows += [row(name, length, [r for r in here if r["task"] == name]) for name in names]
        if len(names) > 1:
            rows.append(row("mean", length, here))
    return rows + ([row("mean", None, samples)] if len(lengths) > 1 else [])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people: one line a task, length and arm."""
    lines = [["task", "length", "n", "arm", "tokens", "KV read", "score", "diff", "95%", "lost", "gained", "p"]]
    for row in rows:
        for i, a in enumerate(row["arms"]):
            first = [row["task"], str(row["length"] or "all"), str(row["n"])] if i == 0 else ["", "", ""]
            used = "all" if a["min_context"] is None else f"dense (< {a['min_context']})"
            if a["tokens_attended"] is not None:
                used = f"{a['tokens_attended']:.0f}"
            rest = [
                f"{a['diff']:+.1f}",
                "{:+.1f} to {:+.1f}".format(*a["diff_ci"]),
                str(a["lost"]),
                str(a["gained"]),
                f"{a['sign_p']:.2g}",
            ]
            rest = rest if i else [""] * len(rest)
            lines.append([*first, a["arm"], used, f"{100 * a['kv_read_share']:.1f}%", f"{a['score']:.1f}", *rest])
    return "\n".join(columns(lines, 4) + notes(rows))


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was dense in an arm that ran sparse elsewhere, and tasks whose haystack is not RULER's, one line each."""
    out = []
    for row in rows:
        if row["haystack"] == "noise" and row["task"] in ruler.TASKS and ruler.TASKS[row["task"]].haystack == "essay":
            out.append(f"{row['task']} at {row['length']}: no text was given (-f), the haystack is RULER's noise")
        for a in row["arms"][1:]:
            steps, layers = a["steps_sparse"] + a["steps_dense"], a["layers_sparse"] + a["layers_dense"]
            where = f"{a['arm']}, {row['task']} at {row['length']}"
            if a["steps_sparse"] and a["steps_dense"] and row["task"] != "mean":
                out.append(f"{where}: {a['steps_dense']} of {steps} steps were dense")
            if a["steps_sparse"] and a["layers_dense"] and row["task"] != "mean":
                out.append(f"{where}: {100 * a['layers_dense'] / layers:.0f}% of the layers were dense")
    return out


# ---- needles ----


def needle_jobs(lengths: Sequence[int], n_depths: int = 5, samples: int = 1, task: str = "niah_single_2") -> list[Job]:
    """A grid of single needles: n_depths depths from 0 to 1, `samples` in every cell."""
    depths = [0.5] if n_depths == 1 else [round(i / (n_depths - 1), 4) for i in range(n_depths)]
    return [Job(task, length, i, depth) for length in lengths for depth in depths for i in range(samples)]


def needle_grid(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """lengths, depths, n (samples per cell) and, by arm, found: shares [depth][length]."""
    lengths, depths = sorted({r["length"] for r in samples}), sorted({r["depth"] for r in samples})
    cells = {(d, n): [r for r in samples if r["depth"] == d and r["length"] == n] for d in depths for n in lengths}
    arms = [a["arm"] for a in samples[0]["arms"]]
    return {
        "lengths": lengths,
        "depths": depths,
        "n": len(next(iter(cells.values()))),
        "arms": [
            {
                "arm": name,
                "found": [
                    [float(np.mean([r["arms"][i]["score"] for r in cells[d, n]])) for n in lengths] for d in depths
                ],
            }
            for i, name in enumerate(arms)
        ],
    }


def needle_table(rows: Sequence[dict[str, Any]], grid: dict[str, Any]) -> str:
    """For people: found of all per length and arm, with the depths that were found; then the paired figures."""
    lines = [["length", "arm", "found", *(f"{100 * d:.0f}%" for d in grid["depths"])]]
    for j, length in enumerate(grid["lengths"]):
        for i, arm in enumerate(grid["arms"]):
            cells = [share[j] * grid["n"] for share in arm["found"]]
            found = f"{sum(cells):.0f}/{len(cells) * grid['n']}"
            lines.append([str(length) if i == 0 else "", arm["arm"], found, *(f"{c:.0f}" for c in cells)])
    return "\n".join(columns(lines, 2)) + "\n\n" + table(rows)


def result(
    model: str | os.PathLike,
    arms: Sequence[Arm],
    setup: Setup,
    samples: Sequence[dict[str, Any]],
    profile: Profile | None = None,
) -> dict[str, Any]:
    """Everything for --json: the config, the rows of figures and every answer."""
    profile = profile or (Profile.load(model) if any(a.params and not a.profile for a in arms) else None)
    config = {**setup.settings(model, arms, profile), "llama_cpp_python": runtime.library.LLAMA_CPP_VERSION}
    return {"config": config, "rows": summarize(samples), "samples": list(samples)}
