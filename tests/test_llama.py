"""The drop-in's edges: switching, closing, pickling, enable(), what it refuses. What it computes is in test_laws.py."""

import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from paths import ROOT

from fasa_gguf import FasaError, FasaParams, runtime
from fasa_gguf.gguf import shape
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.profile import embed
from fasa_gguf.runtime.settings import ContextSettings
from fasa_gguf.speed.random_model import synthetic_profile

ON = FasaParams(chunks=4, budget=64, min_context=0)


@pytest.fixture(scope="module")
def profiled(library, tiny, tmp_path_factory):
    profile = synthetic_profile(*shape.model_shape(GGUFFile(tiny)))
    return str(embed.rewrite(tiny, profile, tmp_path_factory.mktemp("llama") / "tiny.gguf"))


@pytest.fixture
def make(library):
    """A Llama of the drop-in that the test need not close."""
    from fasa_gguf import Llama

    made = []

    def llama(path, **kwargs):
        made.append(Llama(path, verbose=False, **{"n_ctx": 512, **kwargs}))
        return made[-1]

    yield llama
    for llm in made:
        llm.close()


def steps(llm, prompt):
    llm.reset_fasa_stats()
    llm.create_completion(prompt, max_tokens=5, temperature=0)
    return llm.fasa_stats()["steps_sparse"]


def test_a_live_model_switches(make, profiled):
    llm = make(profiled, fasa=ON)
    assert llm.fasa == ON and steps(llm, "a" * 200) > 0
    llm.fasa = "off"
    assert llm.fasa == "off" and steps(llm, "b" * 200) == 0
    llm.fasa = ON.replace(budget=99)
    assert llm.fasa.budget == 99 and steps(llm, "c" * 200) > 0
    with pytest.raises(
        FasaError, match='fasa=\'on\': expected "auto", "off", "fast", "balanced", "careful" or FasaParams'
    ):
        llm.fasa = "on"
    assert llm.fasa.budget == 99


def test_auto_takes_settings_from_the_environment(make, profiled, monkeypatch):
    monkeypatch.setenv("FASA_BUDGET", "77")
    assert make(profiled).fasa.budget == 77
    assert make(profiled, fasa=ON).fasa.budget == ON.budget


def test_a_quality_is_a_choice(make, profiled, monkeypatch):
    monkeypatch.setenv("FASA_SINK", "9")
    llm = make(profiled, fasa="careful")
    assert (llm.fasa.mass, llm.fasa.cap, llm.fasa.sink) == (pytest.approx(0.985), 8192, 9)
    llm.set_fasa("fast")
    assert (llm.fasa.mass, llm.fasa.cap) == (pytest.approx(0.9), 1024)
    with pytest.raises(FasaError, match='fasa=\'best\': expected "auto", "off", "fast", "balanced", "careful" or Fasa'):
        llm.fasa = "best"


def test_a_quality_without_a_profile_is_refused(make, tiny):
    with pytest.raises(FasaError, match="no FASA profile in"):
        make(str(tiny), fasa="careful")


def test_a_model_loaded_off_can_be_switched_on(make, profiled, tiny):
    assert make(profiled, fasa="off").context_params.flash_attn_type == 0  # llama_cpp's own default
    with pytest.raises(FasaError, match="loaded without flash attention"):
        make(profiled, fasa="off").set_fasa("auto")
    llm = make(profiled, fasa="off", flash_attn=True)
    llm.set_fasa(ON)
    assert steps(llm, "a" * 200) > 0
    with pytest.raises(FasaError, match=r"no FASA profile in .*tiny\.gguf; run"):
        make(str(tiny), fasa="off", flash_attn=True).set_fasa(ON)


def test_a_closed_model_says_so(make, profiled):
    llm = make(profiled)
    llm.close()
    for use in (
        llm.fasa_stats,
        llm.reset_fasa_stats,
        lambda: llm.fasa,
        lambda: llm.set_fasa("off"),
        lambda: text_of(llm, "a"),
        lambda: next(llm.create_completion("a", stream=True)),
        lambda: llm.tokenize(b"a"),
        lambda: llm.detokenize([5]),
        lambda: llm.eval([5]),
        lambda: next(llm.generate([5])),
        lambda: llm.sample(),
        llm.save_state,
        llm.token_bos,
        lambda: llm.ctx,
    ):
        with pytest.raises(FasaError, match="this model is closed"):
            use()


def test_a_closed_session_says_so(library, profiled):
    from fasa_gguf.session import Session

    s = Session(profiled, n_ctx=256)
    s.close()
    s.close()
    for use in (lambda: s.decode([1], 0), lambda: s.tokenize("a"), s.clear, s.state, lambda: s.fasa):
        with pytest.raises(FasaError, match=r"tiny\.gguf: this session is closed"):
            use()


def test_the_context_of_llama_cpps_arguments(library):
    from fasa_gguf.llama import context_settings

    assert context_settings({}, "auto") == ContextSettings(n_ctx=512, mode="auto")  # llama_cpp.Llama's own defaults
    kwargs = {"n_ctx": 0, "n_batch": 64, "n_threads": None, "n_gpu_layers": -1, "type_k": 8, "type_v": 99}
    found = context_settings({**kwargs, "offload_kqv": False, "swa_full": False, "rope_freq_base": 1.0}, "host")
    assert found == ContextSettings(
        n_ctx=0, n_batch=64, n_gpu_layers=-1, type_k="q8_0", no_kv_offload=True, swa_full=False, mode="host"
    )


def test_a_model_is_parsed_once(make, profiled, monkeypatch):
    opened = []
    monkeypatch.setattr(runtime.devices, "cuda_devices", lambda: ["CUDA0"])
    monkeypatch.setattr(runtime.devices, "device_memory", lambda name: (80 << 30, 80 << 30))
    parse = GGUFFile._parse
    monkeypatch.setattr(GGUFFile, "_parse", lambda self, reader: (opened.append(self.path.name), parse(self, reader)))
    assert make(profiled, n_gpu_layers=-1).fasa_mode == "device" and opened == ["tiny.gguf"]


def test_a_pickle_keeps_the_settings(make, profiled):
    llm = make(profiled, fasa=ON)
    assert pickle.loads(pickle.dumps(llm)).fasa == ON
    llm.fasa = "off"
    assert pickle.loads(pickle.dumps(llm)).fasa == "off"


def test_drafts_do_not_change_the_text(make, profiled):
    """Prompt lookup decodes several tokens in a step; with all tokens attended the greedy text is the same."""
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    on = ON.replace(chunks=8, budget=512)
    texts = []
    for draft in (None, LlamaPromptLookupDecoding(num_pred_tokens=4)):
        llm = make(profiled, fasa=on, draft_model=draft)
        texts.append(llm.create_completion("abcab" * 40, max_tokens=30, temperature=0)["choices"][0]["text"])
        assert llm.fasa_stats()["steps_sparse"] > 0
    assert texts[0] == texts[1]


def test_auto_never_refuses_what_llama_cpp_takes(make, profiled, tiny, tmp_path, capfd):
    from fasa_gguf import Llama

    with pytest.raises(ValueError, match="Model path does not exist"):  # llama_cpp's own
        Llama(str(tmp_path / "none.gguf"))
    data = bytearray(Path(profiled).read_bytes())
    at = data.index(b"fasa.version") + len("fasa.version") + 4  # behind the key and its type
    data[at] = 99
    bad = tmp_path / "newer.gguf"
    bad.write_bytes(data)
    assert make(bad).fasa == "off"  # a Path, too
    err = capfd.readouterr().err
    assert "newer.gguf: key fasa.version: expected at most 1, found 99" in err and "decoding is dense" in err
    with pytest.raises(FasaError, match=r"key fasa\.version"):
        make(bad, fasa=ON)
    other = synthetic_profile([2] * 2, [8] * 2)
    with pytest.raises(FasaError, match="2 layers"):
        make(profiled, fasa_profile=other)  # a profile that was given must fit
    assert make(profiled, vocab_only=True).fasa == "off" and "fasa_gguf" not in capfd.readouterr().err


def test_vision_is_refused(library):
    from llama_cpp import llama_chat_format

    from fasa_gguf import Llama

    for name in ("Llava15ChatHandler", "MTMDChatHandler", "Qwen25VLChatHandler"):
        with pytest.raises(FasaError, match="vision needs libmtmd"):
            getattr(llama_chat_format, name)(clip_model_path="mmproj.gguf")
    handler = type("Handler", (), {"clip_model_path": "mmproj.gguf"})()
    with pytest.raises(FasaError, match="vision needs libmtmd"):
        Llama("m.gguf", chat_handler=handler)


def test_enable_serves_code_that_is_not_ours(profiled):
    """llama_cpp.server hands flash_attn=False on when nobody asked for it; enable() must not be dense for that."""
    code = (
        "import sys, fasa_gguf\n"
        "fasa_gguf.enable(fasa_gguf.FasaParams(chunks=4, budget=70, min_context=0))\n"
        "import llama_cpp\nfrom llama_cpp import Llama\n"
        "m = Llama(model_path=sys.argv[1], n_ctx=512, flash_attn=False, verbose=False)\n"
        "m.create_completion('a' * 200, max_tokens=5, temperature=0)\n"
        "print(m.fasa.budget, m.fasa_stats()['steps_sparse'] > 0, Llama is llama_cpp.llama.Llama is fasa_gguf.Llama)"
    )
    run = subprocess.run([sys.executable, "-c", code, profiled], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.split() == ["70", "True", "True"], run.stderr
    run = subprocess.run(
        [sys.executable, "-c", "import fasa_gguf; fasa_gguf.enable('on')"], capture_output=True, text=True, cwd=ROOT
    )
    assert "fasa='on': expected" in run.stderr


# ---- what is a prompt ----


def kinds(llm, call):
    """The ubatches of each kind that a call computes: sparse, dense, prompt."""
    llm.reset_fasa_stats()
    call()
    s = llm.fasa_stats()
    return s["steps_sparse"], s["steps_dense"], s["steps_prefill"]


def text_of(llm, prompt, n=8):
    return llm.create_completion(prompt, max_tokens=n, temperature=0)["choices"][0]["text"]


def test_a_prompt_is_dense_in_batches_of_any_size(make, profiled):
    llm = make(profiled, fasa=ON, logits_all=True, n_batch=8)
    tokens = llm.tokenize(b"a" * 200)[:202]  # the last batch has two tokens
    assert kinds(llm, lambda: llm.eval(tokens)) == (0, 0, 26)
    llm.reset()
    assert kinds(llm, lambda: llm.eval(tokens[:193])) == (0, 0, 25)  # the last batch has one token
    assert kinds(llm, lambda: llm.eval([5])) == (1, 0, 0)


def test_drafts_of_the_default_length_are_decode_steps(make, profiled):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    llm = make(profiled, fasa=ON, logits_all=True, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=10))
    sparse, dense, prompt = kinds(llm, lambda: text_of(llm, "abcab" * 40, 40))
    assert sparse >= 4 and (dense, prompt) == (0, 2)  # its last token is evaluated alone


def test_drafts_beyond_the_first_batch(make, profiled):
    """Drafts need the logits of every token; llama_cpp has room for those of one batch."""
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    llm = make(profiled, fasa=ON, n_batch=64, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4))
    assert text_of(llm, "abcab" * 40, 20) == text_of(make(profiled, fasa=ON, n_batch=64), "abcab" * 40, 20)


def test_the_last_token_of_a_prompt_is_dense_when_its_prefix_is_reused(make, profiled):
    from llama_cpp import LlamaRAMCache

    llm, prompt = make(profiled, fasa=ON, n_ctx=1024), "the same prompt " * 20
    first = kinds(llm, lambda: text_of(llm, prompt))
    assert first[0] > 5 and first[1:] == (0, 2)
    reused = (first[0], 0, 1)
    assert kinds(llm, lambda: text_of(llm, prompt)) == reused  # all but its last token was there
    llm.set_cache(LlamaRAMCache())
    text_of(llm, prompt)
    text_of(llm, "something else " * 20)
    assert kinds(llm, lambda: text_of(llm, prompt)) == reused  # from the cache


def test_tokens_that_a_caller_sends_are_a_prompt(make, profiled):
    llm = make(profiled, fasa=ON, logits_all=True)
    tokens = llm.generate(llm.tokenize(b"a" * 100), temp=0.0)
    assert kinds(llm, lambda: next(tokens)) == (0, 0, 2)
    assert kinds(llm, lambda: next(tokens)) == (1, 0, 0)
    assert kinds(llm, lambda: tokens.send([5, 6, 7])) == (0, 0, 1)
    assert kinds(llm, lambda: next(tokens)) == (1, 0, 0)
    assert kinds(llm, lambda: llm.eval([5, 6])) == (0, 0, 1)  # while it waits
    tokens.close()


def test_settings_set_while_another_thread_generates(make, profiled):
    llm, prompt = make(profiled, fasa=ON, n_threads=2), "a" * 200
    want, stop, errors = text_of(llm, prompt, 40), threading.Event(), []

    def admin():
        while not stop.is_set():
            try:
                llm.fasa = ON
                llm.fasa_stats()
            except Exception as e:
                errors.append(e)

    thread = threading.Thread(target=admin)
    thread.start()
    try:
        texts = []
        for _ in range(4):
            llm.n_tokens = 0
            texts.append(text_of(llm, prompt, 40))
    finally:
        stop.set()
        thread.join()
    assert texts == [want] * 4 and not errors


def test_one_text_at_a_time(make, profiled):
    """A stream that another call overtakes says so, rather than go on in the other's context."""
    llm = make(profiled, fasa=ON)
    want = text_of(llm, "b" * 100)
    stream = llm.create_completion("a" * 100, max_tokens=20, temperature=0, stream=True)
    next(stream)
    assert text_of(llm, "b" * 100) == want
    with pytest.raises(FasaError, match="this generation cannot go on: another call has used the model since"):
        list(stream)
    abandoned = llm.create_completion("c" * 100, max_tokens=20, temperature=0, stream=True)
    next(abandoned)
    del abandoned
    assert text_of(llm, "b" * 100) == want


def test_threads_that_share_a_model_wait_for_each_other(make, profiled):
    llm = make(profiled, fasa=ON, n_threads=2)
    prompts = [letter * 150 for letter in "abcdef"]
    want = [text_of(llm, p, 30) for p in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(lambda p: text_of(llm, p, 30), prompts)) == want
    assert [text_of(llm, p, 30) for p in prompts] == want
