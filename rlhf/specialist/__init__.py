"""Specialists: a model of transformers with a head for one labelled task, as classification or tagging."""
