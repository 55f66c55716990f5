"""The queries that a Hugging Face layer would have, had the feed-forward before it added nothing: the foreseen ones.

When a decoder layer is called, the layer before it runs once more with its feed-forward silent, which leaves the
residual that the feed-forward reads; from this the layer is run until its attention shows its queries. Whether the
layer before has such a residual is measured, not looked up by the model's name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import hf_attention

# children of a decoder layer, by their names in transformers
FEED_FORWARDS = frozenset(["mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "moe", "ffn"])
MIXERS = frozenset(["self_attn", "attention", "attn", "self_attention", "conv", "linear_attn", "mamba", "mixer"])


class _Seen(Exception):
    """Ends a layer whose queries were shown."""


class Foresight:
    """`check` once, then `watching` around forward passes: `q` has the foreseen queries of the layer that attends next.

    attention: the module of every layer that attends, by layer.
    """

    def __init__(self, model: Any, attention: dict[int, Any]) -> None:
        self.layers = _decoder_layers(model, attention)
        self.attends = frozenset(attention)
        self.good: set[int] = set()  # layers whose queries can be foreseen
        self.q: dict[int, Any] = {}  # by layer [batch, n_head, n, head_dim]
        self._calls: dict[int, tuple[tuple, dict]] = {}  # how each layer was called
        self._inside = False

    def check(self, run: Callable[[np.ndarray], None], n_vocab: int) -> None:
        """Find the layers whose queries can be foreseen; run(ids [batch, n]) is a forward pass."""

        def look(il: int, layer: Any, args: tuple, kwargs: dict) -> None:
            with contextlib.suppress(Exception):  # a layer of a kind that is not known may fail in any way
                if il + 1 in self.attends and _is_residual(layer, args, kwargs):
                    self.good.add(il + 1)

        with self._hooked(look):
            run(np.arange(8)[None] * 37 % n_vocab)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Forward passes inside put the foreseen queries of each layer into `q` before it attends."""
        with self._hooked(self._foresee):
            try:
                yield
            finally:
                self.q.clear()
                self._calls.clear()

    @contextlib.contextmanager
    def _hooked(self, act: Callable[..., None]) -> Iterator[None]:
        def hook(il: int) -> Callable[..., None]:
            def call(layer: Any, args: tuple, kwargs: dict) -> None:
                if not self._inside:
                    self._inside = True
                    try:
                        act(il, layer, args, kwargs)
                    finally:
                        self._inside = False

            return call

        handles = [layer.register_forward_pre_hook(hook(il), with_kwargs=True) for il, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _foresee(self, il: int, layer: Any, args: tuple, kwargs: dict) -> None:
        before, self._calls = self._calls.get(il - 1), {il: (args, kwargs)}
        if il not in self.good or before is None:
            return

        def keep(module: Any, q: Any, *_: Any) -> None:
            self.q = {il: q}
            raise _Seen

        with hf_attention.watching(None), _silent(self.layers[il - 1], FEED_FORWARDS):
            residual = _output(self.layers[il - 1](*before[0], **before[1]))
        args, kwargs = _from(residual, args, kwargs)
        with hf_attention.watching(keep), contextlib.suppress(_Seen):
            layer(*args, **kwargs)


def _decoder_layers(model: Any, attention: dict[int, Any]) -> dict[int, Any]:
    """The decoder layers by number: the list of modules that holds those which attend; {} where there is none."""
    names = {id(module): name for name, module in model.named_modules()}
    lists = set()
    for il, module in attention.items():
        parts = names.get(id(module), "").split(".")
        at = next((i for i, part in enumerate(parts) if part == str(il)), None)
        lists.add(".".join(parts[:at]) if at is not None else "")
    name = lists.pop() if len(lists) == 1 else ""
    return dict(enumerate(model.get_submodule(name))) if name else {}


def _is_residual(layer: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a layer adds what its parts make to its input, the feed-forward last, and reading what came before."""
    import torch

    read: list[Any] = []

    def inputs_of(silent: frozenset[str]) -> Any:
        """The layer's output with these parts silent; `read` gets what its feed-forwards read."""
        parts = [m for name, m in layer.named_children() if name in FEED_FORWARDS]
        handles = [
            m.register_forward_pre_hook(lambda m, a, k: read.append(_hidden(a, k).clone()), with_kwargs=True)
            for m in parts
        ]
        try:
            with hf_attention.watching(None), _silent(layer, silent):
                return _output(layer(*args, **kwargs))
        finally:
            for handle in handles:
                handle.remove()

    kept = inputs_of(FEED_FORWARDS | MIXERS)
    n = len(read)
    residual = inputs_of(FEED_FORWARDS)
    x = _hidden(args, kwargs)
    return (
        n > 0
        and torch.equal(kept, x)
        and not torch.equal(residual, x)
        and all(not torch.equal(a, b) for a, b in zip(read[:n], read[n:], strict=True))
    )


def _hidden(args: tuple, kwargs: dict) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _from(hidden: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A call of a layer with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _output(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


@contextlib.contextmanager
def _silent(layer: Any, names: frozenset[str]) -> Iterator[None]:
    """The layer's parts of these names return zeros."""

    def zeros(module: Any, args: tuple, out: Any) -> Any:
        return (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0

    handles = [m.register_forward_hook(zeros) for name, m in layer.named_children() if name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
