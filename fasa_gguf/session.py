"""A thin layer over llama_cpp's ctypes API: a model and a context, tokens in, logits out. Used by calibrate, eval and bench."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from . import runtime
from .errors import FasaError
from .gguf.cache_types import cache_type
from .params import FasaParams

_log: list[str] = []
_log_callback: Any = None


def quiet() -> None:
    """Keep llama.cpp's log out of the terminal, but for how far the pinning of a large cache is; its last errors go into our exceptions."""
    global _log_callback
    _log.clear()
    if _log_callback is None:

        def keep(level: int, text: bytes, _user: Any) -> None:
            if level in (3, 4):  # warning, error
                _log.append(text.decode("utf-8", "replace").strip())
                del _log[:-20]
            elif text.startswith(b"fasa: pinning"):
                print(text.decode().strip(), file=sys.stderr)

        llama = runtime.library.load()
        _log_callback = llama.llama_log_callback(keep)
        llama.llama_log_set(_log_callback, None)


def last_log() -> str:
    """The last complaint, one line: FASA's, where there is one, since llama.cpp adds what follows from it."""
    ours = [line.removeprefix("fasa: ") for line in _log if line.startswith("fasa: ")]
    return (ours or _log or ["no reason given"])[-1]


class Session:
    """One model, one context. Close it, or use it in a `with`.

    n_ctx, n_batch, n_ubatch in tokens, n_ctx over all sequences; type_k, type_v: names in CACHE_TYPES; no_kv_offload: the cache
    stays in host memory. mode: c, m or auto (placement.py), which plans for the settings `arms` and says on stderr what it found.
    Raises FasaError when the model cannot be loaded or the context not be made.
    """

    def __init__(
        self,
        model_path: str | os.PathLike,
        n_ctx: int = 4096,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int = 0,
        flash_attn: bool = True,
        type_k: str = "f16",
        type_v: str = "f16",
        n_seq_max: int = 1,
        kv_unified: bool = False,
        n_gpu_layers: int = 0,
        swa_full: bool = True,
        no_kv_offload: bool = False,
        mode: str = "c",
        arms: Sequence[FasaParams] = (),
        profile: Any = None,
    ) -> None:
        self.llama = llama = runtime.library.load()
        self.path = str(model_path)
        self._model = self._ctx = None
        quiet()
        cache_type(type_k), cache_type(type_v)
        if not os.path.exists(model_path):
            raise FasaError(f"{model_path}: no such file")
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        self._model = llama.llama_model_load_from_file(os.fsencode(model_path), params)
        if not self._model:
            raise FasaError(f"{model_path}: llama.cpp cannot load this model: {last_log()}")
        self.n_ctx_train = llama.llama_model_n_ctx_train(self.model)
        self.n_vocab = llama.llama_vocab_n_tokens(self.vocab)
        self._settings = {
            "n_ctx": n_ctx,
            "n_batch": n_batch,
            "n_ubatch": n_ubatch,
            "n_threads": n_threads,
            "flash_attn": flash_attn,
            "type_k": type_k,
            "type_v": type_v,
            "n_seq_max": n_seq_max,
            "kv_unified": kv_unified,
            "swa_full": swa_full,
            "no_kv_offload": no_kv_offload,
            "mode": mode,
        }
        self._n_gpu_layers, self._arms, self._profile = n_gpu_layers, arms, profile
        try:
            self.reopen()
        except FasaError:
            self.close()
            raise

    def reopen(self, **changes: Any) -> None:
        """Free the context and make another one with some of the constructor's settings changed; the model stays loaded.

        After a FasaError the session has no context, and may be reopened with other settings.
        """
        self._settings |= changes
        llama, model, p = self.llama, self.model, self._settings
        types = cache_type(p["type_k"]), cache_type(p["type_v"])
        self.free_context()
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = (
            p["n_ctx"],
            p["n_batch"],
            min(p["n_ubatch"], p["n_batch"]),
            p["n_seq_max"],
        )
        params.n_threads = params.n_threads_batch = p["n_threads"] or os.cpu_count() or 1
        params.flash_attn_type = 1 if p["flash_attn"] else 0
        params.type_k, params.type_v = types
        params.kv_unified, params.swa_full, params.offload_kqv = p["kv_unified"], p["swa_full"], not p["no_kv_offload"]
        self.mode = self._place()
        with runtime.context.kv_mode("host" if self.mode == "m" else "device"):
            self._ctx = llama.llama_init_from_model(model, params)
            if not self._ctx:
                raise FasaError(f"{self.path}: llama.cpp cannot make a context of {p['n_ctx']} tokens: {last_log()}")
        self.n_ctx, self.n_batch = llama.llama_n_ctx(self.ctx), p["n_batch"]
        self._fasa = runtime.context.Context(ctypes.cast(self.ctx, ctypes.c_void_p).value)
        if self.mode == "m" and (why := runtime.context.not_pinned(self._fasa)):
            self.free_context()
            raise FasaError(f"{self.path}: {why}")

    def free_context(self) -> None:
        """Free the context; the model stays loaded, and `reopen` makes another one."""
        if self._ctx:
            self.llama.llama_free(self._ctx)
        self._ctx = None

    def _place(self) -> str:
        """c or m, by the mode that was asked for; auto says what it found when the place is another than before."""
        from .memory.placement import place_model
        from .memory.plan import Setup

        if self._settings["mode"] == "c":
            return "c"
        names = (
            "n_ctx",
            "n_seq_max",
            "n_batch",
            "n_ubatch",
            "type_k",
            "type_v",
            "kv_unified",
            "swa_full",
            "no_kv_offload",
        )
        setup = Setup(n_gpu_layers=self._n_gpu_layers, **{name: self._settings[name] for name in names})
        found, line = place_model(self._settings["mode"], self.path, self._profile, setup, self._arms, loaded=True)
        if line and found != getattr(self, "mode", None):
            print(f"fasa_gguf: {line}", file=sys.stderr)
        return found

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self.free_context()
        if self._model:
            self.llama.llama_model_free(self._model)
        self._model = None

    # llama.cpp does not survive a pointer that was freed

    def _live(self, pointer: Any) -> Any:
        if not pointer:
            raise FasaError(f"{self.path}: this session is closed")
        return pointer

    @property
    def model(self) -> Any:
        return self._live(self._model)

    @property
    def ctx(self) -> Any:
        return self._live(self._ctx)

    @property
    def fasa(self) -> runtime.context.Context:
        self._live(self._ctx)
        return self._fasa

    @property
    def vocab(self) -> Any:
        return self.llama.llama_model_get_vocab(self.model)

    @property
    def memory(self) -> Any:
        return self.llama.llama_get_memory(self.ctx)

    def tokenize(self, text: str, bos: bool = True, special: bool = True) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        for _ in range(2):  # a negative count says how much room is needed
            out = (ctypes.c_int32 * room)()
            n = self.llama.llama_tokenize(self.vocab, data, len(data), out, room, bos, special)
            if n >= 0 or n == -(2**31):
                break
            room = -n
        if n < 0:
            raise FasaError(f"{self.path}: the text cannot be tokenized; does this model have a vocabulary?")
        return list(out[:n])

    def detokenize(self, tokens: Sequence[int]) -> str:
        out = b""
        buffer = ctypes.create_string_buffer(256)
        for t in tokens:
            n = self.llama.llama_token_to_piece(self.vocab, int(t), buffer, 256, 0, True)
            out += buffer.raw[: max(n, 0)]
        return out.decode("utf-8", "replace")

    def decode_batch(self, items: Sequence[tuple[int, int, int, bool]]) -> None:
        """One llama_decode of (token, position, sequence, wants logits) items, at most n_batch. Raises FasaError."""
        _log.clear()
        batch = self.llama.llama_batch_init(len(items), 0, 1)
        try:
            batch.n_tokens = len(items)
            for i, (token, pos, seq, wants) in enumerate(items):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), pos, 1, wants
                batch.seq_id[i][0] = seq
            code = self.llama.llama_decode(self.ctx, batch)
        finally:
            self.llama.llama_batch_free(batch)
        if code == 1:
            raise FasaError(f"{self.path}: the context of {self.n_ctx} tokens is full; use a larger -c")
        if code != 0:
            raise FasaError(f"{self.path}: llama.cpp could not decode (code {code}): {last_log()}")
        self.fasa.raise_observed()

    def logits(self, i: int) -> np.ndarray:
        """float32 [n_vocab] of the i-th item of the last batch that wanted them; a copy."""
        return np.ctypeslib.as_array(self.llama.llama_get_logits_ith(self.ctx, i), (self.n_vocab,)).copy()

    def decode(
        self, tokens: Sequence[int], pos0: int, seq: int = 0, logits: Literal["last", "all", "none"] = "last"
    ) -> np.ndarray | None:
        """Tokens of one sequence, in batches of n_batch. Returns logits float32 [n_vocab], [n_tokens, n_vocab] or None."""
        rows = []
        for at in range(0, len(tokens), self.n_batch):
            part = tokens[at : at + self.n_batch]
            end = at + len(part) == len(tokens)
            self.decode_batch(
                [
                    (t, pos0 + at + i, seq, logits == "all" or (logits == "last" and end and i == len(part) - 1))
                    for i, t in enumerate(part)
                ]
            )
            if logits == "all":
                rows += [self.logits(i) for i in range(len(part))]
            elif logits == "last" and end:
                return self.logits(len(part) - 1)
        return np.stack(rows) if logits == "all" else None

    def remove(self, seq: int, p0: int, p1: int = -1) -> None:
        """Forget positions [p0, p1) of a sequence; -1: to the end."""
        if not self.llama.llama_memory_seq_rm(self.memory, seq, p0, p1):
            raise FasaError(f"{self.path}: this model's memory cannot forget single positions")

    def copy(self, source: int, target: int) -> None:
        """Sequence `target` becomes what `source` is."""
        self.llama.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def synchronize(self) -> None:
        """Wait until the device has finished what was decoded."""
        self.llama.llama_synchronize(self.ctx)

    def clear(self) -> None:
        self.llama.llama_memory_clear(self.memory, True)

    def state(self, seq: int = 0) -> bytes:
        """The state of one sequence."""
        n = self.llama.llama_state_seq_get_size(self.ctx, seq)
        buffer = (ctypes.c_uint8 * n)()
        n = self.llama.llama_state_seq_get_data(self.ctx, buffer, n, seq)
        return ctypes.string_at(buffer, n)

    def set_state(self, data: bytes | bytearray | np.ndarray, seq: int = 0) -> None:
        a = np.frombuffer(data, np.uint8)
        pointer = ctypes.cast(a.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
        if self.llama.llama_state_seq_set_data(self.ctx, pointer, len(a), seq) == 0:
            raise FasaError(f"{self.path}: llama.cpp does not take this state: {last_log()}")
