"""The paper's tree pass over a chain (Algorithm 1, docs/method.md 1.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hbll_seq.engine.calls import Calls
from hbll_seq.tree.posterior import StateFamily, posterior_mean, sample_forward, sample_posterior
from hbll_seq.tree.topology import DyadicTree


def tree_states(calls: Calls, tree: DyadicTree, path: Sequence[int], z0: Tensor) -> list[Tensor]:
    """First estimate of the states on a path, by its jump arcs: every node from its left parent, D calls one after the
    other. The left parent of a node on a path is on it too, since only an interval that is split has a middle.

    Returns:
        Estimates of the inputs of the path's second to last block, without gradient.
    """
    states = {0: z0.detach()}
    with torch.no_grad():
        for level in tree.levels:
            nodes = [n for n in level if n in path[:-1]]
            states.update(zip(nodes, calls.apply(nodes, [states[tree.parents(n)[0]] for n in nodes])))
    return [states[n] for n in path[:-1]]


@dataclass
class TreePass:
    """What a tree pass leaves behind, by node number.

    Attributes:
        messages: forward messages a_n, attached to f_n (and to the embedding on the left spine).
        energies: e_n per position, or as ``output_energy`` gives it where the right parent is y; attached to f_n and to the
            right parent's block (or the head).
        means: posterior means of q(z_n | parents), detached; only of the nodes that needed one.
        targets: sampled z_n, detached; only of the nodes that needed one.
        reads: what the blocks right of node n read, detached: never holds anything of y when inputs are clean.
    """

    messages: dict[int, Tensor] = field(default_factory=dict)
    energies: dict[int, Tensor] = field(default_factory=dict)
    means: dict[int, Tensor] = field(default_factory=dict)
    targets: dict[int, Tensor] = field(default_factory=dict)
    reads: dict[int, Tensor] = field(default_factory=dict)


def tree_pass(
    calls: Calls,
    tree: DyadicTree,
    z0: Tensor,
    output_energy: Callable[[int, Tensor], Tensor],
    state_family: StateFamily,
    *,
    sigma: float = 0.0,
    noise: Callable[[int, Tensor], Tensor] | None = None,
    clean_inputs: bool = True,
    posterior_at_leaves: bool = False,
) -> TreePass:
    """Algorithm 1, level by level from the root; all nodes of a level in one call (docs/method.md 1.3).

    Args:
        calls: the blocks f_1 .. f_{N-1}.
        tree: the tree over them.
        z0: embedded input, [batch, ..., width]; stays attached, so that the left spine trains the embedding.
        output_energy: n, a_n -> e = -2 log p(y | head(a_n)), per position or summed, for the nodes whose right parent is y.
        state_family: distribution of the inner states.
        sigma: noise scale of the samples.
        noise: ``(node, like) -> standard normal noise`` of the shape of ``like``; needed where sigma > 0.
        clean_inputs: blocks read the forward message; False lets them read the corrected sample, which carries y: not
            for language models, where it leaks the next token into what predicts it (docs/method.md 1.3, "No leak").
        posterior_at_leaves: also correct the last level's states, which nothing but the free energy asks for.
    """
    result = TreePass(reads={0: z0})
    for level in tree.levels:
        left, right = zip(*(tree.parents(n) for n in level))
        # A message of frozen parts has no history; the posterior needs its gradient all the same.
        messages = [a if a.requires_grad else a.detach().requires_grad_(True)
                    for a in calls.apply(level, [result.reads[i] for i in left])]  # fmt: skip
        energies = _energies(calls, level, right, messages, output_energy, state_family, result.targets)
        result.messages.update(zip(level, messages))
        result.energies.update(zip(level, energies))
        is_leaf_level = level[0] == 1
        if is_leaf_level and not posterior_at_leaves:
            break
        # Nodes of a level share no state, so one call gives each node the gradient of its own e. The sum is over
        # positions too: every position has a posterior of its own, and averaging would shrink the step.
        gradients = torch.autograd.grad(sum(e.sum() for e in energies), messages, retain_graph=True)
        for n, a, gradient in zip(level, messages, gradients):
            a = a.detach()
            epsilon = noise(n, a) if sigma > 0 else None
            result.means[n] = posterior_mean(a, gradient)
            result.targets[n] = sample_posterior(result.means[n], epsilon, sigma)
            result.reads[n] = sample_forward(a, epsilon, sigma) if clean_inputs else result.targets[n]
    return result


def _energies(calls, level, right, messages, output_energy, state_family, targets) -> list[Tensor]:
    """e_n of each node of a level: against the right parent's state, or against y where that parent is the boundary."""
    inner = [(j, a) for j, a in zip(right, messages) if j in targets]
    predictions = iter(calls.apply([j for j, _ in inner], [a for _, a in inner]) if inner else [])
    return [
        state_family.energy(next(predictions), targets[j]) if j in targets else output_energy(n, a)
        for n, j, a in zip(level, right, messages)
    ]
