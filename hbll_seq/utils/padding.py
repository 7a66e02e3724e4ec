"""Batches of sequences of unequal length: all of them are brought to the left, with the padding behind.

A recurrence is causal: the padding behind a sequence's last step changes none of its states, and a step that no readout
reads sends no gradient back. So only the readouts have to know where a sequence ends.

Shapes: B batch, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hbll_seq.utils.checks import holds_whole_numbers
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import check_choice, whole_or_none

SIDES = ("right", "left")


def as_lengths(lengths: Tensor | Sequence[int], n_rows: int, n_steps: int, least: int = 1) -> Tensor:
    """How many of its steps each row has, as a tensor [B] of int64 on the CPU.

    Raises:
        ValueError: they are no whole numbers, not one for each row, or not in ``least`` .. ``n_steps``.
    """
    numbers = None
    if isinstance(lengths, Tensor):
        if lengths.dim() == 1 and holds_whole_numbers(lengths):
            numbers = lengths.tolist()
    elif not isinstance(lengths, (str, bytes)) and hasattr(lengths, "__len__") and hasattr(lengths, "__iter__"):
        numbers = [whole_or_none(n) for n in lengths]
    if numbers is None or len(numbers) != n_rows or not all(n is not None and least <= n <= n_steps for n in numbers):
        raise ValueError(f"lengths={quote(lengths)}: must be {n_rows} whole numbers, one a row, from {least} to {n_steps}")
    return torch.tensor(numbers, dtype=torch.int64)


def check_side(padding_side: str, lengths: Tensor | Sequence[int] | None) -> None:
    """Raises ValueError unless ``padding_side`` is "right" or "left", and for "left" without the lengths that it needs."""
    check_choice("padding_side", padding_side, SIDES)
    if padding_side == "left" and lengths is None:
        raise ValueError(
            "padding_side='left' without lengths: the padding would be read as steps; give lengths, how many "
            "steps of each row are real"
        )


def to_right(values: Tensor, lengths: Tensor, padding_side: str, fill: float = 0) -> Tensor:
    """``values`` [B, T, ...] with each row's real steps first and ``fill`` behind them, whatever stood in the padding.

    Raises:
        ValueError: ``padding_side`` is neither "right" nor "left".
    """
    check_side(padding_side, lengths)
    n_steps, lengths = values.shape[1], lengths.to(values.device)
    steps = torch.arange(n_steps, device=values.device)
    if padding_side == "left":
        rows = torch.arange(len(values), device=values.device)[:, None]
        values = values[rows, (steps + (n_steps - lengths)[:, None]) % n_steps]
    padding = steps >= lengths[:, None]
    return values.masked_fill(padding.view(*padding.shape, *(1,) * (values.dim() - 2)), fill)


def is_real(lengths: Tensor, n_steps: int, device: torch.device) -> Tensor:
    """Whether each step is real (no padding), time first: [T, B]."""
    return torch.arange(n_steps, device=device)[:, None] < lengths.to(device)


def last_of(states: Tensor, lengths: Tensor) -> Tensor:
    """Each row's state after its last real step: s_1 .. s_T [T, B, ...] -> [B, ...]."""
    return states[lengths.to(states.device) - 1, torch.arange(states.shape[1], device=states.device)]
