"""Parallel solution of a chain: K forward iterations and M backward ones (docs/method.md 2.2).

A chain s_n = f_n(s_{n-1}), n = 1 .. N, is cut into segments of c transitions, the last of which may be a short one. A pass
walks all segments side by side, the c transitions of each one after the other, from the present estimates of the states at
their beginnings. Then a scan composes what the walks ended in with what approximates the segments' Jacobians
(``linearization/``), which makes the next estimates. After K iterations without gradient comes the pass whose calls are
differentiated, each on its own; then the adjoints go back, segment by segment, in the same way.

What is exact is not computed again. After k iterations the first k segments begin exactly, so that the next one leaves them
out; where calls are few and large (``keeps_calls``) their calls are already the differentiated ones. The same holds for
adjoints from the end. With (K + 1) c and (M + 1) c at least N the whole scheme is backpropagation, evaluated in parallel.
Below, it is an approximation that truncates.

Shapes: N transitions, S segments of c; states are [...]. Row i of a stacked tensor belongs to transition i + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hbll_seq.engine.chain import Chain, Linearized
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization.base import Composer, Diagonal, Walk
from hbll_seq.engine.placement import overlap
from hbll_seq.engine.scan import affine_scan


class Solution(NamedTuple):
    """A chain after its forward iterations.

    Attributes:
        linearized: its differentiated calls.
        states: s_1 .. s_N, [N, ...], as one more composition makes them of these calls, detached: what losses are taken at.
            Where segments are spread, those of the ones that are here.
        residual: root mean square of the last iteration's change of the states at which segments begin, relative to theirs; 0
            where all states are exact.
    """

    linearized: Linearized
    states: Tensor
    residual: Tensor


@torch.no_grad()
def solve(
    chain: Chain,
    s0: Tensor,
    iterations: Iterations,
    *,
    init: str = "input",
    start: Tensor | None = None,
    learned: Composer | None = None,
    learn: bool = False,
) -> Solution:
    """K parallel iterations without gradient, then the differentiated call of every transition (iteration K + 1).

    Args:
        chain: the transitions.
        s0: [...], what the first one reads.
        iterations: K, c and how it is iterated.
        init: first estimate of the states: ``"input"`` (s_0 everywhere), ``"zeros"``, ``"first"`` (f_1(s_0) everywhere, in a
            call that is kept: for chains that keep calls, whose first transition changes the state most, method.md 2.6), or
            ``"diagonal"``: one quasi-Newton iteration of single transitions from s_0 (one call; makes a state exact).
        start: [N - 1, ...], first estimate of s_1 .. s_{N-1}; goes before ``init``.
        learned: the learned maps of the linearization, where it has some.
        learn: they also learn from these iterations.

    Raises:
        ValueError: the linearization asks for diagonals that the chain does not tell, or for learned maps that are not given;
            or maps are given to one that has none.
    """
    run = _Forward(chain, s0, iterations, iterations.composer(learned), learn)
    run.begin(init, start)
    for number in range(iterations.forward):
        if run.is_exact:
            break
        run.iterate(number)
        if iterations.tolerance > 0 and run.residual.item() <= iterations.tolerance:
            break
    return run.finish()


class _Forward:
    """A run of :func:`solve`: what it knows so far.

    Attributes:
        low: the segments before this one begin exactly, and so does it.
        exact: [1, ...] each, the states that the segments before ``low`` begin with.
        starts: [S - low, ...], the present estimate of those that the other segments begin with; never written to. Where all
            are one state, [1, ...].
        n_called: from the first on so many transitions have had their differentiated call.
        residual: of the last iteration.
        seen: what iterations walked, for the learned maps.
    """

    def __init__(self, chain: Chain, s0: Tensor, iterations: Iterations, composer: Composer, learn: bool):
        if composer.needs_diagonal and not chain.has_diagonal:
            raise ValueError(
                "linearization='diagonal': these transitions do not tell the diagonal of their Jacobian (gated recurrent "
                "cells do); use 'identity' or 'zero'"
            )
        self.chain, self.iterations, self.composer, self.learn = chain, iterations, composer, learn
        self.size, self.n_segments = iterations.segments(chain.n_steps)
        self.placement, self.own = chain.placement, chain.placement.own(self.n_segments)
        self.linearized = chain.linearize(s0, self.size)
        self.starts, self.low, self.n_called = s0.detach()[None], 0, 0
        self.exact: list[Tensor] = []
        self.residual = s0.new_zeros(())
        self.seen: list[Walk] = []

    @property
    def is_exact(self) -> bool:
        """Whether the differentiated calls that are still to come will read exact states alone."""
        return self.low >= self.n_segments - 1

    @property
    def needs_no_estimate(self) -> bool:
        """Whether the iterations are enough for every segment to begin exactly in its turn, so that nothing is made of a walk
        from an estimate, and nobody learns from it."""
        iterations, later = self.iterations, slice(self.low * self.size, self.chain.n_steps)
        return (
            iterations.forward >= self.n_segments - 1
            and iterations.damping == 1.0  # else no iteration makes a state exact
            and self.size > 1
            and iterations.tolerance == 0
            and not self.learn
            and not self.chain.remembers(later)
        )

    def begin(self, init: str, start: Tensor | None) -> None:
        """The first estimate."""
        n_later = self.n_segments - 1
        if self.placement.is_spread and self.needs_no_estimate:
            return  # nobody waits for a first estimate
        if start is None and init == "zeros":
            start = torch.zeros_like(self.starts).expand(max(1, self.chain.n_steps - 1), *self.starts.shape[1:])
        if start is not None:
            self._estimate(start[self.size - 1 :: self.size][:n_later])
        elif init == "first":
            if not self.chain.keeps_calls:
                raise ValueError("init='first': this chain calls all its segments together; choose 'input' or 'diagonal'")
            made = self._call(slice(0, 1), self.starts) if 0 in self.own else self.starts[:0]
            if self.placement.is_spread:
                self.n_called, made = 1, self.placement.exchange(made, range(1), self.n_segments)
            self._estimate(made.expand(n_later, *made.shape[1:]), is_exact=self.size == 1)
        elif init == "diagonal" and self.placement.is_spread:
            self._estimate(self._diagonal_ends(n_later), is_exact=self.size == 1)
        elif init == "diagonal" and self.chain.n_steps > 1:
            made, diagonal = self.chain.apply_with_diagonal(slice(0, self.chain.n_steps - 1), self.starts)
            states = Diagonal().compose(Walk(self.starts.expand_as(made), made, product=diagonal))
            self._estimate(states[self.size - 1 :: self.size][:n_later], is_exact=self.size == 1)

    def _diagonal_ends(self, n_later: int) -> Tensor:
        """One quasi-Newton iteration of single transitions from s_0: the states [S - 1, ...] with which segments begin. Only
        those transitions that are here are called; of the others the segments' ends are told."""
        own, size = overlap(self.own, range(n_later)), self.size
        ended = product = self.starts[:0]
        if own:
            made, diagonal = self.chain.apply_with_diagonal(slice(own.start * size, own.stop * size), self.starts)
            change = made.unflatten(0, (len(own), size)) - self.starts
            walked = affine_scan(change.transpose(0, 1), diagonal.unflatten(0, (len(own), size)).transpose(0, 1))
            ended, product = self.starts + walked[-1], _products(diagonal, size)[-1]
        ended, product = self._exchange((ended, product), range(n_later))
        return Diagonal().compose(Walk(self.starts.expand_as(ended), ended, product=product))

    def iterate(self, number: int) -> None:
        """Iteration ``number``, from 0: walks all segments that can still change and composes what they end in."""
        iterations, n_later = self.iterations, self.n_segments - 1 - self.low
        is_plain, n_done = iterations.damping == 1.0, 0
        is_last = number == iterations.forward - 1 or (is_plain and n_later == 1)
        if self.chain.keeps_calls and is_plain:  # the first of them begins exactly: its differentiated calls can be made
            first, n_done = self._call_segment(self.low), 1
            if self.needs_no_estimate:
                self._estimate(self.placement.pass_on(first, self.low, self.low + 1, self.n_segments), is_exact=True)
                return
        # The last segment's end is not needed.
        last = slice((self.n_segments - 1) * self.size, self.chain.n_steps)
        walks_last = self.chain.remembers(last) or (self.learn and is_last and self.composer.wants_last)
        begun = self.starts[n_done:] if len(self.starts) > 1 else self.starts
        walked = range(self.low + n_done, self.n_segments - (not walks_last))
        begun, ended, product = self._walk(begun, walked)
        if self.learn and walked:
            here = overlap(self.own, walked).start
            self.seen.append(self.composer.sample(Walk(begun.expand_as(ended), ended, here, number)))
        if n_done:
            ended = torch.cat((first, ended))
            product = product if product is None else torch.cat((torch.ones_like(first), product))
        if self.placement.is_spread:
            ended, product = self._exchange((ended, product), range(self.low, walked.stop))
        old = self.starts.expand(n_later + 1, *self.starts.shape[1:])
        walk = Walk(old[:n_later], ended[:n_later], self.low, number, product=None if product is None else product[:n_later])
        new, old = self.composer.compose(walk), old[1:]
        if iterations.tolerance > 0 or is_last:
            self.residual = torch.linalg.vector_norm(new - old) / torch.linalg.vector_norm(new).clamp(min=1e-30)
        self._estimate(new if is_plain else old.lerp(new, iterations.damping), is_exact=is_plain)

    def finish(self) -> Solution:
        """The differentiated calls of all transitions that have none yet, and what follows of them."""
        if self.is_exact:
            self.residual = torch.zeros_like(self.residual)
        low, size, n_segments = self.low, self.size, self.n_segments
        starts = self.starts.expand(n_segments - low, *self.starts.shape[1:])
        every = torch.cat((*self.exact, starts)) if self.exact and (self.learn or not self.chain.keeps_calls) else starts
        if not self.chain.keeps_calls:
            low, starts = 0, every
        elif self.n_called > low * size:  # the first transition alone
            self._call_segment(low)
            low, starts = low + 1, starts[1:]
        own = overlap(self.own, range(low, n_segments))
        state = starts[own.start - low : own.stop - low]
        for p in range(size if own else 0):
            state = self._call(slice(own.start * size + p, own.stop * size, size), state)
        outputs = self.linearized.outputs
        ended = outputs[size - 1 :: size]
        if len(ended) < len(self.own):  # the last segment is a short one
            ended = torch.cat((ended, outputs[-1:]))
        if self.learn and self.seen:
            begun = every[self.own.start : self.own.stop]
            last = Walk(begun, ended, self.own.start, self.iterations.forward)
            self.composer.observe([*self.seen, self.composer.sample(last)], self.placement)
        states = outputs
        if self.composer.carries_inside and not self.is_exact:
            later = range(self.low, n_segments)
            ended = ended[overlap(self.own, later).start - self.own.start :]
            states = self._compose_all(every[-len(later) :], outputs, ended)
        return Solution(self.linearized, states, self.residual)

    def _compose_all(self, begun: Tensor, outputs: Tensor, ended: Tensor) -> Tensor:
        """s_1 .. s_N of one more composition, of the segments from ``low`` on [S - low, ...]; those that are here. ``ended``
        is of these."""
        size, states, later = self.size, outputs.clone(), range(self.low, self.n_segments)
        composed = overlap(self.own, later)
        moved = overlap(self.own, later[1:])  # whose beginning changes
        first = (moved.start - self.own.start) * size
        products = whole = None
        if self.composer.needs_diagonal:
            rows = slice((composed.start - self.own.start) * size, len(outputs))
            products = _products(self.linearized.diagonal()[rows], size)
            whole = products[-1]
            if len(whole) < len(ended):
                whole = torch.cat((whole, products[(len(outputs) - 1) % size][-1:]))
        if self.placement.is_spread:
            ended, whole = self._exchange((ended, whole), later)
        new = self.composer.compose(Walk(begun, ended, self.low, self.iterations.forward, product=whole))
        n_fixed = moved.start - composed.start
        change = (new[:-1] - begun[1:])[moved.start - self.low - 1 :]
        for p in range(size - 1):
            inside = states[first + p :: size]
            n_inside = len(inside)
            inside += self.composer.carry(change[:n_inside], products and products[p][n_fixed : n_fixed + n_inside])
        ends = states[(composed.start - self.own.start) * size + size - 1 :: size]
        ends[:] = new[composed.start - self.low :][: len(ends)]
        if self.own.stop == self.n_segments:
            states[-1] = new[-1]
        return states

    def _estimate(self, later: Tensor, is_exact: bool = False) -> None:
        """Takes new estimates of the states with which the segments behind ``low`` begin; with ``is_exact`` the first of them
        is."""
        if is_exact:
            if self.learn or not self.chain.keeps_calls:  # nobody else asks for them
                self.exact.append(self.starts[:1])
            self.low, self.starts = self.low + 1, later
        else:
            self.starts = torch.cat((self.starts[:1], later))

    def _exchange(self, own: tuple[Tensor, Tensor | None], segments: range) -> tuple[Tensor, Tensor | None]:
        """What some segments end in and the products along them, of all from those that are here, by one exchange."""
        if own[1] is None:
            return self.placement.exchange(own[0], segments, self.n_segments), None
        return self.placement.exchange(torch.stack(own, 1), segments, self.n_segments).unbind(1)

    def _walk(self, begun: Tensor, segments: range) -> tuple[Tensor, Tensor, Tensor | None]:
        """Walks those of some segments that are here, from the states ``begun`` of all of them (or one state for all): where
        they begin, what they end in, and the product of the diagonals along each, where it is asked for."""
        own = overlap(self.own, segments)
        begun = begun[own.start - segments.start : own.stop - segments.start] if len(begun) > 1 else begun[: len(own)]
        state, product = begun, None
        if not own:
            return begun, begun[:0], begun[:0] if self.composer.needs_diagonal else None
        for p in range(self.size):
            rows = slice(own.start * self.size + p, own.stop * self.size, self.size)
            if self.composer.needs_diagonal:
                state, diagonal = self.chain.apply_with_diagonal(rows, state)
                product = diagonal if product is None else product * diagonal
            else:
                state = self.chain.apply(rows, state)
        return begun, state, product

    def _call(self, rows: slice, states: Tensor) -> Tensor:
        made = self.linearized.call(rows, states)
        self.n_called += len(made)
        return made

    def _call_segment(self, number: int) -> Tensor:
        """The differentiated calls of a segment that begins exactly, one after the other: what it ends in, [1, ...], or
        nothing, [0, ...], where it is not here."""
        first = number * self.size
        if number not in self.own:
            self.n_called = min(first + self.size, self.chain.n_steps)
            return self.starts[:0]
        # A copy: what is read lives long, and would keep alive the whole estimate that it is a row of.
        state = self.starts[:1].clone() if self.n_called == first else self.linearized.output(self.n_called - 1)[None]
        for row in range(max(first, self.n_called), min(first + self.size, self.chain.n_steps)):
            state = self._call(slice(row, row + 1), state)
        return state


def _products(diagonal: Tensor, size: int) -> list[Tensor]:
    """Of diagonals [N, ...] of segments of ``size``: the product from the beginning of a segment to each of its rows."""
    products = [diagonal[::size]]
    for p in range(1, size):
        here = diagonal[p::size]
        products.append(products[-1][: len(here)] * here)
    return products
