"""Messages along time: K forward sweeps and M backward corrections over one recurrent cell (method.md 2.2).

It is the scheme of ``sweeps.py``, with the same indices and the same limit, for the chain whose transitions are all one
cell: N is in the hundreds or thousands and a transition is tiny, so that a list of N tensors and N calls would cost more
than the arithmetic. Here a sweep is ONE call of the cell over [N, B, ...] tensors and a scan, and products with the
Jacobians come from their known form (:class:`hbll_seq.layers.recurrent.Jacobian`), not from autograd. A test holds the
two modules equal on the same chain.

With A the diagonal this is quasi-DEER (Lim et al. 2024, arXiv 2309.12252; Gonzalez et al. 2024, arXiv 2407.19115); with
A = 0 it is Jacobi iteration. M corrections carry exact products over M transitions and the stand-in for all others:
truncated backpropagation through time (M + 1 steps with A = 0), evaluated in parallel at approximate states.

A sweep of single transitions spends N calls on each step of memory that it wins. With ``chunk`` = c a sweep walks c
transitions one after the other inside every one of N / c chunks, all chunks side by side (block Jacobi iteration, the fine
half of parareal: Lions, Maday, Turinici 2001): one pass over the sequence wins c steps of memory, for a span of c.
K + 1 sweeps, the differentiated one included, then have span (K + 1) c and give every state an exact memory of at least
K c + 1 steps and at most (K + 1) c; so do M corrections with products. With K and M fixed and c of order log N the span stays
O(log N).

Shapes: N transitions, B batch, H hidden width. ``states[n]`` is s_n on [N + 1, B, H]; of the N that transitions read,
``inputs[i]`` is s_i, ``outputs[i]`` is a_{i+1} and ``messages[i]`` is lambda_{i+1}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll_seq.engine.linearization.shared_matrix import TimeSecants
from hbll_seq.engine.scan import affine_scan
from hbll_seq.layers.recurrent import Jacobian, RecurrentCell

#: stand-ins for the Jacobians of a cell: zero (Jacobi) and the diagonal (quasi-Newton). A
#: ``RecurrentLocalObjective`` has "secant" too: a learned map for those of a whole chunk (see ``time_secants.py``).
TIME_LINEARIZATIONS = ("zero", "diagonal")
#: first estimates: zero, the first state everywhere, or one quasi-Newton sweep from there (one call; makes a state exact).
TIME_INITS = ("zeros", "state", "diagonal")


@dataclass
class TimeSwept:
    """A recurrence after its forward sweeps.

    Attributes:
        inputs: [N, B, H], s_0 .. s_{N-1} that the differentiated calls read; detached, s_0 attached if it needs a gradient.
        outputs: [N, B, H], a_1 .. a_N of these calls; attached to the cell's parameters and to ``projected``.
        states: [N, B, H], s_1 .. s_N as the forward message makes them of these, detached: what readouts read.
        jacobian: of all transitions at ``inputs``.
        factors: A: [N, B, H], or None for zero and for learned maps, which stand for whole chunks.
        residual: root mean square of the last sweep's change relative to the states', at the chunks' beginnings; 0 where all
            states are exact.
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
    secants: TimeSecants | None = None,
    learn: bool = False,
) -> TimeSwept:
    """K parallel sweeps without gradient, then sweep K + 1, whose calls are differentiated, each on its own.

    Args:
        cell: f.
        projected: [N, B, G * H], ``cell.project`` of the inputs, time first; stays attached to what made it.
        s0: [B, H].
        sweeps: K; after k sweeps s_1 .. s_kc are exact, whatever the linearisation, and with (K + 1) c at least N all.
        linearization: one of ``TIME_LINEARIZATIONS``, or ``"secant"``.
        start: [N - 1, B, H], first estimate of s_1 .. s_{N-1}; goes before ``init``.
        init: one of ``TIME_INITS``.
        damping: each sweep moves so far from the old estimate to the new one; only 1 ever makes a state exact.
        clip: diagonals are held within -clip .. clip, so that a scan of many cannot explode; no limit at ``inf``.
        tolerance: stop early once the residual is at most this (waits for the device).
        chunk: c, transitions that a sweep takes one after the other; with 1, the plain sweep, each is ONE call of the cell.
        secants: the maps of ``linearization="secant"``.
        learn: let them learn from what these sweeps see.

    Raises:
        ValueError: ``"secant"`` without maps, or maps with another linearisation.
    """
    if (linearization == "secant") != (secants is not None):
        raise ValueError(f"linearization={linearization!r} with secants={secants!r}: 'secant' needs its maps, and it alone")
    n_steps, residual = len(projected), s0.new_zeros(())
    chunk = min(chunk, n_steps)
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
            inputs[1:] = _sweep(cell, inputs, fixed, "diagonal", clip, 1)[0]
            n_exact = 1
        inputs = inputs[::chunk].clone() if chunk > 1 else inputs  # within a chunk nothing is read but what the walk makes
        n_exact //= chunk
        looked: list[tuple[Tensor, Tensor]] = []  # where each sweep's walks began, and what they came to
        for sweep in range(sweeps):
            if n_exact >= len(inputs) - 1:  # sweep K + 1 reads exact states alone
                break
            is_one = sweep == 0 and start is None and init == "state"  # it reads s_0 everywhere
            read, given = inputs[n_exact:], fixed[n_exact * chunk :]
            new, walked = _sweep(cell, read, given, linearization, clip, chunk, secants, sweep, is_one)
            if learn and secants is not None:
                looked.append((read[:-1].clone(), walked))
            old = inputs[n_exact + 1 :]
            if tolerance > 0 or sweep == sweeps - 1:
                residual = _residual(old, new)
            if damping == 1.0:
                old.copy_(new)
                n_exact += 1
            else:
                old.lerp_(new, damping)
            if tolerance > 0 and residual.item() <= tolerance:
                break
        if n_exact >= len(inputs) - 1:
            residual = torch.zeros_like(residual)
    # The calls without gradient shared this autocast region: older torch would hand out their gradient-free casts.
    torch.clear_autocast_cache()
    if s0.requires_grad:
        inputs = torch.cat((s0[None], inputs[1:]))
    if chunk > 1:
        inputs, outputs, jacobian = _differentiate_chunks(cell, inputs, projected, chunk)
    else:
        outputs, jacobian = cell.differentiate(inputs, projected)
    if looked:
        last = inputs.detach()[::chunk][:-1], outputs.detach()[chunk - 1 :: chunk]
        for sweep, (begun, walked) in enumerate(looked):  # the first chunks may be missing, which are exact
            rows = slice(len(last[0]) - len(begun), len(last[0]))
            secants.observe("forward", sweep, last[0][rows] - begun, last[1][rows] - walked)
    factors = _factors(jacobian, clip) if linearization == "diagonal" else None
    return TimeSwept(inputs, outputs, _compose(outputs.detach(), inputs.detach(), factors), jacobian, factors, residual)


@torch.no_grad()
def backward_time_sweeps(
    swept: TimeSwept, errors: Tensor, *, corrections: int, chunk: int = 1, secants: TimeSecants | None = None,
    learn: bool = False,
) -> Tensor:  # fmt: skip
    """Messages lambda_1 .. lambda_N [N, B, H] of a loss on the states: a scan, then M corrections of it (method.md 2.2).

    Learned maps take no part in the first scan, so that messages begin as the errors, and none in the last correction: it
    takes two for them to be used.

    Each correction is one product with the transposed Jacobians and a scan:
    ``lambda_n <- e_n + A^T lambda_{n+1} + (J_{n+1} - A)^T lambda_old_{n+1}``. With M c >= N - 1 they are exact.

    Args:
        swept: the recurrence after :func:`forward_time_sweeps`; its ``jacobian`` and ``factors`` are all that is read.
        errors: [N, B, H], e_n = d loss / d s_n for n = 1 .. N; zero where no readout reads s_n.
        corrections: M; after m corrections the last mc + 1 messages are exact.
        chunk: c, products that a correction takes one after the other.
        secants: maps that carry what a correction changed at the end of a chunk through it, in place of ``factors``.
        learn: let them learn from these products.

    Raises:
        ValueError: maps beside factors, which would carry the same change twice.
    """
    if secants is not None and swept.factors is not None:
        raise ValueError("secants beside the factors of another linearisation: sweep forward with 'secant' too")
    n_steps, factors = len(errors), swept.factors
    messages = errors.clone()
    if factors is not None and n_steps > 1:
        messages[:-1] = affine_scan(errors[:-1], factors[1:], errors[-1], reverse=True)
    if factors is not None and swept.jacobian.gains is None:
        return messages  # the Jacobian is its diagonal: nothing is left to correct
    if chunk > 1 or secants is not None:
        return _correct_chunks(swept, errors, messages, corrections, chunk, secants, learn)
    for correction in range(corrections):
        high = n_steps - correction  # products of transitions from here on were taken of final messages
        if high < 2:
            break
        old = messages[1:high]
        new = swept.jacobian.between(1, high).vjp(old)
        if factors is not None:
            new = new.addcmul_(factors[1:high], old, value=-1.0).add_(errors[: high - 1])
            messages[: high - 1] = affine_scan(new, factors[1:high], messages[high - 1], reverse=True)
        else:
            torch.add(new, errors[: high - 1], out=messages[: high - 1])
    return messages


def _correct_chunks(
    swept: TimeSwept, errors: Tensor, messages: Tensor, corrections: int, chunk: int, secants: TimeSecants | None,
    learn: bool,
) -> Tensor:  # fmt: skip
    """Corrections by walking chunks of the N - 1 transitions between the messages from the end. Of all but the last walk
    nothing is read but the messages at the chunks' beginnings, where the chunks before them begin their next walk."""
    n_rows = len(errors) - 1
    n_chunks = -(-n_rows // chunk)
    ends = messages[n_rows - chunk * (n_chunks - 1) :: chunk].clone() if n_chunks else messages[:0]
    between, at = swept.jacobian.between(1), errors[:-1]
    factors = None if swept.factors is None else swept.factors[1:]
    looked: tuple[Tensor, Tensor] | None = None  # the ends that the last correction's walks began at, what they came to
    for correction in range(corrections):
        n_left = n_chunks - correction  # the others' messages are final
        if n_left < 1:
            break
        is_last = correction == corrections - 1 or n_left == 1
        n_high = n_rows - chunk * correction
        # the chunk at the beginning may be a short one, and no chunk begins its walk where it ends its own
        n_low = 0 if is_last else n_high - chunk * (n_left - 1)
        message, product = ends[0 if is_last else 1 : n_left], None
        walked: list[tuple[slice, Tensor]] = []
        for q in range(min(chunk, n_high - n_low)):
            rows = slice(n_low + (n_high - n_low - 1 - q) % chunk, n_high - q, chunk)
            n_walked = len(at[rows])
            message = between.between(rows.start, rows.stop, chunk).vjp(message[-n_walked:]).add_(at[rows])
            if factors is not None:
                product = factors[rows] if product is None else product[-n_walked:] * factors[rows]
                walked.append((rows, product))
            if is_last:
                messages[rows] = message
            else:  # the chunk at the end began with a final message, so its own are final too
                messages[n_high - 1 - q] = message[-1]
        n_next = n_left - 1  # chunks whose end is another one's beginning
        new = message[len(message) - n_next :]
        if secants is not None and n_next:
            begun = ends[1:n_left].clone()
            if learn and looked is not None:
                secants.observe("backward", correction - 1, begun - looked[0][:n_next], new - looked[1][:n_next])
            looked = begun, new
            if not is_last:
                new = secants.compose(new, begun, "backward", correction)
        if factors is not None and n_next:
            product = product[-n_next:]
            b = torch.addcmul(new, product, ends[1:n_left], value=-1.0)
            new = affine_scan(b, product, ends[n_next], reverse=True)
        if is_last:
            off = new - ends[:n_next]
            for rows, product in walked:  # what a chunk's end turned out to be off by is carried through it
                n_walked = len(product) - 1
                messages[rows][:n_walked].addcmul_(product[:n_walked], off[n_next - n_walked :])
            break
        ends[:n_next] = new
    return messages


def _sweep(
    cell: RecurrentCell, starts: Tensor, projected: Tensor, linearization: str, clip: float, chunk: int,
    secants: TimeSecants | None = None, sweep: int = 0, is_one: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """New estimates of all but the first of the states [n, B, H] at the chunks' beginnings, where the first one is exact;
    and what the walks themselves came to. Where all that is read is one state, the cell multiplies it with its matrix only
    once (:meth:`RecurrentCell.transition`)."""
    read = starts[:-1]
    state = read[:1] if is_one else read
    product = None
    for p in range(chunk):
        given = projected[p::chunk][: len(read)]
        if linearization == "diagonal":
            state, jacobian = cell.differentiate(state, given)
            factors = _factors(jacobian, clip)
            product = factors if product is None else product * factors
        else:
            state = cell.transition(state, given)
    if secants is not None:
        return secants.compose(state, read, "forward", sweep), state
    return _compose(state, read, product), state


def _differentiate_chunks(
    cell: RecurrentCell, starts: Tensor, projected: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Jacobian]:
    """Sweep K + 1 by walking chunks: what each transition read, its output, attached to that alone, and the Jacobians."""
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


def _factors(jacobian: Jacobian, clip: float) -> Tensor:
    if jacobian.gains is None:  # the diagonal is the whole Jacobian: clipped it would never be exact
        return jacobian.direct
    return jacobian.diagonal().clamp_(-clip, clip)


def _compose(outputs: Tensor, inputs: Tensor, factors: Tensor | None) -> Tensor:
    """States of ``sbar_n = f(s_{n-1}) + A_n (sbar_{n-1} - s_{n-1})``, the first input being exact (method.md 2.2)."""
    if factors is None:
        return outputs
    return affine_scan(torch.addcmul(outputs, factors, inputs, value=-1.0), factors, inputs[0])


def _residual(old: Tensor, new: Tensor) -> Tensor:
    return torch.linalg.vector_norm(new - old) / torch.linalg.vector_norm(new).clamp(min=1e-30)
