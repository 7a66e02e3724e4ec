"""Chains of the engine for tests: what differentiated calls read, and a recurrence as calls of its own."""

import torch

from hbll_seq.engine.calls import Calls
from hbll_seq.engine.chain import CallChain, CalledRows
from hbll_seq.engine.solve import solve


def solved(chain, s0, iterations, **options):
    """The solution, and s_0 .. s_{N-1} that the differentiated calls read."""
    reads, linearize = {}, chain.linearize

    def watched(s0, chunk_size):
        linearized = linearize(s0, chunk_size)
        call = linearized.call

        def noted(rows, states):
            numbers = range(rows.start, rows.stop, rows.step or 1)
            assert len(numbers) == len(states) and not reads.keys() & set(numbers)  # each is called once
            reads.update(zip(numbers, states.clone()))
            return call(rows, states)

        linearized.call = noted
        return linearized

    chain.linearize = watched
    try:
        solution = solve(chain, s0, iterations, **options)
    finally:
        del chain.linearize
    return solution, torch.stack([reads[n] for n in range(chain.n_steps)])


class CellCalls(Calls):
    """A cell's transitions as calls of their own: a loop, differentiated by autograd."""

    has_diagonal = True

    def __init__(self, cell, projected, clip=1.0):
        self.cell, self.projected, self.clip = cell, projected, clip

    def apply(self, indices, states):
        return [self.cell.transition(s, self.projected[n]) for n, s in zip(indices, states)]

    def parameters(self, index):
        return [*self.cell.parameters(), self.projected]

    def diagonal(self, indices, states, outputs):
        found = [self.cell.diagonal(s, self.projected[n]) for n, s in zip(indices, states)]
        return found if not self.cell.has_recurrent_weight else [d.clamp(-self.clip, self.clip) for d in found]


class ApartRows(CalledRows):
    """Differentiated calls whose parameters' gradients are left to a backward pass of its own, as those of a sequence are."""

    makes_gradients = False

    def vjp(self, rows, cotangents, n_final=0, wanted=True, later=False):
        return super().vjp(rows, cotangents).clone()  # what autograd returns may be what it was given

    def backward(self, adjoints, tensors):
        """``sum_n lambda_n^T d a_n / d theta`` by every tensor theta."""
        outputs = [self.attached[n] for n in range(len(adjoints))]
        return torch.autograd.grad(outputs, tensors, list(adjoints), allow_unused=True, retain_graph=True)


class ApartChain(CallChain):
    """See :class:`ApartRows`."""

    def linearize(self, s0, chunk_size):
        return ApartRows(self, s0, chunk_size)


def gradients_of(rows, adjoints, tensors):
    """Of a solved adjoint of :class:`CalledRows`, whose transitions all have the same parameters ``tensors``: the gradients
    by them, None where there are none, and by s_0; from its walks, or at what is left to a backward call."""
    if not rows.attached:
        return [None if found[0] is None else sum(found) for found in zip(*rows.gradients.values())], rows.input_gradient
    assert not rows.gradients and rows.input_gradient is None
    outputs, upstream = zip(*((output, adjoints[n]) for n, output in rows.attached.items()))
    *found, by_s0 = torch.autograd.grad(outputs, [*tensors, rows.s0], upstream, allow_unused=True, retain_graph=True)
    return found, by_s0
