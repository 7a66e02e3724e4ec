"""The adjoints of a chain: M backward iterations over its segments (docs/method.md 2.2).

They go as the forward ones do (``solve.py``), from the last segment to the first. A walk takes products with the transposed
Jacobians, from the adjoint at a segment's end to the one at its beginning; a scan composes what the walks ended in. After m
iterations the adjoints of the last m segments are exact.

Where a product can make the gradients of the transition's parameters too (``makes_gradients``), a segment's last walk is also
the one that makes them: an exact segment's the one that shows it exact, that of all others one behind the M iterations. With
c = 1 a walk ends where it begins: nothing would be saved, and the gradients are left to the backward call of the step.
Where other ranks wait for what a walk ends in, the gradients come behind it (``weights_later.py``).

Shapes: N transitions, S segments of c; states are [...]. Row i of a stacked tensor belongs to transition i + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hbll_seq.engine.chain import Jacobians
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization.base import Composer, Walk
from hbll_seq.engine.placement import overlap


@torch.no_grad()
def solve_adjoint(
    jacobians: Jacobians,
    upstream: Tensor,
    iterations: Iterations,
    *,
    learned: Composer | None = None,
    learn: bool = False,
) -> Tensor:
    """Adjoints lambda_1 .. lambda_N [N, ...] of a loss on the states: a first estimate, then M iterations.

    Where ``jacobians`` make gradients and segments are longer than one transition, those of all parameters are made too,
    from the adjoints that are returned.

    Args:
        jacobians: such as the ``linearized`` of a :class:`hbll_seq.engine.solve.Solution`.
        upstream: [N, ...], upstream gradients e_n = d loss / d s_n for n = 1 .. N; zero where no loss is taken at s_n. It may
            be overwritten. Where segments are spread, of those that are here, as are the adjoints.
        iterations: M, c and the linearization.
        learned, learn: see :func:`solve`.

    Raises:
        ValueError: see :func:`solve`.
    """
    run = _Backward(jacobians, upstream, iterations, iterations.composer(learned), learn)
    n_before = iterations.backward if run.is_fused else max(0, iterations.backward - 1)
    for number in range(n_before):
        if run.high == 1 or run.is_guess:
            break
        run.iterate(number)
    return run.finish(n_before)


class _Backward:
    """A run of :func:`solve_adjoint`: what it knows so far.

    Attributes:
        high: the segments from this one on are done: their adjoints are final.
        adjoints: [S c, ...], those of these segments, and the upstream gradients of the others; of the ones that are here.
        ends: [high, ...], the present estimate of the adjoints at the segments' ends; the last of them is exact, and stands
            alone where the others need no estimate.
        seen: what iterations walked, for the learned maps.
    """

    def __init__(self, jacobians: Jacobians, upstream: Tensor, iterations: Iterations, composer: Composer, learn: bool):
        self.jacobians, self.iterations, self.composer, self.learn = jacobians, iterations, composer, learn
        self.placement, self.is_fused = jacobians.placement, jacobians.makes_gradients
        self.n_own, n_steps = len(upstream), jacobians.n_steps if jacobians.placement.is_spread else len(upstream)
        self.size, self.n_segments = iterations.segments(n_steps)
        self.high, self.own = self.n_segments, self.placement.own(self.n_segments)
        self.walks_make_gradients = self.is_fused and (self.size > 1 or n_steps == 1)
        self.leaves_gradients = self.walks_make_gradients and jacobians.leaves_gradients
        self.diagonal = jacobians.diagonal() if composer.needs_diagonal else None
        # A guess of diagonal Jacobians leaves nothing to correct.
        is_diagonal = composer.needs_diagonal and jacobians.is_diagonal
        self.is_guess = not self.is_fused and (is_diagonal or iterations.backward == 0)
        # With enough iterations every segment's adjoint is exact in its turn: nothing would be made of an estimate.
        self.needs_no_estimate = self.walks_make_gradients and iterations.backward >= self.high - 1 and not learn
        self.adjoints, n_missing = upstream, len(self.own) * self.size - self.n_own
        if n_missing:  # nothing comes back from behind the end
            self.adjoints = torch.cat((upstream, upstream.new_zeros((n_missing, *upstream.shape[1:]))))
        self.ends, self.upstream_ends = self.adjoints[-1:].clone(), None  # the first is of use where the last segment is
        if not self.needs_no_estimate and self.placement.is_spread:
            own_ends = self.adjoints[self.size - 1 :: self.size]
            if composer.is_rowwise:  # nobody here will read those of others
                self.ends = own_ends.new_zeros((self.high, *own_ends.shape[1:]))
                self.ends[self.own.start : self.own.stop] = own_ends
                self.upstream_ends = self.ends.clone()
            else:
                parts = self.adjoints, self.diagonal
                told = composer.told(*(t if t is None else t.unflatten(0, (-1, self.size)) for t in parts))
                told = self.placement.exchange(told, range(self.high), self.high)
                self.upstream_ends, self.ends = told[:, 0], composer.guess_ends(told)
            if self.is_guess:
                known = torch.cat((upstream[:-1], self.ends[self.own.stop - 1 : self.own.stop]))
                self.guess = composer.guess(known if self.own.stop < self.high else upstream, self.diagonal, self.size)
        elif not self.needs_no_estimate:
            guess = composer.guess(upstream, self.diagonal, self.size)
            self.ends = torch.cat((guess[self.size - 1 :: self.size][: self.high - 1], self.ends))
            self.guess = None if self.is_fused else guess
        self.pure = None
        if learn and self.size > 1 and not self.placement.is_spread:
            inside = self.adjoints.unflatten(0, (self.high, self.size))[1:, :-1]
            self.pure = inside.flatten(1).any(1).logical_not()
        self.seen: list[Walk] = []

    def iterate(self, number: int) -> None:
        """Iteration ``number``, from 0: walks all segments but the first one back. That ends the last one's part in it."""
        last, before = self.high - 1, self.high - 2
        if last in self.own:
            self.adjoints[self._row(last)] = self.ends[-1]
        if self.needs_no_estimate:
            self._pass_back(last, before)
        else:
            ended, products = self._walk(range(1, self.high), n_final=1, exchanges=True)
            self.ends = self._exchange(ended, products, number)
            self.jacobians.make_gradients()
        self.high -= 1

    def _pass_back(self, last: int, before: int) -> None:
        """Walks the segment ``last``, whose adjoint is exact, and gives the one ``before`` it what it ends in. Where that one
        is elsewhere it does not wait for the gradients of parameters."""
        waits_elsewhere = self.placement.is_spread and last in self.own and before not in self.own
        walks_again = waits_elsewhere and not self.jacobians.leaves_gradients
        ended, _ = self._walk(range(last, self.high), n_final=0 if walks_again else 1, exchanges=True)
        ended = self.placement.pass_on(ended, last, before, self.n_segments)
        if walks_again:
            self._walk(range(last, self.high), n_final=1, exchanges=False)
        elif waits_elsewhere:
            self.jacobians.make_gradients()
        if before in self.own:
            self.ends = ended + self.adjoints[self._row(before)]

    def _row(self, segment: int) -> int:
        """The row in ``adjoints`` of a segment's end."""
        return (segment - self.own.start) * self.size + self.size - 1

    def finish(self, number: int) -> Tensor:
        """The last walk: the adjoints of all segments that are not done yet."""
        high, size = self.high, self.size
        if self.is_guess:
            return self.guess
        exchanges = not self.is_fused and high > 1
        ended, products = self._walk(range(high), n_final=high, exchanges=exchanges)
        if exchanges:
            new = self._exchange(ended, products, number, composes=self.composer.carries_inside)
            if self.composer.carries_inside:
                change = new - self.ends[:-1]
                moved = overlap(self.own, range(high - 1))
                change = change[moved.start : moved.stop]
                for p, product in zip(range(size - 1 if moved else 0), reversed(products[:-1] or [None] * (size - 1))):
                    inside = self.adjoints[p : (moved.stop - self.own.start) * size : size]
                    inside += self.composer.carry(change, product if product is None else product[: len(moved)])
            self.ends = torch.cat((new, self.ends[-1:]))
        done = overlap(self.own, range(high))
        if done:
            self.adjoints[size - 1 : (done.stop - self.own.start) * size : size] = self._ends_of(done)
        if self.learn and self.seen:
            self.composer.observe(self.seen, self.placement)
        return self.adjoints[: self.n_own]

    def _ends_of(self, segments: range) -> Tensor:
        """The present estimates of the adjoints at the ends of some segments, the last of which may be the only one that has
        any."""
        first = self.high - len(self.ends)
        return self.ends[segments.start - first : segments.stop - first]

    def _walk(self, segments: range, n_final: int, exchanges: bool) -> tuple[Tensor, list[Tensor]]:
        """Walks those of some segments that are here back from their ends. The adjoints inside the last ``n_final`` of all of
        them are final.

        Returns:
            With ``exchanges`` what the segments from the second on ended in, without the upstream gradients there; and the
            products of the diagonals behind each of their steps, where they are asked for.
        """
        own = overlap(self.own, segments)
        if not own:
            return self.ends[:0], []
        size, low, stop, products = self.size, own.start, own.stop * self.size, []
        state, n_final = self._ends_of(own), len(overlap(own, range(segments.stop - n_final, segments.stop)))
        here = self.own.start * size  # the row that is the first of the adjoints
        for p in reversed(range(size)):
            first = low * size + p
            if p == 0 and not exchanges:
                if self.walks_make_gradients:
                    self.jacobians.vjp(slice(first, stop, size), state, n_final, wanted=False)
                break
            if p == 0 and low == 0:  # no segment waits for what the first one would send
                first, state, n_final = size, state[1:], min(n_final, len(state) - 1)
            rows = slice(first, stop, size)
            later = exchanges and self.leaves_gradients
            state = self.jacobians.vjp(rows, state, n_final if self.walks_make_gradients else 0, later=later)
            if self.diagonal is not None:
                diagonal = self.diagonal[first - here : stop - here : size]
                products.append(diagonal if not products else products[-1][-len(diagonal) :] * diagonal)
            if p > 0:
                before = self.adjoints[first - 1 - here : stop - 1 - here : size]
                # what autograd returns may be what it was given
                state = state + before if self.is_fused else state.add_(before)
                before[len(before) - n_final :] = state[len(before) - n_final :]
        return state, products

    def _exchange(self, ended: Tensor, products: list[Tensor], number: int, composes: bool = True) -> Tensor:
        """The adjoints [high - 1, ...] at the ends of all segments but the last, from what those behind them ended in."""
        high, size, mine = self.high, self.size, overlap(self.own, range(1, self.high))
        product = products[-1] if products else None
        if self.learn:
            pure = self.pure if self.pure is None else self.pure[: high - 1]
            walk = Walk(self._ends_of(mine), ended.clone(), mine.start, number, True, product, pure)
            self.seen.append(self.composer.sample(walk))
        if self.placement.is_spread and self.diagonal is not None:
            both = torch.stack((ended, ended if product is None else product), 1)
            ended, product = self.placement.exchange(both, range(1, high), self.n_segments).unbind(1)
        elif self.placement.is_spread:
            ended = self.placement.exchange(ended, range(1, high), self.n_segments)
        walk = Walk(self.ends[1:], ended, 1, number, True, product)
        before = self.adjoints[size - 1 : (high - 1) * size : size]
        if self.placement.is_spread:
            before = self.upstream_ends[: high - 1]
        ended = ended + before if self.is_fused else ended.add_(before)
        return self.composer.compose(walk._replace(ended=ended)) if composes else ended
