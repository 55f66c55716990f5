#!/usr/bin/env python3
"""The patch queue: fetch the pinned llama.cpp, check, apply and refresh the patches. Standard library only.

usage: queue.py fetch | check | prepare DIR [--source TREE] [--unpatched] | apply DIR [--force] | refresh DIR |
       pin VERSION | binding DIR
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAX_ADDED = 100  # lines that all patches together may add
# where the version stands, and how; all else reads UPSTREAM
PINNED = (("patches/UPSTREAM", "version = {}"),)
# what a build of the libraries and tools does not need; of the server's web page only what stands in for it
SKIP = re.compile(
    r"^(docs|models|media|app|benches|\.git|\.github|\.devops|ci)(/|$)|^tools/ui/(?!(CMakeLists\.txt|ui\.(h|cpp)\.in)$)"
)


class QueueError(Exception):
    """One sentence."""


def upstream() -> dict[str, str]:
    return dict(
        re.split(r"\s*=\s*", line, maxsplit=1) for line in (HERE / "UPSTREAM").read_text().splitlines() if "=" in line
    )


def patches() -> list[Path]:
    return [HERE / name for name in (HERE / "series").read_text().split()]


# ---- the source ----


def cached(version: str = "") -> Path:
    """Where the sdist of that version (of the pinned one) lies once it was fetched."""
    version = version or upstream()["version"]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasa_gguf"
    return cache / f"{upstream()['package'].replace('-', '_')}-{version}.tar.gz"


def download(version: str) -> Path:
    """The sdist of that version, from the configured package index, in the user's cache; its hash is not checked."""
    package, cache = upstream()["package"], cached(version).parent
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        command = [*pip, "--no-binary", package, "-d", folder, f"{package}=={version}"]
        if subprocess.run(command).returncode != 0:
            raise QueueError(
                f"pip could not download {package} {version}; "
                "check the index that pip is configured for, or give -DFASA_LLAMA_SOURCE=DIR"
            )
        path = cached(version)
        os.replace(Path(folder) / path.name, path)
    return path


def fetch() -> Path:
    """The sdist that UPSTREAM names, hash checked."""
    up = upstream()
    path = cached(up["version"])
    if not path.exists():
        download(up["version"])
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != up["sha256"]:
        path.unlink()
        raise QueueError(f"{path.name}: expected sha256 {up['sha256']}, found {found}; it was removed")
    return path


def unpack(target: Path) -> None:
    """llama.cpp out of the sdist."""
    folder = upstream()["folder"]
    with tarfile.open(fetch()) as tar:
        for m in tar:
            name = m.name.split("/", 1)[-1]
            if name.startswith(folder + "/") and m.isfile() and not SKIP.match(name[len(folder) + 1 :]):
                out = target / name[len(folder) + 1 :]
                out.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(m) as f, open(out, "wb") as g:
                    shutil.copyfileobj(f, g)


def binding(target: Path) -> None:
    """llama-cpp-python's Python files out of the sdist, and its licence: what a package of ours brings."""
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    with tarfile.open(fetch()) as tar:
        for m in tar:
            name = m.name.split("/", 1)[-1]
            if m.isfile() and (name == "LICENSE.md" or re.match(r"llama_cpp/[\w/]+\.(py|typed)$", name)):
                out = fresh / name
                out.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(m) as f, open(out, "wb") as g:
                    shutil.copyfileobj(f, g)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)


def prepare(target: Path, source: Path | None, patched: bool) -> None:
    """Make a source tree ready to build. A tree of the same pin and patches stays, unless it came from `source`."""
    stamp = hashlib.sha256(repr((upstream(), SKIP.pattern, str(source), patched)).encode())
    for p in patches() if patched else []:
        stamp.update(p.read_bytes())
    mark = target / ".fasa-prepared"
    if not source and mark.exists() and mark.read_text() == stamp.hexdigest():
        return
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    if source:

        def build_folders(folder: str, names: list[str]) -> list[str]:
            return [n for n in names if n == ".git" or (Path(folder) / n / "CMakeCache.txt").exists()]

        shutil.copytree(source, fresh, ignore=build_folders)
    else:
        unpack(fresh)
    if patched:
        apply(fresh)
    if target.exists():  # keep the times of files that did not change, so that only the others are compiled again
        for new in fresh.rglob("*"):
            old = target / new.relative_to(fresh)
            if new.is_file() and old.is_file() and new.read_bytes() == old.read_bytes():
                shutil.copystat(old, new)
        shutil.rmtree(target)
    os.replace(fresh, target)
    mark.write_text(stamp.hexdigest())


# ---- the patches ----


def split(patch: Path) -> tuple[str, list[tuple[str, list[str]]]]:
    """(header, [(file, hunk lines)]) of a patch in git's format."""
    text = patch.read_text()
    header, *parts = re.split(r"^diff --git a/\S+ b/", text, flags=re.M)
    files = []
    for part in parts:
        name, body = part.split("\n", 1)
        files.append((name.strip(), body[body.index("@@") :].splitlines()))
    return header, files


def apply_hunks(lines: list[str], hunks: list[str], where: str, exact: bool = True) -> list[str]:
    """The patched lines. Without fuzz: every context line stands where the hunk says, else QueueError."""
    out, at, i = [], 0, 0
    while i < len(hunks):
        m = re.match(r"@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@", hunks[i])
        if not m:
            raise QueueError(f"{where}: expected a hunk header, found {hunks[i]!r}")
        body = []
        i += 1
        while i < len(hunks) and not hunks[i].startswith("@@"):
            body.append(hunks[i])
            i += 1
        old = [line[1:] for line in body if line[:1] in (" ", "-") or line == ""]
        start = int(m.group(1)) - 1
        if lines[start : start + len(old)] != old:
            found = [j for j in range(at, len(lines)) if lines[j : j + len(old)] == old]
            if exact or len(found) != 1:
                raise QueueError(
                    f"{where}: the hunk at line {start + 1} does not apply; mend it by hand and run `queue.py refresh`"
                )
            start = found[0]
        out += lines[at:start] + [line[1:] for line in body if line[:1] in (" ", "+") or line == ""]
        at = start + len(old)
    return out + lines[at:]


def apply(tree: Path, exact: bool = True) -> None:
    for patch in patches():
        for name, hunks in split(patch)[1]:
            path = tree / name
            if not path.exists():
                raise QueueError(f"{patch.name}: {name} is not in the source")
            path.write_text("\n".join(apply_hunks(path.read_text().split("\n"), hunks, f"{patch.name}: {name}", exact)))


def check_headers() -> int:
    """Headers, series and size; returns the added lines."""
    listed, present = {p.name for p in patches()}, {p.name for p in HERE.glob("*.patch")}
    if listed != present:
        raise QueueError(f"series and folder differ: {', '.join(sorted(listed ^ present))}")
    added = 0
    for patch in patches():
        header, files = split(patch)
        for word in ("Subject: ", "Why: ", "Drop when: "):
            if not re.search("^" + word, header, re.M):
                raise QueueError(f"{patch.name}: the header has no line {word!r}")
        added += sum(line.startswith("+") for _, hunks in files for line in hunks)
    if added > MAX_ADDED:
        raise QueueError(f"the patches add {added} lines, more than {MAX_ADDED}; move logic into native/")
    return added


def check() -> str:
    added = check_headers()
    with tempfile.TemporaryDirectory() as folder:
        unpack(Path(folder))
        apply(Path(folder))
    return f"{len(patches())} patches, {added} added lines, all apply"


def write_pin(root: Path, version: str, sha256: str) -> None:
    """The new version in every file that has it, and the hash in UPSTREAM."""
    old = upstream()
    changes = [("patches/UPSTREAM", old["sha256"], sha256)]
    changes += [(name, form.format(old["version"]), form.format(version)) for name, form in PINNED]
    for name, before, _ in changes:
        if before not in (root / name).read_text():
            raise QueueError(f"{name}: expected {before!r}, which is not there; nothing was changed")
    for name, before, after in changes:
        path = root / name
        path.write_text(path.read_text().replace(before, after))


def pin(version: str) -> str:
    """Pin another version, then check that the patches apply to it."""
    sha256 = hashlib.sha256(download(version).read_bytes()).hexdigest()
    write_pin(HERE.parent, version, sha256)
    print(f"pinned {upstream()['package']} {version}; now `make test upstream-tests`", file=sys.stderr)
    return check()


def stages(old: list[str], new: list[str], owners: list[list[str]]) -> list[list[str]]:
    """A file's lines after each of the patches that change it, from their hunks.

    A change belongs to the patch that has most of its lines; to the first one where none has any.
    """
    has = [{line[1:] for line in hunks if line[:1] in ("+", "-")} for hunks in owners]
    changes = []
    for tag, i, i_end, j, j_end in difflib.SequenceMatcher(None, old, new).get_opcodes():
        if tag != "equal":
            lines = [line.rstrip("\n") for line in old[i:i_end] + new[j:j_end]]
            shared = [sum(line in known for line in lines if line.strip()) for known in has]
            changes.append((i, i_end, new[j:j_end], shared.index(max(shared))))
    out = []
    for patch in range(len(owners)):
        lines, at = [], 0
        for i, i_end, changed, owner in changes:
            lines += old[at:i] + (changed if owner <= patch else old[i:i_end])
            at = i_end
        out.append(lines + old[at:])
    return out


def refresh(tree: Path) -> None:
    """Write every patch anew: the difference of `tree`'s files to the pinned source."""
    parts = [(patch, *split(patch)) for patch in patches()]
    texts = {patch: header for patch, header, _ in parts}
    with tempfile.TemporaryDirectory() as folder:
        unpack(Path(folder))
        for name in dict.fromkeys(name for _, _, files in parts for name, _ in files):
            old, new = (Path(d, name).read_text().splitlines(keepends=True) for d in (folder, tree))
            owners = {patch: hunks for patch, _, files in parts for found, hunks in files if found == name}
            steps = [old, *stages(old, new, list(owners.values()))]
            for patch, before, after in zip(owners, steps, steps[1:], strict=False):
                texts[patch] += f"diff --git a/{name} b/{name}\n" + "".join(
                    difflib.unified_diff(before, after, f"a/{name}", f"b/{name}")
                )
    for patch, text in texts.items():
        patch.write_text(text)


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest="command", required=True)
    sub.add_parser("fetch", help="print where the pinned sdist lies; download it first if need be")
    sub.add_parser("check")
    p = sub.add_parser("prepare")
    p.add_argument("dir", type=Path)
    p.add_argument("--source", type=Path)
    p.add_argument("--unpatched", action="store_true")
    p = sub.add_parser("apply")
    p.add_argument("dir", type=Path)
    p.add_argument("--force", action="store_true", help="accept hunks that moved to another line")
    sub.add_parser("refresh").add_argument("dir", type=Path)
    sub.add_parser("pin").add_argument("version")
    sub.add_parser("binding", help="unpack llama-cpp-python's Python files").add_argument("dir", type=Path)
    a = ap.parse_args()
    try:
        if a.command == "fetch":
            print(fetch())
        elif a.command == "check":
            print(check())
        elif a.command == "prepare":
            prepare(a.dir, a.source, not a.unpatched)
        elif a.command == "apply":
            apply(a.dir, exact=not a.force)
        elif a.command == "pin":
            print(pin(a.version))
        elif a.command == "binding":
            binding(a.dir)
        else:
            refresh(a.dir)
    except (QueueError, OSError) as e:
        print(f"queue.py: error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
