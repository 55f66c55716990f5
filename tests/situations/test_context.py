"""Reported situations: what the KV cache holds, and what happens at its edges.

Every test's docstring: repository#issue, what people report, and what is right. docs/lab/situations.md lists them.
"""

import resource

import numpy as np
import pytest
from reported import ALL, ON, python, sparse_steps, streamed, text_of
from tiny_archs import write_hybrid
from tiny_gguf import write_tiny

from fasa_gguf import FasaError
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

NO_END = {"logit_bias": {2: -1000.0}}  # the model's end of text
TOKENS = np.random.default_rng(0).integers(3, 250, 300).tolist()


@pytest.fixture
def session(tiny, profile):
    """Opens sessions that decode with FASA, and closes them."""
    made = []

    def make(params=ON, **kw):
        made.append(Session(tiny, **{"n_ctx": 512, "n_threads": 1, **kw}))
        made[-1].fasa.set_profile(profile)
        made[-1].fasa.set_params(params)
        return made[-1]

    yield make
    for s in made:
        s.close()


def logits_of(llm):
    """Of the last token that was evaluated."""
    import llama_cpp

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()


def greedy(llm, n=8):
    """Tokens that continue what was evaluated."""
    out = []
    for _ in range(n):
        out.append(llm.sample(temp=0.0))
        llm.eval([out[-1]])
    return out


def test_prefixes_are_saved_and_asked_in_turn(make, profiled):
    """abetlen/llama-cpp-python#997: going back and forth between saved states fails an assertion. Each state continues
    as its own prefix does, also when it is sampled from at once."""
    llm, states, first = make(profiled), {}, {}
    for c in "ab":
        llm.reset()
        llm.eval(llm.tokenize(c.encode() * 150))
        states[c], first[c] = llm.save_state(), logits_of(llm)

    def ask(c, question):
        llm.load_state(states[c])
        llm.eval(llm.tokenize(question, add_bos=False))
        return greedy(llm)

    def fresh(c, question):
        new = make(profiled)
        new.eval(new.tokenize(c.encode() * 150))
        new.eval(new.tokenize(question, add_bos=False))
        return greedy(new)

    llm.reset_fasa_stats()
    assert [ask(c, q) for c in "aba" for q in (b"what", b"who")] == [
        fresh(c, q) for c in "aba" for q in (b"what", b"who")
    ]
    assert sparse_steps(llm) == 6 * 8
    for c in "abab":
        llm.load_state(states[c])
        llm.sample(temp=0.0)  # the logits are not in a state
        assert np.abs(logits_of(llm) - first[c]).max() < 0.05


def test_a_state_of_another_model_leaves_no_trace(make, profiled, tmp_path):
    """ggml-org/llama.cpp#1585: a prompt cache that does not fit gives nonsense later. It is refused with a sentence,
    and the next text is right."""
    other = tmp_path / "other.gguf"
    write_tiny(other, seed=9, n_layer=2)
    own = synthetic_profile(*model_shape(GGUFFile(other)))
    small, big = make(profiled, n_ctx=256), make(profiled, n_ctx=1024, n_batch=64)
    big.eval(big.tokenize(b"a" * 800))
    want = text_of(make(profiled, n_ctx=256), "a" * 100)
    with pytest.raises(FasaError, match="has 804 tokens of a vocabulary of 259, expected at most 256"):
        small.load_state(big.save_state())
    assert text_of(small, "a" * 100) == want
    two = make(other, fasa_profile=own)
    two.eval(two.tokenize(b"a" * 100))
    with pytest.raises(FasaError, match="does not take this state: it is of another model or another type of cache"):
        small.load_state(two.save_state())
    assert text_of(small, "a" * 100) == want
    small.reset()
    small.eval(small.tokenize(b"a" * 100))
    big.load_state(small.save_state())  # another n_ctx and n_batch are fine
    assert greedy(big) == greedy(small) and len(big.input_ids) == 1024


def test_a_disk_cache_serves_the_next_process(make, profiled, tmp_path):
    """abetlen/llama-cpp-python#363: saving to LlamaDiskCache fails, since the state cannot be pickled. A second model
    object finds the prompt there: one token of it is computed."""
    from llama_cpp import LlamaDiskCache

    texts = []
    for prefills in (2, 1):
        llm = make(profiled)
        llm.set_cache(LlamaDiskCache(str(tmp_path / "cache")))
        texts.append(text_of(llm, "a" * 200))
        assert llm.fasa_stats()["steps_prefill"] == prefills and sparse_steps(llm) > 0
    assert texts[0] == texts[1]


def test_a_context_is_shifted_when_it_is_full(session):
    """ggml-org/llama.cpp#7578: after the oldest tokens are dropped and the rest shifted, the model writes garbage. The
    dominant keys follow the shift: deriving all anew changes no bit, and attending all gives what dense gives."""
    s = session()
    s.decode(TOKENS, 0)
    s.decode([9], 300)
    s.llama.llama_memory_seq_rm(s.memory, 0, 4, 104)
    s.llama.llama_memory_seq_add(s.memory, 0, 104, -1, -100)
    logits = {}
    for name, change in {
        "shifted": lambda: None,
        "anew": s.fasa.invalidate,
        "all": lambda: s.fasa.set_params(ALL),
        "dense": lambda: s.fasa.set_params(None),
    }.items():
        change()
        logits[name] = s.decode([11], 201)
        s.remove(0, 201)
    assert np.array_equal(logits["shifted"], logits["anew"])
    assert np.abs(logits["all"] - logits["dense"]).max() < 0.05 < np.abs(logits["shifted"] - logits["dense"]).max()
    assert s.fasa.counters()["steps_sparse"] == 4


def test_generation_runs_into_the_end_of_the_context(make, profiled):
    """JamePeng/llama-cpp-python#70: `generate` up to the end of the context ends the process. It raises one sentence; a
    completion has the text up to there, also when it ends within a character; and the model goes on."""
    from llama_cpp import LlamaGrammar

    llm, n = make(profiled, n_ctx=256), 0
    with pytest.raises(FasaError, match="the context of 256 tokens is full; use a larger n_ctx"):
        for _ in llm.generate(llm.tokenize(b"a" * 200), temp=0.0):
            n += 1
    assert n == 256 - 204 + 1
    smiles = LlamaGrammar.from_string('root ::= "😀"+')
    for prompt in ("a" * 199, "a" * 200, "a" * 201):
        kw = {"max_tokens": 1000, "temperature": 0, "grammar": smiles, **NO_END}
        done = llm.create_completion(prompt, **kw)["choices"][0]
        assert set(done["text"]) == {"😀"} and len(done["text"]) >= 12 and done["finish_reason"] == "length"
        chunks = [chunk["choices"][0] for chunk in llm.create_completion(prompt, stream=True, **kw)]
        assert "".join(c["text"] for c in chunks) == done["text"] and chunks[-1]["finish_reason"] == "length"
    assert text_of(llm, "b" * 200) == text_of(make(profiled, n_ctx=256), "b" * 200) and sparse_steps(llm) > 100


@pytest.mark.parametrize("kw", [{}, {"logits_all": True}, {"n_batch": 8}], ids=str)
def test_a_context_of_200_tokens(make, profiled, kw):
    """abetlen/llama-cpp-python#1438: "index 200 is out of bounds": with n_ctx=200 llama.cpp makes 256 cells and
    llama_cpp keeps 200 tokens. All 256 can be used."""
    llm = make(profiled, n_ctx=200, **kw)
    text_of(llm, "a" * 100, 1024, **NO_END)
    assert llm.n_tokens == len(llm.input_ids) == 256 and sparse_steps(llm) > 100
    text_of(llm, "b" * 220, 1024, **NO_END)
    assert llm.n_tokens == 256 and llm.input_ids[230:].all()


def test_a_prompt_longer_than_the_context(make, profiled):
    """abetlen/llama-cpp-python#416: "Requested tokens exceed context window of 512" again and again. It names both
    numbers, and the next prompt works."""
    llm = make(profiled, n_ctx=256)
    with pytest.raises(ValueError, match=r"Requested tokens \(404\) exceed context window of 256"):
        text_of(llm, "a" * 400)
    assert text_of(llm, "a" * 100) == text_of(make(profiled), "a" * 100) and sparse_steps(llm) > 0


def test_n_ctx_0_takes_what_the_model_was_trained_on(make, library, tmp_path):
    """abetlen/llama-cpp-python#988: Llama(n_ctx=0) crashes. The context is the model's own, rounded up."""
    path = tmp_path / "short.gguf"
    write_tiny(path, n_ctx=300)
    llm = make(path, n_ctx=0, fasa_profile=synthetic_profile(*model_shape(GGUFFile(path))))
    assert llm.n_ctx() == len(llm.input_ids) == 512
    text_of(llm, "a" * 100, 1000, **NO_END)
    assert llm.n_tokens == 512 and sparse_steps(llm) > 300


def test_other_sequences_in_the_cells_before(session):
    """ggml-org/llama.cpp#4113: what stands in earlier cells changes the tokens of a sequence. It does not: the same
    selection up to rounding, whatever cells a sequence has."""
    logits = []
    for n_other in (0, 37, 150):
        s = session(n_ctx=1024, n_seq_max=2, kv_unified=True)
        if n_other:
            s.decode([8] * n_other, 0, seq=1)
        s.decode(TOKENS[:200], 0)
        logits.append(np.stack([s.decode([7 + i], 200 + i) for i in range(4)]))
        assert s.fasa.counters()["steps_sparse"] == 4
    assert max(np.abs(x - logits[0]).max() for x in logits) < 1e-3
    assert np.abs(logits[0]).max() > 1


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_that_decode_together(session, unified):
    """ggml-org/llama.cpp#8935: with --parallel 4 the answers are foolish. Each of four sequences gets what it gets
    alone; a prefix is shared and its first owner gone."""
    s = session(n_ctx=2048, n_seq_max=4, kv_unified=unified)
    s.decode(TOKENS[:200], 0)
    for seq in (1, 2, 3):
        s.copy(0, seq)
    s.remove(0, 0)
    s.decode(TOKENS[200:], 0)
    s.decode_batch([(20 + seq, 200 if seq else 100, seq, True) for seq in range(4)])
    together = [s.logits(i) for i in range(4)]
    alone = session()
    for seq, got in enumerate(together):
        alone.clear()
        tokens = TOKENS[:200] if seq else TOKENS[200:]
        alone.decode(tokens, 0)
        assert np.abs(alone.decode([20 + seq], len(tokens)) - got).max() < 1e-3
    assert s.fasa.counters()["steps_sparse"] == 1 and alone.fasa.counters()["steps_sparse"] == 4


def test_a_sequence_that_the_context_does_not_have(session):
    """abetlen/llama-cpp-python#2045: "GGML_ASSERT(seq_id >= 0 && seq_id < seq_to_stream.size())" ends the process. A
    sentence says which sequences there are."""
    s = session(n_seq_max=2)
    s.decode(TOKENS[:50], 0)
    state = s.state()
    for use in (
        lambda: s.copy(0, 2),
        lambda: s.copy(300, 0),
        lambda: s.remove(300, 0),
        lambda: s.state(-1),
        lambda: s.set_state(state, 2),
    ):
        with pytest.raises(FasaError, match=r"sequence (2|300|-1): expected 0 to 1; open the session with a larger"):
            use()
    with pytest.raises(FasaError, match="invalid seq_id"):
        s.decode([7], 50, seq=2)
    assert np.isfinite(s.decode([7], 50)).all() and s.fasa.counters()["steps_sparse"] == 1


def test_a_gap_in_the_positions(session):
    """ggml-org/llama.cpp#17316: a batch at a wrong position is an "invalid input batch" with code -1. The sentence has
    llama.cpp's reason, nothing is counted, and the sequence goes on."""
    s = session()
    s.decode(TOKENS[:100], 0)
    want = s.decode([7], 100)
    s.remove(0, 100)
    before = s.fasa.counters()
    with pytest.raises(FasaError, match=r"starting position of Y = 130 it is required that .* consecutive: Y = X . 1"):
        s.decode([7], 130)
    assert s.fasa.counters() == before and np.array_equal(s.decode([7], 100), want)


def test_more_tokens_than_the_context_in_one_batch(session):
    """ggml-org/llama.cpp#9667: a batch of more tokens than the context segfaults. It is refused before llama.cpp sees
    it, and so is one that no longer fits; the context goes on."""
    s = session(n_ctx=256)
    with pytest.raises(FasaError, match=r"expected a batch of 1 to 256 tokens .*, found 300"):
        s.decode_batch([(5, i, 0, False) for i in range(300)])
    s.decode(TOKENS[:250], 0)
    with pytest.raises(FasaError, match="the context of 256 tokens is full"):
        s.decode(TOKENS[:10], 250)
    assert np.isfinite(s.decode([7], 250)).all() and s.fasa.counters()["steps_sparse"] == 1


def test_a_hybrid_model_is_asked_twice(make, library, tmp_path):
    """abetlen/llama-cpp-python#2140: the second call of a model of LFM2's kind fails with ret = -1, since its state
    cannot go back to a shared prefix. It reads the prompt anew, and the text is the same."""
    path = tmp_path / "lfm2.gguf"
    write_hybrid(path)
    own = synthetic_profile(*model_shape(GGUFFile(path)))
    prompt = [5 + i % 50 for i in range(150)]

    def tokens(llm, prompt):
        return [t for _, t in zip(range(6), llm.generate(prompt, temp=0.0), strict=False)]

    llm = make(path, fasa_profile=own)
    first = tokens(llm, prompt)
    assert tokens(llm, prompt) == first and sparse_steps(llm) > 0
    other = [*prompt[:100], 7, 8]
    assert tokens(llm, other) == tokens(make(path, fasa_profile=own), other)


def test_two_contexts_of_one_model_in_two_threads(make, profiled, profile):
    """SciSharp/LLamaSharp#431: may two contexts of one model be used at once? They may: each has its own dominant keys,
    settings and counters."""
    import ctypes
    import threading

    import llama_cpp

    from fasa_gguf.runtime.context import Context

    llm = make(profiled)
    second = llama_cpp.llama_init_from_model(llm._model.model, llm.context_params)
    fasa = Context(ctypes.cast(second, ctypes.c_void_p).value)
    fasa.set_profile(llm._fasa_profile)
    fasa.set_params(ON.replace(budget=90))

    def run(ctx):
        batch, out, pos = llama_cpp.llama_batch_init(512, 0, 1), [], 0
        tokens = TOKENS[:200]
        for _ in range(30):
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, pos + i, 1, 0
                batch.logits[i] = i == len(tokens) - 1
            assert llama_cpp.llama_decode(ctx, batch) == 0
            pos += len(tokens)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, -1), (llm.n_vocab(),))
            tokens = [int(logits.argmax())]
            out += tokens
        llama_cpp.llama_batch_free(batch)
        return out

    def clear(*contexts):
        for ctx in contexts:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)

    try:
        alone = {ctx: run(ctx) for ctx in (llm._ctx.ctx, second)}
        clear(*alone)
        together = {}
        threads = [threading.Thread(target=lambda c=c: together.update({c: run(c)})) for c in alone]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert together == alone and fasa.counters()["steps_sparse"] == 58 == llm.fasa_stats()["steps_sparse"]
        assert fasa.params().budget == 90 and llm.fasa.budget == 64
    finally:
        llama_cpp.llama_free(second)


def test_memory_does_not_grow(session):
    """abetlen/llama-cpp-python#924: the memory of a process grows with every llama_decode. Thousands of sparse steps,
    copies and removals take no more."""
    s = session(n_seq_max=2)
    s.decode(TOKENS[:200], 0)

    def steps(n):
        for _ in range(n):
            s.decode([7], 200)
            s.remove(0, 200)
            s.copy(0, 1)
            s.remove(1, 0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = steps(300)
    assert steps(1500) - before < 2048  # KiB
    assert s.fasa.counters()["steps_sparse"] == 1800


def test_a_model_is_loaded_and_freed_again_and_again(profiled):
    """abetlen/llama-cpp-python#1442: `del llm` does not free the model's memory. It does, the dominant keys' too."""
    code = (
        "import sys, resource; sys.path.insert(0, 'tests/helpers')\nfrom reported import ON, text_of\n"
        "from fasa_gguf import Llama\ndef once():\n"
        "    text_of(Llama(sys.argv[1], n_ctx=4096, n_threads=1, fasa=ON, verbose=False), 'a' * 100, 3)\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "[once() for _ in range(5)]\nbefore = peak()\n[once() for _ in range(40)]\nprint(peak() - before)"
    )
    run = python(code, profiled)
    assert run.returncode == 0 and int(run.stdout) < 4096, run.stderr  # KiB; a context takes 3 MiB


def test_an_answer_is_given_up_and_another_begun(make, profiled):
    """oobabooga/textgen#5939: a second request right after one was cancelled segfaults. The new one is right; the old
    stream, if it is asked again, says that it cannot go on."""
    from llama_cpp import LlamaGrammar

    letters = LlamaGrammar.from_string('root ::= "abcdefghijklmnopqrstuvwxyz"')
    llm, kw = make(profiled), {"max_tokens": 26, "temperature": 0, "grammar": letters}
    old = llm.create_completion("a" * 200, stream=True, **kw)
    assert [next(old)["choices"][0]["text"] for _ in range(5)] == list("abcde")
    want = text_of(make(profiled), "b" * 200)
    assert text_of(llm, "b" * 200) == want and sparse_steps(llm) > 5
    with pytest.raises(FasaError, match="this generation cannot go on: another call has used the model since"):
        list(old)
    assert text_of(llm, "b" * 200) == want and "".join(streamed(llm, "a" * 200, 26, grammar=letters)) == (
        "abcdefghijklmnopqrstuvwxyz"
    )
