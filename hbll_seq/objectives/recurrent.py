"""Training objectives of recurrent models: local losses from adjoints along time, the paper's tree, and the baselines.

As in ``base.py`` an objective is a module around the model whose forward returns one loss to call ``backward`` on.
A recurrent model also returns the state to carry into the next window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hbll_seq.chains.time import TimeChain, TimeRows
from hbll_seq.distributed.blocks import largest_chunk
from hbll_seq.distributed.placement import RankPlacement
from hbll_seq.distributed.ranks import ALONE, Ranks
from hbll_seq.engine.gradients import hooks_left_out, inject_gradients
from hbll_seq.engine.linearization.shared_matrix import SharedMatrix, SharedMatrixFit
from hbll_seq.engine.placement import HERE
from hbll_seq.engine.solve import Solution
from hbll_seq.models.recurrent import RecurrentModel
from hbll_seq.objectives.control import FidelityControl
from hbll_seq.objectives.options import Inference, Sweeps, TimeTree, TreeGuess
from hbll_seq.objectives.recurrent_base import RecurrentObjective, RecurrentOutput, last_state, nats_of
from hbll_seq.objectives.registry import TIME_INFERENCES, parse_inference
from hbll_seq.objectives.sweeps import output_loss, sweep
from hbll_seq.utils.seeds import fork_rng_of
from hbll_seq.utils.values import as_whole


class RecurrentBackpropObjective(RecurrentObjective):
    """The baselines: backpropagation through time by an explicit, unfused loop over the same cell.

    Args:
        model: see :class:`RecurrentObjective`.
        window: truncated BPTT: the state is detached after every ``window`` transitions, so the states stay exact and credit
            goes back 0 to ``window`` - 1 transitions; None goes back to h_0. With 1 it is :class:`RecurrentLocalObjective`
            with ``Zero()``, K = N - 1 and M = 0.

    Raises:
        ValueError: ``window`` is not a whole number of at least 1.
    """

    def __init__(self, model: RecurrentModel, *, window: int | None = None):
        super().__init__(model)
        self.window = None if window is None else as_whole("window", window, 1, remedy=", or None for no truncation")

    def _losses(self, x: Tensor, targets: Tensor, s0: Tensor, lengths: Tensor | None = None) -> RecurrentOutput:
        cell, state, states = self.model.cell, s0, []
        for projected in cell.project(self.model.symbols(x)).unbind(0):
            if self.window is not None and states and len(states) % self.window == 0:
                state = state.detach()
            state = cell.transition(state, projected)
            states.append(state)
        whole = torch.stack(states)
        loss = nats_of(self.model, whole, targets, lengths)
        return RecurrentOutput(loss, loss.unsqueeze(0), {"ce": loss.detach()}, last_state(whole.detach(), lengths))


class Span(NamedTuple):
    """Which steps of a sequence are here: those of number ``first`` to ``stop`` - 1, from 0, of ``n_steps``."""

    first: int
    stop: int
    n_steps: int


class RecurrentLocalObjective(RecurrentObjective):
    """Local losses: nothing is differentiated through more than one transition of the cell.

    :class:`Sweeps` (docs/method.md 2.2): K forward iterations, one differentiated call of the cell at all positions, M
    backward iterations, and the loss ``<sg lambda_n, a_n>`` of every position. What an adjoint carries is another matter: M
    iterations are truncated backpropagation through time, evaluated in parallel at approximate states, and with (K + 1) c and
    M c at least N the gradient of every parameter is that of :class:`RecurrentBackpropObjective`.

    With a :class:`TreeGuess`, a tree's states are the first estimate (docs/method.md 2.4). It has cells of its own, trained
    to agree with the chain, ``weight ||h_n - sg s_n||^2`` and the task loss of the frozen head, at even n; that touches
    neither cell, embedding nor head of the model.

    :class:`TimeTree` is the paper's HBLL-RNN (docs/method.md 1.5): task loss at the tree's states, arc losses against right
    parents, and a consistency stage (Eqs. 13-15) for the deployed cell, which is the tree's f_0.

    Args:
        model: see :class:`RecurrentObjective`.
        inference: a :class:`Sweeps`, its text such as ``"sweeps:forward=4,backward=3,linearization=shared_matrix"``, or a
            :class:`TimeTree`. The defaults of sweeps did best of few on text; longer memory needs more iterations, or
            another linearization (docs/choosing-options.md). The matrices of ``SharedMatrix`` are learned in training mode;
            those of adjoints are learned, and used, with 2 backward iterations or more.
        ranks: who shares the steps of a sequence. Every rank has the whole model and calls ``forward`` with the same batch
            and state, but evaluates its own segments of the sequence alone. Each gets their part of the loss; metrics are
            zero where it does not know them. So losses, metrics and the gradients of all parameters are those of one
            process once they are summed over the ranks (``distributed.gradients.reduce_gradients``). The state is the
            whole one on each.

    Attributes:
        inference: with every default written out.
        tree: of the inference; its cells are part of this module.
        secants: the fit of the matrices of ``SharedMatrix``; its buffers are part of this module's state.
        control: what K and M of sweeps follow, or None; likewise. Every forward in training is a step to it.
        placement: where the segments are; counts what is sent, with several ranks.

    Raises:
        ValueError: an argument is out of range, or does not fit the model, or cannot be spread over ranks. ``forward`` raises
            it for a sequence with fewer segments than ranks, or other ones than their shares.
    """

    def __init__(self, model: RecurrentModel, inference: Inference | str = "sweeps", *, ranks: Ranks = ALONE):
        super().__init__(model)
        inference = parse_inference(inference, TIME_INFERENCES)
        self.inference = inference.resolved("time") if isinstance(inference, Sweeps) else inference
        holder = inference.init if isinstance(inference, Sweeps) else inference
        self.tree = getattr(holder, "tree", None)
        self.secants: SharedMatrixFit | None = None
        if isinstance(self.inference, Sweeps) and isinstance(self.inference.linearization, SharedMatrix):
            self.secants = self._new_fit()
        self.control: FidelityControl | None = None
        if isinstance(self.inference, Sweeps) and self.inference.control is not None:
            self.control = FidelityControl(self.inference.control, self.inference.iterations, over_time=True)
        hidden_size = self.model.cell.hidden_size
        if self.tree is not None and self.tree.hidden_size != hidden_size:
            raise ValueError(f"a tree of hidden_size={self.tree.hidden_size} with a cell of {hidden_size}: must be the same")
        self.ranks, self.placement = ranks, HERE
        if ranks.n_ranks > 1:
            self._check_can_be_spread()
            self.placement = RankPlacement(ranks)

    def _check_can_be_spread(self) -> None:
        """Raises ValueError for what needs the whole sequence on one rank."""
        given, remedy = f"{self.ranks.n_ranks} ranks with ", "use fixed sweeps and another init, or one rank"
        if isinstance(self.inference, TimeTree):
            raise ValueError(f"{given}inference='tree': its cells span the whole sequence; use 'sweeps', or one rank")
        if self.tree is not None:
            raise ValueError(f"{given}init=TreeGuess(..): its cells span the whole sequence; {remedy}")
        if self.control is not None:
            raise ValueError(f"{given}a control: it compares gradients of the whole sequence; {remedy}")

    def _new_fit(self) -> SharedMatrixFit:
        """The matrices that are learned. Raises ValueError where nothing would be."""
        forward, cell = self.inference.forward, self.model.cell
        if forward < 1:
            raise ValueError(
                f"linearization='shared_matrix' with forward={forward}: it learns from what two iterations differ by, so it "
                "needs forward of at least 1; choose that, or 'diagonal'"
            )
        if not cell.has_recurrent_weight:
            raise ValueError(
                f"linearization='shared_matrix' with a {type(cell).__name__}: its Jacobian is diagonal, and nothing is left "
                "to learn; choose 'diagonal', which is exact"
            )
        return SharedMatrixFit(cell.hidden_size, forward, self.inference.backward)

    def _losses(self, x: Tensor, targets: Tensor, s0: Tensor, lengths: Tensor | None = None) -> RecurrentOutput:
        if isinstance(self.inference, TimeTree):
            return self._tree_step(self.model.symbols(x), targets, s0)
        span = self._span(x.shape[1])
        return self._sweep_step(self.model.symbols(x[:, span.first : span.stop]), targets, s0, lengths, span)

    def _span(self, n_steps: int) -> Span:
        """The steps that are here, of a sequence of so many. Raises ValueError where its segments do not fit the ranks."""
        n_ranks, iterations = self.ranks.n_ranks, self.inference.iterations
        size, n_segments = iterations.segments(n_steps)
        if n_segments < n_ranks:
            smaller = f"a chunk_size of at most {largest_chunk(n_steps, n_ranks)}, " if n_steps >= n_ranks else ""
            raise ValueError(
                f"sequences of {n_steps} steps with chunk_size={iterations.chunk_size} on {n_ranks} ranks: {n_segments} "
                f"segment{'s' * (n_segments != 1)}, and every rank needs one at least; give longer sequences, {smaller}"
                "or fewer ranks"
            )
        shares = self.ranks.shares
        if shares is not None and sum(shares) != n_segments:
            most = sum(shares) * size
            raise ValueError(
                f"sequences of {n_steps} steps with chunk_size={size} are {n_segments} segments, and shares={shares} "
                f"are {sum(shares)}; give sequences of {most - size + 1} to {most} steps, or ranks without shares"
            )
        own = self.placement.own(n_segments)
        return Span(own.start * size, min(own.stop * size, n_steps), n_steps)

    # ------------------------------------------------------------------------------------------------------ sweeps

    def _sweep_step(
        self, symbols: Tensor, targets: Tensor, s0: Tensor, lengths: Tensor | None, span: Span
    ) -> RecurrentOutput:
        cell, keep_graph, control = self.model.cell, torch.is_grad_enabled(), self.control
        is_step = keep_graph and self.training
        has_probe = control is not None and is_step and control.begin_step()
        inference = self.inference if control is None else control.applied(self.inference)
        projected, estimate = cell.project(symbols), None
        if isinstance(inference.init, TreeGuess):
            estimate = self.tree.states(cell, symbols.detach(), s0.detach(), own_only=True)
        learn = self.secants is not None and is_step
        solve = partial(self._solve, projected, targets, s0, lengths, span)
        solution, adjoints, loss = solve(inference, estimate, learn)
        metrics = {"ce": loss.detach()}
        if inference.forward > 0:
            metrics["residual"] = solution.residual if self.ranks.rank == 0 else torch.zeros_like(solution.residual)
        if control is not None:
            if has_probe:
                self._probe(solve, solution.linearized, adjoints, inference)
            if is_step:
                control.end_step(solution.residual)
            metrics.update(control.metrics())
        last = self._last(solution.states.detach(), lengths, span)
        if adjoints is None:
            return RecurrentOutput(loss, loss.unsqueeze(0), metrics, last)
        if learn:
            self.secants.end_step()
        rows = solution.linearized
        losses = [loss + inject_gradients([rows.attached], [adjoints])]
        if s0.requires_grad:
            by_s0 = torch.zeros_like(s0) if span.first else rows.vjp(slice(0, 1, 1), adjoints[:1])[0]
            losses[0] = losses[0] + inject_gradients([s0], [by_s0])
        if estimate is not None:
            losses.append(self._tree_agreement(estimate, solution.states, targets))
            metrics["tree"] = losses[-1].detach()
        return RecurrentOutput(sum(losses), torch.stack(losses), metrics, last)

    def _solve(
        self, projected: Tensor, targets: Tensor, s0: Tensor, lengths: Tensor | None, span: Span, inference: Sweeps,
        estimate: Tensor | None = None, learn: bool = False,
    ) -> tuple[Solution, Tensor | None, Tensor]:  # fmt: skip
        """The chain after its iterations, its adjoints (None where gradients are disabled), and the loss, which trains the
        head."""
        keep_graph, iterations = torch.is_grad_enabled(), inference.iterations
        found: list[Tensor] = []  # the states, and the loss at them

        def read_out(states: Tensor) -> Tensor | None:
            read, upstream = states.detach().requires_grad_(keep_graph), None
            if self.placement.is_spread:
                loss = self.model.nats_of_part(read, targets, span.first, span.n_steps, lengths)
            else:
                loss = nats_of(self.model, read, targets, lengths)
            if keep_graph:
                loss, upstream = output_loss(loss, read, self.model)
            found.extend((states, loss))
            return upstream

        init = "input" if inference.init == "state" or estimate is not None else inference.init  # s_0 everywhere
        start = None if estimate is None else estimate.detach()[:-1]
        learned = self.secants if isinstance(inference.linearization, SharedMatrix) else None
        chain = TimeChain(self.model.cell, projected, iterations.clip, keep_graph,
                          placement=self.placement, n_steps=span.n_steps, first=span.first)  # fmt: skip
        rows, residual, adjoints = sweep(
            chain, s0, iterations, read_out, init=init, start=start, learned=learned, learn=learn
        )
        states, loss = found
        return Solution(rows, states, residual), adjoints, loss

    def _last(self, states: Tensor, lengths: Tensor | None, span: Span) -> Tensor:
        """The state [B, H] after the last real step; of the states that are here."""
        if not self.placement.is_spread:
            return last_state(states, lengths)
        n_rows, rows = states.shape[1], torch.arange(states.shape[1], device=states.device)
        ends = torch.full((n_rows,), span.n_steps) if lengths is None else lengths
        at = ends.to(states.device) - 1 - span.first
        is_here = (at >= 0) & (at < len(states))
        own = states[at.clamp(0, len(states) - 1), rows]
        return self.placement.total(own.masked_fill(~is_here[:, None], 0.0))

    def _probe(self, solve: Callable[..., tuple], rows: TimeRows, adjoints: Tensor, inference: Sweeps) -> None:
        """Compares the gradient of the cell with exact ones; nothing learns from it."""
        n_steps = len(adjoints)
        parameters = [p for p in self.model.cell.parameters() if p.requires_grad]
        if not parameters:
            return

        def of_cell(rows: TimeRows, adjoints: Tensor) -> list[Tensor | None]:
            with hooks_left_out(parameters):
                return list(torch.autograd.grad(rows.attached, parameters, adjoints, retain_graph=True, allow_unused=True))

        def gradient(inference: Sweeps) -> list[Tensor | None]:
            with fork_rng_of(adjoints):
                solution, found, _ = solve(inference)
            return of_cell(solution.linearized, found)

        exact = Sweeps(0, 1, n_steps, "zero", "state").resolved("time")  # one segment, which is walked
        at = lambda forward, backward: gradient(replace(inference, forward=forward, backward=backward))
        self.control.probe(n_steps, of_cell(rows, adjoints), gradient(exact), at)

    def _tree_agreement(self, estimate: Tensor, states: Tensor, targets: Tensor) -> Tensor:
        """Loss of the tree's own cells: at even n, since odd n are the deployed cell's (docs/method.md 2.4)."""
        own = self.tree.own_states(len(states)).to(states.device)
        if not own.any():
            return estimate.sum() * 0.0
        agreement = (estimate - states)[own].square().sum(-1).mean()
        loss = self.inference.init.weight * agreement * self.model.target_family.any_scored(targets)
        if self.model.readout == "every":  # the head says what matters in a state, and is not trained by it
            read = estimate[own].detach().requires_grad_(True)
            ce = self.model.nats(read, targets[:, own])
            (upstream,) = torch.autograd.grad(ce, read)
            loss = loss + ce.detach() + inject_gradients([estimate[own]], [upstream])
        return loss

    # -------------------------------------------------------------------------------------------------------- tree

    def _tree_step(self, symbols: Tensor, targets: Tensor, s0: Tensor) -> RecurrentOutput:
        cell, inference = self.model.cell, self.inference
        states, arcs = self.tree.states_and_arcs(cell, symbols, s0)
        ce = self.model.nats(states, targets)
        any_scored = self.model.target_family.any_scored(targets)
        losses = [ce, inference.arc_weight * arcs * any_scored]
        metrics = {"ce": ce.detach(), "state": arcs.detach()}
        if inference.consistency > 0:
            consistency = self.tree.consistency(cell, symbols, s0, states, inference.consistency)
            losses.append(inference.consistency_weight * consistency * any_scored)
            metrics["consistency"] = losses[-1].detach()
        return RecurrentOutput(sum(losses), torch.stack(losses), metrics, states[-1].detach())
