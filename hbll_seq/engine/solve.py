"""Parallel solution of a chain: K forward iterations and M backward ones (docs/method.md 2.2).

A chain s_n = f_n(s_{n-1}), n = 1 .. L, is linearised around an estimate of its states, with a cheap approximation A_n of
the Jacobian of f_n. A whole iteration is then one parallel call of the transitions and one scan. Lists are over transitions:
``inputs[i]`` is s_i, ``outputs[i]`` is a_{i+1} = f_{i+1}(s_i), ``adjoints[i]`` is lambda_{i+1} = d loss / d s_{i+1}.

What is exact is not computed again: after k iterations the first k states are those of the plain chain, so iteration k + 1
leaves those transitions out, and their calls are already the differentiated ones. The same holds for adjoints from the end.
With K and M at least L - 1 the whole scheme is backpropagation, evaluated in parallel; below, it is an approximation of it
that truncates: M backward iterations carry exact products over M transitions.

With ``chunk_size`` = c a forward iteration takes c transitions one after the other inside every chunk of the chain, all
chunks side by side, and a backward iteration takes so many products: for the span of c iterations of single transitions, and
as many exact states, the work of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hbll_seq.engine.chain import Chain
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization.base import Diagonal, Identity, Zero
from hbll_seq.engine.linearization.low_rank import LowRank, LowRankFit, LowRankMaps, low_rank_scan
from hbll_seq.engine.scan import affine_scan

#: what approximates the Jacobians of a chain: a number for all, diagonals [L, ...], or maps.
Approximation = float | Tensor | LowRankMaps


@dataclass
class Solution:
    """A chain after its forward iterations.

    Attributes:
        inputs: s_0 .. s_{L-1}, what the differentiated calls read; s_0 stays attached, the others are leaves.
        outputs: a_1 .. a_L, the differentiated calls.
        states: s_1 .. s_L as one more composition makes them of these calls, detached: what losses are taken at.
        approximation: A of each transition; that of the transposed Jacobians where it is learned apart.
        residual: root mean square of the last iteration's change relative to the states'; 0 where all states are exact.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    states: list[Tensor]
    approximation: Approximation
    residual: Tensor


# ------------------------------------------------------------------------------------------------------- forward


def forward_sweeps(
    chain: Chain,
    indices: Sequence[int],
    s0: Tensor,
    iterations: Iterations,
    *,
    init: str = "input",
    start: Sequence[Tensor] | None = None,
    learned: LowRankFit | None = None,
    learn: bool = False,
) -> Solution:
    """K parallel iterations without gradient, then the differentiated call of every transition (iteration K + 1).

    After k iterations the first kc states are exact, whatever approximates the Jacobians.

    Args:
        chain: the transitions.
        indices: the L transitions in order.
        s0: [...], what the first one reads; stays attached to what made it.
        iterations: K and how it is iterated.
        init: first estimate of the states, ``"input"`` (s_0 everywhere) or ``"first"`` (f_1(s_0) everywhere). The latter is
            one call more, and makes one more state exact: for chains whose first transition changes the state most
            (docs/method.md 2.6).
        start: first estimate of s_1 .. s_{L-1}; goes before ``init``.
        learned: the maps of :class:`LowRank`.
        learn: they also learn from these iterations.

    Raises:
        ValueError: a linearization of another kind of chain, :class:`LowRank` without maps, or maps without it.
    """
    iterations.check((Identity, Zero, Diagonal), LowRank, learned)
    run = _Forward(chain, indices, s0, iterations, learned, learn)
    with torch.no_grad():
        run.begin(init, start)
        for _ in range(iterations.forward):
            if run.is_exact:
                break
            run.iterate()
            if iterations.tolerance > 0 and run.residual.item() <= iterations.tolerance:
                break
        return run.finish()


class _Forward:
    """A run of :func:`forward_sweeps`: what it knows so far.

    Attributes:
        inputs, outputs: of the calls that are differentiated already, in their places.
        states: s_0 .. s_{L-1}, the present estimate.
        n_exact: the first so many transitions are differentiated; their inputs are exact and do not change any more.
        residual: of the last iteration.
        seen: of each transition, some positions of an input that it had in an earlier iteration, and of its output.
        old_last: an earlier estimate of what the last transition reads.
    """

    def __init__(
        self,
        chain: Chain,
        indices: Sequence[int],
        s0: Tensor,
        iterations: Iterations,
        learned: LowRankFit | None,
        learn: bool,
    ):
        self.chain, self.indices, self.s0, self.iterations = chain, indices, s0, iterations
        self.learned, self.teaches = learned, learn and learned is not None
        self.n_steps = len(indices)
        self.chunk = min(iterations.chunk_size, self.n_steps)
        self.inputs: list[Tensor] = [s0] * self.n_steps
        self.outputs: list[Tensor] = [s0] * self.n_steps
        self.states: list[Tensor] = [s0.detach()] * self.n_steps
        self.n_exact = 0
        self.residual = s0.new_zeros(())
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.old_last: Tensor | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the differentiated calls that are still to come will read exact states alone."""
        return self.n_exact >= self.n_steps - self.chunk

    def begin(self, init: str, start: Sequence[Tensor] | None) -> None:
        """The first estimate."""
        if start is not None:
            self.states[1:] = [s.detach() for s in start]
        elif init == "first":
            self.states[1:] = self._differentiate([0], self.states[:1], own=True) * (self.n_steps - 1)
            self.n_exact = 1

    def iterate(self) -> None:
        """One iteration: every transition at the present estimate, and one composition of the results."""
        reads, calls, n_done = self._walk()
        index, damping = self.indices[self.n_exact : -1], self.iterations.damping
        new = _compose(calls, reads, self._approximation(index, reads, calls))
        if self.teaches:
            self._note(reads, calls, n_done)
        old = self.states[self.n_exact + 1 :]
        self.residual = _residual(old, new)
        self.states[self.n_exact + 1 :] = [o + damping * (n - o) for o, n in zip(old, new)] if damping != 1.0 else new
        self.n_exact = n_done

    def finish(self) -> Solution:
        """The differentiated calls of all transitions that have none yet, and what follows of them."""
        if self.is_exact:
            self.residual = torch.zeros_like(self.residual)
        if self.old_last is not None:
            calls = self.chain.apply(self.indices[-1:], [self.old_last])
            self.seen[self.n_steps - 1] = tuple(LowRankFit.sample(t) for t in (self.old_last, *calls))
        for p in range(self.chunk):
            rows = range(self.n_exact + p, self.n_steps, self.chunk)
            calls = self._differentiate(rows, [self.states[r] for r in rows], own=self.chunk > 1 and p == 0)
            if p + 1 < self.chunk:
                n_next = len(range(self.n_exact + p + 1, self.n_steps, self.chunk))
                self.states[self.n_exact + p + 1 :: self.chunk] = calls[:n_next]
        calls = [a.detach() for a in self.outputs]
        approximation = self._approximation(self.indices, self.states, calls)
        states, first = calls, self.n_exact
        if first < self.n_steps:
            states = calls[:first] + _compose(calls[first:], self.states[first:], _between(approximation, first, None))
        self._teach(calls)
        if self.learned is not None:
            approximation = self.learned.maps([self.chain.number(index) for index in self.indices], "backward")
        return Solution(self.inputs, self.outputs, states, approximation, self.residual)

    def _walk(self) -> tuple[list[Tensor], list[Tensor], int]:
        """Walks all chunks side by side from the present estimate: what each transition from ``n_exact`` on reads, but the
        last one, whose output no state reads; what it makes of it; and the new ``n_exact``."""
        chunk, low, n_done = self.chunk, self.n_exact, self.n_exact
        reads, calls = list(self.states), [self.s0] * (self.n_steps - 1)
        for p in range(chunk):
            rows = range(low + p, self.n_steps - 1, chunk)
            if not rows:
                break
            if self.iterations.damping == 1.0:  # the first chunk's input is exact: its calls are the differentiated ones
                (calls[rows[0]],) = self._differentiate(rows[:1], [reads[rows[0]]], own=True)
                n_done, rows = rows[0] + 1, rows[1:]
            for r, a in zip(rows, self.chain.apply([self.indices[r] for r in rows], [reads[r] for r in rows])):
                calls[r] = a
            if p + 1 < chunk:
                reads[low + p + 1 : self.n_steps : chunk] = calls[low + p :: chunk]
        if self.chain.remembers(self.indices[-1]):
            self.chain.apply(self.indices[-1:], reads[-1:])
        return reads[low:-1], calls[low:], n_done

    def _differentiate(self, rows: Sequence[int], reads: Sequence[Tensor], own: bool) -> list[Tensor]:
        """The differentiated calls of these transitions, detached; ``own``: each reads a copy, since a state is a row of a
        whole iteration, which a row that outlives it would keep alive."""
        for i, state in zip(rows, reads):
            state = state.clone() if own else state.detach()
            self.inputs[i] = self.s0 if i == 0 else state.requires_grad_(True)
        # The calls without gradient shared this autocast region: older torch would hand out their gradient-free casts.
        torch.clear_autocast_cache()
        with torch.enable_grad():
            calls = self.chain.apply([self.indices[i] for i in rows], [self.inputs[i] for i in rows])
        for i, a in zip(rows, calls):
            self.outputs[i] = a
        return [a.detach() for a in calls]

    def _approximation(self, indices: Sequence[int], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Approximation:
        """What approximates the Jacobians of these transitions."""
        if isinstance(self.iterations.linearization, Diagonal):
            return torch.stack(self.chain.diagonal(indices, inputs, outputs))
        if self.learned is not None:
            return self.learned.maps([self.chain.number(index) for index in indices], "forward")
        return 1.0 if isinstance(self.iterations.linearization, Identity) else 0.0

    def _note(self, reads: list[Tensor], calls: list[Tensor], n_done: int) -> None:
        """Keeps samples of this iteration for :meth:`_teach`, of the transitions that later ones evaluate again."""
        n_new = n_done - self.n_exact  # these have been differentiated, at states that no later iteration changes
        sampled = ((LowRankFit.sample(s), LowRankFit.sample(a)) for s, a in zip(reads[n_new:], calls[n_new:]))
        self.seen.update(zip(range(n_done, self.n_steps), sampled))
        if self.learned.wants_last:
            self.old_last = self.states[-1]

    def _teach(self, calls: list[Tensor]) -> None:
        """How each branch's output changed from the sample of an earlier iteration to the differentiated call."""
        for i, (s, a) in self.seen.items():
            change = LowRankFit.sample(self.inputs[i]) - s
            response = LowRankFit.sample(calls[i]) - a - change
            self.learned.observe(self.chain.number(self.indices[i]), "forward", change, response)


# ------------------------------------------------------------------------------------------------------ backward


def backward_sweeps(
    solution: Solution,
    upstream: Sequence[Tensor | None],
    iterations: Iterations,
    *,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
) -> list[Tensor]:
    """Adjoints lambda_1 .. lambda_L of a loss on some of the states: a scan, then M iterations (docs/method.md 2.2).

    Each iteration is one batched vector-Jacobian product and a scan:
    ``lambda_n <- e_n + A^T lambda_{n+1} + (J_{n+1} - A)^T lambda_old_{n+1}``. With M >= L - 1 they are exact.

    Args:
        solution: the chain after :func:`forward_sweeps`.
        upstream: upstream gradients e_n = d loss / d s_n for n = 1 .. L; None where no loss is taken at s_n.
        iterations: M, and c: products that one iteration takes one after the other.
        observe: called with every i but 0, some positions of an adjoint at s_{i+1} and of its product, once for the last
            product that is taken there.
    """
    n_steps, approximation, chunk = len(solution.outputs), solution.approximation, iterations.chunk_size

    def add_upstream(b: Tensor) -> Tensor:
        for row, gradient in zip(b, upstream):
            if gradient is not None:
                row += gradient
        return b

    adjoints = add_upstream(solution.inputs[0].new_zeros((n_steps, *solution.inputs[0].shape)))
    if n_steps > 1:
        adjoints[:-1] = _scan(adjoints[:-1], _between(approximation, 1, n_steps), adjoints[-1], reverse=True)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for iteration in range(iterations.backward):
        high = n_steps - iteration * chunk  # products of transitions from here on were taken of final adjoints
        if high < 2:
            break
        b, read = _products(solution, upstream, adjoints[1:high], chunk)
        if observe is not None:
            seen |= {i: (LowRankFit.sample(m), LowRankFit.sample(p)) for i, m, p in zip(range(1, high), read, b)}
        inner = _between(approximation, 1, high)
        b = add_upstream(_subtract(b, inner, read))
        adjoints[: high - 1] = _scan(b, inner, adjoints[high - 1], reverse=True)
    for i, (adjoint, product) in seen.items():
        observe(i, adjoint, product)
    return list(adjoints.unbind(0))


def _products(solution: Solution, upstream: Sequence[Tensor | None], old: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """``J_{n+1}^T lambda_{n+1}`` of all transitions but the first [R, ...], and the adjoints of which they were taken: the
    last one of each chunk of transitions is an old one, the others come from the products behind them."""
    read = old if chunk == 1 else old.clone()
    n_rows, products = len(old), [old] * len(old)
    for q in range(min(chunk, n_rows)):
        rows = range(n_rows - 1 - q, -1, -chunk)
        outputs, inputs = ([tensors[r + 1] for r in rows] for tensors in (solution.outputs, solution.inputs))
        for r, product in zip(rows, torch.autograd.grad(outputs, inputs, [read[r] for r in rows], retain_graph=True)):
            products[r] = product
            if r > 0 and q + 1 < chunk:
                read[r - 1] = product if upstream[r] is None else product + upstream[r]
    return torch.stack(products), read


# --------------------------------------------------------------------------------------------------- composition


def _between(approximation: Approximation, low: int, high: int | None) -> Approximation:
    """That of the transitions low .. high - 1."""
    if isinstance(approximation, LowRankMaps):
        return approximation.between(low, high)
    return approximation[low:high] if isinstance(approximation, Tensor) else approximation


def _scan(b: Tensor, approximation: Approximation, initial: Tensor, *, reverse: bool = False) -> Tensor:
    """``s_n = A_n s_{n-1} + b_n`` for all n."""
    scan = low_rank_scan if isinstance(approximation, LowRankMaps) else affine_scan
    return scan(b, approximation, initial, reverse=reverse)


def _compose(outputs: Sequence[Tensor], inputs: Sequence[Tensor], approximation: Approximation) -> list[Tensor]:
    """States of ``sbar_n = f_n(s_{n-1}) + A_n (sbar_{n-1} - s_{n-1})``, the first input being exact."""
    if isinstance(approximation, float) and approximation == 0.0:
        return list(outputs)
    b = _subtract(torch.stack(list(outputs)), approximation, inputs)
    return list(_scan(b, approximation, inputs[0]).unbind(0))


def _subtract(b: Tensor, approximation: Approximation, states: Sequence[Tensor] | Tensor) -> Tensor:
    """``b - A s``, row by row in place."""
    if isinstance(approximation, Tensor):
        for row, diagonal, s in zip(b, approximation, states):
            row.addcmul_(diagonal, s, value=-1.0)
    elif approximation != 0.0:
        for n, (row, s) in enumerate(zip(b, states)):
            row.sub_(s)
            if isinstance(approximation, LowRankMaps):
                row.sub_(approximation.branch(n, s))
    return b


def _residual(old: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
    change = sum((n.float() - o.float()).square().sum() for o, n in zip(old, new))
    size = sum(n.float().square().sum() for n in new)
    return (change / size.clamp(min=1e-30)).sqrt()
