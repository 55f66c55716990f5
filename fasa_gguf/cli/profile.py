"""The commands `calibrate`, `embed-profile` and `inspect`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import FasaError
from ..gguf.file import printable
from ..profile.profile import Profile
from .arguments import AddCommand, add_machine_flags, add_model, read_text, whole
from .progress import progress_bar


def _calibrate(a: argparse.Namespace, out: str | None) -> Profile:
    from ..calibrate.gguf import calibrate
    from ..calibrate.ranking import CalibrationParams

    params = CalibrationParams(method=a.method, context=a.ctx_size, chunks=a.chunks, window_layers=a.window_layers)
    corpus = (printable(Path(a.file).name), read_text(a.file)) if a.file else None
    hf = getattr(a, "hf", None) or (a.model if os.path.isdir(a.model) else None)
    start = time.perf_counter()
    if hf:
        from ..calibrate.hf import calibrate_hf

        if a.n_gpu_layers:
            raise FasaError("-ngl is for a GGUF; Hugging Face weights take --device")
        gguf = None if hf == a.model else a.model
        profile = calibrate_hf(hf, corpus, params, out, a.threads, a.device, a.dtype, gguf, progress_bar())
    else:
        if a.device or a.dtype != "auto":
            raise FasaError(f"{'--device' if a.device else '--dtype'} is for Hugging Face weights; a GGUF takes -ngl")
        profile = calibrate(a.model, corpus, params, out, a.threads, a.n_gpu_layers, progress_bar())
    print(f"calibrated in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return profile


def cmd_calibrate(a: argparse.Namespace) -> None:
    is_folder = os.path.isdir(a.model)
    beside = f"{a.model.rstrip('/')}.fasa.json" if is_folder else str(Path(a.model).with_suffix(".fasa.json"))
    out = a.output or beside
    _calibrate(a, out)
    print(out)


def cmd_embed_profile(a: argparse.Namespace) -> None:
    from ..profile.embed import check_embeddable, check_weights, rewrite

    if a.profile and (a.remove or a.file or a.hf):
        other = "--remove" if a.remove else "-f" if a.file else "--hf"
        raise FasaError(f"--profile was given, and {other} needs none; omit one of them")
    if a.remove and a.hf:
        raise FasaError("--hf was given, and --remove needs none; omit one of them")
    if a.remove:
        profile = None
    elif a.profile:
        profile = Profile.load(a.profile)
    else:
        header = check_embeddable(a.model, a.output, a.force)  # not after a minute of calibration
        profile = _calibrate(a, None)
        if not a.hf:
            check_weights(header, profile)
    bar = progress_bar()
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


def _add_calibration_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("-f", "--file", help="text to calibrate on; default: the pydoc topics of this Python")
    p.add_argument("-o", "--output", help="file to write")
    p.add_argument("-c", "--ctx-size", type=whole(256), default=4096, help="window in tokens")
    p.add_argument(
        "--chunks",
        type=whole(0),
        default=0,
        help="dominant chunks that decoding will use; becomes the profile's default. More chunks read more and miss "
        "less [3/8 of the head's]",
    )
    p.add_argument(
        "--window-layers",
        action="store_true",
        help="rank layers with a short sliding window too; they run sparse where the budget or cap is smaller than it",
    )
    p.add_argument("--method", default="recall", choices=("recall", "energy", "ca"), help="how chunks are ranked")
    p.add_argument(
        "--device",
        help="Hugging Face weights: cpu, cuda, cuda:1, or auto for several GPUs; default: GPUs if there are any",
    )
    p.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "f32", "f16", "bf16"),
        help="Hugging Face weights: auto is f32 on a CPU, the weights' own type on a GPU",
    )
    add_machine_flags(p)


def add_commands(command: AddCommand) -> None:
    p: Any = command(
        "calibrate",
        cmd_calibrate,
        "Find the dominant chunks of a model, a GGUF or a folder of Hugging Face weights, and save them as JSON.",
        "model.gguf -o profile.json",
    )
    add_model(p)
    _add_calibration_flags(p)
    p = command(
        "embed-profile",
        cmd_embed_profile,
        "Put a profile into a model's GGUF; calibrates first when none is given.",
        "model.gguf",
    )
    add_model(p)
    _add_calibration_flags(p)
    p.add_argument("--hf", metavar="HF_DIR", help="calibrate from the model's Hugging Face weights in this folder")
    p.add_argument("--profile", help="a profile's JSON file, or a GGUF that has one")
    p.add_argument("--force", action="store_true", help="overwrite OUTPUT, or a model that is read-only")
    p.add_argument("--remove", action="store_true", help="take the profile out")
    p = command("inspect", cmd_inspect, "Show the profile of a GGUF or JSON file.", "model.gguf --png heatmap.png")
    add_model(p)
    p.add_argument("--json", action="store_true", help="the whole profile, or the comparison, as JSON")
    p.add_argument(
        "--against",
        metavar="OTHER",
        help="compare with another profile: rank correlation and overlap of the dominant chunks",
    )
    p.add_argument(
        "--top", type=whole(0), default=0, help="chunks that count as dominant in the comparison; 0: 3/8 of the head's"
    )
    p.add_argument("--png", help="write a heat map of layer x chunk")
