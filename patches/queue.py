#!/usr/bin/env python3
"""The patch queue: our hooks in the pinned llama.cpp source.

    queue.py fetch                        the pinned source archive: its path; pip downloads it if it is not cached
    queue.py check                        headers, series, size, and that every patch applies to the pinned source
    queue.py apply DIR [--stock]          make DIR the patched source (--stock: without the patches)
    queue.py refresh DIR                  write the patches anew from an edited tree, keeping their headers

UPSTREAM pins the source, `series` gives the order. A patch is applied only where every context line is found on the very
line it states; there is no fuzz and no offset. A file belongs to one patch, so `refresh` knows where an edit goes.
--source TREE takes a local llama.cpp tree in place of the pinned archive. Standard library only; needs pip to download.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAX_ADDED = 150  # lines added by all patches together; logic belongs in native/
HEADER = ("Subject:", "Why:", "Drop when:")
# what of llama.cpp a build of the libraries and of the two upstream tests needs
WANTED = re.compile(r"(cmake|common|ggml|include|src|vendor)/|(CMakeLists\.txt|LICENSE|AUTHORS)$|"
                    r"tests/test-(llama-archs|save-load-state)\.cpp$")
# llama-cpp-python mirrors these headers with ctypes: they must stay what it was written for
PUBLIC = re.compile(r"(include|ggml/include)/")
STAMP = ".fasa-source"  # marks a tree that `apply` made, and says from what


class QueueError(Exception):
    """One sentence for the user."""


@dataclass
class Hunk:
    start: int         # first line in the source, 1-based
    lines: list[str]   # with ' ', '-' or '+' in front, newline included

    @property
    def old(self) -> list[str]:
        return [line[1:] for line in self.lines if line[0] != "+"]

    @property
    def new(self) -> list[str]:
        return [line[1:] for line in self.lines if line[0] != "-"]


@dataclass
class Patch:
    name: str
    header: str                                                   # all text before the first "diff --git"
    files: dict[str, list[Hunk]] = field(default_factory=dict)    # path in the source -> hunks


def read_upstream(queue: Path) -> dict[str, str]:
    path = queue / "UPSTREAM"
    found = dict(line.split("=", 1) for line in path.read_text().splitlines() if line and not line.startswith("#"))
    missing = {"package", "version", "sha256", "subdir"} - found.keys()
    if missing:
        raise QueueError(f"{path}: no line {sorted(missing)[0]}=VALUE")
    return found


# --- the pinned source

def cache_dir() -> Path:
    root = os.environ.get("FASA_CACHE_DIR")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasa_gguf"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, expected: str) -> Path:
    found = sha256(path)
    if found != expected:
        raise QueueError(f"{path}: sha256 {expected} expected (patches/UPSTREAM), {found} found; delete the file and run "
                         "`python patches/queue.py fetch`")
    return path


def fetch(up: dict[str, str]) -> Path:
    """Path of the source archive; downloaded by pip, from whatever index pip is configured for, when it is not cached."""
    name = f"{up['package'].replace('-', '_')}-{up['version']}.tar.gz"
    cached = cache_dir() / name
    if cached.exists():
        return verify(cached, up["sha256"])
    cached.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {up['package']} {up['version']} (source) with pip", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as tmp:
        # pip checks the hash before it runs anything of the package
        wanted = Path(tmp) / "requirements.txt"
        wanted.write_text(f"{up['package']}=={up['version']} --hash=sha256:{up['sha256']}\n")
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
                   "--no-binary", up["package"], "-d", tmp, "-r", str(wanted)]
        done = subprocess.run(command, cwd=tmp, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        files = list(Path(tmp).glob("*.tar.gz"))
        if done.returncode != 0 or len(files) != 1:
            said = [line for line in done.stderr.splitlines() if line.strip()] or [f"pip exited with {done.returncode}"]
            raise QueueError(f"{up['package']} {up['version']} could not be downloaded ({said[-1].strip()}); put {name} into "
                             f"{cached.parent}, or give a llama.cpp tree with -DFASA_LLAMA_SOURCE=DIR")
        os.replace(verify(files[0], up["sha256"]), cached)
    return cached


def read_archive(path: Path, subdir: str) -> dict[str, bytes]:
    """The wanted files of llama.cpp: path in its tree -> content."""
    files = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = member.name.partition("/")[2]  # below the archive's top folder
            if member.isfile() and name.startswith(subdir + "/") and WANTED.match(name[len(subdir) + 1:]):
                files[name[len(subdir) + 1:]] = tar.extractfile(member).read()
    if "CMakeLists.txt" not in files:
        raise QueueError(f"{path}: no llama.cpp in its folder {subdir}")
    return files


def read_tree(root: Path) -> dict[str, bytes]:
    if not (root / "src" / "llama-graph.cpp").is_file():
        raise QueueError(f"{root}: not a llama.cpp source tree (no src/llama-graph.cpp)")
    found = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if WANTED.match(name)}


def read_source(up: dict[str, str], tree: Path | None) -> dict[str, bytes]:
    return read_tree(tree) if tree else read_archive(fetch(up), up["subdir"])


# --- patches

def parse(name: str, text: str) -> Patch:
    header, *parts = re.split(r"^(?=diff --git )", text, flags=re.M)
    patch = Patch(name, header)
    for part in parts:
        match = re.match(r"diff --git a/(\S+) b/(\S+)\n", part)
        if not match or match[1] != match[2]:
            raise QueueError(f"{name}: `diff --git a/FILE b/FILE` expected, `{part.splitlines()[0]}` found")
        if re.search(r"^(new file|deleted file|rename|copy|Binary|--- /dev/null|\\ No newline)", part, flags=re.M):
            raise QueueError(f"{name}: {match[1]} is added, removed, renamed or ends without a newline; a patch only edits "
                             "files (new ones belong in native/)")
        if match[1] in patch.files:
            raise QueueError(f"{name}: two diffs of {match[1]}")
        patch.files[match[1]] = parse_hunks(name, match[1], part)
    return patch


def parse_hunks(name: str, file: str, text: str) -> list[Hunk]:
    hunks = []
    for part in re.split(r"^(?=@@ )", text, flags=re.M)[1:]:
        first, *lines = part.splitlines(keepends=True)
        match = re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", first)
        if not match:
            raise QueueError(f"{name}: `@@ -LINE,COUNT +LINE,COUNT @@` expected in {file}, `{first.rstrip()}` found")
        hunk = Hunk(int(match[1]), [line if line != "\n" else " \n" for line in lines])
        odd = next((line for line in hunk.lines if line[0] not in " +-"), None)
        counts, stated = (len(hunk.old), len(hunk.new)), (int(match[2] or 1), int(match[3] or 1))
        if odd is not None or counts != stated:
            raise QueueError(f"{name}: the hunk of {file} at line {hunk.start} states {stated[0]} lines before and {stated[1]} after, "
                             f"{counts[0]} and {counts[1]} found")
        hunks.append(hunk)
    return hunks


def apply_hunks(name: str, file: str, source: list[str], hunks: list[Hunk]) -> list[str]:
    """The patched lines. Every old line must stand at the very line the hunk states."""
    out, at = [], 0
    for hunk in hunks:
        first = hunk.start - 1
        if first < at:
            raise QueueError(f"{name}: the hunks of {file} overlap at line {hunk.start}")
        for i, line in enumerate(hunk.old):
            found = source[first + i] if first + i < len(source) else "(end of file)"
            if found != line:
                raise QueueError(f"{name}: does not fit {file} at line {first + i + 1}: `{line.strip()}` expected, "
                                 f"`{found.strip()}` found; edit the tree by hand and run `python patches/queue.py refresh DIR`")
        out += source[at:first] + hunk.new
        at = first + len(hunk.old)
    return out + source[at:]


def lines_of(files: dict[str, bytes], file: str, name: str) -> list[str]:
    if file not in files:
        raise QueueError(f"{name}: {file} is not in the source")
    return files[file].decode().splitlines(keepends=True)


def read_series(queue: Path) -> list[Patch]:
    """The patches in order, each parsed and its form checked."""
    listed = [line.strip() for line in (queue / "series").read_text().splitlines() if line.strip() and not line.startswith("#")]
    on_disk = {path.name for path in queue.glob("*.patch")}
    for name in sorted(on_disk ^ set(listed)):
        raise QueueError(f"{name} is in {'patches/ but not in series' if name in on_disk else 'series but not in patches/'}")
    patches, owner = [], {}
    for name in listed:
        patch = parse(name, (queue / name).read_text())
        check_header(patch)
        for file in patch.files:
            if file in owner:
                raise QueueError(f"{name}: {file} is patched by {owner[file]} already; a file belongs to one patch")
            if PUBLIC.match(file):
                raise QueueError(f"{name}: {file} is a public header, which llama-cpp-python mirrors; it must not change")
            owner[file] = name
        patches.append(patch)
    return patches


def check_header(patch: Patch) -> None:
    if not patch.header.startswith(HEADER[0]):
        raise QueueError(f"{patch.name}: `Subject: ...` expected on the first line")
    for key in HEADER:
        if not re.search(rf"^{key} *\S", patch.header, flags=re.M):
            raise QueueError(f"{patch.name}: no line `{key} ...` in its header")


def added_lines(patches: list[Patch]) -> int:
    return sum(line[0] == "+" for patch in patches for hunks in patch.files.values() for hunk in hunks for line in hunk.lines)


def patched_source(source: dict[str, bytes], patches: list[Patch]) -> dict[str, bytes]:
    out = dict(source)
    for patch in patches:
        for file, hunks in patch.files.items():
            out[file] = "".join(apply_hunks(patch.name, file, lines_of(source, file, patch.name), hunks)).encode()
    return out


class Matcher(difflib.SequenceMatcher):
    """Slides an inserted block down as far as it goes, as git does: then it tends to begin where a statement begins."""

    def get_opcodes(self) -> list[tuple[str, int, int, int, int]]:
        codes = [list(code) for code in super().get_opcodes()]
        for before, this, after in zip(codes, codes[1:], codes[2:]):
            while before[0] == after[0] == "equal" and this[0] == "insert" and after[1] < after[2] - 1 and self.b[this[3]] == self.b[this[4]]:
                before[2], before[4] = before[2] + 1, before[4] + 1
                this[1:] = [at + 1 for at in this[1:]]
                after[1], after[3] = after[1] + 1, after[3] + 1
        return [tuple(code) for code in codes]


def diff(file: str, before: list[str], after: list[str]) -> str:
    """One file's part of a patch, in git's form; "" when nothing changed."""
    out = []
    matcher = Matcher(None, before, after, autojunk=False)
    for group in matcher.get_grouped_opcodes(3):
        (_, i1, _, j1, _), (_, _, i2, _, j2) = group[0], group[-1]
        scope = next((line.rstrip()[:80] for line in reversed(before[:i1]) if re.match(r"[A-Za-z_]", line)), "")
        out.append(f"@@ -{i1 + 1},{i2 - i1} +{j1 + 1},{j2 - j1} @@ {scope}".rstrip() + "\n")
        for tag, a1, a2, b1, b2 in group:
            if tag == "equal":
                out += [" " + line for line in before[a1:a2]]
            else:
                out += ["-" + line for line in before[a1:a2]] + ["+" + line for line in after[b1:b2]]
    return f"diff --git a/{file} b/{file}\n--- a/{file}\n+++ b/{file}\n" + "".join(out) if out else ""


# --- commands

def check(queue: Path, tree: Path | None = None) -> str:
    patches = read_series(queue)
    for patch in patches:
        if not patch.files or not all(patch.files.values()):
            raise QueueError(f"{patch.name}: changes nothing")
    added = added_lines(patches)
    if added > MAX_ADDED:
        raise QueueError(f"the patches add {added} lines, at most {MAX_ADDED} are allowed; move logic to native/")
    up = read_upstream(queue)
    patched_source(read_source(up, tree), patches)
    return f"{len(patches)} patches, {added} added lines, apply to {tree or up['package'] + ' ' + up['version']}"


def apply(queue: Path, out: Path, tree: Path | None = None, stock: bool = False) -> str:
    """Make `out` the (patched) source. Only files that differ are written, so a rebuild compiles what changed."""
    up = read_upstream(queue)
    patches = [] if stock else read_series(queue)
    key = hashlib.sha256(WANTED.pattern.encode() + up["sha256"].encode())
    for patch in patches:
        key.update((queue / patch.name).read_bytes())
    stamp = out / STAMP
    if out.exists() and any(out.iterdir()) and not stamp.exists():
        raise QueueError(f"{out}: not empty and not made by `queue.py apply`; give another folder")
    if not tree and stamp.exists() and stamp.read_text() == key.hexdigest():
        return f"{out}: up to date"
    files = patched_source(read_source(up, tree), patches)
    out.mkdir(parents=True, exist_ok=True)
    stamp.write_text("unfinished")
    for path in [path for path in out.rglob("*") if path.is_file() and path != stamp]:
        if path.relative_to(out).as_posix() not in files:
            path.unlink()
    for name, content in files.items():
        path = out / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    stamp.write_text("local tree" if tree else key.hexdigest())
    return f"{out}: {len(files)} files, {len(patches)} patches applied"


def unchanged(patch: Patch, old_new: dict[str, tuple[list[str], list[str]]]) -> bool:
    try:
        return all(patch.files[file] and apply_hunks(patch.name, file, old, patch.files[file]) == new
                   for file, (old, new) in old_new.items())
    except QueueError:
        return False


def refresh(queue: Path, edited: Path, tree: Path | None = None) -> str:
    """Write the patches anew from `edited`. A new patch starts as a header and the line `diff --git a/FILE b/FILE`."""
    patches = read_series(queue)
    before, after = read_source(read_upstream(queue), tree), read_tree(edited)
    owned = {file for patch in patches for file in patch.files}
    for file in sorted(before.keys() | after.keys()):
        if file not in owned and before.get(file) != after.get(file):
            raise QueueError(f"{file}: differs from the source and no patch owns it; add the line `diff --git a/{file} b/{file}` to "
                             "the patch that it belongs to, or undo the edit")
    texts = {}
    for patch in patches:
        old_new = {file: (lines_of(before, file, patch.name), lines_of(after, file, patch.name)) for file in patch.files}
        if unchanged(patch, old_new):
            continue
        body = "".join(diff(file, old, new) for file, (old, new) in old_new.items())
        if not body:
            raise QueueError(f"{patch.name}: {edited} has none of its changes; remove the patch and its line in series")
        texts[patch.name] = patch.header.rstrip("\n") + "\n\n" + body
    for name, text in texts.items():
        (queue / name).write_text(text)
    return check(queue, tree)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="queue.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queue", type=Path, default=HERE, metavar="DIR", help="the folder of the patches")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch", help="print the path of the pinned source archive")
    for name, text in (("check", "does everything apply"), ("apply", "make the patched source"), ("refresh", "write the patches anew")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--source", type=Path, metavar="TREE", help="a local llama.cpp tree in place of the pinned archive")
        if name != "check":
            command.add_argument("dir", type=Path, metavar="DIR")
        if name == "apply":
            command.add_argument("--stock", action="store_true", help="without the patches")
    args = parser.parse_args(argv)
    try:
        if args.command == "fetch":
            print(fetch(read_upstream(args.queue)))
        elif args.command == "check":
            print(check(args.queue, args.source))
        elif args.command == "apply":
            print(apply(args.queue, args.dir, args.source, args.stock))
        else:
            print(refresh(args.queue, args.dir, args.source))
    except (QueueError, OSError) as error:
        print(f"queue.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
