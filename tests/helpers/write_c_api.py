#!/usr/bin/env python3
"""Write docs/reference/c-api.md from native/fasa.h: every function with its comment. Standard library only.

usage: write_c_api.py          (`make tables`)
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "c-api.md"
HEADER = ROOT / "native" / "fasa.h"
HEAD = """# C

Written from [native/fasa.h](../../native/fasa.h) by `make tables`: its functions, with their comments. Structs, enums
and their fields are in the header. How it is used, and what an error is: [api.md](api.md#c).

## For programs

"""
MEASURE = "\n## For measurements and tests\n\nPython's `session` and `runtime` use these; they may change.\n\n"


def functions() -> list[tuple[str, str]]:
    """(declaration, comment) of every function, in the header's order."""
    found, comment = [], []
    lines = iter(HEADER.read_text().split("\n"))
    for line in lines:
        if line.startswith("// "):
            comment.append(line[3:])
            continue
        if line.startswith("FASA_API "):
            text = line
            while ";" not in text:
                text += " " + next(lines).strip()
            declaration, after = text.split(";", 1)
            if after.strip():
                comment.append(after.strip().removeprefix("// "))
            declaration = re.sub(r"\( ", "(", declaration.removeprefix("FASA_API "))
            found.append((declaration, re.sub(r"FASA_\*", "`FASA_*`", " ".join(comment))))
        comment = []
    return found


def page() -> str:
    """The text of the whole page."""
    out, is_measure = HEAD, False
    wrap = textwrap.TextWrapper(120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    for declaration, comment in functions():
        if "fasa_set_observer" in declaration and not is_measure:
            out, is_measure = out + MEASURE, True
        out += wrap.fill(f"`{declaration}`{': ' if comment else ''}{comment}") + "\n"
    return out


if __name__ == "__main__":
    if not PAGE.exists() or PAGE.read_text() != page():
        PAGE.write_text(page())
        print(PAGE.relative_to(ROOT))
