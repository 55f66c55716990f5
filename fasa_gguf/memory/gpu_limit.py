"""min_context_gpu of a context that is planned, when the setting is -1: as the context itself will find it."""

from __future__ import annotations

from .. import runtime
from ..params import FasaParams
from ..runtime.gpu_limit import GpuLimit, find_gpu_limit
from ..runtime.settings import ContextSettings
from .model import Layer, Model
from .plan import ContextShape, n_dom, runs_sparse

DEFAULT, LEAST = 16384, 2048  # FASA_GPU_LIMIT of native/core/crossover.h, FASA_LEAST_GPU_LIMIT of native/llama/state.h


def _layer(c: ContextShape, params: FasaParams) -> Layer | None:
    """The layer whose shape is measured (fasa_cache::gpu_layers): one that selects ahead where there is one."""
    layers = list(enumerate(c.model.layers))[c.first_on_device :]
    found = [(il > 0 and x.may_ahead, x) for il, x in layers if x.n_head_kv and runs_sparse(params, x)]
    return next((x for may, x in found if may), found[0][1] if found else None)


def planned(model: Model, settings: ContextSettings, params: FasaParams) -> tuple[FasaParams, GpuLimit | None]:
    """(params with a number for min_context_gpu, what the GPU says); None: the setting is a number, or of no effect.

    Probes the first CUDA device where no earlier probe is kept, up to 2 s. Raises FasaError.
    """
    c = ContextShape(model, settings)
    if params.min_context_gpu >= 0 or not params.min_context or settings.mode == "host" or settings.no_kv_offload:
        return params, None
    layer = _layer(c, params)
    if layer is None:
        return params, None
    cuda = runtime.devices.cuda_devices()
    if not cuda:
        found = GpuLimit(DEFAULT, "default", "there is no CUDA device here")
    elif c.cells(layer.window) <= LEAST:
        found = GpuLimit(LEAST, "short")
    else:
        may = params.ahead != "off" and layer.may_ahead and layer is not model.layers[0]
        found = find_gpu_limit(
            cuda[0],
            n_head=layer.n_head,
            n_head_kv=layer.n_head_kv,
            head_dim=layer.d_k,
            n_dom=n_dom(params, model, layer),
            attended=params.longest,
            type_k=settings.type_k,
            type_v=settings.type_v,
            k_dom=params.k_dom,
            n_forced=max(1, params.sink + params.recent),
            per_head=params.per_head,
            beside=layer.feed_forward_bytes if may else 0,
        )
    return params.replace(min_context_gpu=found.cells), found
