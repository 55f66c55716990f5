"""The HTTP side: llama_cpp.server's routes on the engine, /health and /metrics."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from llama_cpp.server import types
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import FasaError
from ..runtime import pieces
from . import chat, slots
from .engine import Engine
from .errors import ApiError, server_error
from .limits import Bodies, Limits, tokenize_within
from .metrics import Metrics
from .requests import (
    ChatRequest,
    CompletionRequest,
    check_common,
    check_fasa,
    completion_prompt,
    make_request,
    stop_list,
)

CLOSED = 499  # the client went away; nobody reads it


@dataclass
class Server:
    """What the routes share. name: the model's, for /v1/models. why_off: why FASA is off, "" when it is on."""

    engine: Engine
    chats: chat.Chats
    metrics: Metrics
    limits: Limits
    name: str
    api_key: str | None = None
    why_off: str = ""


def _server(http: Request) -> Server:
    server: Server = http.app.state.server
    return server


def _authenticate(http: Request) -> None:
    key = _server(http).api_key
    given = http.headers.get("authorization", "").removeprefix("Bearer ")
    if key is not None and not secrets.compare_digest(given.encode(), key.encode()):
        raise ApiError(
            "the API key is missing or wrong", code="invalid_api_key", status=401, type="authentication_error"
        )


ServerOf = Annotated[Server, Depends(_server)]


# ---- errors ----


def _invalid(e: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, by its field."""
    first = e.errors()[0]
    where = [str(x) for x in first["loc"] if x != "body"]
    param = ".".join(where) or None
    if first["type"] == "json_invalid":
        return ApiError(f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}", code="invalid_json")
    found = f", found {first['input']!r}"[:200] if first["type"] != "missing" else ""
    return ApiError(f"{param or 'body'}: {first['msg']}{found}", where[0] if where else None, "invalid_value")


def as_api_error(e: Exception) -> ApiError:
    """What a client is told of any exception."""
    if isinstance(e, ApiError):
        return e
    if isinstance(e, RequestValidationError):
        return _invalid(e)
    if isinstance(e, HTTPException):
        return ApiError(str(e.detail), status=e.status_code)
    print(f"fasa-gguf: error: {type(e).__name__}: {e}", file=sys.stderr)
    return server_error(str(e) if isinstance(e, FasaError) else "internal error")


def _error_response(e: Exception) -> Response:
    error = as_api_error(e)
    return JSONResponse(error.body(), status_code=error.status)


class _Route(APIRoute):
    """Every exception becomes an error as OpenAI's API has them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handle(http: Request) -> Response:
            start = time.perf_counter()
            try:
                response: Response = await inner(http)
            except Exception as e:
                return _error_response(e)
            response.headers["openai-processing-ms"] = str(int((time.perf_counter() - start) * 1000))
            return response

        return handle


router = APIRouter(route_class=_Route, dependencies=[Depends(_authenticate)])
public = APIRouter(route_class=_Route)


# ---- completions ----


class _Answer:
    """The events of one request, on their way from the engine's thread to the event loop."""

    def __init__(self) -> None:
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[slots.Event]()
        self.request: slots.Request | None = None
        self.id, self.created = f"cmpl-{uuid.uuid4()}", int(time.time())

    def send(self, event: slots.Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: the server ends
            self.cancel()

    def cancel(self) -> None:
        if self.request:
            self.request.cancel()

    async def events(self) -> AsyncIterator[slots.Piece | slots.Done]:
        """Up to Done; raises what the engine sent instead."""
        while True:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if isinstance(event, slots.Done):
                return

    def part(self, model: str, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """A completion, or a chunk of one, as llama_cpp has it."""
        choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish_reason}
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": model,
            "choices": [choice],
        }


class _Stream(EventSourceResponse):
    """A stream whose request is cancelled when the client goes away, however early."""

    def __init__(self, answer: _Answer, content: AsyncIterator[dict[str, str]]) -> None:
        super().__init__(content, sep="\n")
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _collect(http: Request, answer: _Answer) -> tuple[str, dict[str, Any] | None, slots.Done]:
    """(text, logprobs, Done) of a request; it is cancelled when the client goes away."""

    async def read() -> tuple[str, dict[str, Any] | None, slots.Done]:
        text: list[str] = []
        logprobs: dict[str, list[Any]] = {}
        async for event in answer.events():
            if isinstance(event, slots.Done):
                return "".join(text), logprobs or None, event
            text.append(event.text)
            for name, values in (event.logprobs or {}).items():
                logprobs.setdefault(name, []).extend(values)
        raise AssertionError("events end with Done")

    reader, watcher = asyncio.ensure_future(read()), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({reader, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not reader.done():
            raise ApiError("the client closed the request", status=CLOSED)
        return reader.result()
    finally:
        reader.cancel()
        watcher.cancel()
        answer.cancel()


async def _chunks(
    answer: _Answer, model: str, convert: Callable[[dict[str, Any], bool], Any], begin: str, with_usage: bool
) -> AsyncIterator[dict[str, str]]:
    """The data of a stream's events. convert: a completion's chunk as chunks; begin: text before the answer."""
    first, chunk = True, None
    try:
        if begin:
            yield {"data": chat.as_json(answer.part(model, begin, None, None))}
        async for event in answer.events():
            if isinstance(event, slots.Done):
                part = answer.part(model, "", None, event.finish_reason)
            else:
                part = answer.part(model, event.text, event.logprobs, None)
            for chunk in convert(part, first):
                yield {"data": chat.as_json(chunk)}
            first = False
            if with_usage and chunk and isinstance(event, slots.Done):
                yield {"data": chat.as_json({**chunk, "choices": [], "usage": event.usage})}
    except Exception as e:
        yield {"data": chat.as_json(as_api_error(e).body())}
    yield {"data": "[DONE]"}


def _with_usage(body: Any) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


@router.post("/v1/completions", summary="Completion", tags=["OpenAI V1"])
@router.post("/v1/engines/copilot-codex/completions", include_in_schema=False)
async def create_completion(http: Request, server: ServerOf, body: Annotated[CompletionRequest, Body()]) -> Response:
    answer, engine = _Answer(), server.engine
    check_common(body)
    if body.echo and body.logprobs is not None:
        raise ApiError("echo: there are no logprobs of prompts; omit echo or logprobs", "echo", "unsupported")
    dense = check_fasa(body.fasa, engine.params, server.why_off)

    def prepare() -> tuple[slots.Request, str]:
        tokens, text = completion_prompt(engine, body.prompt)
        request = make_request(
            engine,
            body,
            tokens,
            dense,
            max_tokens=body.max_tokens,
            stops=stop_list(body.stop),
            grammar=body.grammar or "",
            logprobs=body.logprobs,
            send=answer.send,
        )
        return request, text

    answer.request, prompt = await run_in_threadpool(prepare)
    engine.submit(answer.request)
    model = body.model or server.name
    begin = prompt if body.echo else ""
    if body.stream:
        return _Stream(answer, _chunks(answer, model, lambda part, _first: [part], begin, _with_usage(body)))
    text, logprobs, done = await _collect(http, answer)
    return JSONResponse(answer.part(model, begin + text, logprobs, done.finish_reason) | {"usage": done.usage})


@router.post("/v1/chat/completions", summary="Chat", tags=["OpenAI V1"])
async def create_chat_completion(http: Request, server: ServerOf, body: Annotated[ChatRequest, Body()]) -> Response:
    answer, engine = _Answer(), server.engine
    check_common(body)
    dense = check_fasa(body.fasa, engine.params, server.why_off)

    def prepare() -> tuple[slots.Request, str | None]:
        made = server.chats.prompt(body)
        request = make_request(
            engine,
            body,
            made.tokens,
            dense,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            stops=made.stops,
            grammar=made.grammar,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            send=answer.send,
        )
        return request, made.tool

    answer.request, tool = await run_in_threadpool(prepare)
    try:
        engine.submit(answer.request)
    except ApiError as e:
        e.param = "messages" if e.param == "prompt" else e.param
        raise
    model = body.model or server.name
    if body.stream:
        convert = lambda part, first: chat.chunks(part, tool, first)  # noqa: E731
        return _Stream(answer, _chunks(answer, model, convert, "", _with_usage(body)))
    text, logprobs, done = await _collect(http, answer)
    completion = answer.part(model, text, logprobs, done.finish_reason) | {"usage": done.usage}
    return JSONResponse(chat.whole(completion, tool))


# ---- the rest ----


@router.post("/v1/embeddings", summary="Embedding", tags=["OpenAI V1"])
async def create_embedding(body: types.CreateEmbeddingRequest) -> Response:
    raise ApiError("this server writes text; it has no embeddings", code="unsupported")


@router.get("/v1/models", summary="Models", tags=["OpenAI V1"])
async def get_models(server: ServerOf) -> Response:
    model = {"id": server.name, "object": "model", "owned_by": "me", "permissions": []}
    return JSONResponse({"object": "list", "data": [model]})


@router.post("/extras/tokenize", summary="Tokenize", tags=["Extras"])
async def tokenize(server: ServerOf, body: types.TokenizeInputRequest) -> types.TokenizeInputResponse:
    tokens = await run_in_threadpool(tokenize_within, server.engine.session, body.input, "input")
    return types.TokenizeInputResponse(tokens=tokens)


@router.post("/extras/tokenize/count", summary="Tokenize Count", tags=["Extras"])
async def count_query_tokens(server: ServerOf, body: types.TokenizeInputRequest) -> types.TokenizeInputCountResponse:
    tokens = await run_in_threadpool(tokenize_within, server.engine.session, body.input, "input")
    return types.TokenizeInputCountResponse(count=len(tokens))


@router.post("/extras/detokenize", summary="Detokenize", tags=["Extras"])
async def detokenize(server: ServerOf, body: types.DetokenizeInputRequest) -> types.DetokenizeInputResponse:
    session = server.engine.session
    if wrong := [t for t in body.tokens if not 0 <= t < session.n_vocab]:
        raise ApiError(f"tokens: expected 0 to {session.n_vocab - 1}, found {wrong[0]}", "tokens", "invalid_value")
    with session.used:
        text = pieces.token_bytes(session.llama, session.vocab, body.tokens, False)
    return types.DetokenizeInputResponse(text=text.decode("utf-8", "replace"))


@router.get("/metrics", summary="Prometheus metrics", tags=["Server"])
async def metrics(server: ServerOf) -> Response:
    return Response(server.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


@public.get("/health", summary="Health", tags=["Server"])
async def health(server: ServerOf) -> Response:
    e = server.engine
    state = {"status": "ok", "slots": len(e.slots), "slots_busy": e.n_busy, "requests_waiting": e.n_waiting}
    state["fasa"] = server.why_off or "on"
    if not e.is_alive:
        return JSONResponse({**state, "status": "stopped"}, status_code=503)
    return JSONResponse(state)


def create_app(server: Server) -> FastAPI:
    """The application."""
    app = FastAPI(title="fasa-gguf serve", version=__version__)
    app.state.server = server
    app.add_middleware(Bodies, limits=server.limits)
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
    )

    async def on_error(_http: Request, e: Exception) -> Response:
        return _error_response(e)

    app.add_exception_handler(HTTPException, on_error)  # a path or a method that is not there
    app.include_router(public)
    app.include_router(router)
    return app
