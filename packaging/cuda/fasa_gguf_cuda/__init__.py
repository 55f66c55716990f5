"""The CUDA backend of fasa_gguf, which loads it (fasa_gguf/runtime/backends.py). There is nothing to import here."""
