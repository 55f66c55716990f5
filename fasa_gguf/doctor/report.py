"""The report of `doctor`: facts and checks, for people and for programs. No path of the user's home is in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .checks import FAILED, Check
from .facts import shorten

MARKS = {"ok": "ok    ", "note": "note  ", "failed": "FAILED"}


def report_as_dict(facts: Mapping[str, Any], checks: Sequence[Check]) -> dict[str, Any]:
    """{"ok": has no check failed, "checks": [...], and the groups of facts}."""
    ok = all(c.status != FAILED for c in checks)
    return shorten({"ok": ok, "checks": [c.as_dict() for c in checks], **facts})


def format_report(facts: Mapping[str, Any], checks: Sequence[Check]) -> str:
    """Lines to read, and to paste into a bug report."""
    lines = [f"{name}: {text}" for name, text in _fact_lines(facts)]
    lines += ["", *(f"{MARKS[c.status]} {c.name}: {c.text}" for c in checks)]
    failed = [c.name for c in checks if c.status == FAILED]
    lines += ["", f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}" if failed else "all is well"]
    return str(shorten("\n".join(lines)))


def _fact_lines(f: Mapping[str, Any]) -> list[tuple[str, str]]:
    cpu, gpu, libraries, threads = f["cpu"], f["gpu"], f["libraries"], f["threads"]
    out = [
        ("system", f"{f['system']['platform']}, Python {f['system']['python']}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in f["packages"].items())),
        ("cpu", f"{cpu.get('name', 'unknown')}: {' '.join(cpu['sets'])}"),
    ]
    if "used" in cpu:
        out.append(("build uses", " ".join(cpu["used"]) + _unused(cpu)))
        other = [name for name in cpu["features"] if name not in cpu["used"]]
        out.append(("build has", " ".join(other)))
    quota = "no quota" if threads["quota"] is None else f"a quota of {threads['quota']:g} CPUs"
    cpus = f"{threads['cores']} cores, {threads['allowed']} of {threads['cpus']} CPUs allowed, {quota}"
    out.append(("threads", f"{threads['used']} ({cpus})"))
    out += _gpu_lines(gpu)
    if "fasa" in libraries:
        out.append(("library", f"{libraries['fasa']} for llama-cpp-python {libraries['upstream']}"))
        patches = libraries["patches"]
        out.append(("patches", "unknown" if patches is None else " ".join(f"{k}:{v}" for k, v in patches.items())))
    if "cpu" in libraries:
        out.append(("cpu variant", libraries["cpu"]))
    if "cuda" in libraries:
        out.append(("cuda package", ", ".join(f"{k} {v}" for k, v in libraries["cuda"].items() if k != "patches")))
    out.append(("library files", libraries["folder"]))
    out += [("  " + name, f"{x['bytes']:,} bytes, sha256 {x['sha256']}") for name, x in libraries["files"].items()]
    if "llama_cpp" in libraries:
        out.append(("llama_cpp", libraries["llama_cpp"]))
    out += [("variable " + name, value) for name, value in f["environment"].items()]
    return out


def _unused(cpu: Mapping[str, Any]) -> str:
    parts = []
    if cpu["unused"]:
        parts.append(f"not used although the CPU has them: {' '.join(cpu['unused'])}; build on this machine")
    if cpu["left_out"]:
        parts.append(f"left out on purpose: {' '.join(cpu['left_out'])}")
    return f" ({'; '.join(parts)})" if parts else ""


def _gpu_lines(gpu: Mapping[str, Any]) -> list[tuple[str, str]]:
    driver = f"driver {gpu['driver']}" if "driver" in gpu else ""
    cuda = f"for CUDA {gpu['cuda']}" if "cuda" in gpu else ""
    said = " ".join(filter(None, [driver, cuda]))
    out = [
        (
            d["name"],
            d["description"]
            + (f", {d['free'] / 2**30:.1f} of {d['total'] / 2**30:.1f} GiB free" if d["total"] else ""),
        )
        for d in gpu.get("devices", [])
    ]
    if not out:
        build = "" if any(name.startswith("CUDA") for name in gpu.get("backends", {})) else "; this build has no CUDA"
        out = [("gpu", f"none found{build}")]
    if said:
        out.append(("nvidia", said))
    out += [
        (f"backend {name}", " ".join(f"{k}={v}" for k, v in x.items())) for name, x in gpu.get("backends", {}).items()
    ]
    return out
