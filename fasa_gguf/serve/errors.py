"""Errors as OpenAI's API has them."""

from __future__ import annotations

from typing import Any

from ..errors import FasaError


class ApiError(FasaError):
    """What a client is told: HTTP status, message, type, the parameter at fault, and a code."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        type: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.param, self.code = status, type, param, code

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


def server_error(message: str, code: str | None = None, status: int = 500) -> ApiError:
    """An error that is not the client's."""
    return ApiError(message, code=code, status=status, type="server_error")


def too_long(n_prompt: int | str, n_ctx: int, param: str) -> ApiError:
    return ApiError(
        f"This model's maximum context length is {n_ctx} tokens, and the prompt has {n_prompt}; expected at most "
        f"{n_ctx - 1}. Shorten it, or start the server with a larger -c",
        param,
        "context_length_exceeded",
    )
