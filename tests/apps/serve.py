"""llama_cpp.server with FASA, and a route that shows the counters; arguments as for `python -m llama_cpp.server`."""

import fasa_gguf

fasa_gguf.enable()

from llama_cpp.server import __main__ as server  # noqa: E402
from llama_cpp.server import app  # noqa: E402

create_app = server.create_app


def create_with_counters(**settings):
    made = create_app(**settings)
    made.add_api_route("/fasa", lambda: app._llama_proxy().fasa_stats())
    return made


server.create_app = create_with_counters
server.main()
