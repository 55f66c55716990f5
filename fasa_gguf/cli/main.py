"""The command line: parses, calls, prints. The work is in the library."""

from __future__ import annotations

import argparse
import codecs
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import FasaError
from ..params import MODE_ALIASES, MODES, FasaParams
from ..profile.profile import PRESETS, Profile
from ..reasons import not_used


def _bar() -> Callable[[str, int, int], None]:
    """A progress bar on stderr that hides itself off a terminal."""
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = tqdm(total=total, desc=what, disable=None, file=sys.stderr, leave=False)
        bars[what].update(done - bars[what].n)
        if done >= total:
            bars.pop(what).close()

    return report


def _whole(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` on."""

    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None
        if not low <= value < 2**31:
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {2**31 - 1}, found {value}")
        return value

    return whole


def _list(low: int) -> Callable[[str], list[int]]:
    """An argparse type: a comma list of whole numbers from `low` on."""
    return lambda text: [_whole(low)(part) for part in text.split(",")]


def _shares(text: str) -> list[float]:
    """An argparse type: a comma list of shares above 0."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [0.0]
    if not all(0 < v <= 1 for v in values):
        raise argparse.ArgumentTypeError(f"expected numbers above 0, up to 1, found {text!r}")
    return values


def _model(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", nargs="?", metavar="MODEL", help="GGUF file")
    p.add_argument("-m", "--model", dest="model_flag", metavar="MODEL", help="the same, as llama.cpp spells it")


def _machine_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("-t", "--threads", type=_whole(0), default=0, help="CPU threads; 0: all cores")
    p.add_argument("-ngl", "--n-gpu-layers", type=_whole(-1), default=0, help="layers on the GPU; -1: all")


def _run_flags(p: argparse.ArgumentParser) -> None:
    _machine_flags(p)
    p.add_argument("-ctk", "--cache-type-k", default="f16", help="type of the K cache: f16, q8_0, ...")
    p.add_argument("-ctv", "--cache-type-v", default="f16", help="type of the V cache")


def _fasa_flags(p: argparse.ArgumentParser, more: str = "", mode: bool = True) -> None:
    group = p.add_argument_group(f"FASA settings (each is also an environment variable, FASA_BUDGET and so on{more})")
    for f in fields(FasaParams):
        group.add_argument(
            "--fasa-" + f.name.replace("_", "-"),
            metavar="X",
            default=None,
            help=f"{f.metadata['help']} [{f.metadata['unit']}; {f.default}]",
        )
    group.add_argument(
        "--fasa-preset",
        choices=PRESETS,
        default=None,
        help="where the settings above begin: `paper` is FASA as published, for a profile ranked by ca",
    )
    if mode:
        group.add_argument(
            "--fasa-mode",
            choices=(*MODES, *MODE_ALIASES),
            default=None,
            help="where K and V lie: c on the device, m in pinned host memory, auto: m when c does not fit the GPU [FASA_MODE, or auto]",
        )
    group.add_argument(
        "--profile", help="a profile's JSON file instead of the one in the model (eval: a comma list, one arm each)"
    )


def _params(a: argparse.Namespace, profile: Profile) -> tuple[FasaParams, Profile]:
    """Settings: the preset's, then the environment's, then the command line's; and the profile as the preset wants it."""
    base, profile = profile.preset(a.fasa_preset or "default")
    given = {
        f.name: getattr(a, "fasa_" + f.name) for f in fields(FasaParams) if getattr(a, "fasa_" + f.name) is not None
    }
    return FasaParams.from_mapping(given, "command line", FasaParams.from_env(base)), profile


def _text(path: str) -> tuple[str, str]:
    try:
        return Path(path).name, Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise FasaError(f"{path}: cannot be read as text: {e}") from None


def _calibrate(a: argparse.Namespace, out: str | None) -> Any:
    from ..calibrate.gguf import CalibrationParams, calibrate

    params = CalibrationParams(method=a.method, context=a.ctx_size, chunks=a.chunks)
    corpus = _text(a.file) if a.file else None
    hf = getattr(a, "hf", None) or (a.model if os.path.isdir(a.model) else None)
    start = time.perf_counter()
    if hf:
        from ..calibrate.hf import calibrate_hf

        if a.n_gpu_layers:
            raise FasaError("-ngl is for a GGUF; Hugging Face weights take --device")
        profile = calibrate_hf(
            hf, corpus, params, out, a.threads, a.device, a.dtype, None if hf == a.model else a.model, _bar()
        )
    else:
        if a.device or a.dtype != "auto":
            raise FasaError(f"{'--device' if a.device else '--dtype'} is for Hugging Face weights; a GGUF takes -ngl")
        profile = calibrate(a.model, corpus, params, out, a.threads, a.n_gpu_layers, _bar())
    print(f"calibrated in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return profile


def cmd_calibrate(a: argparse.Namespace) -> None:
    out = a.output or (
        f"{a.model.rstrip('/')}.fasa.json" if os.path.isdir(a.model) else str(Path(a.model).with_suffix(".fasa.json"))
    )
    _calibrate(a, out)
    print(out)


def cmd_embed_profile(a: argparse.Namespace) -> None:
    from ..profile.embed import check_embeddable, rewrite

    if a.profile and (a.remove or a.file or a.hf):
        raise FasaError(
            f"--profile was given, and {'--remove' if a.remove else '-f' if a.file else '--hf'} needs none; leave one of them away"
        )
    if a.remove and a.hf:
        raise FasaError("--hf was given, and --remove needs none; leave one of them away")
    if a.remove:
        profile = None
    elif a.profile:
        profile = Profile.load(a.profile)
    else:
        check_embeddable(a.model, a.output, a.force)  # not after a minute of calibration
        profile = _calibrate(a, None)
    bar = _bar()
    print(rewrite(a.model, profile, a.output, a.force, lambda done, total: bar("writing", done, total)))


def cmd_inspect(a: argparse.Namespace) -> None:
    from ..profile.inspect import format_profile

    profile = Profile.load(a.model)
    if a.against:
        from ..profile.agreement import compare_profiles, format_agreement

        found = compare_profiles(profile, Profile.load(a.against), a.top)
        print(json.dumps(found.as_dict()) if a.json else format_agreement(found))
    else:
        print(profile.to_json() if a.json else format_profile(profile))
    if a.png:
        from ..report.pictures import save_heatmap

        save_heatmap(profile, a.png)
        print(f"heat map: {a.png}", file=sys.stderr)


def _load(a: argparse.Namespace) -> tuple[Any, bool]:
    """(model for `run`, were FASA settings given): settings or a profile on the command line make FASA a must."""
    from ..gguf.cache_types import cache_type
    from ..gguf.file import GGUFFile
    from ..llama import Llama
    from ..session import last_log, quiet

    given = [a.profile, a.fasa_preset, *(getattr(a, "fasa_" + f.name) for f in fields(FasaParams))]
    asked = not a.no_fasa and (any(x is not None for x in given) or a.fasa_mode == "m")
    fasa: Any = "off" if a.no_fasa else "auto"
    profile = None
    if asked:
        fasa, profile = _params(a, Profile.load(a.profile or a.model))
    elif not a.no_fasa:
        Profile.from_gguf(GGUFFile(a.model))  # none is fine, a bad one is an error
    types = cache_type(a.cache_type_k), cache_type(a.cache_type_v)
    threads = a.threads or os.cpu_count()
    quiet()
    try:
        return Llama(
            a.model,
            fasa=fasa,
            fasa_profile=profile,
            fasa_mode=a.fasa_mode,
            n_ctx=-(-a.ctx_size // 256) * 256,  # llama.cpp rounds up too
            n_batch=a.batch_size,
            n_ubatch=min(a.ubatch_size, a.batch_size),
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=a.n_gpu_layers,
            type_k=types[0],
            type_v=types[1],
            flash_attn=True,
            verbose=False,
        ), asked
    except (ValueError, RuntimeError) as e:
        raise FasaError(f"{a.model}: {e}; llama.cpp says: {last_log()}") from None


def cmd_run(a: argparse.Namespace) -> None:
    prompt = (_text(a.file)[1] if a.file else "") + (a.prompt or "")
    if not prompt:
        raise FasaError("nothing to run: give -p PROMPT or -f FILE")
    llm, asked = _load(a)
    tokens = llm.tokenize(prompt.encode(), special=True)
    room = llm.n_ctx() - len(tokens)
    if room < 1:
        raise FasaError(
            f"the prompt has {len(tokens)} tokens and the context {llm.n_ctx()}; use -c {len(tokens) + max(a.n_predict, 256)}"
        )
    most = min(a.n_predict, room) if a.n_predict > 0 else room
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be several tokens
    start = first = end = time.perf_counter()
    n = 0
    for token in llm.generate(tokens, temp=a.temp):
        end = time.perf_counter()
        first, n = (end, 1) if n == 0 else (first, n + 1)
        if _ends(llm, token):
            break
        print(text.decode(llm.detokenize([token])), end="", flush=True)
        if n == most:
            break
    print(text.decode(b"", True))
    s = llm.fasa_stats()
    print(_figures(s, len(tokens), first - start, n, end - first), file=sys.stderr)
    if asked and not s["steps_sparse"]:
        raise FasaError(not_used(s["step_reason_code"], _why_dense(s, n)))


def _ends(llm: Any, token: int) -> bool:
    from ..runtime.library import load

    return bool(load().llama_vocab_is_eog(llm._model.vocab, token))


def _why_dense(s: dict[str, Any], n: int) -> str:
    return s["step_reason"] or (
        "one token was written, which comes from the prompt's own step"
        if n < 2
        else "no layer could; see layer_reasons"
    )


def _figures(s: dict[str, Any], n_prompt: int, prompt_s: float, n: int, decode_s: float) -> str:
    """One line about a run: n tokens in decode_s seconds after the first of them."""
    line = f"prompt {n_prompt} tokens in {prompt_s:.1f} s ({n_prompt / max(prompt_s, 1e-9):.1f} t/s)"
    line += f"; {n} tokens at {(n - 1) / decode_s:.1f} t/s" if n > 1 and decode_s > 0 else f"; {n} tokens"
    if not s["steps_sparse"]:
        return f"{line}; dense: {_why_dense(s, n)}"
    share = (s["bytes_fac"] + s["bytes_tip"]) / s["bytes_dense"]
    if s.get("bytes_kv_host"):
        line += (
            f"; mode m, {(s['bytes_fetched'] / s['steps_sparse']) / 1e6:.1f} MB a step over PCIe, "
            f"{100 * s['rows_reused'] / max(s['rows_reused'] + s['rows_fetched'], 1):.0f}% of the rows reused"
        )
    return (
        f"{line}; FASA in {s['steps_sparse']} steps, {s['steps_dense']} dense; {s['tokens_attended'] / s['lists']:.0f} of "
        f"{s['tokens_visible'] / s['lists']:.0f} tokens attended, {100 * share:.1f}% of the KV bytes read"
    )


# what each task of eval takes, besides what all take, with its default
EVAL_FLAGS: dict[str, dict[str, Any]] = {
    "ppl": {"windows": 10, "window": 4096, "score": 384, "score_batch": 1, "dense_steps": False},
    "ruler": {
        "tasks": None,
        "lengths": [4096],
        "samples": 10,
        "seed": 42,
        "raw": False,
        "n_predict": 0,
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
        "png": None,
    },
    "long": {"windows": 1, "window": 2048, "n_predict": 2000},
}


def _eval_flags(a: argparse.Namespace) -> None:
    """Defaults of the task; a flag of another task is an error."""
    mine = EVAL_FLAGS[a.task]
    for name in {name for flags in EVAL_FLAGS.values() for name in flags}:
        given = getattr(a, name)
        if given is not None and name not in mine:
            users = " and ".join(f"--task {task}" for task, flags in EVAL_FLAGS.items() if name in flags)
            raise FasaError(f"--{name.replace('_', '-')} is for {users}, not for --task {a.task}; leave it away")
        if given is None and name in mine:
            setattr(a, name, mine[name])
    if a.file is None and a.task in ("ppl", "long"):
        raise FasaError(f"--task {a.task} needs a text; give -f FILE")


def _arms(a: argparse.Namespace) -> list[Any]:
    """One arm for each profile and budget, mass or text of --arms; without any of the three, one for each profile."""
    from ..quality.arms import Arm, parse_arms

    if a.arms and not (a.profile or a.budgets or a.masses):
        load = functools.cache(
            lambda path: _params(a, Profile.load(path))
        )  # the model needs no profile where every arm names one
        return parse_arms(a.arms, lambda other: load(other or a.model))
    arms = []
    paths = a.profile.split(",") if a.profile else [a.model]
    for path in paths:
        base, profile = _params(a, Profile.load(path))
        settings = [base.replace(budget=b, mass=0.0, mean_budget=0) for b in a.budgets or []]
        settings += [base.replace(mass=m, mean_budget=0) for m in a.masses or []]
        for p in settings or ([] if a.arms else [base]):
            much = f"mass={p.mass:g}" if p.mass > 0 else f"mean={p.mean_budget}" if p.mean_budget else f"B={p.budget}"
            name = [a.fasa_preset, profile.ranking_method, f"k={p.chunks or 'auto'}", p.k_dom, much]
            arms.append(Arm(" ".join(filter(None, name)), p.check(), profile))
        if a.arms:
            arms += parse_arms(
                a.arms,
                lambda other: _params(a, Profile.load(other)) if other else (base, profile),
                f"{Path(path).name} " if len(paths) > 1 else "",
            )
    return arms


def cmd_eval(a: argparse.Namespace) -> None:
    from ..memory.placement import chosen_mode
    from ..quality.perplexity import detokenize_wikitext

    _eval_flags(a)
    text = _text(a.file)[1] if a.file else None
    if text and a.detokenize == "wikitext":
        text = detokenize_wikitext(text)
    arms, mode = _arms(a), chosen_mode(a.fasa_mode)
    if a.task == "ppl":
        from ..quality.perplexity import evaluate, table

        rows = evaluate(
            a.model,
            text,
            arms,
            a.windows,
            a.window,
            a.score,
            a.threads,
            a.n_gpu_layers,
            a.cache_type_k,
            a.cache_type_v,
            not a.dense_steps,
            None,
            _bar(),
            a.resume,
            a.score_batch,
            mode,
        )
        print(json.dumps(rows, indent=1) if a.json else table(rows))
        return
    from ..quality.tasks import Setup

    machine = dict(
        n_threads=a.threads, n_gpu_layers=a.n_gpu_layers, type_k=a.cache_type_k, type_v=a.cache_type_v, mode=mode
    )
    if a.task == "long":
        from ..quality.long_text import run_long, table

        out = run_long(a.model, arms, a.n_predict, a.window, a.windows, Setup(text, **machine), None, _bar(), a.resume)
        print(json.dumps(out, indent=1) if a.json else table(out["rows"]))
    else:
        _eval_answers(a, arms, Setup(text, a.seed, a.raw, a.n_predict, **machine))


def _eval_answers(a: argparse.Namespace, arms: list[Any], setup: Any) -> None:
    """--task ruler and needle."""
    from ..quality import ruler, tasks

    if a.task == "needle":
        jobs = tasks.needle_jobs(a.lengths, a.depths, a.samples)
    elif a.records:
        jobs = tasks.record_jobs(a.model, ruler.read_records(a.records), setup)
    else:
        names = a.tasks.split(",") if a.tasks else list(ruler.TASKS)
        jobs = [tasks.Job(name, length, i) for length in a.lengths for name in names for i in range(a.samples)]
    if a.task == "ruler" and a.save_records:
        ruler.write_records(a.save_records, tasks.make_records(a.model, jobs, setup))
    samples = tasks.run_jobs(a.model, jobs, arms, setup, None, _bar(), a.resume)
    out = tasks.result(a.model, arms, setup, samples)
    if a.task == "needle":
        out["grid"] = tasks.needle_grid(samples)
        if a.png:
            from ..report.pictures import save_needle_map

            save_needle_map(out["grid"], a.png)
            print(f"needle map: {a.png}", file=sys.stderr)
    if a.json:
        print(json.dumps(out, indent=1))
    else:
        print(tasks.needle_table(out["rows"], out["grid"]) if a.task == "needle" else tasks.table(out["rows"]))


def _eval_parser(p: argparse.ArgumentParser) -> None:
    _model(p)
    _run_flags(p)
    _fasa_flags(p)
    p.add_argument(
        "--task",
        choices=tuple(EVAL_FLAGS),
        default="ppl",
        help="ppl: perplexity and KL, teacher-forced; ruler: RULER's synthetic tasks; needle: single needles, depth x length; "
        "long: a long continuation [ppl]",
    )
    p.add_argument(
        "-f",
        "--file",
        help="text: to score (ppl), to hide needles in (ruler, needle; RULER's noise without it), to continue (long)",
    )
    p.add_argument("--detokenize", choices=("wikitext",), help="undo a corpus' word tokenisation")
    p.add_argument("--budgets", type=_list(1), help="comma list; one arm each")
    p.add_argument("--masses", type=_shares, help="comma list of target masses; one arm each")
    p.add_argument(
        "--arms",
        metavar="TEXT",
        help="arms with settings of their own, such as 'mass=0.9,cap=4096;mass=0.9,floor=16'; "
        "profile=FILE is one too, and `dense` alone is dense step by step",
    )
    p.add_argument(
        "--resume", metavar="FILE.jsonl", help="keep every finished sample here, and skip those that are there"
    )
    p.add_argument("--json", action="store_true", help="figures as JSON")
    p.add_argument("--windows", type=_whole(1), help="ppl: windows [10]; long: texts [1]")
    p.add_argument(
        "--window",
        type=_whole(2),
        help="ppl: tokens per window [4096]; long: tokens of text before the continuation [2048]",
    )
    p.add_argument("--score", type=_whole(2), help="ppl: last tokens of a window that are decoded and scored [384]")
    p.add_argument(
        "--score-batch",
        type=_whole(1),
        help="ppl: scored tokens that a FASA arm decodes at once, as drafts are: the same figures, sooner [1]",
    )
    p.add_argument(
        "--dense-steps", action="store_true", default=None, help="ppl: decode the dense arm token by token too"
    )
    p.add_argument("--tasks", metavar="NAMES", help="ruler: comma list of niah_single_1 ... vt, cwe, fwe [all]")
    p.add_argument(
        "--lengths",
        type=_list(64),
        help="ruler, needle: comma list of tokens, prompt and answer [4096; 1000,2000,4000,7000]",
    )
    p.add_argument("--depths", type=_whole(1), help="needle: depths from 0 to 100%% [5]")
    p.add_argument("--samples", type=_whole(1), help="ruler: per task and length [10]; needle: per cell [1]")
    p.add_argument("--seed", type=_whole(0), help="ruler, needle: another seed, other samples [42]")
    p.add_argument("--raw", action="store_true", default=None, help="ruler, needle: no chat template")
    p.add_argument(
        "-n",
        "--n-predict",
        type=_whole(1),
        help="ruler, needle: most tokens of an answer [RULER's]; long: tokens to write [2000]",
    )
    p.add_argument("--records", metavar="FILE.jsonl", help="ruler: run these records of RULER's format instead")
    p.add_argument("--save-records", metavar="FILE.jsonl", help="ruler: write the records")
    p.add_argument("--png", help="needle: write the map")


def parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(prog="fasa-gguf", description="Frequency-aware sparse attention for llama.cpp.")
    ap.add_argument("--debug", action="store_true", help="show the traceback of an error")
    ap.add_argument("--version", action="version", version=f"fasa-gguf {__version__}")
    sub = ap.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, help: str, example: str) -> argparse.ArgumentParser:
        p = sub.add_parser(name, help=help, description=help, epilog=f"example: fasa-gguf {name} {example}")
        p.set_defaults(run=run)
        return p

    def calibration(p: argparse.ArgumentParser) -> None:
        p.add_argument("-f", "--file", help="text to calibrate on; default: the pydoc topics of this Python")
        p.add_argument("-o", "--output", help="file to write")
        p.add_argument("-c", "--ctx-size", type=_whole(256), default=4096, help="window in tokens")
        p.add_argument(
            "--chunks",
            type=_whole(0),
            default=0,
            help="dominant chunks that decoding will use, the profile's default then; more read more "
            "and miss less [3/8 of the head's]",
        )
        p.add_argument("--method", default="recall", choices=("recall", "energy", "ca"), help="how chunks are ranked")
        p.add_argument(
            "--device",
            help="Hugging Face weights: cpu, cuda, cuda:1, or auto for several GPUs; default: GPUs where there are any",
        )
        p.add_argument(
            "--dtype",
            default="auto",
            choices=("auto", "f32", "f16", "bf16"),
            help="Hugging Face weights: auto is f32 on a CPU, the weights' own on a GPU",
        )
        _machine_flags(p)

    p = command(
        "calibrate",
        cmd_calibrate,
        "Find the dominant chunks of a model, a GGUF or a folder of Hugging Face weights, and save them as JSON.",
        "model.gguf -o profile.json",
    )
    _model(p)
    calibration(p)
    p = command(
        "embed-profile",
        cmd_embed_profile,
        "Put a profile into a model's GGUF; calibrates first when none is given.",
        "model.gguf",
    )
    _model(p)
    calibration(p)
    p.add_argument("--hf", metavar="HF_DIR", help="calibrate from the model's Hugging Face weights in this folder")
    p.add_argument("--profile", help="a profile's JSON file, or a GGUF that has one")
    p.add_argument("--force", action="store_true", help="overwrite OUTPUT")
    p.add_argument("--remove", action="store_true", help="take the profile out")
    p = command("inspect", cmd_inspect, "Show the profile of a GGUF or JSON file.", "model.gguf --png heatmap.png")
    _model(p)
    p.add_argument("--json", action="store_true", help="the whole profile, or the comparison, as JSON")
    p.add_argument(
        "--against",
        metavar="OTHER",
        help="compare with another profile: rank correlation and overlap of the dominant chunks",
    )
    p.add_argument(
        "--top", type=_whole(0), default=0, help="chunks that count as dominant in the comparison; 0: 3/8 of the head's"
    )
    p.add_argument("--png", help="write a heat map of layer x chunk")
    p = command(
        "run",
        cmd_run,
        "Stream a completion, decoded with FASA when the model has a profile.",
        'model.gguf -f long.txt -p "In short:" -c 16384',
    )
    _model(p)
    _run_flags(p)
    _fasa_flags(p)
    p.add_argument("-p", "--prompt", help="prompt; goes behind the file's text")
    p.add_argument("-f", "--file", help="file with the prompt")
    p.add_argument(
        "-n", "--n-predict", type=_whole(-1), default=128, help="tokens to write; -1: until the context is full"
    )
    p.add_argument("-c", "--ctx-size", type=_whole(0), default=8192, help="context in tokens; 0: the model's own")
    p.add_argument("-b", "--batch-size", type=_whole(1), default=512, help="tokens per prefill batch")
    p.add_argument("-ub", "--ubatch-size", type=_whole(1), default=512, help="tokens computed at once in prefill")
    p.add_argument("--temp", type=float, default=0.0, help="temperature; 0: greedy")
    p.add_argument("--no-fasa", action="store_true", help="dense")
    _eval_parser(
        command(
            "eval",
            cmd_eval,
            "Quality of FASA beside dense: perplexity, RULER's tasks, needles, long generation.",
            "model.gguf -f text.txt --budgets 256,512",
        )
    )
    from . import bench as cli_bench
    from . import plan as cli_plan
    from . import quality as cli_quality

    cli_plan.add_commands(command)
    cli_quality.add_commands(command)
    cli_bench.add_commands(command)
    return ap


def main(argv: Sequence[str] | None = None) -> int:
    a = parser().parse_args(argv)
    a.model = getattr(a, "model_flag", None) or a.model
    if a.model is None and not getattr(a, "shape", None):
        parser().error(f"{a.command}: MODEL is missing")
    try:
        a.run(a)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FasaError, OSError) as e:
        if a.debug:
            raise
        text = f"{f'{e.filename}: ' if e.filename else ''}{e.strerror or e}" if isinstance(e, OSError) else e
        print(f"fasa-gguf: error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fasa-gguf: interrupted", file=sys.stderr)
        return 130
