"""Messages along time: K forward sweeps and M backward corrections over one recurrent cell (METHOD 2.2).

It is the scheme of ``sweeps.py``, with the same indices and the same limit, for the chain whose transitions are all one
cell: N is in the hundreds or thousands and a transition is tiny, so that a list of N tensors and N calls would cost more
than the arithmetic. Here a sweep is ONE call of the cell over [N, B, ...] tensors and a scan, and products with the
Jacobians come from their known form (:class:`hbll_seq.cells.recurrent.Jacobian`), not from autograd. A test holds the
two modules equal on the same chain.

With A the diagonal this is quasi-DEER (Lim et al. 2024, arXiv 2309.12252; Gonzalez et al. 2024, arXiv 2407.19115); with
A = 0 it is Jacobi iteration. M corrections carry exact products over M transitions and the stand-in for all others:
truncated backpropagation through time (M + 1 steps with A = 0), evaluated in parallel at approximate states.

A sweep of single transitions spends N calls on each step of memory that it wins. With ``chunk`` = c a sweep walks c
transitions one after the other inside every one of N / c chunks, all chunks side by side (block Jacobi iteration, the fine
half of parareal: Lions, Maday, Turinici 2001): one pass over the sequence wins c steps of memory, for a span of c.
K sweeps then have span K c and give every state an exact memory of at least (K - 1) c + 1 steps, and of K c at the chunks'
ends; so do M corrections with products. With K, M fixed and c of order log N the span stays O(log N).

Shapes: N transitions, B batch, H hidden width. ``states[n]`` is s_n on [N + 1, B, H]; of the N that transitions read,
``inputs[i]`` is s_i, ``outputs[i]`` is a_{i+1} and ``messages[i]`` is lambda_{i+1}.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hbll_seq.cells.recurrent import Jacobian, RecurrentCell
from hbll_seq.scan import affine_scan

#: stand-ins for the Jacobians of a cell: zero (Jacobi) and the diagonal (quasi-Newton).
TIME_LINEARIZATIONS = ("zero", "diagonal")
#: first estimates: zero, the first state everywhere, or one quasi-Newton sweep from there (one call; makes a state exact).
TIME_INITS = ("zeros", "state", "diagonal")


@dataclass
class TimeSwept:
    """A recurrence after its forward sweeps.

    Attributes:
        inputs: [N, B, H], s_0 .. s_{N-1} that the differentiated call read; detached, s_0 attached where it needs a gradient.
        outputs: [N, B, H], a_1 .. a_N of that one call; attached to the cell's parameters and to ``projected``.
        states: [N, B, H], s_1 .. s_N as the forward message makes them of these, detached: what readouts read.
        jacobian: of all transitions at ``inputs``.
        factors: A: None for zero, or [N, B, H].
        residual: root mean square of the last sweep's change relative to the states'; 0 where all states are exact.
    """

    inputs: Tensor
    outputs: Tensor
    states: Tensor
    jacobian: Jacobian
    factors: Tensor | None
    residual: Tensor


def forward_time_sweeps(
    cell: RecurrentCell,
    projected: Tensor,
    s0: Tensor,
    *,
    sweeps: int,
    linearization: str = "diagonal",
    start: Tensor | None = None,
    init: str = "state",
    damping: float = 1.0,
    clip: float = 1.0,
    tolerance: float = 0.0,
    chunk: int = 1,
) -> TimeSwept:
    """K parallel sweeps without gradient, then ONE differentiated call of the cell over all positions (sweep K + 1).

    Args:
        cell: f.
        projected: [N, B, G * H], ``cell.project`` of the inputs, time first; stays attached to what made it.
        s0: [B, H].
        sweeps: K; after k sweeps s_1 .. s_kc are exact, whatever the linearisation.
        linearization: one of ``TIME_LINEARIZATIONS``.
        start: [N - 1, B, H], first estimate of s_1 .. s_{N-1}; goes before ``init``.
        init: one of ``TIME_INITS``.
        damping: each sweep moves so far from the old estimate to the new one; only 1 ever makes a state exact.
        clip: diagonals are held within -clip .. clip, so that a scan of many cannot explode; no limit at ``inf``.
        tolerance: stop early once the residual is at most this (waits for the device).
        chunk: c, transitions that a sweep takes one after the other; 1 is the plain sweep.
    """
    n_steps, residual = len(projected), s0.new_zeros(())
    first, fixed = s0.detach(), projected.detach()
    n_exact = 0  # states s_1 .. of the estimate that are exact
    with torch.no_grad():
        inputs = first.new_zeros((n_steps, *first.shape))
        inputs[0] = first
        if start is not None:
            inputs[1:] = start
        elif init != "zeros":
            inputs[1:] = first
        if start is None and init == "diagonal" and n_steps > 1:
            inputs[1:] = _sweep(cell, inputs, fixed, "diagonal", clip, 1)
            n_exact = 1
        for sweep in range(sweeps):
            if n_exact >= n_steps - 1:  # the input of the last transition is exact as well
                break
            # the first sweep from s_0 everywhere reads one state, which the cell multiplies with its matrix only once
            is_one = sweep == 0 and start is None and init == "state"
            read = first.expand_as(inputs) if is_one else inputs[n_exact:]
            new = _sweep(cell, read, fixed[n_exact:], linearization, clip, chunk)
            old = inputs[n_exact + 1 :]
            if tolerance > 0 or sweep == sweeps - 1:
                residual = _residual(old, new)
            if damping == 1.0:
                old.copy_(new)
                n_exact += chunk
            else:
                old.lerp_(new, damping)
            if tolerance > 0 and residual.item() <= tolerance:
                break
        if n_exact >= n_steps - 1:
            residual = torch.zeros_like(residual)
    # The calls without gradient shared this autocast region: older torch would hand out their gradient-free casts.
    torch.clear_autocast_cache()
    if s0.requires_grad:
        inputs = torch.cat((s0[None], inputs[1:]))
    outputs, jacobian = cell.differentiate(inputs, projected)
    factors = _factors(jacobian, clip) if linearization == "diagonal" else None
    return TimeSwept(inputs, outputs, _compose(outputs.detach(), inputs.detach(), factors), jacobian, factors, residual)


@torch.no_grad()
def backward_time_sweeps(swept: TimeSwept, errors: Tensor, *, corrections: int, chunk: int = 1) -> Tensor:
    """Messages lambda_1 .. lambda_N [N, B, H] of a loss on the states: a scan, then M corrections of it (METHOD 2.2).

    Each correction is one product with the transposed Jacobians and a scan:
    ``lambda_n <- e_n + A^T lambda_{n+1} + (J_{n+1} - A)^T lambda_old_{n+1}``. With M c >= N - 1 they are exact.

    Args:
        swept: the recurrence after :func:`forward_time_sweeps`.
        errors: [N, B, H], e_n = d loss / d s_n for n = 1 .. N; zero where no readout reads s_n.
        corrections: M; after m corrections the last mc + 1 messages are exact.
        chunk: c, products that a correction takes one after the other.
    """
    n_steps, factors = len(errors), swept.factors
    messages = errors.clone()
    if factors is not None and n_steps > 1:
        messages[:-1] = affine_scan(errors[:-1], factors[1:], errors[-1], reverse=True)
    if factors is not None and swept.jacobian.gains is None:
        return messages  # the Jacobian is its diagonal: nothing is left to correct
    for correction in range(corrections):
        high = n_steps - correction * chunk  # products of transitions from here on were taken of final messages
        if high < 2:
            break
        jacobian, at = swept.jacobian.between(1, high), errors[: high - 1]
        between = None if factors is None else factors[1:high]
        if chunk > 1:
            _correct_chunks(jacobian, between, at, messages[:high], chunk)
            continue
        old = messages[1:high]
        new = jacobian.vjp(old)
        if between is not None:
            new = new.addcmul_(between, old, value=-1.0).add_(at)
            messages[: high - 1] = affine_scan(new, between, messages[high - 1], reverse=True)
        else:
            torch.add(new, at, out=messages[: high - 1])
    return messages


def _sweep(
    cell: RecurrentCell, inputs: Tensor, projected: Tensor, linearization: str, clip: float, chunk: int
) -> Tensor:
    """New estimates of all but the first of ``inputs``, which is exact."""
    if chunk > 1:
        return _sweep_chunks(cell, inputs, projected, linearization, clip, chunk)
    if linearization == "zero":
        return cell.transition(inputs[:-1], projected[:-1])
    outputs, jacobian = cell.differentiate(inputs[:-1], projected[:-1])
    return _compose(outputs, inputs[:-1], _factors(jacobian, clip))


def _sweep_chunks(
    cell: RecurrentCell, inputs: Tensor, projected: Tensor, linearization: str, clip: float, chunk: int
) -> Tensor:
    """As :func:`_sweep`, by walking chunks. With the diagonal, what the first states of the chunks turn out to be off by is
    carried through them by the products of their diagonals, one scan over all chunks."""
    n_rows = len(inputs) - 1
    states = starts = inputs[:n_rows:chunk]
    new, carried, product = torch.empty_like(inputs[1:]), [], None
    for p in range(min(chunk, n_rows)):
        rows = slice(p, n_rows, chunk)
        states, given = states[: len(projected[rows])], projected[rows]
        if linearization == "zero":
            states = cell.transition(states, given)
        else:
            states, jacobian = cell.differentiate(states, given)
            factors = _factors(jacobian, clip)
            product = factors if product is None else product[: len(factors)] * factors
            carried.append(product)
        new[rows] = states
    if carried and len(starts) > 1:
        n_next = len(starts) - 1  # chunks that another one follows
        ends = torch.addcmul(new[chunk - 1 :: chunk][:n_next], carried[-1][:n_next], starts[:n_next], value=-1.0)
        off = affine_scan(ends, carried[-1][:n_next], starts[0]) - starts[1:]
        for p, product in enumerate(carried):
            new[p::chunk][1:].addcmul_(product[1:], off[: len(product) - 1])
    return new


def _correct_chunks(jacobian: Jacobian, factors: Tensor | None, errors: Tensor, messages: Tensor, chunk: int) -> None:
    """One correction in place in ``messages`` [R + 1, B, H] by walking chunks of the R transitions between them from the end,
    where the last message is final. With the diagonal, what a chunk's first message is off by is carried as in
    :func:`_sweep_chunks`."""
    n_rows = len(errors)
    n_chunks = -(-n_rows // chunk)
    walked = ends = messages[n_rows - chunk * (n_chunks - 1) :: chunk].clone()  # what each chunk starts from
    carried, product = [], None
    for q in range(min(chunk, n_rows)):
        low = n_rows - 1 - q - chunk * (n_chunks - 1)
        n_gone = int(low < 0)  # the chunk at the beginning may be a short one
        rows = slice(low + chunk * n_gone, n_rows - q, chunk)
        n_kept = len(errors[rows])
        walked = jacobian.between(rows.start, rows.stop, chunk).vjp(walked[-n_kept:]).add_(errors[rows])
        if factors is not None:
            product = factors[rows] if product is None else product[-n_kept:] * factors[rows]
            carried.append((rows, product))
        messages[rows] = walked
    if carried and n_chunks > 1:
        n_next = n_chunks - 1  # chunks that another one follows, towards the beginning
        last = carried[-1][1][-n_next:]
        b = torch.addcmul(walked[-n_next:], last, ends[1:], value=-1.0)
        off = affine_scan(b, last, ends[-1], reverse=True) - ends[:-1]
        for rows, product in carried:
            n_kept = len(product) - 1
            messages[rows][:n_kept].addcmul_(product[:n_kept], off[n_next - n_kept :])


def _factors(jacobian: Jacobian, clip: float) -> Tensor:
    if jacobian.gains is None:  # the diagonal is the whole Jacobian: clipped it would never be exact
        return jacobian.direct
    return jacobian.diagonal().clamp_(-clip, clip)


def _compose(outputs: Tensor, inputs: Tensor, factors: Tensor | None) -> Tensor:
    """States of ``sbar_n = f(s_{n-1}) + A_n (sbar_{n-1} - s_{n-1})``, the first input being exact (METHOD 2.2)."""
    if factors is None:
        return outputs
    return affine_scan(torch.addcmul(outputs, factors, inputs, value=-1.0), factors, inputs[0])


def _residual(old: Tensor, new: Tensor) -> Tensor:
    return torch.linalg.vector_norm(new - old) / torch.linalg.vector_norm(new).clamp(min=1e-30)
