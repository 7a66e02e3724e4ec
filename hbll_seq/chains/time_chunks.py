"""Backward iterations over chunks of time: which adjoints are walked from where (docs/method.md 2.2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization.shared_matrix import SharedMatrixFit
from hbll_seq.engine.scan import affine_scan
from hbll_seq.layers.recurrent import Jacobian


def iterate_chunks(
    jacobian: Jacobian,
    diagonals: Tensor | None,
    upstream: Tensor,
    adjoints: Tensor,
    iterations: Iterations,
    learned: SharedMatrixFit | None,
    learn: bool,
) -> Tensor:
    """Backward iterations by walking chunks, in place in ``adjoints``; see ``backward_time_sweeps``.

    All walks but the last iteration's only serve to find the adjoints that the chunks before them begin their next walk with.

    Row i is the transition whose product takes ``adjoints[i + 1]`` to ``adjoints[i]``; there are R = N - 1. Chunks of c rows
    are cut from the end, so that the first may be a short one. For R = 7 and c = 3, with n_chunks = 3::

        adjoints     0   1   2   3   4   5   6   7
        rows           0 | 1   2   3 | 4   5   6          walked from right to left, all chunks side by side
        ends[q]          [0]         [1]         [2]      the adjoint that chunk q's walk begins with

    Every iteration makes the last chunk's adjoints final (``ends[-1]`` is exact), and n_left chunks remain.
    """
    chunk, n_rows = iterations.chunk_size, len(upstream) - 1
    n_chunks = -(-n_rows // chunk)
    ends = adjoints[n_rows - chunk * (n_chunks - 1) :: chunk].clone() if n_chunks else adjoints[:0]
    before: tuple[Tensor, Tensor] | None = None  # what the last iteration's walks began with, and what they ended in
    for iteration in range(min(iterations.backward, n_chunks)):
        n_left = n_chunks - iteration
        n_next = n_left - 1  # chunks whose walk ends where another one's begins: all but the first
        is_last = iteration == iterations.backward - 1 or n_left == 1
        high = n_rows - chunk * iteration
        low = 0 if is_last else high - chunk * n_next  # only the last iteration needs to walk the first chunk
        begun, steps = ends[0 if is_last else 1 : n_left], []
        for at, adjoint, product in _walk_back(jacobian, diagonals, upstream, begun, range(low, high), chunk):
            if is_last:
                adjoints[at] = adjoint
                steps.append((at, product))
            else:  # the last chunk began with a final adjoint, so its own are final too
                adjoints[at.stop - 1] = adjoint[-1]
        if not n_next:
            break
        old, new = ends[1:n_left], adjoint[len(adjoint) - n_next :]
        if learned is not None:
            if learn and before is not None:
                learned.observe("backward", iteration - 1, old - before[0][:n_next], new - before[1][:n_next])
            before = old.clone(), new
            if not is_last:
                new = learned.compose(new, before[0], "backward", iteration)
        if product is not None:
            product = product[-n_next:]
            new = affine_scan(torch.addcmul(new, product, old, value=-1.0), product, ends[n_next], reverse=True)
        if is_last:
            if product is not None:
                _carry_through(adjoints, steps, new - ends[:n_next])
            break
        ends[:n_next] = new
    return adjoints


def _walk_back(
    jacobian: Jacobian, diagonals: Tensor | None, upstream: Tensor, adjoint: Tensor, rows: range, chunk: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Walks the chunks of these rows from their ends, beginning with ``adjoint`` [n, B, H]. Gives for each step its row of
    every chunk, the adjoints there, and the product of the diagonals of each walk so far. A short first chunk drops out where
    it begins."""
    between, product = jacobian.between(1), None  # row i is the transition i + 1 of the Jacobian, which has N
    diagonals = None if diagonals is None else diagonals[1:]
    for q in range(min(chunk, len(rows))):
        at = slice(rows.start + (len(rows) - 1 - q) % chunk, rows.stop - q, chunk)
        here = upstream[at]
        adjoint = between.between(at.start, at.stop, chunk).vjp(adjoint[-len(here) :]).add_(here)
        if diagonals is not None:
            product = diagonals[at] if product is None else product[-len(here) :] * diagonals[at]
        yield at, adjoint, product


def _carry_through(adjoints: Tensor, steps: list[tuple[slice, Tensor]], off: Tensor) -> None:
    """Carries what the adjoints at the chunks' ends turned out to be off by through the chunks. The last chunk, which began
    with an exact one, is left as it is."""
    for at, product in steps:
        n_walked = len(product) - 1
        adjoints[at][:n_walked].addcmul_(product[:n_walked], off[len(off) - n_walked :])
