"""Smoke test of an installed fasa_gguf, by the Python that it is installed for: `python tests/wheels/smoke.py [--gpu]`.

With --serve it asks `fasa-gguf serve` too: the package is then installed with its extra `server`.
Needs nothing but the package: the models are made here. Prints one line a check and exits 1 at the first that fails.
For a CPU that is not there: `qemu-x86_64-static -cpu Haswell PYTHON tests/wheels/smoke.py --under
"qemu-x86_64-static -cpu Haswell" --no-doctor`; the self-test of doctor times things, which an emulator makes slow.
"""

import argparse
import ctypes
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "helpers"))
PYTHON = [sys.executable]  # with --under, behind the emulator
COMMAND = str(Path(sys.executable).with_name("fasa-gguf"))
N_PROMPT, N_STEPS = 300, 12


def say(name, text):
    print(f"{name:<10} {text}", flush=True)


def check(right, what):
    if not right:
        sys.exit(f"FAILED: {what}")


def shell(*words):
    """What Python prints, run on a script and its arguments."""
    done = subprocess.run([*PYTHON, *words], capture_output=True, text=True, cwd="/")  # not where the checkout is
    check(done.returncode == 0, f"{' '.join(words)}: exit {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def loaded(name):
    """The files of this process's memory map whose names have this in them."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if name in line.split()[-1].rsplit("/", 1)[-1]})


def check_installation():
    import fasa_gguf
    from fasa_gguf.runtime import library

    where = Path(fasa_gguf.__file__).parent
    check(where.parent != HERE.parents[1], f"{where} is the checkout, not an installed package")
    say("python", f"{sys.version.split()[0]}, {where}")
    say("version", shell(COMMAND, "--version").strip())
    say("llama_cpp", f"{library.load().__version__}, {Path(library.load().__file__).parent}")


def check_variants():
    """One variant of the CPU backend is in use, and every variant of the package has our ops."""
    from fasa_gguf.runtime import backends, devices, library

    if not backends.is_portable(library.lib_dir()):
        say("variant", "none: built for this machine")
        return
    used = loaded("libggml-cpu")
    check(len(used) == 1, f"one variant should be loaded: {used}")
    files = sorted(library.lib_dir().glob("libggml-cpu-*.so"))
    lacking = [p.name for p in files if not hasattr(ctypes.CDLL(str(p)), "fasa_cpu_op")]
    check(len(files) >= 14 and not lacking, f"{len(files)} variants, without FASA's ops: {lacking}")
    sets = " ".join(k for k, v in devices.features()["CPU"].items() if v == "1")
    say("variant", f"{Path(used[0]).name} of {len(files)}: {sets}")


def generate(s, params):
    """Logits of a prompt's end and of N_STEPS steps [1 + N_STEPS, n_vocab], and the counters."""
    s.fasa.set_params(params)
    s.fasa.reset_counters()
    s.clear()
    logits = [s.decode(np.random.default_rng(1).integers(3, 259, N_PROMPT).tolist(), 0)]
    for i in range(N_STEPS):
        logits.append(s.decode([int(logits[-1].argmax())], N_PROMPT + i))
    return np.stack(logits), s.fasa.counters()


def check_laws(folder, gpu):
    """Off is dense bit for bit, all cells are dense attention, foreseen queries that are true give the same steps."""
    from tiny_gguf import N_HEAD_KV, N_LAYER, WIDTH, write_tiny

    from fasa_gguf import FasaParams
    from fasa_gguf.session import Session
    from fasa_gguf.speed.random_model import synthetic_profile

    write_tiny(folder / "still.gguf", feed_forward=0)  # queries that are foreseen are then the true ones
    some = FasaParams(chunks=4, budget=40, min_context=0, min_context_gpu=0, k_dom="f16", per_head=1)
    keys = {"n_ctx": 1024, "n_threads": 2, "n_gpu_layers": 99 if gpu else 0}
    with Session(folder / "still.gguf", **keys) as s:
        plain, _ = generate(s, None)
        s.fasa.set_profile(synthetic_profile([N_HEAD_KV] * N_LAYER, [WIDTH // 2] * N_LAYER, seed=3))
        off, counted = generate(s, None)
        check(np.array_equal(plain, off) and counted["steps_sparse"] == 0, "off is not dense bit for bit")
        every, counted = generate(s, some.replace(chunks=8, budget=4096, ahead="off"))
        far = np.abs(every - plain).max() / plain.std()
        check(counted["steps_sparse"] == N_STEPS and far < 0.02, f"a budget for all cells differs by {far:.2g}")
        own, counted = generate(s, some.replace(ahead="off"))
        check(counted["steps_sparse"] == N_STEPS, f"{counted['steps_sparse']} of {N_STEPS} steps were sparse")
        check(counted["tokens_attended"] < counted["tokens_visible"] / 4, "a budget of 40 attends more")
        ahead, counted = generate(s, some.replace(ahead="on"))
        check(counted["layers_ahead"] == 2 * N_STEPS, f"{counted['layers_ahead']} layers selected ahead")
        check(np.array_equal(own, ahead), "selecting ahead with true queries differs")
    say("laws", f"off is dense bit for bit; all cells differ from dense by {far:.1g}; ahead selects the same")


def check_drop_in(folder, gpu):
    """embed-profile and Llama, and enable() for an app that imports llama_cpp."""
    from tiny_gguf import write_tiny

    write_tiny(folder / "tiny.gguf")
    model = str(folder / "tiny.fasa.gguf")
    shell(COMMAND, "embed-profile", str(folder / "tiny.gguf"), "-o", model, "-c", "512", "-t", "2")
    code = (
        "import sys, fasa_gguf; fasa_gguf.enable(fasa_gguf.FasaParams(budget=64, min_context=0, min_context_gpu=0))\n"
        "from llama_cpp import Llama\n"
        f"llm = Llama(sys.argv[1], n_ctx=1024, n_threads=2, n_gpu_layers={99 if gpu else 0}, verbose=False)\n"
        "llm('a lighthouse keeper ' * 20, max_tokens=16, temperature=0)\n"
        "print(type(llm).__module__, llm.fasa_stats()['steps_sparse'])"
    )
    said = shell("-c", code, model).split()
    check(said[0] == "fasa_gguf.llama" and int(said[1]) > 0, f"enable(): {said}")
    say("drop-in", f"embed-profile; enable(), then llama_cpp.Llama: {said[1]} sparse steps")


def check_serve(folder, gpu):
    """One chat request to `fasa-gguf serve`, which decodes it with FASA, and its metrics."""
    from tiny_gguf import write_tiny

    write_tiny(folder / "chat.gguf", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    model, log = folder / "chat.fasa.gguf", folder / "serve.log"
    shell(COMMAND, "embed-profile", str(folder / "chat.gguf"), "-o", str(model), "-c", "512", "-t", "2")
    flags = ["-c", "1024", "-t", "2", "-ngl", "99" if gpu else "0", "--fasa-budget", "64", "--fasa-min-context", "0"]
    with log.open("w") as out:
        command = [*PYTHON, COMMAND, "serve", str(model), "--port", "0", "--fasa-min-context-gpu", "0", *flags]
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd="/")
    try:
        for _ in range(600):
            if "listening on " in log.read_text() or server.poll() is not None:
                break
            time.sleep(0.1)
        check("listening on " in log.read_text(), f"fasa-gguf serve: {log.read_text()}")
        base = log.read_text().split("listening on ")[1].split()[0]
        messages = [{"role": "user", "content": "a lighthouse keeper " * 20}]
        asked = json.dumps({"messages": messages, "max_tokens": 16, "temperature": 0}).encode()
        request = urllib.request.Request(base + "/chat/completions", asked, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            usage = json.loads(answer.read())["usage"]
        with urllib.request.urlopen(base.removesuffix("/v1") + "/metrics", timeout=60) as answer:
            metrics = answer.read().decode()
    finally:
        server.terminate()
        server.wait(30)
    check(usage["completion_tokens"] > 1 and usage["fasa"]["steps_sparse"] > 0, f"a chat request: {usage}")
    check("fasa_" in metrics, f"/metrics: {metrics}")
    say("serve", f"a chat request: {usage['completion_tokens']} tokens, {usage['fasa']['steps_sparse']} sparse steps")


def check_gpu():
    from fasa_gguf.runtime import backends, devices

    found = devices.cuda_devices()
    check(found, "no CUDA device")
    if backends.cuda_facts():
        folder = backends._cuda_package()
        lacking = [x for x in ("LICENSE", "LICENSE.llama.cpp") if not (folder / x).exists()]
        check(not lacking, f"{folder} lacks {', '.join(lacking)}")
    names = [d.description for d in devices.devices() if d.is_gpu]
    say("cuda", f"{', '.join(names)}; {backends.cuda_facts() or 'linked'}")
    for name in ("libggml-cuda", "libcudart", "libcublas"):
        say("", " ".join(loaded(name)))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--gpu", action="store_true", help="the laws and the drop-in on the first CUDA device too")
    ap.add_argument("--serve", action="store_true", help="`fasa-gguf serve` too, which needs the extra server")
    ap.add_argument("--no-doctor", action="store_true", help="without `fasa-gguf doctor`")
    ap.add_argument("--under", default="", metavar="COMMAND", help="the emulator that runs this, for what it starts")
    a = ap.parse_args()
    PYTHON[:0] = shlex.split(a.under)
    check_installation()
    check_variants()
    if a.gpu:
        check_gpu()
    for gpu in (False, True) if a.gpu else (False,):
        with tempfile.TemporaryDirectory() as folder:  # no command writes over what another has written
            check_laws(Path(folder), gpu)
            check_drop_in(Path(folder), gpu)
            if a.serve:
                check_serve(Path(folder), gpu)
    if not a.no_doctor:
        text = shell(COMMAND, "doctor")
        tests = re.findall(r"^(?:ok|note|FAILED) .*$", text, re.M)
        print("\n".join(tests))


if __name__ == "__main__":
    main()
