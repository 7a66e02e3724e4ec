"""Local losses of chains, over depth or time: states, upstream gradients, adjoints, and their losses (docs/method.md 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import compress

import torch
from torch import Tensor, nn

from hbll_seq.chains.depth import Prefix, number_of, prefixes
from hbll_seq.engine.adjoint import solve_adjoint
from hbll_seq.engine.calls import Calls
from hbll_seq.engine.chain import CallChain, CalledRows, Chain, Linearized
from hbll_seq.engine.gradients import hooks_left_out, inject_gradients, injected
from hbll_seq.engine.iterations import Iterations, one_walk
from hbll_seq.engine.linearization.base import Composer, Identity
from hbll_seq.engine.linearization.low_rank import LowRank, LowRankFit
from hbll_seq.engine.placement import HERE, Placement
from hbll_seq.engine.solve import Solution, solve
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.auxiliary import ExitsOfStep
from hbll_seq.objectives.base import Exit
from hbll_seq.objectives.branches import Branch, Leg, MainPath, exits_on, legs_of, upstream_of
from hbll_seq.objectives.depth_mix import SubNetwork
from hbll_seq.objectives.options import Sweeps, VCycles
from hbll_seq.tree.inference import tree_states
from hbll_seq.tree.multigrid import v_cycle


def sweep(
    chain: Chain,
    s0: Tensor,
    iterations: Iterations,
    read_out: Callable[[Tensor], Tensor | None],
    *,
    init: str = "input",
    start: Tensor | None = None,
    learned: Composer | None = None,
    learn: bool = False,
) -> tuple[Linearized, Tensor, Tensor | None]:
    """Solves a chain forward, takes the losses at its states, and solves it back.

    Args:
        read_out: the states s_1 .. s_N [N, ...] -> their upstream gradients, or None where nobody asks for any.
        chain, s0, iterations, init, start, learned, learn: see :func:`hbll_seq.engine.solve.solve`.

    Returns:
        The differentiated calls, the residual, and the adjoints [N, ...], or None without upstream gradients.
    """
    linearized, states, residual = solve(chain, s0, iterations, init=init, start=start, learned=learned, learn=learn)
    upstream = read_out(states)
    del states  # among the largest tensors of a step
    if upstream is None:
        return linearized, residual, None
    return linearized, residual, solve_adjoint(linearized, upstream, iterations, learned=learned, learn=learn)


def output_loss(loss: Tensor, read: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Differentiates the loss at the outputs once: the same value, attached to the head alone, and the upstream gradients of
    the states that it read.

    Args:
        loss: a scalar.
        read: the states, a leaf.
        model: whose parameters the head's are among.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with hooks_left_out(parameters):
        upstream, *gradients = torch.autograd.grad(loss, [read, *parameters], allow_unused=True)
    return loss.detach() + injected(parameters, gradients), upstream.contiguous()  # it is written to, and may be expanded


class DepthStep:
    """One training step over depth, sub-network by sub-network.

    Args:
        model: whose blocks are trained.
        calls: its blocks in this step.
        inference: resolved for depth.
        z0: [batch, ..., width], the embedded input; stays attached.
        targets: what the head is scored on.
        learned: maps that approximate the segments' Jacobians, if they are learned.
        keep_graph: whether there is to be a gradient; without one no adjoint is asked for.
        placement: where the segments of the main path are. Where they are spread, each rank takes the losses of the exits
            that lie on its own ones, and has zeros for those of others.

    Attributes:
        exits: of all sub-networks so far.
        auxiliary_exits: likewise, of the main path's.
    """

    def __init__(
        self,
        model: DepthHierarchy,
        calls: Calls,
        inference: Sweeps | VCycles,
        z0: Tensor,
        targets: Tensor,
        *,
        learned: LowRankFit | None,
        keep_graph: bool,
        placement: Placement = HERE,
    ):
        self.placement = placement
        self.model, self.calls, self.inference, self.z0, self.targets = model, calls, inference, z0, targets
        self.learned, self.keep_graph = learned, keep_graph
        self.exits: list[Exit] = []
        self.auxiliary_exits: list[Exit] = []
        self._losses: dict[int, Tensor] = {}
        self._gradients: dict[int, list[Tensor | None]] = {}
        self._by_z0: list[Tensor] = []

    def train(
        self,
        network: SubNetwork,
        branches: Sequence[Branch] = (),
        learn: bool | None = None,
        auxiliary: ExitsOfStep | None = None,
    ) -> Tensor:
        """Adds the losses of a sub-network and of the branches off it; its exits go before theirs.

        Args:
            network: solved as a chain.
            branches: solved as chains of one segment.
            learn: whether the learned maps learn from it; None leaves them out: blocks on other paths read other states.
            auxiliary: exits at the ends of its segments, those that have none of ``network``.

        Returns:
            The chain's residual.
        """
        path, tree, iterations = network.path, self.model.tree, self.inference.iterations
        size, n_segments = iterations.segments(len(path))
        passes_back = iterations.backward > 0 and size > 1  # a walk of one block ends where it begins
        chain = CallChain(self.calls, prefixes(path), self.keep_graph, self.placement, passes_back)
        own = self.placement.own(n_segments)
        main = MainPath(tuple(path), size, n_segments, own, self.placement)
        init, start = "first", None
        if isinstance(self.inference, VCycles):
            if len(path) == tree.n_nodes:
                start = v_cycle(self.calls, tree, self.z0, cycles=self.inference.cycles)
                iterations = replace(iterations, forward=0)
        elif self.inference.init == "tree":
            start = tree_states(self.calls, tree, path, self.z0)
        else:
            init = self.inference.init
        learned = None
        if isinstance(iterations.linearization, LowRank):
            if iterations.chunk_size == 1:
                learned = self.learned.of(path)
            elif learn is None:  # the maps are those of the main path's segments
                iterations = replace(iterations, linearization=Identity())
            else:
                learned = self.learned.of(range(1, 1 + iterations.segments(len(path))[1]))
        rows, residual, adjoints = sweep(
            chain,
            self.z0,
            iterations,
            lambda states: self._read_out(network, branches, states, main, auxiliary),
            init=init,
            start=torch.stack(start) if start else None,
            learned=learned,
            learn=bool(learn),
        )
        self._collect(chain.indices, rows, from_z0=True)
        if adjoints is not None:
            for row, output in rows.attached.items():  # whose gradients no walk has made
                self._add(path[row], inject_gradients([output], [adjoints[row - own.start * size]]))
        for n in path:  # each has a loss, also where it lies elsewhere
            self._add(n, 0.0)
        return residual

    @property
    def gradients(self) -> list[Tensor | None]:
        """Those of the blocks' parameters, block by block."""
        total = self.losses.sum()
        parameters = [p for n in sorted(self._losses) for p in self.calls.parameters(n)]
        with hooks_left_out(parameters):
            return list(torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True))

    @cached_property
    def losses(self) -> Tensor:
        """The losses of the trained blocks [n], in this order. Only that of an exit has a value other than zero. The
        gradients are the blocks' own, the head's with the last block of a path, the embedding's with the first one."""
        for n, gradients in self._gradients.items():
            self._add(n, injected(self.calls.parameters(n), gradients))
        if self._by_z0:
            self._add(min(self._gradients), injected([self.z0], [sum(self._by_z0)]))
        losses = torch.stack([self._losses[n] for n in sorted(self._losses)])
        if self.placement.is_spread and self.keep_graph and not losses.requires_grad:  # nothing is trained on this rank
            losses = losses.requires_grad_()
        return losses

    def _read_out(
        self,
        network: SubNetwork,
        branches: Sequence[Branch],
        states: Tensor,
        main: MainPath,
        auxiliary: ExitsOfStep | None,
    ) -> Tensor | None:
        """Walks the branches, takes the losses of all exits, and goes back along the branches: the upstream gradients of the
        chain's states, of the blocks that are here."""
        cut = [legs_of(branch, main.segment_of, main.together) for branch in branches]
        walked = [self._walk(branch, legs, states, main) for branch, legs in zip(branches, cut)]
        ends = exits_on(network.path, prefixes(network.path), network.exits, main.here, states)
        for legs, solutions in zip(cut, walked):
            for leg, solution in zip(legs, solutions):
                here = leg.path if solution else ()
                ends += exits_on(leg.path, leg.prefixes, leg.exits, here, solution and solution.states)
        loss, read = self._score(ends)
        if auxiliary is not None:
            of_ends = self._score_auxiliary(auxiliary, network, states, main)
            loss, read = of_ends if loss is None else loss + of_ends, [*read, *auxiliary.read.values()]
        if not self.keep_graph:
            return None
        if loss is not None:
            self._add(main.here[-1], loss - loss.detach())
        # The head's own gradients are left to the backward call, off the critical path.
        found = iter(torch.autograd.grad(loss, read, retain_graph=True) if read else ())
        upstream = upstream_of(main.here, network.exits, found, states)
        back = [
            [solution and upstream_of(leg.path, leg.exits, found, solution.states) for leg, solution in zip(legs, solutions)]
            for legs, solutions in zip(cut, walked)
        ]
        for n in auxiliary.read if auxiliary is not None else ():
            upstream[main.here.index(n)], of_blocks = auxiliary.back(n, next(found))
            self._add(n, of_blocks)
        for branch, legs, solutions, gradients in zip(branches, cut, walked, back):
            self._walk_back(branch, legs, solutions, gradients, upstream, main)
        return upstream

    def _score(self, ends: Sequence[tuple[Prefix, float, Tensor | None]]) -> tuple[Tensor | None, list[Tensor]]:
        """Takes the losses at those exits whose states are here: their weighted sum, None where there are none, and the
        states read, as leaves."""
        paths, weights, states = zip(*ends)
        read = [s.clone().requires_grad_(self.keep_graph) for s in states if s is not None]  # a view would keep all alive
        loss, values = None, iter(())
        if read:
            is_here = [s is not None for s in states]
            loss, values = self.model.score_exits(
                read, self.targets, list(compress(paths, is_here)), list(compress(weights, is_here))
            )
        values = iter(values)
        for path, weight, state in ends:
            value = self.z0.new_zeros(()) if state is None else next(values)
            self.exits.append(Exit(path, weight, value))
            self._add(path[-1], weight * value)
        return loss, read

    def _score_auxiliary(self, auxiliary: ExitsOfStep, network: SubNetwork, states: Tensor, main: MainPath) -> Tensor:
        """Takes the losses at the ends of segments that have no exit of the path's own: the sum of those that are here."""
        ends = [n for n in auxiliary.exits.ends if n not in network.exits]
        here = [n for n in ends if n in main.here]
        loss, values = auxiliary.score(self.model, {n: states[main.here.index(n)] for n in here}, self.targets)
        found = dict(zip(here, values))
        for n in ends:
            value = found.get(n, self.z0.new_zeros(()))
            self.auxiliary_exits.append(Exit(main.path[: main.path.index(n) + 1], auxiliary.exits.weight, value))
            self._add(n, auxiliary.exits.weight * value)
        return loss

    def _walk(self, branch: Branch, legs: Sequence[Leg], states: Tensor, main: MainPath) -> list[Solution | None]:
        """Walks a branch to its end, leg by leg; None for those that are elsewhere."""
        solutions, source = [], main.segment_of(branch.before[-1]) if branch.start else None
        state = states[main.here.index(branch.before[-1])] if branch.start and branch.before[-1] in main.here else self.z0
        for leg in legs:
            if source is not None:
                state = self.placement.pass_on(state[None], source, leg.segment, main.n_segments)[0]
            solutions.append(None)
            if leg.segment in main.own:
                begun = self.z0 if source is None else state.detach().clone().requires_grad_(self.keep_graph)
                solutions[-1] = solve(CallChain(self.calls, leg.prefixes, self.keep_graph), begun, one_walk(len(leg.path)))
                state = solutions[-1].states[-1]
            source = leg.segment
        return solutions

    def _walk_back(
        self,
        branch: Branch,
        legs: Sequence[Leg],
        solutions: Sequence[Solution | None],
        gradients: Sequence[Tensor | None],
        upstream: Tensor,
        main: MainPath,
    ) -> None:
        """Takes the adjoints of a branch back to where it leaves the main path, and adds them to ``upstream`` there."""
        arriving = None
        for number in reversed(range(len(legs))):
            leg, solution, own = legs[number], solutions[number], gradients[number]
            if solution is not None:
                if arriving is not None:
                    own[-1] += arriving
                rows = solution.linearized
                solve_adjoint(rows, own, one_walk(len(leg.path)))
                arriving = rows.input_gradient
                self._collect(leg.prefixes, rows, from_z0=number == 0 and branch.start == 0)
            if number or branch.start:
                target = legs[number - 1].segment if number else main.segment_of(branch.before[-1])
                given = self.z0.detach() if arriving is None else arriving
                arriving = self.placement.pass_on(given[None], leg.segment, target, main.n_segments)[0]
        if branch.start and branch.before[-1] in main.here:
            upstream[main.here.index(branch.before[-1])] += arriving

    def _collect(self, indices: Sequence[Prefix], rows: CalledRows, from_z0: bool) -> None:
        """Adds the gradients of evaluations to those of their blocks."""
        for row, gradients in rows.gradients.items():
            n = number_of(indices[row])
            before = self._gradients.get(n, [None] * len(gradients))  # not added in place: autograd may give one tensor twice
            self._gradients[n] = [h if g is None else g if h is None else g + h for g, h in zip(before, gradients)]
        if from_z0 and rows.input_gradient is not None:
            self._by_z0.append(rows.input_gradient)
        rows.gradients.clear()

    def _add(self, n: int, loss: Tensor | float) -> None:
        self._losses[n] = self._losses.get(n, self.z0.new_zeros(())) + loss
