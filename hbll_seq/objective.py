"""Training objectives: modules around a model whose forward returns one loss to call ``backward`` on.

All local losses of a step are computed inside ``forward``, so that DistributedDataParallel around the objective sees
every parameter. Their sum is safe to differentiate in one call: each loss reaches its own two blocks and no further.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hbll_seq.depth import DepthHierarchy
from hbll_seq.messages import INITS, LINEARIZATIONS, TreePass, backward_sweeps, final_state, forward_sweeps, tree_pass
from hbll_seq.posterior import Gaussian

INFERENCES = ("tree", "sweeps")


class ObjectiveOutput(NamedTuple):
    """What every objective returns.

    loss: scalar to differentiate, the sum of ``node_losses``.
    node_losses: [n], attached; ``LocalObjective``: of nodes 1 .. N-1 in this order; ``BackpropObjective``: n = 1.
    metrics: detached scalars by name. Always ``"ce"``: nats per target of the deepest path that was evaluated.
    """

    loss: Tensor
    node_losses: Tensor
    metrics: dict[str, Tensor]


class Objective(nn.Module):
    """What the two objectives share: the model, and reproducible dropout."""

    def __init__(self, model: DepthHierarchy, seed: int = 0):
        super().__init__()
        self.model = model
        self.seed = seed

    @property
    def _has_dropout(self) -> bool:
        dropouts = (m for m in self.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
        return any(module.training and module.p > 0 for module in dropouts)

    @contextlib.contextmanager
    def _dropout_of_step(self, step: int) -> Iterator[None]:
        """Makes dropout a function of (seed, step, node): nodes draw in a fixed order from a stream that a step starts."""
        if not self._has_dropout:
            yield
            return
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_mix(self.seed, step, 0))
            yield

    def _check_precision(self, device_type: str) -> None:
        half = any(p.dtype == torch.float16 for p in self.model.parameters())
        autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
        if half or autocast:
            raise ValueError(
                "float16 is refused: a loss scaler does not reach the gradients inside the local losses; "
                "use bfloat16 or float32"
            )

    def _mean(self, discrepancy: Tensor, targets: Tensor) -> Tensor:
        """Mean over the positions that have a target."""
        return discrepancy.sum() / self.model.target_family.n_scored(discrepancy, targets)

    def _head(self, state: Tensor, targets: Tensor) -> Tensor:
        """Discrepancy of the head's prediction from a state, [batch, ...] (-2 log p(y | state) for classes)."""
        return self.model.target_family.discrepancy(self.model.head(state), targets)


class BackpropObjective(Objective):
    """The baseline: ``-log p(y | x)`` along one path, differentiated through all of it.

    Args:
        model: a :class:`DepthHierarchy`.
        path: block numbers; None is the full path. With a path, only its blocks, embedding and head are trained.
        seed: seed of dropout.

    Raises:
        ValueError: the path is not one of the model's tree.
    """

    def __init__(self, model: DepthHierarchy, path: Sequence[int] | None = None, *, seed: int = 0):
        super().__init__(model, seed)
        self.path = model.resolve_path(path=path)
        _train_only(model, self.path)

    def forward(self, inputs: Tensor, labels: Tensor | None = None, step: int = 0) -> ObjectiveOutput:
        """``inputs`` and ``labels`` as the model's ``prepare`` wants them -> :class:`ObjectiveOutput`."""
        with self._dropout_of_step(step):
            x, targets = self.model.prepare(inputs, labels)
            state = self.model.embed(x)
            for n in self.path:
                (state,) = self.model.chain.apply((n,), (state,))
            loss = 0.5 * self._mean(self._head(state, targets), targets)
        return ObjectiveOutput(loss, loss.unsqueeze(0), {"ce": loss.detach()})


class LocalObjective(Objective):
    """Local losses from messages on the tree: no gradient ever passes more than two blocks.

    Node n's loss is ``1/2 mean over positions of e_n`` (METHOD 1.3). It trains f_n, the block of its right parent (or
    the head, where that is y) and, on the left spine, the embedding.

    Args:
        model: a :class:`DepthHierarchy`; its blocks (of ``path``) are trained.
        inference: ``"tree"``, the paper's Algorithm 1: all blocks, and so all paths, at once. ``"sweeps"``: one path
            as a chain, by messages composed along it (METHOD 2.2); a dial from local to exact.
        sweeps, corrections: K forward sweeps before the differentiated call and M backward corrections. With both at
            least the path's length minus one, the gradient of every parameter is backprop's.
        linearization: ``"identity"`` or ``"zero"``, what stands for the blocks' Jacobians between the sweeps.
        init: first estimate of the states, ``"input"`` or ``"first"``; see :func:`forward_sweeps`.
        path: block numbers that ``"sweeps"`` trains; None is the full path. The arguments below belong to ``"tree"``.
        sigma: noise scale; None takes ``model.config.sigma`` or 0 where the model has no config.
        n_samples: Monte-Carlo samples S of the states per input (Eq. 11).
        state_weight: weight w of the losses whose target is a state; those of the head have weight 1. The default did
            best of 1, 0.1 and 0.01 in one short language-model trial (README, "What we tried").
        clean_inputs: blocks read forward messages. False lets them read the corrected samples, which hold y: only for
            models whose y is not their own next input.
        free_energy: also report F (Eq. 10) and its parts; costs N - 1 further block evaluations without gradient.
        seed: seed of noise and dropout, which are functions of (seed, step, node).

    Raises:
        ValueError: an argument is out of range. ``forward`` raises it for float16 and under ``torch.inference_mode``.
    """

    def __init__(
        self,
        model: DepthHierarchy,
        inference: str = "tree",
        *,
        sweeps: int = 2,
        corrections: int = 1,
        linearization: str = "identity",
        init: str = "input",
        path: Sequence[int] | None = None,
        sigma: float | None = None,
        n_samples: int = 1,
        state_weight: float = 0.1,
        clean_inputs: bool = True,
        free_energy: bool = False,
        seed: int = 0,
    ):
        super().__init__(model, seed)
        config = getattr(model, "config", None)
        sigma = sigma if sigma is not None else getattr(config, "sigma", 0.0)
        if inference not in INFERENCES:
            raise ValueError(f"inference={inference!r}: allowed are {', '.join(INFERENCES)}")
        if not _is_number(sigma) or not 0 <= sigma < math.inf:
            raise ValueError(f"sigma={sigma!r}: must be a number of 0 or more (0 switches the noise off)")
        if not isinstance(n_samples, int) or isinstance(n_samples, bool) or n_samples < 1:
            raise ValueError(f"n_samples={n_samples!r}: must be a whole number of at least 1")
        if not _is_number(state_weight) or not 0 < state_weight < math.inf:
            raise ValueError(f"state_weight={state_weight!r}: must be a number above 0, or most blocks would not be trained")
        if free_energy and inference != "tree":
            raise ValueError(f"free_energy=True with inference={inference!r}: only the tree has a variational posterior")
        if free_energy and sigma == 0 and isinstance(model.state_family, Gaussian):
            raise ValueError(
                "free_energy=True with sigma=0: F is an expectation over noisy Gaussian states; give a sigma above 0"
            )
        if config is not None and not clean_inputs:
            raise ValueError(
                "clean_inputs=False: a language model whose blocks read corrected states reads its next token; leave it True"
            )
        for name, value in (("sweeps", sweeps), ("corrections", corrections)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least 0")
        for name, value, allowed in (("linearization", linearization, LINEARIZATIONS), ("init", init, INITS)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")
        if inference == "tree" and path is not None:
            raise ValueError(f"path={path!r} with inference='tree': the tree trains all paths; use inference='sweeps'")
        self.sweeps, self.corrections, self.linearization, self.init = sweeps, corrections, linearization, init
        self.path = model.resolve_path(path=path)
        self.inference, self.sigma, self.n_samples = inference, float(sigma), n_samples
        self.state_weight, self.clean_inputs, self.free_energy = state_weight, clean_inputs, free_energy
        _train_only(model, self.path)

    def forward(self, inputs: Tensor, labels: Tensor | None = None, step: int = 0) -> ObjectiveOutput:
        """``inputs`` and ``labels`` as the model's ``prepare`` wants them -> :class:`ObjectiveOutput`.

        Losses on states count every position, those of the head only the positions with a label.

        Metrics: ``ce_<k>`` is the nats per target of the right spine's path with k blocks, ``ce`` that of the longest,
        ``state`` the mean discrepancy of nodes whose target is a state; on request ``free_energy``, its likelihood
        part ``free_energy_nll`` and its KL by level ``free_energy_level_<t>``, all in nats per target.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError("local losses need inner gradients, which torch.inference_mode() forbids: use torch.no_grad()")
        self._check_precision(inputs.device.type)
        keep_graph = torch.is_grad_enabled()
        # The correction is a gradient of its own: without it there is no target, so evaluation needs autograd too.
        with torch.enable_grad(), self._dropout_of_step(step):
            x, targets = self.model.prepare(inputs, labels)
            if self.n_samples > 1:
                x, targets = (t.repeat_interleave(self.n_samples, dim=0) for t in (x, targets))
            if self.inference == "sweeps":
                output = self._sweep(x, targets)
            else:
                result = self._tree_pass(x, targets, step)
                output = self._losses(result, targets)
        if self.free_energy:
            output.metrics.update(self._free_energy(result, targets))
        return output if keep_graph else ObjectiveOutput(output.loss.detach(), output.node_losses.detach(), output.metrics)

    def _sweep(self, x: Tensor, targets: Tensor) -> ObjectiveOutput:
        """One path by K sweeps and M corrections (METHOD 2.2). ``node_losses`` follow the path: all but the last are zero
        in value, since only the emission is a loss; their gradients are the blocks' own."""
        z0 = self.model.embed(x)
        options = {"linearization": self.linearization}
        inputs, residual = forward_sweeps(
            self.model.chain, self.path, z0.detach(), sweeps=self.sweeps, init=self.init, **options
        )
        inputs = torch.cat((z0.unsqueeze(0), inputs[1:]))  # attached in the first transition, which trains the embedding
        inputs.requires_grad_(True) if inputs.is_leaf else None
        outputs = torch.stack(self.model.chain.apply(self.path, inputs.unbind(0)))
        final = final_state(outputs, inputs, **options)
        emission = 0.5 * self._mean(self._head(final, targets), targets)
        (error,) = torch.autograd.grad(emission, final, retain_graph=True)
        messages = backward_sweeps(outputs, inputs, error, corrections=self.corrections, **options)
        # <sg lambda_n, a_n> has the gradient of ||a_n - sg mu_n||^2 / 2 sigma^2, mu_n = a_n - sigma^2 lambda_n, without
        # forming a difference that float32 could not hold.
        local = (messages * outputs).flatten(1).sum(1)
        node_losses = local - local.detach()
        node_losses = torch.cat((node_losses[:-1], (node_losses[-1] + emission).unsqueeze(0)))
        metrics = {"ce": emission.detach(), "residual": emission.new_tensor(residual)}
        return ObjectiveOutput(node_losses.sum(), node_losses, metrics)

    def _tree_pass(self, x: Tensor, targets: Tensor, step: int) -> TreePass:
        def noise(node: int, like: Tensor) -> Tensor:
            generator = torch.Generator(like.device).manual_seed(_mix(self.seed, step, node))
            return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

        return tree_pass(
            self.model.chain,
            self.model.tree,
            self.model.embed(x),
            lambda state: self._head(state, targets),
            self.model.state_family,
            sigma=self.sigma,
            noise=noise,
            clean_inputs=self.clean_inputs,
            posterior_at_leaves=self.free_energy,
        )

    def _losses(self, result: TreePass, targets: Tensor) -> ObjectiveOutput:
        tree = self.model.tree
        losses, metrics, state_losses = [], {}, []
        for n in range(1, tree.N):
            if tree.parents(n)[1] == tree.N:
                losses.append(0.5 * self._mean(result.discrepancies[n], targets))
                metrics["ce"] = metrics[f"ce_{tree.level_of(n) + 1}"] = losses[-1].detach()
            else:
                state_losses.append(0.5 * result.discrepancies[n].mean())
                losses.append(self.state_weight * state_losses[-1])
        if state_losses:
            metrics["state"] = 2.0 * torch.stack(state_losses).detach().mean()
        node_losses = torch.stack(losses)
        return ObjectiveOutput(node_losses.sum(), node_losses, metrics)

    @torch.no_grad()
    def _free_energy(self, result: TreePass, targets: Tensor) -> dict[str, Tensor]:
        """F = sum_n KL(q(z_n | parents) || p(z_n | z_{n-1})) - log p(y | z_{N-1}), in expectation over q (Eq. 10)."""
        tree, family, states = self.model.tree, self.model.state_family, {0: result.reads[0], **result.targets}
        nodes = range(1, tree.N)
        predictions = self.model.chain.apply(nodes, [states[n - 1] for n in nodes])
        nll = self._head(states[tree.N - 1], targets)
        n_targets = self.model.target_family.n_scored(nll, targets)
        metrics = {f"free_energy_level_{t}": torch.zeros((), device=targets.device) for t in range(tree.n_level)}
        for n, prediction in zip(nodes, predictions):
            if tree.span(n) == 1:  # z_{n-1} is the left parent
                term = family.kl(result.means[n], prediction, self.sigma**2)
            else:  # z_{n-1} was drawn below z_n, given its sample
                term = family.log_ratio(states[n], prediction, self.sigma**2)
            metrics[f"free_energy_level_{tree.level_of(n)}"] += term.sum() / n_targets
        metrics["free_energy_nll"] = 0.5 * nll.sum() / n_targets
        metrics["free_energy"] = sum(metrics.values())
        return metrics


def _train_only(model: DepthHierarchy, path: Sequence[int]) -> None:
    """Freezes the blocks that are not on the path, so that every parameter that is trained is touched at every step."""
    for n, block in enumerate(model.blocks, start=1):
        block.requires_grad_(n in path)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that neighbouring (seed, step, node) give unrelated streams."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:  # splitmix64 (Steele, Lea, Flood 2014)
        mixed = (mixed ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1
