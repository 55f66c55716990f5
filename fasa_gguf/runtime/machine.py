"""What a run was made with: library, threads and devices, by llama-bench's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import devices, library
from .settings import thread_count


@dataclass(frozen=True)
class Machine:
    """The build and the hardware of a run; `Machine.here()` reads both."""

    library: str  # version of the native library
    llama_cpp_python: str
    cpu: str  # descriptions by ggml's backends, joined with commas
    gpu: str
    n_threads: int  # really used

    @classmethod
    def here(cls, n_threads: int = 0) -> Machine:
        """This machine. n_threads: 0 for all usable cores. Raises FasaError when the library cannot be loaded."""
        found = devices.devices()
        cpu, gpu = (", ".join(d.description for d in found if d.is_gpu == is_gpu) for is_gpu in (False, True))
        return cls(library.version(), library.upstream_version(), cpu, gpu, thread_count(n_threads))

    @property
    def build(self) -> str:
        """One text for the versions of both libraries."""
        return f"fasa_gguf {self.library}, llama-cpp-python {self.llama_cpp_python}"

    def as_dict(self) -> dict[str, Any]:
        """build_commit, cpu_info, gpu_info and n_threads, as llama-bench writes them."""
        return {
            "build_commit": self.build,
            "cpu_info": self.cpu,
            "gpu_info": self.gpu,
            "n_threads": self.n_threads,
        }
