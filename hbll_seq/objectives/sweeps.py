"""Local losses of sub-networks that are solved as chains: a step's states, adjoints and losses (docs/method.md 2.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hbll_seq.chains.depth import prefixes
from hbll_seq.engine.chain import Chain
from hbll_seq.engine.linearization.low_rank import LowRankFit
from hbll_seq.engine.solve import Solution, backward_sweeps, forward_sweeps
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.base import Exit, nats_of
from hbll_seq.objectives.branches import Branch, WalkedBranch, find_adjoints, walk
from hbll_seq.objectives.depth_mix import SubNetwork
from hbll_seq.objectives.options import Sweeps, VCycles
from hbll_seq.tree.inference import tree_states
from hbll_seq.tree.multigrid import v_cycle


class SweepStep:
    """One training step, sub-network by sub-network.

    Args:
        model: whose blocks are trained.
        chain: its blocks in this step.
        inference: resolved for depth.
        z0: [batch, ..., width], the embedded input; stays attached.
        targets: what the head is scored on.
        learned: maps that approximate the blocks' Jacobians, if they are learned.
        keep_graph: whether there is to be a gradient; without one the adjoints are not iterated.

    Attributes:
        node_losses: by block. Only the loss of an exit has a value other than zero; the gradients are the blocks' own.
        exits: of all sub-networks so far.
    """

    def __init__(
        self,
        model: DepthHierarchy,
        chain: Chain,
        inference: Sweeps | VCycles,
        z0: Tensor,
        targets: Tensor,
        *,
        learned: LowRankFit | None,
        keep_graph: bool,
    ):
        self.model, self.chain, self.inference, self.z0, self.targets = model, chain, inference, z0, targets
        self.learned, self.keep_graph = learned, keep_graph
        self.node_losses: dict[int, Tensor] = {}
        self.exits: list[Exit] = []

    def train(self, network: SubNetwork, branches: Sequence[Branch] = (), learn: bool = False) -> Solution:
        """Adds the losses of a sub-network and of the branches off it; its exits go before theirs.

        Args:
            network: solved as a chain.
            branches: walked block by block.
            learn: let the learned maps learn from it: blocks on other paths read other states.

        Returns:
            The chain's solution, without its states.
        """
        path = network.path
        solution = self._solve(path, learn)
        starts = [solution.states[b.start - 1].clone().requires_grad_(True) if b.start else self.z0 for b in branches]
        leaves = {n: solution.states[path.index(n)].clone().requires_grad_(True) for n in network.exits}
        solution.states.clear()  # only what an exit or a branch reads is needed from here on
        walked = walk(self.chain, branches, starts)
        main, of_branches = self._score(path, network.exits, leaves, walked)
        at_exits = self._find_upstream([main, *of_branches])
        for each, upstream in zip(walked, at_exits[1:]):
            each.upstream = upstream
        find_adjoints(walked)
        adjoints = self._find_adjoints(solution, path, _upstream_of_chain(path, at_exits[0], walked), learn)
        for n, adjoint, output in _local_products(path, adjoints, solution, walked):
            # <sg lambda_n, a_n> has the gradient of ||a_n - sg mu_n||^2 / 2 sigma^2, mu_n = a_n - sigma^2 lambda_n, without
            # forming a difference that float32 could not hold.
            value = (adjoint * output).sum()
            self._add(n, value - value.detach())
        for each in (each for group in (main, *of_branches) for each in group):
            self._add(each.prefix[-1], each.weight * each.nats)
            self.exits.append(each)
        return solution

    def _solve(self, path: tuple[int, ...], learn: bool) -> Solution:
        """The forward iterations."""
        tree, inference = self.model.tree, self.inference
        iterations, init, start = inference.iterations, "first", None
        if isinstance(inference, VCycles):
            if len(path) == tree.n_nodes:
                start = v_cycle(self.chain, tree, self.z0, cycles=inference.cycles)
                iterations = replace(iterations, forward=0)
        elif inference.init == "tree":
            start = tree_states(self.chain, tree, path, self.z0)
        else:
            init = inference.init
        return forward_sweeps(
            self.chain, prefixes(path), self.z0, iterations, init=init, start=start, learned=self.learned, learn=learn
        )

    def _score(
        self,
        path: tuple[int, ...],
        weights: Mapping[int, float],
        leaves: Mapping[int, Tensor],
        walked: Sequence[WalkedBranch],
    ) -> tuple[list[Exit], list[list[Exit]]]:
        """The exits of the chain, and of each branch. The state of each is a leaf."""

        def score(whole: tuple[int, ...], weights: Mapping[int, float], states: Mapping[int, Tensor]) -> list[Exit]:
            found = []
            for n, state in states.items():
                prefix = whole[: whole.index(n) + 1]
                found.append(Exit(prefix, weights[n], state, nats_of(self.model, state, self.targets, prefix)))
            return found

        of_branches = []
        for each in walked:
            ends = {n: each.outputs[each.branch.path.index(n)] for n in each.branch.exits}
            of_branches.append({n: a.detach().requires_grad_(True) for n, a in ends.items()})
        main = score(path, weights, leaves)
        return main, [score(w.branch.whole, w.branch.exits, states) for w, states in zip(walked, of_branches)]

    def _find_upstream(self, groups: Sequence[Sequence[Exit]]) -> list[dict[int, Tensor]]:
        """Upstream gradients of each group's exits, block number -> d loss / d state."""
        flat = [each for group in groups for each in group]
        output_loss = sum(each.weight * each.nats for each in flat)
        gradients = iter(torch.autograd.grad(output_loss, [each.state for each in flat], retain_graph=True))
        return [{each.prefix[-1]: next(gradients) for each in group} for group in groups]

    def _find_adjoints(
        self, solution: Solution, path: tuple[int, ...], upstream: Sequence[Tensor | None], learn: bool
    ) -> list[Tensor]:
        """The backward iterations."""

        def observe(i: int, adjoint: Tensor, product: Tensor) -> None:
            self.learned.observe(path[i], "backward", adjoint, product - adjoint)

        iterations = self.inference.iterations if self.keep_graph else replace(self.inference.iterations, backward=0)
        return backward_sweeps(solution, upstream, iterations, observe=observe if learn else None)

    def _add(self, n: int, loss: Tensor) -> None:
        self.node_losses[n] = self.node_losses[n] + loss if n in self.node_losses else loss


def _upstream_of_chain(
    path: tuple[int, ...], at_exits: Mapping[int, Tensor], walked: Sequence[WalkedBranch]
) -> list[Tensor | None]:
    """d loss / d s_n for every state of a path: of its own exits, and what its branches send."""
    upstream = [at_exits.get(n) for n in path]
    for each in walked:
        if each.sent is not None:
            i = each.branch.start - 1
            upstream[i] = each.sent if upstream[i] is None else upstream[i] + each.sent
    return upstream


def _local_products(
    path: tuple[int, ...], adjoints: Sequence[Tensor], solution: Solution, walked: Sequence[WalkedBranch]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Block number, adjoint and differentiated output of every evaluation that is trained."""
    yield from zip(path, adjoints, solution.outputs)
    for each in walked:
        yield from zip(each.branch.path, each.adjoints, each.outputs)
