"""FASA (Frequency-aware Sparse Attention, arXiv 2602.03152) for llama.cpp, from Python.

    from . import Llama            # llama_cpp.Llama with a fasa argument
    llm = Llama("model.gguf", n_ctx=32768, fasa="auto")

`fasa_gguf.enable()` before `import llama_cpp` does the same for code that is not yours.
"""

from .errors import FasaError
from .params import FasaParams

__version__ = "0.1.0"
__all__ = ["FasaError", "FasaParams", "Llama", "Profile", "enable"]


def __getattr__(name: str):
    # the native library loads when it is used, not when the package is imported
    if name == "Llama":
        from .llama import Llama

        return Llama
    if name == "Profile":
        from .profile.profile import Profile

        return Profile
    if name == "enable":
        from .llama import enable

        return enable
    raise AttributeError(f"module 'fasa_gguf' has no attribute {name!r}")
