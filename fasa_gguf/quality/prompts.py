"""Prompts and greedy answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import FasaError
from ..session import Session


class Prompter:
    """Turns records into tokens: the text in the model's chat template, if it has one and `raw` is off, then the
    answer's prefix. Raises FasaError for a template that cannot be used."""

    def __init__(self, session: Session, raw: bool = False) -> None:
        self.session, self.format = session, None
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
        try:
            prompt = self.format(messages=[{"role": "user", "content": text}]).prompt
        except Exception as e:
            raise FasaError(f"{self.session.path}: its chat template failed ({e}); use --raw") from None
        return self.session.tokenize(prompt + prefix, bos=not (self.bos and prompt.startswith(self.bos)))


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
