"""What a graph's nodes are, seen as they are computed (cb_eval of llama.cpp's context)."""

import ctypes

from fasa_gguf import runtime
from fasa_gguf.session import Session


def on_nodes(monkeypatch, see):
    """From now on sessions call see(tensor, ask, name_of) for every node; name_of(tensor): its name.

    ask: before it is computed; see returns whether it wants to see the node computed, and then whether to go on.
    """
    from llama_cpp.llama_cpp import ggml_backend_sched_eval_callback as callback_type

    get = ctypes.CDLL(str(runtime.library.find_library("ggml-base"))).ggml_get_name
    get.argtypes, get.restype = [ctypes.c_void_p], ctypes.c_char_p
    plain = Session._context_params
    callback = callback_type(lambda tensor, ask, _user: see(tensor, ask, lambda x: get(x).decode()))

    def params(session):
        p = plain(session)
        p.cb_eval = callback
        return p

    monkeypatch.setattr(Session, "_context_params", params)
