"""Labelled tasks: a dataset of demonstrations with a metric, and how an answer is read from a text."""
