"""Time and memory of `fasa-gguf calibrate` for a random Q4_0 model of the shapes of `bench --shape`.

python tests/helpers/time_calibration.py 8b [-ngl 99] [-c 4096] [-t 0] [--folder DIR]

Prints one line of JSON: seconds, CPU seconds and peak memory of the whole command, model included; with layers on a
GPU also the most memory that the GPU had in use (by nvidia-smi, all processes). The random model gets a vocabulary of
bytes, so that a text can be read.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

from gguf import TokenType
from paths import ROOT

from fasa_gguf.speed import random_model


def write(path, shape):
    """The model of random_model.write_model, with a vocabulary."""
    add_keys = random_model._add_keys

    def with_vocabulary(w, shape, seed):
        add_keys(w, shape, seed)
        w.kv_data[0].pop("tokenizer.ggml.model")
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        n = random_model.SHAPES[shape][-1]
        others = [f"<{i}>" for i in range(n - 3 - len(bytes_))]
        w.add_tokenizer_model("llama")
        w.add_token_list(["<unk>", "<s>", "</s>", *bytes_, *others])
        w.add_token_scores([0.0] * n)
        w.add_token_types(
            [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
            + [TokenType.BYTE] * len(bytes_)
            + [TokenType.NORMAL] * len(others)
        )

    random_model._add_keys = with_vocabulary
    try:
        random_model.write_model(path, shape)
    finally:
        random_model._add_keys = add_keys


class GpuMemory(threading.Thread):
    """The most MiB in use on any GPU, looked at four times a second; None without nvidia-smi."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.stop = None, threading.Event()

    def run(self):
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.stop.wait(0.25):
            try:
                out = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            except (OSError, subprocess.CalledProcessError):
                return
            self.most = max(self.most or 0, *map(int, out.split()))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=list(random_model.SHAPES))
    parser.add_argument("-ngl", type=int, default=0)
    parser.add_argument("-c", type=int, default=4096)
    parser.add_argument("-t", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "calibration")
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    model, profile = a.folder / f"{a.shape}.gguf", a.folder / f"{a.shape}.json"
    if not model.exists():
        write(model, a.shape)
    profile.unlink(missing_ok=True)
    gpu = GpuMemory()
    gpu.start()
    start = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "fasa_gguf",
        "calibrate",
        model,
        "-c",
        a.c,
        "-t",
        a.t,
        "-ngl",
        a.ngl,
        "-o",
        profile,
    ]
    subprocess.run(list(map(str, command)), cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    seconds = time.monotonic() - start
    gpu.stop.set()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        json.dumps(
            {
                "shape": a.shape,
                "n_gpu_layers": a.ngl,
                "n_ctx": a.c,
                "model_bytes": model.stat().st_size,
                "seconds": round(seconds, 1),
                "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
                "peak_rss_mib": used.ru_maxrss // 1024,
                "gpu_mib": gpu.most,
            }
        )
    )


if __name__ == "__main__":
    main()
