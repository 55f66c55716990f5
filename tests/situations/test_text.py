"""Reported situations: what goes into a completion and what comes out. As test_context.py."""

import numpy as np
import pytest
from reported import ON, python, sparse_steps, streamed, text_of
from tiny_gguf import write_tiny

from fasa_gguf import FasaError
from fasa_gguf.cli import main as cli

PROMPT = "a" * 200


@pytest.fixture
def grammar(library):
    from llama_cpp import LlamaGrammar

    return lambda text: LlamaGrammar.from_string(f'root ::= "{text}"')


def test_characters_of_several_tokens_in_a_stream(make, profiled, grammar):
    """abetlen/llama-cpp-python#372: streams drop emojis, whose bytes are several tokens. Every piece is whole
    characters, and together they are the text."""
    llm, word = make(profiled), "h\u00e9llo \U0001f600 w\u00f6rld \u4f60\u597d"
    pieces = streamed(llm, PROMPT, 64, grammar=grammar(word))
    assert "".join(pieces) == word == text_of(llm, PROMPT, 64, grammar=grammar(word))
    assert "\U0001f600" in pieces and sparse_steps(llm) > 40


def test_a_stop_sequence_of_several_tokens_in_a_stream(make, profiled, grammar):
    """vllm-project/vllm#3574: a stream gives out the beginning of a stop sequence before it is complete. Nothing of it
    comes out, and what only looks like it does."""
    llm, text = make(profiled), grammar("abcDEFGHIJxyz")
    assert "".join(streamed(llm, PROMPT, 64, grammar=text, stop=["DEFGHIJ"])) == "abc"
    assert text_of(llm, PROMPT, 64, grammar=text, stop=["DEFGHIJ"]) == "abc"
    assert "".join(streamed(llm, PROMPT, 64, grammar=text, stop=["DEFGHIQ"])) == "abcDEFGHIJxyz"
    assert sparse_steps(llm) > 20


def test_an_empty_prompt(make, profiled, profile, tmp_path):
    """vllm-project/vllm#7283: an empty prompt kills the server. With a BOS it writes; without any token to continue it
    is refused with a sentence; the model goes on."""
    bare = tmp_path / "bare.gguf"
    write_tiny(bare, bos=None)
    assert text_of(make(profiled), "", 8)
    llm = make(bare, fasa_profile=profile)
    want = text_of(llm, PROMPT)
    for prompt in ("", []):
        with pytest.raises(FasaError, match="there is nothing to continue: expected a prompt of at least one token"):
            text_of(llm, prompt)
    assert text_of(llm, PROMPT) == want and sparse_steps(llm) > 0


@pytest.mark.parametrize("bos", [1, None])
def test_the_log_probability_of_each_token(make, profile, tmp_path, bos):
    """abetlen/llama-cpp-python#1983: token_logprobs are those of the next position. Each is its own token's, from the
    logits before it."""
    path = tmp_path / "m.gguf"
    write_tiny(path, bos=bos)
    llm = make(path, fasa_profile=profile, logits_all=True)
    got = llm.create_completion(PROMPT, max_tokens=6, temperature=0, logprobs=2)["choices"][0]["logprobs"]
    n, at = len(got["tokens"]), len(llm.tokenize(PROMPT.encode(), add_bos=bos is not None))
    logits = llm.scores[at - 1 : at - 1 + n].astype(np.float64)
    best = logits.max(1) - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) - logits.max(1)
    assert n >= 6 and np.allclose(got["token_logprobs"], best, atol=1e-4) and sparse_steps(llm) >= 5


@pytest.mark.parametrize("temperature", [0, 1.0, -1.0])
@pytest.mark.parametrize("begin", ["from fasa_gguf import Llama", "fasa_gguf.enable(ON)\nfrom llama_cpp import Llama"])
def test_a_grammar_that_leads_nowhere(profiled, begin, temperature):
    """ggml-org/llama.cpp#11591: the process ends where a grammar leaves no token. The answer ends with a sentence, a
    stream after what it wrote, and the model goes on; hidden tokens never come out."""
    code = (
        "import sys; sys.path.insert(0, 'tests/helpers')\nfrom reported import ON, streamed, text_of\n"
        "import fasa_gguf\n"
        f"{begin}\nfrom fasa_gguf import FasaError\nfrom llama_cpp import LlamaGrammar, LogitsProcessorList\n"
        "llm = Llama(sys.argv[1], n_threads=1, verbose=False, n_ctx=512)\nwant = text_of(llm, 'a' * 200)\n"
        "hidden = LogitsProcessorList([lambda ids, scores: scores - float('inf')])\n"
        "for bad in ('root ::= \"ab\" [b-a]', 'root ::= \"a\" x\\nx ::= [b-a]', hidden):\n"
        "    own = {'logits_processor': bad} if bad is hidden else {'grammar': LlamaGrammar.from_string(bad)}\n"
        "    for ask in (text_of, streamed):\n"
        f"        try: print(ask(llm, 'a' * 200, temperature={temperature}, top_k=5, **own))\n"
        "        except FasaError as e: print(str(e).startswith('no token can come next: the grammar leads nowhere'))\n"
        "print(text_of(llm, 'a' * 200) == want)"
    )
    run = python(code, profiled)
    assert run.returncode == 0 and run.stdout.split() == ["True"] * 7, run.stdout + run.stderr[-500:]


def test_a_grammar_that_cannot_be_parsed(profiled):
    """abetlen/llama-cpp-python#615: "error parsing grammar file: parsed_grammar.rules is empty". It is refused with a
    sentence, where llama_cpp now uses a null pointer, and the model goes on."""
    code = (
        "import sys; sys.path.insert(0, 'tests/helpers')\nfrom reported import ON, text_of\n"
        "from fasa_gguf import FasaError, Llama\nfrom llama_cpp import LlamaGrammar\n"
        "llm = Llama(sys.argv[1], n_threads=1, fasa=ON, verbose=False)\nwant = text_of(llm, 'a' * 200)\n"
        "for bad in ('root ::= answer', 'answer ::= \"x\"', 'root ::= (', 'nonsense'):\n"
        "    try: text_of(llm, 'a' * 200, grammar=LlamaGrammar.from_string(bad))\n"
        "    except FasaError as e: print(str(e).startswith('grammar: llama.cpp cannot parse it'))\n"
        "print(text_of(llm, 'a' * 200) == want)"
    )
    run = python(code, profiled)
    assert run.returncode == 0 and run.stdout.split() == ["True"] * 5, run.stdout + run.stderr[-500:]


def test_a_logits_processor_that_raises(make, profiled):
    """eth-sri/lmql#365: "Exception ignored on calling ctypes callback function", and a text as if there were no
    processor. The call raises what the processor raised, and the next one is right."""
    llm = make(profiled)
    want = text_of(llm, PROMPT)

    def fail(input_ids, scores):
        raise ZeroDivisionError("mine")

    for processor, error, match in ([fail], ZeroDivisionError, "mine"), (fail, TypeError, "not iterable"):
        with pytest.raises(error, match=match):
            text_of(llm, PROMPT, logits_processor=processor)
        assert text_of(llm, PROMPT) == want
    with pytest.raises(ZeroDivisionError):
        text_of(llm, PROMPT, stopping_criteria=fail)
    assert text_of(llm, PROMPT) == want and sparse_steps(llm) > 0


def test_the_same_seed_the_first_and_the_second_time(make, profiled):
    """oobabooga/textgen#6977: with a fixed seed the first text differs from the second, and that from no later one. It
    is the same from the first on, also in another process's model."""
    kw = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 77}
    llm = make(profiled)
    texts = [text_of(llm, PROMPT, 20, **kw) for _ in range(3)] + [text_of(make(profiled), PROMPT, 20, **kw)]
    assert len(set(texts)) == 1 and sparse_steps(llm) > 30
    assert text_of(llm, PROMPT, 20, **{**kw, "seed": 78}) != texts[0]


def test_tokens_are_banned_by_a_bias(make, profiled):
    """ggml-org/llama.cpp#13605: tokens biased to never show up do show up. None of them does."""
    llm = make(profiled)
    tokens = llm.tokenize(PROMPT.encode())
    usual = [t for _, t in zip(range(5), llm.generate(tokens, temp=0.0), strict=False)]
    text_of(llm, PROMPT, 20, logit_bias=dict.fromkeys(usual, -1000.0))
    written = llm.input_ids[len(tokens) : llm.n_tokens].tolist()
    assert len(written) > 10 and not set(written) & set(usual) and sparse_steps(llm) > 10


@pytest.mark.parametrize("mode", [1, 2])
def test_mirostat(make, profiled, mode):
    """abetlen/llama-cpp-python#312: mirostat seems impossible to use. Both modes write, each seed its own text."""
    llm = make(profiled)
    texts = [text_of(llm, PROMPT, 24, temperature=0.8, mirostat_mode=mode, seed=seed) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2] and sparse_steps(llm) > 10


def test_a_tool_is_called(make, profiled):
    """abetlen/llama-cpp-python#1883: streams and tool_choice="auto" raise. That is refused with a sentence; a named
    tool is called, streamed or not, with arguments of its schema."""
    import json

    tool = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}}
    kw = {
        "messages": [{"role": "user", "content": "call f"}],
        "tools": [{"type": "function", "function": {"description": "d", **tool}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "max_tokens": 60,
    }
    llm = make(profiled, chat_format="chatml-function-calling", n_ctx=2048)
    call = llm.create_chat_completion(**kw)["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "f" and list(json.loads(call["arguments"])) == ["x"] and sparse_steps(llm) > 5
    deltas = [c["choices"][0]["delta"] for c in llm.create_chat_completion(stream=True, **kw)]
    parts = [d["tool_calls"][0]["function"]["arguments"] for d in deltas if d.get("tool_calls")]
    assert list(json.loads("".join(parts))) == ["x"]
    with pytest.raises(ValueError, match="Automatic streaming tool choice is not supported"):
        list(llm.create_chat_completion(stream=True, **{**kw, "tool_choice": "auto"}))


def test_a_template_that_refuses_a_system_message(make, profile, tmp_path, capsys):
    """EleutherAI/lm-evaluation-harness#2109: "System role not supported" is a traceback. The command says it in a line,
    the drop-in raises it, and the next chat works."""
    path = tmp_path / "m.gguf"
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    write_tiny(path, chat_template=refuse + "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    assert cli.main(["run", str(path), "--chat", "--system", "s", "-p", "a", "-n", "2"]) == 1
    assert "its chat template does not take these messages: System role not supported\n" in capsys.readouterr().err
    llm, user = make(path, fasa_profile=profile), {"role": "user", "content": PROMPT}
    with pytest.raises(ValueError, match="System role not supported"):
        llm.create_chat_completion([{"role": "system", "content": "s"}, user])
    assert llm.create_chat_completion([user], max_tokens=4)["usage"]["completion_tokens"] >= 4
    assert sparse_steps(llm) >= 3


def test_a_template_that_cannot_be_read(make, profile, tmp_path, capfd):
    """abetlen/llama-cpp-python#2225: a tag in the chat template that jinja2 does not know keeps the model from being
    loaded, even with a chat_format. It loads, with a line that says so, and only chats need a format."""
    path = tmp_path / "m.gguf"
    write_tiny(path, chat_template="{% for m in messages %}{% audio %}{{ m.content }}{% endfor %}")
    llm = make(path, fasa_profile=profile)
    assert "its chat template cannot be read: Encountered unknown tag 'audio'" in capfd.readouterr().err
    assert text_of(llm, PROMPT) and sparse_steps(llm) > 0
    llm = make(path, fasa_profile=profile, chat_format="chatml")
    assert llm.create_chat_completion([{"role": "user", "content": "a"}], max_tokens=4)["choices"]
    assert capfd.readouterr().err == ""
    assert cli.main(["run", str(path), "-p", "a", "-n", "2"]) == 0
    assert cli.main(["run", str(path), "--chat", "-p", "a", "-n", "2"]) == 1
    assert "its chat template cannot be read: Encountered unknown tag 'audio'" in capfd.readouterr().err


def test_a_tokenizer_without_bos(make, profile, tmp_path, capfd):
    """ggml-org/llama.cpp#7898: a model without BOS gets some other token before its text. It gets none, in the drop-in,
    a session and the command."""
    from fasa_gguf.session import Session

    path = tmp_path / "m.gguf"
    write_tiny(path, bos=None)
    llm = make(path, fasa_profile=profile)
    text_of(llm, PROMPT)
    tokens = llm.tokenize(PROMPT.encode(), add_bos=False)
    assert llm.input_ids[: len(tokens)].tolist() == tokens and sparse_steps(llm) > 0
    with Session(path, n_ctx=256, n_threads=1) as s:
        assert s.tokenize(PROMPT) == tokens
    assert cli.main(["run", str(path), "-p", PROMPT, "-n", "2"]) == 0
    assert f"prompt {len(tokens)} tokens" in capfd.readouterr().err


def test_a_gap_in_a_text(make, profile, profiled, tmp_path):
    """ggml-org/llama.cpp#7102: infilling writes nonsense, since the tokens for it are not those of the model. They are
    its own, in both orders; a model that has none is not asked."""
    path = tmp_path / "m.gguf"
    write_tiny(path, words=["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    for spm in (False, True):
        llm = make(path, fasa_profile=profile, spm_infill=spm)
        text_of(llm, "def f():", suffix="return x")
        own, end = llm.tokenize(b"def f():", add_bos=False), [3 + b for b in "return\u2581x".encode()]
        parts = [260, *end, 259, *own] if spm else [259, *own, 260, *end]
        assert llm.input_ids[: len(parts) + 2].tolist() == [1, *parts, 261] and sparse_steps(llm) > 0
    with pytest.raises(FasaError, match="this model has no tokens for a gap in a text"):
        text_of(make(profiled), "def f():", suffix="return x")


def test_a_model_loaded_for_its_tokenizer(make, profiled):
    """abetlen/llama-cpp-python#863: evaluating with vocab_only=True fails an assertion in C. It is refused with a
    sentence; the tokenizer works."""
    llm = make(profiled, vocab_only=True, fasa="auto")
    assert llm.detokenize(llm.tokenize(b"abc")).endswith(b"abc")
    for use in (lambda: text_of(llm, "a"), lambda: llm.eval([1]), lambda: llm.embed("a")):
        with pytest.raises(FasaError, match="was loaded with vocab_only=True, for its tokenizer alone"):
            use()


def test_embeddings_and_completions_of_one_model(make, profiled):
    """abetlen/llama-cpp-python#1812: with embedding=True completions fail with "invalid logits id -1". Both work in
    turn, and the text is what it is without."""
    want = text_of(make(profiled), PROMPT)
    llm = make(profiled, embedding=True, pooling_type=1)
    for _ in range(2):
        assert np.shape(llm.create_embedding("abc")["data"][0]["embedding"]) == (64,)
        assert text_of(llm, PROMPT) == want
    assert sparse_steps(llm) > 10


def test_several_texts_are_embedded_at_once(make, profiled):
    """abetlen/llama-cpp-python#2051: embedding two texts in one call fails with "llama_decode returned -1". Each gets
    the vector that it gets alone, as with FASA off."""
    texts = ["abc", "defgh" * 30, "x" * 100, ""]
    llm, off = (make(profiled, embedding=True, pooling_type=1, fasa=fasa, flash_attn=True) for fasa in (ON, "off"))
    together = llm.embed(texts)
    assert np.allclose(together, [llm.embed(t) for t in texts], atol=2e-2) and np.allclose(together, off.embed(texts))
    assert llm.fasa_stats()["steps_sparse"] == 0 and np.abs(together).max() > 0.5  # a prompt is dense


def test_a_long_text_is_embedded_in_a_large_batch(profiled):
    """abetlen/llama-cpp-python#1762: `embed` with n_batch above 512 ends the process. A text of 1,000 tokens gets its
    vectors."""
    code = (
        "import sys; sys.path.insert(0, 'tests/helpers')\nfrom reported import ON\nfrom fasa_gguf import Llama\n"
        "llm = Llama(sys.argv[1], n_ctx=2048, n_batch=1024, embedding=True, n_threads=1, fasa=ON, verbose=False)\n"
        "print(len(llm.embed('a' * 996)))"
    )
    run = python(code, profiled)
    assert run.stdout.split() == ["1000"], run.stderr[-500:]
