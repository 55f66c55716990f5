"""What one client may take of a server: bytes, time, connections; and what one request may ask of llama.cpp."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from ..session import Session
from .errors import ApiError, server_error, too_long

BYTES_PER_TOKEN = 64  # of a body, by default: more than a token's text in JSON with all of it escaped
LEAST_BODY = 2**20  # bytes, by default
DROPPED = 16  # times the limit: larger bodies are not read to their end
FIRST_TRIED = 4096  # characters
AT_A_CUT = 64  # tokens that a beginning may have more than the whole text has there
MOST_STOPS = 64
MOST_STOP = 1024  # characters
MOST_GRAMMAR = 2**18  # characters
MOST_NESTING = 256  # brackets within brackets, which llama.cpp goes down on the stack
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.S)  # of a grammar: where brackets are text

Message = dict[str, Any]  # of ASGI
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """body: bytes of a request. arrive: seconds in which it must have come. connections: open ones."""

    body: int
    arrive: float
    connections: int


def default_body(n_ctx: int) -> int:
    """Bytes that a request may have when the server was not told: for a slot of n_ctx tokens."""
    return max(LEAST_BODY, BYTES_PER_TOKEN * n_ctx)


# ---- bodies ----


class Bodies:
    """The application behind a limit of bytes, and of seconds in which a body must have arrived."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as e:
            await _answer(send, e)
            return
        if body is None:
            return  # the client went away
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return parts.pop() if parts else await receive()

        await self._app(scope, again, send)

    async def _read(self, scope: dict[str, Any], receive: Receive) -> bytes | None:
        """The whole body; None: the client went away. Raises ApiError.

        One that is somewhat too large is read and dropped: a client that still sends would not see the answer.
        """
        most = self._limits.body
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > DROPPED * most:
            raise _too_large(most)
        loop, parts, size = asyncio.get_running_loop(), [], 0
        end = loop.time() + self._limits.arrive
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(end - loop.time(), 0.001))
            except asyncio.TimeoutError:
                raise (_too_large(most) if size > most else too_slow(self._limits.arrive)) from None
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            over = not message.get("more_body")
            if size > most:
                parts.clear()
                if over or size > DROPPED * most:
                    raise _too_large(most)
            elif over:
                return b"".join(parts)


def _too_large(most: int) -> ApiError:
    return ApiError(
        f"the body is larger than the {most} bytes that this server takes; send less, or start it with a larger "
        "--max-body",
        code="request_too_large",
        status=413,
    )


def too_slow(seconds: float) -> ApiError:
    return ApiError(
        f"the request has not arrived within {seconds:g} s; send it faster, or start the server with a larger "
        "--receive-timeout",
        code="request_timeout",
        status=408,
    )


async def _answer(send: Send, e: ApiError) -> None:
    """An error before the body was read, after which the connection is of no use."""
    content = json.dumps(e.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": e.status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": content})


# ---- connections ----


def protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol for a server with these limits."""

    class Limited(H11Protocol):
        """Closes connections above the limit, and those whose headers take too long; uvicorn waits for ever."""

        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self._refuse(
                    server_error(
                        f"this server has its {limits.connections} connections open; try again later, or start it "
                        "with a larger --max-connections",
                        "too_many_connections",
                        503,
                    )
                )
            else:
                self._expect()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._expect()
            else:
                self._arrived()

        def connection_lost(self, exc: Exception | None) -> None:
            self._arrived()
            super().connection_lost(exc)

        def _expect(self) -> None:
            if self._late is None and not self.transport.is_closing():
                self._late = self.loop.call_later(limits.arrive, self._refuse, too_slow(limits.arrive))

        def _arrived(self) -> None:
            if self._late:
                self._late.cancel()
                self._late = None

        def _refuse(self, e: ApiError) -> None:
            content = json.dumps(e.body()).encode()
            head = f"HTTP/1.1 {e.status} Refused\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
            self.transport.close()

    return Limited


# ---- what a request asks for ----


def tokenize_within(session: Session, text: str, param: str, bos: bool = True, special: bool = True) -> list[int]:
    """The tokens of a text for one slot. Raises ApiError for one that cannot fit.

    llama.cpp's time may grow with the square of the length, so a long text is tried by its beginning first.
    """
    n_ctx = session.n_ctx // session.settings.n_seq_max
    n = FIRST_TRIED
    while n < len(text):
        found = len(session.tokenize(text[:n], bos, special))
        if found > n_ctx + AT_A_CUT:
            raise too_long(f"more than {found - AT_A_CUT}", n_ctx, param)
        n *= 4
    return session.tokenize(text, bos, special)


def check_stops(stops: Iterable[str]) -> None:
    """Raises ApiError. Every token's text is compared with every stop string."""
    found = list(stops)
    if len(found) > MOST_STOPS:
        raise ApiError(f"stop: expected at most {MOST_STOPS} strings, found {len(found)}", "stop", "invalid_value")
    longest = max(map(len, found), default=0)
    if longest > MOST_STOP:
        raise ApiError(
            f"stop: expected strings of at most {MOST_STOP} characters, found {longest}", "stop", "invalid_value"
        )


def check_grammar(text: str, param: str = "grammar") -> None:
    """Raises ApiError for a grammar that llama.cpp's parser would end the process with: it goes down on the stack."""
    if len(text) > MOST_GRAMMAR:
        raise ApiError(
            f"{param}: expected a grammar of at most {MOST_GRAMMAR} characters, found {len(text)}",
            param,
            "invalid_value",
        )
    depth = deepest = 0
    for c in _QUOTED.sub("", text):
        depth += (c == "(") - (c == ")")
        deepest = max(deepest, depth)
    if deepest > MOST_NESTING:
        raise ApiError(
            f"{param}: expected at most {MOST_NESTING} brackets within brackets, found {deepest}",
            param,
            "invalid_value",
        )
