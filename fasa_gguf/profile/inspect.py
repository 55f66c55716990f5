"""A profile as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from ..gguf.file import printable
from ..params import default_chunks
from .profile import Profile, span


def format_profile(profile: Profile, chunks: int = 0) -> str:
    """Where the profile comes from, then a line a layer: the attention kept, the leading chunks of its first KV head.

    chunks: how many of them; 0: as many as decoding uses. Layers with a sliding window are marked.
    """
    k = chunks or profile.params().chunks or default_chunks(max(profile.n_chunk))
    lines = _origin(profile)
    lines.append(f"\n{'layer':>5}  {'attention kept':>14}  best {k} chunks of KV head 0 (0 is the fastest frequency)")
    for il, ranking in enumerate(profile.ranking):
        window = f"window of {profile.window[il]:,}" if profile.window and profile.window[il] else ""
        if not profile.n_chunk[il]:
            lines.append(f"{il:>5}  {'dense':>14}  {window}".rstrip())
            continue
        kept = ""
        if profile.recall is not None:
            kept = f"{100 * profile.recall[il][:, min(k, profile.recall_k) - 1].mean():.1f}%"
        best = " ".join(str(x) for x in ranking[0][:k])
        lines.append(f"{il:>5}  {kept:>14}  {best}{f' ({window})' if window else ''}")
    return "\n".join(lines)


def _origin(profile: Profile) -> list[str]:
    c, rope = profile.calibration, profile.rope
    lines = [
        f"method {profile.ranking_method}, {len(profile.n_chunk)} layers, {span(profile.n_head_kv)} KV heads, "
        f"{span(profile.n_chunk)} chunks per head, rope {rope.get('layout', '?')} base {rope.get('base', '?')}"
        + (f", {rope['base_window']:g} in layers with a window" if "base_window" in rope else ""),
        f"calibrated on {printable(c.get('corpus', '?'))}: {c.get('tokens', '?')} tokens in windows of "
        f"{c.get('context', '?')}, from {printable(c.get('source', '?'))}",
    ]
    if profile.defaults:
        lines.append("defaults: " + ", ".join(f"{n} {v}" for n, v in profile.defaults.items()))
    if profile.mean_budget:
        lines.append("mean budgets: " + ", ".join(f"{n} at mass {m:.4g}" for n, m in profile.mean_budget.items()))
    lines.append(_ahead(profile))
    if profile.layer_miss is not None:
        lines.append(f"layers may miss {profile.layer_miss.min():.3g} to {profile.layer_miss.max():.3g} times 1 - mass")
    return lines


def _ahead(profile: Profile) -> str:
    """Which layers may select ahead, and by which ranking."""
    ranked = [il for il, n in enumerate(profile.n_chunk) if n]
    may = [il for il in ranked if profile.ahead is None or profile.ahead[il]]
    how = "a ranking of their own" if profile.ahead_ranking is not None else "the same ranking, not calibrated for it"
    if not may:
        return "layers that may select ahead: none"
    return f"layers that may select ahead: {runs(may)}, {len(may)} of {len(ranked)}, with {how}"


def runs(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs in short: 1-3,7."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    return ",".join("-".join(map(str, part)) for part in parts)
