"""Checkpoints of others read into a model folder: the authors', Llama and its relatives, GGUF."""
