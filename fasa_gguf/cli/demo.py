"""The demo: one model, one long text with a hidden fact, one question; dense beside FASA.

Run it with `python -m fasa_gguf.cli.demo MODEL`.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ..calibrate.corpus import default_corpus
from ..calibrate.gguf import calibrate
from ..counters import bytes_read
from ..errors import FasaError
from ..llama import Llama
from ..profile.embed import rewrite
from ..profile.profile import Profile
from ..report.pictures import save_heatmap
from .progress import progress_bar

FACT = "The magic number is 7482915. "
QUESTION = "What is the magic number?"
ANSWER = "7482915"
TEXT_CHARS = 19000  # about 5,000 tokens
FACT_AT = 0.4  # of the text
ARMS = {"dense": "off", "FASA": "auto"}
TURNS, TOKENS = 3, 24  # of the timing


def long_text() -> str:
    """Prose that every Python carries, with the fact in it."""
    text = " ".join(default_corpus()[1][60000:].split())[:TEXT_CHARS]
    at = text.index(". ", int(len(text) * FACT_AT)) + 2
    return text[:at] + FACT + text[at:]


def find_answers(llm: Any, prompt: str) -> dict[str, str]:
    """What each arm answers. Raises FasaError when FASA ran no sparse step."""
    answers = {}
    for arm, choice in ARMS.items():
        llm.set_fasa(choice)
        llm.reset_fasa_stats()
        pieces = llm.create_completion(prompt, max_tokens=12, temperature=0, stop=["\n", "."], stream=True)
        answers[arm] = "".join(piece["choices"][0]["text"] for piece in pieces).strip()
        if arm == "FASA" and not llm.fasa_stats()["steps_sparse"]:
            raise FasaError(f"no step of the FASA answer was sparse: {llm.fasa_stats()['step_reason']}")
    return answers


def time_arms(llm: Any, depth: int) -> tuple[dict[str, float], dict[str, Counter[str]]]:
    """(tokens per second, FASA's counters) of each arm after `depth` tokens. The arms alternate.

    The answers themselves are too short to time.
    """
    seconds = dict.fromkeys(ARMS, 0.0)
    counted: dict[str, Counter[str]] = {arm: Counter() for arm in ARMS}
    for turn in range(-1, TURNS):
        for arm, choice in ARMS.items():
            llm.set_fasa(choice)
            llm.reset_fasa_stats()
            llm.n_tokens = depth  # eval forgets what comes after it
            llm.eval([100])  # derives the dominant keys, builds the graph
            start = time.perf_counter()
            for i in range(TOKENS):
                llm.eval([101 + i])
            if turn >= 0:  # the first turn warms up
                seconds[arm] += time.perf_counter() - start
                counted[arm].update({name: n for name, n in llm.fasa_stats().items() if type(n) is int})
    return {arm: TURNS * TOKENS / s for arm, s in seconds.items()}, counted


def print_results(
    answers: dict[str, str], speed: dict[str, float], counted: dict[str, Counter[str]], depth: int
) -> None:
    """The answers and a small table; counted: FASA's counters of each arm's timing."""
    fasa = counted["FASA"]
    attended = {
        "dense": f"{fasa['tokens_visible'] / fasa['lists']:.0f}",
        "FASA": f"{fasa['tokens_attended'] / fasa['lists']:.0f}",
    }
    megabytes = {arm: bytes_read(c) / (c["steps_sparse"] + c["steps_dense"]) / 1e6 for arm, c in counted.items()}
    print(f"\n{QUESTION}   (hidden in a text of {depth} tokens)\n")
    for arm, text in answers.items():
        print(f"  {arm:<6} {text}{'' if ANSWER in text else '   (wrong)'}")
    print(f"\n  {'':<6} {'tokens/s':>9} {'tokens attended':>16} {'KV MB read/token':>17}")
    for arm in ARMS:
        print(f"  {arm:<6} {speed[arm]:>9.1f} {attended[arm]:>16} {megabytes[arm]:>17.1f}")
    same = "the same" if answers["FASA"] == answers["dense"] else "not the same"
    print(f"\n  {speed['FASA'] / speed['dense']:.1f} times the speed. The answers are {same}.")


def main(path: str) -> int:
    """Calibrate and embed when there is no profiled model yet, then answer and time."""
    folder = Path(path).parent
    model, picture = folder / (Path(path).stem + ".fasa.gguf"), folder / "heatmap.png"
    if not model.exists():
        print(f"Calibrating {Path(path).name} (one to two minutes) and embedding its profile ...", file=sys.stderr)
        rewrite(path, calibrate(path, progress=progress_bar()), model, force=True)
    save_heatmap(Profile.load(model), picture)
    llm = Llama(str(model), n_ctx=8192, verbose=False)
    prompt = f"{long_text()}\n\nThe magic number is"
    depth = len(llm.tokenize(prompt.encode(), special=True))
    answers = find_answers(llm, prompt)
    speed, counted = time_arms(llm, depth)
    print_results(answers, speed, counted, depth)
    print(f"  Which frequency chunks are dominant: {picture}")
    print(f"  The model with its profile: {model}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python -m fasa_gguf.cli.demo MODEL", file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(main(sys.argv[1]))
    except FasaError as e:
        sys.exit(f"fasa-gguf: error: {e}")
