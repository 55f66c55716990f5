"""`fasa-gguf serve` with the official openai client, in a process of its own, on SmolLM2."""

import importlib.util
import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from apps import environment
from serving import TOKENS, Server

NEEDED = ("httpx", "openai", "uvicorn", "fastapi", "sse_starlette", "prometheus_client")
MISSING = [name for name in NEEDED if not importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}; run `make app-tests`")
CLIENTS = 8
USER = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
TOOL = {"type": "function", "function": {"name": "User", "description": "A user", "parameters": USER}}


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    from fasa_gguf.calibrate.gguf import CalibrationParams, calibrate

    folder = tmp_path_factory.mktemp("serve")
    profile = folder / "smollm2.fasa.json"
    calibrate(smollm2, params=CalibrationParams(context=512, queries=16, budget=40)).save(profile)
    server = Server(smollm2, folder / "log.txt", "-c", "2048", "--alias", "smollm2", profile=profile)
    try:
        yield server
        assert "Traceback" not in server.log.read_text()
    finally:
        server.end()


def error(code, call):
    """The error of a call, which must be of this HTTP status."""
    import openai

    with pytest.raises(openai.APIStatusError) as e:
        call()
    assert e.value.status_code == code and set(e.value.body) == {"message", "type", "param", "code"}
    return e.value.body


def test_8_clients_at_once_get_the_answers_that_they_get_one_by_one(server, text):
    ways = [server.completion, server.completion_stream, server.chat, server.chat_stream] * (CLIENTS // 4)
    prompts = [text[700 * i : 700 * i + 300 + 30 * i] for i in range(CLIENTS)]
    alone = [way(p) for way, p in zip(ways, prompts, strict=True)]
    assert all(alone) and len(set(alone)) > CLIENTS / 2
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(way, p) for way, p in zip(ways, prompts, strict=True)]
        assert [a.result() for a in asked] == alone


def test_answers_are_those_of_the_drop_in(server, smollm2, text):
    """The same sampler, the same template, the same steps."""
    import fasa_gguf

    defaults = fasa_gguf.Profile.load(server.profile).params()
    params = defaults.replace(min_context=0, budget=48, sink=2, recent=8)  # as in environment()
    sizes = {"n_ctx": 2048, "n_batch": 256, "n_ubatch": 256, "n_threads": 1}
    llm = fasa_gguf.Llama(smollm2, fasa=params, fasa_profile=server.profile, verbose=False, **sizes)
    asked = {"max_tokens": TOKENS, "temperature": 0, "repeat_penalty": 1.1}
    for prompt in (text[:600], text[9000:10500]):
        assert server.completion(prompt) == llm.create_completion(prompt, **asked)["choices"][0]["text"]
    out = llm.create_chat_completion([{"role": "user", "content": "Name three colours."}], **asked)
    found = server.make_chat("Name three colours.")
    assert found.choices[0].message.content == out["choices"][0]["message"]["content"]
    assert found.usage.prompt_tokens == out["usage"]["prompt_tokens"]
    llm.close()


def test_chat_and_usage(server):
    out = server.make_chat([{"type": "text", "text": "Say hello. " * 20}])
    assert out.choices[0].message.role == "assistant" and out.choices[0].message.content
    usage = out.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    fasa = usage.model_extra["fasa"]
    assert fasa["enabled"] and fasa["steps_sparse"] > 5 and fasa["tokens_attended"] < fasa["tokens_visible"]
    *chunks, last = list(server.make_chat("Hi", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert last.choices == [] and last.usage.model_extra["fasa"]["steps_sparse"] > 0
    dense = server.make_chat("Say hello.", extra_body={"fasa": {"enabled": False}})
    assert dense.usage.model_extra["fasa"]["enabled"] is False and not dense.usage.model_extra["fasa"]["steps_sparse"]


def test_a_second_turn_reuses_the_first(server):
    turns = [{"role": "user", "content": "Tell me of the sea. " * 20}]
    first = server.client.chat.completions.create(model="m", messages=turns, max_tokens=16, temperature=0)
    turns += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "More."}]
    second = server.client.chat.completions.create(model="m", messages=turns, max_tokens=16, temperature=0)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 4


def test_tools_and_schemas(server):
    choice = {"type": "function", "function": {"name": "User"}}
    asked = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 100}
    out = server.make_chat("Jason is 30 years old.", **asked)
    call = out.choices[0].message.tool_calls[0].function
    found = json.loads(call.arguments)
    assert call.name == "User" and isinstance(found["name"], str) and isinstance(found["age"], int)
    assert out.choices[0].finish_reason == "tool_calls"
    chunks = list(server.make_chat("Jason is 30 years old.", stream=True, **asked))
    parts = [c.choices[0].delta.tool_calls[0].function for c in chunks if c.choices[0].delta.tool_calls]
    assert "".join(p.arguments for p in parts) == call.arguments and parts[0].name == "User"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert server.make_chat("Jason is 30.", **{**asked, "tool_choice": "required"}).choices[0].message.tool_calls
    wanted = {"type": "json_schema", "json_schema": {"name": "user", "schema": USER, "strict": True}}
    out = server.make_chat("Jason is 30 years old.", response_format=wanted, max_tokens=100)
    assert set(json.loads(out.choices[0].message.content)) == {"name", "age"}
    bad = {"type": "json_schema", "json_schema": {"name": "user", "schema": {"type": "no such"}}}
    assert error(400, lambda: server.make_chat("x", response_format=bad))["param"] == "response_format"


def test_logprobs(server):
    out = server.make_chat("Name a colour.", logprobs=True, top_logprobs=3, max_tokens=8)
    found = out.choices[0].logprobs.content
    assert "".join(x.token for x in found) == out.choices[0].message.content
    assert all(x.logprob <= 0 and x.top_logprobs[0].logprob >= x.logprob for x in found)
    whole = server.client.completions.create(model="m", prompt="One, two,", max_tokens=8, temperature=0, logprobs=2)
    stream = server.client.completions.create(
        model="m", prompt="One, two,", max_tokens=8, temperature=0, logprobs=2, stream=True
    )
    parts = [c.choices[0].logprobs for c in stream if c.choices[0].logprobs]
    assert [x for p in parts for x in p.token_logprobs] == whole.choices[0].logprobs.token_logprobs
    assert [x for p in parts for x in p.text_offset] == whole.choices[0].logprobs.text_offset


def test_long_prompts(server, text):
    out = server.make_chat(text[:6000], max_tokens=4)
    assert 1000 < out.usage.prompt_tokens < 2048
    wrong = error(400, lambda: server.make_chat(text[:20000], max_tokens=4))
    assert wrong["code"] == "context_length_exceeded" and wrong["param"] == "messages"
    assert "maximum context length is 2048 tokens" in wrong["message"]


def test_a_cancelled_stream_frees_its_slot(server):
    prompt = "Count to a thousand. One, two, three,"
    before = server.get("/metrics").text
    stream = server.client.completions.create(model="m", prompt=prompt, max_tokens=1800, temperature=1, stream=True)
    next(iter(stream))
    stream.close()
    answer = server.completion(prompt)
    assert answer
    for _ in range(100):
        if server.get("/health").json()["slots_busy"] == 0:
            break
        time.sleep(0.05)
    name = 'fasa_gguf_requests_total{outcome="cancelled"}'

    def value(page):
        return next(float(line.split()[-1]) for line in page.split("\n") if line.startswith(name))

    assert value(server.get("/metrics").text) == value(before) + 1


def test_wrong_settings_name_the_field(server):
    def ask(**fasa):
        return lambda: server.make_chat("x", extra_body={"fasa": fasa})

    wrong = error(400, ask(budget="many"))
    assert wrong["param"] == "fasa.budget" and wrong["type"] == "invalid_request_error" and "'many'" in wrong["message"]
    assert (
        error(400, ask(budget=-1))["message"]
        == "setting budget: expected a whole number from 1 to 2147483647, found -1"
    )
    assert error(400, ask(bugdet=3))["message"].startswith("fasa.bugdet: there is no such setting; known are enabled, ")
    assert error(400, ask(enabled=1))["param"] == "fasa.enabled"
    fixed = error(400, ask(budget=64))
    assert fixed["code"] == "fixed_setting" and "this server runs with 48, found 64" in fixed["message"]
    assert ask(budget=48, recent=8, enabled=True)().choices
    wrong = error(400, ask(quality="best"))
    assert (wrong["param"], wrong["code"]) == ("fasa.quality", "invalid_value") and "found 'best'" in wrong["message"]
    fixed = error(400, ask(quality="careful"))
    assert fixed["code"] == "fixed_setting" and "start a server with --fasa-quality careful" in fixed["message"]
    assert ask(quality="careful", enabled=False)().choices


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"temperature": "hot"}, "temperature", "unable to parse"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"n": 2}, "n", "expected 1, found 2"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "expected a token's number, found 'x'"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "found 999999"),
        ({"grammar": "root ::= ("}, "grammar", "llama.cpp cannot parse it"),
        ({"grammar": 'root ::= "a"', "min_tokens": 3}, "min_tokens", "omit one of them"),
        ({"top_logprobs": 1000, "logprobs": True}, "top_logprobs", "at most 100"),
        ({"messages": []}, "messages", "expected at least one"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages", ""),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "No"}}}, "tool_choice", "'No'"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "found 'xml'"),
    ],
)
def test_bad_requests(server, body, param, message):
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **body}
    found = server.post("/v1/chat/completions", json=asked)
    assert found.status_code == 400, found.text
    e = found.json()["error"]
    assert e["type"] == "invalid_request_error" and e["param"] == param and message in e["message"], e


def test_bodies_that_are_none(server):
    for content in (b'{"messages', b"[1]", b"", b"\xff\xfe", b'{"messages": 3}', b"[" * 20000):
        found = server.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        assert 400 <= found.status_code < 500 and found.json()["error"]["type"] == "invalid_request_error", content[:20]
    assert server.get("/v1/nothing").json()["error"]["message"] == "Not Found"
    assert server.post("/v1/models").status_code == 405
    assert error(400, lambda: server.client.embeddings.create(model="m", input="x"))["code"] == "unsupported"
    assert error(400, lambda: server.completion(["a", "b"]))["param"] == "prompt"
    assert error(400, lambda: server.completion([10**6]))["param"] == "prompt"
    assert error(400, lambda: server.completion("a", suffix="b"))["param"] == "suffix"


def test_the_other_routes(server):
    assert [m.id for m in server.client.models.list()] == ["smollm2"]
    tokens = server.post("/extras/tokenize", json={"input": "Hello, sea"}).json()["tokens"]
    assert server.post("/extras/tokenize/count", json={"input": "Hello, sea"}).json() == {"count": len(tokens)}
    assert server.post("/extras/detokenize", json={"tokens": tokens}).json() == {"text": "Hello, sea"}
    assert server.post("/extras/detokenize", json={"tokens": [-1]}).status_code == 400
    assert server.completion(tokens) == server.completion("Hello, sea")
    assert server.completion("Hello, sea", echo=True).startswith("Hello, sea")
    health = server.get("/health").json()
    assert health["status"] == "ok" and health["slots"] == 4 and health["fasa"] == "on"
    page = server.get("/metrics").text
    for name in (
        "fasa_steps_sparse_total",
        "fasa_gguf_slots 4.0",
        "fasa_gguf_first_token_seconds_bucket",
        "fasa_bytes_kv",
    ):
        assert name in page


def test_the_routes_are_those_of_llama_cpp_server(server):
    upstream = pytest.importorskip("llama_cpp.server.app", exc_type=ImportError)
    from fasa_gguf.serve import api

    ours = {(r.path, m) for router in (api.router, api.public) for r in router.routes for m in r.methods}
    assert {(r.path, m) for r in upstream.router.routes for m in r.methods} <= ours


def test_a_key_is_asked_for_and_a_dense_server_says_why(chatty, tmp_path):
    server = Server(chatty, tmp_path / "log.txt", "--no-fasa", "-c", "512", "-np", "2", API_KEY="secret")
    try:
        assert error(401, lambda: server.make_chat("x"))["code"] == "invalid_api_key"
        server.client.api_key = "secret"
        assert server.make_chat("x", max_tokens=4).usage.model_extra["fasa"]["enabled"] is False
        off = error(400, lambda: server.make_chat("x", extra_body={"fasa": {"enabled": True}}))
        assert off["message"] == "fasa: this server decodes dense: it was started with --no-fasa"
        assert server.get("/health").json()["slots"] == 2
    finally:
        assert server.end() == 0
    assert "2 slots of 512 tokens; dense: it was started with --no-fasa" in server.log.read_text()


def test_a_full_queue_says_so_and_a_server_stops_while_a_stream_runs(chatty, tmp_path):
    server = Server(chatty, tmp_path / "log.txt", "-c", "4096", "-np", "1", "--queue", "0")
    stream = server.client.completions.create(
        model="m", prompt="x", max_tokens=4000, stream=True, extra_body={"min_tokens": 4000}
    )
    next(iter(stream))
    full = error(503, lambda: server.completion("y"))
    assert full["code"] == "queue_full"
    assert server.end() == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chat-format", "nothing"], "--chat-format nothing: there is no such format; known are "),
        (["--port", "{port}"], "cannot listen there"),
        (["--fasa-budget", "0"], "setting budget"),
    ],
)
def test_starts_that_fail_say_why(chatty, flags, message):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = [f.format(port=taken.getsockname()[1]) for f in flags]
        command = [sys.executable, "-m", "fasa_gguf", "serve", str(chatty), "--port", "0", *flags]
        run = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert run.returncode == 1 and message in run.stderr and "Traceback" not in run.stderr, run.stderr
