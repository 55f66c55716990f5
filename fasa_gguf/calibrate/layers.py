"""Which layers may miss more of the attention than others, and the masses of mean budgets: measured with `evaluate`.

A layer's loss is the KL to dense of the model's output while that layer alone is sparse, at some target masses. What
rounding alone makes (everything attended, by the sparse path) is subtracted. Over the missed share m = 1 - mass both
curves are close to powers,

    KL_l(m) = a_l * m^b        tokens_l(m) = c_l * m^-d        one b and one d for all layers

and losses add up while they are small. The least sum of KL at a given sum of tokens then has m_l proportional to
(c_l/a_l)^(1/(b + d)), whatever the sum, so one factor a layer (`fasa.layer_miss`) serves every mass. The factors are
kept when the whole model is better with them than without, at equal mean tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FasaError
from ..gguf.file import read_header
from ..gguf.shape import sliding_windows
from ..params import FasaParams
from ..profile.find import require_profile
from ..profile.profile import Profile
from ..quality.arms import Arm
from ..quality.perplexity import WindowSettings, evaluate
from ..reference import mean_budget_bounds
from ..report.columns import columns
from ..runtime.settings import ContextSettings

NEAR, TRIES = 0.02, 4  # the search for a mean budget's mass ends within 2% of the tokens, or after 4 runs
MOST = 8.0  # a factor is between 1/MOST and MOST
LEAST_LOSS = 0.1  # of the median: a layer whose loss drowns in noise counts as this harmless
CALIBRATED = ("chunks", "sink", "recent", "k_dom", "per_head")  # settings that the table depends on


@dataclass(frozen=True)
class LayerGrid:
    """What is measured; a mass is a share of the estimated attention."""

    masses: Sequence[float] = (0.5, 0.75, 0.9)  # of a layer that is sparse alone; empty: only the mean budgets
    budgets: Sequence[int] = (128, 256, 512, 1024)  # mean budgets whose masses are searched, in tokens
    group: int = 1  # neighbouring layers that share a factor: fewer runs, less noise


@dataclass
class Fit:
    """What fit_layers found; n groups of layers."""

    factor: np.ndarray  # float64 [n], geometric mean 1
    loss: np.ndarray  # float64 [n], a_l: KL when everything is missed
    tokens: np.ndarray  # float64 [n], c_l
    b: float
    d: float


def smooth_noise(noise: np.ndarray) -> np.ndarray:
    """KL by rounding alone [n], as a straight line over the depth: fewer layers follow a late layer's rounding."""
    x = np.arange(len(noise))
    line = np.polyval(np.polyfit(x, noise, 1), x) if len(noise) > 2 else np.full(len(noise), noise.mean())
    return np.maximum(line, 0)


def fit_layers(masses: Sequence[float], tokens: np.ndarray, kl: np.ndarray, se: np.ndarray) -> Fit:
    """Factors from curves: tokens, kl (without the noise) and its standard error, each [n, n_mass]."""
    x = np.log(1 - np.asarray(masses, float))  # [n_mass] log of what is missed
    w = 1 / np.maximum(se, 1e-9) ** 2  # [n, n_mass]

    def losses(b: float) -> np.ndarray:  # [n] weighted least squares of a_l * m^b
        return (w * kl * np.exp(b * x)).sum(-1) / (w * np.exp(2 * b * x)).sum(-1)

    def error(b: float) -> float:
        return float((w * (kl - losses(b)[:, None] * np.exp(b * x)) ** 2).sum())

    b = min(np.arange(0.5, 3.01, 0.05), key=error) if len(masses) > 1 else 1.5
    y = np.log(tokens)
    centred = x - x.mean()
    d = -float((centred * (y - y.mean(-1, keepdims=True))).sum() / max(len(y) * (centred**2).sum(), 1e-12))
    d = max(d, 0.05)
    c = np.exp((y + d * x).mean(-1))  # [n]
    a = losses(b)
    middle = float(np.median(a[a > 0])) if (a > 0).any() else 1.0
    a = np.maximum(a, LEAST_LOSS * middle)
    factor = np.log(c / a) / (b + d)
    for _ in range(20):  # clipping moves the mean
        factor = np.clip(factor - factor.mean(), -math.log(MOST), math.log(MOST))
    return Fit(np.exp(factor), a, c, float(b), d)


def sparse_alone(profile: Profile, layers: Sequence[int]) -> Profile:
    """The profile with only these layers ranked; the others are dense."""
    keep = set(layers)

    def part(arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [x if il in keep else x[:0, :0] for il, x in enumerate(arrays)]

    return replace(
        profile,
        n_chunk=[n if il in keep else 0 for il, n in enumerate(profile.n_chunk)],
        ranking=part(profile.ranking),
        weight=profile.weight and part(profile.weight),
        recall=profile.recall and part(profile.recall),
        ahead_ranking=profile.ahead_ranking and part(profile.ahead_ranking),
        ahead_weight=profile.ahead_weight and part(profile.ahead_weight),
        layer_miss=None,
        mean_budget={},
    )


def make_groups(profile: Profile, group: int, most: int = 0) -> list[list[int]]:
    """The ranked layers in groups of `group` neighbours; without those whose window is at most `most` tokens, which are
    dense."""
    windows = profile.window or [0] * len(profile.n_chunk)
    ranked = [il for il, n in enumerate(profile.n_chunk) if n and not 0 < windows[il] <= most]
    return [ranked[i : i + group] for i in range(0, len(ranked), group)]


def layer_arms(
    profile: Profile, groups: Sequence[Sequence[int]], masses: Sequence[float], base: FasaParams, window: int
) -> list[Arm]:
    """For every group of layers alone: everything attended, then each mass.

    Of a layer with a sliding window all but one token is attended, since it is dense where its list holds the window.
    """
    out = []
    for layers in groups:
        alone = sparse_alone(profile, layers)
        reach = [profile.window[il] - 1 for il in layers if profile.window and profile.window[il]]
        whole = base.replace(budget=min([window, *reach]), mass=0.0, mean_budget=0)
        name = f"layer {layers[0]}" + (f"-{layers[-1]}" if len(layers) > 1 else "")
        out.append(Arm(f"{name} all", whole, alone))
        out += [Arm(f"{name} mass={m:g}", base.replace(mass=m, mean_budget=0), alone) for m in masses]
    return out


def next_mass(seen: Sequence[tuple[float, float]], n: int) -> float:
    """The mass to try for n tokens, to four digits, from the (mass, tokens) seen so far.

    It lies on the power through the two nearest; with one, or two that give no slope, on tokens = (1 - mass)^-0.8.
    """
    points = sorted(((math.log(t / n), math.log(1 - m)) for m, t in seen), key=lambda p: abs(p[0]))
    slope = -1 / 0.8
    if len(points) > 1 and (dx := points[1][0] - points[0][0]) and (points[1][1] - points[0][1]) / dx < -0.2:
        slope = (points[1][1] - points[0][1]) / dx
    return min(max(float(f"{1 - math.exp(points[0][1] - slope * points[0][0]):.4f}"), 0.1), 0.9999)


def find_masses(
    budgets: Sequence[int], results_at: Callable[[dict[int, float]], list[dict[str, Any]]]
) -> dict[int, dict[str, Any]]:
    """For every mean budget the result whose mean tokens are nearest; results_at({budget: mass}) runs one for each.

    A budget that no mass reaches within a tenth is omitted: the context is too short for it.
    """
    seen: dict[int, list[tuple[float, dict[str, Any]]]] = {n: [] for n in sorted(budgets)}
    ask = dict.fromkeys(seen, 0.9)
    for _ in range(TRIES):
        for (n, m), result in zip(ask.items(), results_at(ask), strict=True):
            seen[n].append((m, result))
        ask = {}
        for n, results in seen.items():
            m = next_mass([(m, r["tokens_attended"]) for m, r in results], n)
            if min(_miss(r, n) for _, r in results) > NEAR and m not in {m for m, _ in results}:
                ask[n] = m
        if not ask:
            break
    out = {}
    for n, results in seen.items():
        misses = [_miss(r, n) for _, r in results]
        if min(misses) <= 0.1:
            out[n] = results[misses.index(min(misses))][1]
    return out


def _miss(result: dict[str, Any], n: int) -> float:
    """How far a result's mean tokens are from n, a share of n."""
    return abs(result["tokens_attended"] / n - 1)


def mean_budget_table(found: dict[int, dict[str, Any]]) -> dict[int, float]:
    """Mean tokens -> mass, both ascending, moved the last few percent along tokens = (1 - mass)^-0.8."""
    out: dict[int, float] = {}
    for n, r in found.items():
        mass = float(f"{1 - (1 - r['fasa']['mass']) * (r['tokens_attended'] / n) ** (1 / 0.8):.5f}")
        if max(out.values(), default=0.0) < mass < 1:
            out[n] = mass
    return out


def gain(plain: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> float:
    """How much less KL `other` has than `plain` at equal mean tokens, a share of plain's KL.

    It is the mean over the tokens that both reach; 0 where they have none in common.
    """

    def curve(results: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        pairs = sorted((math.log(r["tokens_attended"]), math.log(max(r["kl"], 1e-9))) for r in results)
        return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])

    (x, y), (u, v) = curve(plain), curve(other)
    if not len(u) or max(x[0], u[0]) > min(x[-1], u[-1]):
        return 0.0
    at = np.linspace(max(x[0], u[0]), min(x[-1], u[-1]), 50)
    return float(1 - np.exp((np.interp(at, u, v) - np.interp(at, x, y)).mean()))


# ---- the calibration ----


def _check_grid(grid: LayerGrid, profile: Profile, window: int, base: FasaParams) -> None:
    def different(values: Sequence[float]) -> bool:
        return len(set(values)) == len(values)

    if any(not 0 < m < 1 for m in grid.masses) or not different(grid.masses):
        masses = ",".join(f"{m:g}" for m in grid.masses)
        raise FasaError(f"--masses {masses}: expected different numbers between 0 and 1")
    least, budgets = base.sink + base.recent + 1, f"--budgets {','.join(map(str, grid.budgets))}"
    if not grid.budgets or min(grid.budgets) < least or max(grid.budgets) >= window or not different(grid.budgets):
        raise FasaError(
            f"{budgets}: expected different numbers from {least}, above sink and recent, "
            f"to {window - 1}, below --window"
        )
    default = profile.defaults.get("mean_budget", 0)
    if default and not min(grid.budgets) <= default <= max(grid.budgets):
        raise FasaError(f"{budgets}: expected numbers that reach {default}, the profile's default mean_budget")
    if grid.group < 1:
        raise FasaError(f"--group {grid.group}: expected at least 1")
    if base.min_context > window:
        raise FasaError(
            f"--window {window}: min_context is {base.min_context}, so nothing would be sparse; "
            "use a longer --window or a smaller --fasa-min-context"
        )


@dataclass
class _Runs:
    """What is measured of one model: run(arms, what) evaluates arms in a window of `window` tokens."""

    run: Callable[[list[Arm], str], list[dict[str, Any]]]
    grid: LayerGrid
    base: FasaParams
    window: int

    def mean_budgets(self, profile: Profile, name: str) -> dict[int, dict[str, Any]]:
        """The whole model at every mean budget, by the budget; see find_masses."""

        def results_at(masses: dict[int, float]) -> list[dict[str, Any]]:
            arms = []
            for n, m in masses.items():
                floor, cap = mean_budget_bounds(n)
                params = self.base.replace(mass=m, mean_budget=0, floor=floor, cap=cap)
                arms.append(Arm(f"{name} mean {n} mass={m:g}", params, profile))
            return self.run(arms, name)

        return find_masses(self.grid.budgets, results_at)

    def layer_factors(self, profile: Profile) -> tuple[Profile, dict[str, Any]]:
        """(profile with layer_miss, figures): every group of layers alone, at every mass."""
        groups, n = make_groups(profile, self.grid.group, self.base.cap), 1 + len(self.grid.masses)
        if not groups:
            raise FasaError(
                f"every ranked layer has a sliding window of at most {self.base.cap} tokens, its cap, and stays dense; "
                "give a smaller --fasa-cap, or a profile that ranks layers without a window"
            )
        arms = layer_arms(profile, groups, self.grid.masses, self.base, self.window)
        results = self.run(arms, "layer by layer")
        each = [results[i * n : (i + 1) * n] for i in range(len(groups))]
        noise = smooth_noise(np.array([r[0]["kl"] for r in each]))
        tokens, kl, se = (
            np.array([[r[key] for r in rs[1:]] for rs in each]) for key in ("tokens_attended", "kl", "kl_se")
        )
        fit = fit_layers(self.grid.masses, tokens, kl - noise[:, None], se)
        factors = np.ones(len(profile.n_chunk), np.float32)
        for layers, f in zip(groups, fit.factor, strict=True):
            factors[layers] = float(f"{f:.3g}") if math.isfinite(f) else 1.0
        figures = [
            {
                "layers": g,
                "factor": float(fit.factor[i]),
                "noise": float(noise[i]),
                "tokens": tokens[i].tolist(),
                "kl": (kl[i] - noise[i]).tolist(),
                "kl_se": se[i].tolist(),
            }
            for i, g in enumerate(groups)
        ]
        return replace(profile, layer_miss=factors), {"b": fit.b, "d": fit.d, "layers": figures}


def calibrate_layers(
    model: str | os.PathLike,
    text: str,
    out: str | os.PathLike,
    grid: LayerGrid | None = None,
    base: FasaParams | None = None,
    profile: Profile | None = None,
    windows: int = 3,
    window: int = 4096,
    score: int = 128,
    progress: Callable[[str, int, int], None] | None = None,
    resume: str | os.PathLike | None = None,
    **machine: Any,
) -> tuple[Profile, dict[str, Any]]:
    """Write the profile to `out` with `layer_miss`, when it pays, and the table `mean_budget`.

    Returns the profile, and the figures as JSON has them: layers (one entry a group), table (results of `evaluate` at
    the mean budgets, without and, if measured, with the factors), b, d, gain, kept.
    machine: n_threads, n_gpu_layers, type_k, type_v, mode. Finished runs are kept in OUT.partial.jsonl, or in `resume`,
    which is not removed; the same call continues from there. Raises FasaError as `evaluate` does, and for a bad grid.
    """
    grid = grid or LayerGrid()
    profile = profile or require_profile(model)
    base = base or profile.params()
    _check_grid(grid, profile, window, base)
    out = Path(out)
    if not out.resolve().parent.is_dir():
        raise FasaError(f"{out}: the folder does not exist; make it, or give another -o")
    check_writable(out)
    kept = Path(resume) if resume else Path(f"{out}.partial.jsonl")
    if profile.window is None:
        windows_of = sliding_windows(read_header(model), len(profile.n_chunk))
        profile = replace(profile, window=windows_of if any(windows_of) else None)
    plain = replace(profile, layer_miss=None, mean_budget={})
    sizes, settings = WindowSettings(windows, window, score), ContextSettings(**{"mode": "auto", **machine})

    def run(arms: list[Arm], what: str) -> list[dict[str, Any]]:
        told = progress and (lambda _, n, total: progress(what, n, total))
        return evaluate(model, text, arms, sizes, settings, profile=plain, progress=told, resume=kept)[1:]

    best, found, result = _measure(_Runs(run, grid, base, window), plain, profile.defaults.get("mean_budget", 0))
    changed = {k: getattr(base, k) for k in CALIBRATED if getattr(base, k) != getattr(profile.params(), k)}
    done = replace(best, mean_budget=mean_budget_table(found), defaults={**profile.defaults, **changed})
    done.save(out)
    if not resume:
        kept.unlink(missing_ok=True)
    return done, result


def check_writable(out: Path) -> None:
    """Raises FasaError when no file can be made beside `out`: to call before hours of measuring."""
    probe = Path(f"{out}.tmp-{os.getpid()}")
    try:
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise FasaError(f"{out}: cannot be written: {e.strerror or e}; give another path with -o") from None


def _reaches(found: dict[int, dict[str, Any]], default: int) -> bool:
    """Whether the table has the profile's default mean budget, without which the profile could not be saved."""
    table = mean_budget_table(found)
    return not default or bool(table and min(table) <= default <= max(table))


def _measure(runs: _Runs, plain: Profile, default: int) -> tuple[Profile, dict[int, dict[str, Any]], dict[str, Any]]:
    """(the better profile, its results by mean budget, all figures). default: the profile's mean budget, or 0."""
    found = runs.mean_budgets(plain, "all alike")
    if not found:
        raise FasaError(
            f"--budgets {','.join(map(str, runs.grid.budgets))}: no mass takes as many tokens of a window of "
            f"{runs.window}; use other --budgets or a longer --window"
        )
    if not _reaches(found, default):
        budgets, reached = (",".join(map(str, ns)) or "none" for ns in (runs.grid.budgets, mean_budget_table(found)))
        raise FasaError(
            f"--budgets {budgets}: masses were found for {reached}, and the profile's default mean_budget is "
            f"{default}; use other --budgets or a longer --window"
        )
    result: dict[str, Any] = {"layers": [], "table": list(found.values()), "kept": False}
    if not runs.grid.masses:
        return plain, found, result
    layered, figures = runs.layer_factors(plain)
    other = runs.mean_budgets(layered, "by layer")
    better = gain(result["table"], list(other.values())) if _reaches(other, default) else 0.0
    result |= {"b": figures["b"], "d": figures["d"], "gain": better, "kept": better > 0, "layers": figures["layers"]}
    result["table"] += other.values()
    return (layered, other, result) if better > 0 else (plain, found, result)


def format_layers(result: dict[str, Any]) -> str:
    """For people: a line a layer, then the whole model without and with the factors, then whether they are kept."""
    lines = []
    if result["layers"]:
        n = len(result["layers"][0]["kl"])
        cells = [["layer", "factor", "rounding", *[""] * n]]
        for r in result["layers"]:
            cells.append(
                [
                    "-".join(map(str, dict.fromkeys((r["layers"][0], r["layers"][-1])))),
                    f"{r['factor']:.2f}",
                    f"{r['noise']:.5f}",
                    *(f"{t:.0f}: {k:.5f} +-{e:.5f}" for t, k, e in zip(r["tokens"], r["kl"], r["kl_se"], strict=True)),
                ]
            )
        lines += [
            "one layer sparse: the factor of what it may miss; KL by rounding alone; tokens: KL beyond it",
            *columns(cells),
            "",
        ]
    cells = [["whole model", "tokens", "ppl ratio", "KL"]]
    cells += [
        [
            r["arm"],
            f"{r['tokens_attended']:.0f}",
            f"{100 * (r['ppl_ratio'] - 1):+.2f} +-{100 * r['ppl_ratio_se']:.2f}%",
            f"{r['kl']:.4f} +-{r['kl_se']:.4f}",
        ]
        for r in result["table"]
    ]
    lines += columns(cells)
    if "gain" in result:
        change = f"at equal mean tokens the factors change KL by {-100 * result['gain']:+.1f}%"
        lines.append(f"{change}: they are {'kept' if result['kept'] else 'omitted'}")
    return "\n".join(lines)
