"""Auxiliary exits: in training alone, a segment without an exit at its end gets one there (docs/method.md 2.3)."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from hbll_seq.chains.depth import BlockCalls
from hbll_seq.distributed.blocks import RemoteBlock
from hbll_seq.engine.adjoint import solve_adjoint
from hbll_seq.engine.calls import Calls
from hbll_seq.engine.chain import CallChain
from hbll_seq.engine.gradients import injected
from hbll_seq.engine.iterations import one_walk
from hbll_seq.engine.solve import Solution, solve
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.base import Objective
from hbll_seq.objectives.options import Sweeps
from hbll_seq.objectives.registry import text_of
from hbll_seq.utils.modules import plain_module
from hbll_seq.utils.seeds import mix_seeds

#: of their adapters, where the model has no exit adapters whose rank they could have
DEFAULT_RANK = 16
#: steps among whose draws of a mix one without an exit at a segment's end would show, where there is any
_MANY = 64
_STREAM = -2  # no node has this number, and the depth mix has another


class AuxiliaryExits(nn.Module):
    """The model's head behind low-rank adapters of its own, at the ends of a path's segments, with or without blocks before
    them, which a segment's states are to serve as the next segment's do.

    The adapters and the blocks belong to the objective and not to the model. Adapters begin at zero: each exit begins as the
    plain head. The blocks of an exit begin as copies of the last ones of its segment.

    Args:
        path: block numbers of the main path.
        chunk_size: blocks of a segment.
        width: C of the states.
        rank: r of each adapter.
        weight: of each exit's loss.
        blocks: what the blocks of an exit are copies of, by the end that it lies at; an end may have none.
        like: a parameter of the model, whose dtype and device they have.
        seed: that they are drawn from, so that every process has the same ones.

    Attributes:
        ends: the last block of every segment but the last.
        blocks: those of all exits, in the order of the ends.
    """

    def __init__(
        self, path: Sequence[int], chunk_size: int, width: int, rank: int, weight: float,
        blocks: Mapping[int, Sequence[nn.Module]] = MappingProxyType({}), *, like: Tensor, seed: int,
    ):  # fmt: skip
        super().__init__()
        self.ends, self.weight = segment_ends(path, chunk_size), weight
        generator = torch.Generator().manual_seed(mix_seeds(seed, _STREAM))
        down = torch.randn(len(self.ends), rank, width, generator=generator) * width**-0.5
        # One tensor for all ends, so that every step has a gradient for it, at whichever ends it takes these exits.
        self.down = nn.Parameter(down.to(like))
        self.up = nn.Parameter(torch.zeros(len(self.ends), width, rank).to(like))
        self.blocks, self._numbers = nn.ModuleList(), {}
        for n in self.ends:
            first = len(self.blocks) + 1
            self.blocks.extend(copy.deepcopy(plain_module(block)) for block in blocks.get(n, ()))
            self._numbers[n] = range(first, len(self.blocks) + 1)
        for p in self.blocks.parameters():
            p.requires_grad_(p.is_floating_point())  # also where what it is a copy of is frozen

    def numbers(self, n: int) -> range:
        """Which of :attr:`blocks`, from 1, are those of the exit behind the block n."""
        return self._numbers[n]

    def keep(self, segments: Collection[int]) -> None:
        """Replace the blocks at the ends of other segments, from 0, by a :class:`RemoteBlock`: the exit is where its segment
        is."""
        for segment, n in enumerate(self.ends):
            for i in self.numbers(n) if segment not in segments else ():
                if not isinstance(self.blocks[i - 1], RemoteBlock):
                    self.blocks[i - 1] = RemoteBlock(n, self.blocks[i - 1])

    def follow(self, model: nn.Module) -> None:
        """Blocks train or not as the model does now, and are where it is: it may have moved since they were made."""
        self.blocks.train(model.training)
        own, like = next(self.blocks.parameters(), None), next(model.parameters(), None)
        if own is not None and like is not None and (own.dtype, own.device) != (like.dtype, like.device):
            self.blocks.to(like)

    def calls(self, dropout_seed: int | None) -> BlockCalls:
        """The blocks by their numbers, in a step; recurrent ones start from zero."""
        return BlockCalls(self.blocks, None if dropout_seed is None else mix_seeds(dropout_seed, _STREAM))

    def forward(self, state: Tensor, n: int) -> Tensor:
        """``state`` [..., C] at the end n of a segment, behind the exit's own blocks where it has some -> [..., C], what the
        head reads."""
        row = self.ends.index(n)
        down, up = (each[row].T.to(state) for each in (self.down, self.up))  # the model may have moved since they were made
        return state + state @ down @ up

    def extra_repr(self) -> str:
        """Where they are, for ``print(objective)``."""
        blocks = {n: len(numbers) for n, numbers in self._numbers.items() if numbers}
        return f"ends={self.ends}, rank={self.down.shape[1]}, weight={self.weight}" + f", blocks={blocks}" * bool(blocks)


class ExitsOfStep:
    """The auxiliary exits in one step: there, and back to the states that they read.

    Args:
        exits: that a step takes some of.
        calls: their blocks in this step.
        keep_graph: whether there is to be a gradient.

    Attributes:
        read: what the head has read, [batch, ..., C], by the number of the block behind which it lies; leaves.
    """

    def __init__(self, exits: AuxiliaryExits, calls: Calls, keep_graph: bool):
        self.exits, self.calls, self.keep_graph = exits, calls, keep_graph
        self.read: dict[int, Tensor] = {}
        self._walks: dict[int, Solution] = {}

    def score(self, model: DepthHierarchy, states: Mapping[int, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of the exits at some states.

        Args:
            model: whose head reads the states.
            states: [batch, ..., C] by the number of the block behind which they lie; no graph leads to them.
            targets: of every exit.

        Returns:
            The sum of the losses by weight, a scalar, attached to :attr:`read`, the adapters and the head, and the nats of
            each exit, [exits], detached. What no exit of the step uses is attached with a gradient of zero.
        """
        for n, state in states.items():
            if numbers := self.exits.numbers(n):
                begun = state.clone().requires_grad_(self.keep_graph)
                chain = CallChain(self.calls, list(numbers), self.keep_graph)
                self._walks[n] = solve(chain, begun, one_walk(len(numbers)))
                state = self._walks[n].states[-1]
            self.read[n] = state.clone().requires_grad_(self.keep_graph)  # a view would keep all alive
        others = (i for n in self.exits.ends if n not in states for i in self.exits.numbers(n))
        unused = [p for i in others for p in self.calls.parameters(i)]
        if not states:
            unused += self.exits.down, self.exits.up
        zero = sum(0.0 * p.sum() for p in unused)
        if not states:
            return zero, self.exits.down.new_zeros(0)
        read = [self.exits(state, n) for n, state in self.read.items()]
        loss, values = model.score_heads(read, targets, [self.exits.weight] * len(read))
        return loss + zero, values

    def back(self, n: int, gradient: Tensor) -> tuple[Tensor, Tensor | float]:
        """From the loss's gradient by what the head has read behind the block n to that by the state there, and a zero with
        the gradients of the exit's blocks."""
        if n not in self._walks:
            return gradient, 0.0
        walk, numbers = self._walks.pop(n), self.exits.numbers(n)
        upstream = torch.zeros_like(walk.states)
        upstream[-1] = gradient
        solve_adjoint(walk.linearized, upstream, one_walk(len(numbers)))
        made = walk.linearized.gradients
        return walk.linearized.input_gradient, sum(injected(self.calls.parameters(numbers[row]), made[row]) for row in made)


def segment_ends(path: Sequence[int], chunk_size: int) -> tuple[int, ...]:
    """The last block of every segment but the last, of a path cut into segments of ``chunk_size`` blocks."""
    return tuple(path[chunk_size - 1 : len(path) - 1 : chunk_size])


def auxiliary_exits(objective: Objective, sweeps: Sweeps) -> AuxiliaryExits:
    """Those of an objective over depth, with adapters of the rank of the model's exit adapters.

    Args:
        objective: whose model, path and depth mix they are made for.
        sweeps: resolved.

    Raises:
        ValueError: the width of the states is unknown, no step would take one, or it is to have more blocks than a segment.
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
    if sweeps.auxiliary_blocks > size:
        raise ValueError(
            f"auxiliary_blocks={sweeps.auxiliary_blocks} with chunk_size={size}: they begin as copies of a segment's last "
            f"blocks; give at most {size}, or a larger chunk_size"
        )
    drawn = [objective.sub_networks(step * objective.micro_batches)[0].exits for step in range(_MANY)]
    taken = [n for n in segment_ends(path, size) if any(n not in of_path for of_path in drawn)]
    if not taken:
        raise ValueError(
            f"{given} depths={text_of(objective.depths)}: at the end of each segment the mix has an exit in every step; "
            "leave auxiliary_exits out, or give another chunk_size"
        )
    rank = getattr(getattr(model, "config", None), "exit_rank", 0) or DEFAULT_RANK
    like = next(model.parameters(), torch.empty(0))
    last = {n: path[: path.index(n) + 1][-sweeps.auxiliary_blocks :] for n in taken if sweeps.auxiliary_blocks}
    blocks = {n: [model.blocks[m - 1] for m in numbers] for n, numbers in last.items()}
    return AuxiliaryExits(path, size, model.width, rank, sweeps.auxiliary_exits, blocks, like=like, seed=objective.seed)
