"""Training a folded model from its source: teacher, losses, stages."""
