"""CPU time of a decode step, dense and with FASA: `python tests/wheels/step_time.py MODEL [DEPTH]`, on one thread.

On a busy machine it says more than tokens per second. FASA_LIB_PATH names another build's folder of libraries, to
compare a wheel's with `make build`'s. MODEL has a profile.
"""

import sys
import time

from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.profile.find import find_profile
from fasa_gguf.runtime import backends, library
from fasa_gguf.session import Session

N_STEPS, N_WARM, N_ROUNDS = 16, 3, 2


def main():
    model, depth = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 4096
    profile = find_profile(GGUFFile(model), None)
    if profile is None:
        sys.exit(f"step_time.py: {model} has no profile; run `fasa-gguf embed-profile {model}`")
    best = {}
    with Session(model, n_ctx=depth + 512, n_threads=1) as s:
        s.fasa.set_profile(profile)
        s.fasa.fill_random(depth)
        for name, params in (("dense", None), ("FASA", profile.params())) * N_ROUNDS:
            s.fasa.set_params(params)
            s.remove(0, depth)
            for i in range(N_WARM + N_STEPS):
                if i == N_WARM:
                    start = time.process_time()
                s.decode([5 + i], depth + i)
            took = 1000 * (time.process_time() - start) / N_STEPS
            best[name] = min(took, best.get(name, took))
    build = backends.cpu_variant(library.lib_dir()) or "linked CPU backend"
    print(", ".join(f"{name} {ms:.1f} ms" for name, ms in best.items()), f"a step at {depth} tokens, {build}")


if __name__ == "__main__":
    main()
