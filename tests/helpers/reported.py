"""What the tests of situations share: settings that make short contexts sparse, and what a model did."""

import subprocess
import sys

from paths import ROOT

from fasa_gguf import FasaParams

ON = FasaParams(chunks=4, budget=64, min_context=0)
ALL = FasaParams(chunks=8, budget=100000, min_context=0)  # sparse steps that attend all: what dense computes
PROMPT = "The ship left the harbour at dawn. " * 6


def text_of(llm, prompt, n=8, **kwargs):
    return llm.create_completion(prompt, **{"max_tokens": n, "temperature": 0, **kwargs})["choices"][0]["text"]


def streamed(llm, prompt, n=8, **kwargs):
    """The pieces of a stream."""
    chunks = llm.create_completion(prompt, **{"max_tokens": n, "temperature": 0, "stream": True, **kwargs})
    return [chunk["choices"][0]["text"] for chunk in chunks]


def sparse_steps(llm):
    """Sparse steps since the last call."""
    n = llm.fasa_stats()["steps_sparse"]
    llm.reset_fasa_stats()
    return n


def python(code, *args, **kwargs):
    """A process of its own that runs `code`."""
    run = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(run, **{"capture_output": True, "text": True, "cwd": ROOT, "timeout": 120, **kwargs})
