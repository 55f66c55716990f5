"""The command `serve`."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FasaError
from ..gguf.file import check_is_file
from ..params import FasaParams
from ..profile.find import find_profile, require_profile
from ..profile.profile import Profile
from .arguments import (
    CONTEXT,
    AddCommand,
    add_context_flags,
    add_context_size,
    add_fasa_flags,
    add_model,
    add_rpc,
    given_fasa,
    note,
    read_context,
    read_params,
    whole,
)

if TYPE_CHECKING:
    from ..runtime.settings import ContextSettings
    from ..session import Session

NEEDED = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client")
NO_PROFILE = "the model has no profile; run `fasa-gguf embed-profile MODEL`"


def _need_packages() -> None:
    if missing := [name for name in NEEDED if not importlib.util.find_spec(name)]:
        raise FasaError(f"serve needs {', '.join(missing)}; run `pip install 'fasa-gguf[server]'`")


def _choose(a: argparse.Namespace) -> tuple[FasaParams | None, Profile | None, str]:
    """(settings, profile, why FASA is off). Settings, a profile or host mode on the command line make FASA a must."""
    must = a.profile is not None or a.fasa_preset is not None or bool(given_fasa(a)) or a.fasa_mode == "host"
    if a.no_fasa:
        return None, None, "it was started with --no-fasa"
    profile = require_profile(a.model, a.profile, note) if must else find_profile(a.model, None, note)
    if profile is None:
        note(f"{a.model}: {NO_PROFILE}; decoding is dense")
        return None, None, NO_PROFILE
    params, profile = read_params(a, profile)
    return params, profile, ""


def _open(a: argparse.Namespace, params: FasaParams | None, profile: Profile | None) -> Session:
    from ..gguf.file import U32, GGUFFile
    from ..session import Session

    header = GGUFFile(a.model)
    trained = header.get(f"{header.arch}.context_length", U32, default=CONTEXT) or CONTEXT
    size = trained if a.ctx_size == 0 else a.ctx_size or min(trained, CONTEXT)
    if size > trained:
        note(f"-c {size}: the model was trained on {trained} tokens; text beyond them may be nonsense")
    n = a.n_parallel
    changes: dict[str, Any] = {"mode": "device"} if params is None else {}
    settings = read_context(
        a,
        n_ctx=-(-size // 256) * 256 * n,
        n_seq_max=n,
        n_batch=max(a.ubatch_size, n),
        n_ubatch=max(a.ubatch_size, n),
        **changes,
    )
    session = Session(a.model, settings, arms=[params] if params else (), profile=profile)
    try:
        if not session.memory:
            raise FasaError(f"{a.model}: this model has no KV cache (an encoder), so it writes no text")
        if session.llama.llama_vocab_type(session.vocab) == session.llama.LLAMA_VOCAB_TYPE_NONE:
            raise FasaError(f"{a.model}: this model has no vocabulary, so it writes no text")
        if params and profile:
            session.fasa.set_profile(profile)
            session.fasa.set_params(params)
    except BaseException:
        session.close()
        raise
    return session


def _plan(model: str, profile: Profile | None, settings: ContextSettings, params: FasaParams | None) -> str:
    """What the model and the context take, in MiB; "" and a note for a model that the plan does not know."""
    from ..memory.model import read_model
    from ..memory.plan import estimate
    from ..memory.report import mib

    try:
        x = estimate(read_model(model, profile), settings, params)
    except FasaError as e:
        note(f"without a plan: {e}")
        return ""
    gpu = f"; GPU: {mib(x.device)}" if settings.n_gpu_layers else ""
    pinned = f", pinned {mib(x.kv_pinned)}" if x.kv_pinned else ""
    return (
        f"MiB: weights {mib(os.path.getsize(model))}, K and V {mib(x.kv + x.kv_ram + x.kv_pinned)}, "
        f"dominant keys {mib(x.k_dom + x.k_dom_ram)}{gpu}{pinned}"
    )


def _describe(session: Session, params: FasaParams | None, why_off: str, a: argparse.Namespace) -> str:
    n = session.settings.n_seq_max
    fasa = f"dense: {why_off}"
    if params:
        what = f"mass {params.mass:g}" if params.mass else f"budget {params.mean_budget or params.budget}"
        fasa = f"FASA, mode {session.mode}, {what}, from {params.min_context} cells"
        if limit := session.fasa.gpu_limit().text:
            fasa += f"; {limit}"
    return (
        f"{n} slots of {session.n_ctx // n} tokens; {fasa}; {session.settings.threads} threads; "
        f"prefix cache {a.cache_ram} MiB"
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as e:
        raise FasaError(f"{host}:{port}: cannot listen there: {e.strerror or e}; choose another --port") from None


def _end(_number: int, _frame: Any) -> None:
    raise SystemExit(0)


def cmd_serve(a: argparse.Namespace) -> None:
    _need_packages()
    check_is_file(a.model)
    params, profile, why_off = _choose(a)
    from .. import serve  # noqa: F401  # loads the library

    with _listen(a.host, a.port) as sock, _open(a, params, profile) as session:
        print(_describe(session, params, why_off, a))
        if line := _plan(a.model, profile, session.settings.replace(mode=session.mode), params):
            print(line)
        _run(a, session, params, why_off, sock)


def _run(a: argparse.Namespace, session: Session, params: FasaParams | None, why_off: str, sock: socket.socket) -> None:
    import uvicorn

    from ..serve.api import Server, create_app
    from ..serve.chat import Chats
    from ..serve.engine import Engine
    from ..serve.limits import Limits, default_body, protocol
    from ..serve.metrics import Metrics

    chats = Chats(session, a.chat_format)
    if chats.why_not:
        note(chats.why_not)
    engine = Engine(session, params, a.queue, a.cache_ram * 2**20)
    key = a.api_key or os.environ.get("FASA_API_KEY") or None
    body = a.max_body * 2**20 or default_body(engine.n_ctx)
    limits = Limits(body, a.receive_timeout, a.max_connections)
    app = create_app(Server(engine, chats, Metrics(engine), limits, a.alias or Path(a.model).name, key, why_off))
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of clients that went away
    config = uvicorn.Config(
        app, http=protocol(limits), ws="none", log_level="warning", access_log=False, timeout_graceful_shutdown=5
    )
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    before = signal.signal(signal.SIGTERM, _end)  # uvicorn hands the signal on when it has ended
    engine.start()
    try:
        print(f"listening on http://{shown}:{port}/v1", flush=True)
        uvicorn.Server(config).run(sockets=[sock])
    finally:
        engine.stop()
        signal.signal(signal.SIGTERM, before)
        sys.stdout.flush()


def add_commands(command: AddCommand) -> None:
    p = command(
        "serve",
        cmd_serve,
        "Serve OpenAI's API to several users at once, decoded with FASA when the model has a profile.",
        "model.gguf -c 16384 -np 4 --port 8000",
    )
    add_model(p)
    add_context_flags(p)
    add_rpc(p)
    add_fasa_flags(p)
    p.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1, this machine alone]")
    p.add_argument("--port", type=whole(0), default=8000, help="port; 0: a free one [8000]")
    add_context_size(p, "context of each slot")
    p.add_argument("-np", "--n-parallel", type=whole(1), default=4, help="slots: requests decoded together [4]")
    p.add_argument(
        "-ub",
        "--ubatch-size",
        type=whole(1),
        default=256,
        help="tokens of a prompt that are read between two decode steps of the others [256]",
    )
    p.add_argument("--queue", type=whole(0), default=64, help="requests that may wait for a slot [64]")
    p.add_argument(
        "--cache-ram",
        type=whole(0),
        default=1024,
        help="MiB of host memory for prompts that no slot holds; 0: none [1024]",
    )
    p.add_argument(
        "--max-body",
        type=whole(0),
        default=0,
        metavar="MIB",
        help="MiB that a request may have [64 bytes a token of a slot's context, at least 1 MiB]",
    )
    p.add_argument("--max-connections", type=whole(1), default=512, help="connections that may be open [512]")
    p.add_argument(
        "--receive-timeout",
        type=whole(1),
        default=30,
        metavar="SECONDS",
        help="seconds in which a request must have arrived [30]",
    )
    p.add_argument("--alias", help="name of the model in /v1/models [the file's name]")
    p.add_argument("--api-key", help="key that clients must send [FASA_API_KEY, or none]")
    p.add_argument("--chat-format", metavar="NAME", help="one of llama_cpp's chat formats [the model's template]")
    p.add_argument("--no-fasa", action="store_true", help="dense")
