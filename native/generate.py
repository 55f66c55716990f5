#!/usr/bin/env python3
"""Write what follows from the three tables of the Python package (params, counters, reasons). Standard library only.

    native/fasa.h          the blocks between `begin NAME` and `end NAME`: struct fasa_params, struct fasa_counters,
                           enum fasa_reason
    native/core/tables.h   the tables as X macros, for the library
    docs/**/*.md           the blocks between <!-- begin NAME --> and <!-- end NAME -->: settings, counters, reasons

usage: generate.py          (`make tables`)
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fasa_gguf.counters import COUNTED_BY, COUNTERS  # noqa: E402
from fasa_gguf.params import INT_MAX, QUALITIES, SETTINGS, Setting  # noqa: E402
from fasa_gguf.reasons import Reason  # noqa: E402

WIDTH = 120
HEADER = ROOT / "native" / "fasa.h"
TABLES = ROOT / "native" / "core" / "tables.h"


def comment(text: str, indent: int = 4) -> str:
    """A comment of C, wrapped."""
    before = " " * indent + "// "
    return "\n".join(textwrap.wrap(text, WIDTH, initial_indent=before, subsequent_indent=before)) + "\n"


# ---- native/fasa.h ----


def params_struct() -> str:
    out = "typedef struct fasa_params {\n    uint64_t size;\n"
    out += comment("0: the stock library's graphs, bit for bit") + "    int32_t enabled;\n"
    for s in SETTINGS:
        out += comment(f"{c_unit(s)}: {s.help}") + f"    {s.c_type} {s.name};\n"
    return out + "} fasa_params;\n"


def counters_struct() -> str:
    """What fits stands behind its counter, aligned with those beside it, as clang-format has it."""
    out = "typedef struct fasa_counters {\n    uint64_t size;\n"
    beside: list[tuple[str, str]] = []
    for c in COUNTERS:
        value, text = f"    uint64_t {c.name};", f"{c.unit}: {c.help}"
        run = [*beside, (value, text)]
        if max(len(v) for v, _ in run) + 4 + max(len(t) for _, t in run) <= WIDTH:
            beside = run
        elif len(value) + 4 + len(text) <= WIDTH:
            out, beside = out + aligned(beside), [(value, text)]
        else:
            out, beside = out + aligned(beside) + comment(text) + value + "\n", []
    return out + aligned(beside) + "} fasa_counters;\n"


def aligned(rows: list[tuple[str, str]]) -> str:
    """Declarations with their comments in one column."""
    width = max((len(value) for value, _ in rows), default=0)
    return "".join(f"{value.ljust(width)} // {text}\n" for value, text in rows)


def reason_enum() -> str:
    """A text stands behind its reason where there is room for it."""
    out, width = "enum fasa_reason {\n", max(len(r.name) for r in Reason)
    for r in Reason:
        text = r.text or "it is sparse"
        value = f"    FASA_REASON_{r.name.ljust(width)} = {int(r)},"
        line = f"{value.ljust(len(value) + int(r < 10))} // {text}"
        out += line + "\n" if len(line) <= WIDTH else comment(text) + value + "\n"
    return out + "};\n"


def c_unit(s: Setting) -> str:
    """The unit of a setting and its range."""
    if s.choices:
        return f"enum fasa_{s.name}_type"
    if re.search("[0-9]", s.unit):  # which says the range
        return s.unit
    return f"{s.unit}, from {s.low}" + ("" if s.high == INT_MAX else f" to {s.high}")


def limit(s: Setting, value: float) -> str:
    """A value of a setting as C has it; of an enumerated one `value` is the index."""
    return f"FASA_{s.name}_{s.choices[int(value)]}".upper() if s.choices else repr(value)


# ---- native/core/tables.h ----


def macro(name: str, columns: str, rows: list[str]) -> str:
    lines = [f"#define {name}(X)"]
    for row in rows:
        while len(row) > WIDTH - 12:  # a text: two literals in succession are one
            at = row.rindex(" ", 0, WIDTH - 12) + 1
            lines.append(("    X(" if row[0] != '"' else "        ") + row[:at] + '"')
            row = '"' + row[at:]
        lines.append(("    X(" if row[0] != '"' else "        ") + row + ")")
    return f"// X({columns})\n" + " \\\n".join(lines) + "\n\n"


def tables() -> str:
    out = (
        "#pragma once\n\n// Written by native/generate.py from the tables in fasa_gguf/: change a row there, then run "
    )
    out += "`make tables`.\n\n// clang-format off\n\n"
    rows = []
    for s in SETTINGS:
        default = s.choices.index(s.default) if s.choices else s.default
        rows.append(", ".join([s.name, s.c_type, limit(s, default), limit(s, s.low), limit(s, s.high)]))
        rows[-1] += f', "{" ".join(s.choices)}"'
    out += macro("FASA_SETTINGS", "name, C type, default, lowest, highest, names of the values", rows)
    rows = [f"{q}, {name}, {value!r}" for q, chosen in QUALITIES.items() for name, value in chosen.items()]
    out += f'#define FASA_QUALITY_NAMES "{", ".join(QUALITIES)}"\n'
    out += macro("FASA_QUALITIES", "quality, setting, value", rows)
    for who, what in COUNTED_BY.items():
        out += f"// counted by: {what}\n"
        names = [c.name for c in COUNTERS if c.counted_by == who]
        out += macro(f"FASA_COUNTERS_{who.upper()}", "name, NAME", [f"{n}, {n.upper()}" for n in names])
    out += macro("FASA_REASONS", "NAME, text", [f'{r.name}, "{r.text}"' for r in Reason])
    return out + "// clang-format on\n"


# ---- docs ----


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def items(texts: list[str]) -> str:
    """A list of Markdown, for what is too wide for a table; its lines are wrapped."""
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return "".join(wrap.fill(text) + "\n" for text in texts)


def docs_blocks() -> dict[str, str]:
    return {
        "settings": items([f"**`{s.name}`** = {default_text(s)} ({unit_text(s)}): {s.help}" for s in SETTINGS]),
        "qualities": qualities(),
        "counters": markdown(["counter", "unit", "meaning"], [[f"`{c.name}`", c.unit, c.help] for c in COUNTERS]),
        "reasons": items([f"`{r.name}`: {r.text}{'; ' if r.remedy else ''}{r.remedy}" for r in Reason if r.text]),
    }


def qualities() -> str:
    names = list(next(iter(QUALITIES.values())))
    rows = [[f"`{q}`", *(f"{value:,g}" for value in chosen.values())] for q, chosen in QUALITIES.items()]
    return markdown(["quality", *(f"`{name}`" for name in names)], rows)


def default_text(s: Setting) -> str:
    return f"{s.default:g}" if s.kind is float else str(s.default)


def unit_text(s: Setting) -> str:
    return s.unit if s.choices else c_unit(s)


# ---- files ----


def fill(text: str, name: str, block: str, start: str, end: str) -> str:
    """`text` with what stands between the two marks of `name` replaced."""
    begin, finish = start.format(name=name), end.format(name=name)
    pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(finish)}\n)", re.S)
    return pattern.sub(lambda m: m.group(1) + block + m.group(2), text)


def texts() -> dict[Path, str]:
    """What every generated file is to hold."""
    header = HEADER.read_text()
    for name, block in (("settings", params_struct()), ("counters", counters_struct()), ("reasons", reason_enum())):
        header = fill(header, name, block, "// begin {name}: written by native/generate.py", "// end {name}")
    out = {HEADER: header, TABLES: tables()}
    for path in sorted((ROOT / "docs").rglob("*.md")):
        text = path.read_text()
        for name, block in docs_blocks().items():
            text = fill(text, name, block, "<!-- begin {name} -->", "<!-- end {name} -->")
        out[path] = text
    return out


def main() -> None:
    for path, text in texts().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
