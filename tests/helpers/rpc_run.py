"""Runs a model on RPC servers, in a process of its own: servers that were added stay until it ends.

argv: a JSON object with model, out (.npz), servers ["host:port"], n_gpu_layers, settings {name: FasaParams or null}.
Writes logits [steps, n_vocab] of every setting, and prints counters and reasons as JSON.
"""

import json
import sys

import numpy as np

from fasa_gguf import FasaParams
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


def main(job):
    add_rpc_servers(job["servers"])
    logits, said = {}, {}
    with Session(job["model"], n_ctx=1024, n_threads=1, n_gpu_layers=job["n_gpu_layers"]) as s:
        n_layer = s.fasa.model_info()["n_layer"]
        s.fasa.set_profile(synthetic_profile([2] * n_layer, [8] * n_layer, seed=3))
        for name, given in job["settings"].items():
            logits[name] = generate(s, None if given is None else FasaParams(**given))
            said[name] = {
                "counters": s.fasa.counters(),
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
