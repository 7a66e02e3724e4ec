"""Blocks of the hierarchy: one contract, several kinds."""

from hbll_seq.cells.attention import KVState, TransformerBlock
from hbll_seq.cells.base import Cell
from hbll_seq.cells.recurrent import CELL_KINDS, ElmanCell, GRUCell, MinGRUCell, RecurrentCell, RecurrentState, make_cell
from hbll_seq.cells.recurrent_block import RecurrentBlock
from hbll_seq.cells.residual import ResidualBlock
from hbll_seq.config import HBLLConfig

__all__ = [
    "CELL_KINDS",
    "Cell",
    "ElmanCell",
    "GRUCell",
    "KVState",
    "MinGRUCell",
    "RecurrentBlock",
    "RecurrentCell",
    "RecurrentState",
    "ResidualBlock",
    "TransformerBlock",
    "make_block",
    "make_cell",
]


def make_block(config: HBLLConfig, n: int) -> ResidualBlock:
    """Block n = 1 .. ``config.n_layer`` of the kind that the configuration names for it."""
    kind = config.cells[n - 1]
    return TransformerBlock(config) if kind == "transformer" else RecurrentBlock(config, kind)
