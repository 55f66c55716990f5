"""The command `completion`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..errors import FasaError
from .arguments import AddCommand

SHELLS = ("bash", "zsh", "fish")
# whose values are paths; of other arguments the shell proposes what they may be
PATHS = {"model", "model_flag", "file", "profile", "output", "output_model", "hf", "against", "png", "plot", "measured"}
PATHS |= {"records", "save_records", "journal", "resume", "chat_template_file"}


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _actions(sub)


def cmd_completion(a: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError:
        raise FasaError("completion needs the package shtab; run `pip install 'shtab>=1.13'`") from None
    for action in _actions(a.parser):
        if action.dest in PATHS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(a.parser, shell=a.shell))


def add_commands(command: AddCommand) -> None:
    p = command("completion", cmd_completion, "Print the completion script of a shell.", "bash")
    p.set_defaults(needs_model=False)
    p.add_argument("shell", choices=SHELLS, help="bash, zsh or fish")
