#!/usr/bin/env python3
"""What FASA does in every architecture of the pinned source: writes docs/reference/architectures.md.

usage: list_architectures.py [OUT]; needs the models of `make upstream-tests` in build/archs
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from tiny_archs import write_hybrid  # noqa: E402

from fasa_gguf import FasaError, FasaParams  # noqa: E402
from fasa_gguf.gguf.shape import NO_ROPE  # noqa: E402
from fasa_gguf.reasons import Reason  # noqa: E402
from fasa_gguf.session import Session  # noqa: E402
from fasa_gguf.speed.random_model import synthetic_profile  # noqa: E402

PAGE = ROOT / "docs/reference/architectures.md"
HEAD = """# Architectures

What FASA does in the architectures of the pinned llama.cpp. `python tests/helpers/list_architectures.py` writes this
page from tiny random models, most of two layers, which `make upstream-tests` makes; a test compares the two.

- **sparse**: yes when a layer can run sparse; else why not.
- **ahead**: yes when a layer behind the first selects its tokens while the feed-forward before it runs (setting
  [`ahead`](settings.md)); else why it selects with its own queries, which costs nothing but that time. -: the model has
  no second attention layer to tell.

| architecture | sparse | ahead |
|---|---|---|
"""
# says nothing of what a layer behind the first would do
NOT_TOLD = (Reason.AHEAD_FIRST, Reason.NO_CACHE, Reason.SMALL_WINDOW)


def look(path: Path) -> tuple[str, str]:
    """The two columns of a model."""
    try:
        with Session(path, n_ctx=512, n_threads=2) as s:
            if s.llama.llama_model_has_encoder(s.model) or not s.memory:
                return "not a decoder", "-"
            shapes = [s.fasa.layer_shape(il) for il in range(s.fasa.model_info()["n_layer"])]
            try:
                n_chunk = [h[2] // 2 if h[1] else 0 for h in shapes]
                s.fasa.set_profile(synthetic_profile([h[1] for h in shapes], n_chunk))
                s.fasa.set_params(FasaParams(chunks=4, budget=40, min_context=0, ahead="on"))
            except FasaError as e:
                return str(e).split(";")[0].split(" (")[0], "-"
            s.decode(list(range(3, 40)), 0)
            s.decode([5], 37)
            dense = [r for r in s.fasa.layer_reason_codes() if r not in (Reason.NO_CACHE, Reason.SMALL_WINDOW)]
            ahead = [r for r in s.fasa.layer_ahead_codes() if r not in NOT_TOLD]
    except FasaError as e:
        return str(e).split(": ", 1)[-1].split(";")[0], "-"
    if dense and all(dense):
        return clause(dense[0]), "-"
    return "yes", "-" if not ahead else "yes" if Reason.NONE in ahead else clause(ahead[0])


def told(name: str, path: Path) -> tuple[str, str]:
    """The two columns of an architecture: with a profile, which `calibrate` cannot make where there is no RoPE."""
    sparse, ahead = look(path)
    if sparse == "yes" and name in NO_ROPE:
        return "it has no RoPE, and so no frequency chunks", "-"
    return sparse, ahead


def clause(reason: Reason) -> str:
    """Short enough for a line."""
    return reason.text.split(":")[0]


def table() -> str:
    models = {path.stem.removesuffix("-dense").removesuffix("-moe"): path for path in ROOT.glob("build/archs/*.gguf")}
    if not models:
        raise SystemExit("no models in build/archs; run `make upstream-tests`")
    with tempfile.TemporaryDirectory() as folder:
        models["lfm2"] = Path(folder) / "lfm2.gguf"  # the other one has no attention layer behind its first
        write_hybrid(models["lfm2"])
        return "".join(f"| {name} | {' | '.join(told(name, path))} |\n" for name, path in sorted(models.items()))


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(HEAD + table())
