"""One recurrent cell over time: K forward iterations and M backward ones, in parallel (docs/method.md 2.2, 2.4).

It is the scheme of ``engine/solve.py``, with the same indices and the same limit, for the chain whose transitions are all one
cell: N is in the hundreds or thousands and a transition is tiny, so that a list of N tensors and N calls would cost more
than the arithmetic. Here an iteration is ONE call of the cell over [N, B, ...] tensors and a scan, and products with the
Jacobians come from their known form (:class:`hbll_seq.layers.recurrent.Jacobian`), not from autograd. A test holds the
two modules equal on the same chain.

With A the diagonal this is quasi-DEER (Lim et al. 2024, arXiv 2309.12252; Gonzalez et al. 2024, arXiv 2407.19115); with
A = 0 it is Jacobi iteration. M backward iterations carry exact products over M transitions and approximate all others:
truncated backpropagation through time (M + 1 steps with A = 0), evaluated in parallel at approximate states.

An iteration of single transitions spends N calls on each step of memory that it wins. With ``chunk_size`` = c an iteration
walks c transitions one after the other inside every one of N / c chunks, all chunks side by side (block Jacobi iteration,
the fine half of parareal: Lions, Maday, Turinici 2001): one pass over the sequence wins c steps of memory, for a span of c.
K + 1 iterations, the differentiated one included, then have span (K + 1) c and give every state an exact memory of at least
K c + 1 steps and at most (K + 1) c; so do M backward iterations with products. With K and M fixed and c of order log N the
span stays O(log N).

Shapes: N transitions, B batch, H hidden width. ``states[n]`` is s_n on [N + 1, B, H]; of the N that transitions read,
``inputs[i]`` is s_i, ``outputs[i]`` is a_{i+1} and ``adjoints[i]`` is lambda_{i+1}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll_seq.chains.time_chunks import iterate_chunks
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization.base import Diagonal, Zero
from hbll_seq.engine.linearization.shared_matrix import SharedMatrix, SharedMatrixFit
from hbll_seq.engine.scan import affine_scan
from hbll_seq.layers.recurrent import Jacobian, RecurrentCell


@dataclass
class TimeSolution:
    """A recurrence after its forward iterations.

    Attributes:
        inputs: [N, B, H], s_0 .. s_{N-1} that the differentiated calls read; detached, s_0 attached if it needs a gradient.
        outputs: [N, B, H], a_1 .. a_N of these calls; attached to the cell's parameters and to ``projected``.
        states: [N, B, H], s_1 .. s_N as one more composition makes them of these, detached: what losses are taken at.
        jacobian: of all transitions at ``inputs``.
        diagonals: A [N, B, H], where diagonals approximate the Jacobians; None for zero, and for the shared matrix, which
            approximates those of whole chunks.
        residual: root mean square of the last iteration's change relative to the states', at the chunks' beginnings; 0 where
            all states are exact.
    """

    inputs: Tensor
    outputs: Tensor
    states: Tensor
    jacobian: Jacobian
    diagonals: Tensor | None
    residual: Tensor


# ------------------------------------------------------------------------------------------------------- forward


def forward_time_sweeps(
    cell: RecurrentCell,
    projected: Tensor,
    s0: Tensor,
    iterations: Iterations,
    *,
    init: str = "state",
    start: Tensor | None = None,
    learned: SharedMatrixFit | None = None,
    learn: bool = False,
) -> TimeSolution:
    """K parallel iterations without gradient, then iteration K + 1, whose calls are differentiated, each on its own.

    After k iterations s_1 .. s_kc are exact, whatever approximates the Jacobians, and with (K + 1) c at least N all are.

    Args:
        cell: f.
        projected: [N, B, G * H], ``cell.project`` of the inputs, time first; stays attached to what made it.
        s0: [B, H].
        iterations: K, c and how it is iterated, with ``Zero``, ``Diagonal`` or ``SharedMatrix``. With c = 1 an iteration is
            ONE call of the cell.
        init: first estimate: ``"zeros"``, ``"state"`` (s_0 everywhere), or ``"diagonal"``: one quasi-Newton iteration from
            there (one call; makes a state exact).
        start: [N - 1, B, H], first estimate of s_1 .. s_{N-1}; goes before ``init``.
        learned: the matrices of :class:`SharedMatrix`.
        learn: let them learn from these iterations.

    Raises:
        ValueError: another linearization, :class:`SharedMatrix` without its matrices, or matrices without it.
    """
    iterations.check((Zero, Diagonal), SharedMatrix, learned)
    run = _Forward(cell, projected, s0, iterations, learned, learn)
    with torch.no_grad():
        run.begin(init, start)
        for number in range(iterations.forward):
            if run.is_exact:
                break
            run.iterate(number)
            if iterations.tolerance > 0 and run.residual.item() <= iterations.tolerance:
                break
    return run.finish()


class _Forward:
    """A run of :func:`forward_time_sweeps`: what it knows so far.

    Attributes:
        starts: [N / c, B, H], the present estimate of the states that the chunks' walks begin from. Within a chunk nothing
            is read but what the walk makes.
        n_exact: the first walks, of so many chunks, need not be repeated: what follows them is exact.
        is_constant: whether the next walk reads s_0 everywhere.
        residual: of the last iteration.
        seen: where each iteration's walks began, and what they ended in.
    """

    def __init__(
        self,
        cell: RecurrentCell,
        projected: Tensor,
        s0: Tensor,
        iterations: Iterations,
        learned: SharedMatrixFit | None,
        learn: bool,
    ):
        self.cell, self.projected, self.s0, self.iterations = cell, projected, s0, iterations
        self.learned, self.teaches = learned, learn and learned is not None
        self.chunk = min(iterations.chunk_size, len(projected))
        self.residual = s0.new_zeros(())
        self.n_exact, self.is_constant = 0, False
        self.seen: list[tuple[Tensor, Tensor]] = []

    @property
    def is_exact(self) -> bool:
        """Whether the differentiated iteration will read exact states alone."""
        return self.n_exact >= len(self.starts) - 1

    def begin(self, init: str, start: Tensor | None) -> None:
        """The first estimate."""
        n_steps, first = len(self.projected), self.s0.detach()
        inputs = first.new_zeros((n_steps, *first.shape))
        inputs[0] = first
        if start is not None:
            inputs[1:] = start
        elif init != "zeros":
            inputs[1:] = first
        if start is None and init == "diagonal" and n_steps > 1:
            inputs[1:] = self._walk(inputs, self.projected.detach(), 1, is_diagonal=True)[0]
            self.n_exact = 1
        self.is_constant = start is None and init == "state"
        self.starts = inputs[:: self.chunk].clone() if self.chunk > 1 else inputs
        self.n_exact //= self.chunk

    def iterate(self, number: int) -> None:
        """Iteration ``number``, from 0: walks all chunks and composes what they end in."""
        iterations, low = self.iterations, self.n_exact
        read = self.starts[low:]
        is_diagonal = isinstance(iterations.linearization, Diagonal)
        new, walked = self._walk(read, self.projected.detach()[low * self.chunk :], self.chunk, is_diagonal, number)
        self.is_constant = False
        if self.teaches:
            self.seen.append((read[:-1].clone(), walked))
        old = self.starts[low + 1 :]
        if iterations.tolerance > 0 or number == iterations.forward - 1:
            self.residual = _residual(old, new)
        if iterations.damping == 1.0:
            old.copy_(new)
            self.n_exact += 1
        else:
            old.lerp_(new, iterations.damping)

    def finish(self) -> TimeSolution:
        """The differentiated iteration, and what follows of it."""
        if self.is_exact:
            self.residual = torch.zeros_like(self.residual)
        # The calls without gradient shared this autocast region: older torch would hand out their gradient-free casts.
        torch.clear_autocast_cache()
        inputs = torch.cat((self.s0[None], self.starts[1:])) if self.s0.requires_grad else self.starts
        if self.chunk > 1:
            inputs, outputs, jacobian = _differentiate_chunks(self.cell, inputs, self.projected, self.chunk)
        else:
            outputs, jacobian = self.cell.differentiate(inputs, self.projected)
        self._teach(inputs.detach(), outputs.detach())
        is_diagonal = isinstance(self.iterations.linearization, Diagonal)
        diagonals = _clipped(jacobian, self.iterations.clip) if is_diagonal else None
        states = _compose(outputs.detach(), inputs.detach(), diagonals)
        return TimeSolution(inputs, outputs, states, jacobian, diagonals, self.residual)

    def _walk(
        self, starts: Tensor, projected: Tensor, chunk: int, is_diagonal: bool, number: int = 0
    ) -> tuple[Tensor, Tensor]:
        """New estimates of all but the first of the states [n, B, H] at the chunks' beginnings, where the first one is exact;
        and what the walks themselves ended in. Where all that is read is one state, the cell multiplies it with its matrix
        only once (:meth:`RecurrentCell.transition`)."""
        read = starts[:-1]
        state = read[:1] if self.is_constant else read
        product = None
        for p in range(chunk):
            given = projected[p::chunk][: len(read)]
            if is_diagonal:
                state, jacobian = self.cell.differentiate(state, given)
                diagonals = _clipped(jacobian, self.iterations.clip)
                product = diagonals if product is None else product * diagonals
            else:
                state = self.cell.transition(state, given)
        if self.learned is not None and not is_diagonal:
            return self.learned.compose(state, read, "forward", number), state
        return _compose(state, read, product), state

    def _teach(self, inputs: Tensor, outputs: Tensor) -> None:
        """How what each iteration's walks ended in, and where they began, changed up to the differentiated ones."""
        if not self.seen:
            return
        last_begun, last_walked = inputs[:: self.chunk][:-1], outputs[self.chunk - 1 :: self.chunk]
        for number, (begun, walked) in enumerate(self.seen):  # the first chunks may be missing, which are exact
            rows = slice(len(last_begun) - len(begun), len(last_begun))
            self.learned.observe("forward", number, last_begun[rows] - begun, last_walked[rows] - walked)


def _differentiate_chunks(
    cell: RecurrentCell, starts: Tensor, projected: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Jacobian]:
    """Iteration K + 1 by walking chunks: what each transition read, its output, attached to that alone, and the Jacobians."""
    n_steps, n_chunks = len(projected), len(starts)
    if n_chunks * chunk > n_steps:  # the last chunk is a short one; what follows its end is left out again
        projected = F.pad(projected, (0, 0) * (projected.dim() - 1) + (0, n_chunks * chunk - n_steps))
    state, read, outputs, jacobians = starts, [], [], []
    for given in projected.unflatten(0, (n_chunks, chunk)).unbind(1):
        read.append(state)
        output, jacobian = cell.differentiate(state, given)
        state = output.detach()
        outputs.append(output)
        jacobians.append(jacobian)

    def join(parts: Sequence[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.stack(list(parts), dim=1).flatten(0, 1)[:n_steps]

    direct, gains, weights = zip(*jacobians)
    return join(read), join(outputs), Jacobian(join(direct), join(gains), weights[0])


# ------------------------------------------------------------------------------------------------------ backward


@torch.no_grad()
def backward_time_sweeps(
    solution: TimeSolution,
    upstream: Tensor,
    iterations: Iterations,
    *,
    learned: SharedMatrixFit | None = None,
    learn: bool = False,
) -> Tensor:
    """Adjoints lambda_1 .. lambda_N [N, B, H] of a loss on the states: a scan, then M iterations (docs/method.md 2.2).

    Learned matrices take no part in the first scan, so that adjoints begin as the upstream gradients, and none in the last
    iteration: it takes two for them to be used.

    Each iteration is one product with the transposed Jacobians and a scan:
    ``lambda_n <- e_n + A^T lambda_{n+1} + (J_{n+1} - A)^T lambda_old_{n+1}``. With M c >= N - 1 they are exact; after m
    iterations the last mc + 1 adjoints are.

    Args:
        solution: the recurrence after :func:`forward_time_sweeps`; its ``jacobian`` and ``diagonals`` are all that is read.
        upstream: [N, B, H], upstream gradients e_n = d loss / d s_n for n = 1 .. N; zero where no loss is taken at s_n.
        iterations: M, and c: products that one iteration takes one after the other.
        learned: matrices that carry what an iteration changed at the end of a chunk through it, in place of diagonals.
        learn: let them learn from these products.

    Raises:
        ValueError: matrices beside diagonals, which would carry the same change twice.
    """
    diagonals = solution.diagonals
    if learned is not None and diagonals is not None:
        raise ValueError("learned maps beside the diagonals of another linearization: solve forward with 'shared_matrix' too")
    n_steps = len(upstream)
    adjoints = upstream.clone()
    if diagonals is not None and n_steps > 1:
        adjoints[:-1] = affine_scan(upstream[:-1], diagonals[1:], upstream[-1], reverse=True)
    if diagonals is not None and solution.jacobian.gains is None:
        return adjoints  # the Jacobian is its diagonal: nothing is left to correct
    if iterations.chunk_size > 1 or learned is not None:
        return iterate_chunks(solution.jacobian, diagonals, upstream, adjoints, iterations, learned, learn)
    for iteration in range(iterations.backward):
        high = n_steps - iteration  # products of transitions from here on were taken of final adjoints
        if high < 2:
            break
        old = adjoints[1:high]
        new = solution.jacobian.between(1, high).vjp(old)
        if diagonals is not None:
            new = new.addcmul_(diagonals[1:high], old, value=-1.0).add_(upstream[: high - 1])
            adjoints[: high - 1] = affine_scan(new, diagonals[1:high], adjoints[high - 1], reverse=True)
        else:
            torch.add(new, upstream[: high - 1], out=adjoints[: high - 1])
    return adjoints


# --------------------------------------------------------------------------------------------------- composition


def _clipped(jacobian: Jacobian, clip: float) -> Tensor:
    """Diagonals of Jacobians, held within -clip .. clip."""
    if jacobian.gains is None:  # the diagonal is the whole Jacobian: clipped it would never be exact
        return jacobian.direct
    return jacobian.diagonal().clamp_(-clip, clip)


def _compose(outputs: Tensor, inputs: Tensor, diagonals: Tensor | None) -> Tensor:
    """States of ``sbar_n = f(s_{n-1}) + A_n (sbar_{n-1} - s_{n-1})``, the first input being exact."""
    if diagonals is None:
        return outputs
    return affine_scan(torch.addcmul(outputs, diagonals, inputs, value=-1.0), diagonals, inputs[0])


def _residual(old: Tensor, new: Tensor) -> Tensor:
    return torch.linalg.vector_norm(new - old) / torch.linalg.vector_norm(new).clamp(min=1e-30)
