"""Blocks of the hierarchy: one contract, several kinds."""

from hbll_seq.cells.attention import KVState, TransformerBlock
from hbll_seq.cells.base import Cell
from hbll_seq.cells.recurrent import CELL_KINDS, ElmanCell, GRUCell, MinGRUCell, RecurrentCell, RecurrentState, make_cell

__all__ = [
    "CELL_KINDS",
    "Cell",
    "ElmanCell",
    "GRUCell",
    "KVState",
    "MinGRUCell",
    "RecurrentCell",
    "RecurrentState",
    "TransformerBlock",
    "make_cell",
]
