"""Local losses of the paper's tree, and its free energy (docs/method.md 1.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hbll_seq.engine.calls import Calls
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.options import Tree
from hbll_seq.tree.inference import TreePass, tree_pass
from hbll_seq.utils.seeds import mix_seeds


def node_noise(seed: int, step: int) -> Callable[[int, Tensor], Tensor]:
    """Standard normal noise of a step, a function of (seed, step, node): ``(node, like) -> noise``."""

    def noise(node: int, like: Tensor) -> Tensor:
        generator = torch.Generator(like.device).manual_seed(mix_seeds(seed, step, node))
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    return noise


def run_tree(
    model: DepthHierarchy,
    calls: Calls,
    inference: Tree,
    x: Tensor,
    targets: Tensor,
    noise: Callable[[int, Tensor], Tensor],
) -> TreePass:
    """Algorithm 1 on a batch, with the model's head on the right spine.

    Args:
        model: whose blocks are trained.
        calls: its blocks in this step.
        inference: with ``sigma`` given.
        x: what the model embeds.
        targets: what its head is scored on.
        noise: see :func:`node_noise`.
    """
    spine = model.tree.right_spine
    return tree_pass(
        calls,
        model.tree,
        model.embed(x),
        lambda n, state: model.score(state, targets, spine[: spine.index(n) + 1]),
        model.state_family,
        sigma=inference.sigma,
        noise=noise,
        clean_inputs=inference.clean_inputs,
        posterior_at_leaves=inference.free_energy,
    )


def tree_losses(
    model: DepthHierarchy, result: TreePass, targets: Tensor, state_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of every node [N - 1], ``1/2 mean over positions of e_n``, and metrics: ``ce_<k>`` of the right spine's path
    with k blocks, ``ce`` of the longest, and ``state``, the mean energy of nodes whose target is a state."""
    tree, any_scored = model.tree, model.target_family.any_scored(targets)
    losses, metrics, state_losses = [], {}, []
    for n in range(1, tree.N):
        if tree.parents(n)[1] == tree.N:
            n_scored = model.n_scored(result.messages[n], targets)
            losses.append(0.5 * result.energies[n].sum() / n_scored)
            metrics["ce"] = metrics[f"ce_{tree.level_of(n) + 1}"] = losses[-1].detach()
        else:
            state_losses.append(0.5 * result.energies[n].mean())
            losses.append(state_weight * state_losses[-1] * any_scored)
    if state_losses:
        metrics["state"] = 2.0 * torch.stack(state_losses).detach().mean()
    return torch.stack(losses), metrics


@torch.no_grad()
def free_energy(model: DepthHierarchy, result: TreePass, targets: Tensor, sigma: float) -> dict[str, Tensor]:
    """F = sum_n KL(q(z_n | parents) || p(z_n | z_{n-1})) - log p(y | z_{N-1}), in expectation over q (Eq. 10): the sum
    ``free_energy``, its likelihood part ``free_energy_nll``, and its KL by level ``free_energy_level_<t>``, in nats per
    target."""
    tree, family, states = model.tree, model.state_family, {0: result.reads[0], **result.targets}
    nodes = range(1, tree.N)
    predictions = model.calls.apply(nodes, [states[n - 1] for n in nodes])
    nll = model.score(states[tree.N - 1], targets, range(1, tree.N))
    n_targets = model.n_scored(states[tree.N - 1], targets)
    metrics = {f"free_energy_level_{t}": torch.zeros((), device=targets.device) for t in range(tree.n_level)}
    for n, prediction in zip(nodes, predictions):
        if tree.span(n) == 1:  # z_{n-1} is the left parent
            term = family.kl(result.means[n], prediction, sigma**2)
        else:  # z_{n-1} was drawn below z_n, given its sample
            term = family.log_ratio(states[n], prediction, sigma**2)
        metrics[f"free_energy_level_{tree.level_of(n)}"] += term.sum() / n_targets
    metrics["free_energy_nll"] = 0.5 * nll / n_targets
    metrics["free_energy"] = sum(metrics.values())
    return metrics
