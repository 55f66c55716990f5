"""Windows x methods x budgets: what `fasa-gguf compare` runs. Finished samples are kept in DIR/samples.jsonl, the windows' tokens
among them, so that a run goes on where it stopped, and elsewhere without the native library."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..calibrate.gguf import default_corpus
from ..errors import FasaError
from ..gguf.file import GGUFFile
from ..params import FasaParams
from ..profile.profile import Profile
from ..quality.arms import Arm
from ..quality.journal import Journal, model_print, text_print
from ..quality.perplexity import Score, cut_windows, evaluate
from ..session import Session
from .calibrate import Knowledge, read_text
from .decoder import Decoder, Prefix
from .methods import METHODS, Method, parse_spec, spec_text

MAX_SCORE_SHARE = 1 / 8  # of dense's bytes that a tuned method may read to choose
MASS_STEPS = 8  # halvings of the target mass when it is tuned to a mean budget
Report = Callable[[str, int, int], None]


@dataclass
class Setup:
    """What is compared on what; units are tokens. text, tune: contents; without tune the methods keep their defaults."""

    model: str
    text: str
    methods: Sequence[str] = ("window", "fasa")
    budgets: Sequence[int] = (256,)
    windows: int = 10
    window: int = 4096
    score: int = 384
    tune: str | None = None
    tune_windows: int = 2
    sink: int = 4
    recent: int = 32
    device: str = "cpu"
    profile: Profile | None = None
    threads: int = 0
    texts: dict[str, str] = field(default_factory=dict)  # names of the texts, for the report

    def check(self) -> Setup:
        """Returns self, or raises FasaError naming the first setting that is out of range."""
        if not 1 <= self.score < self.window:
            raise FasaError(f"--score {self.score}: expected 1 to {self.window - 1} (shorter than the window)")
        for spec in self.methods:
            parse_spec(spec)
        return self

    def settings(self) -> dict[str, Any]:
        """What every sample depends on."""
        return {
            "task": "compare",
            "model": model_print(self.model),
            "text": text_print(self.text),
            "tune": text_print(self.tune),
            "windows": self.windows,
            "window": self.window,
            "score": self.score,
            "tune_windows": self.tune_windows,
            "profile": text_print(self.profile.to_json()) if self.profile else None,
        }


@dataclass(frozen=True)
class Job:
    """One row of the table: a method with its options at a budget; 0: it counts by itself. asked: what the user named, a curve."""

    spec: str
    budget: int
    asked: str = ""

    def method(self, decoder: Decoder, knowledge: Knowledge | None) -> Method:
        kind, options = parse_spec(self.spec)
        return kind(decoder.shape, self.budget, knowledge, **options)


def find_profile(path: str | os.PathLike | None, model: str | os.PathLike) -> Profile | None:
    """The profile given, or the model's own, or None."""
    return Profile.load(path) if path else Profile.from_gguf(GGUFFile(model))


# ---- tokens ----


def read_windows(setup: Setup, journal: Journal) -> dict[str, list[list[int]]]:
    """Windows of window + 1 tokens of each part: text, tune, and the one window of `calibration`."""
    parts = {
        "text": (setup.text, setup.windows),
        "tune": (setup.tune, setup.tune_windows),
        "calibration": (setup.tune, 1),
    }
    if setup.tune is None:
        parts = {"text": parts["text"], "calibration": (default_corpus()[1], 1)}
    missing = [part for part in parts if journal.get(f"tokens {part}") is None]
    if missing:
        with Session(setup.model, n_ctx=256, n_batch=32, n_ubatch=32) as s:
            if setup.window > s.n_ctx_train:
                raise FasaError(
                    f"--window {setup.window}: {setup.model} was trained on {s.n_ctx_train} tokens of context; use a shorter --window"
                )
            for part in missing:
                text, n = parts[part]
                journal.add(f"tokens {part}", cut_windows(s, text, n, setup.window, setup.score))
    return {part: journal.get(f"tokens {part}") for part in parts}


# ---- samples ----


class Runner:
    """Runs jobs on windows; what a window's jobs share, the dense prefix and the dense logits, is kept for the last few windows."""

    def __init__(
        self, decoder: Decoder, windows: dict[str, list[list[int]]], score: int, journal: Journal, keep: int
    ) -> None:
        self.decoder, self.windows, self.score, self.journal, self.keep = decoder, windows, score, journal, keep
        self.knowledge: Knowledge | None = None
        self._shared: OrderedDict[tuple[str, int], tuple[Prefix, torch.Tensor, dict[str, int]]] = OrderedDict()

    def _window(self, part: str, i: int) -> tuple[Prefix, torch.Tensor, dict[str, int]]:
        """(prefix, dense log-probabilities [score, n_vocab], dense's counters)."""
        if (part, i) not in self._shared:
            while len(self._shared) >= self.keep:
                self._shared.popitem(last=False)
            tokens = self.windows[part][i]
            prefix = self.decoder.prefill(tokens[: -1 - self.score])
            logits, counters = self.decoder.decode(
                prefix, tokens[-1 - self.score : -1], METHODS["dense"](self.decoder.shape, 0)
            )
            self._shared[part, i] = prefix, logits.log_softmax(-1), counters
        return self._shared[part, i]

    def sample(self, part: str, i: int, job: Job) -> dict[str, Any]:
        """nll, kl, hit [score] and counters of one window's tail, as evaluate.Score takes them."""
        key = f"{part} {i} {job.spec} {job.budget}"
        if (done := self.journal.get(key)) is not None:
            return done
        prefix, dense, counters = self._window(part, i)
        tokens, logp = self.windows[part][i], dense
        if job.spec != "dense":
            logits, counters = self.decoder.decode(
                prefix, tokens[-1 - self.score : -1], job.method(self.decoder, self.knowledge)
            )
            logp = logits.log_softmax(-1)
        target = torch.as_tensor(tokens[-self.score :], device=logp.device)
        values = {
            "nll": -logp.gather(-1, target[:, None])[:, 0],
            "kl": (dense.exp() * (dense - logp)).sum(-1),
            "hit": (dense.argmax(-1) == logp.argmax(-1)).double(),
        }
        out = {name: [float(f"{x:.7g}") for x in v.tolist()] for name, v in values.items()} | {"counters": counters}
        self.journal.add(key, out)
        return out


def learn(runner: Runner, setup: Setup, report: Report) -> Knowledge:
    """What the methods in question need to know of the model."""
    out = Knowledge(setup.profile)
    if any(parse_spec(spec)[0].name in ("paper", "double-sparsity") for spec in setup.methods):
        found = runner.journal.get("calibration")
        if found is None:
            report("calibrating", 0, 1)
            found = read_text(runner.decoder, runner.windows["calibration"][0][:-1])
            runner.journal.add("calibration", found)
            report("calibrating", 1, 1)
        out.ca, out.channels = found["ca"], found["channels"]
    return out


# ---- jobs ----


def forced_options(kind: type[Method], given: dict[str, Any], setup: Setup) -> dict[str, Any]:
    """The user's sinks and recent tokens, where the method has forced tokens at all and its own spec does not say otherwise."""
    ours = {"sink": setup.sink, "recent": setup.recent} if "sink" not in kind.options else {}
    return {**ours, **given}


def plain_jobs(setup: Setup) -> list[Job]:
    """One job for each method and budget, defaults where the user fixed nothing; a fixed mass makes one job."""
    out = []
    for spec in setup.methods:
        kind, given = parse_spec(spec)
        options = forced_options(kind, given, setup)
        if kind.name != "dense":
            out += [Job(spec_text(kind, options), b, spec) for b in ([0] if options.get("mass") else setup.budgets)]
    return out


def tune_jobs(runner: Runner, setup: Setup, report: Report) -> tuple[list[Job], list[dict[str, Any]]]:
    """The jobs with the options that did best on the tuning text, and every trial. Best: the least KL among those that read at most
    1/8 of dense's bytes to choose, at the same budget; a mass: the largest whose mean is within the budget."""
    grids = []
    for spec in setup.methods:
        kind, given = parse_spec(spec)
        if kind.name == "dense":
            continue
        options = forced_options(kind, given, setup)
        fixed = bool(options.get("mass"))
        grid = [c for c in kind.candidates(runner.decoder.shape) if not fixed and not set(c) & set(given)] or [{}]
        grids += [(spec, kind, options, b, grid) for b in ([0] if fixed else setup.budgets)]
    n, trials, jobs, done = setup.tune_windows, [], [], 0
    cost = [
        n * (MASS_STEPS if kind.tuned and not options.get("mass") else len(grid) if len(grid) > 1 else 0)
        for _, kind, options, _, grid in grids
    ]

    def trial(job: Job) -> dict[str, Any]:
        nonlocal done
        score = Score(job.spec)
        for i in range(n):
            score.add(runner.sample("tune", i, job))
            done += 1
            report("tuning", done, sum(cost))
        c = score.counters
        entry = {
            "spec": job.spec,
            "budget": job.budget,
            "kl": score.row(score)["kl"],
            "tokens": c["tokens_attended"] / c["lists"],
            "score_share": c["bytes_tip"] / c["bytes_dense"],
        }
        trials.append(entry)
        return entry

    for spec, kind, options, budget, grid in grids:
        if kind.tuned and not options.get("mass"):
            jobs.append(Job(tune_mass(kind, options, budget, trial), budget, spec))
        elif len(grid) == 1:
            jobs.append(Job(spec_text(kind, options), budget, spec))
        else:
            tried = [trial(Job(spec_text(kind, {**options, **c}), budget)) for c in grid]
            small = [t for t in tried if t["score_share"] <= MAX_SCORE_SHARE * 1.001] or tried
            jobs.append(Job(min(small, key=lambda t: t["kl"])["spec"], budget, spec))
    return jobs, trials


def tune_mass(kind: type[Method], options: dict[str, Any], budget: int, trial: Callable[[Job], dict[str, Any]]) -> str:
    """The spec with the largest target mass, of those that halving tries, whose mean count is within the budget. Searched in -log(1 - mass)."""
    low, high, best = 0.1, 7.0, None
    for _ in range(MASS_STEPS):
        x = (low + high) / 2
        spec = spec_text(kind, {**options, "mass": float(f"{1 - math.exp(-x):.5g}")})
        fits = trial(Job(spec, budget))["tokens"] <= budget
        low, high, best = (x, high, spec) if fits else (low, x, best)
    return best or spec_text(kind, {**options, "mass": 0.1})


# ---- the shipped library ----


def library_arms(jobs: Sequence[Job], decoder: Decoder, profile: Profile | None) -> dict[Job, Arm]:
    """FASA's jobs as arms of evaluate.evaluate; those with an option that the library does not have are left out."""
    out = {}
    for job in jobs:
        kind, given = parse_spec(job.spec)
        if kind.name not in ("fasa", "fasa-mass") or given.keys() & {"weights", "dense_layers"}:
            continue
        if any((job.spec, job.budget) == (other.spec, other.budget) for other in out):
            continue
        m = job.method(decoder, Knowledge(profile))
        floor, cap = m.bounds()
        params = FasaParams(
            chunks=m.chunks(),
            budget=max(job.budget, 1),
            mass=m.mass,
            floor=floor,
            cap=cap,
            sink=m.sink,
            recent=m.recent,
            min_context=0,
            k_dom=m.k_dom,
            per_head=int(not m.shared),
        )
        out[job] = Arm(f"{job.spec} {job.budget}", params, profile)
    return out


def library_rows(setup: Setup, arms: dict[Job, Arm], out: Path, report: Report) -> list[dict[str, Any]]:
    """The rows of evaluate.evaluate on the same windows, dense first; resumable in DIR/library-*.jsonl."""
    name = f"library-{text_print(repr(sorted(a.name for a in arms.values())))}.jsonl"
    rows = evaluate(
        setup.model,
        setup.text,
        list(arms.values()),
        setup.windows,
        setup.window,
        setup.score,
        setup.threads,
        progress=lambda what, n, total: report("the library", n, total),
        resume=out / name,
    )
    return [
        {**row, "spec": job.spec if job else "dense", "budget": job.budget if job else 0}
        for row, job in zip(rows, [None, *arms])
    ]


# ---- all of it ----


def job_row(job: Job, score: Score, dense: Score, n_layer: int) -> dict[str, Any]:
    """The figures of one job; bytes_per_token: read by one layer for one decoded token."""
    c = score.counters
    kind, options = parse_spec(job.spec)
    return {
        "method": kind.name,
        "asked": job.asked or kind.name,
        "spec": job.spec,
        "options": options,
        "budget": job.budget,
        **score.row(dense),
        "bytes_per_token": (c["bytes_fac"] + c["bytes_tip"]) / (c["steps_sparse"] * n_layer),
        "score_share": c["bytes_tip"] / c["bytes_dense"],
    }


def compare(
    setup: Setup, out: str | os.PathLike, plan_only: bool = False, library: bool = False, report: Report | None = None
) -> dict[str, Any] | None:
    """Run what is missing and write DIR's results.md, results.json, budget.png and bytes.png. Returns what results.json holds:
    config, rows (dense first), trials of the tuning, library rows. plan_only: cut the windows into DIR/samples.jsonl and stop.

    Raises FasaError for a model that the harness does not run, a text that is too short, a DIR of another comparison.
    """
    from .report import write_results

    report = report or (lambda what, n, total: None)
    out = Path(out)
    setup.check()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FasaError(f"{out}: cannot be made: {e.strerror or e}; give another -o") from None
    with Journal(out / "samples.jsonl", setup.settings()) as journal:
        windows = read_windows(setup, journal)
        if plan_only:
            return None
        decoder = Decoder(setup.model, setup.device)
        runner = Runner(decoder, windows, setup.score, journal, setup.tune_windows if setup.tune else 1)
        runner.knowledge = learn(runner, setup, report)
        jobs, trials = tune_jobs(runner, setup, report) if setup.tune else (plain_jobs(setup), [])
        for job in jobs:
            job.method(decoder, runner.knowledge)  # refuses before anything runs
        every = [Job("dense", 0), *dict.fromkeys(jobs)]
        scores, done = {job: Score(job.spec) for job in every}, 0
        for i in range(setup.windows):
            for job in every:
                scores[job].add(runner.sample("text", i, job))
                done += 1
                report("comparing", done, len(every) * setup.windows)
    dense = scores[every[0]]
    config = {
        **setup.settings(),
        "methods": list(setup.methods),
        "budgets": list(setup.budgets),
        "sink": setup.sink,
        "recent": setup.recent,
        "texts": setup.texts,
        "device": setup.device,
        "torch": torch.__version__,
        "fasa_gguf": __version__,
        "kv_type": "f16",
        "tuned": bool(setup.tune),
        "shape": asdict(decoder.shape),
    }
    result = {
        "config": config,
        "rows": [job_row(j, scores[j], dense, decoder.shape.n_layer) for j in every],
        "trials": trials,
        "library": [],
    }
    if library and (arms := library_arms(every, decoder, setup.profile)):
        result["library"] = library_rows(setup, arms, out, report)
    write_results(result, out)
    return result
