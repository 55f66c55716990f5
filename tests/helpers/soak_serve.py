"""Clients of every kind against `fasa-gguf serve`, for minutes: no mixed answers, no lost ones, flat memory.

python tests/helpers/soak_serve.py MODEL [--clients 32] [--minutes 10] [--threads 2]

Needs httpx. Exit status 1: it failed.
"""

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter

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


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("model")
    ap.add_argument("--clients", type=int, default=32)
    ap.add_argument("--minutes", type=float, default=10)
    ap.add_argument("--threads", default="2")
    a = ap.parse_args()
    flags = ["--port", "0", "-t", a.threads, "-c", "2048", "--cache-ram", "64"]
    command = [sys.executable, "-m", "fasa_gguf", "serve", a.model, *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT)
    line = next(line for line in server.stdout if line.startswith("listening on "))
    soak = Soak(line.split()[-1])
    threads = [threading.Thread(target=soak.client, args=(i,)) for i in range(a.clients)]
    for t in threads:
        t.start()
    sizes, end = [], time.monotonic() + 60 * a.minutes
    while time.monotonic() < end and server.poll() is None:
        time.sleep(min(15, 6 * a.minutes))
        sizes.append(rss(server.pid))
        print(f"{sum(soak.seen.values())} requests, {len(soak.wrong)} wrong, {sizes[-1]} MiB", flush=True)
    soak.stop = True
    for t in threads:
        t.join()
    health = httpx.get(soak.url.removesuffix("/v1") + "/health", timeout=60).json()
    server.terminate()
    code = server.wait(60)
    third = len(sizes) // 3
    early, late = max(sizes[third : 2 * third] or sizes), max(sizes[2 * third :])
    print(dict(soak.seen), f"exit {code}", health, f"MiB in the second third {early}, in the last {late}")
    for kind, what in soak.wrong[:5]:
        print("WRONG", kind, what)
    return int(bool(soak.wrong or code or health["slots_busy"] or late > 1.05 * early + 8))


if __name__ == "__main__":
    sys.exit(main())
