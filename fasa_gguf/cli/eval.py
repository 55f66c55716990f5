"""The command `eval`."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import FasaError
from ..params import FasaParams
from ..profile.find import require_profile
from ..profile.profile import Profile
from ..quality.arms import Arm, parse_arms
from ..quality.questions import PLACES
from ..runtime.settings import ContextSettings
from .arguments import (
    AddCommand,
    add_context_flags,
    add_fasa_flags,
    add_model,
    add_rpc,
    comma_list,
    note,
    read_context,
    read_params,
    read_text,
    shares,
    whole,
)
from .progress import progress_bar

NUMBERS = ("num_needle_k", "num_needle_v", "num_needle_q", "num_chains", "num_hops")  # of ruler.Numbers

# the flags that only some tasks take, with their defaults
TASK_FLAGS: dict[str, dict[str, Any]] = {
    "ppl": {"windows": 10, "window": 4096, "score": 384, "score_batch": 1, "dense_steps": False, "own_prompt": False},
    "ruler": {
        "tasks": None,
        "lengths": [4096],
        "samples": 10,
        "seed": 42,
        "raw": False,
        "n_predict": 0,
        "own_prompt": False,
        **dict.fromkeys(NUMBERS, 0),
        "records": None,
        "save_records": None,
    },
    "needle": {
        "lengths": [1000, 2000, 4000, 7000],
        "depths": 5,
        "samples": 1,
        "seed": 42,
        "raw": False,
        "n_predict": 0,
        "own_prompt": False,
        "question": None,
        "png": None,
    },
    "long": {"windows": 1, "window": 2048, "n_predict": 2000},
}


def places(text: str) -> list[str]:
    """A comma list of places of a question."""
    names = text.split(",")
    if bad := [name for name in names if name not in PLACES]:
        raise argparse.ArgumentTypeError(f"expected a comma list of {', '.join(PLACES)}, found {bad[0]!r}")
    return names


def _apply_task_flags(a: argparse.Namespace) -> None:
    """Set the task's defaults. Raises FasaError for a flag of another task and for a missing text."""
    mine = TASK_FLAGS[a.task]
    for name in {name for flags in TASK_FLAGS.values() for name in flags}:
        given = getattr(a, name)
        if given is not None and name not in mine:
            users = " and ".join(f"--task {task}" for task, flags in TASK_FLAGS.items() if name in flags)
            raise FasaError(f"--{name.replace('_', '-')} is for {users}, not for --task {a.task}; omit it")
        if given is None and name in mine:
            setattr(a, name, mine[name])
    if a.file is None and a.task in ("ppl", "long"):
        raise FasaError(f"--task {a.task} needs a text; give -f FILE")


def _arm_name(a: argparse.Namespace, p: FasaParams, profile: Profile) -> str:
    size = f"mass={p.mass:g}" if p.mass > 0 else f"mean={p.mean_budget}" if p.mean_budget else f"B={p.budget}"
    return " ".join(filter(None, [a.fasa_preset, profile.ranking_method, f"k={p.chunks or 'auto'}", p.k_dom, size]))


def _settings_of(
    a: argparse.Namespace, own: tuple[FasaParams, Profile], path: str | None
) -> tuple[FasaParams, Profile]:
    """The settings and profile of an arm of --arms: those of a file that it names, else `own`."""
    return read_params(a, Profile.load(path)) if path else own


def _arms(a: argparse.Namespace) -> list[Arm]:
    """One arm for each profile and budget, mass or text of --arms; without any of the three, one for each profile."""
    if a.arms and not (a.profile or a.budgets or a.masses):
        # the model needs no profile when every arm names one
        load = functools.cache(lambda path: read_params(a, require_profile(a.model, path, note)))
        return parse_arms(a.arms, load)
    arms: list[Arm] = []
    paths = a.profile.split(",") if a.profile else [None]
    for path in paths:
        base, profile = read_params(a, require_profile(a.model, path, note))
        settings = [base.replace(budget=b, mass=0.0, mean_budget=0) for b in a.budgets or []]
        settings += [base.replace(mass=m, mean_budget=0) for m in a.masses or []]
        for p in settings or ([] if a.arms else [base]):
            arms.append(Arm(_arm_name(a, p, profile), p.check(), profile))
        if a.arms:
            prefix = f"{Path(path).name} " if path and len(paths) > 1 else ""
            arms += parse_arms(a.arms, functools.partial(_settings_of, a, (base, profile)), prefix)
    return arms


def _context(a: argparse.Namespace) -> ContextSettings:
    return read_context(a, n_ubatch=a.ubatch_size, n_batch=max(512, a.ubatch_size))


def _print(a: argparse.Namespace, result: Any, table: str) -> None:
    print(json.dumps(result, indent=1) if a.json else table)


def cmd_eval(a: argparse.Namespace) -> None:
    _apply_task_flags(a)
    text = read_text(a.file, a.detokenize) if a.file else None
    arms = _arms(a)
    if a.task == "ppl":
        _eval_perplexity(a, text, arms)
    elif a.task == "long":
        _eval_long_text(a, text, arms)
    else:
        _eval_answers(a, text, arms)


def _eval_perplexity(a: argparse.Namespace, text: str | None, arms: list[Arm]) -> None:
    from ..quality.perplexity import WindowSettings, evaluate, format_scores

    windows = WindowSettings(a.windows, a.window, a.score, not a.dense_steps, a.own_prompt, a.score_batch)
    results = evaluate(a.model, text or "", arms, windows, _context(a), progress=progress_bar(), resume=a.resume)
    _print(a, results, format_scores(results))


def _eval_long_text(a: argparse.Namespace, text: str | None, arms: list[Arm]) -> None:
    from ..quality.long_text import format_long_text, run_long
    from ..quality.tasks import TaskSettings

    settings = TaskSettings(text, context=_context(a))
    out = run_long(a.model, arms, a.n_predict, a.window, a.windows, settings, progress=progress_bar(), resume=a.resume)
    _print(a, out, format_long_text(out["rows"]))


def _eval_answers(a: argparse.Namespace, text: str | None, arms: list[Arm]) -> None:
    """--task ruler and needle."""
    from ..quality import ruler, tasks
    from ..quality.answers import format_answers
    from ..quality.needles import format_needles, needle_grid, needle_questions
    from ..quality.questions import format_questions, shared_tile

    places = a.question if a.task == "needle" and a.question else []
    numbers = ruler.Numbers(*(getattr(a, name) for name in NUMBERS)) if a.task == "ruler" else ruler.Numbers()
    if places and a.n_predict:
        raise FasaError("--n-predict: nothing is written with --question; omit one of the two")
    if a.task == "ruler" and a.records and numbers.given():
        raise FasaError(f"--{next(iter(numbers.given())).replace('_', '-')} makes records; omit it, or --records")
    own_prompt = a.own_prompt or bool(places)  # where the answer stands in the prompt, the prompt is all there is
    settings = tasks.TaskSettings(text, a.seed, a.raw, a.n_predict, own_prompt, _context(a), numbers)
    if a.task == "needle":
        tile = shared_tile(arms) if places else 0
        questions = needle_questions(a.lengths, a.depths, a.samples, places=places, tile=tile)
    elif a.records:
        questions = tasks.record_questions(a.model, ruler.read_records(a.records), settings)
    else:
        names = a.tasks.split(",") if a.tasks else list(ruler.TASKS)
        questions = [tasks.Question(name, n, i) for n in a.lengths for name in names for i in range(a.samples)]
    if a.task == "ruler" and a.save_records:
        ruler.write_records(a.save_records, tasks.make_records(a.model, questions, settings))
    samples = tasks.run_questions(a.model, questions, arms, settings, progress=progress_bar(), resume=a.resume)
    out = tasks.result(a.model, arms, settings, samples)
    if a.task == "ruler":
        _print(a, out, format_answers(out["rows"]))
        return
    out["grid"] = needle_grid(samples)
    if a.png:
        from ..report.pictures import save_needle_map

        save_needle_map(out["grid"], a.png)
        print(f"needle map: {a.png}", file=sys.stderr)
    _print(a, out, format_questions(out["rows"]) if places else format_needles(out["rows"], out["grid"]))


def _add_flags_of_all_tasks(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--task",
        choices=tuple(TASK_FLAGS),
        default="ppl",
        help="ppl: perplexity and KL, teacher-forced; ruler: RULER's synthetic tasks; needle: single needles, "
        "depth x length; long: a long continuation [ppl]",
    )
    p.add_argument(
        "-f",
        "--file",
        help="text: to score (ppl), to hide needles in (ruler, needle; RULER's noise without it), to continue (long)",
    )
    p.add_argument("--detokenize", choices=("wikitext",), help="undo a corpus' word tokenisation")
    p.add_argument("--budgets", type=comma_list(1), help="comma list; one arm each")
    p.add_argument("--masses", type=shares, help="comma list of target masses; one arm each")
    p.add_argument(
        "--arms",
        metavar="TEXT",
        help="arms with settings of their own, such as 'mass=0.9,cap=4096;mass=0.9,floor=16'; "
        "profile=FILE is one too, ubatch=N is of the arm's own prompt, `dense` alone is dense step by step",
    )
    p.add_argument(
        "--resume", metavar="FILE.jsonl", help="keep every finished sample here, and skip those that are there"
    )
    p.add_argument("--json", action="store_true", help="figures as JSON")


def _add_flags_of_some_tasks(p: argparse.ArgumentParser) -> None:
    """The flags of TASK_FLAGS; none has a default of its own."""
    p.add_argument("--windows", type=whole(1), help="ppl: windows [10]; long: texts [1]")
    p.add_argument(
        "--window",
        type=whole(2),
        help="ppl: tokens per window [4096]; long: tokens of text before the continuation [2048]",
    )
    p.add_argument("--score", type=whole(2), help="ppl: last tokens of a window that are decoded and scored [384]")
    p.add_argument(
        "--score-batch",
        type=whole(1),
        help="ppl: scored tokens that an arm decodes at once, as drafts are: the same figures, sooner; dense decodes "
        "all at once, or as the arms with --dense-steps [1]",
    )
    p.add_argument(
        "--dense-steps",
        action="store_true",
        default=None,
        help="ppl: decode dense as the other arms, token by token or --score-batch at a time",
    )
    p.add_argument(
        "--own-prompt",
        action="store_true",
        default=None,
        help="ppl, ruler, needle: every arm processes the prompt with its own settings, sparsely where --fasa-prefill "
        "says so; without it the prompt is dense, once for all arms",
    )
    p.add_argument("--tasks", metavar="NAMES", help="ruler: comma list of niah_single_1 ... vt, cwe, fwe [all]")
    p.add_argument(
        "--lengths",
        type=comma_list(64),
        help="ruler, needle: comma list of tokens, prompt and answer [4096; 1000,2000,4000,7000]",
    )
    for flag, what in (
        ("--num-needle-k", "keys, of niah_multikey_1"),
        ("--num-needle-v", "values of a key, of niah_multivalue"),
        ("--num-needle-q", "keys that are asked for, of niah_multiquery"),
        ("--num-chains", "chains, of vt, the first of which is asked for"),
        ("--num-hops", "assignments of a chain after its first, of vt"),
    ):
        p.add_argument(flag, type=whole(1), metavar="N", help=f"ruler: {what} [RULER's]")
    p.add_argument("--depths", type=whole(1), help="needle: depths from 0 to 100%% [5]")
    p.add_argument(
        "--question",
        type=places,
        metavar="PLACES",
        help="needle: comma list of end, middle and edge: where in the prompt the question stands, its answer behind "
        "it (implies --own-prompt)",
    )
    p.add_argument("--samples", type=whole(1), help="ruler: per task and length [10]; needle: per cell [1]")
    p.add_argument("--seed", type=whole(0), help="ruler, needle: another seed, other samples [42]")
    p.add_argument("--raw", action="store_true", default=None, help="ruler, needle: no chat template")
    p.add_argument(
        "-n",
        "--n-predict",
        type=whole(1),
        help="ruler, needle: most tokens of an answer [RULER's]; long: tokens to write [2000]",
    )
    p.add_argument("--records", metavar="FILE.jsonl", help="ruler: run these records of RULER's format instead")
    p.add_argument("--save-records", metavar="FILE.jsonl", help="ruler: write the records")
    p.add_argument("--png", help="needle: write the map")


def add_commands(command: AddCommand) -> None:
    p = command(
        "eval",
        cmd_eval,
        "Quality of FASA beside dense: perplexity, RULER's tasks, needles, long generation.",
        "model.gguf -f text.txt --budgets 256,512",
    )
    add_model(p)
    add_context_flags(p)
    add_rpc(p)
    p.add_argument("-ub", "--ubatch-size", type=whole(1), default=512, help="tokens computed at once in prefill [512]")
    add_fasa_flags(p)
    _add_flags_of_all_tasks(p)
    _add_flags_of_some_tasks(p)
