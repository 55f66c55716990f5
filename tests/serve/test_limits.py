"""What one client may take of `fasa-gguf serve`: bytes, time, connections; requests that would end the process."""

import json
import socket
import time

import pytest

pytest.importorskip("httpx", reason="needs httpx; run `make app-tests`")
pytest.importorskip("openai", reason="needs openai; run `make app-tests`")
pytest.importorskip("uvicorn", reason="needs uvicorn; run `make app-tests`")
from serving import Server

LIMITS = ["--max-body", "1", "--max-connections", "6", "--receive-timeout", "2"]


@pytest.fixture(scope="module")
def server(chatty, tmp_path_factory):
    server = Server(chatty, tmp_path_factory.mktemp("limits") / "log.txt", "-c", "512", "-np", "2", *LIMITS)
    yield server
    assert server.completion("still there") is not None
    assert server.end() == 0 and "Traceback" not in server.log.read_text()


def connect(server):
    host, port = server.root.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answer(s):
    """(status, error) of what comes until the connection is closed."""
    data = b""
    while part := s.recv(65536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and b"connection: close" in head.lower()
    return int(head.split()[1]), error


POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def test_a_body_that_is_too_large(server):
    found = server.post("/v1/completions", content=b'{"prompt": "' + b"x" * 2**20 + b'"}')
    assert found.status_code == 413 and found.json()["error"]["code"] == "request_too_large"
    assert "larger than the 1048576 bytes" in found.json()["error"]["message"]
    with connect(server) as s:  # no byte of it is read
        s.sendall(POST + b"content-length: 99999999999\r\n\r\n")
        assert answer(s)[0] == 413
    with connect(server) as s:  # one that does not say how long it is
        s.sendall(POST + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(17):
            s.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        s.sendall(b"0\r\n\r\n")
        assert answer(s)[0] == 413
    fits = server.post("/v1/completions", json={"prompt": "x" * 1000 + " " * (2**20 - 1100)})
    assert fits.status_code == 400 and fits.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /v1/comp", POST, POST + b"content-length: 100\r\n\r\n{", b"GET /health HTTP/1.1\r\nhost: x\r\n"],
)
def test_a_request_that_does_not_arrive(server, sent):
    start = time.monotonic()
    with connect(server) as s:
        s.sendall(sent)
        status, error = answer(s)
    assert status == 408 and error["code"] == "request_timeout" and 1.5 < time.monotonic() - start < 15


def test_a_slow_second_request_of_a_connection(server):
    with connect(server) as s:
        s.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert s.recv(65536).startswith(b"HTTP/1.1 200")
        s.sendall(b"GET /hea")
        assert answer(s)[0] == 408


def test_connections_above_the_limit(server):
    time.sleep(0.3)
    held = [connect(server) for _ in range(6)]
    try:
        time.sleep(0.3)
        with connect(server) as s:
            status, error = answer(s)
        assert status == 503 and error["code"] == "too_many_connections" and "6 connections" in error["message"]
    finally:
        for s in held:
            s.close()
    time.sleep(0.3)
    assert server.get("/health").json()["status"] == "ok"


def test_a_long_answer_is_not_a_slow_request(server):
    """The time is for the request alone."""
    body = {"prompt": "x", "max_tokens": 480, "min_tokens": 480}
    start = time.monotonic()
    while time.monotonic() - start < 3:
        assert server.post("/v1/completions", json=body).status_code == 200


DEEP = "(" * 100000 + '"a"' + ")" * 100000
NEST = {"type": "object"}
for _ in range(400):
    NEST = {"type": "object", "properties": {"a": NEST}}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"grammar": f"root ::= {DEEP}"}, "grammar", "at most 256 brackets within brackets, found 100000"),
        ({"grammar": 'root ::= "' + "a" * 300000 + '"'}, "grammar", "at most 262144 characters"),
        ({"stop": ["x"] * 65}, "stop", "at most 64 strings, found 65"),
        ({"stop": ["x" * 2000]}, "stop", "at most 1024 characters, found 2000"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "expected a token's number"),
        ({"logit_bias": {str(i): 1 for i in range(3000)}}, "logit_bias", "found "),
        ({"logit_bias": {"5": 1e300}}, "logit_bias", "expected -100 to 100"),
        ({"max_tokens": -5}, "max_tokens", "greater than or equal to 0"),
        ({"min_tokens": -5}, "min_tokens", "greater than or equal to 0"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs", ""),
        ({"temperature": float("nan")}, "temperature", ""),
        ({"repeat_penalty": float("inf")}, "repeat_penalty", ""),
        ({"mirostat_mode": 2, "mirostat_tau": float("nan")}, "mirostat_tau", ""),
    ],
    ids=lambda x: str(x)[:30],
)
def test_requests_that_ask_too_much(server, body, param, message):
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **body}
    as_json = {"content-type": "application/json"}  # with NaN, which clients' own encoders refuse
    found = server.post("/v1/chat/completions", content=json.dumps(asked), headers=as_json)
    assert found.status_code == 400, found.text
    e = found.json()["error"]
    assert e["param"] == param and message in e["message"], e


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer"}, "maxItems": 200000},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "items": {"type": "string", "maxLength": 10**6}},
        {"type": "array", "items": {}, "minItems": 10**7},
        NEST,
    ],
    ids=lambda x: str(x)[:40],
)
def test_schemas_that_would_not_fit(server, schema):
    for asked in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {
            "tools": [{"type": "function", "function": {"name": "x", "parameters": schema}}],
            "tool_choice": {"type": "function", "function": {"name": "x"}},
        },
    ):
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **asked}
        start = time.monotonic()
        found = server.post("/v1/chat/completions", json=body)
        assert found.status_code in (200, 400) and time.monotonic() - start < 20, found.text
        if found.status_code == 400:
            assert found.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("text", ["x", " ", "a b "])
def test_texts_that_take_long_to_tokenize(server, text):
    """llama.cpp's time may grow with the square of the length: a text that cannot fit is refused by its beginning."""
    start = time.monotonic()
    long = (text * 2**19)[: 2**19]
    for path, body, param in (
        ("/v1/completions", {"prompt": long}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
        ("/extras/tokenize", {"input": long}, "input"),
    ):
        e = server.post(path, json=body).json()["error"]
        assert e["code"] == "context_length_exceeded" and e["param"] == param, e
        assert "the prompt has more than " in e["message"]
    assert time.monotonic() - start < 20


def test_brackets_in_texts_are_no_nesting(library):
    from fasa_gguf.serve.errors import ApiError
    from fasa_gguf.serve.limits import check_grammar

    check_grammar('root ::= "' + "(" * 1000 + '\\"(" [(\\](] # ((((\n')
    check_grammar("root ::= " + "(a " * 256 + ")" * 256)
    with pytest.raises(ApiError, match="at most 256 brackets within brackets, found 257"):
        check_grammar('root ::= "' + "\\\\" + '" ' + "(a " * 257 + ")" * 257)
