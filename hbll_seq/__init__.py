"""Sequence models trained without backpropagation through depth or time, and run at the depth you choose."""

__version__ = "0.1.0"
