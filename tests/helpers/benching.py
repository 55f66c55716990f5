"""Short bench runs, and results as a run would have left them."""

from fasa_gguf import FasaParams
from fasa_gguf.speed import bench as b
from fasa_gguf.speed.bench import BenchSettings
from fasa_gguf.speed.results import Result

ON = FasaParams(chunks=4, budget=64, min_context=0)
# one thread: two wait for each other on a busy machine
QUICK = BenchSettings([300], n_gen=4, repetitions=2, n_prompt=(), n_threads=1)


def run(model, settings, profile, params=ON, **kw):
    return b.bench(model, settings, {"fasa": params}, profile, **kw)


def planted(*ratios: float | None):
    """Results at depths 0, 100, 200, ...: FASA at `ratio` times dense's 50 tokens/s; None: it stayed dense."""
    results = []
    for i, ratio in enumerate(ratios):
        results.append(Result("dense", 100 * i, 8, samples_ts=[49.0, 51.0], kv_bytes=2e6, ratio=1.0, fill="prefill"))
        results.append(
            Result(
                "fasa",
                100 * i,
                8,
                samples_ts=[50 * (ratio or 1)] * 2,
                kv_bytes=2e6 if ratio is None else 5e5,
                sparse_share=float(ratio is not None),
                tokens_attended=None if ratio is None else 64.0,
                note="dense (n < 64)" if ratio is None else "",
                ratio=ratio or 1.0,
                fill="prefill",
                params=ON,
            )
        )
    return results
