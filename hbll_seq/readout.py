"""Readouts of their own for the lengths of the head's jump: what lets one head read states of several depths."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class JumpReadout(nn.Module):
    """A low-rank linear correction of a state before the head, one for each length of the jump that the head makes.

    The head is a transition too, shared by the arcs N/2 -> N, 3N/4 -> N, .., N-1 -> N (METHOD 1.1): the states that it
    reads there lie 2**l blocks before the output. Corrections start at zero.

    Args:
        n_level: levels D of the tree; the jumps are 2**0 .. 2**(D-1) long.
        width: C of the states.
        rank: r of each correction, at least 1.
    """

    def __init__(self, n_level: int, width: int, rank: int):
        super().__init__()
        # One tensor for all lengths, so that every process has a gradient for it whichever paths a step reads.
        self.down = nn.Parameter(torch.randn(n_level, rank, width) * width**-0.5)
        self.up = nn.Parameter(torch.zeros(n_level, width, rank))

    def forward(self, state: Tensor, jump: int) -> Tensor:
        """``state`` [..., C], read by a jump of length ``jump`` (a power of two) -> [..., C]."""
        level = jump.bit_length() - 1
        return state + state @ self.down[level].T @ self.up[level].T
