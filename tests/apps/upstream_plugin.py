"""What a pytest run of llama-cpp-python's own tests loads first (-p upstream_plugin): FASA, local models, a report.

FASA_APPS_FASA: "off", or "auto" for what profiles and FASA_* variables say. FASA_APPS_MODELS: the folder in which
hf_hub_download finds its files. FASA_APPS_REPORT: where the outcomes and the counters of all models go, as JSON.
"""

import gc
import json
import os
import sys
import types
from collections import Counter
from pathlib import Path

import fasa_gguf

fasa_gguf.enable(os.environ["FASA_APPS_FASA"])
OUTCOMES, COUNTERS = Counter(), Counter()


def hf_hub_download(_repo_id, filename):
    return str(Path(os.environ["FASA_APPS_MODELS"], Path(filename).name))


hub = types.ModuleType("huggingface_hub")
hub.hf_hub_download = hf_hub_download
sys.modules["huggingface_hub"] = hub
close = fasa_gguf.Llama.close


def close_counted(llm):
    """Add a model's counters to all others' before it is closed."""
    if llm._fasa is not None:
        COUNTERS.update(llm._fasa.counters())
        COUNTERS["models"] += 1
    close(llm)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[report.outcome] += 1


def pytest_sessionfinish():
    gc.collect()
    Path(os.environ["FASA_APPS_REPORT"]).write_text(json.dumps({"outcomes": OUTCOMES, "counters": COUNTERS}))


fasa_gguf.Llama.close = close_counted
