#!/usr/bin/env python3
"""Write docs/reference/cli.md from the parser of `fasa-gguf`: every flag of every command, with its help and default.

usage: write_cli.py          (`make tables`)
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fasa_gguf.cli.main import parser  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "cli.md"
HEAD = """# Flags

Written from the parser by `make tables`: what `fasa-gguf COMMAND --help` prints. What commands do, and what belongs
together: [commands.md](commands.md). `--fasa-...` are the [settings](settings.md), the same for all commands that have
them. A default stands in brackets.
"""


def value(action: argparse.Action) -> str:
    """What follows the flag, as `--help` shows it."""
    if action.nargs == 0:
        return ""
    if action.metavar:
        return f" {action.metavar}"
    if action.choices is not None:
        return f" {'|'.join(map(str, action.choices))}"
    return f" {action.dest.upper()}"


def default(action: argparse.Action, text: str) -> str:
    """The default in brackets, unless there is none or the help has one."""
    missing = action.default in (None, False, argparse.SUPPRESS) or action.nargs == 0
    if missing or text.endswith("]") or "default" in text or not action.option_strings:
        return ""
    return f" [{action.default}]"


def item(action: argparse.Action, prog: str) -> str:
    text = (action.help or "") % {**vars(action), "prog": prog}
    names = ", ".join(f"`{x}`" for x in action.option_strings)
    names = names[:-1] + value(action) + "`" if action.option_strings else f"`{value(action).strip()}`"
    wrap = textwrap.TextWrapper(120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return wrap.fill(f"{names}: {text}{default(action, text)}") + "\n"


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    sub = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    yield from sub.choices.items()


def page() -> str:
    """The text of the whole page."""
    out = HEAD
    for name, p in commands():
        shown = [a for a in p._actions if a.help != argparse.SUPPRESS and not isinstance(a, argparse._HelpAction)]
        fasa = [a for a in shown if any(x.startswith("--fasa-") for x in a.option_strings)]
        own = [a for a in shown if a not in fasa or a.dest in ("fasa_mode", "fasa_preset")]
        text = textwrap.fill(p.description or "", 120, break_on_hyphens=False)
        out += f"\n## {name}\n\n{text}\n\n    {(p.epilog or '').removeprefix('example: ')}\n\n"
        out += "".join(item(a, p.prog) for a in own)
        if len(fasa) > len([a for a in own if a in fasa]):
            out += "- `--fasa-...`: the [settings](settings.md)\n"
    return out


if __name__ == "__main__":
    if not PAGE.exists() or PAGE.read_text() != page():
        PAGE.write_text(page())
        print(PAGE.relative_to(ROOT))
