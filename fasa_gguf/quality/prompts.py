"""Prompts and greedy answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import FasaError
from ..session import Session


class Prompter:
    """Turns records into tokens: the text in the model's chat template, if it has one and `raw` is off, then the
    answer's prefix. Raises FasaError for a template that cannot be used."""

    def __init__(self, session: Session, raw: bool = False) -> None:
        self.session = session
        self.format: Any = None
        template = None if raw else session.llama.llama_model_chat_template(session.model, None)
        if template:
            from llama_cpp.llama_chat_format import Jinja2ChatFormatter

            ends = [
                self._text(get(session.vocab)) for get in (session.llama.llama_vocab_bos, session.llama.llama_vocab_eos)
            ]
            self.bos = ends[0]
            try:
                self.format = Jinja2ChatFormatter(
                    template.decode("utf-8", "replace"), bos_token=ends[0], eos_token=ends[1]
                )
            except Exception as e:  # jinja2 raises whatever the template does
                raise FasaError(f"{session.path}: its chat template cannot be read ({e}); use --raw") from None

    def _text(self, token: int) -> str:
        return (
            ""
            if token < 0
            else self.session.llama.llama_vocab_get_text(self.session.vocab, token).decode("utf-8", "replace")
        )

    def __call__(self, text: str, prefix: str = "") -> list[int]:
        """Tokens of a prompt, the answer's prefix last."""
        if self.format is None:
            return self.session.tokenize(text + prefix)
        return self._first(self._chat([text]) + prefix)

    def _chat(self, turns: Sequence[str]) -> str:
        """Turns of user and assistant, the user's first, in the template."""
        roles = ("user", "assistant")
        messages: list[Any] = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        try:
            return self.format(messages=messages).prompt
        except Exception as e:
            raise FasaError(f"{self.session.path}: its chat template failed ({e}); use --raw") from None

    def _first(self, text: str) -> list[int]:
        return self.session.tokenize(text, bos=self.format is None or not (self.bos and text.startswith(self.bos)))

    def piece(self, text: str) -> list[int]:
        """Tokens of a text inside a prompt."""
        return self.session.tokenize(text, bos=False)

    def around(self, intro: str, question: str, prefix: str, goes_on: bool) -> list[list[int]]:
        """Tokens of a prompt without its haystack and the answer, in four parts.

        Before the haystack; question and prefix of the answer; between answer and the rest of the haystack; behind it.
        goes_on: that rest follows, as the user's next turn in a chat; else the answer ends the prompt, and the last two
        are []. Raises FasaError for a template that changes its turns.
        """
        hay, answer, rest = (f"\u27e8{name}\u27e9" for name in ("haystack", "answer", "rest"))
        if self.format is None:
            text = intro + hay + question + prefix + answer + (f".\n{rest}" if goes_on else "")
        elif goes_on:
            text = self._chat([intro + hay + question, prefix + answer + ".", rest])
        else:
            text = self._chat([intro + hay + question]) + prefix + answer
        marks = [hay, answer, *([rest] if goes_on else [])]
        if any(text.count(mark) != 1 for mark in marks):
            raise FasaError(f"{self.session.path}: its chat template does not keep the text of a turn; use --raw")
        parts = []
        for mark in marks:
            part, text = text.split(mark)
            parts.append(part)
        parts += [text, ""] if not goes_on else [text]
        return [self._first(parts[0]), *(self.piece(part) if part else [] for part in parts[1:])]


def greedy(
    session: Session, token: int, pos: int, n_predict: int, finished: Callable[[list[int]], bool] = lambda out: False
) -> list[int]:
    """At most n_predict best tokens; `token` at position `pos` is decoded first.

    Ends at an end-of-generation token, or when finished(tokens so far).
    """
    out: list[int] = []
    while len(out) < n_predict:
        token = int(np.argmax(session.decode([token], pos + len(out))))
        if session.llama.llama_vocab_is_eog(session.vocab, token):
            break
        out.append(token)
        if finished(out):
            break
    return out
