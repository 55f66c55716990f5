"""llama_cpp.Llama where it fails its users: crashes that a sentence can replace, and results that are silently wrong.

Nothing here knows of FASA. What each part is for is in docs/lab/situations.md.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np

from . import runtime
from .errors import FasaError

_llama_cpp = runtime.library.load()
_Base: Any = _llama_cpp.Llama


def _say(text: str) -> None:
    print(f"fasa_gguf: {text}", file=sys.stderr)


def _mend_output() -> None:
    """verbose=False prints errors alone, and the rest of the process keeps its output while a model loads.

    llama_cpp has the levels of an older llama.cpp, so it shows warnings and hides errors; and it points the process's
    stdout and stderr elsewhere, which other threads lose output by.
    """
    levels = (logging.CRITICAL, logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.DEBUG)
    _llama_cpp._logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL.update(enumerate(levels))
    for module in (_llama_cpp._internals, _llama_cpp.llama):
        module.suppress_stdout_stderr = lambda disable=True: contextlib.nullcontext()


_mend_output()


class FilePath(str):
    """A path whose bytes are no UTF-8, for code that encodes it as UTF-8."""

    def encode(self, *_args: Any, **_kwargs: Any) -> bytes:
        return os.fsencode(str(self))


def file_path(path: str | bytes | os.PathLike) -> str:
    """A path as llama_cpp can open it."""
    text = os.fsdecode(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        return FilePath(text)
    return text


class _Closed:
    """In the place of what was freed."""

    def __getattr__(self, name: str) -> Any:
        raise FasaError("this model is closed")


class _CheckedSampler(_llama_cpp._internals.LlamaSampler):  # type: ignore[name-defined]
    """llama_cpp's, for grammars and logits processors. Raises FasaError where they leave no token.

    llama.cpp would end the process, or sample a token that is hidden.
    """

    def sample(self, ctx: Any, idx: int = -1) -> int:
        logits = _llama_cpp.llama_get_logits_ith(ctx.ctx, idx)
        row = np.ctypeslib.as_array(logits, (ctx.model.n_vocab(),))
        members = runtime.sampling.chain_members(_llama_cpp, self.sampler)
        token = runtime.sampling.sample_checked(_llama_cpp, members, row)
        if token is None:
            raise FasaError(
                "no token can come next: the grammar leads nowhere, or it and the logits processors hide all tokens; "
                "expected a grammar of which every rule ends in text that the model's tokens can spell"
            )
        return token


class Mended(_Base):
    """llama_cpp.Llama; see the module."""

    _calls: Any  # an RLock, held during a call, or a step of a stream; taken before Context.turn
    _asked: Any  # a Gate: inside, the model is asked for what needs no step; taken after _calls
    input_ids: Any
    scores: Any
    _run: object = None  # the generation that the cache belongs to
    _sampler: Any
    _completing = False  # its tokens become a completion
    _full = False  # it was ended by the end of the context

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Mended:
        self = super().__new__(cls)
        self._calls, self._asked = threading.RLock(), runtime.gate.Gate()
        self._stack = contextlib.ExitStack()  # close() needs all three when __init__ raises
        return cast(Mended, self)

    def __init__(self, model_path: str, **kwargs: Any) -> None:
        self._raised: BaseException | None = None  # by a logits processor
        self.unreadable_templates: dict[str, str] = {}
        super().__init__(model_path, **kwargs)
        if self.lora_path and not self._lora_adapter:
            self.close()
            raise FasaError(
                f"{self.lora_path}: llama.cpp cannot load this LoRA adapter; "
                "expected one for this model, converted to GGUF with convert_lora_to_gguf.py"
            )
        self._fit_history()

    # ---- what was evaluated ----

    def _fit_history(self) -> None:
        """A place for every cell: llama.cpp makes a context of 256, 512, ... tokens, and drafts want all logits."""
        if len(self.input_ids) != self._n_ctx:
            ids = np.zeros(self._n_ctx, np.intc)
            n = min(len(self.input_ids), self._n_ctx)
            ids[:n] = self.input_ids[:n]
            self.input_ids = ids
        if self._logits_all and len(self.scores) < self._n_ctx:
            scores = np.empty((self._n_ctx, self._n_vocab), np.single)
            scores[: len(self.scores)] = self.scores
            self.scores = scores

    def _check_usable(self) -> None:
        if self.model_params.vocab_only:
            raise FasaError(
                f"{self.model_path}: the model was loaded with vocab_only=True, for its tokenizer alone; "
                "load it without that to evaluate tokens"
            )

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """llama_cpp.Llama.tokenize. Raises FasaError for a model without a vocabulary, where llama.cpp would abort."""
        if _llama_cpp.llama_vocab_type(self._model.vocab) == _llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            raise FasaError(
                f"{self.model_path}: this model has no vocabulary, so it reads no text; use one with a tokenizer"
            )
        tokens: list[int] = super().tokenize(text, add_bos, special)
        return tokens

    def load_state(self, state: Any) -> None:
        """llama_cpp.Llama.load_state. Raises FasaError when the state does not fit; the model is then empty."""
        with self._calls:
            self._run = None
            if state.n_tokens > self._n_ctx or state.scores.shape[1] != self._n_vocab:
                self._forget()
                raise FasaError(
                    f"{self.model_path}: this state has {state.n_tokens} tokens of a vocabulary of "
                    f"{state.scores.shape[1]}, expected at most {self._n_ctx} (n_ctx) of {self._n_vocab}"
                )
            rows = min(state.n_tokens, len(self.scores))
            if len(state.scores) != rows:  # saved with another n_batch
                state = copy.copy(state)
                saved, state.scores = state.scores, np.zeros((rows, self._n_vocab), np.single)
                n = min(rows, len(saved))
                state.scores[:n] = saved[:n]
            try:
                super().load_state(state)
            except RuntimeError:
                self._forget()
                raise FasaError(
                    f"{self.model_path}: llama.cpp does not take this state: it is of another model or another type of "
                    "cache; give each model states, or a folder of LlamaDiskCache, of its own"
                ) from None
            finally:
                self._fit_history()

    def _forget(self) -> None:
        self.reset()
        self._ctx.kv_cache_clear()

    # ---- sampling ----

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """llama_cpp.Llama.sample. Raises what a logits processor raised, and FasaError when no token can come next."""
        self._check_usable()
        if self.n_tokens == 0:
            raise FasaError(
                f"{self.model_path}: there is nothing to continue: expected a prompt of at least one token, found none "
                "(not every model has a BOS to put before an empty text)"
            )
        if self._requires_eval:  # of a state that was loaded: its logits are not in it
            self._evaluate_last()
        before = self._sampler
        try:
            token: int = super().sample(*args, **kwargs)
        except FasaError:
            self._sampler = before  # llama_cpp keeps its own for one call otherwise
            self._raise_kept()
            raise
        self._raise_kept()
        return token

    def _raise_kept(self) -> None:
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised from None

    def _evaluate_last(self) -> None:
        if self._is_recurrent or self._is_hybrid:
            raise FasaError(
                f"{self.model_path}: this model cannot step back to its last token; evaluate one before you sample"
            )
        last = int(self.input_ids[self.n_tokens - 1])
        self.n_tokens -= 1
        super().eval([last])

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("grammar") is not None:
            self._check_grammar(kwargs["grammar"])
        if kwargs.get("logits_processor") is not None:
            kwargs["logits_processor"] = [self._keeping(kwargs["logits_processor"])]
        sampler = super()._init_sampler(*args, **kwargs)
        if kwargs.get("grammar") is not None or kwargs.get("logits_processor") is not None:
            sampler.__class__ = _CheckedSampler
        return sampler

    def _check_grammar(self, grammar: Any) -> None:
        """llama_cpp would use the null pointer that a bad grammar gives."""
        text, root = grammar._grammar.encode(), grammar._root.encode()
        sampler = _llama_cpp.llama_sampler_init_grammar(self._model.vocab, text, root)
        if not sampler:
            raise FasaError("grammar: llama.cpp cannot parse it (the line before says why); expected GBNF with a root")
        _llama_cpp.llama_sampler_free(sampler)

    def _keeping(self, processors: Iterable[Callable[[Any, Any], Any]]) -> Callable[[Any, Any], Any]:
        """The processors as one that keeps what they raise: ctypes drops it."""

        def process(input_ids: Any, scores: Any) -> Any:
            try:
                for processor in processors:
                    scores = processor(input_ids, scores)
            except BaseException as e:
                self._raised = self._raised or e
            return scores

        return process

    def _infill(self, prompt: str | list[int], suffix: str) -> list[int]:
        """The tokens of a prompt and what follows the gap; llama_cpp puts token 0 where the model's own belong."""
        m = self._model
        before, after, middle = m.token_prefix(), m.token_suffix(), m.token_middle()
        if min(before, after, middle) < 0:
            raise FasaError(
                f"{self.model_path}: this model has no tokens for a gap in a text (fill-in-the-middle); omit suffix"
            )
        mark = "\u263a"  # takes the space that some tokenizers put before a text
        n_mark = len(self.tokenize(mark.encode(), add_bos=False))
        end = [after, *self.tokenize((mark + suffix).encode(), add_bos=False)[n_mark:]]
        own = self.tokenize(prompt.encode(), add_bos=False) if isinstance(prompt, str) else list(prompt)
        begin = [before, *own]
        bos = [self.token_bos()] if m.add_bos_token() and self.token_bos() >= 0 else []
        return bos + (end + begin if self.spm_infill else begin + end) + [middle]

    # ---- one at a time ----

    @contextlib.contextmanager
    def _one_step(self, run: object, first: bool) -> Iterator[None]:
        """One step of generation `run`. Raises FasaError when another one has begun since its last."""
        with self._calls:
            if first:
                self._run, self._full = run, False
            elif self._run is not run:
                raise FasaError(
                    "this generation cannot go on: another call has used the model since; let one end before the next "
                    "begins (langchain: max_concurrency=1, or streaming=False), or load the model once for each"
                )
            yield

    def _no_room(self) -> int:
        """What to yield when there is no cell for the last token: a completion ends, `generate` raises FasaError.

        llama_cpp's own limit fails where the text stands within a character, and would lose all of it.
        """
        if not self._completing or self.token_eos() < 0:
            raise FasaError(f"{self.model_path}: the context of {self._n_ctx} tokens is full; use a larger n_ctx")
        self._full = True
        return int(self.token_eos())

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if kwargs.get("suffix") is not None:
            kwargs |= {"prompt": self._infill(kwargs["prompt"], kwargs["suffix"]), "suffix": None}
        chunks = super()._create_completion(*args, **kwargs)
        with contextlib.closing(chunks):
            while chunk := self._next_chunk(chunks):
                yield chunk

    def _next_chunk(self, chunks: Iterator[Any]) -> Any:
        """The next of a completion, which is all of it without stream=True; None at the end."""
        with self._calls:
            self._check_usable()
            outer, self._completing = self._completing, True
            try:
                chunk = next(chunks, None)
            finally:
                self._completing = outer
            if chunk and self._full and chunk["choices"][0]["finish_reason"] == "stop":
                chunk["choices"][0]["finish_reason"] = "length"
        return chunk

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """llama_cpp.Llama.embed."""
        with self._calls:
            self._check_usable()
            self._run = None
            return super().embed(*args, **kwargs)

    def close(self) -> None:
        """Free the model and its context; waits for the step that another thread is in."""
        wait = not sys.is_finalizing()  # as the interpreter ends, a thread that holds a lock does not go on
        if not self._calls.acquire(blocking=wait):
            return
        try:
            if self._retire(wait) and self._asked.acquire(blocking=wait):
                try:
                    super().close()
                    self._ctx = self._model = self.tokenizer_ = _Closed()
                finally:
                    self._asked.release()
        finally:
            self._calls.release()

    def _retire(self, _wait: bool) -> bool:
        """Nobody uses the context from now on. False: somebody does, and is not waited for."""
        return True

    def save_state(self) -> Any:
        """llama_cpp.Llama.save_state, between two steps."""
        with self._calls:
            return super().save_state()

    def reset(self) -> None:
        """llama_cpp.Llama.reset, between two steps."""
        with self._calls:
            super().reset()

    # ---- chat templates ----

    @property
    def metadata(self) -> dict[str, str]:
        """The model's metadata, without chat templates that cannot be read."""
        return self._metadata

    @metadata.setter
    def metadata(self, values: dict[str, str]) -> None:
        """llama_cpp reads every template as it loads, and would raise."""
        from jinja2 import TemplateError

        formatter = _llama_cpp.llama_chat_format.Jinja2ChatFormatter
        for name in [name for name in values if name.startswith("tokenizer.chat_template")]:
            try:
                formatter(template=values[name], eos_token="", bos_token="")
            except TemplateError as e:
                self.unreadable_templates[name] = f"{e} (line {getattr(e, 'lineno', '?')})"
        self._metadata = {name: value for name, value in values.items() if name not in self.unreadable_templates}
        if (why := self.unreadable_templates.get("tokenizer.chat_template")) and not (
            self.chat_format or self.chat_handler
        ):
            _say(f"{self.model_path}: its chat template cannot be read: {why}; chats need a chat_format")


def _asking(name: str) -> Any:
    """A method of llama_cpp.Llama that asks the model, which is not freed meanwhile."""
    original = getattr(_Base, name)

    @functools.wraps(original)
    def ask(self: Mended, *args: Any, **kwargs: Any) -> Any:
        with self._asked:
            return original(self, *args, **kwargs)

    return ask


for _name in (
    *("tokenize", "detokenize", "token_bos", "token_eos", "token_nl"),
    *("n_ctx", "n_embd", "n_vocab", "pooling_type"),
):
    setattr(Mended, _name, _asking(_name))
