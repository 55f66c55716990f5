"""The command `run`."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
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
    add_rpc,
    given_fasa,
    note,
    read_params,
    read_text,
    whole,
)
from .chat import Template, converse, messages_of
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


@dataclass
class Written:
    """What was read and written so far, in one answer or several."""

    n_prompt: int = 0  # tokens of prompts
    n_reused: int = 0  # of them, those that were in the cache
    prompt_s: float = 0.0  # to the first token of each answer
    n: int = 0  # tokens written
    n_answers: int = 0  # with at least one token
    decode_s: float = 0.0  # after the first token of each


def _stream(llm: Any, tokens: list[int], n_predict: int, temp: float, w: Written) -> Generator[str, None, None]:
    """Write at most n_predict tokens, and give out their text as it comes."""
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be several tokens
    reused = min(_in_common(llm.input_ids[: llm.n_tokens], tokens), len(tokens) - 1)
    w.n_prompt, w.n_reused = w.n_prompt + len(tokens), w.n_reused + reused
    n_read = 0
    total, bar, last = len(tokens) - reused, progress_bar(), time.perf_counter()

    def decoded(n_tokens: int) -> None:
        nonlocal n_read
        if n_read < total:
            n_read += n_tokens
            bar("reading the prompt", min(n_read, total), total)

    llm._ctx.decoded = decoded
    bar("reading the prompt", 0, total)
    for n, token in enumerate(llm.generate(tokens, temp=temp), 1):
        now = time.perf_counter()
        stop_progress()
        w.n, w.n_answers = w.n + 1, w.n_answers + (n == 1)
        w.prompt_s, w.decode_s = w.prompt_s + (n == 1) * (now - last), w.decode_s + (n > 1) * (now - last)
        last = now
        if _is_end(llm, token):
            break
        yield text.decode(llm.detokenize([token]))
        if n == n_predict:
            break
    yield text.decode(b"", True)


def _in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _room(llm: Any, a: argparse.Namespace, tokens: list[int]) -> int:
    room: int = llm.n_ctx() - len(tokens)
    return min(a.n_predict, room) if a.n_predict > 0 else room


def _answer(llm: Any, a: argparse.Namespace, template: Template, w: Written, messages: Any) -> tuple[str, bool]:
    """(what was written, whether Ctrl-C ended it) of one turn; it is printed as it comes."""
    parts: list[str] = []
    tokens = _tokens(llm, template.prompt(messages), max(a.n_predict, 256), "the conversation")
    stream = _stream(llm, tokens, _room(llm, a, tokens), a.temp, w)
    try:
        for part in stream:
            parts.append(part)
            print(part, end="", flush=True)
    except KeyboardInterrupt:
        stop_progress()
        stream.close()
        return "".join(parts), True
    finally:
        print(flush=True)
    return "".join(parts), False


def _tokens(llm: Any, text: str, n_more: int, what: str) -> list[int]:
    """The tokens of a text, with one BOS at most before it. Raises FasaError when they do not fit."""
    tokens = one_bos(library.load(), llm._model.vocab, llm.tokenize(text.encode(), special=True))
    if len(tokens) >= llm.n_ctx():
        enough = len(tokens) + n_more
        raise FasaError(f"{what} has {len(tokens)} tokens and the context {llm.n_ctx()}; use -c {enough}")
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


def _check_arguments(a: argparse.Namespace, prompt: str) -> None:
    if not prompt and not a.conversation:
        raise FasaError("nothing to run: give -p PROMPT or -f FILE")
    for flag, value in (
        ("--system", a.system),
        ("--chat-template", a.chat_template),
        ("--chat-template-file", a.chat_template_file),
    ):
        if value is not None and not (a.chat or a.conversation):
            raise FasaError(f"{flag} is for --chat and -cnv; add one of them")
    if a.chat_template and a.chat_template_file:
        raise FasaError("--chat-template and --chat-template-file: expected one of them, found both")


def cmd_run(a: argparse.Namespace) -> None:
    prompt = (read_text(a.file) if a.file else "") + (a.prompt or "")
    _check_arguments(a, prompt)
    llm, must = _load(a)
    trained = llm._model.n_ctx_train()
    if a.ctx_size and a.ctx_size > trained:
        note(f"-c {a.ctx_size}: the model was trained on {trained} tokens; text beyond them may be nonsense")
    template = Template(llm, a) if a.chat or a.conversation else None
    w = Written()
    if a.conversation:
        assert template is not None
        converse(a, prompt, functools.partial(_answer, llm, a, template, w))
    else:
        if template is not None:
            prompt = template.prompt([*messages_of(a), {"role": "user", "content": prompt}])
        tokens = _tokens(llm, prompt, max(a.n_predict, 256), "the prompt")
        for part in _stream(llm, tokens, _room(llm, a, tokens), a.temp, w):
            print(part, end="", flush=True)
        print()
    _report(llm, a, w, must)


def _report(llm: Any, a: argparse.Namespace, w: Written, must: bool) -> None:
    """What was read and written, and what FASA did. Raises FasaError when it was a must and did nothing."""
    stats = llm.fasa_stats()
    if w.n_prompt:
        read = w.n_prompt - w.n_reused
        print(summary(stats, read, w.prompt_s, w.n, w.decode_s, w.n_reused, w.n_answers), file=sys.stderr)
    if a.verbose:
        print("\n".join(layer_lines(stats["layer_reasons"], a.model)), file=sys.stderr)
    if must and w.n_prompt and not stats["steps_sparse"]:
        raise FasaError(not_used(stats["step_reason_code"], _why_dense(stats, w.n)))


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


def summary(
    stats: dict[str, Any],
    n_prompt: int,
    prompt_s: float,
    n: int,
    decode_s: float,
    n_reused: int = 0,
    n_answers: int = 1,
) -> str:
    """One line about a run: n tokens of n_answers, in decode_s seconds after the first of each.

    n_prompt: tokens that were read; n_reused: those that were in the cache.
    """
    line = f"prompt {n_prompt} tokens in {prompt_s:.1f} s ({n_prompt / max(prompt_s, 1e-9):.1f} t/s)"
    line += f", {n_reused} reused" if n_reused else ""
    line += f"; {n} tokens"
    line += f" at {(n - n_answers) / decode_s:.1f} t/s" if n > n_answers and decode_s > 0 else ""
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
    add_rpc(p)
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
    p.add_argument(
        "-cnv", "--conversation", action="store_true", help="chat: turns from standard input, after -p if it is given"
    )
    p.add_argument(
        "-sys", "--system-prompt", "--system", dest="system", metavar="TEXT", help="system message of a chat"
    )
    p.add_argument("--chat-template", metavar="NAME", help="one of llama.cpp's templates by name [the model's]")
    p.add_argument("--chat-template-file", metavar="FILE", help="a Jinja template in a file [the model's]")
    p.add_argument("--temp", type=float, default=0.0, help="temperature; 0: greedy")
    p.add_argument("-v", "--verbose", action="store_true", help="what each layer did, and which have a sliding window")
    p.add_argument("--no-fasa", action="store_true", help="dense")
