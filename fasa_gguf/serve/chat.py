"""Chats by llama_cpp's own handlers: the prompt that a chat makes, and completions turned back into chats."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from llama_cpp import llama_chat_format as formats

from ..session import Session
from .errors import ApiError
from .limits import tokenize_within
from .requests import ChatRequest, grammar_of_schema, stop_list


class _Made(BaseException):
    """What a handler asks llama_cpp.Llama for."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


class _Llama:
    """In the place of llama_cpp.Llama: a handler tokenizes with it, and asks for a completion, where we take over."""

    verbose = False

    def __init__(self, session: Session) -> None:
        self._session = session

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return tokenize_within(self._session, text.decode(), "messages", add_bos, special)

    def create_completion(self, **arguments: Any) -> Any:
        raise _Made(arguments)


@dataclass(frozen=True)
class ChatPrompt:
    """What is to be completed. tool: the name of the function whose arguments the text is."""

    tokens: list[int]
    stops: list[str]
    grammar: str
    tool: str | None


class Chats:
    """The chat format of a model: its template, or one of llama_cpp's formats by name. Raises FasaError for no such."""

    def __init__(self, session: Session, name: str | None = None) -> None:
        self._session, self._why = session, ""
        self._handler: Any = None
        llama, vocab = session.llama, session.vocab
        if name:
            try:
                self._handler = formats.get_chat_completion_handler(name)
            except formats.LlamaChatCompletionHandlerNotFoundException:
                known = ", ".join(sorted(formats.LlamaChatCompletionHandlerRegistry()._chat_handlers))
                raise ApiError(f"--chat-format {name}: there is no such format; known are {known}") from None
            return
        template = llama.llama_model_chat_template(session.model, None)
        if not template:
            self._why = (
                "this model has no chat template; start the server with --chat-format NAME, or use /v1/completions"
            )
            return
        bos, eos = (
            (llama.llama_vocab_get_text(vocab, t) or b"").decode("utf-8", "replace") if t >= 0 else ""
            for t in (llama.llama_vocab_bos(vocab), llama.llama_vocab_eos(vocab))
        )
        try:
            formatter = formats.Jinja2ChatFormatter(template.decode("utf-8", "replace"), eos, bos)
        except TemplateError as e:
            self._why = f"this model's chat template cannot be read: {e}; start the server with --chat-format NAME"
            return
        self._handler = formatter.to_chat_handler()

    @property
    def why_not(self) -> str:
        """Why there are no chats with this model; "" when there are."""
        return self._why

    def prompt(self, body: ChatRequest) -> ChatPrompt:
        """Raises ApiError for what the format does not take."""
        if self._handler is None:
            raise ApiError(self._why, "messages", "no_chat_template")
        if not body.messages:
            raise ApiError("messages: expected at least one", "messages")
        tool_choice, tool = _tool(body)
        grammar = body.grammar or _format_grammar(body.response_format)
        if tool:
            grammar = grammar_of_schema(tool.get("parameters") or {"type": "object"}, "tools")
        functions = body.functions if body.functions and not body.tools else None
        try:
            self._handler(
                llama=_Llama(self._session),
                messages=[_flat(m) for m in body.messages],
                functions=functions,
                function_call=body.function_call,
                tools=body.tools,
                tool_choice=tool_choice,
                stop=stop_list(body.stop),
            )
        except _Made as made:
            found = made.arguments
        except ApiError:
            raise
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise ApiError(f"messages: the model's chat template does not take them: {e}", "messages") from None
        prompt = found["prompt"]
        tokens = tokenize_within(self._session, prompt, "messages") if isinstance(prompt, str) else list(prompt)
        return ChatPrompt(tokens, [s for s in stop_list(found["stop"]) if s], grammar, tool["name"] if tool else None)


def _tool(body: ChatRequest) -> tuple[Any, dict[str, Any] | None]:
    """(tool_choice, the function that must be called). Raises ApiError."""
    functions = [t["function"] for t in body.tools or []] or list(body.functions or [])
    choice: Any = body.tool_choice
    if choice is None and isinstance(body.function_call, dict):
        choice = {"type": "function", "function": dict(body.function_call)}
    if choice == "required":
        if len(functions) != 1:
            raise ApiError(
                f'tool_choice: "required" with {len(functions)} tools; this server forces one tool: name it',
                "tool_choice",
            )
        choice = {"type": "function", "function": {"name": functions[0]["name"]}}
    if not isinstance(choice, dict):
        return choice, None
    name = choice["function"]["name"]
    found = next((f for f in functions if f["name"] == name), None)
    if found is None:
        raise ApiError(f"tool_choice: there is no tool {name!r} in tools", "tool_choice")
    return choice, dict(found)


def _format_grammar(wanted: dict[str, Any] | None) -> str:
    """GBNF of a response_format, "" for text."""
    where = "response_format"
    kind = (wanted or {}).get("type", "text")
    if wanted is None or kind == "text":
        return ""
    if kind == "json_object":
        schema = wanted.get("schema")
    elif kind == "json_schema":
        schema = (wanted.get("json_schema") or {}).get("schema")
        if not isinstance(schema, dict):
            raise ApiError(
                f"{where}.json_schema.schema: expected a JSON schema, found {schema!r}", f"{where}.json_schema"
            )
    else:
        raise ApiError(f"{where}.type: expected text, json_object or json_schema, found {kind!r}", f"{where}.type")
    return str(formats.llama_grammar.JSON_GBNF) if schema is None else grammar_of_schema(schema, where)


def _flat(message: Any) -> dict[str, Any]:
    """A message whose content is one text. Raises ApiError for pictures and sound."""
    out = dict(message)
    if isinstance(out.get("content"), (list, tuple)) or hasattr(out.get("content"), "__next__"):
        parts = [dict(part) for part in out["content"]]
        if other := next((p.get("type") for p in parts if p.get("type") != "text"), None):
            raise ApiError(
                f"messages: expected text, found a part of type {other!r}; this server reads text", "messages"
            )
        out["content"] = "\n".join(part["text"] for part in parts)
    return out


# ---- completions as chats: chunk by chunk, by llama_cpp's converters ----


def whole(completion: dict[str, Any], tool: str | None) -> dict[str, Any]:
    """A chat completion of a completion."""
    if tool:
        return dict(formats._convert_completion_to_chat_function(tool, completion, False))
    return dict(formats._convert_completion_to_chat(completion))


def chunks(chunk: dict[str, Any], tool: str | None, first: bool) -> Iterable[dict[str, Any]]:
    """The chunks of a chat that one of a completion becomes."""
    last = chunk["choices"][0]["finish_reason"] is not None
    if not tool:
        out = list(formats._convert_completion_to_chat(iter([chunk]), stream=True))
        return out if first else out[1:]
    begin, middle, end = formats._convert_completion_to_chat_function(tool, iter([chunk]), True)
    return ([begin] if first else []) + ([end] if last else [middle])


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
