"""How the tests of apps start other programs."""

import os

from paths import ROOT

SPARSE = {"MIN_CONTEXT": 0, "BUDGET": 48, "SINK": 2, "RECENT": 8}


def environment(profile=None, **settings):
    """The variables of a process that decodes sparse from the first step; settings: FASA_* variables besides those."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASA_", "PYTEST_"))}
    env |= {f"FASA_{name}": str(value) for name, value in {**SPARSE, **settings}.items()}
    if profile:
        env["FASA_PROFILE"] = str(profile)
    return env | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
