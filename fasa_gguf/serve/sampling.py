"""One request's sampler, of llama.cpp's, and the logprobs of its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from llama_cpp import LlamaGrammar
from llama_cpp._internals import LlamaSampler

from ..runtime import library
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


def make_sampler(session: Session, p: SamplingParams) -> Any:
    """A sampler chain as llama_cpp.Llama makes it. Raises ApiError for what llama.cpp cannot take."""
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
    if p.grammar:
        _add_grammar(chain, session, LlamaGrammar.from_string(p.grammar, verbose=False))
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


def _add_grammar(chain: Any, session: Session, grammar: Any) -> None:
    llama = library.load()
    made = llama.llama_sampler_init_grammar(session.vocab, grammar._grammar.encode(), grammar._root.encode())
    if not made:  # a null pointer would end the process when it is used
        raise ApiError("grammar: llama.cpp cannot parse it; expected GBNF with a rule named root", "grammar")
    llama.llama_sampler_chain_add(chain.sampler, made)


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
