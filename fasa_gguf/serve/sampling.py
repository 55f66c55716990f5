"""One request's sampler, of llama.cpp's, and the logprobs of its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from llama_cpp import LlamaGrammar
from llama_cpp._internals import LlamaSampler

from ..runtime import library
from ..runtime.sampling import sample_checked
from ..session import Session
from .errors import ApiError

PENALTY_LAST_N = 64  # tokens, as in llama_cpp.Llama
BIAS = 100.0  # the largest logit bias, as in OpenAI's API


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample; names and meaning are llama_cpp.Llama's. grammar: GBNF, "" for none."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int = 0
    logit_bias: dict[int, float] = field(default_factory=dict)
    grammar: str = ""


class Sampler:
    """One request's samplers, with the state that its tokens make; made as llama_cpp.Llama makes them.

    Raises ApiError for what llama.cpp cannot take.
    """

    def __init__(self, session: Session, p: SamplingParams) -> None:
        self._session, self._llama = session, library.load()
        with session.used:
            self._chain = _chain(session, p)
            self._grammar = _grammar(session, p.grammar) if p.grammar else None

    def close(self) -> None:
        """Free llama.cpp's side now: the wrappers are circles, which wait for the collector."""
        for chain in (self._chain, self._grammar):
            if chain is not None:
                chain.close()

    def sample(self, i: int) -> int | None:
        """The next token, from the i-th row of the last batch; None when the grammar allows none."""
        if self._grammar is None:
            return int(self._llama.llama_sampler_sample(self._chain.sampler, self._session.ctx, i))
        logits = np.ctypeslib.as_array(self._llama.llama_get_logits_ith(self._session.ctx, i), (self._session.n_vocab,))
        return sample_checked(self._llama, [self._grammar.sampler, self._chain.sampler], logits)


def _chain(session: Session, p: SamplingParams) -> Any:
    chain = LlamaSampler()
    if p.logit_bias:
        for token, bias in p.logit_bias.items():
            if not 0 <= token < session.n_vocab:
                raise ApiError(
                    f"logit_bias: expected tokens from 0 to {session.n_vocab - 1}, found {token}", "logit_bias"
                )
            if not (math.isfinite(bias) and abs(bias) <= BIAS):
                raise ApiError(f"logit_bias: expected -{BIAS:g} to {BIAS:g}, found {bias}", "logit_bias")
        chain.add_logit_bias(session.n_vocab, p.logit_bias)
    chain.add_penalties(session.n_vocab, PENALTY_LAST_N, p.repeat_penalty, p.frequency_penalty, p.presence_penalty)
    if p.temperature == 0:
        chain.add_greedy()
    elif p.temperature < 0:
        chain.add_dist(p.seed)
    elif p.mirostat_mode == 1:
        chain.add_mirostat(session.n_vocab, p.seed, p.mirostat_tau, p.mirostat_eta, 100)
    elif p.mirostat_mode == 2:
        chain.add_mirostat_v2(p.seed, p.mirostat_tau, p.mirostat_eta)
    else:
        chain.add_top_k(p.top_k)
        chain.add_top_p(p.top_p)
        chain.add_min_p(p.min_p)
        chain.add_temp(p.temperature)
        chain.add_dist(p.seed)
    return chain


def _grammar(session: Session, text: str) -> Any:
    llama, chain, grammar = library.load(), LlamaSampler(), LlamaGrammar.from_string(text, verbose=False)
    made = llama.llama_sampler_init_grammar(session.vocab, grammar._grammar.encode(), grammar._root.encode())
    if not made:  # a null pointer would end the process when it is used
        raise ApiError("grammar: llama.cpp cannot parse it; expected GBNF with a rule named root", "grammar")
    llama.llama_sampler_chain_add(chain.sampler, made)
    return chain


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [n_vocab]: logprobs of one row of logits."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def top_tokens(logprobs: np.ndarray, n: int) -> list[int]:
    """The n most likely tokens, the most likely first; ties go to the lower token."""
    if n <= 0:
        return []
    n = min(n, len(logprobs))
    found = np.argpartition(-logprobs, n - 1)[:n]
    return [int(t) for t in found[np.lexsort((found, -logprobs[found]))]]
