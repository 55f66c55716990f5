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


class Llama(_Base):
    """llama_cpp.Llama with FASA.

    fasa: "auto" (the profile in the model, if there is one), "off", or FasaParams (a profile is then needed);
    fasa_profile: a Profile or the path of one, instead of the model's own. Flash attention is turned on with FASA.
    Raises FasaError when FasaParams are given and FASA cannot run; with "auto" it says why once, and is dense.
    """

    def __init__(self, model_path: str, *, fasa: FasaParams | str = "auto", fasa_profile: Profile | str | os.PathLike | None = None, **kwargs: Any) -> None:
        self._stack = contextlib.ExitStack()  # close() needs it when we raise before llama_cpp made its own
        if not isinstance(fasa, FasaParams) and fasa not in ("auto", "off"):
            raise FasaError(f'fasa={fasa!r}: expected "auto", "off" or FasaParams(...)')
        if kwargs.get("chat_handler") is not None and "mmproj" in repr(getattr(kwargs["chat_handler"], "__dict__", {})):
            raise FasaError("vision needs libmtmd, which this package does not carry; use llama-cpp-python's own library for it")
        profile = None
        if fasa != "off":
            profile = fasa_profile if isinstance(fasa_profile, Profile) else Profile.load(fasa_profile) if fasa_profile else Profile.from_gguf(GGUFFile(model_path))
            if profile is None:
                missing = f"no FASA profile in {model_path}; run `fasa-gguf embed-profile {model_path}`"
                if isinstance(fasa, FasaParams):
                    raise FasaError(missing)
                _say(f"{missing}; dense until then")
        if profile is not None:
            if kwargs.get("flash_attn") is False:
                if isinstance(fasa, FasaParams):
                    raise FasaError("flash_attn=False: FASA needs flash attention; leave the argument away")
                _say("flash_attn=False was given, and FASA needs flash attention: dense")
                profile = None
            else:
                kwargs["flash_attn"] = True
        super().__init__(model_path, **kwargs)
        self._fasa = native.Context(ctypes.cast(self._ctx.ctx, ctypes.c_void_p).value)
        self._fasa_profile = profile
        if profile is not None:
            try:
                self._fasa.set_profile(profile)
                self.set_fasa(fasa if isinstance(fasa, FasaParams) else "auto")
            except FasaError as e:
                if isinstance(fasa, FasaParams):
                    self.close()
                    raise
                _say(f"{e}; dense")

    def set_fasa(self, fasa: FasaParams | str) -> None:
        """Switch between any two calls: "auto" (the profile's defaults and FASA_* variables), "off" or FasaParams."""
        if fasa == "off":
            self._fasa.set_params(None)
        elif self._fasa_profile is None:
            raise FasaError("there is no FASA profile; load the model with one")
        else:
            self._fasa.set_params(fasa if isinstance(fasa, FasaParams) else FasaParams.from_env(self._fasa_profile.params()))

    def fasa_stats(self) -> dict[str, Any]:
        """Counters since the model was loaded or reset_fasa_stats, and the reasons for what was dense."""
        return {**self._fasa.counters(), "step_reason": self._fasa.step_reason(), "layer_reasons": self._fasa.layer_reasons()}

    def reset_fasa_stats(self) -> None:
        self._fasa.reset_counters()


def enable() -> None:
    """Make llama_cpp.Llama itself decode with FASA, for code that is not ours (llama_cpp.server too).

    Call it before llama_cpp is imported; after that it raises FasaError.
    """
    import llama_cpp.llama

    llama_cpp.Llama = llama_cpp.llama.Llama = Llama
