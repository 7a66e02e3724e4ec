"""Short sub-networks that share their beginning with the main path: each is a branch off it.

A branch is at most log2 N blocks long, so it is walked block by block, exactly; that adds at most log2 N to the span each
way. All branches advance together: their j-th blocks are one call. No graph reaches from one block into another here either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hbll_seq.chains.depth import Prefix
from hbll_seq.engine.calls import Calls
from hbll_seq.objectives.depth_mix import SubNetwork


class Branch(NamedTuple):
    """``before``: the blocks shared with the main path; ``path``: the further ones; ``exits``: see :class:`SubNetwork`."""

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

    def prefix(self, j: int) -> Prefix:
        """The blocks walked up to and with its own j-th one, from 0."""
        return self.before + self.path[: j + 1]


def split_off(main: tuple[int, ...], networks: Sequence[SubNetwork], longest: int) -> tuple[list[Branch], list[SubNetwork]]:
    """Those that leave the main path for at most ``longest`` blocks as branches, and all others as they are."""
    branches, others = [], []
    for network in networks:
        start = 0
        while start < min(len(main), len(network.path)) and main[start] == network.path[start]:
            start += 1
        rest = network.path[start:]
        if len(rest) <= longest and set(network.exits) <= set(rest):
            branches.append(Branch(main[:start], rest, network.exits))
        else:
            others.append(network)
    return branches, others


@dataclass(eq=False)
class WalkedBranch:
    """A branch after its walk, and then after :func:`find_adjoints`. Lists are over its own blocks.

    Attributes:
        branch: which.
        inputs: what each block read; the first as attached as it was given, the others leaves.
        outputs: what each block made, attached to that block alone.
        upstream: block number -> d loss / d state at the branch's exits; one is at its end.
        adjoints: of the outputs.
        sent: adjoint of the state that the branch starts from; None where that is the chain's input.
    """

    branch: Branch
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    upstream: dict[int, Tensor] = field(default_factory=dict)
    adjoints: list[Tensor] = field(default_factory=list)
    sent: Tensor | None = None


def walk(calls: Calls, branches: Sequence[Branch], starts: Sequence[Tensor]) -> list[WalkedBranch]:
    """Every branch from its start, [...], which stays as attached as it is given.

    The chain is asked for transitions by the blocks walked up to them (:class:`hbll_seq.chains.depth.BlockCalls`).
    """
    walked = [WalkedBranch(branch, [start]) for branch, start in zip(branches, starts)]
    for j, alive in enumerate(_by_step(walked)):
        calls = calls.apply([each.branch.prefix(j) for each in alive], [each.inputs[j] for each in alive])
        for each, output in zip(alive, calls):
            each.outputs.append(output)
            if j + 1 < len(each.branch.path):
                each.inputs.append(output.detach().requires_grad_(True))
    return walked


def find_adjoints(walked: Sequence[WalkedBranch]) -> None:
    """Fills in every branch's adjoints from its ``upstream``, and what it ``sent``: exact products, block by block."""
    for each in walked:
        each.adjoints, each.sent = [each.outputs[0]] * len(each.outputs), None
    for j, alive in reversed(list(enumerate(_by_step(walked)))):
        for each in alive:
            own = each.upstream.get(each.branch.path[j])
            each.adjoints[j] = each.sent if own is None else own if each.sent is None else own + each.sent
            each.sent = None
        through = [each for each in alive if j > 0 or each.branch.start > 0]
        if through:
            outputs, inputs, adjoints = zip(*((each.outputs[j], each.inputs[j], each.adjoints[j]) for each in through))
            for each, product in zip(through, torch.autograd.grad(outputs, inputs, adjoints, retain_graph=True)):
                each.sent = product


def _by_step(walked: Sequence[WalkedBranch]) -> list[list[WalkedBranch]]:
    """For every j the branches that have a j-th block."""
    longest = max((len(each.branch.path) for each in walked), default=0)
    return [[each for each in walked if j < len(each.branch.path)] for j in range(longest)]
