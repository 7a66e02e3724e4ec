"""The engine against its definition, written out in loops over segments; what its gradients are made of."""

import copy
import itertools

import pytest
import torch
from helpers.chains import ApartChain, CellCalls, solved, summed
from torch import nn

from hbll_seq.chains.time import TimeChain
from hbll_seq.engine.adjoint import solve_adjoint
from hbll_seq.engine.calls import Calls, Recomputed
from hbll_seq.engine.chain import CallChain
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization.base import Diagonal, Identity, Zero
from hbll_seq.engine.linearization.low_rank import LowRank, LowRankFit
from hbll_seq.engine.linearization.shared_matrix import SharedMatrix, SharedMatrixFit
from hbll_seq.engine.solve import solve
from hbll_seq.layers.cells import CELL_KINDS, make_cell

FIXED = {kind.name: kind for kind in (Zero(), Identity(), Diagonal())}
#: (K, M, damping)
COUNTS = [(0, 0, 1.0), (1, 1, 1.0), (2, 3, 1.0), (3, 2, 0.7), (40, 40, 1.0)]


# ----------------------------------------------------------------------------- the definition, one segment after the other


def of(linearization, diagonal):
    """A of a transition, as a factor."""
    return {"zero": torch.zeros_like, "identity": torch.ones_like, "diagonal": lambda d: d}[linearization.name](diagonal)


def forward_by_definition(calls, n_steps, s0, iterations, start):
    """What the differentiated calls read and make, the states, and the residual."""
    f, A = lambda n, s: calls.apply([n], [s])[0], lambda n, s: of(iterations.linearization, calls.diagonal([n], [s], [None])[0])
    segments = [range(n, min(n + iterations.chunk_size, n_steps)) for n in range(0, n_steps, iterations.chunk_size)]
    begins, residual = [s0, *(start[segment[0] - 1] for segment in segments[1:])], s0.new_zeros(())
    is_plain = iterations.damping == 1.0  # then an iteration makes one more segment begin exactly
    for number in range(min(iterations.forward, len(segments) - 1) if is_plain or len(segments) == 1 else iterations.forward):
        new = [s0]
        for segment, begin in zip(segments[:-1], begins):
            state, factor = begin, torch.ones_like(begin)
            for n in segment:
                state, factor = f(n, state), factor * A(n, state)
            new.append(state + factor * (new[-1] - begin))
        new, old, rows = torch.stack(new), torch.stack(begins), slice(1 + number * is_plain, None)
        residual, begins = (new[rows] - old[rows]).norm() / new[rows].norm(), list(old.lerp(new, iterations.damping))
    if is_plain and iterations.forward >= len(segments) - 1:
        residual = torch.zeros_like(residual)
    reads, outputs, states, begin = [], [], [], s0
    for segment, begun in zip(segments, begins):
        state, factor, off = begun, torch.ones_like(begun), begin - begun
        for n in segment:
            reads.append(state)
            state, factor = f(n, state), factor * A(n, state)
            outputs.append(state)
            states.append(state + factor * off)
        begin = states[-1]
    return reads, outputs, states, residual


def adjoint_by_definition(vjp, A, upstream, iterations, fused):
    """lambda_1 .. lambda_N; ``vjp(n, v)`` and ``A(n)`` of transition n, from 0."""
    n_steps, size = len(upstream), min(iterations.chunk_size, len(upstream))
    segments = [range(n, min(n + size, n_steps)) for n in range(0, n_steps, size)]
    guess = list(upstream)
    for n in reversed(range(n_steps - 1)):
        guess[n] = upstream[n] + A(n + 1) * guess[n + 1]
    if iterations.backward == 0 and not fused:
        return guess
    ends, adjoints = [guess[segment[-1]] for segment in segments], list(upstream)
    # gradients are made in a walk of their own where a segment is one transition; else in the last of the M
    n_walks = max(1, iterations.backward + (fused and size == 1))
    for number in range(n_walks):
        is_last, new, off, new_ends = number == n_walks - 1, list(upstream), torch.zeros_like(upstream[0]), list(ends)
        for r in reversed(range(len(segments))):
            segment, state, factor = segments[r], ends[r], torch.ones_like(upstream[0])
            new[segment[-1]] = ends[r] + off  # what the composition has found the end to be off by
            for n in reversed(segment):
                state, factor = vjp(n, state), factor * A(n)
                if n > segment[0]:
                    state = state + upstream[n - 1]
                    new[n - 1] = state if fused else state + factor * off
            if r > 0:
                new_ends[r - 1] = state + upstream[segment[0] - 1] + factor * off
                off = new_ends[r - 1] - ends[r - 1]
        adjoints = new
        if is_last and fused:
            for r, segment in enumerate(segments):
                adjoints[segment[-1]] = ends[r]
        ends = new_ends
    return adjoints


def recurrence(kind="gru", n_steps=9, hidden=4, gain=1.5):
    """A cell with weights that leave nothing exact by chance, what it reads, s_0, a first estimate and upstream gradients."""
    torch.manual_seed(0)
    cell = make_cell(kind, 3, hidden).double()
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(gain)
    projected = cell.project(torch.randn(n_steps, 2, 3, dtype=torch.float64)).detach().requires_grad_(True)
    s0, *start = 0.5 * torch.randn(n_steps, 2, hidden, dtype=torch.float64)
    return cell, projected, s0.requires_grad_(True), start, torch.randn(n_steps, 2, hidden, dtype=torch.float64)


@pytest.mark.parametrize("linearization", FIXED)
@pytest.mark.parametrize("n_steps", [1, 2, 9, 16, 23])
@pytest.mark.parametrize("chunk", [1, 3, 4, 40])
def test_it_is_its_definition(linearization, n_steps, chunk):
    cell, projected, s0, start, upstream = recurrence("gru", n_steps)
    calls = CellCalls(cell, projected)
    for forward, backward, damping in COUNTS:
        iterations = Iterations(forward, backward, chunk, FIXED[linearization], damping)
        with torch.no_grad():
            reads, outputs, states, residual = forward_by_definition(calls, n_steps, s0, iterations, start)
        A = [of(FIXED[linearization], calls.diagonal([n], [reads[n]], [None])[0]).detach() for n in range(n_steps)]

        def vjp(n, cotangent):
            state = reads[n].detach().requires_grad_(True)
            return torch.autograd.grad(calls.apply([n], [state])[0], state, cotangent)[0]

        for kind_of_chain in (TimeChain, ApartChain, CallChain):
            is_time, fused = kind_of_chain is TimeChain, kind_of_chain is CallChain
            chain = TimeChain(cell, projected) if is_time else kind_of_chain(calls, range(n_steps))
            given = torch.stack(start) if start else None
            solution, ours = solved(chain, s0, iterations, start=given)
            close(ours, reads), close(solution.linearized.outputs, outputs), close(solution.states, states)
            torch.testing.assert_close(solution.residual, residual, rtol=1e-12, atol=1e-12)
            adjoints = solve_adjoint(solution.linearized, upstream.clone(), iterations)
            close(adjoints, adjoint_by_definition(vjp, A.__getitem__, list(upstream), iterations, fused))


def close(ours, expected):
    torch.testing.assert_close(ours, torch.stack(list(expected)), rtol=1e-12, atol=1e-12)
