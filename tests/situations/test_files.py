"""Reported situations: model files and how they are loaded. As test_context.py."""

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFEndian, GGUFWriter
from reported import ON, python, sparse_steps, text_of
from tiny_gguf import write_tiny

from fasa_gguf import FasaError
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.speed.random_model import synthetic_profile

PROMPT = "a" * 200
COMMANDS = (["inspect"], ["plan"], ["run", "-p", "a"], ["embed-profile"])


@pytest.fixture
def refusals(capsys):
    """What each command says about a file that it cannot use; every one ends with 1 and one line."""

    def say(path):
        lines = []
        for command, *rest in COMMANDS:
            assert cli.main([command, str(path), *rest]) == 1
            lines.append(capsys.readouterr().err.splitlines()[-1])
        return lines

    return say


@pytest.mark.parametrize(
    "name", ["\u043c\u043e\u0434\u0435\u043b\u044c \u6a21\u578b \U0001f600.gguf", os.fsdecode(b"caf\xe9 au lait.gguf")]
)
def test_a_path_beyond_ascii(make, profiled, tmp_path, capfd, name):
    """ollama/ollama#3120: a model with Unicode in its path cannot be opened. It is decoded with FASA, and every command
    takes it; so is a name whose bytes are no UTF-8."""
    (tmp_path / "mit Leerzeichen").mkdir()
    path = tmp_path / "mit Leerzeichen" / name
    shutil.copy(profiled, path)
    llm = make(path)
    assert text_of(llm, PROMPT) == text_of(make(profiled), PROMPT) and sparse_steps(llm) > 0
    settings = ["--fasa-min-context", "0", "--fasa-budget", "64"]
    assert cli.main(["run", str(path), "-p", PROMPT, "-n", "4", *settings]) == 0
    assert "FASA in " in capfd.readouterr().err
    assert cli.main(["embed-profile", str(path), "--remove"]) == 0 and cli.main(["inspect", str(path)]) == 1


def test_a_model_in_several_files(make, profiled, profile, tmp_path, capsys):
    """ggml-org/llama.cpp#9613: parts that were joined with cat are an "invalid split file". The first part takes the
    profile and is decoded with FASA; a wrong part, a wrong name and joined parts are refused, each with the reason."""
    write_tiny(tmp_path / "m.gguf", writer={"split_max_tensors": 12})
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    profile.save(tmp_path / "p.json")
    embed = ["embed-profile", "--profile", str(tmp_path / "p.json")]
    assert cli.main([*embed, str(parts[0])]) == 0
    llm = make(parts[0])
    assert text_of(llm, PROMPT) == text_of(make(profiled, fasa_profile=profile), PROMPT) and sparse_steps(llm) > 0
    for command, *rest in COMMANDS:
        assert cli.main([command, str(parts[1]), *rest]) == 1
        assert "this is file 2 of 3 of a split model" in capsys.readouterr().err
    joined = tmp_path / "joined.gguf"
    joined.write_bytes(b"".join(p.read_bytes() for p in parts))
    assert cli.main(["run", str(joined), "-p", "a"]) == 1
    assert "llama.cpp says: llama_model_load: error loading model: invalid split file name" in capsys.readouterr().err
    for argv in ([*embed, str(joined)], [*embed, str(parts[0]), "-o", str(tmp_path / "out.gguf")]):
        assert cli.main(argv) == 1
        assert "file 1 of 3 of a split model, which llama.cpp tells by its name; expected" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    assert cli.main([*embed, str(parts[0]), "-o", str(tmp_path / "other" / parts[0].name)]) == 0
    assert capsys.readouterr().err.count("the model cannot be loaded without this file; put it there") == 2
    parts[2].unlink()
    assert cli.main(["run", str(parts[0]), "-p", "a"]) == 1
    assert "m-00003-of-00003.gguf' (No such file or directory)" in capsys.readouterr().err


def test_a_big_endian_file(refusals, tmp_path):
    """ggml-org/llama.cpp#8154: a file of the other byte order "fails to load". It is named, with the tool for it."""
    path = tmp_path / "be.gguf"
    write_tiny(path, writer={"endianess": GGUFEndian.BIG})
    assert all("a big-endian GGUF file, expected little-endian; convert it with" in line for line in refusals(path))


def test_a_download_that_was_cut_short(refusals, library, profiled, tmp_path):
    """ollama/ollama#6228: "tensor 'blk.2.ffn_down.weight' data is not within the file bounds". Every command names the
    tensor and what is missing; the drop-in's reason is on stderr, verbose or not."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(Path(profiled).read_bytes()[:-5000])
    assert all("tensor blk.2.ffn_down.weight needs bytes up to" in line for line in refusals(path))
    code = (
        "import sys\nfrom fasa_gguf import Llama\ntry: Llama(sys.argv[1], fasa='off', verbose=False)\n"
        "except ValueError as e: print(e)"
    )
    run = python(code, path)
    assert run.stdout.strip() == f"Failed to load model from file: {path}"
    assert "tensor 'blk.2.ffn_down.weight' data is not within the file bounds" in run.stderr


def test_a_type_that_llama_cpp_removed(refusals, profiled, tmp_path):
    """ggml-org/llama.cpp#11258: a Q4_0_4_8 file no longer runs. The message names the type and what took its place."""
    data, name = bytearray(Path(profiled).read_bytes()), b"blk.0.attn_q.weight"
    struct.pack_into("<I", data, data.index(name) + len(name) + 4 + 2 * 8, 32)
    path = tmp_path / "old.gguf"
    path.write_bytes(data)
    lines = refusals(path)
    assert all("has the type Q4_0_4_8, which llama.cpp has removed; get the model as Q4_0" in line for line in lines)


@pytest.mark.parametrize(
    "content, found",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "this is a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>" + bytes(100), "this is a web page: download the file itself"),
        (b"tjgg" + bytes(100), "this is a GGML file, older than GGUF"),
    ],
    ids=["lfs", "page", "ggml"],
)
def test_what_was_downloaded_is_no_model(refusals, tmp_path, content, found):
    """ollama/ollama#3010: "invalid file magic": the file was a reference of Git LFS. What the file is, and how to get
    the model, is said; so for a web page and for files of before GGUF."""
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert all(found in line for line in refusals(path))


def test_keys_are_overridden_at_load(make, profiled):
    """abetlen/llama-cpp-python#1487: kv_overrides with strings do not arrive. Strings, flags and numbers do."""
    values = {"tokenizer.ggml.pre": "default", "tokenizer.ggml.add_bos_token": False, "llama.rope.freq_base": 20000.0}
    plain, llm = make(profiled), make(profiled, kv_overrides=values)
    assert llm.tokenize(b"abc")[0] != llm.token_bos() == plain.tokenize(b"abc")[0]
    assert text_of(llm, PROMPT) != text_of(plain, PROMPT) and sparse_steps(llm) > 0
    assert llm._fasa.model_info()["rope_base"] == 20000.0


def test_the_model_cannot_be_locked_in_memory(profiled):
    """abetlen/llama-cpp-python#708: "failed to mlock buffer: Cannot allocate memory". Where the limit forbids it the
    model works all the same, mapped or not."""
    code = (
        "import resource, sys; sys.path.insert(0, 'tests/helpers')\nfrom reported import ON, sparse_steps, text_of\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))\nfrom fasa_gguf import Llama\n"
        "for kw in ({}, {'use_mlock': True}, {'use_mmap': False}, {'use_mmap': False, 'use_mlock': True}):\n"
        "    llm = Llama(sys.argv[1], n_ctx=512, n_threads=1, fasa=ON, verbose=False, **kw)\n"
        "    print(text_of(llm, 'a' * 200).encode(), sparse_steps(llm))"
    )
    run = python(code, profiled)
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and len(lines) == 4 and len(set(lines)) == 1 and not lines[0].endswith(" 0"), run.stderr


def test_a_lora_adapter(make, profiled, tmp_path):
    """pytraveler/MiniMax-H3-Prompt-Rewriter-ComfyUI#2: a LoRA adapter is silently not applied, and unloading crashes.
    It changes the text, scale 0 does not, closing twice is fine; one that cannot be loaded is refused."""
    path, rng = tmp_path / "lora.gguf", np.random.default_rng(1)
    w = GGUFWriter(path, "llama")
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", 8.0)
    for name, rows in (("blk.0.attn_q", 64), ("blk.1.attn_k", 32)):
        for part, shape in (("a", (4, 64)), ("b", (rows, 4))):
            w.add_tensor(f"{name}.weight.lora_{part}", (rng.standard_normal(shape) * 0.3).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    texts = []
    for kw in ({}, {"lora_path": str(path)}, {"lora_path": str(path), "lora_scale": 0.0}):
        llm = make(profiled, **kw)
        texts.append(text_of(llm, PROMPT, 20))
        assert sparse_steps(llm) > 10
        llm.close()
    assert texts[0] == texts[2] != texts[1]
    for bad in (tmp_path / "none.gguf", profiled):
        for fasa in (ON, "off"):
            with pytest.raises(FasaError, match=r"\.gguf: llama\.cpp cannot load this LoRA adapter; expected one for"):
                make(profiled, lora_path=str(bad), fasa=fasa)


def test_a_quantised_v_cache(make, library, tmp_path):
    """ggml-org/llama.cpp#10378: "V cache quantization requires flash_attn". FASA turns flash attention on, so K and V
    of any types decode; without it llama.cpp's reason is on stderr, verbose or not."""
    path = tmp_path / "wide.gguf"
    write_tiny(path, n_layer=2, head_dim=32)
    profile = synthetic_profile(*model_shape(GGUFFile(path)))
    for k, v in ((8, 8), (2, 2), (8, 2), (1, 8)):  # q8_0, q4_0, f16
        llm = make(path, fasa_profile=profile, type_k=k, type_v=v)
        assert text_of(llm, PROMPT) and sparse_steps(llm) > 0
    code = "import sys\nfrom fasa_gguf import Llama\nLlama(sys.argv[1], type_v=8, fasa='off', verbose=False)"
    err = python(code, path).stderr
    assert "quantized V cache requires flash_attn to be enabled" in err and "Failed to create llama_context" in err
