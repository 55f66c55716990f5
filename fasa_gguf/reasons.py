"""Why attention is dense, and why a layer does not select ahead: the one table.

enum fasa_reason of native/fasa.h and the texts of the library follow from it.

After a change run `make tables`. Code compares members, never texts.
"""

from __future__ import annotations

from enum import IntEnum


class Reason(IntEnum):
    """Why a step or a layer is dense; NONE where it is sparse. A member has a text and, if any, a remedy."""

    text: str
    remedy: str  # what a user can do about it; "": nothing

    def __new__(cls, text: str, remedy: str = "") -> Reason:
        member = int.__new__(cls, len(cls.__members__))
        member._value_ = len(cls.__members__)
        member.text = text
        member.remedy = remedy
        return member

    # of a step or a layer
    NONE = ""
    OFF = "FASA is off"
    MIN_CONTEXT_GPU = "the context is shorter than min_context_gpu", "use --fasa-min-context-gpu 0 or a longer context"

    # of a step as a whole
    NOT_STARTED = "nothing was computed yet"
    PREFILL = "the last step was a prompt"
    MIN_CONTEXT = (
        "the context is shorter than min_context",
        "use a smaller --fasa-min-context or a longer context",
    )
    NO_LAYER = "no layer can run sparse"
    UNKNOWN_CONTEXT = "this context has no KV cache that FASA knows"

    # of a prompt: why it was processed densely
    PREFILL_OFF = "sparse prefill is off", "use --fasa-prefill auto or on"
    PREFILL_MIN_CONTEXT = (
        "the prompt is shorter than prefill_min_context so far",
        "use --fasa-prefill on or a smaller --fasa-prefill-min-context",
    )
    PREFILL_SHORT = "the ubatch has fewer than 32 tokens of a sequence"
    PREFILL_EMBEDDINGS = "embeddings are computed"
    PREFILL_POSITIONS = "tokens of the ubatch share a position, as those of an image do"
    PREFILL_OBSERVED = "an observer sees queries and keys, as in calibration"
    PREFILL_MIN_CONTEXT_GPU = (
        "its attention runs on a GPU, and the prompt is shorter than prefill_min_context_gpu so far",
        "use --fasa-prefill on or a smaller --fasa-prefill-min-context-gpu",
    )
    PREFILL_OFFLOAD = (
        "it is on the CPU, and a GPU computes its prompts, as llama.cpp does without `op_offload` false",
        "use --fasa-prefill on",
    )
    PREFILL_REMOTE = "it is on another machine, where prompts are dense"
    PREFILL_HEAD_DIM = "the GPU's flash attention does not know its head dimension"
    PREFILL_WINDOW = "the layer has a sliding window"

    # of a layer: its place in the model
    NO_SUCH_LAYER = "no such layer"
    NO_CACHE = "it has no KV cache that FASA knows"
    NOT_BUILT = (
        "no graph has asked FASA for it: nothing was decoded yet, or its architecture builds attention another way"
    )
    SMALL_WINDOW = "its sliding window is not longer than what it would attend"
    NOT_RANKED = "the profile has no ranking for it", "use a profile that ranks this layer"
    LENDER_DENSE = "the layer whose list it borrows is dense"

    # of a layer: its cache
    SHARED_CACHE = "its cache is shared with another context"
    LATENT = "multi-head latent attention has no keys per head"
    ODD_HEAD = "its head dimension is odd"
    CACHE_TYPE = "its cache type cannot be read back", "use an f16, q8_0 or q4_0 cache"
    NO_KERNELS = (
        "its cache is on a device that FASA has no kernels for",
        "keep the layer on the CPU or on a CUDA device",
    )
    REMOTE_BUILD = (
        "it is on another machine, whose RPC server is not of this build of fasa_gguf",
        "start ggml-rpc-server of the same build there (`make tools`)",
    )
    REMOTE_DEVICE = "it is on a device of another machine that is no CPU"
    NO_CPU_OPS = "the CPU backend has no FASA ops"

    # of a layer: its attention
    NO_FLASH_ATTENTION = "flash attention is off", "make the context with flash attention on"
    TRAINING = "training"
    NOT_CAUSAL = "its attention is not causal"
    BIAS = "its attention has a bias"
    ALIBI = "ALiBi moves the scores"
    QUERY_TYPE = "its queries are not f32"
    QUERY_HEADS = "its query heads are no multiple of its KV heads"
    MASK_TYPE = "its mask is not f16"
    MASK_COMPUTED = "its mask is computed"

    # of a layer on a CUDA device
    CUDA_DEVICE = "its device is not one of CUDA's"
    CUDA_CAPABILITY = "its GPU has no FASA kernels: they need an NVIDIA GPU of compute capability 7.5 or later"
    CUDA_CACHE_TYPE = (
        "the CUDA kernels read caches in f32, f16, bf16, q8_0 and q4_0, and this one has another type",
        "use an f16, q8_0 or q4_0 cache",
    )
    CUDA_HEAD_DIM = "the CUDA kernels need the same head dimension for K and V, a multiple of 8 and at most 256"
    CUDA_GROUP = "more than 128 query heads share a KV head"

    # of a layer that runs sparse: why it selects with its own queries instead of ahead
    AHEAD_OFF = "selecting ahead is off", "use --fasa-ahead on"
    AHEAD_AUTO = "it is on the CPU, where selecting ahead saves no time", "use --fasa-ahead on"
    AHEAD_TOKENS = "the step has several tokens, with which selecting ahead is slower", "use --fasa-ahead on"
    AHEAD_LONG = "selecting among so many cells takes longer than the feed-forward beside it", "use --fasa-ahead on"
    AHEAD_BORROWS = "it borrows its list"
    AHEAD_PROFILE = "the profile says that foreseen queries lose too much there"
    AHEAD_FIRST = "no block lies before it"
    AHEAD_NO_FEED_FORWARD = "no feed-forward lies between the attention or other block before it and its queries"
    AHEAD_UNKNOWN = "how its queries follow from the layer before is not recognised"
    AHEAD_DEVICE = "the feed-forward before it runs on another device"
    AHEAD_ROOM = (
        "its rows on the device have no room for a list with all tokens of the batch",
        "use a larger budget or cap",
    )


def not_used(reason: Reason, why: str = "") -> str:
    """The sentence for a run that asked for FASA and in which no step used it; `why` replaces the reason's text."""
    way = f"; {reason.remedy}" if reason.remedy else ""
    return f"FASA was asked for and no step used it: {why or reason.text}{way}"
