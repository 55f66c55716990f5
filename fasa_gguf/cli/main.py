"""The parser and main()."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import FasaError
from ..runtime import loading
from . import bench, completion, doctor, eval, plan, profile, quality, run, serve
from .arguments import Run, take_devices
from .progress import loading_bar, stop_progress


def parser() -> argparse.ArgumentParser:
    """The parser with every command."""
    ap = argparse.ArgumentParser(prog="fasa-gguf", description="Frequency-aware sparse attention for llama.cpp.")
    ap.add_argument("--debug", action="store_true", help="show the traceback of an error")
    ap.add_argument("--version", action="version", version=f"fasa-gguf {__version__}")
    sub = ap.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Run, help: str, example: str) -> argparse.ArgumentParser:
        p = sub.add_parser(name, help=help, description=help, epilog=f"example: fasa-gguf {name} {example}")
        p.set_defaults(run=run)
        return p

    for module in (profile, run, serve, eval, plan, quality, bench, doctor, completion):
        module.add_commands(command)
    return ap


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for an error or a check that failed, 130 when interrupted; usage
    errors exit with 2."""
    ap = parser()
    a = ap.parse_args(argv, argparse.Namespace(parser=ap))
    a.model = getattr(a, "model_flag", None) or getattr(a, "model", None)
    without = getattr(a, "shape", None) or getattr(a, "measured", None) or not getattr(a, "needs_model", True)
    if a.model is None and not without:
        ap.error(f"{a.command}: MODEL is missing")
    loading.report = loading_bar()
    try:
        take_devices(a)
        status = a.run(a) or 0
        sys.stdout.flush()
        return int(status)
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
    finally:
        loading.report = None
        stop_progress()
