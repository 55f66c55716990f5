"""A server in a process of its own, and the ways in which a client asks."""

import subprocess
import sys
import time

from apps import environment

TOKENS = 16


class Server:
    """A server on a free port, and the ways in which a client asks."""

    def __init__(self, model, log, *flags, profile=None, **settings):
        import openai

        self.log, self.profile = log, profile
        command = [sys.executable, "-m", "fasa_gguf", "serve", str(model), "--port", "0", "-t", "1", *flags]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment(profile, **settings)
            )
        for _ in range(600):
            text = log.read_text()
            if "listening on " in text:
                break
            assert self.process.poll() is None, text[-3000:]
            time.sleep(0.1)
        self.base = text.split("listening on ")[1].split()[0]
        self.root = self.base.removesuffix("/v1")
        self.client = openai.OpenAI(base_url=self.base, api_key="none", timeout=300, max_retries=0)

    def end(self):
        self.process.terminate()
        return self.process.wait(30)

    def get(self, path):
        import httpx

        return httpx.get(self.root + path, timeout=60)

    def post(self, path, **kwargs):
        import httpx

        return httpx.post(self.root + path, timeout=60, **kwargs)

    def completion(self, prompt, **kwargs):
        kwargs = {"max_tokens": TOKENS, "temperature": 0, **kwargs}
        return self.client.completions.create(model="m", prompt=prompt, **kwargs).choices[0].text

    def completion_stream(self, prompt):
        out = self.client.completions.create(model="m", prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True)
        return "".join(chunk.choices[0].text for chunk in out)

    def make_chat(self, content, **kwargs):
        messages = [{"role": "user", "content": content}]
        kwargs = {"max_tokens": TOKENS, "temperature": 0, **kwargs}
        return self.client.chat.completions.create(model="m", messages=messages, **kwargs)

    def chat(self, prompt):
        return self.make_chat(prompt).choices[0].message.content

    def chat_stream(self, prompt):
        return "".join(chunk.choices[0].delta.content or "" for chunk in self.make_chat(prompt, stream=True))
