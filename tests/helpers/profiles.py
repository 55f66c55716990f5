"""Profiles for the tiny model."""

import numpy as np
from tiny_gguf import N_HEAD_KV, N_LAYER, WIDTH

from fasa_gguf.profile.profile import Profile
from fasa_gguf.speed.random_model import synthetic_profile


def full_profile():
    """Every key that a profile can have, for the tiny model."""
    p = synthetic_profile([N_HEAD_KV] * N_LAYER, [WIDTH // 2] * N_LAYER, seed=1)
    p.weight_k, p.weight = 2, [np.full((N_HEAD_KV, 2), 0.5 + il, np.float32) for il in range(N_LAYER)]
    p.recall_k, p.recall_budget, p.recall = 1, 64, [np.full((N_HEAD_KV, 1), 0.75, np.float32)] * N_LAYER
    p.ahead, p.ahead_ranking = np.array([0, 1, 1], np.uint8), [x[:, ::-1].copy() for x in p.ranking]
    p.ahead_weight = [np.full((N_HEAD_KV, 2), 0.25 + il, np.float32) for il in range(N_LAYER)]
    p.layer_miss, p.mean_budget = np.array([0.25, 2, 1], np.float32), {100: 0.5, 256: 0.875}
    p.window = [64, 0, 128]
    p.rope = {"layout": "norm", "dims": WIDTH, "base": 10000.0, "base_window": 5000.0, "scale": 1.0}
    p.defaults = {
        "chunks": 3,
        "budget": 256,
        "mass": 0.5,
        "floor": 8,
        "cap": 99,
        "sink": 2,
        "recent": 9,
        "min_context": 7,
        "min_context_gpu": 8,
        "max_tokens": 4,
        "k_dom": "q8",
        "per_head": 1,
        "mean_budget": 0,
        "row_cache": 64,
        "ahead": "on",
        "prefill": "on",
        "prefill_min_context": 9,
        "prefill_min_context_gpu": 11,
        "prefill_tile": 64,
        "prefill_mass": 0.75,
        "prefill_budget": 300,
        "prefill_floor": 10,
        "prefill_cap": 500,
        "prefill_band": 20,
    }
    p.calibration = {
        "tool": "t",
        "corpus": "c",
        "corpus_sha256": "ab",
        "tokens": 10,
        "context": 5,
        "source": "gguf",
        "weights_sha256": "cd",
    }
    return p


def plain_profile():
    """The same, without where it comes from."""
    p = full_profile()
    p.calibration = {}
    return p


def has_profile(path):
    """Whether a file has plain_profile() in it."""
    return Profile.load(path).to_flat() == plain_profile().to_flat()
