"""Numbers about a model on held-out text."""
