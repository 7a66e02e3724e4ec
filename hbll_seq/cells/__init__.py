"""Blocks of the hierarchy: one contract, several kinds."""

from hbll_seq.cells.attention import KVState, TransformerBlock
from hbll_seq.cells.base import Cell

__all__ = ["Cell", "KVState", "TransformerBlock"]
