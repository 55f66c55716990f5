"""The drop-in: llama_cpp.Llama that decodes with FASA."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import Any

from . import runtime
from .errors import FasaError
from .gguf.cache_types import CACHE_TYPES
from .gguf.file import GGUFFile
from .memory.placement import chosen_mode, place_model
from .memory.plan import Setup
from .params import FasaParams
from .profile.profile import Profile

_llama_cpp = runtime.library.load()
_Base = _llama_cpp.Llama


def _say(text: str) -> None:
    print(f"fasa_gguf: {text}", file=sys.stderr)


def _check_choice(fasa: Any) -> None:
    if not isinstance(fasa, FasaParams) and fasa not in ("auto", "off"):
        raise FasaError(f'fasa={fasa!r}: expected "auto", "off" or FasaParams(...)')


def _find_profile(model_path: str, source: Profile | str | os.PathLike | None) -> Profile:
    """The given one, or the model's own. Raises FasaError when there is none, or it is not usable."""
    if source is not None:
        return source if isinstance(source, Profile) else Profile.load(source)
    profile = Profile.from_gguf(GGUFFile(model_path))
    if profile is None:
        raise FasaError(f"no FASA profile in {model_path}; run `fasa-gguf embed-profile {model_path}`")
    return profile


def _place(mode: str, model_path: str, profile: Profile | None, fasa: FasaParams | str, kwargs: dict[str, Any]) -> str:
    """c or m for a context of llama_cpp.Llama's arguments; says on stderr what auto found. Without a profile FASA is off, and it is c.
    Raises FasaError when m was asked for and cannot be."""
    if profile is None:
        return "c"
    try:
        params = fasa if isinstance(fasa, FasaParams) else FasaParams.from_env(profile.params())
    except FasaError:  # set_fasa has the word
        return "c"
    names = {number: name for name, number in CACHE_TYPES.items()}
    n_batch = kwargs.get("n_batch", 512)
    setup = Setup(
        n_ctx=kwargs.get("n_ctx", 512),
        n_batch=n_batch,
        n_ubatch=min(kwargs.get("n_ubatch", 512), n_batch),
        n_gpu_layers=kwargs.get("n_gpu_layers", 0),
        no_kv_offload=not kwargs.get("offload_kqv", True),
        type_k=names.get(kwargs.get("type_k"), "f16"),
        type_v=names.get(kwargs.get("type_v"), "f16"),
        swa_full=kwargs.get("swa_full") is not False,
    )
    one = kwargs.get("split_mode") == _llama_cpp.LLAMA_SPLIT_MODE_NONE
    found, line = place_model(
        mode, model_path, profile, setup, [params], only=kwargs.get("main_gpu", 0) if one else None
    )
    if line:
        _say(line)
    return found


class Llama(_Base):
    """llama_cpp.Llama with FASA.

    fasa: "auto" (the profile in the model, if there is one), "off", or FasaParams (a profile is then needed); None is what
    enable() was given, "auto" without it. fasa_profile: a Profile or the path of one, instead of the model's own. Flash
    attention is turned on with FASA. fasa_mode: where K and V lie, "c" (on the device), "m" (in pinned host memory, for a context
    that the device has no room for) or "auto" (m when c does not fit, and a line on stderr that says so); None is what enable() was
    given, FASA_MODE or "auto". Raises FasaError when FasaParams, a profile or mode m are given and FASA cannot run; with "auto"
    alone it says why on stderr, and is dense. Everything else is llama_cpp.Llama's.
    """

    _fasa_default: FasaParams | str = "auto"
    _mode_default: str | None = None
    _foreign_callers = False  # after enable(): flash_attn=False is then the caller's default and says nothing
    _fasa: runtime.context.Context | None = None

    def __init__(
        self,
        model_path: str | os.PathLike,
        *,
        fasa: FasaParams | str | None = None,
        fasa_profile: Profile | str | os.PathLike | None = None,
        fasa_mode: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()  # close() needs it when we raise before llama_cpp made its own
        model_path = os.fspath(model_path)
        self._fasa_choice = fasa = self._fasa_default if fasa is None else fasa
        self._fasa_source, self._fasa_profile = fasa_profile, None
        _check_choice(fasa)
        self._fasa_mode_choice = fasa_mode
        mode = chosen_mode(self._mode_default if fasa_mode is None else fasa_mode)
        if mode == "m" and fasa == "off":
            raise FasaError(
                'fasa_mode m with fasa="off": all of K and V would come from host memory for every token; turn FASA on, or use mode c'
            )
        if hasattr(kwargs.get("chat_handler"), "clip_model_path"):
            raise FasaError(_NO_VISION)
        if self._foreign_callers and kwargs.get("flash_attn") is False:
            del kwargs["flash_attn"]
        asked = isinstance(fasa, FasaParams) or mode == "m" or (fasa == "auto" and fasa_profile is not None)
        profile = None
        if fasa != "off" and os.path.exists(model_path) and not kwargs.get("vocab_only"):  # else llama_cpp has the word
            try:
                profile = _find_profile(model_path, fasa_profile)
                if kwargs.get("flash_attn") is False:
                    profile = None
                    raise FasaError("flash_attn=False: FASA needs flash attention; leave the argument away")
                kwargs["flash_attn"] = True
            except FasaError as e:
                if asked:
                    raise
                _say(f"{e}; until then decoding is dense")
        self._fasa_mode = _place(mode, model_path, profile, fasa, kwargs)
        with runtime.context.kv_mode("host" if self._fasa_mode == "m" else "device"):
            super().__init__(model_path, **kwargs)
        self._fasa = runtime.context.Context(ctypes.cast(self._ctx.ctx, ctypes.c_void_p).value)
        if self._fasa_mode == "m" and (why := runtime.context.not_pinned(self._fasa)):
            self.close()
            raise FasaError(f"{model_path}: {why}")
        if profile is not None:
            try:
                self._fasa.set_profile(profile)
                self._fasa_profile = profile
                self.set_fasa(fasa)
            except FasaError as e:
                if asked or self._fasa_mode == "m":  # dense would take all of K and V over PCIe
                    self.close()
                    raise
                _say(f"{model_path}: {e}; decoding is dense")

    def _live(self) -> runtime.context.Context:
        if self._fasa is None:
            raise FasaError("this model is closed")
        return self._fasa

    def set_fasa(self, fasa: FasaParams | str) -> None:
        """Switch between any two calls: "auto" (the profile's defaults and FASA_* variables), "off" or FasaParams."""
        _check_choice(fasa)
        context = self._live()
        if fasa == "off":
            context.set_params(None)
        else:
            if self._fasa_profile is None:
                if self.context_params.flash_attn_type != _llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED:
                    raise FasaError(
                        "the model was loaded without flash attention, which FASA needs; load it with flash_attn=True"
                    )
                profile = _find_profile(self.model_path, self._fasa_source)
                context.set_profile(profile)
                self._fasa_profile = profile
            context.set_params(
                fasa if isinstance(fasa, FasaParams) else FasaParams.from_env(self._fasa_profile.params())
            )
        self._fasa_choice = fasa

    @property
    def fasa(self) -> FasaParams | str:
        """The settings in force, or "off"; to be assigned like set_fasa."""
        return self._live().params() or "off"

    @fasa.setter
    def fasa(self, value: FasaParams | str) -> None:
        self.set_fasa(value)

    @property
    def fasa_mode(self) -> str:
        """Where K and V of this context lie: "c", on the layers' devices, or "m", in pinned host memory."""
        return self._fasa_mode

    def fasa_stats(self) -> dict[str, Any]:
        """Counters since the model was loaded or reset_fasa_stats, and the reasons for what was dense."""
        context = self._live()
        return {
            **context.counters(),
            "step_reason": context.step_reason(),
            "step_reason_code": context.step_reason_code(),
            "layer_reasons": context.layer_reasons(),
        }

    def reset_fasa_stats(self) -> None:
        self._live().reset_counters()

    def close(self) -> None:
        self._fasa = None  # its context is freed next
        super().close()

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


# llama_cpp's own error would be that a library named mtmd is missing; another build's libmtmd would bring its own libllama
for _name in ("Llava15ChatHandler", "MTMDChatHandler"):
    getattr(_llama_cpp.llama_chat_format, _name).__init__ = _refuse_vision


def enable(params: FasaParams | str = "auto", mode: str | None = None) -> None:
    """Make llama_cpp.Llama itself decode with FASA, for code that is not ours (llama_cpp.server too).

    params is what fasa= would be, mode what fasa_mode= would be. flash_attn=False counts as not given, since such code passes
    llama_cpp's default on. Call it before llama_cpp is imported; after that it raises FasaError.
    """
    import llama_cpp.llama

    _check_choice(params)
    if mode is not None:
        chosen_mode(mode)
    Llama._fasa_default, Llama._mode_default, Llama._foreign_callers = params, mode, True
    llama_cpp.Llama = llama_cpp.llama.Llama = Llama
