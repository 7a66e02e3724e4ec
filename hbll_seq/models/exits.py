"""Exit adapters: corrections of a state before the head, which let one head read states of several depths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hbll_seq.tree.topology import DyadicTree
from hbll_seq.utils.constants import constants

#: what has an adapter of its own: each length of the head's jump, or each number of blocks
EXIT_BY = ("jump", "depth")


class ExitAdapters(nn.Module):
    """Low-rank linear corrections of a state before the head.

    ``"jump"`` has one correction for each of the D lengths of the head's jump. The head is a transition too, shared by the
    arcs N/2 -> N, 3N/4 -> N, .., N-1 -> N (docs/method.md 1.1), and the states that it reads there lie 2**l blocks before the
    output. ``"depth"`` has one for each number of blocks of a path, N - 1 in all. Corrections start at zero.

    Args:
        tree: the paths and their jumps.
        width: C of the states.
        rank: r of each correction, at least 1.
        by: one of ``EXIT_BY``.
    """

    def __init__(self, tree: DyadicTree, width: int, rank: int, by: str = "jump"):
        super().__init__()
        self.tree, self.by = tree, by
        # One tensor for all corrections, so that every process has a gradient for it, whichever paths a step reads.
        n = tree.n_level if by == "jump" else tree.n_nodes
        self.down = nn.Parameter(torch.randn(n, rank, width) * width**-0.5)
        self.up = nn.Parameter(torch.zeros(n, width, rank))

    @property
    def n_parameters_each(self) -> int:
        """Parameters of one correction."""
        return self.down[0].numel() + self.up[0].numel()

    def row(self, path: Sequence[int]) -> int:
        """The number of the correction for a state after the blocks ``path``."""
        return (self.tree.N - path[-1]).bit_length() - 1 if self.by == "jump" else len(path) - 1

    def forward(self, state: Tensor, path: Sequence[int]) -> Tensor:
        """``state`` [..., C], the blocks ``path`` walked -> [..., C]."""
        row = self.row(path)
        return state + state @ self.down[row].T @ self.up[row].T

    def stacked(self, states: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
        """``forward`` of each of ``states`` [E, P, C], with the path of each -> [E, P, C]."""
        rows = constants([self.row(path) for path in paths], torch.int64, states.device)
        return states + states @ self.down[rows].mT @ self.up[rows].mT
