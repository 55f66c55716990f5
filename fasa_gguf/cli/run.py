"""The command `run`."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
import time
from typing import Any

from ..errors import FasaError
from ..profile.profile import Profile
from ..reasons import Reason, not_used
from .arguments import (
    AddCommand,
    add_context_flags,
    add_fasa_flags,
    add_model,
    given_fasa,
    read_params,
    read_text,
    whole,
)


def _load(a: argparse.Namespace) -> tuple[Any, bool]:
    """(model, is FASA a must). FASA settings, a profile or host mode on the command line make it one."""
    from ..gguf.cache_types import cache_type
    from ..gguf.file import GGUFFile
    from ..llama import Llama
    from ..session import last_log, quiet

    named = a.profile is not None or a.fasa_preset is not None or bool(given_fasa(a))
    must = not a.no_fasa and (named or a.fasa_mode == "host")
    fasa: Any = "off" if a.no_fasa else "auto"
    profile = None
    if must:
        fasa, profile = read_params(a, Profile.load(a.profile or a.model))
    elif not a.no_fasa:
        Profile.from_gguf(GGUFFile(a.model))  # a missing profile is fine, a malformed one is an error
    types = cache_type(a.cache_type_k), cache_type(a.cache_type_v)
    threads = a.threads or os.cpu_count()
    quiet()
    try:
        llm = Llama(
            a.model,
            fasa=fasa,
            fasa_profile=profile,
            fasa_mode=a.fasa_mode,
            n_ctx=-(-a.ctx_size // 256) * 256,  # llama.cpp rounds up too
            n_batch=a.batch_size,
            n_ubatch=min(a.ubatch_size, a.batch_size),
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=a.n_gpu_layers,
            type_k=types[0],
            type_v=types[1],
            flash_attn=True,
            verbose=False,
        )
    except (ValueError, RuntimeError) as e:
        raise FasaError(f"{a.model}: {e}; llama.cpp says: {last_log()}") from None
    return llm, must


def _is_end(llm: Any, token: int) -> bool:
    from ..runtime.library import load

    return bool(load().llama_vocab_is_eog(llm._model.vocab, token))


def _stream(llm: Any, tokens: list[int], n_predict: int, temp: float) -> tuple[int, float, float]:
    """Print at most n_predict tokens as they come. Returns (tokens, seconds to the first, seconds after it)."""
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be several tokens
    start = first = end = time.perf_counter()
    n = 0
    for token in llm.generate(tokens, temp=temp):
        end = time.perf_counter()
        first, n = (end, 1) if n == 0 else (first, n + 1)
        if _is_end(llm, token):
            break
        print(text.decode(llm.detokenize([token])), end="", flush=True)
        if n == n_predict:
            break
    print(text.decode(b"", True))
    return n, first - start, end - first


def cmd_run(a: argparse.Namespace) -> None:
    prompt = (read_text(a.file) if a.file else "") + (a.prompt or "")
    if not prompt:
        raise FasaError("nothing to run: give -p PROMPT or -f FILE")
    llm, must = _load(a)
    tokens = llm.tokenize(prompt.encode(), special=True)
    room = llm.n_ctx() - len(tokens)
    if room < 1:
        enough = len(tokens) + max(a.n_predict, 256)
        raise FasaError(f"the prompt has {len(tokens)} tokens and the context {llm.n_ctx()}; use -c {enough}")
    n, prompt_s, decode_s = _stream(llm, tokens, min(a.n_predict, room) if a.n_predict > 0 else room, a.temp)
    stats = llm.fasa_stats()
    print(summary(stats, len(tokens), prompt_s, n, decode_s), file=sys.stderr)
    if must and not stats["steps_sparse"]:
        raise FasaError(not_used(stats["step_reason_code"], _why_dense(stats, n)))


def _why_dense(stats: dict[str, Any], n: int) -> str:
    if stats["step_reason"] and stats.get("step_reason_code") != Reason.PREFILL:
        return stats["step_reason"]
    return (
        "one token was written, which comes from the prompt's own step"
        if n < 2
        else "no layer could; see layer_reasons"
    )


def summary(stats: dict[str, Any], n_prompt: int, prompt_s: float, n: int, decode_s: float) -> str:
    """One line about a run: n tokens in decode_s seconds after the first of them."""
    line = f"prompt {n_prompt} tokens in {prompt_s:.1f} s ({n_prompt / max(prompt_s, 1e-9):.1f} t/s)"
    line += f"; {n} tokens at {(n - 1) / decode_s:.1f} t/s" if n > 1 and decode_s > 0 else f"; {n} tokens"
    if not stats["steps_sparse"]:
        return f"{line}; dense: {_why_dense(stats, n)}"
    if stats.get("bytes_kv_host"):
        fetched = stats["bytes_fetched"] / stats["steps_sparse"] / 1e6
        reused = stats["rows_reused"] / max(stats["rows_reused"] + stats["rows_fetched"], 1)
        line += f"; host mode, {fetched:.1f} MB a step over PCIe, {100 * reused:.0f}% of the rows reused"
    attended, visible = stats["tokens_attended"] / stats["lists"], stats["tokens_visible"] / stats["lists"]
    share = (stats["bytes_fac"] + stats["bytes_tip"]) / stats["bytes_dense"]
    return (
        f"{line}; FASA in {stats['steps_sparse']} steps, {stats['steps_dense']} dense; "
        f"{attended:.0f} of {visible:.0f} tokens attended, {100 * share:.1f}% of the KV bytes read"
    )


def add_commands(command: AddCommand) -> None:
    p = command(
        "run",
        cmd_run,
        "Stream a completion, decoded with FASA when the model has a profile.",
        'model.gguf -f long.txt -p "In short:" -c 16384',
    )
    add_model(p)
    add_context_flags(p)
    add_fasa_flags(p)
    p.add_argument("-p", "--prompt", help="prompt; follows the file's text")
    p.add_argument("-f", "--file", help="file with the prompt")
    p.add_argument(
        "-n", "--n-predict", type=whole(-1), default=128, help="tokens to write; -1: until the context is full"
    )
    p.add_argument("-c", "--ctx-size", type=whole(0), default=8192, help="context in tokens; 0: the model's own")
    p.add_argument("-b", "--batch-size", type=whole(1), default=512, help="tokens per prefill batch")
    p.add_argument("-ub", "--ubatch-size", type=whole(1), default=512, help="tokens computed at once in prefill")
    p.add_argument("--temp", type=float, default=0.0, help="temperature; 0: greedy")
    p.add_argument("--no-fasa", action="store_true", help="dense")
