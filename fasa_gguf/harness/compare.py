"""Windows x policies x budgets: what `fasa-gguf compare` runs.

Finished samples are kept in DIR/samples.jsonl, with the windows' tokens among them. So a run goes on where it stopped,
and on another machine without the native library.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..calibrate.corpus import default_corpus
from ..errors import FasaError
from ..params import FasaParams
from ..profile.profile import Profile
from ..quality.arms import Arm, Progress
from ..quality.journal import Journal, model_print, text_print
from ..quality.perplexity import Score, WindowSettings, evaluate
from ..quality.text import cut_windows
from ..runtime.settings import ContextSettings
from ..session import Session
from .calibrate import Knowledge, read_text
from .decoder import Decoder, Prefix
from .policies import POLICIES, parse_spec
from .trials import Trial, plain_trials, tune_trials


@dataclass(kw_only=True)
class CompareSettings:
    """What is compared on what; units are tokens.

    text, tune: contents; without tune the policies keep their defaults.
    """

    model: str
    text: str
    methods: Sequence[str] = ("window", "fasa")  # specs of policies
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

    def check(self) -> CompareSettings:
        """Returns self, or raises FasaError naming the first setting that is out of range."""
        if not 1 <= self.score < self.window:
            raise FasaError(f"--score {self.score}: expected 1 to {self.window - 1} (shorter than the window)")
        for spec in self.methods:
            parse_spec(spec)
        return self

    def describe(self) -> dict[str, Any]:
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


# ---- tokens ----


def read_windows(settings: CompareSettings, journal: Journal) -> dict[str, list[list[int]]]:
    """Windows of window + 1 tokens of each part: text, tune, and the one window of `calibration`."""
    parts = {"text": (settings.text, settings.windows)}
    if settings.tune is None:
        parts["calibration"] = default_corpus()[1], 1
    else:
        parts["tune"], parts["calibration"] = (settings.tune, settings.tune_windows), (settings.tune, 1)
    missing = [part for part in parts if journal.get(f"tokens {part}") is None]
    if missing:
        with Session(settings.model, n_ctx=256, n_batch=32, n_ubatch=32) as s:
            if settings.window > s.n_ctx_train:
                raise FasaError(
                    f"--window {settings.window}: {settings.model} was trained on {s.n_ctx_train} tokens of context; "
                    "use a shorter --window"
                )
            for part in missing:
                text, n = parts[part]
                journal.add(f"tokens {part}", cut_windows(s, text, n, settings.window, settings.score))
    return {part: journal.get(f"tokens {part}") for part in parts}


# ---- samples ----


class Runner:
    """Runs trials on windows.

    The trials of a window share its dense prefix and dense logits; both are kept for the last `keep` windows.
    """

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
                prefix, tokens[-1 - self.score : -1], POLICIES["dense"](self.decoder.shape, 0)
            )
            self._shared[part, i] = prefix, logits.log_softmax(-1), counters
        return self._shared[part, i]

    def sample(self, part: str, i: int, trial: Trial) -> dict[str, Any]:
        """nll, kl, hit [score] and counters of one window's tail, as perplexity.Score takes them."""
        key = f"{part} {i} {trial.spec} {trial.budget}"
        if (done := self.journal.get(key)) is not None:
            return done
        prefix, dense, counters = self._window(part, i)
        tokens, logp = self.windows[part][i], dense
        if trial.spec != "dense":
            logits, counters = self.decoder.decode(
                prefix, tokens[-1 - self.score : -1], trial.policy(self.decoder, self.knowledge)
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


def learn(runner: Runner, settings: CompareSettings, progress: Progress) -> Knowledge:
    """What the policies in question need to know of the model."""
    out = Knowledge(settings.profile)
    if any(parse_spec(spec)[0].name in ("paper", "double-sparsity") for spec in settings.methods):
        found = runner.journal.get("calibration")
        if found is None:
            progress("calibrating", 0, 1)
            found = read_text(runner.decoder, runner.windows["calibration"][0][:-1])
            runner.journal.add("calibration", found)
            progress("calibrating", 1, 1)
        out.ca, out.channels = found["ca"], found["channels"]
    return out


# ---- the shipped library ----


def library_arms(trials: Sequence[Trial], decoder: Decoder, profile: Profile | None) -> dict[Trial, Arm]:
    """FASA's trials as arms of perplexity.evaluate, without those that have an option that the library lacks."""
    out: dict[Trial, Arm] = {}
    for trial in trials:
        kind, given = parse_spec(trial.spec)
        if kind.name not in ("fasa", "fasa-mass") or given.keys() & {"weights", "dense_layers"}:
            continue
        if any((trial.spec, trial.budget) == (other.spec, other.budget) for other in out):
            continue
        policy: Any = trial.policy(decoder, Knowledge(profile))
        floor, cap = policy.bounds()
        params = FasaParams(
            chunks=policy.chunks(),
            budget=max(trial.budget, 1),
            mass=policy.mass,
            floor=floor,
            cap=cap,
            sink=policy.sink,
            recent=policy.recent,
            min_context=0,
            k_dom=policy.k_dom,
            per_head=int(not policy.shared),
        )
        out[trial] = Arm(f"{trial.spec} {trial.budget}", params, profile)
    return out


def library_results(
    settings: CompareSettings, arms: dict[Trial, Arm], out: Path, progress: Progress
) -> list[dict[str, Any]]:
    """The results of perplexity.evaluate on the same windows, dense first; resumable in DIR/library-*.jsonl."""
    name = f"library-{text_print(repr(sorted(a.name for a in arms.values())))}.jsonl"
    results = evaluate(
        settings.model,
        settings.text,
        list(arms.values()),
        WindowSettings(settings.windows, settings.window, settings.score),
        ContextSettings(n_threads=settings.threads, mode="auto"),
        progress=lambda what, n, total: progress("the library", n, total),
        resume=out / name,
    )
    trials = [Trial("dense", 0), *arms]
    return [{**r, "spec": t.spec, "budget": t.budget} for r, t in zip(results, trials, strict=True)]


# ---- all of it ----


def trial_figures(trial: Trial, score: Score, dense: Score, n_layer: int) -> dict[str, Any]:
    """The figures of one trial; bytes_per_token: read by one layer for one decoded token."""
    c = score.counters
    kind, options = parse_spec(trial.spec)
    return {
        "method": kind.name,
        "asked": trial.asked or kind.name,
        "spec": trial.spec,
        "options": options,
        "budget": trial.budget,
        **score.figures(dense),
        "bytes_per_token": (c["bytes_fac"] + c["bytes_tip"]) / (c["steps_sparse"] * n_layer),
        "score_share": c["bytes_tip"] / c["bytes_dense"],
    }


def _run_trials(runner: Runner, trials: Sequence[Trial], windows: int, progress: Progress) -> dict[Trial, Score]:
    """The scores of every trial over all windows of the text."""
    scores, done = {trial: Score(trial.spec) for trial in trials}, 0
    for i in range(windows):
        for trial in trials:
            scores[trial].add(runner.sample("text", i, trial))
            done += 1
            progress("comparing", done, len(trials) * windows)
    return scores


def _config(settings: CompareSettings, decoder: Decoder) -> dict[str, Any]:
    return {
        **settings.describe(),
        "methods": list(settings.methods),
        "budgets": list(settings.budgets),
        "sink": settings.sink,
        "recent": settings.recent,
        "texts": settings.texts,
        "device": settings.device,
        "torch": torch.__version__,
        "fasa_gguf": __version__,
        "kv_type": "f16",
        "tuned": bool(settings.tune),
        "shape": asdict(decoder.shape),
    }


def compare(
    settings: CompareSettings,
    out: str | os.PathLike,
    prepare: bool = False,
    library: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Run what is missing and write DIR's results.md, results.json, budget.png and bytes.png.

    Returns what results.json holds: config, rows (results, dense first), trials of the tuning, library results.
    prepare: only cut the windows into DIR/samples.jsonl; returns None. Raises FasaError for a model that the harness
    does not run, a text that is too short, a DIR of another comparison.
    """
    from .report import write_results

    progress = progress or (lambda what, n, total: None)
    out = Path(out)
    settings.check()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FasaError(f"{out}: cannot be made: {e.strerror or e}; give another -o") from None
    with Journal(out / "samples.jsonl", settings.describe()) as journal:
        windows = read_windows(settings, journal)
        if prepare:
            return None
        decoder = Decoder(settings.model, settings.device)
        runner = Runner(decoder, windows, settings.score, journal, settings.tune_windows if settings.tune else 1)
        runner.knowledge = learn(runner, settings, progress)
        tuned = tune_trials(runner, settings, progress) if settings.tune else (plain_trials(settings), [])
        trials = [Trial("dense", 0), *dict.fromkeys(tuned[0])]
        for trial in trials:
            trial.policy(decoder, runner.knowledge)  # refuses before anything runs
        scores = _run_trials(runner, trials, settings.windows, progress)
    dense, n_layer = scores[trials[0]], decoder.shape.n_layer
    result = {
        "config": _config(settings, decoder),
        "rows": [trial_figures(t, scores[t], dense, n_layer) for t in trials],
        "trials": tuned[1],
        "library": [],
    }
    if library and (arms := library_arms(trials, decoder, settings.profile)):
        result["library"] = library_results(settings, arms, out, progress)
    write_results(result, out)
    return result
