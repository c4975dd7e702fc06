"""RLHF from human rankings: the library under the three stages."""

__version__ = "0.1.0"
