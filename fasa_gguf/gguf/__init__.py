"""GGUF files: headers, model shapes, cache types."""
