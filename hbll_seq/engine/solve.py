"""Messages composed along a chain: K forward sweeps and M backward corrections (method.md 2.2).

A chain s_n = f_n(s_{n-1}), n = 1 .. L, is linearised around an estimate of its states with a cheap stand-in A_n for the
Jacobian of f_n. A whole sweep is then one parallel call of the transitions and one scan. Lists are over transitions:
``inputs[i]`` is s_i, ``outputs[i]`` is a_{i+1} = f_{i+1}(s_i), ``messages[i]`` is lambda_{i+1} = d loss / d s_{i+1}.

What is exact is not computed again: after k sweeps the first k states are those of the plain chain, so sweep k + 1 leaves
those transitions out, and their calls are already the differentiated ones. The same holds for messages from the end. With
K and M at least L - 1 the whole scheme is backpropagation, evaluated in parallel; below, it is an approximation of it that
truncates: M corrections carry exact products over M transitions.

With ``chunk`` = c a sweep takes c transitions one after the other inside every chunk of the chain, all chunks side by side,
and a correction so many products: for the span of c sweeps of single transitions, and as many exact states, the work of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hbll_seq.engine.chain import Chain
from hbll_seq.engine.linearization.low_rank import LowRankMaps, Secants, low_rank_scan
from hbll_seq.engine.scan import affine_scan

#: stand-ins A for the Jacobians: identity (residual blocks: Picard), zero (Jacobi), and the chain's own diagonals
#: (gated cells: quasi-Newton), or the identity and a learned map of low rank (see ``secants.py``).
LINEARIZATIONS = ("identity", "zero", "diagonal", "secant")
#: what stands for the Jacobians of a chain: a number for all, diagonals [L, ...], or maps.
Factors = float | Tensor | LowRankMaps
#: first estimates: the chain's input everywhere, the first transition's output everywhere, or the tree's jump arcs.
INITS = ("input", "first", "tree")


@dataclass
class Swept:
    """A chain after its forward sweeps.

    Attributes:
        inputs: s_0 .. s_{L-1}, what the differentiated calls read; s_0 stays attached, the others are leaves.
        outputs: a_1 .. a_L, the differentiated calls.
        states: s_1 .. s_L as the forward message makes them of these calls, detached: what readouts read.
        factors: A per transition; those of the transposed Jacobians where they are learned apart.
        residual: root mean square of the last sweep's change relative to the states'; 0 where all states are exact.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    states: list[Tensor]
    factors: Factors
    residual: Tensor


def forward_sweeps(
    chain: Chain,
    indices: Sequence[int],
    s0: Tensor,
    *,
    sweeps: int,
    linearization: str = "identity",
    start: Sequence[Tensor] | None = None,
    init: str = "input",
    damping: float = 1.0,
    tolerance: float = 0.0,
    chunk: int = 1,
    secants: Secants | None = None,
    learn: bool = False,
) -> Swept:
    """K parallel sweeps without gradient, then the differentiated call of every transition (sweep K + 1).

    Args:
        chain: the transitions.
        indices: the L transitions in order.
        s0: [...], what the first one reads; stays attached to what made it.
        sweeps: K; after k sweeps the first k states (of chunks: kc) are exact, whatever the linearisation.
        linearization: one of ``LINEARIZATIONS``.
        start: first estimate of s_1 .. s_{L-1}; goes before ``init``.
        init: ``"input"`` or ``"first"``. The latter is one call more, and makes one more state exact: for chains whose
            first transition changes the state most (method.md 2.6).
        damping: each sweep moves so far from the old estimate to the new one; 1 is the plain sweep, and the only one that
            ever makes a state exact.
        tolerance: stop early once the residual is at most this (waits for the device).
        chunk: c, transitions that a sweep takes one after the other, the differentiated one too; after k sweeps the first kc
            states are exact.
        secants: the maps of ``linearization="secant"``.
        learn: they also learn from these sweeps.

    Raises:
        ValueError: ``"secant"`` without maps.
    """
    if (linearization == "secant") != (secants is not None):
        raise ValueError(f"linearization={linearization!r} with secants={secants!r}: 'secant' needs its maps, and it alone")
    n_steps, residual = len(indices), s0.new_zeros(())
    chunk = min(chunk, n_steps)
    inputs: list[Tensor] = [s0] * n_steps
    outputs: list[Tensor] = [s0] * n_steps
    states = [s0.detach(), *(s.detach() for s in start)] if start is not None else [s0.detach()] * n_steps
    n_exact = 0  # transitions whose input was exact when they were differentiated
    last: Tensor | None = None  # an older estimate of what the last transition reads
    seen: dict[int, tuple[Tensor, Tensor]] = {}  # some positions of each transition's last input and output without gradient

    def differentiate(rows: Sequence[int], read: Sequence[Tensor], own: bool) -> list[Tensor]:
        for i, state in zip(rows, read):
            # A state is a row of a whole sweep, which a row that outlives it would keep alive.
            state = state.clone() if own else state.detach()
            inputs[i] = s0 if i == 0 else state.requires_grad_(True)
        # The calls without gradient shared this autocast region: older torch would hand out their gradient-free casts.
        torch.clear_autocast_cache()
        with torch.enable_grad():
            calls = chain.apply([indices[i] for i in rows], [inputs[i] for i in rows])
        for i, a in zip(rows, calls):
            outputs[i] = a
        return [a.detach() for a in calls]

    with torch.no_grad():
        if init == "first" and start is None:
            states[1:] = differentiate([0], states[:1], True) * (n_steps - 1)
            n_exact = 1
        for _ in range(sweeps):
            if n_exact >= n_steps - chunk:  # sweep K + 1 reads exact states alone
                break
            reads, calls, n_done = list(states), [s0] * (n_steps - 1), n_exact
            for p in range(chunk):
                rows = range(n_exact + p, n_steps - 1, chunk)  # no state reads what the last transition makes
                if not rows:
                    break
                if damping == 1.0:  # the first chunk's input is exact: its calls are the differentiated ones
                    (calls[rows[0]],) = differentiate(rows[:1], [reads[rows[0]]], True)
                    n_done, rows = rows[0] + 1, rows[1:]
                for r, a in zip(rows, chain.apply([indices[r] for r in rows], [reads[r] for r in rows])):
                    calls[r] = a
                if p + 1 < chunk:
                    reads[n_exact + p + 1 : n_steps : chunk] = calls[n_exact + p :: chunk]
            if chain.remembers(indices[-1]):
                chain.apply(indices[-1:], reads[-1:])
            reads, calls = reads[n_exact:-1], calls[n_exact:]
            factors = _factors(chain, linearization, indices[n_exact:-1], reads, calls, secants)
            new = _compose(calls, reads, factors)
            if learn and secants is not None:
                n_new = n_done - n_exact  # these have been differentiated, at states that no later sweep changes
                seen |= {i: (Secants.sample(s), Secants.sample(a))
                         for i, s, a in zip(range(n_done, n_steps), reads[n_new:], calls[n_new:])}  # fmt: skip
                if secants.looks_at_last:
                    last = states[-1]
            old = states[n_exact + 1 :]
            residual = _residual(old, new)
            states[n_exact + 1 :] = [o + damping * (n - o) for o, n in zip(old, new)] if damping != 1.0 else new
            n_exact = n_done
            if tolerance > 0 and residual.item() <= tolerance:
                break
        if n_exact >= n_steps - chunk:
            residual = torch.zeros_like(residual)
        if last is not None:
            seen[n_steps - 1] = tuple(Secants.sample(t) for t in (last, *chain.apply(indices[-1:], [last])))
        for p in range(chunk):
            rows = range(n_exact + p, n_steps, chunk)
            calls = differentiate(rows, [states[r] for r in rows], chunk > 1 and p == 0)
            if p + 1 < chunk:
                states[n_exact + p + 1 :: chunk] = calls[: len(range(n_exact + p + 1, n_steps, chunk))]
        calls = [a.detach() for a in outputs]
        factors = _factors(chain, linearization, indices, states, calls, secants)
        tail = _between(factors, n_exact, None)
        final = calls[:n_exact] + (_compose(calls[n_exact:], states[n_exact:], tail) if n_exact < n_steps else [])
        for i, (s, a) in seen.items():
            change = Secants.sample(inputs[i]) - s
            secants.observe(chain.number(indices[i]), "forward", change, Secants.sample(calls[i]) - a - change)
        if secants is not None:
            factors = secants.maps([chain.number(index) for index in indices], "backward")
    return Swept(inputs, outputs, final, factors, residual)


def backward_sweeps(
    swept: Swept,
    errors: Sequence[Tensor | None],
    *,
    corrections: int,
    chunk: int = 1,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
) -> list[Tensor]:
    """Messages lambda_1 .. lambda_L of a loss on some of the states: a scan, then M corrections of it (method.md 2.2).

    Each correction is one batched vector-Jacobian product and a scan:
    ``lambda_n <- e_n + A^T lambda_{n+1} + (J_{n+1} - A)^T lambda_old_{n+1}``. With M >= L - 1 they are exact.

    Args:
        swept: the chain after :func:`forward_sweeps`.
        errors: e_n = d loss / d s_n for n = 1 .. L; None where no readout reads s_n.
        corrections: M.
        chunk: c, products that a correction takes one after the other.
        observe: called with every i but 0, some positions of a message at s_{i+1} and of its product, once for the last
            product that is taken there.
    """
    n_steps, factors = len(swept.outputs), swept.factors

    def add_errors(b: Tensor) -> Tensor:
        for row, error in zip(b, errors):
            if error is not None:
                row += error
        return b

    messages = add_errors(swept.inputs[0].new_zeros((n_steps, *swept.inputs[0].shape)))
    if n_steps > 1:
        messages[:-1] = _scan(messages[:-1], _between(factors, 1, n_steps), messages[-1], reverse=True)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for correction in range(corrections):
        high = n_steps - correction * chunk  # products of transitions from here on were taken of final messages
        if high < 2:
            break
        b, read = _products(swept, errors, messages[1:high], chunk)
        if observe is not None:
            seen |= {i: (Secants.sample(m), Secants.sample(p)) for i, m, p in zip(range(1, high), read, b)}
        b = add_errors(_subtract(b, _between(factors, 1, high), read))
        messages[: high - 1] = _scan(b, _between(factors, 1, high), messages[high - 1], reverse=True)
    for i, (message, product) in seen.items():
        observe(i, message, product)
    return list(messages.unbind(0))


def _products(swept: Swept, errors: Sequence[Tensor | None], old: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """``J_{n+1}^T lambda_{n+1}`` of all transitions but the first [R, ...], and the messages of which they were taken: the
    last one of each chunk of transitions is an old one, the others come from the products behind them."""
    read = old if chunk == 1 else old.clone()
    n_rows, products = len(old), [old] * len(old)
    for q in range(min(chunk, n_rows)):
        rows = range(n_rows - 1 - q, -1, -chunk)
        outputs, inputs = ([tensors[r + 1] for r in rows] for tensors in (swept.outputs, swept.inputs))
        for r, product in zip(rows, torch.autograd.grad(outputs, inputs, [read[r] for r in rows], retain_graph=True)):
            products[r] = product
            if r > 0 and q + 1 < chunk:
                read[r - 1] = product if errors[r] is None else product + errors[r]
    return torch.stack(products), read


def _factors(chain: Chain, linearization: str, indices, inputs, outputs, secants: Secants | None) -> Factors:
    if linearization == "diagonal":
        return torch.stack(chain.diagonal(indices, inputs, outputs))
    if linearization == "secant":
        return secants.maps([chain.number(index) for index in indices], "forward")
    return 1.0 if linearization == "identity" else 0.0


def _between(factors: Factors, low: int, high: int | None) -> Factors:
    """Those of the transitions low .. high - 1."""
    if isinstance(factors, LowRankMaps):
        return factors.between(low, high)
    return factors[low:high] if isinstance(factors, Tensor) else factors


def _scan(b: Tensor, factors: Factors, initial: Tensor, *, reverse: bool = False) -> Tensor:
    """``s_n = A_n s_{n-1} + b_n`` for all n."""
    scan = low_rank_scan if isinstance(factors, LowRankMaps) else affine_scan
    return scan(b, factors, initial, reverse=reverse)


def _compose(outputs: Sequence[Tensor], inputs: Sequence[Tensor], factors: Factors) -> list[Tensor]:
    """States of ``sbar_n = f_n(s_{n-1}) + A_n (sbar_{n-1} - s_{n-1})``, the first input being exact (method.md 2.2)."""
    if isinstance(factors, float) and factors == 0.0:
        return list(outputs)
    return list(_scan(_subtract(torch.stack(list(outputs)), factors, inputs), factors, inputs[0]).unbind(0))


def _subtract(b: Tensor, factors: Factors, states: Sequence[Tensor] | Tensor) -> Tensor:
    """``b - A s``, row by row in place."""
    if isinstance(factors, Tensor):
        for row, factor, s in zip(b, factors, states):
            row.addcmul_(factor, s, value=-1.0)
    elif factors != 0.0:
        for n, (row, s) in enumerate(zip(b, states)):
            row.sub_(s)
            if isinstance(factors, LowRankMaps):
                row.sub_(factors.branch(n, s))
    return b


def _residual(old: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
    change = sum((n.float() - o.float()).square().sum() for o, n in zip(old, new))
    size = sum(n.float().square().sum() for n in new)
    return (change / size.clamp(min=1e-30)).sqrt()
