"""A thin layer over llama_cpp's ctypes API: a model and a context, tokens in, logits out.

Calibration, quality and speed run on it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, overload

import numpy as np

from . import runtime
from .errors import FasaError, check_path
from .gguf.cache_types import cache_type
from .gguf.file import check_is_file
from .memory.model import Model, read_model
from .memory.placement import choose_mode
from .params import FasaParams
from .profile.profile import Profile
from .runtime.settings import ContextSettings

_log: list[tuple[int, str]] = []  # (level, text)
_WARNING, _ERROR = 3, 4  # of llama.cpp's levels
_log_callback: Any = None


def quiet() -> None:
    """Keep llama.cpp's log out of the terminal, except for the progress of pinning a large cache.

    Calls that may log belong into `runtime.interrupt.deferred()`.

    Warnings and errors are kept for our exceptions.
    """
    global _log_callback
    _log.clear()
    if _log_callback is None:

        def keep(level: int, text: bytes, _user: Any) -> None:
            if level in (_WARNING, _ERROR) and len(_log) < 100:
                _log.append((level, " ".join(text.decode("utf-8", "replace").split())))
            elif text.startswith(b"fasa: pinning"):
                print(text.decode("utf-8", "replace").strip(), file=sys.stderr)

        llama = runtime.library.load()
        _log_callback = llama.llama_log_callback(keep)
        llama.llama_log_set(_log_callback, None)


def last_log() -> str:
    """The cause of a failure, one line: FASA's complaint if there is one, else the first error, which others follow."""
    ours = [text.removeprefix("fasa: ") for _, text in _log if text.startswith("fasa: ")]
    errors = [text for level, text in _log if level == _ERROR]
    return (ours[-1:] or errors or [text for _, text in _log] or ["no reason given"])[0]


class Session:
    """One model and one context. Close it, or use it in a `with`.

    settings: what the context is made of; keyword arguments change single fields of it (or of the defaults), as in
    `Session(path, n_ctx=6144, n_seq_max=12)`. arms: the FASA settings that will run; mode auto plans for the largest of
    them and says on stderr what it found. profile: what auto plans with, None: the model's own.

    Attributes: settings, the ContextSettings in force; mode, device or host; n_ctx, tokens over all sequences; n_batch,
    tokens per llama_decode, at most n_ctx, and n_ubatch in an encoder; n_vocab, n_ctx_train; abort, asked between the
    nodes of a graph whether to end the decode: instead of llama_set_abort_callback, which Ctrl-C uses; None: never;
    used, a Gate: another thread that has a pointer of ours is inside, and `close` waits for it.
    Raises FasaError when the model cannot be loaded or the context cannot be made.
    """

    settings: ContextSettings
    mode: str
    n_ctx: int
    n_batch: int
    n_vocab: int
    n_ctx_train: int
    abort: Callable[[], bool] | None

    def __init__(
        self,
        model_path: str | os.PathLike,
        settings: ContextSettings | None = None,
        *,
        arms: Sequence[FasaParams] = (),
        profile: Profile | None = None,
        **changes: Any,
    ) -> None:
        self.llama = llama = runtime.library.load()
        self.path = str(model_path)
        self.settings = (settings or ContextSettings()).replace(**changes)
        self.mode = ""
        self.abort = None
        self.used = runtime.gate.Gate()
        self._arms, self._profile = arms, profile
        self._model: Any = None
        self._ctx: Any = None
        self._fasa: runtime.context.Context | None = None
        quiet()
        check_path(model_path)
        if not os.path.exists(model_path):
            raise FasaError(f"{model_path}: no such file")
        check_is_file(model_path)
        with runtime.interrupt.deferred():
            llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = self.settings.n_gpu_layers
        overrides = runtime.overrides.experts_on_cpu(self.settings.n_cpu_moe) if self.settings.n_cpu_moe else None
        params.tensor_buft_overrides = overrides and ctypes.addressof(overrides)
        try:
            with runtime.interrupt.deferred() as stopped:
                params.progress_callback = runtime.loading.callback(llama, stopped)
                self._model = llama.llama_model_load_from_file(os.fsencode(model_path), params)
            if not self._model:
                raise FasaError(f"{model_path}: llama.cpp cannot load this model: {last_log()}")
            self.n_ctx_train = llama.llama_model_n_ctx_train(self.model)
            self.n_vocab = llama.llama_vocab_n_tokens(self.vocab)
            self.reopen()
        except BaseException:
            self.close()
            raise

    def reopen(self, settings: ContextSettings | None = None, **changes: Any) -> None:
        """Free the context and make another one, with other settings or with some of them changed.

        The model stays loaded, so n_gpu_layers cannot change. Raises FasaError; if the context cannot be made, the
        session has none, and may be reopened with other settings.
        """
        new = (settings or self.settings).replace(**changes)
        if new.n_gpu_layers != self.settings.n_gpu_layers:
            raise FasaError(
                f"{self.path}: the model is loaded with n_gpu_layers {self.settings.n_gpu_layers}, "
                f"found {new.n_gpu_layers}; open another session"
            )
        self.settings = new
        model = self.model
        _log.clear()
        self.free_context()
        self.mode = self._choose_mode()
        with runtime.context.kv_mode(self.mode), runtime.interrupt.deferred():
            self._ctx = self.llama.llama_init_from_model(model, self._context_params())
            if not self._ctx:
                raise FasaError(f"{self.path}: llama.cpp cannot make a context of {new.n_ctx} tokens: {last_log()}")
        # llama.cpp makes a batch no larger than the context
        self.n_ctx, self.n_batch = self.llama.llama_n_ctx(self.ctx), self.llama.llama_n_batch(self.ctx)
        if not self.memory:  # without a KV cache (an encoder) every token sees the others of its ubatch only
            self.n_batch = min(self.n_batch, self.llama.llama_n_ubatch(self.ctx))
        pointer = ctypes.cast(self.ctx, ctypes.c_void_p).value or 0
        self._fasa = runtime.context.Context(pointer, f"{self.path}: this context is closed")
        if self.mode == "host" and (why := runtime.context.not_pinned(self.fasa)):
            self.free_context()
            raise FasaError(f"{self.path}: {why}")

    def _context_params(self) -> Any:
        """llama_context_params of the settings."""
        s, params = self.settings, self.llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = s.n_ctx, s.n_seq_max
        params.n_batch, params.n_ubatch = s.n_batch, min(s.n_ubatch, s.n_batch)
        params.n_threads = params.n_threads_batch = s.threads
        params.flash_attn_type = 1 if s.flash_attn else 0
        params.type_k, params.type_v = cache_type(s.type_k), cache_type(s.type_v)
        params.kv_unified, params.swa_full, params.offload_kqv = s.kv_unified, s.swa_full, not s.no_kv_offload
        return params

    def _choose_mode(self) -> str:
        """device or host. What auto found goes to stderr when it is another mode than before."""
        found, line = choose_mode(self.settings, lambda: self._plan_model, self._arms, loaded=True)
        if line and found != self.mode:
            print(f"fasa_gguf: {line}", file=sys.stderr)
        return found

    @functools.cached_property
    def _plan_model(self) -> Model:
        return read_model(self.path, self._profile)

    def free_context(self) -> None:
        """Free the context; the model stays loaded, and `reopen` makes another one."""
        ctx, self._ctx = self._ctx, None
        if ctx:
            if self._fasa:
                self._fasa.close()
            with runtime.interrupt.deferred():
                self.used.acquire()
                self.llama.llama_free(ctx)
                self.used.release()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and the model. A closed session raises FasaError when it is used; closing twice is fine."""
        self.free_context()
        model, self._model = self._model, None
        if model:
            with runtime.interrupt.deferred():
                self.used.acquire()
                self.llama.llama_model_free(model)
                self.used.release()

    # llama.cpp does not survive a pointer that was freed

    def _live(self, pointer: Any) -> Any:
        if not pointer:
            raise FasaError(f"{self.path}: this session is closed")
        return pointer

    @property
    def model(self) -> Any:
        """llama_cpp's pointer to the model. Raises FasaError when the session is closed, as the next four do."""
        return self._live(self._model)

    @property
    def ctx(self) -> Any:
        """llama_cpp's pointer to the context."""
        return self._live(self._ctx)

    @property
    def fasa(self) -> runtime.context.Context:
        """FASA's side of the context: profile, settings, counters, observer."""
        self._live(self._ctx)
        assert self._fasa is not None
        return self._fasa

    @property
    def vocab(self) -> Any:
        """llama_cpp's pointer to the vocabulary."""
        return self.llama.llama_model_get_vocab(self.model)

    @property
    def memory(self) -> Any:
        """llama_cpp's pointer to the KV cache."""
        return self.llama.llama_get_memory(self.ctx)

    def tokenize(self, text: str, bos: bool = True, special: bool = True) -> list[int]:
        """The tokens of a text.

        bos: with the model's first token, unless the text begins with it. special: names of special tokens become
        tokens. Raises FasaError for a model without a vocabulary.
        """
        if self.llama.llama_vocab_type(self.vocab) == self.llama.LLAMA_VOCAB_TYPE_NONE:  # llama.cpp ends the process
            raise FasaError(f"{self.path}: this model has no vocabulary, so it reads no text; use one with a tokenizer")
        data = text.encode()
        room = len(data) + 8
        for _ in range(2):  # a negative count says how much room is needed
            out = (ctypes.c_int32 * room)()
            with self.used:
                n = self.llama.llama_tokenize(self.vocab, data, len(data), out, room, bos, special)
            if n >= 0 or n == -(2**31):
                break
            room = -n
        if n < 0:
            raise FasaError(f"{self.path}: the text cannot be tokenized; does this model have a vocabulary?")
        with self.used:
            return runtime.pieces.one_bos(self.llama, self.vocab, list(out[:n]))

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special tokens by name, bytes that are no UTF-8 replaced."""
        with self.used:
            return runtime.pieces.token_bytes(self.llama, self.vocab, tokens, True).decode("utf-8", "replace")

    def decode_batch(self, items: Sequence[tuple[int, int, int, bool]]) -> None:
        """One llama_decode of (token, position, sequence, wants logits) items, at most n_batch.

        Raises FasaError when the context is full or llama.cpp fails, and what an observer raised.
        """
        if not 1 <= len(items) <= self.n_batch:
            most = "at most n_ctx" if self.memory else "at most n_ctx and n_ubatch"
            raise FasaError(
                f"{self.path}: expected a batch of 1 to {self.n_batch} tokens (n_batch, {most}), found {len(items)}"
            )
        self.fasa.check_process(self.settings.threads)
        _log.clear()
        batch = self.llama.llama_batch_init(len(items), 0, 1)
        try:
            batch.n_tokens = len(items)
            for i, (token, pos, seq, wants) in enumerate(items):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), pos, 1, wants
                batch.seq_id[i][0] = seq
            with self.fasa.turn, runtime.interrupt.deferred_decode(self.llama, self.ctx, len(items), self.abort):
                code = self.llama.llama_decode(self.ctx, batch)
        finally:
            self.llama.llama_batch_free(batch)
        if code == 1:
            raise FasaError(f"{self.path}: the context of {self.n_ctx} tokens is full; use a larger -c")
        if code != 0:
            raise FasaError(f"{self.path}: llama.cpp could not decode (code {code}): {last_log()}")
        self.fasa.raise_observed()

    def logits(self, i: int) -> np.ndarray:
        """float32 [n_vocab] of the i-th item of the last batch, which must have wanted them; a copy."""
        found = self.llama.llama_get_logits_ith(self.ctx, i)
        if not found:
            raise FasaError(f"{self.path}: item {i} of the last batch has no logits; it must have wanted them")
        return np.ctypeslib.as_array(found, (self.n_vocab,)).copy()

    @overload
    def decode(
        self, tokens: Sequence[int], pos0: int, seq: int = 0, logits: Literal["last", "all"] = "last"
    ) -> np.ndarray: ...

    @overload
    def decode(self, tokens: Sequence[int], pos0: int, seq: int = 0, *, logits: Literal["none"]) -> None: ...

    def decode(
        self, tokens: Sequence[int], pos0: int, seq: int = 0, logits: Literal["last", "all", "none"] = "last"
    ) -> np.ndarray | None:
        """Tokens of one sequence from position pos0 on, in batches of n_batch.

        Returns logits float32: [n_vocab] of the last token, [n_tokens, n_vocab] of all, or None. Several tokens without
        the logits of all are a prompt, and dense to the last one; `fasa.step_kind` says it otherwise. Raises FasaError.
        """
        if len(tokens) > 1 and logits != "all" and self.fasa.step == "auto":
            with self.fasa.step_kind("prompt"):
                return self.decode(tokens, pos0, seq, logits=logits)
        if logits == "all":
            return np.stack(list(self.decode_rows(tokens, pos0, seq)))
        self._check_encoder(len(tokens))
        for at in range(0, len(tokens), self.n_batch):
            part = tokens[at : at + self.n_batch]
            wants = logits == "last" and at + len(part) == len(tokens)
            self.decode_batch([(t, pos0 + at + i, seq, wants and i == len(part) - 1) for i, t in enumerate(part)])
        return self.logits(len(part) - 1) if logits == "last" else None

    def _check_encoder(self, n: int) -> None:
        """Raises FasaError when n tokens would be cut into batches that do not see each other."""
        if n > self.n_batch and not self.memory:
            raise FasaError(
                f"{self.path}: this model has no KV cache, so its tokens see each other in one batch only; expected at "
                f"most {self.n_batch} tokens, found {n}; use a larger n_ubatch (and n_batch, n_ctx)"
            )

    def decode_rows(self, tokens: Sequence[int], pos0: int, seq: int = 0, n: int = 0) -> Iterator[np.ndarray]:
        """As decode with logits "all", row by row: float32 [n_vocab] of every token.

        n: tokens of a batch, 0: n_batch. A large vocabulary makes a batch's logits large: 1 MiB a token at 262,144.
        """
        self._check_encoder(len(tokens))
        n = min(n or self.n_batch, self.n_batch)
        for at in range(0, len(tokens), n):
            part = tokens[at : at + n]
            self.decode_batch([(t, pos0 + at + i, seq, True) for i, t in enumerate(part)])
            for i in range(len(part)):
                yield self.logits(i)

    def _check_seq(self, *seqs: int) -> None:
        """llama.cpp ends the process for a sequence that the context does not have."""
        for seq in seqs:
            if not 0 <= seq < self.settings.n_seq_max:
                raise FasaError(
                    f"{self.path}: sequence {seq}: expected 0 to {self.settings.n_seq_max - 1}; "
                    "open the session with a larger n_seq_max"
                )

    def remove(self, seq: int, p0: int, p1: int = -1) -> None:
        """Forget positions [p0, p1) of a sequence; p1 -1: to the end.

        Raises FasaError for a model whose memory is recurrent: see `rewinder`.
        """
        self._check_seq(seq)
        if not self.llama.llama_memory_seq_rm(self.memory, seq, p0, p1):
            raise FasaError(f"{self.path}: this model's memory cannot forget single positions")

    @property
    def is_recurrent(self) -> bool:
        """The memory, or a part of it, is a state that every token changes: no position can be forgotten."""
        kinds = (self.llama.llama_model_is_recurrent, self.llama.llama_model_is_hybrid)
        return any(is_kind(self.model) for is_kind in kinds)

    def rewinder(self, pos: int, seq: int = 0) -> Callable[[], None]:
        """To be asked for when the sequence ends before position `pos`: forgets what comes after, at every call.

        A recurrent memory forgets nothing, so there it holds a copy of the sequence's state, and puts it back.
        """
        if not self.is_recurrent:
            return lambda: self.remove(seq, pos)
        state = self.state(seq)
        return lambda: self.set_state(state, seq)

    def copy(self, source: int, target: int) -> None:
        """Make sequence `target` a copy of `source`."""
        self._check_seq(source, target)
        self.llama.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def synchronize(self) -> None:
        """Wait until the device has finished what was decoded."""
        self.llama.llama_synchronize(self.ctx)

    def clear(self) -> None:
        """Forget all sequences."""
        self.llama.llama_memory_clear(self.memory, True)

    def state(self, seq: int = 0) -> bytes:
        """The state of one sequence, for set_state."""
        self._check_seq(seq)
        n = self.llama.llama_state_seq_get_size(self.ctx, seq)
        buffer = (ctypes.c_uint8 * n)()
        n = self.llama.llama_state_seq_get_data(self.ctx, buffer, n, seq)
        return ctypes.string_at(buffer, n)

    def set_state(self, data: bytes | bytearray | np.ndarray, seq: int = 0) -> None:
        """Replace one sequence by a state that `state` gave. Raises FasaError when llama.cpp does not take it."""
        self._check_seq(seq)
        a = np.frombuffer(data, np.uint8)
        pointer = ctypes.cast(a.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
        if self.llama.llama_state_seq_set_data(self.ctx, pointer, len(a), seq) == 0:
            raise FasaError(f"{self.path}: llama.cpp does not take this state: {last_log()}")
