#!/usr/bin/env python3
"""Write fasa_gguf/runtime/structs.py: the layout of llama.h's structs that Python and the library hand to each other.

usage: structs.py SOURCE       SOURCE: the pinned llama.cpp, as in build/native/llama.cpp-src

Needs a C compiler and the standard library. To be run when patches/UPSTREAM names another version.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "fasa_gguf" / "runtime" / "structs.py"
STRUCTS = (  # without those that the library alone reads and writes
    "llama_token_data",
    "llama_token_data_array",
    "llama_batch",
    "llama_model_kv_override",
    "llama_model_params",
    "llama_context_params",
    "llama_sampler_chain_params",
    "llama_logit_bias",
    "llama_chat_message",
    "llama_perf_context_data",
    "llama_perf_sampler_data",
)
HEAD = '''"""The layout of llama.h's structs in the pinned llama.cpp, 64 bits. Written by native/structs.py."""

# struct: (bytes, {field: (offset, bytes)})
LAYOUT: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {
'''


def fields(header: str, name: str) -> list[str]:
    """Names of a struct's fields; of a union without a name, the last, largest member."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", header, flags=re.S)
    found = re.search(rf"struct {name} \{{(.*?)^    \}}", text, re.S | re.M)
    if found is None:
        raise SystemExit(f"struct {name}: expected it in llama.h, found none")
    body = re.sub(r"union \{[^}]*?([^;}]*;)\s*\};", r"\1", found[1])
    return [re.sub(r"\[.*", "", line).split()[-1].lstrip("*") for line in body.split(";") if line.strip()]


def layout(source: Path) -> dict[str, tuple[int, dict[str, tuple[int, int]]]]:
    """What a C compiler says of the structs."""
    header = (source / "include" / "llama.h").read_text()
    names = {s: fields(header, s) for s in STRUCTS}
    lines = ["#include <stddef.h>", "#include <stdio.h>", '#include "llama.h"', "int main(void) {"]
    for s, members in names.items():
        lines.append(f'printf("{s} %zu\\n", sizeof(struct {s}));')
        for m in members:
            shown = "value" if m == "val_str" else m  # llama_cpp's name of the union
            t = f"struct {s}"
            lines.append(f'printf("{s} {shown} %zu %zu\\n", offsetof({t}, {m}), sizeof((({t} *) 0)->{m}));')
    out: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.c").write_text("\n".join([*lines, "return 0;", "}"]))
        includes = [f"-I{source / 'include'}", f"-I{source / 'ggml' / 'include'}"]
        subprocess.run([os.environ.get("CC", "cc"), *includes, "a.c", "-o", "a"], cwd=folder, check=True)
        shown = subprocess.run([f"{folder}/a"], capture_output=True, text=True, check=True).stdout
    for words in map(str.split, shown.splitlines()):
        if len(words) == 2:
            out[words[0]] = (int(words[1]), {})
        else:
            out[words[0]][1][words[1]] = (int(words[2]), int(words[3]))
    return out


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    text = HEAD
    for name, (size, members) in layout(Path(sys.argv[1])).items():
        rows = "".join(f'            "{m}": ({at}, {n}),\n' for m, (at, n) in members.items())
        text += f'    "{name}": (\n        {size},\n        {{\n{rows}        }},\n    ),\n'
    OUT.write_text(text + "}\n")


if __name__ == "__main__":
    main()
