"""`python -m llama_cpp.server` with FASA: 16 clients at once get the answers that they get one by one."""

import importlib.util
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from apps import environment

NEEDED = ("httpx", "openai", "uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
MISSING = [name for name in NEEDED if not importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}; run `make app-tests`")
CLIENTS, TOKENS = 16, 24


class Server:
    """A server on a free port of this machine, and the ways in which a client asks."""

    def __init__(self, model, profile, log):
        import openai

        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        settings = {"model": model, "host": "127.0.0.1", "port": port, "n_ctx": 1024, "n_threads": 2}
        settings["interrupt_requests"] = "false"  # or a request ends the stream of another one
        args = [x for name, value in settings.items() for x in (f"--{name}", str(value))]
        serve = Path(__file__).with_name("serve.py")
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, serve, *args], stdout=out, stderr=subprocess.STDOUT, env=environment(profile)
            )
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", timeout=300, max_retries=0)

    def wait(self):
        import httpx

        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                return httpx.get(self.url + "/v1/models", timeout=10).raise_for_status()
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError("the server did not answer for a minute")

    def stats(self):
        import httpx

        return httpx.get(self.url + "/fasa", timeout=60).raise_for_status().json()

    def completion(self, prompt):
        out = self.client.completions.create(model="m", prompt=prompt, max_tokens=TOKENS, temperature=0)
        return out.choices[0].text

    def completion_stream(self, prompt):
        out = self.client.completions.create(model="m", prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True)
        return "".join(chunk.choices[0].text for chunk in out)

    def chat(self, prompt):
        messages = [{"role": "user", "content": prompt}]
        out = self.client.chat.completions.create(model="m", messages=messages, max_tokens=TOKENS, temperature=0)
        return out.choices[0].message.content

    def chat_stream(self, prompt):
        messages = [{"role": "user", "content": prompt}]
        out = self.client.chat.completions.create(
            model="m", messages=messages, max_tokens=TOKENS, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in out)

    def leave(self, prompt):
        """Go away in the middle of a stream."""
        stream = self.client.completions.create(model="m", prompt=prompt, max_tokens=200, temperature=0, stream=True)
        for _, _chunk in zip(range(3), stream, strict=False):
            pass
        stream.close()


@pytest.fixture(scope="module")
def server(smollm2, calibrated, tmp_path_factory):
    server = Server(smollm2, calibrated, tmp_path_factory.mktemp("server") / "log.txt")
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(60)


@pytest.fixture(scope="module")
def asked(server, text):
    """(a way to ask, a prompt, the answer when nobody else asks) for every client."""
    ways = [server.completion, server.completion_stream, server.chat, server.chat_stream]
    prompts = [text[700 * i : 700 * i + 600] for i in range(CLIENTS)]
    return [(way, p, way(p)) for way, p in zip(ways * (CLIENTS // 4), prompts, strict=True)]


def test_16_clients_get_the_answers_that_they_get_one_by_one(server, asked):
    alone = server.stats()
    assert alone["steps_sparse"] > CLIENTS * TOKENS / 2 and alone["tokens_attended"] < alone["tokens_visible"] / 2
    assert all(answer for _, _, answer in asked) and len({answer for _, _, answer in asked}) > CLIENTS / 2
    for _ in range(2):
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            answers = [pool.submit(way, prompt) for way, prompt, _ in asked]
            during = [pool.submit(server.stats) for _ in range(20)]
            assert [a.result() for a in answers] == [answer for _, _, answer in asked]
            assert all(s.result()["steps_sparse"] >= alone["steps_sparse"] for s in during)
    after = server.stats()
    assert after["steps_sparse"] == 3 * alone["steps_sparse"] and after["steps_dense"] == 0
    assert "Traceback" not in server.log.read_text()


def test_clients_that_leave_do_not_disturb_others(server, asked):
    with ThreadPoolExecutor(CLIENTS) as pool:
        leaving = [pool.submit(server.leave, prompt) for _, prompt, _ in asked[:4]]
        answers = [pool.submit(way, prompt) for way, prompt, _ in asked[4:8]]
        assert [a.result() for a in answers] == [answer for _, _, answer in asked[4:8]]
        for left in leaving:
            left.result()
    way, prompt, answer = asked[0]
    assert way(prompt) == answer
