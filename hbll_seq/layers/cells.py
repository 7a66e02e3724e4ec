"""Recurrent cells by name."""

from __future__ import annotations

from hbll_seq.layers.elman import ElmanCell
from hbll_seq.layers.gru import GRUCell
from hbll_seq.layers.mingru import MinGRUCell
from hbll_seq.layers.recurrent import RecurrentCell
from hbll_seq.utils.reading import quote

#: the kinds by name; see :func:`make_cell`.
CELL_KINDS = ("gru", "mingru", "elman", "elman-sigmoid")


def make_cell(kind: str, input_size: int, hidden_size: int, memory: float | None = None) -> RecurrentCell:
    """A recurrent cell by name.

    Args:
        kind: one of ``CELL_KINDS``.
        input_size, hidden_size: widths I and H.
        memory: the longest span in steps that the cell is to remember at first; see :meth:`RecurrentCell.set_memory`.

    Raises:
        ValueError: the kind is unknown, a size is out of range, or the cell cannot have such a memory.
    """
    if not isinstance(kind, str) or kind not in CELL_KINDS:
        raise ValueError(f"cell kind {quote(kind)}: allowed are {', '.join(CELL_KINDS)}")
    if kind.startswith("elman"):
        cell = ElmanCell(input_size, hidden_size, "sigmoid" if kind == "elman-sigmoid" else "tanh")
    else:
        cell = {"gru": GRUCell, "mingru": MinGRUCell}[kind](input_size, hidden_size)
    if memory is not None:
        cell.set_memory(memory)
    return cell
