"""The text of tokens, whole."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any


def token_bytes(llama: Any, vocab: Any, tokens: Iterable[int], special: bool) -> bytes:
    """The bytes of tokens, each as long as it is.

    llama: the module llama_cpp. vocab: its pointer. special: special tokens by name; else they have no text.
    """
    out, room = [], 64
    buffer = ctypes.create_string_buffer(room)
    for token in tokens:
        n = llama.llama_token_to_piece(vocab, int(token), buffer, room, 0, special)
        if n < 0:  # the room that is needed
            room = -n
            buffer = ctypes.create_string_buffer(room)
            n = llama.llama_token_to_piece(vocab, int(token), buffer, room, 0, special)
        out.append(buffer.raw[:n])
    return b"".join(out)


def one_bos(llama: Any, vocab: Any, tokens: list[int]) -> list[int]:
    """`tokens` without the BOS that the tokenizer put before a text which begins with one."""
    bos = llama.llama_vocab_bos(vocab)
    twice = tokens[:2] == [bos, bos] and llama.llama_vocab_get_add_bos(vocab)
    return tokens[1:] if twice else tokens
