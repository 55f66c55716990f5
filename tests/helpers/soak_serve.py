"""Clients of every kind against `fasa-gguf serve`, for minutes: no mixed answers, no lost ones, flat memory.

python tests/helpers/soak_serve.py [MODEL] [--clients 32] [--minutes 10] [--threads 2] [--cache-ram 64]

MODEL: by default a random one. Needs httpx. Memory is the server's without its prefix cache, which has a limit of its
own. Exit status 1: it failed.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
from apps import environment
from paths import ROOT

WORDS = ["sea", "night", "wind", "stone", "river", "light", "snow", "road", "hill", "bird", "salt", "moon"]


class Soak:
    """The clients, and what they found."""

    def __init__(self, url):
        self.url, self.seen, self.wrong, self.stop = url, Counter(), [], False
        self.expected, self.lock = {}, threading.Lock()

    def post(self, **body):
        return httpx.post(self.url + "/completions", json={"temperature": 0, **body}, timeout=300)

    def own(self, rng, number):
        """A grammar allows one answer: another client's would be seen."""
        wanted = f"client {number} says {rng.choice(WORDS)} {rng.randrange(10**6)}"
        out = self.post(prompt=self.prompt(rng), max_tokens=200, grammar=f'root ::= "{wanted}"').json()
        return out["choices"][0]["text"] == wanted, out

    def same(self, rng, _number):
        """One of few prompts: the same answer each time."""
        prompt = " ".join(random.Random(rng.randrange(8)).choices(WORDS, k=60))
        out = self.post(prompt=prompt, max_tokens=16).json()
        text = out["choices"][0]["text"]
        with self.lock:
            return self.expected.setdefault(prompt, text) == text, (prompt, text, self.expected[prompt])

    def leaves(self, rng, _number):
        """Goes away in the middle of a stream."""
        body = {"prompt": self.prompt(rng), "max_tokens": 500, "min_tokens": 500, "stream": True}
        with httpx.stream("POST", self.url + "/completions", json=body, timeout=300) as stream:
            lines = stream.iter_lines()
            return all(next(lines, None) is not None for _ in range(rng.randrange(1, 6))), body

    def oversized(self, rng, _number):
        out = self.post(prompt=" ".join(rng.choices(WORDS, k=5000)))
        return out.status_code == 400 and out.json()["error"]["code"] == "context_length_exceeded", out.text

    def too_large(self, _rng, _number):
        out = self.post(prompt="x" * 2**21)
        return out.status_code == 413 and out.json()["error"]["code"] == "request_too_large", out.text

    def malformed(self, rng, _number):
        out = self.post(prompt="x", **rng.choice([{"temperature": "hot"}, {"fasa": {"budget": -1}}, {"n": 3}]))
        return out.status_code == 400 and set(out.json()["error"]) == {"message", "type", "param", "code"}, out.text

    def stream(self, rng, _number):
        """Every chunk is JSON, the last one says why it ended."""
        body = {"prompt": self.prompt(rng), "max_tokens": 24, "stream": True, "temperature": 1}
        with httpx.stream("POST", self.url + "/completions", json=body, timeout=300) as stream:
            data = [line[6:] for line in stream.iter_lines() if line.startswith("data: ")]
        last = json.loads(data[-2])["choices"][0]["finish_reason"]
        return data[-1] == "[DONE]" and last in ("stop", "length"), data[-3:]

    def prompt(self, rng):
        return " ".join(rng.choices(WORDS, k=rng.choice((5, 40, 150))))

    def client(self, number):
        rng = random.Random(number)
        kinds = [self.own, self.own, self.same, self.same, self.stream, self.leaves, self.oversized, self.malformed]
        kinds += [self.own, self.same, self.too_large]
        while not self.stop:
            kind = rng.choice(kinds)
            try:
                right, what = kind(rng, number)
            except Exception as e:
                right, what = False, repr(e)
            self.seen[kind.__name__] += 1
            if not right:
                self.wrong.append((kind.__name__, str(what)[:400]))


def rss(pid):
    """MiB of memory that a process has."""
    with open(f"/proc/{pid}/status") as f:
        return int(next(line for line in f if line.startswith("VmRSS")).split()[1]) // 1024


def prefix_cache(url):
    """MiB of the server's prefix cache."""
    page = httpx.get(url.removesuffix("/v1") + "/metrics", timeout=60).text
    line = next(line for line in page.splitlines() if line.startswith("fasa_gguf_prefix_cache_bytes "))
    return float(line.split()[1]) / 2**20


def make_model(folder):
    from tiny_gguf import write_tiny

    from fasa_gguf.gguf.file import GGUFFile
    from fasa_gguf.gguf.shape import model_shape
    from fasa_gguf.speed.random_model import synthetic_profile

    path = Path(folder) / "model.gguf"
    write_tiny(path)
    synthetic_profile(*model_shape(GGUFFile(path)), seed=2).save(path.with_suffix(".fasa.json"))
    return path


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("model", nargs="?")
    ap.add_argument("--clients", type=int, default=32)
    ap.add_argument("--minutes", type=float, default=10)
    ap.add_argument("--threads", default="2")
    ap.add_argument("--cache-ram", default="64")
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return run(a, a.model or make_model(folder))


def run(a, model):
    flags = ["--port", "0", "-t", a.threads, "-c", "2048", "--cache-ram", a.cache_ram, "--max-body", "1"]
    command = [sys.executable, "-m", "fasa_gguf", "serve", str(model), *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT)
    line = next(line for line in server.stdout if line.startswith("listening on "))
    soak = Soak(line.split()[-1])
    threads = [threading.Thread(target=soak.client, args=(i,)) for i in range(a.clients)]
    for t in threads:
        t.start()
    sizes, begin = [], time.monotonic()
    print("seconds  requests  wrong  MiB  of them prefix cache", flush=True)
    while time.monotonic() < begin + 60 * a.minutes and server.poll() is None:
        time.sleep(min(15, 6 * a.minutes))
        cached, size = prefix_cache(soak.url), rss(server.pid)
        sizes.append(size - cached)
        seconds, n = int(time.monotonic() - begin), sum(soak.seen.values())
        print(f"{seconds:7}  {n:8}  {len(soak.wrong):5}  {size:3}  {cached:.0f}", flush=True)
    soak.stop = True
    for t in threads:
        t.join()
    health = httpx.get(soak.url.removesuffix("/v1") + "/health", timeout=60).json()
    server.terminate()
    code = server.wait(60)
    third = len(sizes) // 3
    early, late = max(sizes[third : 2 * third] or sizes), max(sizes[2 * third :])
    print(dict(soak.seen), f"exit {code}", health)
    print(f"MiB without the prefix cache: at most {early:.0f} in the second third, {late:.0f} in the last")
    for kind, what in soak.wrong[:5]:
        print("WRONG", kind, what)
    return int(bool(soak.wrong or code or health["slots_busy"] or late > 1.05 * early + 8))


if __name__ == "__main__":
    sys.exit(main())
