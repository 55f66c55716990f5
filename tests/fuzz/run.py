"""All fuzzers beside each other: python tests/fuzz/run.py SECONDS (`make fuzz`, which builds them).

What they make up is in build/fuzz/corpus; of it the least that covers as much goes to tests/fuzz/corpus, which they
begin with. A finding is a file of build/fuzz/found, whose log is beside it. Exit status 1: there is one.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD, KEPT = ROOT / "build" / "fuzz", ROOT / "tests" / "fuzz" / "corpus"
SEEDS, FOUND = BUILD / "seeds", BUILD / "found"
PYTHON = [str(ROOT / "build" / "fuzz-venv" / "bin" / "python"), str(ROOT / "tests" / "fuzz" / "files.py")]
COMMANDS = {
    "files": [*PYTHON, "-max_len=8192", f"-dict={SEEDS / 'keys.dict'}"],
    "profile": [str(BUILD / "fuzz-profile"), "-max_len=8192", f"-dict={SEEDS / 'keys.dict'}"],
    "calls": [str(BUILD / "fuzz-calls"), "-max_len=2048", "-len_control=0", "-close_fd_mask=2"],
}
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith("FASA_")},
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}",
    "FUZZ_MODEL": str(SEEDS / "model.gguf"),
    "ASAN_OPTIONS": "detect_container_overflow=0",  # the library itself has no sanitizer
}
MOST = 200_000 // len(COMMANDS)  # bytes of a corpus that is kept


def start(name, seconds):
    corpus = BUILD / "corpus" / name
    for folder in (corpus, KEPT / name):
        folder.mkdir(parents=True, exist_ok=True)
    seeds = [str(SEEDS / name)] if (SEEDS / name).is_dir() else []
    flags = [f"-max_total_time={seconds}", "-timeout=1200", "-rss_limit_mb=2048", "-print_final_stats=1"]
    flags += [f"-artifact_prefix={FOUND}/{name}-"]
    with open(FOUND / f"{name}.log", "w") as log:
        command = ["nice", "-n", "19", *COMMANDS[name], *flags, str(corpus), str(KEPT / name), *seeds]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=ROOT)


def keep(name):
    """The smallest files of the merged corpus, up to MOST bytes."""
    merged = BUILD / "merged" / name
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir(parents=True)
    command = [*COMMANDS[name], "-merge=1", str(merged), str(BUILD / "corpus" / name), str(KEPT / name)]
    subprocess.run(command, capture_output=True, env=ENVIRONMENT, cwd=ROOT, check=True)
    shutil.rmtree(KEPT / name)
    (KEPT / name).mkdir()
    size = 0
    for path in sorted(merged.iterdir(), key=lambda p: (p.stat().st_size, p.name)):
        size += path.stat().st_size
        if size > MOST:
            break
        shutil.copyfile(path, KEPT / name / path.name[:16])


def main(seconds):
    FOUND.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "tests/fuzz/seeds.py", str(SEEDS)], env=ENVIRONMENT, cwd=ROOT, check=True)
    running = {name: start(name, seconds) for name in COMMANDS}
    codes = {name: process.wait() for name, process in running.items()}
    for name, code in codes.items():
        log = (FOUND / f"{name}.log").read_text(errors="replace")
        stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", log))
        runs = f"{int(stats.get('number_of_executed_units', 0)):,} inputs"
        print(f"{name}: {'no finding' if code == 0 else f'FOUND, see {FOUND}/{name}.log'}, {runs}")
        if code == 0:
            keep(name)
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
