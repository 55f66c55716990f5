"""The command `run`."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..counters import read_share
from ..errors import FasaError
from ..gguf.file import U32, GGUFFile, check_is_file
from ..profile.find import find_profile, require_profile
from ..reasons import Reason, not_used
from ..runtime import library
from ..runtime.interrupt import deferred_decode
from ..runtime.pieces import one_bos
from ..runtime.settings import thread_count
from .arguments import (
    CONTEXT,
    AddCommand,
    add_context_flags,
    add_context_size,
    add_fasa_flags,
    add_model,
    given_fasa,
    note,
    read_params,
    read_text,
    whole,
)
from .progress import progress_bar, stop_progress


def _load(a: argparse.Namespace) -> tuple[Any, bool]:
    """(model, is FASA a must). FASA settings, a profile or host mode on the command line make it one."""
    from ..gguf.cache_types import cache_type
    from ..llama import Llama
    from ..session import last_log, quiet

    named = a.profile is not None or a.fasa_preset is not None or bool(given_fasa(a))
    must = not a.no_fasa and (named or a.fasa_mode == "host")
    fasa: Any = "off" if a.no_fasa else "auto"
    profile = None
    if must:
        fasa, profile = read_params(a, require_profile(a.model, a.profile, note))
    elif a.no_fasa:
        check_is_file(a.model)
    else:
        find_profile(a.model)  # a missing profile is fine, a malformed one is an error
    types = cache_type(a.cache_type_k), cache_type(a.cache_type_v)
    n_ctx, threads = _context_size(a), thread_count(a.threads)
    quiet()
    try:
        llm = Llama(
            a.model,
            fasa=fasa,
            fasa_profile=profile,
            fasa_mode=a.fasa_mode,
            n_ctx=n_ctx,
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
    _stoppable(llm)
    return llm, must


def _stoppable(llm: Any) -> None:
    """Ctrl-C ends a batch of the prompt, rather than wait for it; `decoded` is told of every batch's tokens."""
    from llama_cpp._internals import LlamaContext

    class Stoppable(LlamaContext):
        decoded: Callable[[int], None] | None = None

        def decode(self, batch: Any) -> None:
            n = batch.batch.n_tokens
            with deferred_decode(library.load(), self.ctx, n):
                super().decode(batch)
            if self.decoded:
                self.decoded(n)

    llm._ctx.__class__ = Stoppable


def _is_end(llm: Any, token: int) -> bool:
    return bool(library.load().llama_vocab_is_eog(llm._model.vocab, token))


def _stream(llm: Any, tokens: list[int], n_predict: int, temp: float) -> tuple[int, float, float]:
    """Print at most n_predict tokens as they come. Returns (tokens, seconds to the first, seconds after it)."""
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be several tokens
    start = first = end = time.perf_counter()
    n = n_read = 0
    bar = progress_bar()

    def decoded(n_tokens: int) -> None:
        nonlocal n_read
        if n_read < len(tokens):
            n_read += n_tokens
            bar("reading the prompt", n_read, len(tokens))

    llm._ctx.decoded = decoded
    bar("reading the prompt", 0, len(tokens))
    for token in llm.generate(tokens, temp=temp):
        end = time.perf_counter()
        stop_progress()
        first, n = (end, 1) if n == 0 else (first, n + 1)
        if _is_end(llm, token):
            break
        print(text.decode(llm.detokenize([token])), end="", flush=True)
        if n == n_predict:
            break
    print(text.decode(b"", True))
    return n, first - start, end - first


def _chat(llm: Any, model: str, prompt: str, system: str | None) -> str:
    """The prompt as the model's chat template has it, up to where the answer begins. Raises FasaError."""
    from jinja2 import TemplateError
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = llm.metadata.get("tokenizer.chat_template")
    if why := llm.unreadable_templates.get("tokenizer.chat_template"):
        raise FasaError(f"{model}: its chat template cannot be read: {why}; omit --chat")
    if template is None:
        raise FasaError(f"{model}: this model has no chat template; omit --chat")
    bos, eos = (llm._model.token_get_text(t) if t >= 0 else "" for t in (llm.token_bos(), llm.token_eos()))
    messages: Any = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    try:
        return str(Jinja2ChatFormatter(template, eos, bos)(messages=messages).prompt)
    except (TemplateError, ValueError, TypeError) as e:
        raise FasaError(f"{model}: its chat template does not take these messages: {e}") from None


def _tokenize(llm: Any, a: argparse.Namespace, prompt: str) -> list[int]:
    """The tokens of the prompt, with one BOS at most before it. Raises FasaError when they do not fit."""
    text = _chat(llm, a.model, prompt, a.system) if a.chat else prompt
    tokens = one_bos(library.load(), llm._model.vocab, llm.tokenize(text.encode(), special=True))
    if len(tokens) >= llm.n_ctx():
        enough = len(tokens) + max(a.n_predict, 256)
        raise FasaError(f"the prompt has {len(tokens)} tokens and the context {llm.n_ctx()}; use -c {enough}")
    return tokens


def _context_size(a: argparse.Namespace) -> int:
    """-c, by default 8,192 or what the model was trained on if that is less; llama.cpp rounds up too."""
    size = a.ctx_size
    if size is None:
        size = CONTEXT
        with contextlib.suppress(FasaError):  # llama.cpp says what is wrong with the file
            header = GGUFFile(a.model)
            size = min(header.get(f"{header.arch}.context_length", U32, default=CONTEXT) or CONTEXT, CONTEXT)
    return -(-size // 256) * 256


def cmd_run(a: argparse.Namespace) -> None:
    prompt = (read_text(a.file) if a.file else "") + (a.prompt or "")
    if not prompt:
        raise FasaError("nothing to run: give -p PROMPT or -f FILE")
    if a.system is not None and not a.chat:
        raise FasaError("--system is for --chat; add it")
    llm, must = _load(a)
    trained = llm._model.n_ctx_train()
    if a.ctx_size and a.ctx_size > trained:
        note(f"-c {a.ctx_size}: the model was trained on {trained} tokens; text beyond them may be nonsense")
    tokens = _tokenize(llm, a, prompt)
    room = llm.n_ctx() - len(tokens)
    n, prompt_s, decode_s = _stream(llm, tokens, min(a.n_predict, room) if a.n_predict > 0 else room, a.temp)
    stats = llm.fasa_stats()
    print(summary(stats, len(tokens), prompt_s, n, decode_s), file=sys.stderr)
    if a.verbose:
        print("\n".join(layer_lines(stats["layer_reasons"], a.model)), file=sys.stderr)
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


def layer_lines(reasons: Sequence[str | None], model: str) -> list[str]:
    """What each layer did, layers alike in one line; then which of them have a sliding window."""
    from ..gguf.file import GGUFFile
    from ..gguf.shape import describe_windows, number_ranges, sliding_windows

    alike = {why: [il for il, x in enumerate(reasons) if x == why] for why in reasons}
    lines = [f"layers {number_ranges(x)}: {f'dense, {why}' if why else 'sparse'}" for why, x in alike.items()]
    return lines + describe_windows(sliding_windows(GGUFFile(model), len(reasons)))


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
    return (
        f"{line}; FASA in {stats['steps_sparse']} steps, {stats['steps_dense']} dense; "
        f"{attended:.0f} of {visible:.0f} tokens attended, {100 * read_share(stats):.1f}% of the KV bytes read"
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
    add_context_size(p, "context")
    p.add_argument("-b", "--batch-size", type=whole(1), default=512, help="tokens per prefill batch")
    p.add_argument("-ub", "--ubatch-size", type=whole(1), default=512, help="tokens computed at once in prefill")
    p.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template, as the user's")
    p.add_argument("--system", metavar="TEXT", help="system message for --chat")
    p.add_argument("--temp", type=float, default=0.0, help="temperature; 0: greedy")
    p.add_argument("-v", "--verbose", action="store_true", help="what each layer did, and which have a sliding window")
    p.add_argument("--no-fasa", action="store_true", help="dense")
