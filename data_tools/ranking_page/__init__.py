"""Ranking in a browser: a page on loopback for several annotators, or one file that is sent to an annotator."""
