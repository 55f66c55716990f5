"""Runs a model on RPC servers, in a process of its own: servers that were added stay until it ends.

argv: a JSON object with model, out (.npz), servers ["host:port"], n_gpu_layers, settings {name: FasaParams or null}; or
model, servers and splits [(tensor_split, n_gpu_layers)].
Writes logits [steps, n_vocab] of every setting, and prints counters and reasons as JSON.
"""

import ctypes
import json
import re
import sys

import numpy as np

from fasa_gguf import FasaParams, runtime
from fasa_gguf.runtime.devices import add_rpc_servers
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

N_PROMPT, N_STEPS = 300, 12


def generate(s, params):
    s.fasa.set_params(params)
    s.fasa.reset_counters()
    s.clear()
    logits = [s.decode([i * 7 % 250 + 3 for i in range(N_PROMPT)], 0)]
    for i in range(N_STEPS):
        logits.append(s.decode([40 + 5 * i], N_PROMPT + i))
    return np.stack(logits)


def assigned(model, split, n_gpu_layers):
    """The layers of each RPC device that llama.cpp chooses with this tensor_split."""
    llama, lines = runtime.library.load(), []
    log = llama.llama_log_callback(lambda _level, text, _user: lines.append(text.decode("utf-8", "replace")))
    llama.llama_log_set(log, None)
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    shares = (ctypes.c_float * llama.llama_max_devices())(*split)
    params.n_gpu_layers, params.tensor_split = n_gpu_layers, ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))
    loaded = llama.llama_model_load_from_file(model.encode(), params)
    llama.llama_model_free(loaded)
    found = re.findall(r"layer +(\d+) assigned to device (\w+)", "".join(lines))
    return [[int(il) for il, name in found if name == f"RPC{i}"] for i in range(len(split))]


def main(job):
    add_rpc_servers(job["servers"])
    if "splits" in job:
        print(json.dumps([assigned(job["model"], *split) for split in job["splits"]]))
        return
    logits, said = {}, {}
    with Session(job["model"], n_ctx=1024, n_threads=1, n_gpu_layers=job["n_gpu_layers"]) as s:
        n_layer = s.fasa.model_info()["n_layer"]
        s.fasa.set_profile(synthetic_profile([2] * n_layer, [8] * n_layer, seed=3))
        for name, given in job["settings"].items():
            logits[name] = generate(s, None if given is None else FasaParams(**given))
            said[name] = {
                "counters": s.fasa.counters(),
                "prompt": int(s.fasa.prefill_reason_code()),
                "reasons": [int(x) for x in s.fasa.layer_reason_codes()],
                "ahead": [int(x) for x in s.fasa.layer_ahead_codes()],
            }
        if job.get("observe"):
            seen = []
            s.clear()
            s.fasa.observe(lambda o: seen.append((o.il, float(np.abs(o.q).sum()))))
            s.decode(list(range(3, 40)), 0, logits="none")
            s.fasa.observe(None)
            s.fasa.raise_observed()
            said["observed"] = seen
    np.savez(job["out"], **logits)
    print(json.dumps(said))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
