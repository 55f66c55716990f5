"""The table of policies, and their specs: a name with options, as `compare --methods` takes them."""

from __future__ import annotations

from typing import Any

from ..errors import FasaError
from .baselines import Dense, DoubleSparsity, Oracle, OracleShared, Quest, SnapKV, SparQ, Unique, Window
from .fasa import Borrowed, Fasa, FasaMass, Paper, RandomChunks
from .policy import Policy

POLICIES: dict[str, type[Policy]] = {
    p.name: p
    for p in (
        Dense,
        Window,
        RandomChunks,
        Quest,
        Unique,
        DoubleSparsity,
        SparQ,
        SnapKV,
        Oracle,
        OracleShared,
        Fasa,
        FasaMass,
        Paper,
        Borrowed,
    )
}


def parse_spec(text: str) -> tuple[type[Policy], dict[str, Any]]:
    """`quest:page=8:shared=1` -> (Quest, {"page": 8, "shared": True}).

    Raises FasaError for an unknown name and for an unreadable value.
    """
    name, *parts = text.split(":")
    if name not in POLICIES:
        raise FasaError(f"--methods {name!r}: expected one of {', '.join(POLICIES)}")
    known, options = POLICIES[name].defaults(), {}
    for part in parts:
        key, _, value = part.partition("=")
        if key not in known:
            raise FasaError(f"method {name}: unknown option {key!r}; known are {', '.join(known)}")
        try:
            kind = type(known[key])
            options[key] = {"0": False, "1": True}[value] if kind is bool else kind(value)
        except (ValueError, KeyError):
            kind_name = {bool: "0 or 1", int: "a whole number", float: "a number"}[type(known[key])]
            raise FasaError(f"method {name}: option {key}: expected {kind_name}, found {value!r}") from None
    return POLICIES[name], options


def spec_text(policy: type[Policy], options: dict[str, Any]) -> str:
    """The opposite of parse_spec; default options are omitted."""
    known = policy.defaults()
    shown = {
        k: int(v) if isinstance(v, bool) else f"{v:.5g}" if isinstance(v, float) else v
        for k, v in options.items()
        if v != known[k]
    }
    return ":".join([policy.name, *(f"{k}={v}" for k, v in shown.items())])
