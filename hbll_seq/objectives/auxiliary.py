"""Auxiliary exits: in training alone, a segment without an exit at its end gets one there (docs/method.md 2.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.base import Objective
from hbll_seq.objectives.options import Sweeps
from hbll_seq.objectives.registry import text_of
from hbll_seq.utils.seeds import mix_seeds

#: of their adapters, where the model has no exit adapters whose rank they could have
DEFAULT_RANK = 16
#: steps among whose draws of a mix one without an exit at a segment's end would show, where there is any
_MANY = 64
_STREAM = -2  # no node has this number, and the depth mix has another


class AuxiliaryExits(nn.Module):
    """The model's head behind low-rank adapters of its own, at the ends of a path's segments.

    The adapters belong to the objective and not to the model. They begin at zero: each exit begins as the plain head.

    Args:
        path: block numbers of the main path.
        chunk_size: blocks of a segment.
        width: C of the states.
        rank: r of each adapter.
        weight: of each exit's loss.
        like: a parameter of the model, whose dtype and device they have.
        seed: that they are drawn from, so that every process has the same ones.

    Attributes:
        ends: the last block of every segment but the last.
    """

    def __init__(
        self, path: Sequence[int], chunk_size: int, width: int, rank: int, weight: float, *, like: Tensor, seed: int
    ):
        super().__init__()
        self.ends, self.weight = segment_ends(path, chunk_size), weight
        generator = torch.Generator().manual_seed(mix_seeds(seed, _STREAM))
        down = torch.randn(len(self.ends), rank, width, generator=generator) * width**-0.5
        # One tensor for all ends, so that every step has a gradient for it, at whichever ends it takes these exits.
        self.down = nn.Parameter(down.to(like))
        self.up = nn.Parameter(torch.zeros(len(self.ends), width, rank).to(like))

    def forward(self, state: Tensor, n: int) -> Tensor:
        """``state`` [..., C] after the block n, the end of a segment -> [..., C], what the head reads."""
        row = self.ends.index(n)
        down, up = (each[row].T.to(state) for each in (self.down, self.up))  # the model may have moved since they were made
        return state + state @ down @ up

    def score(self, model: DepthHierarchy, states: Mapping[int, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of some of these exits.

        Args:
            model: whose head reads the states.
            states: [batch, ..., C] by the number of the block behind which they lie.
            targets: of every exit.

        Returns:
            The sum of the losses by weight, a scalar, attached to the states, the adapters and the head, and the nats of each
            exit, [exits], detached. Without states the sum is a zero that is attached to the adapters alone.
        """
        if not states:
            return 0.0 * (self.down.sum() + self.up.sum()), self.down.new_zeros(0)
        read = [self(state, n) for n, state in states.items()]
        return model.score_heads(read, targets, [self.weight] * len(read))

    def extra_repr(self) -> str:
        """Where they are, for ``print(objective)``."""
        return f"ends={self.ends}, rank={self.down.shape[1]}, weight={self.weight}"


def segment_ends(path: Sequence[int], chunk_size: int) -> tuple[int, ...]:
    """The last block of every segment but the last, of a path cut into segments of ``chunk_size`` blocks."""
    return tuple(path[chunk_size - 1 : len(path) - 1 : chunk_size])


def auxiliary_exits(objective: Objective, sweeps: Sweeps) -> AuxiliaryExits:
    """Those of an objective over depth, with adapters of the rank of the model's exit adapters.

    Args:
        objective: whose model, path and depth mix they are made for.
        sweeps: resolved.

    Raises:
        ValueError: the width of the states is unknown, or no step would take one.
    """
    model, path, size = objective.model, objective.path, sweeps.chunk_size
    given = f"auxiliary_exits={sweeps.auxiliary_exits} with"
    if model.width is None:
        raise ValueError(
            f"{given} a hierarchy of unknown width: give DepthHierarchy the width of its states, or leave auxiliary_exits out"
        )
    if size >= len(path):
        smaller = f"give a chunk_size of at most {len(path) - 1}, or " if len(path) > 1 else ""
        raise ValueError(
            f"{given} chunk_size={size}: {len(path)} blocks are one segment, at whose end the path has an exit of its own; "
            f"{smaller}leave auxiliary_exits out"
        )
    rank = getattr(getattr(model, "config", None), "exit_rank", 0) or DEFAULT_RANK
    like = next(model.parameters(), torch.empty(0))
    exits = AuxiliaryExits(path, size, model.width, rank, sweeps.auxiliary_exits, like=like, seed=objective.seed)
    drawn = (objective.sub_networks(step * objective.micro_batches)[0].exits for step in range(_MANY))
    if all(set(exits.ends) <= set(of_path) for of_path in drawn):
        raise ValueError(
            f"{given} depths={text_of(objective.depths)}: at the end of each segment the mix has an exit in every step; "
            "leave auxiliary_exits out, or give another chunk_size"
        )
    return exits
