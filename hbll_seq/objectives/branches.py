"""Short ways from a chain's state to a readout: a path that shares its beginning with the main one is a branch off it.

A branch is at most log2 N blocks long, so it is walked block by block, exactly; that adds at most log2 N to the span each
way. All branches advance together: their j-th blocks are one call. No graph reaches from one block into another here either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hbll_seq.engine.chain import Chain
from hbll_seq.objectives.depth_mix import Route


class Branch(NamedTuple):
    """``before``: the blocks shared with the main path; ``path``: the further ones; ``exits``: see :class:`Route`."""

    before: tuple[int, ...]
    path: tuple[int, ...]
    exits: dict[int, float]

    @property
    def start(self) -> int:
        """Number of blocks shared with the main path."""
        return len(self.before)

    @property
    def whole(self) -> tuple[int, ...]:
        """All blocks from the chain's input on."""
        return self.before + self.path


def split_off(main: tuple[int, ...], routes: Sequence[Route], longest: int) -> tuple[list[Branch], list[Route]]:
    """The routes that leave the main path for at most ``longest`` blocks as branches, and all others as they are."""
    branches, others = [], []
    for route in routes:
        start = 0
        while start < min(len(main), len(route.path)) and main[start] == route.path[start]:
            start += 1
        rest = route.path[start:]
        if len(rest) <= longest and set(route.exits) <= set(rest):
            branches.append(Branch(main[:start], rest, route.exits))
        else:
            others.append(route)
    return branches, others


@dataclass
class Walked:
    """``inputs[j][i]`` and ``outputs[j][i]``: what the j-th block of the i-th branch reads and makes; None past its end."""

    branches: list[Branch]
    inputs: list[list[Tensor | None]]
    outputs: list[list[Tensor | None]]

    def steps(self, j: int) -> list[int]:
        """The branches that have a j-th block."""
        return [i for i, branch in enumerate(self.branches) if j < len(branch.path)]


def walk(chain: Chain, branches: list[Branch], starts: Sequence[Tensor]) -> Walked:
    """Every branch from its start, [...], which stays as attached as it is given; inner states are leaves.

    The chain is asked for transitions by the blocks walked up to them (:class:`hbll_seq.chains.depth.DepthChain`).
    """
    walked = Walked(branches, [], [])
    states: list[Tensor | None] = list(starts)
    for j in range(max((len(branch.path) for branch in branches), default=0)):
        alive = walked.steps(j)
        outputs: list[Tensor | None] = [None] * len(branches)
        ends = [branches[i].whole[: branches[i].start + j + 1] for i in alive]
        for i, a in zip(alive, chain.apply(ends, [states[i] for i in alive])):
            outputs[i] = a
        walked.inputs.append(states)
        walked.outputs.append(outputs)
        states = [None if a is None else a.detach().requires_grad_(True) for a in outputs]
    return walked


def messages_of(walked: Walked, errors: Sequence[dict[int, Tensor]]) -> tuple[list[list[Tensor | None]], list[Tensor | None]]:
    """Backward messages of every output, and what each branch sends into the chain (None where it starts at its input).

    Args:
        walked: the branches.
        errors: by branch, block number -> d loss / d state where it is read out; each branch is read at its end.
    """
    messages: list[list[Tensor | None]] = [[None] * len(walked.branches) for _ in walked.outputs]
    sent: list[Tensor | None] = [None] * len(walked.branches)
    for j in reversed(range(len(walked.outputs))):
        alive = walked.steps(j)
        for i in alive:
            own = errors[i].get(walked.branches[i].path[j])
            later = sent[i]
            messages[j][i] = later if own is None else own if later is None else own + later
        through = [i for i in alive if j > 0 or walked.branches[i].start > 0]
        products = ()
        if through:
            products = torch.autograd.grad(
                [walked.outputs[j][i] for i in through],
                [walked.inputs[j][i] for i in through],
                [messages[j][i] for i in through],
                retain_graph=True,
            )
        for i in alive:
            sent[i] = None
        for i, product in zip(through, products):
            sent[i] = product
    return messages, sent
