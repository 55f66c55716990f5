"""Foreign files into the GGUF reader and the profile reader, by atheris: `make fuzz`.

Whatever the bytes are, they are read or refused with a FasaError. What is read is written again, and is the same.
tests/profile/test_fuzz_corpus.py runs the corpus that is kept, without atheris.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

try:
    import atheris

    watched: Any = atheris.instrument_imports(include=["fasa_gguf"])
except ImportError:
    watched = contextlib.nullcontext()
with watched:
    from fasa_gguf.errors import FasaError
    from fasa_gguf.gguf.file import GGUFFile
    from fasa_gguf.gguf.shape import model_shape, sliding_windows
    from fasa_gguf.memory.model import read_model
    from fasa_gguf.profile import embed
    from fasa_gguf.profile.flat import gguf_entries
    from fasa_gguf.profile.inspect import format_profile
    from fasa_gguf.profile.profile import Profile

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
GIVEN, WRITTEN, CLEAN = FOLDER / "given.gguf", FOLDER / "written.gguf", FOLDER / "clean.gguf"


def check_profile(profile):
    """Says all of itself, and survives being written as JSON and as GGUF entries."""
    format_profile(profile, 4)
    flat = profile.to_flat()
    again = Profile.from_json(profile.to_json(), "again")
    assert Profile.from_json(again.to_json(), "again").to_flat() == again.to_flat()
    assert len(gguf_entries(flat)) == len(flat)
    with contextlib.suppress(FasaError):  # settings that do not go together
        profile.params()


def content(path):
    """(entries that are not the profile's, tensor infos, tensor data) of a file."""
    model = GGUFFile(path)
    data = path.read_bytes()[model.data_offset :] if model.tensors else b""
    return [kv.raw for key, kv in model.kv.items() if not key.startswith("fasa.")], model.info_raw, data


def check_model(data):
    GIVEN.write_bytes(data)
    model = GGUFFile(GIVEN)
    for kv in model.kv.values():
        assert kv.count >= 0 and kv.type_name and (kv.count > 1000 or kv.value is not None)
    with contextlib.suppress(FasaError):
        sliding_windows(model, len(model_shape(model)[0]))
    profile = Profile.from_gguf(model)
    if profile is None:
        return
    check_profile(profile)
    with contextlib.suppress(FasaError):
        read_model(model, profile)
    embed.rewrite(model, profile, WRITTEN, force=True, warn=lambda _text: None)
    assert Profile.load(WRITTEN).to_flat() == profile.to_flat()
    embed.rewrite(WRITTEN, None, CLEAN, force=True, warn=lambda _text: None)
    assert content(CLEAN) == content(WRITTEN) == content(GIVEN)


def one(data):
    with contextlib.suppress(FasaError):
        if data[:4] == b"GGUF":
            check_model(data)
        else:
            GIVEN.write_bytes(data)
            check_profile(Profile.load(GIVEN))


if __name__ == "__main__":
    # -merge=1 starts the first argument anew, through a shell
    atheris.Setup([f"{sys.executable} {sys.argv[0]}", *sys.argv[1:]], one)
    atheris.Fuzz()
