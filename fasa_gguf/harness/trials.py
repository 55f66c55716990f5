"""Which trials a comparison runs: every policy at every budget, with default options or tuned ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..quality.arms import Progress
from ..quality.perplexity import Score
from .calibrate import Knowledge
from .decoder import Decoder
from .policies import parse_spec, spec_text
from .policy import Policy

if TYPE_CHECKING:
    from .compare import CompareSettings, Runner

MAX_SCORE_SHARE = 1 / 8  # of dense's bytes that a tuned policy may read to choose
MASS_STEPS = 8  # halvings of the target mass when it is tuned to a mean budget


@dataclass(frozen=True)
class Trial:
    """One line of the table: a policy with its options at a budget; 0: it counts by itself. asked: the spec that the
    user gave, which names a curve."""

    spec: str
    budget: int
    asked: str = ""

    def policy(self, decoder: Decoder, knowledge: Knowledge | None) -> Policy:
        """A fresh one for one window."""
        kind, options = parse_spec(self.spec)
        return kind(decoder.shape, self.budget, knowledge, **options)


def forced_options(kind: type[Policy], given: dict[str, Any], settings: CompareSettings) -> dict[str, Any]:
    """`given`, and the user's sinks and recent tokens where the policy has forced tokens and its spec does not set
    them."""
    ours = {"sink": settings.sink, "recent": settings.recent} if "sink" not in kind.options else {}
    return {**ours, **given}


def plain_trials(settings: CompareSettings) -> list[Trial]:
    """One trial for each policy and budget, defaults where the user fixed nothing; a fixed mass makes one trial."""
    out = []
    for spec in settings.methods:
        kind, given = parse_spec(spec)
        options = forced_options(kind, given, settings)
        budgets = [0] if options.get("mass") else settings.budgets
        if kind.name != "dense":
            out += [Trial(spec_text(kind, options), b, spec) for b in budgets]
    return out


@dataclass
class _Grid:
    """The options to try for one policy at one budget."""

    asked: str
    kind: type[Policy]
    options: dict[str, Any]  # that are fixed
    budget: int
    candidates: list[dict[str, Any]]

    @property
    def is_mass(self) -> bool:
        return self.kind.tuned and not self.options.get("mass")

    @property
    def n_tried(self) -> int:
        return MASS_STEPS if self.is_mass else len(self.candidates) if len(self.candidates) > 1 else 0


def _grids(runner: Runner, settings: CompareSettings) -> list[_Grid]:
    out = []
    for spec in settings.methods:
        kind, given = parse_spec(spec)
        if kind.name == "dense":
            continue
        options = forced_options(kind, given, settings)
        is_fixed = bool(options.get("mass"))
        candidates = [c for c in kind.candidates(runner.decoder.shape) if not is_fixed and not set(c) & set(given)]
        out += [_Grid(spec, kind, options, b, candidates or [{}]) for b in ([0] if is_fixed else settings.budgets)]
    return out


class _Tuner:
    """Runs trials on the tuning text and keeps their figures."""

    def __init__(self, runner: Runner, n_windows: int, n_tried: int, progress: Progress) -> None:
        self.runner, self.n, self.progress = runner, n_windows, progress
        self.total, self.done = n_windows * n_tried, 0
        self.tried: list[dict[str, Any]] = []

    def run(self, trial: Trial) -> dict[str, Any]:
        score = Score(trial.spec)
        for i in range(self.n):
            score.add(self.runner.sample("tune", i, trial))
            self.done += 1
            self.progress("tuning", self.done, self.total)
        c = score.counters
        entry = {
            "spec": trial.spec,
            "budget": trial.budget,
            "kl": score.figures(score)["kl"],
            "tokens": c["tokens_attended"] / c["lists"],
            "score_share": c["bytes_tip"] / c["bytes_dense"],
        }
        self.tried.append(entry)
        return entry

    def best(self, grid: _Grid) -> str:
        """The spec that does best."""
        if grid.is_mass:
            return tune_mass(grid.kind, grid.options, grid.budget, self.run)
        if len(grid.candidates) == 1:
            return spec_text(grid.kind, grid.options)
        specs = [spec_text(grid.kind, {**grid.options, **c}) for c in grid.candidates]
        tried = [self.run(Trial(spec, grid.budget)) for spec in specs]
        small = [t for t in tried if t["score_share"] <= MAX_SCORE_SHARE * 1.001] or tried
        return min(small, key=lambda t: t["kl"])["spec"]


def tune_trials(
    runner: Runner, settings: CompareSettings, progress: Progress
) -> tuple[list[Trial], Sequence[dict[str, Any]]]:
    """(the trials with the options that did best on the tuning text, every trial of the tuning).

    Best is the least KL among those that read at most 1/8 of dense's bytes to choose, at the same budget; of masses the
    largest whose mean is within the budget.
    """
    grids = _grids(runner, settings)
    tuner = _Tuner(runner, settings.tune_windows, sum(g.n_tried for g in grids), progress)
    return [Trial(tuner.best(g), g.budget, g.asked) for g in grids], tuner.tried


def tune_mass(kind: type[Policy], options: dict[str, Any], budget: int, run: Callable[[Trial], dict[str, Any]]) -> str:
    """The spec with the largest target mass whose mean count is within the budget, found by halving -log(1 - mass)."""
    low, high, best = 0.1, 7.0, None
    for _ in range(MASS_STEPS):
        x = (low + high) / 2
        spec = spec_text(kind, {**options, "mass": float(f"{1 - math.exp(-x):.5g}")})
        fits = run(Trial(spec, budget))["tokens"] <= budget
        low, high, best = (x, high, spec) if fits else (low, x, best)
    return best or spec_text(kind, {**options, "mass": 0.1})
