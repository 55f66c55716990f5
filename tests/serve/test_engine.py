"""The engine on a tiny model, without HTTP."""

import queue
import threading
import time

import numpy as np
import pytest
from tiny_apps import write_hybrid_heads

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.profile.profile import Profile
from fasa_gguf.session import Session

SPARSE = FasaParams(min_context=0, budget=24, sink=2, recent=8)


class Client:
    """Asks an engine, and waits."""

    def __init__(self, engine):
        self.engine = engine

    def ask(self, prompt, max_tokens=12, **changes):
        from fasa_gguf.serve.sampling import Sampler, SamplingParams
        from fasa_gguf.serve.slots import Request

        events = queue.Queue()
        sampling = SamplingParams(**{"temperature": 0, **changes.pop("sampling", {})})
        sampler = Sampler(self.engine.session, sampling)
        send = changes.pop("send", events.put)
        request = Request(prompt, max_tokens, send, sampler, **changes)
        request.events = events
        self.engine.submit(request)
        return request

    def wait(self, request):
        """(text, Done)."""
        from fasa_gguf.serve.slots import Done

        text = ""
        while True:
            event = request.events.get(timeout=60)
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Done):
                return text, event
            text += event.text

    def __call__(self, prompt, **changes):
        return self.wait(self.ask(prompt, **changes))


@pytest.fixture
def make(chatty):
    """A client of a new engine; everything is ended afterwards."""
    opened = []

    def make(n=3, params=SPARSE, n_ctx=1024, model=chatty, **changes):
        from fasa_gguf.serve.engine import Engine

        session = Session(model, n_ctx=n_ctx * n, n_seq_max=n, n_batch=64, n_ubatch=64, n_threads=1)
        if params:
            session.fasa.set_profile(Profile.load(chatty.with_suffix(".fasa.json")))
            session.fasa.set_params(params)
        engine = Engine(session, params, **changes)
        engine.start()
        opened.append((engine, session))
        return Client(engine)

    yield make
    for engine, session in opened:
        engine.stop()
        session.close()


def prompts(n, length=100, seed=0):
    return [[1, *map(int, np.random.default_rng(seed + i).integers(3, 259, length + 17 * i))] for i in range(n)]


def test_answers_are_those_of_a_session_and_do_not_depend_on_the_others(make):
    client = make()
    session, asked = client.engine.session, prompts(8)
    alone = [client(p)[0] for p in asked]
    together = [client.ask(p) for p in asked]
    found = [client.wait(r) for r in together]
    assert [text for text, _ in found] == alone and len(set(alone)) > 4
    usage = found[0][1].usage
    assert usage["prompt_tokens"] == 101 and usage["completion_tokens"] == 12 and usage["total_tokens"] == 113
    assert usage["fasa"]["steps_sparse"] == 11 and usage["fasa"]["tokens_attended"] < usage["fasa"]["tokens_visible"]
    stats = client.engine.stats
    assert stats.step_sequences > stats.steps and stats.requests["length"] == 16
    client.engine.stop()
    session.clear()
    tokens, text = list(asked[0]), b""
    logits = session.decode(tokens, 0)
    for _ in range(12):
        token = int(logits.argmax())
        text += client.engine._piece(token)
        logits = session.decode([token], len(tokens))
        tokens.append(token)
    assert text.decode("utf-8", "replace") == alone[0]


def test_short_sequences_stay_dense_beside_long_ones(make):
    """FASA decides for a step as a whole, so sequences on both sides of min_context are not in one step."""
    client = make(params=SPARSE.replace(min_context=512), n=2)
    short, long = prompts(1)[0], prompts(1, 600)[0]
    alone = [client(p) for p in (short, long)]
    both = [client.ask(p, max_tokens=12) for p in (short, long)]
    both = [client.wait(r) for r in both]
    assert [t for t, _ in both] == [t for t, _ in alone]
    for _, done in (alone[0], both[0]):
        assert done.usage["fasa"]["steps_sparse"] == 0 and done.usage["fasa"]["steps_dense"] == 11
        assert done.usage["fasa"]["reason"] == "the context is shorter than min_context"
    assert both[1][1].usage["fasa"]["steps_dense"] == 0


def test_a_request_may_be_dense_beside_sparse_ones(make):
    prompt = prompts(1)[0]
    dense = make(params=None)(prompt)
    assert not dense[1].usage["fasa"]["enabled"]
    client = make()
    asked = [client.ask(prompt, dense=True), client.ask(prompt)]
    found = [client.wait(r) for r in asked]
    assert found[0][0] == dense[0] and found[0][1].usage["fasa"]["steps_sparse"] == 0
    assert found[0][1].usage["fasa"]["reason"] == "this request has FASA off"
    assert found[1][1].usage["fasa"]["steps_sparse"] == 11


def test_a_long_prompt_does_not_stall_streams(make):
    client = make(n=2)
    stream = client.ask(prompts(1)[0], max_tokens=300)
    stream.events.get(timeout=60)
    written = client.engine.stats.written_tokens
    long = client.ask(prompts(1, 900)[0], max_tokens=1)
    client.wait(long)
    assert client.engine.stats.written_tokens - written >= 900 // 64  # a step between two pieces of 64
    client.wait(stream)


def test_prefixes_are_reused_in_slots_and_in_memory(make):
    client = make(n=1, cache_bytes=2**24)
    a, b = prompts(2, 200)
    text, done = client(a)
    assert done.usage["prompt_tokens_details"] == {"cached_tokens": 0}
    again = client(a)
    assert again[0] == text and again[1].usage["prompt_tokens_details"]["cached_tokens"] == 200
    client(b)  # takes the only slot: a goes to memory
    assert len(client.engine.prefixes) == 1
    back = client(a)
    assert back[0] == text and back[1].usage["prompt_tokens_details"]["cached_tokens"] == 200
    assert client.engine.stats.prefix_hits == {"slot": 0, "memory": 1}
    none = make(n=1)
    none(a), none(b)
    assert none(a)[1].usage["prompt_tokens_details"] == {"cached_tokens": 0}  # not the BOS alone
    assert len(none.engine.prefixes) == 0


def test_a_prefix_of_a_busy_slot_is_copied(make):
    client = make(n=2)
    a = prompts(1, 200)[0]
    alone = make(n=1)(a[:150])[0]
    stream = client.ask(a, max_tokens=200, min_tokens=200)
    stream.events.get(timeout=60)
    text, done = client(a[:150])
    assert text == alone and done.usage["prompt_tokens_details"]["cached_tokens"] == 149
    assert client.engine.stats.prefix_hits == {"slot": 1, "memory": 0}
    assert client.wait(stream)[1].usage["completion_tokens"] == 200


def test_requests_queue_and_a_full_queue_says_so(make):
    client = make(n=1, n_queue=2)
    held = threading.Event()

    def send(_event):
        held.wait(60)

    client.ask(prompts(1)[0], send=send, max_tokens=1)
    while client.engine.n_busy == 0 or client.engine.n_waiting:
        time.sleep(0.01)
    waiting = [client.ask(p) for p in prompts(2)]
    with pytest.raises(FasaError, match="all 1 slots are busy and 2 requests wait") as e:
        client.ask(prompts(1)[0])
    assert e.value.status == 503 and e.value.code == "queue_full"
    waiting[0].cancel()  # its place is free
    waiting[0] = client.ask(prompts(1)[0])
    held.set()
    assert all(client.wait(r)[0] for r in waiting)


def test_a_cancelled_request_frees_its_slot_and_the_others_go_on(make):
    client = make(n=2)
    a, b = prompts(2)
    alone = client(b, max_tokens=100)[0]
    gone, stays = client.ask(a, max_tokens=800), client.ask(b, max_tokens=100)
    gone.events.get(timeout=60)
    gone.cancel()
    assert client.wait(stays)[0] == alone
    assert client(a, max_tokens=5)[1].usage["completion_tokens"] == 5
    assert client.engine.stats.requests["cancelled"] == 1 and client.engine.n_busy == 0


def test_what_does_not_fit(make):
    client = make(n=1, n_ctx=256)
    with pytest.raises(FasaError, match="maximum context length is 256 tokens, and the prompt has 301") as e:
        client.ask(prompts(1, 300)[0])
    assert e.value.code == "context_length_exceeded"
    with pytest.raises(FasaError, match="the prompt is empty"):
        client.ask([])
    _, done = client(prompts(1, 250)[0], max_tokens=50)
    assert done.finish_reason == "length" and done.usage["completion_tokens"] == 256 - 251 + 1


def test_a_decode_that_fails_ends_its_requests_and_the_server_goes_on(make, monkeypatch, capsys):
    client = make(n=2)
    text = client(prompts(1)[0])[0]
    decode = client.engine.session.decode_batch

    def fail(items):
        monkeypatch.setattr(client.engine.session, "decode_batch", decode)
        raise FasaError("no memory")

    monkeypatch.setattr(client.engine.session, "decode_batch", fail)
    with pytest.raises(FasaError, match="no memory") as e:
        client(prompts(1)[0])
    assert e.value.status == 500 and "FasaError: no memory" in capsys.readouterr().err
    assert client(prompts(1)[0])[0] == text


def test_a_state_that_cannot_be_put_back_ends_its_request(make, monkeypatch):
    client = make(n=1, cache_bytes=2**24)
    a, b = prompts(2, 200)
    text = client(a)[0]
    client(b)

    def fail(state, seq):
        raise FasaError("llama.cpp does not take this state")

    monkeypatch.setattr(client.engine.session, "set_state", fail)
    with pytest.raises(FasaError, match="does not take this state"):
        client(a)
    monkeypatch.undo()
    assert client(a)[0] == text and client.engine.is_alive


def test_stops_logprobs_and_least_tokens(make):
    client = make(n=1, params=None)
    prompt = prompts(1)[0]
    request = client.ask(prompt, logprobs=2, max_tokens=6)
    text, found = "", []
    while not hasattr(event := request.events.get(timeout=60), "usage"):
        text += event.text
        found += zip(*(event.logprobs or {"tokens": []}).values(), strict=True)
    assert len(found) == 6 and found[0][1] == 0
    assert all(top[shown] == value and len(top) <= 3 for shown, _, value, top in found)  # bytes have no text of theirs
    cut = text[len(text) // 2]
    short, done = client(prompt, stops=(cut,), max_tokens=6)
    assert short == text[: text.index(cut)] and done.finish_reason == "stop"
    biased = {2: 100.0}  # the end of text
    assert client(prompt, sampling={"logit_bias": biased})[1].usage["completion_tokens"] == 0
    assert client(prompt, sampling={"logit_bias": biased}, min_tokens=3)[1].usage["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grammar": "root ::= ("}, "grammar: llama.cpp cannot parse it"),
        ({"logit_bias": {300: 1.0}}, "logit_bias: expected tokens from 0 to 258, found 300"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias: expected -100 to 100, found nan"),
    ],
)
def test_samplers_that_cannot_be(make, changes, message):
    with pytest.raises(FasaError, match=message):
        make(n=1).ask([1, 5], sampling=changes)


def test_the_same_seed_gives_the_same_text_beside_others(make):
    client = make()
    prompt, sampling = prompts(1)[0], {"temperature": 1.0, "seed": 7, "top_k": 0, "min_p": 0.0}
    alone = client(prompt, sampling=sampling)[0]
    asked = [client.ask(prompt, sampling={**sampling, "seed": seed}) for seed in (7, 8, 9)]
    texts = [client.wait(r)[0] for r in asked]
    assert texts[0] == alone and len(set(texts)) == 3


def test_a_grammar_holds(make):
    text, done = make(n=1)(prompts(1)[0], sampling={"grammar": 'root ::= "ab" [0-9] "."', "temperature": 1.0})
    assert text[:2] == "ab" and text[2].isdigit() and text[3:] == "." and done.finish_reason == "stop"


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("grammar", ['root ::= "a" [^\\x00-\\U0010FFFF]', 'root ::= "a" x\nx ::= [b-a]'])
def test_a_grammar_that_leads_nowhere_ends_the_text(make, grammar, temperature):
    """llama.cpp would end the process."""
    client = make(n=1)
    text, done = client(prompts(1)[0], sampling={"grammar": grammar, "temperature": temperature})
    assert text.startswith("a") and done.finish_reason == "stop" and done.usage["completion_tokens"] < 8
    assert client(prompts(1)[0])[0]


def test_a_recurrent_state_is_reused_where_it_ends(make, tmp_path):
    """It goes back nowhere."""
    model = tmp_path / "hybrid.gguf"
    write_hybrid_heads(model)
    client = make(model=model, params=None, n=2, cache_bytes=2**24, n_ctx=512)
    asked = prompts(5, 150)
    alone = [client(p)[0] for p in asked]
    found = [client.wait(r) for r in [client.ask(p) for p in asked]]
    assert [text for text, _ in found] == alone
    longer = [*client.engine.slots[0].tokens, 5, 6, 7]
    assert client(longer)[1].usage["prompt_tokens_details"]["cached_tokens"] == len(longer) - 3
    assert client(longer[:-50])[1].usage["prompt_tokens_details"]["cached_tokens"] == 0
