"""FASA (Frequency-aware Sparse Attention, arXiv 2602.03152) for llama.cpp, from Python.

    from fasa_gguf import Llama    # llama_cpp.Llama with a fasa argument
    llm = Llama("model.gguf", n_ctx=32768, fasa="auto")

`fasa_gguf.enable()` before `import llama_cpp` does the same for code that is not yours.
"""

import re
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import FasaError
from .params import FasaParams

__all__ = ["FasaError", "FasaParams", "Llama", "Profile", "enable"]


def _version() -> str:
    """The version in pyproject.toml: of the checkout, or of the installed package."""
    project = Path(__file__).parent.parent / "pyproject.toml"
    if project.exists():
        name, version = (re.search(rf'^{key} = "(.*)"', project.read_text(), re.M) for key in ("name", "version"))
        if name and version and name[1] == __name__:
            return version[1]
    return metadata.version(__name__)


def __getattr__(name: str) -> Any:
    # the native library loads when it is used, not when the package is imported
    if name == "__version__":
        return _version()
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
