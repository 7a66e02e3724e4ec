"""Measures the span of a training step: the longest chain of block evaluations that depend on each other.

The count follows the data and not the program. Every tensor carries the number of block evaluations behind it: the largest
number among the tensors that it was made from, plus one for each block that it passes. So evaluations that could run in
parallel count once, in whatever order this machine runs them. Unit (docs/method.md 2.5): one block forward or one input-only
vector-Jacobian product is 1, a full backward (input and weights) is 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hbll_seq.layers.recurrent_block import RecurrentBlock
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.base import Objective
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import Sweeps, Tree
from hbll_seq.utils.modules import plain_module


class Span(NamedTuple):
    """``forward``: dependent evaluations until the loss is known; ``step``: until every gradient is; ``work``: all of them,
    ``block_work``: those of blocks, without the head's."""

    forward: int
    step: int
    work: int
    block_work: int


class _Ledger(TorchDispatchMode):
    """Stamps every storage with the number of dependent block evaluations behind it."""

    def __init__(self):
        super().__init__()
        self.stamps: dict[int, int] = {}
        self.alive: list[Tensor] = []  # a freed storage's address may come back, and would bring its old stamp
        self.work = self.head_work = 0

    @property
    def recomputing(self) -> bool:
        """Whether a block is being evaluated inside a backward pass."""
        return torch._C._current_graph_task_id() != -1

    def count(self, evaluations: int, is_head: bool) -> None:
        self.work += evaluations
        self.head_work += evaluations * is_head

    def stamp(self, tensor: Tensor) -> int:
        return self.stamps.get(tensor.untyped_storage()._cdata, 0)

    def set_stamp(self, tensor: Tensor, stamp: int) -> None:
        self.alive.append(tensor)
        self.stamps[tensor.untyped_storage()._cdata] = max(stamp, self.stamp(tensor))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        stamp = max((self.stamp(tensor) for tensor in inputs), default=0)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.set_stamp(leaf, stamp)
        return out


class _Weights(torch.autograd.Function):
    """Stands for a block's parameters: autograd comes here when their gradients are asked for."""

    @staticmethod
    def forward(ctx, parameter):
        return parameter.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _Gate(torch.autograd.Function):
    """The identity at a block's output: adds the block's cost to what passes, forwards and backwards."""

    @staticmethod
    def forward(ctx, x, weights, ledger, recomputes, is_head):
        ctx.ledger, ctx.recomputes, ctx.is_head = ledger, recomputes, is_head
        y = x.clone()
        ledger.set_stamp(y, ledger.stamp(x) + 1)
        ledger.count(not ledger.recomputing, ctx.is_head)  # a recomputation is counted with the product that asks for it
        return y

    @staticmethod
    def backward(ctx, gradient):
        ledger = ctx.ledger
        passed = gradient.clone()
        # A block that was not kept is computed again when the gradient arrives, since computed earlier the insides of all
        # blocks would be alive at once. (The recomputation stops at the last saved tensor, often before this gate.)
        of_weights = ctx.next_functions[1][0]
        cost = 1 + (of_weights is not None and torch._C._will_engine_execute_node(of_weights)) + ctx.recomputes
        ledger.set_stamp(passed, ledger.stamp(gradient) + cost)
        ledger.count(cost, ctx.is_head)
        return passed, gradient.new_zeros(()), None, None, None


def _stand_in(module: nn.Module) -> nn.Parameter:
    """A parameter that is trained where the module has one that is."""
    return nn.Parameter(torch.zeros(()), requires_grad=any(p.requires_grad for p in module.parameters()))


class _Counted(nn.Module):
    def __init__(self, module: nn.Module, ledger: _Ledger, *, recomputes: bool = False, is_head: bool = False):
        super().__init__()
        self.module, self.stand_in, self.gate = module, _stand_in(module), (ledger, recomputes, is_head)

    def forward(self, x):
        y = self.module(x)
        return _Gate.apply(y[0] if isinstance(y, tuple) else y, _Weights.apply(self.stand_in), *self.gate)


class _CountedRecurrent(RecurrentBlock):
    """A recurrent block, which a chain may ask for its cell and walk by itself between :meth:`enter` and :meth:`leave`."""

    def __init__(self, block: RecurrentBlock, ledger: _Ledger, *, recomputes: bool = False):
        nn.Module.__init__(self)  # none of a block's own parameters: it has those of the one inside
        self.module, self.stand_in, self.gate = block, _stand_in(block), (ledger, recomputes, False)

    @property
    def cell(self):
        return self.module.cell

    def forward(self, x, state=None):
        y, state = self.module(x, state)
        return _Gate.apply(y, _Weights.apply(self.stand_in), *self.gate), state

    def enter(self, x):
        return self.module.enter(x)

    def leave(self, x, states):
        return _Gate.apply(self.module.leave(x, states), _Weights.apply(self.stand_in), *self.gate)


def measure_span(objective: Objective, inputs: Tensor, labels: Tensor | None = None, step: int = 0) -> Span:
    """Runs one training step (forward and backward) of ``objective`` and counts; the head counts as one block. How many
    iterations over time a recurrent block makes of one evaluation is not counted.

    The model's blocks, and those of auxiliary exits, are wrapped while this runs and restored afterwards; gradients are left
    as they were.
    """
    model, ledger, auxiliary = objective.model, _Ledger(), getattr(objective, "auxiliary", None)
    lists = [model.blocks, *([] if auxiliary is None else [auxiliary.blocks])]
    places = [(blocks, n, block) for blocks in lists for n, block in enumerate(blocks)]
    head = model.head
    try:
        for blocks, n, block in places:
            counted = _CountedRecurrent if isinstance(plain_module(block), RecurrentBlock) else _Counted
            blocks[n] = counted(block, ledger, recomputes=objective.recompute)
        model.head = _Counted(head, ledger, is_head=True)
        with ledger:
            loss = objective(inputs, labels, step=step).loss
            forward = ledger.stamp(loss)
            start = torch.ones((), dtype=loss.dtype, device=loss.device)  # made of nothing that was evaluated
            gradients = torch.autograd.grad(loss, objective.trained_parameters(), start)
            until = max(ledger.stamp(gradient) for gradient in gradients)
    finally:
        for blocks, n, block in places:
            blocks[n] = block
        model.head = head
    return Span(forward, until, ledger.work, ledger.work - ledger.head_work)


def small_hierarchy(n_level: int, width: int = 4, n_classes: int = 3, default_paths: str = "spine") -> DepthHierarchy:
    """A hierarchy of tiny residual blocks, to count on."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, x):
            return x + self.linear(x).tanh()

    blocks = (Residual() for _ in range(2**n_level - 1))
    return DepthHierarchy(blocks, nn.Linear(width, n_classes), nn.Linear(2, width), default_paths=default_paths, width=width)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the span and work of one training step by the number of transitions N, the head counted as one of them.

    "sweeps" has the default segments, and "of single blocks" K = 3 and M = 4: (K + 1) + M + 2, the first block's call being
    an iteration, and 2 for the head.

    "tree" counts what depends on what: blocks read clean forward messages, so all of them could run before the first
    correction. "tree, level by level" is the order that the code queues them in, and that the data force where blocks
    read corrected states: messages, energies and corrections of a level before the next level begins.
    """
    parser = argparse.ArgumentParser(description=main.__doc__.splitlines()[0])
    parser.add_argument("--levels", type=int, nargs="+", default=[3, 4, 6, 8], help="tree levels D; N = 2**D")
    args = parser.parse_args(argv)
    print(f"{'N':>5} {'D':>3} {'objective':>20} {'span: forward':>14} {'span: step':>11} {'work':>6}")
    for n_level in args.levels:
        model = small_hierarchy(n_level)
        x, y = torch.randn(2, 2), torch.tensor([0, 1])
        for name, objective in (
            ("tree", LocalObjective(model)),
            ("tree, level by level", LocalObjective(model, Tree(clean_inputs=False))),
            ("sweeps", LocalObjective(model, "sweeps")),
            ("of single blocks", LocalObjective(model, Sweeps(3, 4, 1))),
            ("the same, recomputed", LocalObjective(model, Sweeps(3, 4, 1), recompute=True)),
            ("backprop", BackpropObjective(model)),
        ):
            span = measure_span(objective, x, y)
            print(f"{2**n_level:>5} {n_level:>3} {name:>20} {span.forward:>14} {span.step:>11} {span.work:>6}")


if __name__ == "__main__":
    main()
