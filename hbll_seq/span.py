"""Measures the span of a training step: the longest chain of block evaluations that depend on each other.

The count follows the data, not the program: every tensor carries the number of block evaluations behind it, the largest
of those it was made from, and passing a block adds to it. What could run in parallel so counts once, however the
evaluations are queued on this machine. Unit (METHOD 2.5): one block forward or one input-only vector-Jacobian product is
1, a full backward (input and weights) is 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hbll_seq.depth import DepthHierarchy
from hbll_seq.objective import BackpropObjective, LocalObjective, Objective


class Span(NamedTuple):
    """``forward``: dependent evaluations until the loss is known; ``step``: until every gradient is; ``work``: of all."""

    forward: int
    step: int
    work: int


class _Ledger(TorchDispatchMode):
    """Stamps every storage with the number of dependent block evaluations behind it."""

    def __init__(self):
        super().__init__()
        self.stamps: dict[int, int] = {}
        self.alive: list[Tensor] = []  # a freed storage's address may come back, and would bring its old stamp
        self.backward_cost = 1  # inner gradients are input-only products; the final backward is a full one
        self.work = 0

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


class _Gate(torch.autograd.Function):
    """The identity at a block's output: adds the block's cost to what passes, forwards and backwards."""

    @staticmethod
    def forward(ctx, x, ledger):
        ctx.ledger = ledger
        y = x.clone()
        ledger.set_stamp(y, ledger.stamp(x) + 1)
        ledger.work += 1
        return y

    @staticmethod
    def backward(ctx, gradient):
        ledger = ctx.ledger
        passed = gradient.clone()
        ledger.set_stamp(passed, ledger.stamp(gradient) + ledger.backward_cost)
        ledger.work += ledger.backward_cost
        return passed, None


class _Counted(nn.Module):
    def __init__(self, module: nn.Module, ledger: _Ledger):
        super().__init__()
        self.module, self.ledger = module, ledger

    def forward(self, x):
        y = self.module(x)
        return _Gate.apply(y[0] if isinstance(y, tuple) else y, self.ledger)


def measure_span(objective: Objective, inputs: Tensor, labels: Tensor | None = None) -> Span:
    """Runs one training step (forward and backward) of ``objective`` and counts; the head counts as one block.

    The model's blocks are wrapped while this runs and restored afterwards; gradients are left as they were.
    """
    model, ledger = objective.model, _Ledger()
    blocks, head = list(model.blocks), model.head
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        for n, block in enumerate(blocks):
            model.blocks[n] = _Counted(block, ledger)
        model.head = _Counted(head, ledger)
        with ledger:
            loss = objective(inputs, labels).loss
            forward = ledger.stamp(loss)
            ledger.backward_cost = 2
            gradients = torch.autograd.grad(loss, parameters)
            step = max(ledger.stamp(gradient) for gradient in gradients)
    finally:
        for n, block in enumerate(blocks):
            model.blocks[n] = block
        model.head = head
    return Span(forward, step, ledger.work)


def small_hierarchy(n_level: int, width: int = 4, n_classes: int = 3) -> DepthHierarchy:
    """A hierarchy of tiny residual blocks, to count on."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, x):
            return x + self.linear(x).tanh()

    return DepthHierarchy((Residual() for _ in range(2**n_level - 1)), nn.Linear(width, n_classes), nn.Linear(2, width))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the span and work of one training step by the number of transitions N.

    "tree" counts what depends on what: blocks read clean forward messages, so all of them could run before the first
    correction. "tree, level by level" is the order that the code queues them in, and that the data force where blocks
    read corrected states: messages, discrepancies and corrections of a level before the next level begins.
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
            ("tree, level by level", LocalObjective(model, clean_inputs=False)),
            ("backprop", BackpropObjective(model)),
        ):
            span = measure_span(objective, x, y)
            print(f"{2**n_level:>5} {n_level:>3} {name:>20} {span.forward:>14} {span.step:>11} {span.work:>6}")


if __name__ == "__main__":
    main()
