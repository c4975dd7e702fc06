"""Check: what a dataset of rankings is worth, before a model is trained on it."""
