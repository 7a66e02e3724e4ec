"""A recurrent block solved along time inside a chain over depth: the time x depth grid (docs/method.md 2.7).

The chain over depth asks a block for its output and, as often as it likes, for products with its Jacobian. Here both are
solved along time (``time.py``), so that the engine over depth stays as it is: a block's output is that of a few iterations
and one differentiated call of the cell over all positions, and its vector-Jacobian product is an adjoint back in time. No
autograd graph reaches from one transition in time, or from one block in depth, into another.

The iterations of the two axes do not multiply: a block's last states are remembered through a training step, and every
evaluation without gradient improves on them by ONE iteration over time.

Shapes: N transitions in time (tokens), B batch, C width of the stream and of the cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hbll_seq.chains.depth import BlockCalls, Prefix, number_of
from hbll_seq.chains.time import KnownJacobians, TimeChain
from hbll_seq.distributed.blocks import kind_of
from hbll_seq.engine.adjoint import solve_adjoint
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization.base import Diagonal
from hbll_seq.engine.solve import solve
from hbll_seq.layers.recurrent import Jacobian, RecurrentCell
from hbll_seq.layers.recurrent_block import RecurrentBlock


class _Composed(torch.autograd.Function):
    """States of single transitions as they are composed forwards; backwards, e_n -> lambda_n.

    ``attached`` [N, B, C] is one call of the cell on detached states, attached to its parameters and to what it reads of the
    input. What autograd makes of lambda_n there is the local product lambda_n^T d a_n / d theta of every transition.
    """

    @staticmethod
    def forward(ctx, attached, s0, states, iterations, diagonal, *jacobian):
        ctx.iterations = iterations
        ctx.save_for_backward(diagonal, *jacobian)  # rather than as attributes, so that a checkpoint can drop them
        return states.view_as(states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        diagonal, *jacobian = ctx.saved_tensors
        jacobians = KnownJacobians(Jacobian(*jacobian), ctx.iterations.clip, diagonal)
        adjoints = solve_adjoint(jacobians, upstream.clone(), ctx.iterations)
        by_s0 = jacobians.vjp(slice(0, 1, 1), adjoints[:1])[0] if ctx.needs_input_grad[1] else None
        return adjoints, by_s0, None, None, None, None, None, None


def recurrent_states(
    cell: RecurrentCell, projected: Tensor, s0: Tensor, iterations: Iterations, start: Tensor | None = None
) -> Tensor:
    """s_1 .. s_N [N, B, C] of a recurrence, solved and differentiated along time; any number of times.

    With (K + 1) c and M c at least N, states and gradients are those of the plain recurrence.

    Args:
        cell: f.
        projected: [N, B, G * C], ``cell.project`` of the inputs; gets a gradient, as do the cell's parameters and ``s0``.
        s0: [B, C].
        iterations: K, M, c and how it is iterated.
        start: [N - 1, B, C], estimate of s_1 .. s_{N-1}; None is s_0 everywhere.
    """
    solution = solve(TimeChain(cell, projected, iterations.clip), s0, iterations, start=start)
    rows = solution.linearized
    diagonal = rows.diagonal() if isinstance(iterations.linearization, Diagonal) else None
    return _Composed.apply(rows.attached, s0, solution.states, iterations, diagonal, *rows.jacobian)


class GridCalls(BlockCalls):
    """The blocks in one training step, recurrent ones solved along time. Made anew for every step.

    Args:
        iterations: over time, of every recurrence before its differentiated call; evaluations without gradient do one.
        of: the blocks, their dropout and the states that they start from.
    """

    def __init__(self, iterations: Iterations, of: BlockCalls):
        super().__init__(of.blocks, of.dropout_seed, of.carried)
        self.iterations = iterations
        #: s_1 .. s_{N-1} of the last evaluation without gradient: on this path, or else of the block on any other.
        self._estimates: dict[Prefix | int, Tensor] = {}

    def remembers(self, index: Prefix | int) -> bool:
        """See :meth:`Calls.remembers`: recurrent blocks go on from their last estimate."""
        return issubclass(kind_of(self.blocks[number_of(index) - 1]), RecurrentBlock)

    def bind(self, index: Prefix | int) -> Callable[[Tensor], Tensor]:
        """See :meth:`BlockCalls.bind`: later evaluations change nothing for the one that is bound."""
        start = self._estimates.get(index, self._estimates.get(number_of(index)))
        return lambda state: self._run(index, state, start)

    def _recurrence(self, block: RecurrentBlock, index: Prefix | int, x: Tensor, start: Tensor | None = None) -> Tensor:
        projected, zero = block.enter(x)
        differentiated = torch.is_grad_enabled()
        # the differentiated call is an iteration of its own
        iterations = self.iterations if differentiated else replace(self.iterations, forward=0)
        states = recurrent_states(block.cell, projected, self.carried.get(index, zero), iterations, start)
        if not differentiated:
            self._estimates[index] = self._estimates[number_of(index)] = states[:-1]
        self._keep(index, states[-1])
        return block.leave(x, states)
