"""Bodies of requests: llama_cpp.server's types and what OpenAI's clients send besides, made into a Request."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from llama_cpp import LlamaGrammar
from llama_cpp.server import types

from ..errors import FasaError
from ..params import SETTINGS, FasaParams, quality_settings
from .engine import Engine
from .errors import ApiError
from .limits import check_grammar, check_stops, tokenize_within
from .sampling import Sampler, SamplingParams
from .slots import Event, Request

MOST_LOGPROBS = 100
MOST_REPEATS = 1000  # of a JSON schema's items and characters; a grammar spells them out
REPEATS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
SAMPLED = tuple(name for name in SamplingParams.__dataclass_fields__ if name not in ("seed", "logit_bias", "grammar"))


class StreamOptions(types.BaseModel):
    include_usage: bool = False


class CompletionRequest(types.CreateCompletionRequest):
    """llama_cpp's, with prompts of tokens, stream_options and fasa."""

    prompt: str | list[int] | list[str] | list[list[int]] = ""
    stream_options: StreamOptions | None = None
    fasa: dict[str, Any] | None = None


class ChatRequest(types.CreateChatCompletionRequest):
    """llama_cpp's, with JSON schemas, max_completion_tokens, stream_options and fasa."""

    response_format: dict[str, Any] | None = None
    max_tokens: int | None = types.Field(default=None, ge=0)
    max_completion_tokens: int | None = types.Field(default=None, ge=0)
    stream_options: StreamOptions | None = None
    fasa: dict[str, Any] | None = None


def _check_quality(value: Any, params: FasaParams | None) -> None:
    """Raises ApiError for an unknown quality, and for one that the server does not run with."""
    try:
        wanted = quality_settings(value, "fasa")
    except FasaError as e:
        raise ApiError(str(e), "fasa.quality", "invalid_value") from None
    own = {name: getattr(params, name) for name in wanted} if params else wanted
    if own != wanted:
        raise ApiError(
            f"fasa.quality: this server runs with {own}, and {value} is {wanted}; settings belong to the context that "
            'all requests share: omit it, turn FASA off for this request with {"enabled": false}, or start a server '
            f"with --fasa-quality {value}",
            "fasa.quality",
            "fixed_setting",
        )


def check_fasa(given: Mapping[str, Any] | None, params: FasaParams | None, why_off: str) -> bool:
    """Is this request to be decoded dense. Settings belong to the context, which all requests share: a request may turn
    FASA off for itself, and may name the server's own values. Raises ApiError, which names the field."""
    given = dict(given or {})
    enabled = given.pop("enabled", params is not None)
    if not isinstance(enabled, bool):
        raise ApiError(f"fasa.enabled: expected true or false, found {enabled!r}", "fasa.enabled", "invalid_value")
    rows = {row.name: row for row in SETTINGS}
    for name, value in given.items():
        field = f"fasa.{name}"
        if name == "quality":
            _check_quality(value, params if enabled else None)
            continue
        if name not in rows:
            known = ", ".join(["enabled", "quality", *rows])
            raise ApiError(f"{field}: there is no such setting; known are {known}", field, "unknown_setting")
        try:
            if isinstance(value, bool):
                raise FasaError(f"{field}: expected {rows[name].expected()}, found {value!r}")
            FasaParams.from_mapping({name: value}, "fasa")
        except FasaError as e:
            raise ApiError(str(e), field, "invalid_value") from None
        own = getattr(params, name) if params else None
        if enabled and params and rows[name].kind(value) != own:
            raise ApiError(
                f"{field}: this server runs with {own}, found {value!r}; settings belong to the context that all "
                f"requests share: send the server's own value, turn FASA off for this request with "
                f'{{"enabled": false}}, or start a server with {rows[name].flag} {value}',
                field,
                "fixed_setting",
            )
    if enabled and params is None:
        raise ApiError(f"fasa: this server decodes dense: {why_off}", "fasa.enabled", "fasa_off")
    return not enabled


def grammar_of_schema(schema: Any, param: str) -> str:
    """GBNF for a JSON schema. Raises ApiError for one that llama_cpp cannot convert."""
    try:
        _check_repeats(schema)
        grammar = str(LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)._grammar)
        check_grammar(grammar, param)
        return grammar
    except Exception as e:  # its converter raises whatever comes
        raise ApiError(
            f"{param}: this JSON schema cannot be made into a grammar: {e or type(e).__name__}", param
        ) from None


def _check_repeats(schema: Any) -> None:
    """Raises ValueError for a schema that repeats something so often that its grammar would not fit into memory."""
    todo = [schema]
    while todo:
        found = todo.pop()
        for name in REPEATS if isinstance(found, dict) else ():
            value = found.get(name)
            if isinstance(value, (int, float)) and not value <= MOST_REPEATS:
                raise ValueError(f"expected {name} of at most {MOST_REPEATS}, found {value}")
        todo += found.values() if isinstance(found, dict) else found if isinstance(found, list) else []


def check_common(body: Any) -> None:
    """What neither llama_cpp's types nor we serve, and would be lost silently; what takes too much."""
    check_stops(stop_list(body.stop))
    check_grammar(body.grammar or "")
    for name in ("n", "best_of"):
        if getattr(body, name, None) not in (None, 1):
            raise ApiError(
                f"{name}: expected 1, found {getattr(body, name)}; send several requests", name, "unsupported"
            )
    if getattr(body, "suffix", None) is not None:
        raise ApiError("suffix: this server does not fill gaps; omit it", "suffix", "unsupported")
    for name in ("logprobs", "top_logprobs"):
        value = getattr(body, name, None)
        if isinstance(value, int) and value > MOST_LOGPROBS:
            raise ApiError(f"{name}: expected at most {MOST_LOGPROBS}, found {value}", name, "invalid_value")
    if body.min_tokens and body.grammar:
        raise ApiError("min_tokens: a grammar says where the text ends; omit one of them", "min_tokens", "unsupported")


def token_biases(engine: Engine, body: Any) -> dict[int, float]:
    """logit_bias by token; its keys are tokens' numbers, or texts with logit_bias_type "tokens"."""
    out: dict[int, float] = {}
    for key, bias in (body.logit_bias or {}).items():
        if body.logit_bias_type == "tokens":
            out |= dict.fromkeys(engine.session.tokenize(key, bos=False), bias)
        elif not key.isascii() or not key.isdigit() or len(key) > 10:
            raise ApiError(
                f'logit_bias: expected a token\'s number, found {key[:40]!r}; logit_bias_type "tokens" takes texts',
                "logit_bias",
            )
        else:
            out[int(key)] = bias
    return out


def make_request(
    engine: Engine,
    body: Any,
    prompt: list[int],
    dense: bool,
    *,
    max_tokens: int | None,
    stops: list[str],
    grammar: str,
    logprobs: int | None,
    send: Callable[[Event], None],
) -> Request:
    """The request of a checked body. max_tokens None or 0: until the context is full."""
    given = {name: value for name in SAMPLED if (value := getattr(body, name)) is not None}
    for name, value in given.items():
        if not math.isfinite(value):  # JSON has no such numbers; Python reads them
            raise ApiError(f"{name}: expected a finite number, found {value}", name, "invalid_value")
    seed = secrets.randbits(32) if body.seed is None else body.seed % 2**32
    sampling = SamplingParams(**given, seed=seed, logit_bias=token_biases(engine, body), grammar=grammar)
    if grammar and body.min_tokens:
        raise ApiError("min_tokens: a grammar says where the text ends; omit one of them", "min_tokens", "unsupported")
    return Request(
        prompt=prompt,
        max_tokens=max_tokens or engine.n_ctx,
        send=send,
        sampler=Sampler(engine.session, sampling),
        stops=tuple(stops),
        min_tokens=body.min_tokens,
        logprobs=logprobs,
        dense=dense,
    )


def stop_list(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else [s for s in stop or [] if s]


def completion_prompt(engine: Engine, prompt: Any) -> tuple[list[int], str]:
    """(tokens, text) of a completion's prompt: one text, or one list of tokens."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            raise ApiError(f"prompt: expected one, found {len(prompt)}; send several requests", "prompt", "unsupported")
        prompt = prompt[0]
    session = engine.session
    if isinstance(prompt, list):
        if wrong := [t for t in prompt if not 0 <= t < session.n_vocab]:
            raise ApiError(f"prompt: expected tokens from 0 to {session.n_vocab - 1}, found {wrong[0]}", "prompt")
        return list(prompt), session.detokenize(prompt)
    tokens = tokenize_within(session, prompt, "prompt")
    if not tokens and (bos := engine.llama.llama_vocab_bos(session.vocab)) >= 0:
        tokens = [bos]
    return tokens, prompt
