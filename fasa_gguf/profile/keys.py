"""The one table of a profile's keys: their names, types and meanings, and what limits their values.

Keys are named as in a GGUF, with `fasa.` in front; JSON has the same names without it.
"""

from __future__ import annotations

from typing import NamedTuple

from ..params import SETTINGS

VERSION = 1
METHODS = ("recall", "energy", "ca", "synthetic")
MAX_LAYERS, MAX_HEADS, MAX_CHUNKS = 4096, 4096, 4096
MAX_NUMBERS = 1 << 22  # elements of one array; 80 layers of 8 KV heads of 64 chunks have 41,000
MAX_BUDGETS = 4096  # entries of the table of mean budgets; calibration makes about 20
MAX_JSON = 1 << 24  # bytes; a model of 80 layers has 2^19
MAX_NAMES = 1 << 16  # of anything in a JSON file: names, texts, lists; a profile has fewer than 100
MAX_TEXT = 4096  # characters
REMAKE = "make the profile anew with `fasa-gguf embed-profile MODEL`"
DROPPED = frozenset(["layer_budget"])  # keys that older files may have, without the prefix; they are ignored


class Key(NamedTuple):
    """One key of a profile."""

    name: str
    type: str  # u8, u16, u32, i32, f32 or str; in brackets: an array of these. Any type that holds the value is read
    meaning: str


KEYS = (
    Key("fasa.version", "u32", "format version; a newer one is refused"),
    Key("fasa.n_layer", "u32", "layers of the model"),
    Key("fasa.n_head_kv", "[u32]", "KV heads of every layer"),
    Key(
        "fasa.n_chunk",
        "[u32]",
        "frequency chunks per KV head of every layer; 0: the layer has no ranking and stays dense",
    ),
    Key(
        "fasa.window", "[u32]", "sliding window of every layer, in tokens; 0: it attends to all. Missing: none has one"
    ),
    Key("fasa.ranking", "[u8] or [u16]", "every chunk of every KV head of every layer, best first"),
    Key("fasa.ranking_method", "str", "recall (greedy set), energy or ca (as published)"),
    Key("fasa.weight_k", "u32", "how many leading chunks have a weight; 0: none"),
    Key("fasa.weight", "[f32]", "weight of each leading chunk's score"),
    Key(
        "fasa.recall",
        "[f32]",
        "share of the attention kept, per KV head, with the leading 1, 2, ... n chunks at fasa.recall_budget",
    ),
    Key("fasa.recall_k", "u32", "n of fasa.recall; 0: none"),
    Key("fasa.recall_budget", "u32", "tokens attended while fasa.recall was measured"),
    Key(
        "fasa.ahead.layers",
        "[u8]",
        "of every layer 1: it may select ahead, by foreseen queries; 0: it keeps its own. Missing: every layer may",
    ),
    Key("fasa.ahead.ranking", "[u8] or [u16]", "as fasa.ranking, for foreseen queries; missing: fasa.ranking"),
    Key("fasa.ahead.weight", "[f32]", "as fasa.weight, of the leading chunks of fasa.ahead.ranking"),
    Key(
        "fasa.layer_miss",
        "[f32]",
        "with a target mass, a layer's is 1 - (1 - mass) * layer_miss: how much more than others it may miss",
    ),
    Key("fasa.mean_budget", "[u32]", "table of mean budgets: tokens per step and KV head on average, ascending"),
    Key(
        "fasa.mean_budget_mass",
        "[f32]",
        "the target mass that takes as many tokens, ascending; between two, log(1 - mass) is linear in log(tokens)",
    ),
    Key(
        "fasa.rope.layout",
        "str",
        "norm: a chunk is dims (2i, 2i+1); neox: (i, i + dims/2). Chunk ids do not depend on it",
    ),
    Key("fasa.rope.dims", "u32", "rotated dimensions per head"),
    Key("fasa.rope.base", "f32", "frequency base under which the ranking was made"),
    Key("fasa.rope.base_window", "f32", "the same of layers with a sliding window; missing: fasa.rope.base"),
    Key("fasa.rope.scale", "f32", "frequency scale under which the ranking was made"),
    *(Key(row.key, row.gguf_type, row.help) for row in SETTINGS),
    Key("fasa.calibration.tool", "str", "fasa_gguf version"),
    Key("fasa.calibration.corpus", "str", "name of the text"),
    Key("fasa.calibration.corpus_sha256", "str", "hash of the text"),
    Key("fasa.calibration.tokens", "u32", "tokens read"),
    Key("fasa.calibration.context", "u32", "length of a window in tokens"),
    Key("fasa.calibration.source", "str", "gguf or hf"),
    Key("fasa.calibration.weights_sha256", "str", "hash of the q and k projection weights that were calibrated"),
)
TYPES = {key.name.removeprefix("fasa."): key.type for key in KEYS}  # by the name without the prefix
