"""Calibration from Hugging Face weights: transformers runs the model, and an attention function of ours sees every layer's
post-RoPE queries and keys (after any q/k-norm) before it attends. Needs the extra `fasa_gguf[hf]`.

One forward pass per window shows all layers; what is kept of them is ranking.py's sample. Which pairs of dimensions rotate is
not looked up by the model's name but measured, see `_Probe`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import reference
from ..errors import FasaError
from ..gguf.file import GGUFFile
from ..gguf.shape import read_shape, sliding_windows
from ..profile.profile import Profile
from .gguf import Calibrator, Corpus, default_corpus
from .ranking import CalibrationParams, LayerSample

NAME = "fasa_observe"  # of our function in transformers' AttentionInterface
BLOCK = 512  # queries that attend at once where torch has no fused attention
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps over several GPUs
_QK = re.compile(
    r"\.(q_proj|k_proj|qkv_proj|query_key_value|c_attn|Wqkv|qkv)\.weight$"
)  # attention projections in safetensors
_watcher: Callable[..., None] | None = None  # of the forward pass at hand


def _modules() -> tuple[Any, Any]:
    """(torch, transformers), our attention function registered."""
    try:
        import torch
        import transformers
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as e:
        raise FasaError(
            f"Hugging Face weights need torch, transformers 5 and safetensors ({e}); run `pip install 'fasa_gguf[hf]'`"
        ) from None
    AttentionInterface.register(NAME, _observe_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return torch, transformers


# ---- the attention function ----


def _observe_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Any = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """What transformers calls in every layer: show q [batch, n_head, n, head_dim] and k [batch, n_head_kv, n, head_dim], then attend."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if _watcher:
        _watcher(module, query, key, scale, softcap or 0.0, sliding_window or 0)
    if softcap or s_aux is not None:
        return _blocked_attention(query, key, value, attention_mask, scale, softcap or 0.0, s_aux), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scale, **kwargs)


def _blocked_attention(query: Any, key: Any, value: Any, mask: Any, scale: float, soft_cap: float, sinks: Any) -> Any:
    """Attention with soft-capped logits or learned sinks [n_head], some queries at a time: [batch, n, n_head, head_dim of v]."""
    import torch

    batch, n_head, n, _ = query.shape
    n_kv_heads, n_kv = key.shape[1:3]
    grouped = query.unflatten(1, (n_kv_heads, -1))  # [batch, n_head_kv, G, n, head_dim]
    cell, out = torch.arange(n_kv, device=query.device), []
    for i in range(0, n, BLOCK):
        x = (grouped[..., i : i + BLOCK, :] @ key[:, :, None].mT).float() * scale  # [batch, n_head_kv, G, block, n_kv]
        if soft_cap:
            x = torch.tanh(x / soft_cap) * soft_cap
        if mask is None:
            x.masked_fill_(cell > cell[n_kv - n + i : n_kv - n + i + x.shape[3], None], -torch.inf)
        elif mask.dtype == torch.bool:
            x.masked_fill_(~mask[:, :, None, i : i + BLOCK, :n_kv], -torch.inf)
        else:
            x = x + mask[:, :, None, i : i + BLOCK, :n_kv]
        if sinks is not None:
            x = torch.cat([x, sinks.float().view(1, n_kv_heads, -1, 1, 1).expand(*x.shape[:-1], 1)], -1)
        share = torch.softmax(x, -1)[..., :n_kv].to(value.dtype)
        out.append((share @ value[:, :, None]).flatten(1, 2))  # [batch, n_head, block, head_dim]
    return torch.cat(out, 2).transpose(1, 2).contiguous()


def _rows(x: Any) -> np.ndarray:
    """float32 [n, heads, head_dim] of the first sequence of [batch, heads, n, head_dim]."""
    return x[0].transpose(0, 1).float().contiguous().cpu().numpy()


# ---- the model ----


def _config(folder: str) -> Any:
    """The folder's config; FasaError for a model out of scope, before any weight is read."""
    _, transformers = _modules()
    if not (Path(folder) / "config.json").is_file():
        raise FasaError(
            f"{folder}: expected a Hugging Face model folder, found no config.json in it; give the folder of the weights, or a GGUF file"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # whatever transformers makes of a bad file
        raise _loading(folder, e) from None
    _check_config(config, folder, (getattr(config, "architectures", None) or [config.model_type])[0])
    return config


def _check_config(config: Any, where: str, arch: str) -> None:
    text = _text(config)
    if getattr(text, "kv_lora_rank", None):
        raise FasaError(
            f"{where}: architecture {arch} has multi-head latent attention, which has no keys per head to rank; FASA does not apply"
        )
    if not getattr(text, "rope_parameters", None) or getattr(text, "alibi", False):
        raise FasaError(
            f"{where}: architecture {arch} has no RoPE (no rope_parameters in its config), so it has no frequency chunks; "
            "FASA does not apply"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise FasaError(f"{where}: architecture {arch} is no decoder; FASA does not apply")


def _loading(folder: str, e: Exception) -> FasaError:
    return FasaError(
        f"{folder}: transformers cannot load this model: {str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__}"
    )


def _text(config: Any) -> Any:
    """The part of a config that is about the text decoder."""
    return config.get_text_config(decoder=True)


def load_model(folder: str | os.PathLike, device_map: str | dict | None = None, dtype: str = "auto") -> Any:
    """The PreTrainedModel of a folder, in inference mode.

    device_map: "cpu", "cuda", "cuda:1", or one of transformers' maps over several GPUs ("auto", "balanced", a dict; these need
    accelerate). None: all GPUs when there are several and accelerate is there, else the first one, else the CPU. dtype: f32, f16,
    bf16, or auto: f32 on a CPU, the checkpoint's own on a GPU. Raises FasaError for what transformers cannot load.
    """
    torch, transformers = _modules()
    folder = str(folder)
    config = _config(folder)
    if dtype not in ("auto", *DTYPES):
        raise FasaError(f"dtype {dtype!r}: expected one of auto, {', '.join(DTYPES)}")
    try:
        import accelerate  # noqa: F401

        spread = True
    except ImportError:
        spread = False
    if device_map is None:
        device_map = (
            "cpu" if not torch.cuda.is_available() else "auto" if spread and torch.cuda.device_count() > 1 else "cuda"
        )
    several = not isinstance(device_map, str) or device_map in SPREAD
    if several and not spread:
        raise FasaError(
            f"device map {device_map!r} needs accelerate; run `pip install accelerate`, or name one device, as in cuda:0"
        )
    kind = DTYPES.get(dtype) or ("float32" if device_map == "cpu" else "auto")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    given = dict(config=config, dtype=kind if kind == "auto" else getattr(torch, kind), local_files_only=True)
    try:
        auto = transformers.AutoModelForCausalLM
        if type(config) not in auto._model_mapping.keys():
            auto = transformers.AutoModelForImageTextToText
        model = auto.from_pretrained(folder, **given, **({"device_map": device_map} if several else {}))
        return model.eval() if several else model.eval().to(device_map)
    except Exception as e:
        raise _loading(folder, e) from None


def load_tokenizer(folder: str | os.PathLike) -> Callable[[str], Sequence[int]]:
    """The folder's tokenizer as a function of a text, its special tokens added. Raises FasaError when there is none."""
    _, transformers = _modules()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:
        raise FasaError(f"{folder}: transformers cannot load the tokenizer: {str(e).strip().splitlines()[0]}") from None
    return lambda text: tokenizer(text)["input_ids"]


def weights_hash(folder: str | os.PathLike) -> str | None:
    """sha256 of the q and k projection weights as stored in the folder's safetensors files; None when there are none."""
    h, found = hashlib.sha256(), False
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
            for name in sorted(n for n in header if _QK.search("." + n)):
                begin, end = header[name]["data_offsets"]
                f.seek(8 + size + begin)
                h.update(name.encode())
                found = True
                while begin < end:
                    data = f.read(min(end - begin, 1 << 22))
                    if not data:
                        raise FasaError(f"{path}: tensor {name} is cut short; download the model again")
                    h.update(data)
                    begin += len(data)
    return h.hexdigest() if found else None


# ---- which dimensions rotate ----


class _Probe:
    """What single tokens show of every layer, at one position and at a later one (not at 0, which resets some recurrent layers).

    A token that is alone attends itself alone, so that its hidden states do not depend on its position, and in every layer the
    keys of the two passes differ by RoPE only. The pairing that keeps the length of each pair is the layout.
    """

    TOKENS, POSITIONS = 16, (1, 1001)

    def __init__(self, run: Callable[..., None], n_vocab: int) -> None:
        self.keys: list[dict[int, np.ndarray]] = []  # per position {layer: [n_token, n_head_kv, head_dim]}
        self.n_head: dict[int, int] = {}
        self.windows: dict[int, int] = {}
        self.both_ways = False
        ids = (np.arange(self.TOKENS) * 37 % n_vocab)[:, None]  # [n_token, 1]
        for position in self.POSITIONS:
            found: dict[int, np.ndarray] = {}

            def watch(module: Any, q: Any, k: Any, scale: float, soft_cap: float, window: int) -> None:
                il = getattr(module, "layer_idx", None)
                if il is not None and il not in found:
                    found[il] = k[:, :, 0].float().cpu().numpy()
                    self.n_head[il], self.windows[il] = q.shape[1], window
                    self.both_ways |= getattr(module, "is_causal", True) is False

            run(watch, ids, np.full_like(ids, position))
            self.keys.append(found)

    def change(self, il: int) -> np.ndarray:
        """[n_token, n_head_kv, head_dim] of one layer."""
        return np.abs(self.keys[1][il] - self.keys[0][il])

    def layout(self, n_rot: Callable[[int], int]) -> str | None:
        """norm or neox; "" when no key depends on the position; None when they do, but not as rotating pairs."""
        error, moved = {"norm": 0.0, "neox": 0.0}, 0.0
        for il, k0 in self.keys[0].items():
            width, rotated = k0.shape[-1], n_rot(il)
            change = self.change(il)
            if change.max() <= 1e-3 * np.abs(k0).max():
                continue  # a layer without RoPE, among others
            if change[..., rotated:].sum() > 0.01 * change.sum():
                return None
            moved += change.sum()
            for layout in error:
                dims = reference.chunk_dims(width, rotated, layout)[: rotated // 2]
                length = [
                    np.linalg.norm(keys[il][..., dims], axis=-1) for keys in self.keys
                ]  # [n_token, n_head_kv, n_rot/2]
                error[layout] += np.abs(length[1] - length[0]).sum()
        if moved == 0:
            return ""
        best = min(error, key=lambda name: (error[name], name))
        return (
            best
            if (error[best] < 0.5 * max(error.values()) and error[best] < 0.2 * moved)
            or max(error.values()) < 0.01 * moved
            else None
        )


# ---- the calibration ----


class HFCalibration(Calibrator):
    """From a PreTrainedModel: `profile = HFCalibration(model, corpus, params).run(out, progress)`.

    tokenize: of the corpus' text; not needed when its content is token ids. folder: where the weights come from. gguf: the model
    that the profile is for; its sliding windows, which may differ, are taken, and a model of another shape is refused.
    """

    def __init__(
        self,
        model: Any,
        corpus: Corpus,
        params: CalibrationParams,
        tokenize: Callable[[str], Sequence[int]] | None = None,
        folder: str | os.PathLike | None = None,
        gguf: str | os.PathLike | None = None,
        n_threads: int = 0,
    ) -> None:
        super().__init__(params, n_threads)
        _modules()
        self.model, self.folder = model, folder
        self.arch, self.text = type(model).__name__, _text(model.config)
        self.where = str(folder or self.arch)
        _check_config(model.config, self.where, self.arch)
        probe = _Probe(self._forward, self.text.vocab_size)
        self._shape(probe)
        rope = self._rope_of(self._full_layer())
        factor = rope.get("factor", 1.0) if rope.get("rope_type") in ("linear", "yarn") else 1.0
        self.rope = {"base": float(rope.get("rope_theta", 10000.0)), "scale": 1.0 / float(factor)}
        if gguf:
            self._fit(GGUFFile(gguf))

        def missing(text: str) -> Sequence[int]:
            raise FasaError(f"{self.where}: a text needs a tokenizer; give token ids")

        self._read(corpus, getattr(self.text, "max_position_embeddings", None) or params.context, tokenize or missing)

    def _shape(self, probe: _Probe) -> None:
        """shapes, windows and layout, from what the layers show; FasaError for a model without rotating keys."""
        n_layer = self.text.num_hidden_layers
        own = n_layer - (getattr(self.text, "num_kv_shared_layers", None) or 0)  # the last ones attend to keys of these
        seen = {il: k for il, k in probe.keys[0].items() if il < own}
        if not seen:
            raise FasaError(
                f"{self.where}: architecture {self.arch} shows no attention layer through transformers' AttentionInterface; "
                "calibrate its GGUF instead"
            )
        if probe.both_ways:
            raise self._refuse("attends both ways, and nothing is cached")
        layout = probe.layout(lambda il: self._n_rot(il, probe.keys[0][il].shape[-1]))
        if layout == "":
            raise self._refuse("has no RoPE, so it has no frequency chunks")
        if layout is None:
            raise self._refuse("does not rotate its keys in the pairs that its config tells of")
        self.layout = layout
        self.shapes = [
            (probe.n_head[il], *seen[il].shape[1:], self._n_rot(il, seen[il].shape[2])) if il in seen else (0, 0, 0, 0)
            for il in range(n_layer)
        ]
        self.windows = [probe.windows.get(il, 0) for il in range(n_layer)]

    def _full_layer(self) -> int:
        """A layer that attends to all tokens, or the first with attention."""
        layers = [il for il, shape in enumerate(self.shapes) if shape[1]]
        return next((il for il in layers if not self.windows[il]), layers[0])

    def _rope_of(self, il: int) -> dict[str, Any]:
        """The config's RoPE parameters of a layer; nested by the layer's type in some models."""
        rope, types = self.text.rope_parameters, getattr(self.text, "layer_types", None)
        if any(isinstance(x, dict) for x in rope.values()):
            return (rope.get(types[il]) if types else None) or next(x for x in rope.values() if isinstance(x, dict))
        return rope

    def _n_rot(self, il: int, width: int) -> int:
        """Rotated dimensions per head; "proportional" rotates all of them, some by nothing."""
        rope = self._rope_of(il)
        factor = 1.0 if rope.get("rope_type") == "proportional" else rope.get("partial_rotary_factor") or 1.0
        return min(-(-int(width * factor) // 2) * 2, width)

    def _fit(self, gguf: GGUFFile) -> None:
        shape = read_shape(gguf)
        Profile([s[1] for s in self.shapes], [s[2] // 2 for s in self.shapes], []).check(
            shape.n_head_kv, shape.n_chunk, str(gguf.path)
        )
        self.windows = sliding_windows(gguf, len(self.shapes))

    def _origin(self) -> dict[str, str]:
        found = weights_hash(self.folder) if self.folder else None
        return {"source": "hf", **({"weights_sha256": found} if found else {})}

    def _identity(self) -> list[Any]:
        files = sorted(Path(self.folder).glob("*.safetensors")) if self.folder else []
        return [
            self.model.config.to_json_string(),
            str(self.model.dtype),
            self.windows,
            *((f.stat().st_size, f.stat().st_mtime) for f in files),
        ]

    def _passes(self, todo: list[int]) -> list[list[int]]:
        return [todo] if todo else []  # a forward pass shows every layer

    @contextlib.contextmanager
    def _watched(self, watch: Callable[..., None]) -> Iterator[None]:
        """Our attention function in the model's place of its own."""
        global _watcher
        old = self.model.config._attn_implementation
        try:
            self.model.set_attn_implementation(NAME)
            _watcher = watch
            yield
        finally:
            _watcher = None
            self.model.set_attn_implementation(old)

    def _forward(self, watch: Callable[..., None], ids: np.ndarray, positions: np.ndarray | None = None) -> None:
        """The decoder stack on ids [batch, n], at positions [batch, n] or from 0 on; logits are not computed."""
        import torch

        given = {"input_ids": ids} if positions is None else {"input_ids": ids, "position_ids": positions}
        with self._watched(watch), torch.inference_mode():
            self.model.base_model(
                **{k: torch.as_tensor(v, dtype=torch.long, device=self.model.device) for k, v in given.items()},
                use_cache=False,
            )

    def _pass(self, layers: list[int], tick: Callable[[int], None]) -> dict[int, LayerSample]:
        """Every window in one forward pass; in each layer its queries and keys go into the layer's sample."""
        seen = self._samples(layers)
        for window in self.tokens:
            shown: set[int] = set()

            def watch(module: Any, q: Any, k: Any, scale: float, soft_cap: float, sliding: int) -> None:
                il = getattr(module, "layer_idx", None)
                if il not in seen or il in shown:
                    return
                s, keys = seen[il], _rows(k)
                s.scale, s.soft_cap = float(scale), float(soft_cap)
                s.add(_rows(q), keys, 0)
                s.end(keys)
                shown.add(il)
                tick(len(window) * len(shown) // len(seen) - len(window) * (len(shown) - 1) // len(seen))

            self._forward(watch, np.array([window]))
            tick(len(window) - len(window) * len(shown) // len(seen))
            for s in seen.values():
                s.fold()
        return seen


def calibrate_hf(
    model: Any,
    corpus: Corpus | None = None,
    params: CalibrationParams | None = None,
    out: str | os.PathLike | None = None,
    n_threads: int = 0,
    device_map: str | dict | None = None,
    dtype: str = "auto",
    gguf: str | os.PathLike | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Profile:
    """Calibrate Hugging Face weights: a folder, or a PreTrainedModel (then the corpus holds token ids).

    corpus: (name, text or token ids), default_corpus() when none is given; gguf: the model that the profile is for, if known;
    device_map, dtype: see load_model; progress(what, done, total). Raises FasaError for a missing extra, a folder that cannot be
    loaded, a model out of scope (no RoPE, MLA, no decoder), one that is not the GGUF's, a text that is too short.
    """
    torch, _ = _modules()
    params, corpus = params or CalibrationParams(), corpus or default_corpus()
    if n_threads:
        torch.set_num_threads(n_threads)
    folder = tokenize = None
    if isinstance(model, (str, os.PathLike)):
        folder = str(model)
        tokenize = load_tokenizer(folder) if _config(folder) and isinstance(corpus[1], str) else None
        model = load_model(folder, device_map, dtype)
    return HFCalibration(model, corpus, params, tokenize, folder, gguf, n_threads).run(out, progress)
