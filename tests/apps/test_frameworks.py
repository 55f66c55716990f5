"""langchain's and llama-index's llama.cpp classes with FASA: each script is what a user writes, in its own process."""

import importlib.util
import json
import subprocess
import sys

import pytest
import tiny_apps
from apps import environment

PROMPT = "Tell me what the sea is like at night. " * 12
START = """
import json, sys, warnings
warnings.simplefilter("ignore")
import fasa_gguf
fasa_gguf.enable(sys.argv[2])
model, prompt = sys.argv[1], sys.argv[3]
def show(client, *texts):
    s = client.fasa_stats()
    assert type(client) is fasa_gguf.Llama
    print(json.dumps({"texts": texts, "sparse": s["steps_sparse"], "dense": s["steps_dense"],
                      "share": s["tokens_attended"] / max(s["tokens_visible"], 1)}))
"""
# the drop-in itself: what the classes' texts are compared with
CHAT = """
llm = fasa_gguf.Llama(model, n_ctx=1024, n_batch=8, verbose=False)
out = llm.create_chat_completion([{"role": "user", "content": prompt}], max_tokens=24, temperature=0,
                                 top_p=0.95, top_k=40, repeat_penalty=1.1)
show(llm, out["choices"][0]["message"]["content"])
"""
COMPLETION = """
llm = fasa_gguf.Llama(model, n_ctx=1024, n_batch={n_batch}, verbose=False)
out = llm.create_completion(prompt, max_tokens=24, temperature=0, repeat_penalty={repeat_penalty})
show(llm, out["choices"][0]["text"])
"""
# langchain hands on a RoPE base of 10,000 unless it is told otherwise; 0 is the model's own
LANGCHAIN = "common = dict(n_ctx=1024, temperature=0, max_tokens=24, verbose=False{rope})\n"
OWN_ROPE = ", rope_freq_base=0.0, rope_freq_scale=0.0"
LANGCHAIN_CHAT = """
from langchain_community.chat_models import ChatLlamaCpp
llm = ChatLlamaCpp(model_path=model, **common)
whole = llm.invoke(prompt).content
show(llm.client, whole, "".join(part.content for part in llm.stream(prompt)))
"""
# its batch calls one model from several threads, and its calls are streams unless it is told otherwise
LANGCHAIN_BATCH = """
from langchain_community.chat_models import ChatLlamaCpp
llm = ChatLlamaCpp(model_path=model, **common)
prompts = [f"What is {i} plus {i}? " + prompt[:100] for i in range(4)]
alone = [llm.invoke(p).content for p in prompts]
batch = [answer.content for answer in llm.batch(prompts, config={"max_concurrency": 1})]
assert batch == alone, batch
llm.streaming = False
assert [answer.content for answer in llm.batch(prompts)] == alone
llm.streaming = True
found = [str(getattr(answer, "content", answer)) for answer in llm.batch(prompts, return_exceptions=True)]
show(llm.client, *(["right"] if any(f == a for f, a in zip(found, alone)) else []),
     *(f for f, a in zip(found, alone) if f != a))
"""
LANGCHAIN_LLM = """
from langchain_community.llms import LlamaCpp
llm = LlamaCpp(model_path=model, **common)
whole = llm.invoke(prompt)
show(llm.client, whole, "".join(llm.stream(prompt)), *llm.batch([prompt, prompt]))
"""
LANGCHAIN_EMBEDDINGS = """
from langchain_community.embeddings import LlamaCppEmbeddings
llm = LlamaCppEmbeddings(model_path=model, n_ctx=512, verbose=False)
show(llm.client, llm.embed_query(prompt), *llm.embed_documents([prompt, "another"]))
"""
EMBEDDINGS = """
llm = fasa_gguf.Llama(model, n_ctx=512, n_batch=512, embedding=True, verbose=False, flash_attn=True, fasa="off")
show(llm, llm.embed(prompt)[0])
"""
LLAMA_INDEX = """
from llama_index.core.llms import ChatMessage
from llama_index.llms.llama_cpp import LlamaCPP
llm = LlamaCPP(model_path=model, context_window=1024, max_new_tokens=24, temperature=0, verbose=False,
               generate_kwargs={"repeat_penalty": 1.0},
               messages_to_prompt=lambda messages: messages[-1].content, completion_to_prompt=lambda text: text)
whole = llm.complete(prompt).text
stream = "".join(part.delta for part in llm.stream_complete(prompt))
message = llm.chat([ChatMessage(role="user", content=prompt)]).message.content
show(llm._model, whole, stream, message)
"""


def needs(name):
    return pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"needs {name}; run `make app-tests`")


@pytest.fixture
def run(smollm2, calibrated):
    """Run a script on a model; returns what it showed, and stderr."""

    def run(script, fasa="auto", model=smollm2, profile=calibrated):
        done = subprocess.run(
            [sys.executable, "-c", START + script, str(model), fasa, PROMPT],
            capture_output=True,
            text=True,
            env=environment(profile),
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return run


def check_texts(run, script, plain):
    """All texts of a script are those of the drop-in, sparse with FASA and dense without."""
    for fasa in ("auto", "off"):
        found, err = run(script, fasa)
        want, _ = run(plain, fasa)
        assert found["texts"] == want["texts"] * len(found["texts"]) and len(found["texts"][0]) > 20
        assert (found["sparse"] > 0, found["dense"] > 0) == ((True, False) if fasa == "auto" else (False, True))
        assert fasa == "off" or found["share"] < 0.6
        assert "fasa_gguf" not in err


@needs("langchain_community")
def test_langchain_chat(run):
    check_texts(run, LANGCHAIN.format(rope=OWN_ROPE) + LANGCHAIN_CHAT, CHAT)


@needs("langchain_community")
def test_langchain_batch(run):
    """One by one, and without streams, the answers are those of single calls; of streams at once one of them is, and
    the others say why not."""
    found, _ = run(LANGCHAIN.format(rope=OWN_ROPE) + LANGCHAIN_BATCH)
    assert found["texts"][0] == "right" and all("max_concurrency=1" in text for text in found["texts"][1:])


@needs("langchain_community")
def test_langchain_llm(run):
    plain = COMPLETION.format(n_batch=8, repeat_penalty=1.1)
    check_texts(run, LANGCHAIN.format(rope=OWN_ROPE) + LANGCHAIN_LLM, plain)


@needs("langchain_community")
def test_langchains_rope_is_named(run):
    """Its default is not this model's: one line says so, and decoding goes on with FASA."""
    found, err = run(LANGCHAIN.format(rope="") + LANGCHAIN_CHAT)
    assert found["sparse"] > 0 and "under RoPE base 100000, and this context has base 10000" in err
    assert err.count("fasa_gguf: ") == 1


@needs("langchain_community")
def test_langchain_embeddings(run, tmp_path):
    """A generative model embeds as without FASA but for flash attention; an embedding model, without profile, works."""
    on, _ = run(LANGCHAIN_EMBEDDINGS)
    want, _ = run(EMBEDDINGS)
    assert on["texts"][0] == want["texts"][0] and len(on["texts"][0]) == 576
    assert on["sparse"] == want["sparse"] == want["dense"] == 0  # a prompt
    tiny_apps.write_embedder(tmp_path / "bert.gguf")
    found, err = run(LANGCHAIN_EMBEDDINGS, model=tmp_path / "bert.gguf", profile=None)
    assert [len(e) for e in found["texts"]] == [64] * 3 and found["texts"][0] == pytest.approx(
        found["texts"][1], abs=1e-4
    )
    assert "no FASA profile in" in err


@needs("llama_index")
def test_llama_index(run):
    check_texts(run, LLAMA_INDEX, COMPLETION.format(n_batch=512, repeat_penalty=1.0))
