"""`embed-profile` killed at any moment: the model is the old file or the new one, never half of one.

KILLS=200 (`make kills`) kills that many times; a few by default.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from paths import ROOT
from profiles import plain_profile
from tiny_gguf import write_tiny

from fasa_gguf.profile import embed
from fasa_gguf.profile.embed import TEMPORARY
from fasa_gguf.profile.profile import Profile

KILLS = int(os.environ.get("KILLS", 6))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def size(path):
    """Bytes of a file that may go."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(model of 19 MB, profile, digest of the model without it, digest with it)."""
    folder = tmp_path_factory.mktemp("kills")
    model, profile = folder / "model.gguf", folder / "profile.json"
    write_tiny(model, n_ff=8192, dtype=np.float32)
    plain_profile().save(profile)
    loaded = Profile.load(profile)
    before = digest(model)
    embed.rewrite(model, loaded, folder / "with.gguf")
    return model, profile, before, digest(folder / "with.gguf")


def test_embed_profile_is_killed(files, tmp_path):
    """A killed run leaves one file at most, with the documented name, which the next run removes."""
    source, profile, before, after = files
    model = tmp_path / "model.gguf"
    command = [sys.executable, "-m", "fasa_gguf", "embed-profile", str(model), "--profile", str(profile)]
    rng, seen = random.Random(KILLS), {"old": 0, "new": 0, "left": 0}

    def start():
        shutil.copyfile(source, model)
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def temporary():
        return [p for p in tmp_path.iterdir() if p != model]

    def largest(known):
        return max((size(p) for p in temporary() if p.name not in known), default=-1)

    for _ in range(KILLS):
        left = {p.name for p in temporary()}
        process, kind = start(), rng.choice(["any", "copy", "end"])
        if kind == "any":
            time.sleep(rng.uniform(0, 1))
        else:  # where it hurts: while it copies, or as it ends
            full = source.stat().st_size * (1 if kind == "end" else rng.random())
            while process.poll() is None and largest(left) < full:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.1) if kind == "end" else 0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = digest(model)
        assert found in (before, after), "the model is neither the old file nor the new one"
        seen["old" if found == before else "new"] += 1
        seen["left"] += bool(temporary())
        assert len(temporary()) <= 1 and all(p.name.startswith(TEMPORARY) for p in temporary()), temporary()
    assert start().wait() == 0 and digest(model) == after and temporary() == []
    print(
        f"\n{KILLS} kills: {seen['old']} left the old file, {seen['new']} the new one; {seen['left']} a temporary file"
    )
    assert seen["old"] and seen["left"]
