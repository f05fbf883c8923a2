"""Models for where ``mor`` is not installed: Transformers with its own code, Llama, GGUF."""
