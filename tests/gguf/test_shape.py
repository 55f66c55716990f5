"""Shapes of models from their metadata, and the tables of architectures."""

import gguf
import pytest
from paths import ROOT
from tiny_gguf import gguf_bytes

from fasa_gguf import FasaError
from fasa_gguf.gguf import shape
from fasa_gguf.gguf.file import ARR, BOOL, F32, I32, STR, U32, GGUFFile, pack_kv

TABLES = (shape.NO_ROPE, shape.NORM, shape.LATENT, shape.SWA_PERIOD, shape.NO_CACHE)


def test_every_architecture_of_the_tables_exists(pinned):
    """By the installed gguf-py, or by the pinned source, which knows newer ones."""
    known = {*gguf.MODEL_ARCH_NAMES.values(), *pinned.MODEL_ARCH_NAMES.values()}
    for table in TABLES:
        assert set(table) <= known
    assert not shape.NO_ROPE & shape.NORM and not shape.NO_ROPE & shape.SWA_PERIOD.keys()


def header(tmp_path, arch, **keys):
    """The header of a model with these keys (dots as __), without tensors."""

    def entry(key, value):
        name = f"{arch}.{key.replace('__', '.')}"
        if isinstance(value, list):
            return pack_kv(name, ARR, value, BOOL if isinstance(value[0], bool) else I32)
        kinds = {bool: BOOL, str: STR, float: F32, int: U32}
        return pack_kv(name, kinds[type(value)], value)

    path = tmp_path / f"{arch}.gguf"
    path.write_bytes(gguf_bytes([pack_kv("general.architecture", STR, arch)] + [entry(k, v) for k, v in keys.items()]))
    return GGUFFile(path)


BASE = {"block_count": 4, "embedding_length": 64, "attention__head_count": 4}


def test_shapes_from_the_metadata(tmp_path):
    s = shape.read_shape(header(tmp_path, "llama", **BASE))
    assert (s.n_head, s.n_head_kv, s.head_dim, s.n_chunk, s.n_rot, s.layout, s.rope_base) == (
        [4] * 4,
        [4] * 4,
        [16] * 4,
        [8] * 4,
        16,
        "norm",
        10000.0,
    )
    s = shape.read_shape(
        header(
            tmp_path,
            "phi2",
            **BASE,
            attention__head_count_kv=2,
            attention__key_length=24,
            rope__dimension_count=8,
            rope__freq_base=5e5,
            rope__scaling__type="yarn",
        )
    )
    assert (s.n_head_kv, s.head_dim, s.n_rot, s.layout, s.rope_base, s.rope_scaling) == (
        [2] * 4,
        [24] * 4,
        8,
        "neox",
        5e5,
        "yarn",
    )
    s = shape.read_shape(header(tmp_path, "lfm2", **BASE, attention__head_count_kv=[0, 2, 0, 2]))
    assert (s.n_head_kv, s.n_chunk) == ([0, 2, 0, 2], [0, 8, 0, 8])
    s = shape.read_shape(header(tmp_path, "glm4moe", **BASE, nextn_predict_layers=1))
    assert len(s.n_head_kv) == 3
    swa = {"attention__key_length": 32, "attention__key_length_swa": 16}
    s = shape.read_shape(
        header(tmp_path, "gemma4", **BASE, **swa, attention__sliding_window_pattern=[True, True, False, True])
    )
    assert s.head_dim == [16, 16, 32, 16]
    s = shape.read_shape(header(tmp_path, "gemma4", **BASE, **swa, attention__sliding_window_pattern=4))
    assert s.n_chunk == [-1] * 4  # the loader knows which
    assert shape.model_shape(header(tmp_path, "llama", **BASE)) == ([4] * 4, [8] * 4)


@pytest.mark.parametrize(
    "arch, keys, message",
    [
        (
            "deepseek2",
            {"attention__kv_lora_rank": 512},
            "architecture deepseek2 has multi-head latent attention, which has no keys per head to rank; "
            "FASA does not apply",
        ),
        ("deepseek2", {"attention__key_length_mla": 192}, "architecture deepseek2 has multi-head latent attention"),
        ("gpt2", {}, "architecture gpt2 has no RoPE, so it has no frequency chunks; FASA does not apply"),
        ("mamba", {}, "architecture mamba has no RoPE"),
        ("bert", {}, "architecture bert has no attention layer with a KV cache; FASA does not apply"),
        ("qwen2", {"attention__causal": False}, "architecture qwen2 has no attention layer with a KV cache"),
        ("llama", {"attention__head_count_kv": 0}, "architecture llama has no attention layer with a KV cache"),
        ("llama", {"block_count": 0}, "key llama.block_count: expected 1 to 4096, found 0"),
        ("llama", {"block_count": 10**6}, "key llama.block_count: expected 1 to 4096, found 1000000"),
        ("llama", {"block_count": "4"}, "key llama.block_count: expected u32, found str"),
        (
            "llama",
            {"attention__head_count_kv": [1, 2]},
            "key llama.attention.head_count_kv: expected 4 whole numbers from 0 to 65535, or one for all "
            "layers, found 2 values",
        ),
        (
            "llama",
            {"attention__head_count_kv": [1, 2, -3, 4]},
            "key llama.attention.head_count_kv: expected 4 whole numbers .*, found -3",
        ),
        (
            "llama",
            {"attention__head_count_kv": 10**6},
            "key llama.attention.head_count_kv: expected 4 whole numbers .*, found 1000000",
        ),
        (
            "llama",
            {"attention__head_count_kv": "x"},
            "key llama.attention.head_count_kv: expected u32 or i32 or array, found str",
        ),
        (
            "llama",
            {"attention__key_length": 10**6},
            "key llama.attention.key_length: expected 0 to 65536, found 1000000",
        ),
        ("llama", {"nextn_predict_layers": 4}, "key llama.nextn_predict_layers: expected 0 to 3, found 4"),
    ],
)
def test_models_out_of_scope_and_lying_metadata(tmp_path, arch, keys, message):
    with pytest.raises(FasaError, match=f"{arch}.gguf: {message}"):
        shape.read_shape(header(tmp_path, arch, **{**BASE, **keys}))


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(FasaError, match=r"key llama.attention.head_count: expected u32 or i32 or array, found nothing"):
        shape.read_shape(header(tmp_path, "llama", block_count=4, embedding_length=64))


MODELS = sorted((ROOT / "build" / "archs").glob("*.gguf"))


@pytest.mark.skipif(not MODELS, reason="no models in build/archs; run `make upstream-tests`")
def test_shapes_are_those_of_the_loader(library):
    """Every architecture that the pinned source's own tests write: the metadata say what llama.cpp says."""
    from fasa_gguf.session import Session

    compared = 0
    for path in MODELS:
        try:
            found = shape.read_shape(GGUFFile(path))
            session = Session(path, n_ctx=256, n_threads=1)
        except FasaError:
            continue
        with session:
            info = session.fasa.model_info()
            layers = [session.fasa.layer_shape(il) for il in range(info["n_layer"])]
            if not any(kv for _, kv, _, _ in layers):
                continue
            compared += 1
            assert len(layers) == len(found.n_head_kv) and not info["is_mla"]
            assert found.layout == ("norm", "neox")[info["rope_layout"]] and found.rope_base == pytest.approx(
                info["rope_base"]
            )
            assert found.n_rot == max(n_rot for *_, n_rot in layers)
            for (n_head, n_head_kv, width, _), *ours in zip(
                layers, found.n_head, found.n_head_kv, found.head_dim, strict=True
            ):
                assert n_head_kv == 0 or (ours[:2] == [n_head, n_head_kv] and ours[2] in (width, -1))
    assert compared > 80
