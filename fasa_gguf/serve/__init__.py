"""An OpenAI-compatible server that decodes several requests at once: llama-cpp-python's routes and types, our engine.

The patched library is loaded here, before anything below imports llama_cpp.
"""

from ..runtime import library

library.load()
