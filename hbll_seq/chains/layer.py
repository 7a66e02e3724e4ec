"""A recurrent block trained over time by messages: the time x depth grid (method.md 2.2).

The chain over depth asks a block for its output and, as often as it likes, for products with its Jacobian. Here both are
made of messages along time (``time_sweeps.py``), so that the engine over depth stays as it is: a block's output is that of
a few sweeps and one differentiated call of the cell over all positions, and its vector-Jacobian product is a backward
message along time. No autograd graph reaches from one transition in time, or from one block in depth, into another.

The two numbers of sweeps do not multiply: what a block's recurrence was estimated to be is remembered through a training
step, and every evaluation without gradient improves on it by ONE sweep.

Shapes: N transitions in time (tokens), B batch, C width of the stream and of the cell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hbll_seq.chains.depth import DepthChain, Prefix
from hbll_seq.chains.time import backward_time_sweeps, forward_time_sweeps
from hbll_seq.layers.recurrent import Jacobian, RecurrentCell
from hbll_seq.layers.recurrent_block import RecurrentBlock
from hbll_seq.utils.modules import plain_module


class TimeOptions(NamedTuple):
    """How a recurrence is evaluated inside a block.

    The defaults are the least that lost nothing in one trial (7 GRU blocks, width 128, 64 tokens, mix of all depths, K = 2
    and M = 3 over depth): cosine of the cells' gradient to that of backprop through depth and time 0.995; 0.974 without the
    sweep, 0.979 without the diagonal, 0.996 with one correction more.

    sweeps: before the differentiated one, from the block's last estimate; evaluations without gradient do one.
    corrections: of every backward message.
    linearization, chunk: see :func:`forward_time_sweeps`; of all of these.
    """

    sweeps: int = 1
    corrections: int = 1
    linearization: str = "diagonal"
    chunk: int = 8


class _Linearized(NamedTuple):
    """What a backward message needs of a :class:`TimeSwept`."""

    jacobian: Jacobian
    factors: Tensor | None


class _Composed(torch.autograd.Function):
    """States of single transitions as the forward message composes them; backwards, e_n -> lambda_n.

    ``outputs`` [N, B, C] is one call of the cell on detached states, attached to its parameters and to what it reads of the
    input. What autograd makes of lambda_n there is the local product lambda_n^T d a_n / d theta of every transition.
    """

    @staticmethod
    def forward(ctx, outputs, states, options, factors, *jacobian):
        ctx.options = options
        ctx.save_for_backward(factors, *jacobian)  # rather than as attributes, so that a checkpoint can drop them
        return states.view_as(states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, errors):
        factors, *jacobian = ctx.saved_tensors
        messages = backward_time_sweeps(
            _Linearized(Jacobian(*jacobian), factors), errors.contiguous(), corrections=ctx.options.corrections,
            chunk=ctx.options.chunk,
        )  # fmt: skip
        return messages, None, None, None, None, None, None


def time_messages(
    cell: RecurrentCell, projected: Tensor, s0: Tensor, options: TimeOptions, start: Tensor | None = None
) -> Tensor:
    """s_1 .. s_N [N, B, C] of a recurrence, differentiable by messages, any number of times.

    With (``sweeps`` + 1) ``chunk`` at least N and ``corrections`` times ``chunk`` at least N - 1, states and gradients are
    those of the plain recurrence.

    Args:
        cell: f.
        projected: [N, B, G * C], ``cell.project`` of the inputs; gets a gradient, as do the cell's parameters and ``s0``.
        s0: [B, C].
        options: see :class:`TimeOptions`.
        start: [N - 1, B, C], estimate of s_1 .. s_{N-1}; None is s_0 everywhere.
    """
    swept = forward_time_sweeps(
        cell, projected, s0, sweeps=options.sweeps, linearization=options.linearization, start=start, chunk=options.chunk
    )
    return _Composed.apply(swept.outputs, swept.states, options, swept.factors, *swept.jacobian)


class TimeSweptChain(DepthChain):
    """The blocks in one training step, recurrent ones by messages along time. Made anew for every step.

    Args:
        options: of every recurrence.
        of: the blocks, their dropout and the states that they start from.
    """

    def __init__(self, options: TimeOptions, of: DepthChain):
        super().__init__(of.blocks, of.dropout_seed, of.carried)
        self.options = options
        #: s_1 .. s_{N-1} of the last evaluation without gradient: on this path, or else of the block on any other.
        self._estimates: dict[Prefix | int, Tensor] = {}

    def remembers(self, index: Prefix | int) -> bool:
        """See :meth:`Chain.remembers`: recurrent blocks go on from their last estimate."""
        return isinstance(plain_module(self.blocks[self.number(index) - 1]), RecurrentBlock)

    def bind(self, index: Prefix | int) -> Callable[[Tensor], Tensor]:
        """See :meth:`DepthChain.bind`: later evaluations change nothing for the one that is bound."""
        start = self._estimates.get(index, self._estimates.get(self.number(index)))
        return lambda state: self._run(index, state, start)

    def _recurrence(self, block: RecurrentBlock, index: Prefix | int, x: Tensor, start: Tensor | None = None) -> Tensor:
        projected, zero = block.enter(x)
        differentiated = torch.is_grad_enabled()
        options = self.options if differentiated else self.options._replace(sweeps=0)  # the call itself is one sweep
        states = time_messages(block.cell, projected, self.carried.get(index, zero), options, start)
        if not differentiated:
            self._estimates[index] = self._estimates[self.number(index)] = states[:-1]
        self._keep(index, states[-1])
        return block.leave(x, states)
