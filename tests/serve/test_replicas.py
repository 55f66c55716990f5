"""Two servers behind nginx, with the configuration of docs/guide/serve.md."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from apps import environment
from paths import ROOT

for _name in ("fastapi", "uvicorn", "prometheus_client", "sse_starlette"):
    pytest.importorskip(_name)

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(not NGINX, reason="nginx is not installed")
MAIN = """daemon off; master_process off; worker_processes 1; pid {0}/pid; error_log {0}/error.log;
events {{ worker_connections 64; }}
http {{ access_log off; client_body_temp_path {0}/body; proxy_temp_path {0}/proxy; fastcgi_temp_path {0}/f;
uwsgi_temp_path {0}/u; scgi_temp_path {0}/s;
{1}
}}
"""


def free_ports(n):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [s.getsockname()[1] for s in sockets]


def shown(ports):
    """The configuration of the guide, with other ports."""
    page = (ROOT / "docs" / "guide" / "serve.md").read_text()
    text = re.search(r"```nginx\n(.*?)```", page, re.S).group(1)
    for old, new in zip(("listen 8000", "127.0.0.1:8001", "127.0.0.1:8002"), ports, strict=True):
        assert text.count(old) == 1
        text = text.replace(old, old.replace("8000", f"127.0.0.1:{new}") if "listen" in old else f"127.0.0.1:{new}")
    return text


def get(port, path):
    return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60).read().decode()


def wait_for(port, process):
    for _ in range(600):
        assert process.poll() is None
        with contextlib.suppress(OSError):
            return get(port, "/health")
        time.sleep(0.1)
    raise AssertionError("the server did not start")


@pytest.fixture
def replicas(chatty, tmp_path):
    """(nginx's port, ports of the replicas, their processes)"""
    front, *ports = free_ports(3)
    (tmp_path / "nginx.conf").write_text(MAIN.format(tmp_path, shown([front, *ports])))
    command = [sys.executable, "-m", "fasa_gguf", "serve", chatty, "-c", "1024", "-np", "2", "-t", "1", "--port"]
    with contextlib.ExitStack() as stack:
        started = []
        for argv in ([*command, str(port)] for port in ports):
            process = subprocess.Popen(argv, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        for port, process in zip(ports, started, strict=True):
            wait_for(port, process)
        nginx = subprocess.Popen([NGINX, "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-e", tmp_path / "error.log"])
        stack.callback(nginx.wait)
        stack.callback(nginx.kill)
        wait_for(front, nginx)
        yield front, ports, started


def ask(port, prompt, session=None, **more):
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, **more}
    headers = {"Content-Type": "application/json", **({"X-Session-Id": session} if session else {})}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


def served(port):
    """Requests that a replica has answered."""
    rows = re.findall(r'^fasa_gguf_requests_total\{.*?outcome="\w+".*?\} ([\d.]+)$', get(port, "/metrics"), re.M)
    return sum(map(float, rows))


def test_conversations_stay_on_their_replica(replicas):
    """The second turn of each finds its prefix there; both replicas have some; a stream comes in pieces."""
    front, ports, _ = replicas
    for i in range(8):
        name, prompt = f"conversation {i}", f"{i}: the ship sailed on the wide sea; " * 6
        before = [served(port) for port in ports]
        usage = []
        for turn in range(3):
            answer = json.load(ask(front, prompt, name))
            usage.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            prompt += answer["choices"][0]["text"] + f" and then, {turn}, "
        assert usage[0] == 0 and usage[1] > 150 and usage[2] > usage[1]
        took = [served(port) - n for port, n in zip(ports, before, strict=True)]
        assert sorted(took) == [0, 3]
    assert all(served(port) > 0 for port in ports)
    lines = [x for x in ask(front, "a" * 100, "s", stream=True, max_tokens=8) if x.startswith(b"data: ")]
    assert len(lines) > 4 and lines[-1].strip() == b"data: [DONE]"


def test_a_replica_that_is_gone(replicas):
    """Its conversations are answered by the other one; the others stay where they are."""
    front, ports, processes = replicas
    home = {}
    for i in range(8):
        before = served(ports[0])
        ask(front, "the wide sea " * 20, f"c{i}").read()
        home[i] = 0 if served(ports[0]) > before else 1
    assert set(home.values()) == {0, 1}
    processes[0].kill()
    processes[0].wait()
    before = served(ports[1])
    for i in range(8):
        assert ask(front, "the wide sea " * 20, f"c{i}").status == 200
    assert served(ports[1]) == before + 8


def test_requests_without_the_header_and_errors(replicas):
    """One client without a name goes to one replica; what a replica refuses reaches the client as it is."""
    front, ports, _ = replicas
    before = [served(port) for port in ports]
    for _ in range(4):
        ask(front, "a b c").read()
    assert sorted(served(port) - n for port, n in zip(ports, before, strict=True)) == [0, 4]
    with pytest.raises(urllib.error.HTTPError) as e:
        ask(front, "word " * 3000)
    assert e.value.code == 400 and json.load(e.value)["error"]["code"] == "context_length_exceeded"
