"""pytest in a Python that a sanitizer watches: python tests/helpers/sanitized.py address|thread LIBS TESTS...

LIBS: the folder of a library that was built with it. Exit status 1: a test failed, or the sanitizer reported something.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PRELOADED = {"address": ("libasan.so", "libstdc++.so.6"), "thread": ("libtsan.so", "libstdc++.so.6")}
OPTIONS = {
    # Python itself leaks at its end; the compiler's C++ containers are ours in part only
    "address": "detect_leaks=0:detect_container_overflow=0:allocator_may_return_null=1:handle_segv=1",
    "thread": "report_signal_unsafe=0:ignore_noninstrumented_modules=1:history_size=4",
}
# What is reported of code that is not ours is listed here, with why it is no finding
SUPPRESSED = {"address": "", "thread": "called_from_lib:libgomp\n"}
REPORT = re.compile(r"ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer")


def library(name):
    compiler = shutil.which("g++") or sys.exit("needs g++")
    return subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def main(kind, libs, *tests):
    with tempfile.TemporaryDirectory() as folder:
        suppressions = Path(folder) / "suppressions"
        suppressions.write_text(SUPPRESSED[kind])
        options = f"{OPTIONS[kind]}:log_path={folder}/report:exitcode=0:halt_on_error=0"
        env = {
            **os.environ,
            "FASA_LIB_PATH": str(Path(libs).resolve()),
            "LD_PRELOAD": ":".join(library(name) for name in PRELOADED[kind]),
            "ASAN_OPTIONS": options,
            "TSAN_OPTIONS": options + (f":suppressions={suppressions}" if SUPPRESSED[kind] else ""),
            "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={folder}/report",
            "OMP_WAIT_POLICY": "passive",
            "FASA_SANITIZER": kind,
        }
        aslr = ["setarch", platform.machine(), "-R"] if kind == "thread" and shutil.which("setarch") else []
        run = subprocess.run([*aslr, sys.executable, "-m", "pytest", "-q", *tests], env=env)
        reports = [p.read_text(errors="replace") for p in sorted(Path(folder).glob("report*"))]
    found = [text for text in reports if REPORT.search(text)]
    for text in found[:10]:
        print(text[:6000])
    print(f"{kind}: {len(found)} processes with reports, pytest ended with {run.returncode}")
    return int(bool(found or run.returncode))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
