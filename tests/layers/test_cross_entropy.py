"""The chunked loss against torch's own, value and both gradients."""

import pytest
import torch
import torch.nn.functional as F

from hbll_seq.layers import cross_entropy
from hbll_seq.layers.cross_entropy import linear_cross_entropy


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
