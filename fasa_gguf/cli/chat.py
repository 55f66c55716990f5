"""Chats of the command `run`: the template that makes messages a prompt, and turns from stdin."""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable
from typing import Any

from ..errors import FasaError
from ..runtime import library
from .arguments import note, read_text

Message = dict[str, str]  # role, content
END = "/exit"


class Template:
    """A chat template: the model's own, one of llama.cpp's by name, or a Jinja file's. Raises FasaError."""

    def __init__(self, llm: Any, a: argparse.Namespace) -> None:
        self._where = a.chat_template_file or a.model
        self._name = b""
        self._jinja: Any = None
        if a.chat_template:
            self._name = _known_name(a.chat_template)
            return
        text = read_text(a.chat_template_file) if a.chat_template_file else llm.metadata.get("tokenizer.chat_template")
        if not a.chat_template_file and (why := llm.unreadable_templates.get("tokenizer.chat_template")):
            raise FasaError(f"{a.model}: its chat template cannot be read: {why}; {_OTHER}")
        if text is None:
            raise FasaError(f"{a.model}: this model has no chat template; {_OTHER}, or omit --chat and -cnv")
        self._jinja = self._read(llm, text)

    def _read(self, llm: Any, text: str) -> Any:
        from jinja2 import TemplateError
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        bos, eos = (llm._model.token_get_text(t) if t >= 0 else "" for t in (llm.token_bos(), llm.token_eos()))
        try:
            return Jinja2ChatFormatter(text, eos, bos)
        except TemplateError as e:
            raise FasaError(
                f"{self._where}: this chat template cannot be read: {e} (line {getattr(e, 'lineno', '?')}); {_OTHER}"
            ) from None

    def prompt(self, messages: list[Message]) -> str:
        """Up to where the answer begins. Raises FasaError for messages that the template does not take."""
        from jinja2 import TemplateError

        if self._jinja is None:
            return _apply(self._name, messages)
        try:
            return str(self._jinja(messages=messages).prompt)
        except (TemplateError, ValueError, TypeError) as e:
            raise FasaError(f"{self._where}: its chat template does not take these messages: {e}") from None


_OTHER = "give one with --chat-template NAME or --chat-template-file FILE"


def _known_name(name: str) -> bytes:
    llama = library.load()
    n = llama.llama_chat_builtin_templates(None, 0)
    found = (ctypes.c_char_p * n)()
    llama.llama_chat_builtin_templates(found, n)
    known = sorted(x.decode() for x in found)
    if name not in known:
        raise FasaError(f"--chat-template {name}: expected one of {', '.join(known)}")
    return name.encode()


def _apply(name: bytes, messages: list[Message]) -> str:
    llama = library.load()
    chat = (llama.llama_chat_message * len(messages))(
        *(llama.llama_chat_message(m["role"].encode(), m["content"].encode()) for m in messages)
    )
    room = 0
    for _ in range(2):  # the first time it says how much room is needed
        out = ctypes.create_string_buffer(room + 1)
        room = llama.llama_chat_apply_template(name, chat, len(messages), True, out, room)
        if room < 0:
            raise FasaError(f"--chat-template {name.decode()}: llama.cpp cannot apply it to these messages")
    return out.value.decode("utf-8", "replace")


def messages_of(a: argparse.Namespace) -> list[Message]:
    """The system message, if one is given."""
    return [{"role": "system", "content": a.system}] if a.system is not None else []


def converse(a: argparse.Namespace, first: str, answer: Callable[[list[Message]], tuple[str, bool]]) -> None:
    """Turn by turn: the user's from stdin (the first one may be given), the model's by `answer` of all messages.

    answer returns (what it wrote, whether Ctrl-C ended it). Ends at the end of stdin, with /exit, or when Ctrl-C
    strikes at the user's turn.
    """
    messages, talks = messages_of(a), sys.stdin.isatty()
    if talks:
        note(f"Ctrl-C ends an answer, and at your turn the chat, as {END} does")
    try:
        text: str | None = first or _ask(talks)
        while text is not None and text.strip() != END:
            if text.strip():
                messages.append({"role": "user", "content": text})
                written, ended = answer(messages)
                messages.append({"role": "assistant", "content": written})
                if ended:
                    note("the answer was ended")
            text = _ask(talks)
    except KeyboardInterrupt:
        print(file=sys.stderr)


def _ask(talks: bool) -> str | None:
    """The user's next turn, a line; None: there is none."""
    if talks:
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as e:
        raise FasaError(f"standard input: expected text in UTF-8: {e}") from None
    return line.rstrip("\n") if line else None
