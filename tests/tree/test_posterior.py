"""The claims of the method's mathematics, each against a closed form or a dense computation."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hbll_seq.tree.posterior import Bernoulli, Bits, Categorical, Gaussian, posterior_mean
from hbll_seq.tree.topology import DyadicTree


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class GaussianMessage(NamedTuple):
    """A Gaussian factor in natural parameters: precision ``P`` [d, d] and shift ``h = P mean`` [..., d]."""

    shift: Tensor
    precision: Tensor

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor) -> GaussianMessage:
        """N(mean, covariance) as a message."""
        precision = torch.linalg.inv(covariance)
        return cls(mean @ precision, precision)

    @classmethod
    def backward(cls, transition: Tensor, covariance: Tensor, target: Tensor) -> GaussianMessage:
        """What observing ``target = transition z + noise`` says of z: ``p(target | z)`` as a factor over z."""
        gain = transition.T @ torch.linalg.inv(covariance)
        return cls(target @ gain.T, gain @ transition)

    def product(self, other: GaussianMessage) -> GaussianMessage:
        """Product of two messages: natural parameters add (paper 6.3)."""
        return GaussianMessage(self.shift + other.shift, self.precision + other.precision)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [..., d] and covariance [d, d]."""
        covariance = torch.linalg.inv(self.precision)
        return self.shift @ covariance, covariance


def random_chain(n, width):
    """Transitions A_1 .. A_n with noise covariances Q_1 .. Q_n."""
    transitions = [torch.randn(width, width) * 0.7 for _ in range(n)]
    roots = [torch.randn(width, width) for _ in range(n)]
    return transitions, [r @ r.T + 0.5 * torch.eye(width) for r in roots]


def dense_posterior(transitions, covariances, z0, zN):
    """Exact p(z_1 .. z_{N-1} | z_0, z_N) from the joint precision of the whole chain."""
    n, width = len(transitions), len(z0)
    precision, shift = torch.zeros((n - 1) * width, (n - 1) * width), torch.zeros((n - 1) * width)

    def rows(k):
        return slice((k - 1) * width, k * width)

    for k in range(1, n + 1):
        inverse, A = covariances[k - 1].inverse(), transitions[k - 1]
        if k < n:
            precision[rows(k), rows(k)] += inverse
        if k > 1:
            precision[rows(k - 1), rows(k - 1)] += A.T @ inverse @ A
        if 1 < k < n:
            precision[rows(k), rows(k - 1)] -= inverse @ A
            precision[rows(k - 1), rows(k)] -= A.T @ inverse
        if k == 1 and k < n:
            shift[rows(k)] += inverse @ A @ z0
        if k == n:
            shift[rows(k - 1)] += A.T @ inverse @ zN
    covariance = precision.inverse()
    return covariance @ shift, covariance


def tree_posterior(transitions, covariances, z0, zN):
    """The same from Theorem 1: walk the tree, each node given its two parents, and build the joint moments."""
    n, width = len(transitions), len(z0)
    tree = DyadicTree(int(math.log2(n)))

    def jump(i, j):  # the (j - i)-step transition: matrix and covariance
        A, Q = torch.eye(width), torch.zeros(width, width)
        for k in range(i, j):
            A, Q = transitions[k] @ A, transitions[k] @ Q @ transitions[k].T + covariances[k]
        return A, Q

    # Each state is an affine function of independent noise: z_n = mean_n + sum_k factor_nk noise_k.
    mean = {0: z0, n: zN}
    factor = {0: torch.zeros(width, (n - 1) * width), n: torch.zeros(width, (n - 1) * width)}
    for level in tree.levels:
        for node in level:
            i, j = tree.parents(node)
            (A, Q), (B, R) = jump(i, node), jump(node, j)
            given = lambda zi, zj: GaussianMessage.from_moments(A @ zi, Q).product(  # noqa: E731
                GaussianMessage.backward(B, R, zj)
            )
            mean[node], conditional = given(mean[i], mean[j]).moments()
            zero = torch.zeros(width)
            by_left = torch.stack([given(e, zero).moments()[0] for e in torch.eye(width)], 1)
            by_right = torch.stack([given(zero, e).moments()[0] for e in torch.eye(width)], 1)
            factor[node] = by_left @ factor[i] + by_right @ factor[j]
            own = slice((node - 1) * width, node * width)
            factor[node][:, own] += torch.linalg.cholesky(conditional)
    nodes = range(1, n)
    stacked = torch.cat([factor[k] for k in nodes])
    return torch.cat([mean[k] for k in nodes]), stacked @ stacked.T


@pytest.mark.parametrize("n, width", [(2, 3), (4, 2), (8, 3), (16, 2)])
def test_theorem_1_tree_factorisation_is_the_exact_posterior(n, width):
    transitions, covariances = random_chain(n, width)
    z0, zN = torch.randn(width), torch.randn(width)
    mean, covariance = dense_posterior(transitions, covariances, z0, zN)
    tree_mean, tree_covariance = tree_posterior(transitions, covariances, z0, zN)
    assert (mean - tree_mean).abs().max() < 1e-10
    assert (covariance - tree_covariance).abs().max() < 1e-10


def test_one_block_for_every_arc_is_not_the_exact_posterior():
    """Why method.md 2.2 exists: the one-step transition in place of the multi-step one misses the posterior."""
    transitions, covariances = random_chain(4, 2)
    z0, zN = torch.randn(2), torch.randn(2)
    mean, _ = dense_posterior(transitions, covariances, z0, zN)
    one_step = GaussianMessage.from_moments(transitions[1] @ z0, covariances[1]).product(
        GaussianMessage.backward(transitions[3], covariances[3], zN)
    )
    assert (mean[2:4] - one_step.moments()[0]).abs().max() > 1e-2


def taylor_step(jacobian, a, target, sign=-1.0):
    """The step with the derivation's sign (-1) or the paper's printed one (+1), and e before and after."""
    a = a.clone().requires_grad_()
    e = Gaussian().energy(a @ jacobian.T, target)
    (gradient,) = torch.autograd.grad(e.sum(), a)
    z = posterior_mean(a.detach(), -sign * gradient)
    return z, e.detach(), Gaussian().energy(z @ jacobian.T, target)


@pytest.mark.parametrize("norm", [0.1, 1.0, 1.9])
def test_taylor_step_lowers_the_energy_below_norm_two_and_the_printed_sign_raises_it(norm):
    jacobian = torch.randn(5, 5)
    jacobian *= norm / torch.linalg.matrix_norm(jacobian, 2)
    a, target = torch.randn(200, 5), torch.randn(200, 5)
    _, before, after = taylor_step(jacobian, a, target)
    assert (after < before).all()
    _, before, after = taylor_step(jacobian, a, target, sign=+1.0)
    assert (after > before).all()


def test_taylor_step_overshoots_above_norm_two_but_is_still_first_order_descent():
    jacobian = torch.eye(3) * 2.5
    a, target = torch.randn(50, 3), torch.randn(50, 3)
    z, before, after = taylor_step(jacobian, a, target)
    assert (after > before).all()
    small = a + 1e-3 * (z - a)
    assert (Gaussian().energy(small @ jacobian.T, target) < before).all()


def test_taylor_step_is_the_exact_posterior_mean_for_an_orthogonal_jacobian():
    jacobian, _ = torch.linalg.qr(torch.randn(6, 6))
    a, target = torch.randn(40, 6), torch.randn(40, 6)
    z, _, _ = taylor_step(jacobian, a, target)
    exact = GaussianMessage.from_moments(a, torch.eye(6)).product(
        GaussianMessage.backward(jacobian, torch.eye(6), target)
    )
    torch.testing.assert_close(z, exact.moments()[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(exact.moments()[1], 0.5 * torch.eye(6), atol=1e-12, rtol=0)  # Eq. 29: half the variance


def test_bernoulli_energy_is_twice_the_kl_of_equation_28():
    p, q = torch.randn(7, 5) * 3, torch.randn(7, 5) * 3
    alpha, rho = p.sigmoid(), q.sigmoid()
    by_paper = (((1 - rho) / (1 - alpha)).log() + rho * (rho * (1 - alpha) / (alpha * (1 - rho))).log()).sum(-1)
    torch.testing.assert_close(Bernoulli().energy(p, q), 2 * by_paper)
    assert (Bernoulli().energy(q, q).abs() < 1e-12).all()
    far = Bernoulli().energy(torch.full((1, 1), 800.0), torch.full((1, 1), -800.0))
    assert torch.isfinite(far).all() and far > 100


def test_gaussian_kl_matches_torch_distributions():
    mean, prediction, variance = torch.randn(4, 3), torch.randn(4, 3), 0.3
    q = torch.distributions.Normal(mean, math.sqrt(variance / 2))
    p = torch.distributions.Normal(prediction, math.sqrt(variance))
    torch.testing.assert_close(
        Gaussian().kl(mean, prediction, variance), torch.distributions.kl_divergence(q, p).sum(-1)
    )


def test_categorical_ignores_and_counts():
    logits = torch.randn(2, 3, 4)
    target = torch.tensor([[0, 1, -100], [3, -100, 2]])
    e = Categorical().energy(logits, target)
    assert e.shape == (2, 3) and e[0, 2] == e[1, 1] == 0
    assert torch.isclose(e[1, 0], -2 * logits[1, 0].log_softmax(0)[3])


def test_energy_of_low_precision_states_is_computed_in_float32():
    e = Gaussian().energy(torch.ones(1, 4096, dtype=torch.bfloat16), torch.zeros(1, 4096, dtype=torch.bfloat16))
    assert e.dtype == torch.float32 and e.item() == 4096


def test_log_ratio_averages_to_the_kl_when_the_prediction_is_independent_of_the_sample():
    mean, prediction, variance = torch.randn(3), torch.randn(3), 0.3
    samples = mean + math.sqrt(variance / 2) * torch.randn(200_000, 3)
    ratio = Gaussian().log_ratio(samples, prediction.expand_as(samples), variance)
    assert abs(ratio.mean() - Gaussian().kl(mean, prediction, variance)) < 4 * ratio.std() / 200_000**0.5


def test_observed_bits():
    logits, bits = torch.randn(4, 3), torch.randint(2, (4, 3))
    expected = -torch.distributions.Bernoulli(logits=logits).log_prob(bits.double()).sum(-1)
    e = Bits().energy(logits, bits)
    torch.testing.assert_close(e, 2 * expected)
    assert Bits().n_scored(4, bits) == 4
