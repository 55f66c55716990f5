"""Compare what two checkouts compute, bit for bit: logits, greedy tokens, lists and counters of FASA and of dense.

    compare_checkouts.py OTHER [MODEL...]   OTHER: a checkout whose library is built; MODEL: a GGUF with a profile

Both sides run the same work on the same random models, each in a process of its own with its own library. Prints a
line for each case and ends with 1 when a case differs. For changes that must not change any result.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RENAMED = {"rows_attended": "tokens_attended", "rows_visible": "tokens_visible"}  # counters, before and after

SETTINGS = {
    "off": None,
    "budget": {"budget": 64},
    "budget q8": {"budget": 64, "k_dom": "q8"},
    "budget f16": {"budget": 64, "k_dom": "f16", "chunks": 4},
    "mass": {"mass": 0.7, "floor": 16, "cap": 200},
    "per head": {"budget": 48, "per_head": 1},
    "forced only": {"budget": 1, "sink": 2, "recent": 3},
    "all": {"budget": 100000},
}
CONTEXTS = {
    "f16": {},
    "q8_0, two threads": {"type_k": "q8_0", "type_v": "q8_0", "n_threads": 2},
    "f32": {"type_k": "f32", "type_v": "f32"},
}
SEQUENCES = {"3 sequences": {"kv_unified": False}, "3 sequences, unified": {"kv_unified": True}}


def digest(*arrays) -> str:
    h = hashlib.sha256()
    for a in arrays:
        h.update(memoryview(a).cast("B") if not isinstance(a, bytes) else a)
    return h.hexdigest()[:16]


# ---- in the checkout that is looked at ----


def counted(session) -> dict:
    values = {RENAMED.get(name, name): n for name, n in session.fasa.counters().items()}
    return {**values, "layers": session.fasa.layer_reasons(), "step": session.fasa.step_reason()}


def greedy(session, prompt: list[int], n: int) -> dict:
    """A prompt, then n tokens one by one."""
    import numpy as np

    logits = session.decode(prompt, 0)
    seen, tokens = [logits], []
    for i in range(n):
        tokens.append(int(np.argmax(logits)))
        logits = session.decode([tokens[-1]], len(prompt) + i)
        seen.append(logits)
    return {"logits": digest(np.stack(seen)), "tokens": tokens, **counted(session)}


def together(session, prompt: list[int], n: int) -> dict:
    """A prompt of three sequences that go on together, and a draft of four tokens at the end."""
    import numpy as np

    session.decode(prompt, 0)
    for seq in (1, 2):
        session.copy(0, seq)
    seen = []
    for i in range(n):
        session.decode_batch([(5 + 7 * seq + i, len(prompt) + i, seq, True) for seq in range(3)])
        seen += [session.logits(seq) for seq in range(3)]
    seen += list(session.decode([3, 1, 4, 1], len(prompt) + n, seq=1, logits="all"))
    return {"logits": digest(np.stack(seen)), **counted(session)}


def sessions(model: str, profile: str, n_vocab: int, n_prompt: int, n: int, report) -> None:
    import numpy as np

    from fasa_gguf import FasaError, FasaParams, Profile
    from fasa_gguf.session import Session

    prompt = np.random.default_rng(1).integers(3, n_vocab, n_prompt).tolist()
    name = Path(model).name
    for context, made in {**CONTEXTS, **SEQUENCES}.items():
        several = context in SEQUENCES
        cells = 256 * (n_prompt // 256 + 2)  # of a sequence
        size = {"n_ctx": cells * (3 if several else 1), "n_seq_max": 3 if several else 1}
        try:
            s = Session(model, n_batch=128, n_ubatch=64, **{"n_threads": 1, **size, **made})
        except FasaError as e:  # heads too small for blocks of 32 values
            report(f"{name}, {context}", {"error": str(e)})
            continue
        with s:
            s.fasa.set_profile(Profile.load(profile))
            for setting, values in SETTINGS.items():
                s.clear()
                s.fasa.set_params(None if values is None else FasaParams(**{"min_context": 0, **values}))
                s.fasa.reset_counters()
                report(f"{name}, {context}, {setting}", (together if several else greedy)(s, prompt, n))


def ops(report) -> None:
    """The ops of one layer on random arrays."""
    import numpy as np

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    try:
        from fasa_gguf.runtime.ops import op_run
    except ModuleNotFoundError:
        from fasa_gguf.native import op_run
    for seed in range(24):
        rng = np.random.default_rng(seed)
        n_stream, n_tokens, n_kv = int(rng.integers(1, 3)), int(rng.integers(1, 4)), int(rng.integers(40, 900))
        heads, heads_kv = [(4, 2), (6, 2), (8, 1), (3, 3)][seed % 4]
        d, k_dom = [64, 80, 96, 128][seed // 4 % 4], ["q4", "q8", "f16"][seed % 3]
        n_dom = 8 * int(rng.integers(1, d // 16 + 1))
        mask = np.where(rng.random((n_stream, n_tokens, n_kv)) < 0.1, -np.inf, 0).astype(np.float32)
        case = {
            "q": normal(n_stream, n_tokens, heads, d) * 2,
            "k": normal(n_stream, n_kv, heads_kv, d),
            "v": normal(n_stream, n_kv, heads_kv, d),
            "dims": np.stack([rng.permutation(d)[:n_dom] for _ in range(heads_kv)]),
            "weight": np.abs(normal(heads_kv, n_dom)),
            "forced": rng.integers(0, n_kv, (n_stream, n_tokens, 5)),
            "budget": int(rng.integers(1, n_kv)),
            "mass": [0.0, 0.6][seed % 2],
            "floor": 8,
            "cap": 300,
            "scale": d**-0.5,
            "soft_cap": [0.0, 30.0][seed // 2 % 2],
            "mask": mask,
            "k_dom": k_dom,
            "type_k": ["f16", "f32", "q8_0"][seed % 3] if d % 32 == 0 else "f16",
            "per_head": seed % 5 == 0,
            "sinks": normal(heads) if seed % 3 == 0 else None,
        }
        out = op_run(**case)
        report(f"ops, seed {seed}", {name: digest(out[name]) for name in ("est", "count", "list", "out")})


def look(work: str) -> None:
    """What this checkout computes, as JSON lines."""
    for model, profile, n_vocab, n_prompt, n in json.loads(Path(work).read_text()):
        sessions(model, profile, n_vocab, n_prompt, n, lambda *line: print(json.dumps(line), flush=True))
    ops(lambda *line: print(json.dumps(line), flush=True))


# ---- both ----


def models(folder: Path) -> list:
    """(model, profile, vocabulary, prompt, tokens to decode) of random models, written to `folder`."""
    from tiny_archs import write_hybrid, write_sliding
    from tiny_gguf import write_tiny

    from fasa_gguf.gguf.file import GGUFFile
    from fasa_gguf.gguf.shape import model_shape
    from fasa_gguf.speed.random_model import synthetic_profile

    write_tiny(folder / "tiny.gguf")
    write_tiny(folder / "wide.gguf", seed=3, n_layer=2, n_head=6, n_head_kv=2, head_dim=64, n_embd=96)
    write_sliding(folder / "sliding.gguf")
    write_hybrid(folder / "hybrid.gguf")
    out = []
    for path in sorted(folder.glob("*.gguf")):
        profile = path.with_suffix(".json")
        synthetic_profile(*model_shape(GGUFFile(path)), seed=5).save(profile)
        out.append((str(path), str(profile), 60 if path.stem in ("sliding", "hybrid") else 250, 300, 12))
    return out


def run(checkout: Path, work: Path) -> dict[str, dict]:
    env = {**os.environ, "PYTHONPATH": str(checkout), "FASA_LIB_PATH": str(checkout / "fasa_gguf" / "lib")}
    done = subprocess.run(
        [sys.executable, "-P", __file__, "--look", str(work)], capture_output=True, text=True, env=env, cwd=work.parent
    )
    if done.returncode != 0:
        raise SystemExit(f"{checkout}: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
    return dict(json.loads(line) for line in done.stdout.splitlines())


def main(other: str, *given: str) -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work.json"
        real = [(os.path.abspath(m), os.path.abspath(m), 40000, 600, 6) for m in given]
        work.write_text(json.dumps(models(Path(folder)) + real))
        here, there = run(ROOT, work), run(Path(other).resolve(), work)
    bad = [name for name in here if here[name] != there.get(name)]
    for name, found in here.items():
        print(f"{'differs' if name in bad else 'equal':<8} {name}")
        for key, value in found.items() if name in bad else ():
            if value != there.get(name, {}).get(key):
                print(f"         {key}: {value} here, {there.get(name, {}).get(key)} there")
    print(f"{len(here) - len(bad)} of {len(here)} cases are equal")
    return 1 if bad or here.keys() != there.keys() else 0


if __name__ == "__main__":
    if sys.argv[1] == "--look":
        look(sys.argv[2])
    else:
        sys.exit(main(*sys.argv[1:]))
