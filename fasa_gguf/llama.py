"""The drop-in: llama_cpp.Llama that decodes with FASA."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Generator, Sequence
from typing import Any

from . import runtime
from .errors import FasaError
from .gguf.cache_types import CACHE_TYPES
from .gguf.file import GGUFFile, read_header
from .memory.model import read_model
from .memory.placement import choose_mode, chosen_mode
from .mended import Mended, file_path
from .params import QUALITIES, FasaParams
from .profile.find import find_profile
from .profile.profile import Profile
from .profile.rope import SCALING, UNSET, rope_note
from .runtime.settings import ContextSettings, thread_count

_llama_cpp = runtime.library.load()


def _say(text: str) -> None:
    print(f"fasa_gguf: {text}", file=sys.stderr)


def _check_choice(fasa: Any) -> None:
    if not isinstance(fasa, FasaParams) and fasa not in ("auto", "off", *QUALITIES):
        qualities = ", ".join(f'"{name}"' for name in QUALITIES)
        raise FasaError(f'fasa={fasa!r}: expected "auto", "off", {qualities} or FasaParams(...)')


def _params(fasa: FasaParams | str, profile: Profile) -> FasaParams:
    """The settings of a choice but "off". Raises FasaError for a variable that cannot be read."""
    if isinstance(fasa, FasaParams):
        return fasa
    base = FasaParams.from_env(profile.params())
    return base if fasa == "auto" else FasaParams.from_mapping({"quality": fasa}, "fasa", base)


def _find_profile(model: GGUFFile | str | os.PathLike, source: Profile | str | os.PathLike | None) -> Profile:
    """As profile.find_profile. Raises FasaError when there is none, or it is not usable."""
    found = find_profile(model, source, _say)
    if found is None:
        path = read_header(model).path
        raise FasaError(f"no FASA profile in {path}; run `fasa-gguf embed-profile {path}`")
    return found


def context_settings(kwargs: dict[str, Any], mode: str) -> ContextSettings:
    """The context that llama_cpp.Llama makes of these keyword arguments (its defaults, where one is missing).

    An unknown cache type counts as f16: llama_cpp itself refuses it.
    """
    types: dict[Any, str] = {number: name for name, number in CACHE_TYPES.items()}
    return ContextSettings(
        n_ctx=kwargs.get("n_ctx", 512),
        n_batch=kwargs.get("n_batch", 512),
        n_ubatch=kwargs.get("n_ubatch", 512),
        n_threads=kwargs.get("n_threads") or 0,
        n_gpu_layers=kwargs.get("n_gpu_layers", 0),
        type_k=types.get(kwargs.get("type_k"), "f16"),
        type_v=types.get(kwargs.get("type_v"), "f16"),
        swa_full=kwargs.get("swa_full") is not False,
        no_kv_offload=not kwargs.get("offload_kqv", True),
        mode=mode,
    )


def _choose_mode(
    mode: str,
    model: GGUFFile | str | os.PathLike,
    profile: Profile | None,
    fasa: FasaParams | str,
    kwargs: dict[str, Any],
) -> str:
    """device or host for a context of llama_cpp.Llama's arguments; says on stderr what auto found.

    Without a profile FASA is off, and the mode is device. Raises FasaError when host was asked for and cannot be.
    """
    if profile is None:
        return "device"
    try:
        params = _params("auto" if fasa == "off" else fasa, profile)
    except FasaError:  # set_fasa reports it
        return "device"
    one = kwargs.get("split_mode") == _llama_cpp.LLAMA_SPLIT_MODE_NONE
    found, line = choose_mode(
        context_settings(kwargs, mode),
        lambda: read_model(model, profile),
        [params],
        only=kwargs.get("main_gpu", 0) if one else None,
        split=kwargs.get("tensor_split"),
    )
    if line:
        _say(line)
    return found


class _Model(_llama_cpp._internals.LlamaModel):  # type: ignore[name-defined]
    """llama_cpp's model, without the 32 bytes that it gives the text of a token."""

    def token_to_piece(self, token: int, special: bool = False) -> bytes:
        return runtime.pieces.token_bytes(_llama_cpp, self.vocab, [token], special)

    def detokenize(self, tokens: list[int], special: bool = False) -> bytes:
        out = runtime.pieces.token_bytes(_llama_cpp, self.vocab, tokens, special)
        # as llama_cpp does it: the space that some tokenizers put before a text is not part of it
        return out[1:] if len(tokens) > 0 and tokens[0] == self.token_bos() and out[:1] == b" " else out


class Llama(Mended):
    """llama_cpp.Llama with FASA.

    fasa: "auto" (the profile in the model, if there is one), "off", or what needs a profile: FasaParams, or a quality
    ("fast", "balanced", "careful"). None: what enable() was given, or "auto".
    fasa_profile: a Profile or the path of one. None: what enable() was given, or what FASA_PROFILE names, or the file
    MODEL.fasa.json beside the model, or the model's own.
    fasa_mode: where K and V lie. "device": on the GPU (FASA-C). "host": in pinned host memory (FASA-M), for a context
    that the GPU has no room for. "auto": host when device does not fit, with a line on stderr that says so. None: what
    enable() was given, or FASA_MODE, or "auto". "c" and "m" are short for device and host.

    FASA turns flash attention on. All other arguments and methods are llama_cpp.Llama's. Raises FasaError when
    FasaParams, a profile or mode host are given and FASA cannot run. With "auto" alone it says on stderr why it cannot,
    and decoding is dense.
    """

    _fasa_default: FasaParams | str = "auto"
    _mode_default: str | None = None
    _profile_default: Profile | None = None
    _foreign_callers = False  # after enable(): flash_attn=False is then the caller's default and says nothing
    _fasa: runtime.context.Context | None = None
    _context: runtime.context.Context | None = None  # the same, also while the model closes
    _step = ""  # what generate() evaluates next: "first", "prompt", "decode"; "": eval() was called by someone else
    _fasa_profile: Profile | None = None

    def __init__(
        self,
        model_path: str | os.PathLike,
        *,
        fasa: FasaParams | str | None = None,
        fasa_profile: Profile | str | os.PathLike | None = None,
        fasa_mode: str | None = None,
        **kwargs: Any,
    ) -> None:
        model_path = file_path(model_path)
        self._fasa_choice = fasa = self._fasa_default if fasa is None else fasa
        self._fasa_source = self._profile_default if fasa_profile is None else fasa_profile
        _check_choice(fasa)
        self._fasa_mode_choice = None if fasa_mode is None else chosen_mode(fasa_mode)
        mode = chosen_mode(self._mode_default if fasa_mode is None else fasa_mode)
        if mode == "host" and fasa == "off":
            raise FasaError(
                'fasa_mode host with fasa="off": all of K and V would come from host memory for every token; '
                "turn FASA on, or use mode device"
            )
        if hasattr(kwargs.get("chat_handler"), "clip_model_path"):
            raise FasaError(_NO_VISION)
        if self._foreign_callers and kwargs.get("flash_attn") is False:
            del kwargs["flash_attn"]
        asked = fasa not in ("auto", "off") or mode == "host" or (fasa == "auto" and fasa_profile is not None)
        model, profile = self._open_profile(model_path, asked, kwargs)
        for name in ("n_threads", "n_threads_batch"):  # llama_cpp counts CPUs that the process may not use
            kwargs[name] = kwargs.get(name) or thread_count()
        self._fasa_mode = _choose_mode(mode, model, profile, fasa, kwargs)
        with runtime.context.kv_mode(self._fasa_mode), runtime.interrupt.deferred() as self._stopped:
            super().__init__(model_path, **kwargs)
        self._model.__class__ = _Model
        pointer = ctypes.cast(self._ctx.ctx, ctypes.c_void_p).value or 0
        self._fasa = self._context = runtime.context.Context(pointer, "this model is closed")
        if self._fasa_mode == "host" and (why := runtime.context.not_pinned(self._fasa)):
            self.close()
            raise FasaError(f"{model_path}: {why}")
        if profile is not None:
            self._start_fasa(profile, asked or self._fasa_mode == "host")  # dense would take all of K and V over PCIe

    @property
    def model_params(self) -> Any:
        """llama_model_params, which llama_cpp fills in."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        params.progress_callback = runtime.loading.callback(_llama_cpp, self._stopped)
        self._model_params = params

    def _open_profile(
        self, model_path: str, asked: bool, kwargs: dict[str, Any]
    ) -> tuple[GGUFFile | str, Profile | None]:
        """(the model, parsed where that was needed; the profile, None where FASA stays off). Turns flash attention on.

        asked: raise FasaError when FASA cannot run, rather than say so on stderr.
        """
        model: GGUFFile | str = model_path
        if self._fasa_choice == "off" or kwargs.get("vocab_only") or not os.path.exists(model_path):
            return model, None  # llama_cpp reports a missing file
        try:
            if self._fasa_source is None:
                model = GGUFFile(model_path)
            profile = _find_profile(model, self._fasa_source)
            if kwargs.get("flash_attn") is False:
                raise FasaError("flash_attn=False: FASA needs flash attention; omit the argument")
        except FasaError as e:
            if asked:
                raise
            _say(f"{e}; until then decoding is dense")
            return model, None
        kwargs["flash_attn"] = True
        return model, profile

    def _start_fasa(self, profile: Profile, must: bool) -> None:
        """Attach the profile and turn FASA on. must: close and raise FasaError when it cannot run; else say so."""
        assert self._fasa is not None
        try:
            self._attach(self._fasa, profile)
            self.set_fasa(self._fasa_choice)
        except FasaError as e:
            if must:
                self.close()
                raise
            _say(f"{self.model_path}: {e}; decoding is dense")

    def _attach(self, context: runtime.context.Context, profile: Profile) -> None:
        """Attach a profile; says on stderr when it was made under another RoPE."""
        context.set_profile(profile)
        self._fasa_profile = profile
        given = {name: getattr(self.context_params, name) for name in UNSET}
        if given["rope_scaling_type"] == self._model_scaling():
            del given["rope_scaling_type"]
        if line := rope_note(profile, context.model_info(), given):
            _say(f"{self.model_path}: {line}")

    def _model_scaling(self) -> int:
        """The number of the model's own RoPE scaling, as llama.cpp reads it."""
        name = self.metadata.get(f"{self.metadata.get('general.architecture')}.rope.scaling.type", "linear")
        return next((number for number, known in SCALING.items() if known == name), -1)

    def _live(self) -> runtime.context.Context:
        if self._fasa is None:
            raise FasaError("this model is closed")
        return self._fasa

    def set_fasa(self, fasa: FasaParams | str) -> None:
        """Switch between any two calls: "auto" (the profile's defaults and FASA_* variables), "off" or FasaParams.

        Raises FasaError when FASA cannot run.
        """
        _check_choice(fasa)
        context = self._live()
        if fasa == "off":
            context.set_params(None)
        else:
            profile = self._fasa_profile
            if profile is None:
                if self.context_params.flash_attn_type != _llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED:
                    raise FasaError(
                        "the model was loaded without flash attention, which FASA needs; load it with flash_attn=True"
                    )
                profile = _find_profile(self.model_path, self._fasa_source)
                self._attach(context, profile)
            context.set_params(_params(fasa, profile))
            if (limit := context.gpu_limit()).source in ("probe", "default"):
                _say(limit.text)
        self._fasa_choice = fasa

    @property
    def fasa(self) -> FasaParams | str:
        """The settings in force, or "off"; assigning is set_fasa."""
        return self._live().params() or "off"

    @fasa.setter
    def fasa(self, value: FasaParams | str) -> None:
        self.set_fasa(value)

    @property
    def fasa_mode(self) -> str:
        """Where K and V lie: "device", on the layers' devices, or "host", in pinned host memory."""
        return self._fasa_mode

    def fasa_stats(self) -> dict[str, Any]:
        """Counters since the model was loaded or reset_fasa_stats, and the reasons for what was dense.

        Raises FasaError when the model is closed.
        """
        context = self._live()
        limit = context.gpu_limit()
        return {
            **context.counters(),
            "min_context_gpu": limit.cells if limit.source != "none" else None,
            "min_context_gpu_from": limit.source,
            "step_reason": context.step_reason(),
            "step_reason_code": context.step_reason_code(),
            "layer_reasons": context.layer_reasons(),
            "prefill_reason": context.prefill_reason_code().text,
        }

    def reset_fasa_stats(self) -> None:
        """Set the counters to zero, except the memory sizes."""
        self._live().reset_counters()

    # ---- what is evaluated: a prompt is dense to its last token, whether its prefix was there before or not ----

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens behind those that were evaluated before.

        Several tokens are a prompt, which is dense; one token decodes with FASA.
        """
        self._check_usable()
        first = self._step == "first"
        kind = "prompt" if first else self._step or ("prompt" if len(tokens) > 1 else "auto")
        with self._calls, self._live().step_kind(kind):
            if first and len(tokens) > 1 and self._live().params() is not None:
                # the last token alone, as it is evaluated when all before it is reused: the same sums, the same bits
                super().eval(tokens[:-1])
                tokens = tokens[-1:]
            super().eval(tokens)
        if self._step:
            self._step = "decode"  # what comes behind the prompt was sampled, or drafted

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """llama_cpp.Llama.generate. The first tokens evaluated are a prompt, later ones decode steps.

        Raises FasaError when another call has used the model since the last token: there is one context.
        """
        inner, sent, step, run = super().generate(tokens, *args, **kwargs), None, "first", object()
        with contextlib.closing(inner):
            while True:
                with self._one_step(run, step == "first"):
                    self._check_usable()
                    outer, self._step = self._step, step
                    try:
                        has_room = step == "first" or self.n_tokens < self._n_ctx
                        token = inner.send(sent) if has_room else self._no_room()
                    except StopIteration:
                        return
                    finally:
                        self._step = outer
                sent = yield token
                step = "prompt" if sent else "decode"  # tokens that the caller sends were not sampled

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """llama_cpp.Llama.embed; what it evaluates is a prompt."""
        with self._calls, self._live().step_kind("prompt"):
            return super().embed(*args, **kwargs)

    def load_state(self, state: Any) -> None:
        """llama_cpp.Llama.load_state. Raises FasaError when the state does not fit; the model is then empty."""
        with self._calls, self._live().turn:
            super().load_state(state)

    def _evaluate_last(self) -> None:
        with self._live().step_kind("prompt"):  # as it was evaluated, if the state was saved behind a prompt
            super()._evaluate_last()

    def _check_usable(self) -> None:
        super()._check_usable()
        self._live().check_process(max(self.n_threads, self.n_threads_batch))

    def close(self) -> None:
        """Free the model and its context."""
        self._fasa = None  # an answer that another thread writes ends with its next step
        super().close()

    def _retire(self, wait: bool) -> bool:
        return self._context is None or self._context.close(wait)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "fasa": self._fasa_choice,
            "fasa_profile": self._fasa_source,
            "fasa_mode": self._fasa_mode_choice,
        }


_NO_VISION = "vision needs libmtmd, which fasa_gguf does not carry; run this model in a process without fasa_gguf"


def _refuse_vision(self: Any, *_args: Any, **_kwargs: Any) -> None:
    raise FasaError(_NO_VISION)


# llama_cpp's own error would be that a library named mtmd is missing; another build's libmtmd brings its own libllama
for _name in ("Llava15ChatHandler", "MTMDChatHandler"):
    getattr(_llama_cpp.llama_chat_format, _name).__init__ = _refuse_vision


def enable(
    params: FasaParams | str = "auto", mode: str | None = None, profile: Profile | str | os.PathLike | None = None
) -> None:
    """Make llama_cpp.Llama itself decode with FASA, for code that is not ours (llama_cpp.server too).

    params, mode, profile: as fasa=, fasa_mode= and fasa_profile= of Llama. A model that the profile does not fit is
    decoded dense, with a line on stderr, unless params are FasaParams. flash_attn=False counts as not given, since such
    code passes on llama_cpp's default. Call it before llama_cpp is imported; after that it raises FasaError, and for a
    profile that is not usable. Says on stderr when another llama-cpp-python is installed than the one in use.
    """
    import llama_cpp.llama

    _check_choice(params)
    if line := runtime.library.binding_note():
        _say(line)
    mode = None if mode is None else chosen_mode(mode)
    Llama._profile_default = profile if profile is None or isinstance(profile, Profile) else Profile.load(profile)
    Llama._fasa_default, Llama._mode_default, Llama._foreign_callers = params, mode, True
    llama_cpp.Llama = llama_cpp.llama.Llama = Llama
