"""RoPE of a context against that of a profile: chunks are ranked under one rotation and mean little under another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .profile import Profile

SCALING = {0: "none", 1: "linear", 2: "yarn", 3: "longrope"}  # enum llama_rope_scaling_type
# what leaves the model's scaling as it is: values of llama.cpp, and of llama_cpp.Llama
UNSET = {
    "rope_scaling_type": (-1,),
    "yarn_ext_factor": (-1.0,),
    "yarn_attn_factor": (-1.0, 1.0),
    "yarn_beta_fast": (-1.0, 32.0),
    "yarn_beta_slow": (-1.0, 1.0),
    "yarn_orig_ctx": (0,),
}


def _differ(a: float, b: float) -> bool:
    return abs(a - b) > 1e-3 * abs(b)  # a profile in JSON keeps five digits


def rope_note(profile: Profile, info: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> str:
    """One line when a context's RoPE is not that of the profile, naming both; "" when it is.

    info: rope_base and rope_scale in force, of Context.model_info. given: settings of the context by their names in
    llama_context_params; a scaling that is set there is another one than the model's, under which profiles are made.
    """
    mine, theirs = [], []
    for name, key in (("base", "rope_base"), ("scale", "rope_scale")):
        made, now = profile.rope.get(name), info[key]
        if made is not None and _differ(now, made):
            mine.append(f"{name} {made:.7g}")
            theirs.append(f"{name} {now:.7g}")
    changed = [(k, v) for k, v in (given or {}).items() if k in UNSET and v not in UNSET[k]]
    if changed:
        mine.append("the model's own scaling")
        values = [SCALING.get(v, v) if k == "rope_scaling_type" else f"{v:g}" for k, v in changed]
        theirs.append(", ".join(f"{k} {v}" for (k, _), v in zip(changed, values, strict=True)))
    if not mine:
        return ""
    return (
        f"the profile was made under RoPE {' and '.join(mine)}, and this context has {' and '.join(theirs)}: its "
        "ranking may not hold; omit these settings, or use a profile made under them"
    )
