"""The reference harness: other sparse attention methods beside FASA, at equal budget, in one small torch decoder.

    decoder.py    a Llama-family GGUF in torch, fp32: prefix dense in one pass, then the tail sparse, as decoding does
    selection.py  top tokens with ties, shared scores, K_dom: reference.py again, in batches
    methods.py    one class a method, each with its own model of the bytes it reads
    calibrate.py  what the methods know of a model beforehand: contextual agreement, Double Sparsity's channels
    compare.py    windows x methods x budgets, tuned on another text, resumable
    report.py     results.md, results.json and the curves

It is about selections, not speed: every method runs as a mask on dense attention. Needs torch (`pip install 'fasa_gguf[harness]'`).
"""

from ..errors import FasaError


def require_torch() -> None:
    """Raises FasaError when torch is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise FasaError("the comparison needs torch; run `pip install 'fasa_gguf[harness]'`") from None
