"""Hugging Face model folders: what is read of them before, and with, their weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import FasaError
from .hf_attention import import_torch

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps over several GPUs
# attention projections in safetensors
QK_NAMES = re.compile(r"\.(q_proj|k_proj|qkv_proj|query_key_value|c_attn|Wqkv|qkv)\.weight$")


def read_config(folder: str) -> Any:
    """The folder's config; FasaError for a model out of scope, before any weight is read."""
    _, transformers = import_torch()
    if not (Path(folder) / "config.json").is_file():
        raise FasaError(
            f"{folder}: expected a Hugging Face model folder, found no config.json in it; "
            "give the folder of the weights, or a GGUF file"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers raises many kinds for a bad file
        raise _loading(folder, e) from None
    check_config(config, folder, (getattr(config, "architectures", None) or [config.model_type])[0])
    return config


def check_config(config: Any, where: str, arch: str) -> None:
    """Raises FasaError, naming `where` and the architecture, for a model out of scope."""
    text = text_config(config)
    if getattr(text, "kv_lora_rank", None):
        raise FasaError(
            f"{where}: architecture {arch} has multi-head latent attention, which has no keys per head to rank; "
            "FASA does not apply"
        )
    if not getattr(text, "rope_parameters", None) or getattr(text, "alibi", False):
        raise FasaError(
            f"{where}: architecture {arch} has no RoPE (no rope_parameters in its config), "
            "so it has no frequency chunks; FASA does not apply"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise FasaError(f"{where}: architecture {arch} is no decoder; FASA does not apply")


def _loading(folder: str, e: Exception) -> FasaError:
    said = str(e).strip().splitlines()
    return FasaError(f"{folder}: transformers cannot load this model: {said[0] if said else type(e).__name__}")


def text_config(config: Any) -> Any:
    """The part of a config that is about the text decoder."""
    return config.get_text_config(decoder=True)


def load_model(folder: str | os.PathLike, device_map: str | dict | None = None, dtype: str = "auto") -> Any:
    """The PreTrainedModel of a folder, in inference mode.

    device_map: "cpu", "cuda", "cuda:1", or one of transformers' maps over several GPUs ("auto", "balanced", a dict),
    which need accelerate. None: all GPUs when there are several and accelerate is there, else the first, else the CPU.
    dtype: f32, f16, bf16, or auto: f32 on a CPU, the checkpoint's own on a GPU.
    Raises FasaError for what transformers cannot load.
    """
    torch, transformers = import_torch()
    folder = str(folder)
    config = read_config(folder)
    if dtype not in ("auto", *DTYPES):
        raise FasaError(f"dtype {dtype!r}: expected one of auto, {', '.join(DTYPES)}")
    device_map, several = _devices(torch, device_map)
    kind = DTYPES.get(dtype) or ("float32" if device_map == "cpu" else "auto")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    given: dict[str, Any] = {
        "config": config,
        "dtype": kind if kind == "auto" else getattr(torch, kind),
        "local_files_only": True,
    }
    try:
        auto = transformers.AutoModelForCausalLM
        if type(config) not in auto._model_mapping:
            auto = transformers.AutoModelForImageTextToText
        model = auto.from_pretrained(folder, **given, **({"device_map": device_map} if several else {}))
        return model.eval() if several else model.eval().to(device_map)
    except Exception as e:
        raise _loading(folder, e) from None


def _devices(torch: Any, device_map: str | dict | None) -> tuple[str | dict, bool]:
    """(device map, whether it spreads over several devices). Raises FasaError when that needs accelerate."""
    try:
        import accelerate  # noqa: F401

        spread = True
    except ImportError:
        spread = False
    if device_map is None:
        many = spread and torch.cuda.device_count() > 1
        device_map = "cpu" if not torch.cuda.is_available() else "auto" if many else "cuda"
    several = not isinstance(device_map, str) or device_map in SPREAD
    if several and not spread:
        raise FasaError(
            f"device map {device_map!r} needs accelerate; run `pip install accelerate`, "
            "or name one device, as in cuda:0"
        )
    return device_map, several


def load_tokenizer(folder: str | os.PathLike) -> Callable[[str], Sequence[int]]:
    """The folder's tokenizer as a function of a text, its special tokens added. Raises FasaError when there is none."""
    _, transformers = import_torch()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:
        raise FasaError(f"{folder}: transformers cannot load the tokenizer: {str(e).strip().splitlines()[0]}") from None
    return lambda text: tokenizer(text)["input_ids"]


def weights_hash(folder: str | os.PathLike) -> str | None:
    """sha256 of the q and k projection weights as the folder's safetensors files store them; None without any."""
    h, found = hashlib.sha256(), False
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
            for name in sorted(n for n in header if QK_NAMES.search("." + n)):
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
