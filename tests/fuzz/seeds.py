"""What the fuzzers begin with: PYTHONPATH=.:tests/helpers python tests/fuzz/seeds.py FOLDER

writes FOLDER/files/*, for tests/fuzz/files.py, FOLDER/profile/*, for native/fuzz/profile.cpp, the names in keys.dict,
and model.gguf, which native/fuzz decodes with.
"""

import sys
from pathlib import Path

from profiles import full_profile
from tiny_gguf import N_HEAD_KV, N_LAYER, WIDTH, gguf_bytes, write_tiny

from fasa_gguf.gguf.file import ARR, F32, STR, U32, pack_kv
from fasa_gguf.profile import embed
from fasa_gguf.profile.keys import TYPES
from fasa_gguf.speed.random_model import synthetic_profile

MODEL = [
    pack_kv("general.architecture", STR, "llama"),
    pack_kv("llama.block_count", U32, N_LAYER),
    pack_kv("llama.embedding_length", U32, 64),
    pack_kv("llama.attention.head_count", U32, 4),
    pack_kv("llama.attention.head_count_kv", U32, N_HEAD_KV),
    pack_kv("llama.attention.key_length", U32, WIDTH),
    pack_kv("llama.rope.dimension_count", U32, WIDTH),
    pack_kv("llama.context_length", U32, 4096),
    pack_kv("llama.attention.sliding_window", U32, 64),
    pack_kv("llama.rope.freq_base", F32, 10000.0),
    pack_kv("llama.feed_forward_length", ARR, [96] * N_LAYER, U32),
]
TENSORS = [("blk.0.attn_k.weight", (8, 2), 0, 0, bytes(64)), ("output_norm.weight", (8,), 1, 64, bytes(16))]


def models():
    """(name, GGUF) with every kind of profile: none, plain, all keys."""
    for name, profile in (
        ("none", None),
        ("plain", synthetic_profile([N_HEAD_KV] * N_LAYER, [WIDTH // 2] * N_LAYER, seed=1)),
        ("full", full_profile()),
    ):
        entries = [] if profile is None else [pack_kv(*e) for e in profile.to_gguf_kv()]
        yield name, gguf_bytes(MODEL + entries, TENSORS)


def main(folder):
    for name, data in models():
        for kind in ("files", "profile"):
            path = folder / kind / f"{name}.gguf"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    (folder / "files" / "full.json").write_text(full_profile().to_json())
    write_tiny(folder / "model.gguf")
    embed.embed(folder / "model.gguf", full_profile())
    names = [f"fasa.{key}" for key in TYPES] + list(TYPES)
    (folder / "keys.dict").write_text("".join(f'"{name}"\n' for name in dict.fromkeys(names)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
