"""The chunked loss against torch's own, value and both gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hbll_seq.layers import cross_entropy
from hbll_seq.layers.cross_entropy import linear_cross_entropy, weighted_cross_entropy


@pytest.mark.parametrize("positions", [1, 5, 64])
@pytest.mark.parametrize("chunk_elements", [1, 40, 10**6])
def test_value_and_gradients(positions, chunk_elements, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CPU_ELEMENTS", chunk_elements)
    monkeypatch.setattr(cross_entropy, "CPU_ROWS", 1)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 7, generator=generator, dtype=torch.float64) for n in (positions, 13))
    targets = torch.randint(13, (positions,), generator=generator)
    targets[::3] = -100
    results = []
    for loss in (
        lambda h, w: F.cross_entropy(h @ w.T, targets, ignore_index=-100, reduction="sum"),
        lambda h, w: linear_cross_entropy(h, w, targets),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = loss(h, w)
        (inner,) = torch.autograd.grad(2.0 * value, h, retain_graph=True)  # as the messages do, before the one backward
        (0.5 * value).backward()
        results.append((value.detach(), inner, h.grad, w.grad))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), results[0][0])


def test_only_what_is_needed_and_no_logits_are_kept():
    hidden, weight, targets = torch.randn(32, 4), torch.randn(1000, 4), torch.randint(1000, (32,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert sorted(kept) == [(32, 4), (1000, 4)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        kept.clear()
        linear_cross_entropy(hidden.detach(), weight, targets).backward()
    assert kept == [(1000, 4)]


def test_who_asks_for_one_gradient_does_not_pay_for_the_other():
    hidden, weight = torch.randn(32, 4).requires_grad_(), torch.randn(1000, 4).requires_grad_()
    read = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: read.append(t.shape) or t):
        loss = linear_cross_entropy(hidden, weight, torch.randint(1000, (32,)))
        for asked in (hidden, weight):
            torch.autograd.grad(loss, asked, retain_graph=True)
    assert read == [(32, 4), (1000, 4)]


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor made inside holds."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(made) if torch.is_tensor(t)]
        self.n = max(getattr(self, "n", 0), *sizes, 0)
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk(dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CPU_ELEMENTS", 3000)
    monkeypatch.setattr(cross_entropy, "CPU_ROWS", 2)
    hidden, weight = torch.randn(64, 2, dtype=dtype).requires_grad_(), torch.randn(500, 2, dtype=dtype).requires_grad_()
    with cross_entropy.fast_products(torch.zeros(1)):  # its test of the processor, made once, is none of this
        pass
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, torch.randint(500, (64,))).backward()
    assert largest.n == 3000


@pytest.mark.parametrize("in_cache", [True, False])
def test_weights_of_positions(in_cache, monkeypatch):
    """Value, nats of each, and gradients; zero and negative weights too. The second form is a GPU's."""
    if not in_cache:
        other = cross_entropy._softmax
        monkeypatch.setattr(cross_entropy, "_softmax_in", lambda buffer, *args: other(*args))
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 5, generator=generator, dtype=torch.float64).requires_grad_() for n in (150, 11))
    targets = torch.randint(11, (150,), generator=generator)
    targets[7:40] = -100
    weights = torch.randn(150, generator=generator)
    weights[45:60] = 0.0
    total, nats = weighted_cross_entropy(hidden, weight, targets, weights)
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="none")
    exact = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nats, expected.detach(), **exact)
    assert not nats.requires_grad
    torch.testing.assert_close(total, (expected * weights).sum(), **exact)
    ours, theirs = (torch.autograd.grad(value, (hidden, weight)) for value in (total, (expected * weights).sum()))
    for mine, its in zip(ours, theirs):
        torch.testing.assert_close(mine, its, **exact)


def test_a_target_too_unlikely_for_a_probability_in_float32_has_its_nats():
    hidden, weight = 40.0 * torch.eye(4), 10.0 * torch.eye(6)[:, :4]  # 400 nats apart
    targets = torch.tensor([0, 2, -100, 5])
    hidden.requires_grad_()
    value = linear_cross_entropy(hidden, weight, targets)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert expected.item() == pytest.approx(800.0)
    torch.testing.assert_close(value, expected)
    for mine, its in zip(torch.autograd.grad(value, hidden), torch.autograd.grad(expected, hidden)):
        torch.testing.assert_close(mine, its)


def test_nothing_to_score():
    weight = torch.randn(7, 3).requires_grad_()
    for n in (0, 4):
        hidden = torch.randn(n, 3).requires_grad_()
        value = linear_cross_entropy(hidden, weight, torch.full((n,), -100))
        assert value.item() == 0.0
        assert not any(g.any() for g in torch.autograd.grad(value, (hidden, weight)))


def test_float32_is_as_exact_as_torch():
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (300, 1000))
    targets = torch.randint(1000, (300,), generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        value = linear_cross_entropy(h, w, targets) / 300
        results.append((value, *torch.autograd.grad(value, (h, w))))
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


def test_half_precision_is_summed_in_float32():
    hidden, weight = torch.randn(64, 8, dtype=torch.bfloat16), torch.randn(50, 8, dtype=torch.bfloat16)
    targets = torch.randint(50, (64,))
    value = linear_cross_entropy(hidden, weight.requires_grad_(), targets)
    exact = F.cross_entropy(hidden.float() @ weight.float().T, targets, reduction="sum")
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=1e-2, atol=0)
    value.backward()
    assert weight.grad.dtype == torch.bfloat16


def test_a_wrong_label_is_refused():
    for label in (-1, 50):
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_cross_entropy(torch.randn(2, 3), torch.randn(50, 3), torch.tensor([4, label]))
