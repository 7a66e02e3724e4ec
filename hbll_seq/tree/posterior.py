"""Exponential families of states and targets: energies, KL divergences and the Taylor inversion (paper 3.2, 6.3, 6.4).

A *family* says what a state (or the target y) is a random variable of, and so how far a prediction is from it. Every
family's ``energy`` is twice a divergence per position, summed over features, so that half of its mean is a loss.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll_seq.utils.checks import IGNORE_INDEX, as_classes


class Family(ABC):
    """What a state or target is distributed as, given the output of the block that predicts it."""

    @abstractmethod
    def energy(self, prediction: Tensor, target: Tensor) -> Tensor:
        """``prediction`` [..., features] and its target -> [...], zero or more."""

    def n_scored(self, n_positions: int, target: Tensor) -> Tensor | int:
        """How many of ``n_positions`` have a target."""
        return n_positions

    def any_scored(self, target: Tensor) -> Tensor | float:
        """1 where a position has a target, else 0: a step of padding alone has no loss."""
        return 1.0


class StateFamily(Family, ABC):
    """A family that inner states can have."""

    @abstractmethod
    def kl(self, mean: Tensor, prediction: Tensor, variance: float) -> Tensor:
        """KL(q(z_n | parents) || p(z_n | z_{n-1})) per position [...], from q's and p's parameters (Eqs. 10, 26).

        The term of F where z_{n-1} does not depend on the sample of z_n: at leaves, whose left parent it is.
        """

    @abstractmethod
    def log_ratio(self, sample: Tensor, prediction: Tensor, variance: float) -> Tensor:
        """``E[log q(z_n | parents)] - log p(z_n = sample | z_{n-1})`` per position [...] (Eq. 10).

        The term of F where z_{n-1} is a descendant of z_n, and so depends on its sample: at all nodes but leaves.
        """


class Gaussian(StateFamily):
    """N(prediction, sigma^2 I) with a known scalar variance: the language and vision experiments (paper 6.4)."""

    def energy(self, prediction: Tensor, target: Tensor) -> Tensor:
        """``||prediction - target||^2`` over the last dimension, in at least float32 (Eq. 30)."""
        _check_alike(prediction, target)
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        return (prediction.to(dtype) - target.to(dtype)).square().sum(-1)

    def kl(self, mean: Tensor, prediction: Tensor, variance: float) -> Tensor:
        """KL(N(mean, variance/2) || N(prediction, variance)): q is twice as sure as p (Eq. 29)."""
        return self.energy(prediction, mean) / (2.0 * variance) + 0.5 * mean.shape[-1] * (math.log(2.0) - 0.5)

    def log_ratio(self, sample: Tensor, prediction: Tensor, variance: float) -> Tensor:
        """Entropy of N(., variance/2) in closed form against the density of N(prediction, variance) at the sample."""
        return self.energy(prediction, sample) / (2.0 * variance) + 0.5 * sample.shape[-1] * (math.log(2.0) - 1.0)


class Bernoulli(StateFamily):
    """Independent bits; states are logits, the natural parameters (paper 6.3, Eq. 28)."""

    def energy(self, prediction: Tensor, target: Tensor) -> Tensor:
        """``2 KL(target || prediction)`` over the last dimension, both given as logits."""
        return 2.0 * self._kl_of_logits(target, prediction)

    def kl(self, mean: Tensor, prediction: Tensor, variance: float = 1.0) -> Tensor:
        """KL between the two Bernoulli distributions; the logits say it all, ``variance`` plays no part."""
        return self._kl_of_logits(mean, prediction)

    def log_ratio(self, sample: Tensor, prediction: Tensor, variance: float = 1.0) -> Tensor:
        """The same KL: a state is the distribution's parameter and not a draw of bits (Eq. 27)."""
        return self._kl_of_logits(sample, prediction)

    @staticmethod
    def _kl_of_logits(q: Tensor, p: Tensor) -> Tensor:
        # rho log(rho / alpha) + (1 - rho) log((1 - rho) / (1 - alpha)), without a logarithm of a rounded zero
        dtype = torch.promote_types(p.dtype, torch.float32)
        q, p = q.to(dtype), p.to(dtype)
        return (q.sigmoid() * (q - p) + F.softplus(p) - F.softplus(q)).sum(-1)


class Categorical(Family):
    """One of V classes, predicted by logits: the head of a classifier or language model."""

    def energy(self, prediction: Tensor, target: Tensor) -> Tensor:
        """``-2 log p(target)`` [...], 0 where the target is ``IGNORE_INDEX``; logits [..., V], target [...] of int64."""
        target = as_classes(target, prediction.shape[-1], prediction.shape[:-1])
        logits = prediction.flatten(0, -2).to(torch.promote_types(prediction.dtype, torch.float32))
        nats = F.cross_entropy(logits, target.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        return 2.0 * nats.view(target.shape)

    def n_scored(self, n_positions: int, target: Tensor) -> Tensor | int:
        """Targets other than ``IGNORE_INDEX``; 1 where there is none, so that a mean over none is 0."""
        return (target != IGNORE_INDEX).sum().clamp(min=1)

    def any_scored(self, target: Tensor) -> Tensor | float:
        """See :meth:`Family.any_scored`."""
        return (target != IGNORE_INDEX).any()


class Bits(Family):
    """Observed independent bits, predicted by logits: a Bernoulli head."""

    def energy(self, prediction: Tensor, target: Tensor) -> Tensor:
        """``-2 log p(target)`` summed over the last dimension; ``target`` has the shape of the logits, values 0 to 1."""
        _check_alike(prediction, target)
        logits = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        return 2.0 * F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none").sum(-1)


def _check_alike(prediction: Tensor, target: Tensor) -> None:
    """Raises ValueError where torch would broadcast one to the shape of the other."""
    if not isinstance(target, Tensor) or prediction.shape != target.shape:
        shape = tuple(getattr(target, "shape", ()))
        raise ValueError(f"targets of shape {shape} with predictions of shape {tuple(prediction.shape)}: must be the same")


STATE_FAMILIES: dict[str, type[StateFamily]] = {"gaussian": Gaussian, "bernoulli": Bernoulli}
TARGET_FAMILIES: dict[str, type[Family]] = {"categorical": Categorical, "gaussian": Gaussian, "bernoulli": Bits}


def posterior_mean(forward_message: Tensor, energy_gradient: Tensor) -> Tensor:
    """Mean of q(z_n | parents): ``a_n - (1/4) grad e`` (Eqs. 29-31; the paper prints a plus, its derivation needs the minus).

    The right parent's message is one Taylor step from a_n, ``a_n - (1/2) grad e`` (Eq. 30). At equal variance the product
    of the two messages has the average of their means (Eq. 29).

    Args:
        forward_message: a_n, any shape.
        energy_gradient: gradient of e, summed over features and not averaged over positions, at a_n.
    """
    return forward_message - 0.25 * energy_gradient


def sample_posterior(mean: Tensor, noise: Tensor | None, sigma: float) -> Tensor:
    """Reparametrised sample ``mean + (sigma / sqrt 2) noise`` of variance sigma^2 / 2 (Eq. 31); None means no noise."""
    return mean if noise is None else mean + (sigma * 0.5**0.5) * noise


def sample_forward(mean: Tensor, noise: Tensor | None, sigma: float) -> Tensor:
    """Reparametrised sample ``mean + sigma noise`` of p(z_n | z_{n-1}) (Eq. 3); None means no noise."""
    return mean if noise is None else mean + sigma * noise
