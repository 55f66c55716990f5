"""The demo: one model, one long text with a hidden fact, one question; dense beside FASA. `python -m fasa_gguf.demo MODEL`"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from .calibrate import calibrate, default_corpus
from .cli import _bar
from .embed import rewrite
from .errors import FasaError
from .heatmap import save_heatmap
from .llama import Llama
from .profile import Profile

FACT = "The magic number is 7482915. "
QUESTION = "What is the magic number?"
ANSWER = "7482915"
TEXT_CHARS = 19000   # about 5,000 tokens
FACT_AT = 0.4        # of the text


def long_text() -> str:
    """Prose that every Python carries, with the fact in it."""
    text = " ".join(default_corpus()[1][60000:].split())[:TEXT_CHARS]
    at = text.index(". ", int(len(text) * FACT_AT)) + 2
    return text[:at] + FACT + text[at:]


def main(path: str) -> int:
    folder = Path(path).parent
    model, picture = folder / (Path(path).stem + ".fasa.gguf"), folder / "heatmap.png"
    if not model.exists():
        print(f"Calibrating {Path(path).name} (about a minute) and embedding its profile ...", file=sys.stderr)
        rewrite(path, calibrate(path, progress=_bar()), model, force=True)
    save_heatmap(Profile.load(model), picture)

    llm = Llama(str(model), n_ctx=8192, verbose=False)
    prompt = f"{long_text()}\n\nThe magic number is"
    rows = []
    for arm in ("dense", "FASA"):
        llm.set_fasa("off" if arm == "dense" else "auto")
        llm.reset_fasa_stats()
        text = ""
        for piece in llm.create_completion(prompt, max_tokens=12, temperature=0, stop=["\n", "."], stream=True):
            text += piece["choices"][0]["text"]
        if arm == "FASA" and not llm.fasa_stats()["steps_sparse"]:
            raise FasaError(f"no step of the FASA answer was sparse: {llm.fasa_stats()['step_reason']}")
        # the answer is short: time the decode at this depth with 32 tokens more
        depth = llm.n_tokens
        start = time.perf_counter()
        for i in range(32):
            llm.eval([100 + i])
        rows.append((arm, text.strip(), 32 / (time.perf_counter() - start), depth, llm.fasa_stats()))
        llm.n_tokens = depth
        llm._ctx.kv_cache_seq_rm(-1, depth, -1)

    print(f"\n{QUESTION}   (hidden in a text of {rows[0][3]} tokens)\n")
    for arm, text, *_ in rows:
        print(f"  {arm:<6} {text}{'' if ANSWER in text else '   (wrong)'}")
    print(f"\n  {'':<6} {'tokens/s':>9} {'tokens attended':>16} {'KV bytes read':>14}")
    for arm, _, speed, depth, s in rows:
        if s["steps_sparse"]:
            attended, share = f"{s['rows_attended'] / s['lists']:.0f}", f"{100 * (s['bytes_fac'] + s['bytes_tip']) / s['bytes_dense']:.0f}%"
        else:
            attended, share = f"{depth}", "100%"
        print(f"  {arm:<6} {speed:>9.1f} {attended:>16} {share:>14}")
    print(f"\n  {rows[1][2] / rows[0][2]:.1f} times the speed. The answers are {'the same' if rows[0][1] == rows[1][1] else 'not the same'}.")
    print(f"  Which frequency chunks are dominant: {picture}")
    print(f"  The model with its profile: {model}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except FasaError as e:
        sys.exit(f"fasa-gguf: error: {e}")
