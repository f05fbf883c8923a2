"""Sharing the layers of an existing model: planning a fold, and folding."""
