"""Messages along a chain: the paper's tree pass (Algorithm 1) and K sweeps (METHOD 2.2). All inner gradients live here.

A *chain* is N transitions and a call that evaluates many of them at once. What is written here knows nothing of layers,
time, attention or optimisers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hbll_seq.posterior import StateFamily, posterior_mean, sample_forward, sample_posterior
from hbll_seq.scan import affine_scan
from hbll_seq.tree import DyadicTree


class Chain(ABC):
    """Transitions s_n = f_n(s_{n-1}), evaluated in parallel wherever the algorithm allows it."""

    @abstractmethod
    def apply(self, indices: Sequence[int], states: Sequence[Tensor]) -> list[Tensor]:
        """``[f_n(s) for n, s in zip(indices, states)]``: one step of the algorithm's span, however many they are."""


@dataclass
class TreePass:
    """What a tree pass leaves behind, by node number.

    Attributes:
        messages: forward messages a_n, attached to f_n (and to the embedding on the left spine).
        discrepancies: e_n per position, attached to f_n and to the right parent's block (or the head).
        means: posterior means of q(z_n | parents), detached; only of the nodes that needed one.
        targets: sampled z_n, detached; only of the nodes that needed one.
        reads: what the blocks right of node n read, detached: never holds anything of y when inputs are clean.
    """

    messages: dict[int, Tensor] = field(default_factory=dict)
    discrepancies: dict[int, Tensor] = field(default_factory=dict)
    means: dict[int, Tensor] = field(default_factory=dict)
    targets: dict[int, Tensor] = field(default_factory=dict)
    reads: dict[int, Tensor] = field(default_factory=dict)


def tree_pass(
    chain: Chain,
    tree: DyadicTree,
    z0: Tensor,
    emission: Callable[[Tensor], Tensor],
    state_family: StateFamily,
    *,
    sigma: float = 0.0,
    noise: Callable[[int, Tensor], Tensor] | None = None,
    clean_inputs: bool = True,
    posterior_at_leaves: bool = False,
) -> TreePass:
    """Algorithm 1, level by level from the root; all nodes of a level in one call (METHOD 1.3).

    Args:
        chain: the blocks f_1 .. f_{N-1}.
        tree: the tree over them.
        z0: embedded input, [batch, ..., width]; stays attached, so that the left spine trains the embedding.
        emission: a_n -> e [batch, ...] = -2 log p(y | head(a_n)), shared by all nodes whose right parent is y.
        state_family: distribution of the inner states.
        sigma: noise scale of the samples.
        noise: ``(node, like) -> standard normal noise`` of the shape of ``like``; needed where sigma > 0.
        clean_inputs: blocks read the forward message; False lets them read the corrected sample, which carries y: not
            for language models, where it leaks the next token into what predicts it (METHOD 1.3, "No leak").
        posterior_at_leaves: also correct the last level's states, which nothing but the free energy asks for.
    """
    result = TreePass(reads={0: z0})
    for level in tree.levels:
        left, right = zip(*(tree.parents(n) for n in level))
        messages = chain.apply(level, [result.reads[i] for i in left])
        discrepancies = _discrepancies(chain, right, messages, emission, state_family, result.targets)
        result.messages.update(zip(level, messages))
        result.discrepancies.update(zip(level, discrepancies))
        is_leaf_level = level[0] == 1
        if is_leaf_level and not posterior_at_leaves:
            break
        # Nodes of a level share no state, so one call gives each node the gradient of its own e. The sum is over
        # positions too: every position has a posterior of its own, and averaging would shrink the step.
        gradients = torch.autograd.grad(sum(e.sum() for e in discrepancies), messages, retain_graph=True)
        for n, a, gradient in zip(level, messages, gradients):
            a = a.detach()
            epsilon = noise(n, a) if sigma > 0 else None
            result.means[n] = posterior_mean(a, gradient)
            result.targets[n] = sample_posterior(result.means[n], epsilon, sigma)
            result.reads[n] = sample_forward(a, epsilon, sigma) if clean_inputs else result.targets[n]
    return result


def _discrepancies(chain, right, messages, emission, state_family, targets) -> list[Tensor]:
    """e_n of each node of a level: against the right parent's state, or against y where that parent is the boundary."""
    inner = [(j, a) for j, a in zip(right, messages) if j in targets]
    predictions = iter(chain.apply([j for j, _ in inner], [a for _, a in inner]) if inner else [])
    return [
        state_family.discrepancy(next(predictions), targets[j]) if j in targets else emission(a)
        for j, a in zip(right, messages)
    ]


# ------------------------------------------------------------------------------------------------------------ K sweeps

#: cheap stand-ins A for the Jacobian of every transition: identity (residual blocks: Picard) and zero (Jacobi).
LINEARIZATIONS = {"identity": 1.0, "zero": 0.0}
INITS = ("input", "first")


def _apply_all(chain: Chain, indices: Sequence[int], inputs: Tensor) -> Tensor:
    """Every transition on its own input: [L, ...] -> [L, ...]."""
    return torch.stack(chain.apply(indices, inputs.unbind(0)))


def _compose(outputs: Tensor, inputs: Tensor, factor: float) -> Tensor:
    """States [L, ...] of ``sbar_n = f_n(s_{n-1}) + A (sbar_{n-1} - s_{n-1})`` from ``sbar_0 = s_0`` (METHOD 2.2)."""
    if factor == 0.0:
        return outputs
    return affine_scan(outputs - factor * inputs, factor, inputs[0])


@torch.no_grad()
def forward_sweeps(
    chain: Chain,
    indices: Sequence[int],
    s0: Tensor,
    *,
    sweeps: int,
    linearization: str = "identity",
    init: str = "input",
    damping: float = 1.0,
    tolerance: float = 0.0,
) -> tuple[Tensor, float]:
    """Estimates of every transition's input after K parallel sweeps, without gradient (METHOD 2.2).

    Args:
        chain: the transitions.
        indices: the L transitions in order.
        s0: [...], what the first one reads.
        sweeps: K; after k sweeps the first k states are exact, whatever the linearisation.
        linearization: one of ``LINEARIZATIONS``.
        init: first estimate: ``"input"``, s_0 everywhere, or ``"first"``, the first transition's output everywhere
            (one call more, for chains whose first transition changes the state most).
        damping: each sweep moves so far from the old estimate to the new one; 1 is the plain sweep.
        tolerance: stop early once the residual is at most this.

    Returns:
        Inputs s_0 .. s_{L-1} stacked [L, ...], and the residual: root mean square of the last sweep's change relative
        to the states' (0 where there is nothing to sweep).
    """
    factor, residual = LINEARIZATIONS[linearization], 0.0
    start = chain.apply(indices[:1], [s0])[0] if init == "first" and len(indices) > 1 else s0
    inputs = torch.stack([s0, *[start] * (len(indices) - 1)])
    for _ in range(sweeps if len(indices) > 1 else 0):
        states = _compose(_apply_all(chain, indices, inputs), inputs, factor)[:-1]
        change = states - inputs[1:]
        residual = (change.square().mean() / states.square().mean().clamp(min=1e-30)).sqrt().item()
        inputs = torch.cat((inputs[:1], inputs[1:] + damping * change))
        if residual <= tolerance:
            break
    return inputs, residual


def final_state(outputs: Tensor, inputs: Tensor, *, linearization: str = "identity") -> Tensor:
    """The last state s_L that the forward message makes of the differentiated call (sweep K + 1): a leaf, for the head."""
    return _compose(outputs.detach(), inputs.detach(), LINEARIZATIONS[linearization])[-1].requires_grad_(True)


def backward_sweeps(
    outputs: Tensor, inputs: Tensor, emission: Tensor, *, corrections: int, linearization: str = "identity"
) -> Tensor:
    """Messages lambda_n = d loss / d s_n [L, ...] of a loss on the last state, M corrections from a cheap start.

    Each correction is one batched vector-Jacobian product and a scan (METHOD 2.2):
    ``lambda_n <- e_n + A^T lambda_{n+1} + (J_{n+1} - A)^T lambda_old_{n+1}``. With M >= L - 1 they are exact.

    Args:
        outputs: a_n = f_n(s_{n-1}) for n = 1 .. L, attached to ``inputs``.
        inputs: s_0 .. s_{L-1}.
        emission: e_L = d loss / d s_L, [...].
        corrections: M.
        linearization: one of ``LINEARIZATIONS``.
    """
    factor = LINEARIZATIONS[linearization]
    errors = torch.cat((torch.zeros_like(outputs[1:]), emission.unsqueeze(0))).detach()
    messages = affine_scan(errors, factor, reverse=True)
    for _ in range(corrections if len(outputs) > 1 else 0):
        (products,) = torch.autograd.grad(outputs, inputs, messages, retain_graph=True)
        errors = torch.cat((products[1:] - factor * messages[1:], emission.unsqueeze(0)))
        messages = affine_scan(errors, factor, reverse=True)
    return messages
