"""The drop-in: llama_cpp.Llama that decodes with FASA."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import Any

from . import native
from .errors import FasaError
from .gguf_file import GGUFFile
from .params import FasaParams
from .profile import Profile

_llama_cpp = native.load()
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


class Llama(_Base):
    """llama_cpp.Llama with FASA.

    fasa: "auto" (the profile in the model, if there is one), "off", or FasaParams (a profile is then needed); None is what
    enable() was given, "auto" without it. fasa_profile: a Profile or the path of one, instead of the model's own. Flash
    attention is turned on with FASA. Raises FasaError when FasaParams or a profile are given and FASA cannot run; with "auto"
    alone it says why on stderr, and is dense. Everything else is llama_cpp.Llama's.
    """

    _fasa_default: FasaParams | str = "auto"
    _foreign_callers = False  # after enable(): flash_attn=False is then the caller's default and says nothing
    _fasa: native.Context | None = None

    def __init__(self, model_path: str | os.PathLike, *, fasa: FasaParams | str | None = None,
                 fasa_profile: Profile | str | os.PathLike | None = None, **kwargs: Any) -> None:
        self._stack = contextlib.ExitStack()  # close() needs it when we raise before llama_cpp made its own
        model_path = os.fspath(model_path)
        self._fasa_choice = fasa = self._fasa_default if fasa is None else fasa
        self._fasa_source, self._fasa_profile = fasa_profile, None
        _check_choice(fasa)
        if hasattr(kwargs.get("chat_handler"), "clip_model_path"):
            raise FasaError(_NO_VISION)
        if self._foreign_callers and kwargs.get("flash_attn") is False:
            del kwargs["flash_attn"]
        asked = isinstance(fasa, FasaParams) or (fasa == "auto" and fasa_profile is not None)
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
        super().__init__(model_path, **kwargs)
        self._fasa = native.Context(ctypes.cast(self._ctx.ctx, ctypes.c_void_p).value)
        if profile is not None:
            try:
                self._fasa.set_profile(profile)
                self._fasa_profile = profile
                self.set_fasa(fasa)
            except FasaError as e:
                if asked:
                    self.close()
                    raise
                _say(f"{model_path}: {e}; decoding is dense")

    def _live(self) -> native.Context:
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
                    raise FasaError('the model was loaded without flash attention, which FASA needs; load it with flash_attn=True')
                profile = _find_profile(self.model_path, self._fasa_source)
                context.set_profile(profile)
                self._fasa_profile = profile
            context.set_params(fasa if isinstance(fasa, FasaParams) else FasaParams.from_env(self._fasa_profile.params()))
        self._fasa_choice = fasa

    @property
    def fasa(self) -> FasaParams | str:
        """The settings in force, or "off"; to be assigned like set_fasa."""
        return self._live().params() or "off"

    @fasa.setter
    def fasa(self, value: FasaParams | str) -> None:
        self.set_fasa(value)

    def fasa_stats(self) -> dict[str, Any]:
        """Counters since the model was loaded or reset_fasa_stats, and the reasons for what was dense."""
        context = self._live()
        return {**context.counters(), "step_reason": context.step_reason(), "layer_reasons": context.layer_reasons()}

    def reset_fasa_stats(self) -> None:
        self._live().reset_counters()

    def close(self) -> None:
        self._fasa = None  # its context is freed next
        super().close()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "fasa": self._fasa_choice, "fasa_profile": self._fasa_source}


_NO_VISION = "vision needs libmtmd, which fasa_gguf does not carry; run this model in a process without fasa_gguf"


def _refuse_vision(self: Any, *_args: Any, **_kwargs: Any) -> None:
    raise FasaError(_NO_VISION)


# llama_cpp's own error would be that a library named mtmd is missing; another build's libmtmd would bring its own libllama
for _name in ("Llava15ChatHandler", "MTMDChatHandler"):
    getattr(_llama_cpp.llama_chat_format, _name).__init__ = _refuse_vision


def enable(params: FasaParams | str = "auto") -> None:
    """Make llama_cpp.Llama itself decode with FASA, for code that is not ours (llama_cpp.server too).

    params is what fasa= would be. flash_attn=False counts as not given, since such code passes llama_cpp's default on. Call it
    before llama_cpp is imported; after that it raises FasaError.
    """
    import llama_cpp.llama

    _check_choice(params)
    Llama._fasa_default, Llama._foreign_callers = params, True
    llama_cpp.Llama = llama_cpp.llama.Llama = Llama
