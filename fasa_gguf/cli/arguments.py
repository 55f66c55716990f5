"""What the commands share: argparse types, groups of flags, and settings read from parsed flags."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .. import runtime
from ..errors import FasaError
from ..params import QUALITIES, FasaParams, parse_mode
from ..profile.profile import PRESETS, Profile
from ..runtime.settings import ContextSettings

Run = Callable[[argparse.Namespace], int | None]  # an exit status, or None for 0
AddCommand = Callable[[str, Run, str, str], argparse.ArgumentParser]
CONTEXT = 8192  # tokens, where -c is not given


# ---- argparse types ----


def whole(low: int) -> Callable[[str], int]:
    """A whole number from `low` to 2^31 - 1."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None
        if not low <= value < 2**31:
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {2**31 - 1}, found {value}")
        return value

    return parse


def comma_list(low: int) -> Callable[[str], list[int]]:
    """A comma list of whole numbers from `low` on."""
    return lambda text: [whole(low)(part) for part in text.split(",")]


def shares(text: str) -> list[float]:
    """A comma list of shares above 0, up to 1."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [0.0]
    if not all(0 < v <= 1 for v in values):
        raise argparse.ArgumentTypeError(f"expected numbers above 0, up to 1, found {text!r}")
    return values


def percent(text: str) -> float:
    """A percentage as a share: 1% is 0.01."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not text.endswith("%") or not 0 <= value < 1000:
        raise argparse.ArgumentTypeError(f"expected a percentage such as 1%, found {text!r}")
    return value / 100


def bits(text: str) -> list[int]:
    """A comma list of 0 and 1."""
    if set(text.split(",")) <= {"0", "1"}:
        return [int(part) for part in text.split(",")]
    raise argparse.ArgumentTypeError(f"expected a comma list of 0 and 1, found {text!r}")


def mode(text: str) -> str:
    """auto, device or host; c and m are short for device and host."""
    try:
        return parse_mode(text)
    except FasaError as e:
        raise argparse.ArgumentTypeError(str(e).removeprefix("fasa_mode: ")) from None


# ---- groups of flags ----


def add_model(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", nargs="?", metavar="MODEL", help="GGUF file")
    p.add_argument("-m", "--model", dest="model_flag", metavar="MODEL", help="the same, as llama.cpp spells it")


def add_machine_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "-t", "--threads", type=whole(0), default=0, help="CPU threads; 0: the physical cores that this process may use"
    )
    p.add_argument("-ngl", "--n-gpu-layers", type=whole(-1), default=0, help="layers on the GPU; -1: all")


def add_context_flags(p: argparse.ArgumentParser) -> None:
    """Threads, layers on the GPU and cache types: what `read_context` reads."""
    add_machine_flags(p)
    p.add_argument("-ctk", "--cache-type-k", default="f16", help="type of the K cache: f16, q8_0, ...")
    p.add_argument("-ctv", "--cache-type-v", default="f16", help="type of the V cache")


def add_rpc(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--rpc", type=lambda text: text.split(","), metavar="SERVERS",
        help="comma list of ggml-rpc-servers, host:port, whose devices take the layers of -ngl first",
    )  # fmt: skip


def add_context_size(p: argparse.ArgumentParser, what: str) -> None:
    """-c, with None where it is not given. what: whose context it is."""
    p.add_argument(
        "-c",
        "--ctx-size",
        type=whole(0),
        help=f"{what} in tokens; 0: the model's own [{CONTEXT}, or less if the model has less]",
    )


def add_fasa_flags(p: argparse.ArgumentParser, more: str = "", mode_flag: bool = True) -> None:
    """One flag for each row of FasaParams; --fasa-preset, --profile and, with mode_flag, --fasa-mode.

    more: what the group's title adds."""
    group: Any = p.add_argument_group(
        f"FASA settings (each is also an environment variable, FASA_BUDGET and so on{more})"
    )
    group.add_argument(
        "--fasa-quality",
        metavar="X",
        help=f"mass, floor and cap in one: {', '.join(QUALITIES)}; single settings win over it",
    )
    for f in fields(FasaParams):
        group.add_argument(
            "--fasa-" + f.name.replace("_", "-"),
            metavar="X",
            help=f"{f.metadata['help']} [{f.metadata['unit']}; {f.default}]",
        )
    group.add_argument(
        "--fasa-preset",
        choices=PRESETS,
        help="starting values of the settings above; paper: FASA as published, for a profile ranked by ca",
    )
    if mode_flag:
        group.add_argument(
            "--fasa-mode",
            type=mode,
            metavar="MODE",
            help="where K and V lie: device (FASA-C), host: pinned host memory (FASA-M), auto: host when device does "
            "not fit [FASA_MODE, or auto]",
        )
    group.add_argument(
        "--profile",
        help="a profile's JSON or GGUF file (eval: a comma list, an arm each) [FASA_PROFILE, or MODEL.fasa.json beside "
        "the model, or the one in it]",
    )


def add_shape_flags(p: argparse.ArgumentParser, shapes: tuple[str, ...]) -> None:
    """--shape and --output-model: what `random_model` reads."""
    p.add_argument("--shape", choices=shapes, help="make and use a random model of this shape")
    p.add_argument("--output-model", help="where --shape writes its model; default: the user's cache folder")


# ---- settings from flags ----


def take_devices(a: argparse.Namespace) -> None:
    """Adds the servers of --rpc. Layers on a GPU that is not there are no error, as in llama.cpp; a line says so.

    Raises FasaError when no layer would go to a server, or a server does not answer.
    """
    given = getattr(a, "n_gpu_layers", None) or 0
    wanted = any(given) if isinstance(given, list) else given != 0
    if getattr(a, "rpc", None):
        if not wanted:
            raise FasaError("--rpc without -ngl: no layer would go to the servers; add -ngl 99")
        runtime.devices.add_rpc_servers(a.rpc)
    if wanted and a.command != "plan" and not any(d.is_gpu for d in runtime.devices.devices()):
        note("-ngl: no GPU, or a build without CUDA; all layers are on the CPU (`fasa-gguf doctor` says more)")


def note(text: str) -> None:
    """A line on stderr."""
    print(f"fasa-gguf: {text}", file=sys.stderr)


def given_fasa(a: argparse.Namespace) -> dict[str, str]:
    """The FASA settings that the command line gives, as text; `quality` is one of them."""
    found = {name: getattr(a, "fasa_" + name) for name in ("quality", *(f.name for f in fields(FasaParams)))}
    return {name: text for name, text in found.items() if text is not None}


def read_params(a: argparse.Namespace, profile: Profile) -> tuple[FasaParams, Profile]:
    """(settings, the profile as the preset needs it). Flags override environment variables, which override the preset,
    which overrides the profile's defaults. Raises FasaError for a quality of another preset than the default."""
    if a.fasa_quality and a.fasa_preset not in (None, "default"):
        raise FasaError(
            f"--fasa-quality {a.fasa_quality} and --fasa-preset {a.fasa_preset}: expected one of them; "
            "a quality changes the default preset"
        )
    base, profile = profile.preset(a.fasa_preset or "default")
    given = given_fasa(a)
    params = FasaParams.from_mapping(given, "command line", FasaParams.from_env(base))
    for name in ("floor", "cap"):
        if name in given and params.mass == 0:
            note(f"--fasa-{name} bounds what a mass attends, and there is none: it has no effect; give --fasa-mass too")
    return params, profile


def read_context(a: argparse.Namespace, **changes: Any) -> ContextSettings:
    """The context that the flags ask for; `changes` are further fields of ContextSettings."""
    from ..memory.placement import chosen_mode

    given = {
        "n_threads": a.threads,
        "n_gpu_layers": a.n_gpu_layers,
        "type_k": a.cache_type_k,
        "type_v": a.cache_type_v,
        "mode": chosen_mode(a.fasa_mode),
    }
    return ContextSettings(**given | changes)


def read_text(path: str, detokenize: str | None = None) -> str:
    """The text of a file; detokenize: `wikitext` undoes WikiText's word tokenisation. Raises FasaError."""
    from ..quality.text import detokenize_wikitext, read_utf8

    return detokenize_wikitext(read_utf8(path)) if detokenize == "wikitext" else read_utf8(path)


def random_model(a: argparse.Namespace) -> str:
    """The path of the random model that --shape asks for. Writes the model when it is missing."""
    from ..speed.random_model import cached_model, write_model

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    if not a.output_model:
        return str(cached_model(a.shape, say))
    if not os.path.exists(a.output_model):
        say(f"writing a random {a.shape} model to {a.output_model}")
        write_model(a.output_model, a.shape)
    return a.output_model
