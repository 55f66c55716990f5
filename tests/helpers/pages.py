"""The code blocks of the documentation's pages, and the commands that they may show."""

import argparse

from paths import ROOT

from fasa_gguf.cli.main import parser


def ids(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    """[(python or "", lines)] of the fenced and the indented code of a page."""
    out, fence, language = [], None, ""
    for line in page.read_text().split("\n"):
        if line.startswith("```"):
            if fence is None:
                fence, language = [], line[3:].strip()
            else:
                out.append((language, fence))
                fence = None
        elif fence is not None:
            fence.append(line)
        elif line.startswith("    "):
            if not out or out[-1][0] != "indented":
                out.append(("indented", []))
            out[-1][1].append(line[4:])
        elif out and out[-1][0] == "indented":
            out.append(("", []))
    return out


def subparsers():
    """The parser of every command by name."""
    action = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices
