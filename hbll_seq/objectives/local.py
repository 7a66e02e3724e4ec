"""Local losses: every block is trained by a loss of its own, from messages on the tree or composed along the chain.

All local losses of a step are computed inside ``forward``, so that DistributedDataParallel around the objective sees
every parameter. Their sum is safe to differentiate in one call: each loss reaches its own block or two and no further.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hbll_seq.chains.depth import DepthChain, Prefix, prefixes
from hbll_seq.chains.layer import TimeOptions, TimeSweptChain
from hbll_seq.chains.time import TIME_LINEARIZATIONS
from hbll_seq.engine.chain import Chain
from hbll_seq.engine.linearization.low_rank import Secants
from hbll_seq.engine.solve import INITS, LINEARIZATIONS, Swept, backward_sweeps, forward_sweeps
from hbll_seq.layers.recurrent_block import RecurrentBlock
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.base import Objective, ObjectiveOutput, check_dial, check_local_losses_can_run, is_number
from hbll_seq.objectives.branches import Branch, messages_of, split_off, walk
from hbll_seq.objectives.depth_mix import Route
from hbll_seq.tree.inference import TreePass, tree_pass, tree_states
from hbll_seq.tree.multigrid import v_cycle
from hbll_seq.tree.posterior import Gaussian
from hbll_seq.utils.eager import eagerly
from hbll_seq.utils.modules import plain_module
from hbll_seq.utils.reading import quote
from hbll_seq.utils.seeds import mix_seeds
from hbll_seq.utils.values import as_whole, check_choice

INFERENCES = ("sweeps", "multigrid", "tree")


class LocalObjective(Objective):
    """Local losses from messages: no loss is differentiated through more than two blocks (tree) or one (sweeps).

    What a message carries is another matter: with M corrections it holds exact products over M blocks, and the stand-in for
    all others. It is truncated backpropagation, evaluated in parallel at approximate states (method.md 2.2).

    Inference ``"tree"`` is the paper's Algorithm 1: all blocks, and so all paths, at once. Node n's loss is
    ``1/2 mean over positions of e_n`` (method.md 1.3); it trains f_n, the block of its right parent (or the head, where that
    is y) and, on the left spine, the embedding. ``"sweeps"`` and ``"multigrid"`` train the main path, and those of the mix,
    as chains (method.md 2.2): node n's loss is ``<sg lambda_n, a_n>`` with its backward message, and trains f_n alone. A path
    of the mix that leaves the main one for at most D blocks is a branch: its further blocks are walked one by one and
    their messages hold exact products over all of them, whatever K and M.

    Args:
        model: a :class:`DepthHierarchy`; its blocks (of ``path``) are trained.
        inference: ``"tree"``, ``"sweeps"``, or ``"multigrid"``: V-cycles over the tree's jump arcs instead of forward
            sweeps (method.md 2.6); only with the full path.
        sweeps, corrections: K forward sweeps (or V-cycles) before the differentiated call and M backward corrections. With
            both at least the path's length minus one, the gradient of every parameter is backprop's.
        linearization: ``"identity"``, ``"zero"``, ``"diagonal"`` or ``"secant"``: what stands for the blocks' Jacobians
            between sweeps. The last is the identity and a map of rank ``secant_rank``, learned from training steps; see
            :class:`hbll_seq.engine.linearization.low_rank.Secants`. Only ``"sweeps"``.
        init: first estimate of the states: ``"input"``, ``"first"`` (f_1(z_0), one call more) or ``"tree"`` (D calls more).
        damping, tolerance: see :func:`forward_sweeps`.
        chunk: c, blocks that a sweep (the differentiated one too), and products that a correction takes one after the other:
            K + 1 sweeps then have a span of (K + 1) c. Not with ``"multigrid"``.
        time_sweeps, time_corrections, time_linearization, time_chunk: how recurrent blocks are evaluated along time, see
            :class:`hbll_seq.chains.layer.TimeOptions`.
        path, mix, mix_weight, graphs: see :class:`Objective`; they belong to ``"sweeps"``, ``graphs`` to all.
        sigma: noise scale of ``"tree"``; None takes ``model.config.sigma`` or 0 where the model has no config.
        n_samples: Monte-Carlo samples S of the states per input (Eq. 11), ``"tree"``.
        state_weight: weight w of the losses whose target is a state, ``"tree"``; those of the head have weight 1. The
            default did best of 1, 0.1 and 0.01 in one short language-model trial (README, "What we tried").
        clean_inputs: blocks read forward messages. False lets them read the corrected samples, which hold y: only for
            models whose y is not their own next input.
        free_energy: also report F (Eq. 10) and its parts; costs N - 1 further block evaluations without gradient.
        seed, rank, micro_batches: of noise, dropout and the mix; see :class:`Objective`.

    Raises:
        ValueError: an argument is out of range. ``forward`` raises it for float16 and under ``torch.inference_mode``.
    """

    def __init__(
        self,
        model: DepthHierarchy,
        inference: str = "tree",
        *,
        sweeps: int = 3,
        corrections: int = 4,
        linearization: str = "identity",
        init: str = "first",
        damping: float = 1.0,
        tolerance: float = 0.0,
        chunk: int = 1,
        secant_rank: int | None = None,
        time_sweeps: int = TimeOptions().sweeps,
        time_corrections: int = TimeOptions().corrections,
        time_linearization: str = TimeOptions().linearization,
        time_chunk: int = TimeOptions().chunk,
        path: Sequence[int] | None = None,
        mix: str = "none",
        mix_weight: float | None = None,
        graphs: str = "kept",
        sigma: float | None = None,
        n_samples: int = 1,
        state_weight: float = 0.1,
        clean_inputs: bool = True,
        free_energy: bool = False,
        seed: int = 0,
        rank: int = 0,
        micro_batches: int = 1,
    ):
        super().__init__(
            model, path, mix=mix, mix_weight=mix_weight, graphs=graphs, seed=seed, rank=rank, micro_batches=micro_batches
        )
        sigma = sigma if sigma is not None else getattr(getattr(model, "config", None), "sigma", 0.0)
        check_choice("inference", inference, INFERENCES)
        sweeps, corrections, chunk = check_dial(sweeps, corrections, damping, tolerance, chunk)
        _check_choices(linearization, init, time_linearization)
        self.time = TimeOptions(as_whole("time_sweeps", time_sweeps, 0), as_whole("time_corrections", time_corrections, 0),
                                time_linearization, as_whole("time_chunk", time_chunk, 1))  # fmt: skip
        n_samples = as_whole("n_samples", n_samples, 1)
        if linearization == "secant" and inference != "sweeps":
            raise ValueError(f"linearization='secant' with inference={quote(inference)}: sweeps teach it; use 'identity'")
        if linearization == "diagonal" and not model.chain.has_diagonal:
            raise ValueError(
                "linearization='diagonal': these blocks do not tell the diagonal of their Jacobian (gated recurrent cells "
                "do); use 'identity' or 'zero'"
            )
        _check_tree(model, inference, sigma, state_weight, clean_inputs, free_energy)
        if inference == "tree" and (path is not None or mix != "none"):
            given = f"path={quote(path)}" if path is not None else f"mix={quote(mix)}"
            raise ValueError(f"{given} with inference='tree': the tree trains all paths; use inference='sweeps'")
        if inference == "multigrid" and len(self.path) < model.tree.n_nodes:
            raise ValueError(f"path={quote(path)} with inference='multigrid': it needs the full path; use inference='sweeps'")
        if inference == "multigrid" and linearization != "identity":
            raise ValueError(
                f"linearization={quote(linearization)} with inference='multigrid': V-cycles use 'identity'; leave it out"
            )
        if inference == "multigrid" and any(isinstance(plain_module(block), RecurrentBlock) for block in model.blocks):
            raise ValueError("inference='multigrid' with recurrent blocks: its states come from evaluations without gradient,"
                             " of which each is but one sweep over time; use inference='sweeps'")  # fmt: skip
        if inference == "multigrid" and chunk != 1:
            raise ValueError(f"chunk={chunk} with inference='multigrid': V-cycles have no sweeps to cut; leave it out")
        if inference != "tree" and n_samples > 1:
            raise ValueError(f"n_samples={n_samples} with inference={quote(inference)}: only the tree samples; leave it out")
        self.inference, self.sigma, self.n_samples = inference, float(sigma), n_samples
        self.sweeps, self.corrections, self.linearization, self.init = sweeps, corrections, linearization, init
        self.damping, self.tolerance, self.chunk = damping, tolerance, chunk
        self.secants: Secants | None = None
        if secant_rank is not None and linearization != "secant":
            raise ValueError(f"secant_rank={quote(secant_rank)} with linearization={quote(linearization)}: only 'secant' "
                             "has a rank; leave one out")  # fmt: skip
        if linearization == "secant":
            if model.width is None:
                raise ValueError("linearization='secant' with a hierarchy of unknown width: give DepthHierarchy the width of "
                                 "its states, or use 'identity'")  # fmt: skip
            self.secants = Secants(model.tree.n_nodes, model.width, secant_rank)
        self.state_weight, self.clean_inputs, self.free_energy = state_weight, clean_inputs, free_energy

    def trained_paths(self) -> str | tuple[tuple[int, ...], ...]:
        """See :meth:`Objective.trained_paths`; the tree trains all."""
        return "all" if self.inference == "tree" else super().trained_paths()

    def chain(self, step: int, states: Mapping[Prefix, Tensor] | None = None) -> DepthChain:
        """See :meth:`Objective.chain`; recurrent blocks are evaluated by messages along time."""
        return TimeSweptChain(self.time, of=super().chain(step, states))

    @eagerly
    def forward(
        self, inputs: Tensor, labels: Tensor | None = None, step: int = 0, states: Mapping[Prefix, Tensor] | None = None
    ) -> ObjectiveOutput:
        """``inputs`` and ``labels`` as the model's ``prepare`` wants them -> :class:`ObjectiveOutput`.

        ``states``: of the window before, for recurrent blocks; only with ``"sweeps"``. None is zero. Raises ValueError as
        :meth:`Objective.check` and the model's ``prepare``.

        Losses on states count every position, those of the head only the positions with a label; where no position has one,
        all losses are 0, and so are their gradients.

        Metrics of sweeps: ``ce`` in nats per target of the main path, ``ce_mix`` of the mix's readouts, ``residual`` of the
        main path's last sweep. Of the tree: ``ce_<k>`` of the right spine's path with k blocks, ``ce`` that of the longest,
        ``state`` the mean discrepancy of nodes whose target is a state; on request ``free_energy``, its likelihood
        part ``free_energy_nll`` and its KL by level ``free_energy_level_<t>``, all in nats per target.
        """
        step = self.check(inputs, step, states)
        check_local_losses_can_run(self.model, inputs.device.type)
        if states and self.inference != "sweeps":
            raise ValueError(f"states with inference={self.inference!r}: jumps of the tree read no path whose state could be "
                             "carried; use inference='sweeps', or leave states out")  # fmt: skip
        keep_graph = torch.is_grad_enabled()
        # The correction is a gradient of its own: without it there is no target, so evaluation needs autograd too.
        with torch.enable_grad(), self._dropout_of_step(inputs, step):
            x, targets = self.model.prepare(inputs, labels)
            if self.n_samples > 1:
                x, targets = (t.repeat_interleave(self.n_samples, dim=0) for t in (x, targets))
            if self.inference == "tree":
                result = self._tree_pass(x, targets, step)
                output = self._losses(result, targets)
            else:
                output = self._sweep_routes(x, targets, self.chain(step, states), step, keep_graph)
        if self.free_energy:
            output.metrics.update(self._free_energy(result, targets))
        return output if keep_graph else output._replace(loss=output.loss.detach(), node_losses=output.node_losses.detach())

    # ------------------------------------------------------------------------------------------------------ sweeps

    def _sweep_routes(
        self, x: Tensor, targets: Tensor, blocks: DepthChain, step: int, keep_graph: bool
    ) -> ObjectiveOutput:
        """Every route by K sweeps and M corrections (method.md 2.2). ``node_losses`` are by block; only a readout's loss has
        a value other than zero, and their gradients are the blocks' own."""
        z0, chain, routes = self.model.embed(x), self.kept(blocks), self.routes(step)
        branches, others = split_off(routes[0].path, routes[1:], self.model.tree.n_level)
        node_losses: dict[int, Tensor] = {}
        swept, nats = self._sweep(chain, routes[0], branches, z0, targets, node_losses, keep_graph)
        read = list(zip([routes[0], *branches], nats))
        if self.secants is not None and keep_graph and self.training:
            self.secants.end_step()
        for route in others:
            _, nats = self._sweep(chain, route, [], z0, targets, node_losses, keep_graph)
            read.append((route, nats[0]))
        measured = {"residual": swept.residual} if self.inference == "sweeps" and self.sweeps > 0 else {}
        losses = torch.stack([node_losses[n] for n in sorted(node_losses)])
        return ObjectiveOutput(losses.sum(), losses, {**self._metrics(read), **measured}, dict(blocks.last))

    def _sweep(
        self,
        chain: Chain,
        route: Route,
        branches: list[Branch],
        z0: Tensor,
        targets: Tensor,
        node_losses: dict[int, Tensor],
        keep_graph: bool,
    ) -> tuple[Swept, list[dict[int, Tensor]]]:
        """One route and its branches; adds their losses by block to ``node_losses`` and returns the nats of the readouts
        by block: the route's, then each branch's."""
        path, secants = route.path, self.secants
        # Blocks of other paths read other states; a measurement must not change what it measures.
        learn = secants is not None and keep_graph and self.training and path == self.path
        swept = self._forward_messages(chain, path, z0, learn)
        starts = [swept.states[b.start - 1].clone().requires_grad_(True) if b.start else z0 for b in branches]
        read = [{n: swept.states[path.index(n)].clone().requires_grad_(True) for n in route.exits}]
        swept.states.clear()  # only what is read out is needed from here on
        walked = walk(chain, branches, starts)
        paths = [path, *(branch.whole for branch in branches)]
        for i, branch in enumerate(branches):
            ends = {n: walked.outputs[branch.path.index(n)][i] for n in branch.exits}
            read.append({n: a.detach().requires_grad_(True) for n, a in ends.items()})
        nats = [
            {n: self._nats(state, targets, whole[: whole.index(n) + 1]) for n, state in states.items()}
            for whole, states in zip(paths, read)
        ]
        weights = [route.exits, *(branch.exits for branch in branches)]
        emission = sum(w * values[n] for exits, values in zip(weights, nats) for n, w in exits.items())
        leaves = [state for states in read for state in states.values()]
        gradients = iter(torch.autograd.grad(emission, leaves, retain_graph=True))
        errors = [{n: next(gradients) for n in states} for states in read]
        branch_messages, sent = messages_of(walked, errors[1:])
        at_states = [errors[0].get(n) for n in path]
        for branch, message in zip(branches, sent):
            if message is not None:
                before = at_states[branch.start - 1]
                at_states[branch.start - 1] = message if before is None else before + message
        observe = None
        if learn:
            observe = lambda i, message, product: secants.observe(path[i], "backward", message, product - message)
        messages = backward_sweeps(
            swept, at_states, corrections=self.corrections if keep_graph else 0, chunk=self.chunk, observe=observe
        )
        local = list(zip(path, messages, swept.outputs))
        for i, branch in enumerate(branches):
            local += [(n, branch_messages[j][i], walked.outputs[j][i]) for j, n in enumerate(branch.path)]
        for n, message, output in local:
            # <sg lambda_n, a_n> has the gradient of ||a_n - sg mu_n||^2 / 2 sigma^2, mu_n = a_n - sigma^2 lambda_n, without
            # forming a difference that float32 could not hold.
            value = (message * output).sum()
            _add(node_losses, n, value - value.detach())
        for exits, values in zip(weights, nats):
            for n, weight in exits.items():
                _add(node_losses, n, weight * values[n])
        return swept, nats

    def _forward_messages(self, chain: Chain, path: tuple[int, ...], z0: Tensor, learn: bool) -> Swept:
        tree = self.model.tree
        options = dict(linearization=self.linearization, damping=self.damping, tolerance=self.tolerance, chunk=self.chunk,
                       secants=self.secants, learn=learn)  # fmt: skip
        if self.inference == "multigrid" and len(path) == tree.n_nodes:
            start = v_cycle(chain, tree, z0, cycles=self.sweeps)
            return forward_sweeps(chain, prefixes(path), z0, sweeps=0, start=start, **options)
        start = tree_states(chain, tree, path, z0) if self.init == "tree" else None
        init = "input" if self.init == "tree" else self.init
        return forward_sweeps(chain, prefixes(path), z0, sweeps=self.sweeps, start=start, init=init, **options)

    # -------------------------------------------------------------------------------------------------------- tree

    def _tree_pass(self, x: Tensor, targets: Tensor, step: int) -> TreePass:
        def noise(node: int, like: Tensor) -> Tensor:
            generator = torch.Generator(like.device).manual_seed(mix_seeds(self.noise_seed, step, node))
            return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

        spine = self.model.tree.right_spine
        return tree_pass(
            self.kept(self.chain(step)),
            self.model.tree,
            self.model.embed(x),
            lambda n, state: self.model.score(state, targets, spine[: spine.index(n) + 1]),
            self.model.state_family,
            sigma=self.sigma,
            noise=noise,
            clean_inputs=self.clean_inputs,
            posterior_at_leaves=self.free_energy,
        )

    def _losses(self, result: TreePass, targets: Tensor) -> ObjectiveOutput:
        tree, any_scored = self.model.tree, self.model.target_family.any_scored(targets)
        losses, metrics, state_losses = [], {}, []
        for n in range(1, tree.N):
            if tree.parents(n)[1] == tree.N:
                n_scored = self.model.n_scored(result.messages[n], targets)
                losses.append(0.5 * result.discrepancies[n].sum() / n_scored)
                metrics["ce"] = metrics[f"ce_{tree.level_of(n) + 1}"] = losses[-1].detach()
            else:
                state_losses.append(0.5 * result.discrepancies[n].mean())
                losses.append(self.state_weight * state_losses[-1] * any_scored)
        if state_losses:
            metrics["state"] = 2.0 * torch.stack(state_losses).detach().mean()
        node_losses = torch.stack(losses)
        return ObjectiveOutput(node_losses.sum(), node_losses, metrics, {})

    @torch.no_grad()
    def _free_energy(self, result: TreePass, targets: Tensor) -> dict[str, Tensor]:
        """F = sum_n KL(q(z_n | parents) || p(z_n | z_{n-1})) - log p(y | z_{N-1}), in expectation over q (Eq. 10)."""
        tree, family, states = self.model.tree, self.model.state_family, {0: result.reads[0], **result.targets}
        nodes = range(1, tree.N)
        predictions = self.model.chain.apply(nodes, [states[n - 1] for n in nodes])
        nll = self.model.score(states[tree.N - 1], targets, range(1, tree.N))
        n_targets = self.model.n_scored(states[tree.N - 1], targets)
        metrics = {f"free_energy_level_{t}": torch.zeros((), device=targets.device) for t in range(tree.n_level)}
        for n, prediction in zip(nodes, predictions):
            if tree.span(n) == 1:  # z_{n-1} is the left parent
                term = family.kl(result.means[n], prediction, self.sigma**2)
            else:  # z_{n-1} was drawn below z_n, given its sample
                term = family.log_ratio(states[n], prediction, self.sigma**2)
            metrics[f"free_energy_level_{tree.level_of(n)}"] += term.sum() / n_targets
        metrics["free_energy_nll"] = 0.5 * nll / n_targets
        metrics["free_energy"] = sum(metrics.values())
        return metrics


def _add(losses: dict[int, Tensor], n: int, loss: Tensor) -> None:
    losses[n] = losses[n] + loss if n in losses else loss


def _check_choices(linearization, init, time_linearization) -> None:
    choices = (("linearization", linearization, LINEARIZATIONS), ("init", init, INITS),
               ("time_linearization", time_linearization, TIME_LINEARIZATIONS))  # fmt: skip
    for name, value, allowed in choices:
        check_choice(name, value, allowed)


def _check_tree(model, inference, sigma, state_weight, clean_inputs, free_energy) -> None:
    if not is_number(sigma) or not 0 <= sigma < math.inf:
        raise ValueError(f"sigma={quote(sigma)}: must be a number of 0 or more (0 switches the noise off)")
    if not is_number(state_weight) or not 0 < state_weight < math.inf:
        raise ValueError(f"state_weight={quote(state_weight)}: must be a number above 0, or most blocks would not be trained")
    if free_energy and inference != "tree":
        raise ValueError(f"free_energy=True with inference={quote(inference)}: only the tree has a variational posterior")
    if free_energy and sigma == 0 and isinstance(model.state_family, Gaussian):
        raise ValueError(
            "free_energy=True with sigma=0: F is an expectation over noisy Gaussian states; give a sigma above 0"
        )
    if getattr(model, "config", None) is not None and not clean_inputs:
        raise ValueError(
            "clean_inputs=False: a language model whose blocks read corrected states reads its next token; leave it True"
        )
