"""Composed messages along a chain: exact in the limit, inexact one sweep before, and in constant span."""

import pytest
import torch

from hbll_seq.config import HBLLConfig
from hbll_seq.messages import forward_sweeps
from hbll_seq.model import HBLLForCausalLM
from hbll_seq.objective import BackpropObjective, LocalObjective
from hbll_seq.span import measure_span, small_hierarchy


def double_lm(**changes):
    torch.manual_seed(0)
    model = HBLLForCausalLM(HBLLConfig(**{**dict(vocab_size=17, n_embd=16, n_head=2, block_size=12), **changes}))
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5)
    return model, torch.randint(17, (2, 13))


def gradients(objective, tokens):
    objective.model.zero_grad()
    output = objective(tokens)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in objective.model.named_parameters() if p.grad is not None}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("linearization", ["identity", "zero"])
@pytest.mark.parametrize("init", ["input", "first"])
@pytest.mark.parametrize("path, tie", [(None, True), (None, False), ((2, 4, 6), True), ((4,), True), ((4, 6), False)])
def test_exact_in_the_limit_and_not_before(linearization, init, path, tie):
    model, tokens = double_lm(tie_embeddings=tie)
    exact, reference = gradients(BackpropObjective(model, path), tokens)
    steps = len(model.resolve_path(path=path)) - 1
    options = dict(inference="sweeps", path=path, linearization=linearization, init=init)
    output, ours = gradients(LocalObjective(model, sweeps=steps, corrections=steps, **options), tokens)
    assert largest_difference(ours, reference) < 1e-9
    assert abs(output.loss - exact.loss) < 1e-12
    if steps > 1:
        first = 1 if init == "first" else 0  # which makes the first state exact before any sweep
        fewer_sweeps = LocalObjective(model, sweeps=steps - 1 - first, corrections=steps, **options)
        fewer_corrections = LocalObjective(model, sweeps=steps, corrections=steps - 1, **options)
        assert largest_difference(gradients(fewer_sweeps, tokens)[1], reference) > 1e-7
        assert largest_difference(gradients(fewer_corrections, tokens)[1], reference) > 1e-7


@pytest.mark.parametrize("linearization", ["identity", "zero"])
def test_after_k_sweeps_the_first_k_states_are_exact(linearization):
    model, tokens = double_lm()
    path = model.resolve_path()
    states = [model.embed(tokens)]
    for n in path:
        states += model.chain.apply((n,), (states[-1],))
    for sweeps in range(7):
        inputs, residual = forward_sweeps(
            model.chain, path, states[0].detach(), sweeps=sweeps, linearization=linearization
        )
        errors = [(inputs[n] - states[n]).abs().max().item() for n in range(7)]
        assert max(errors[: sweeps + 1]) < 1e-12
        assert all(error > 1e-6 for error in errors[sweeps + 1 :])
        assert (residual > 0) == (sweeps > 0)


def test_early_stop_and_damping():
    model, tokens = double_lm()
    z0, path = model.embed(tokens).detach(), model.resolve_path()
    calls = []
    apply = model.chain.apply
    model.chain.apply = lambda indices, states: calls.append(1) or apply(indices, states)
    forward_sweeps(model.chain, path, z0, sweeps=50, tolerance=1e-10)
    assert len(calls) <= 8  # six sweeps make it exact, one more sees that nothing changes
    half = forward_sweeps(model.chain, path, z0, sweeps=1, damping=0.5)[0]
    whole = forward_sweeps(model.chain, path, z0, sweeps=1)[0]
    torch.testing.assert_close(half, 0.5 * (whole + z0))


def test_span_does_not_grow_with_the_number_of_blocks():
    torch.manual_seed(0)
    x, y = torch.randn(2, 2), torch.tensor([0, 1])
    for n_level in (3, 4, 6):
        model = small_hierarchy(n_level)
        for sweeps, corrections in ((2, 1), (4, 2)):
            objective = LocalObjective(model, "sweeps", sweeps=sweeps, corrections=corrections)
            span = measure_span(objective, x, y)
            assert span.step == (sweeps + 1) + corrections + 2 + 2  # and the head: forward and backward


def test_no_gradient_passes_from_one_block_to_another():
    """The loss of a block's own node touches that block alone (and, for the first, the embedding)."""
    model, tokens = double_lm(tie_embeddings=False)
    losses = LocalObjective(model, "sweeps").forward(tokens).node_losses
    columns = {n: list(block.parameters()) for n, block in enumerate(model.blocks, start=1)}
    columns |= {"embedding": [model.embed.weight], "head": [model.head.projection.weight]}
    for n, loss in enumerate(losses, start=1):
        reached = {
            name for name, parameters in columns.items()
            if any(g is not None for g in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
        }  # fmt: skip
        nonzero = {
            name for name in reached
            if any((g != 0).any() for g in torch.autograd.grad(loss, columns[name], retain_graph=True, allow_unused=True))
        }  # fmt: skip
        assert nonzero == {n} | ({"embedding"} if n == 1 else set()) | ({"head"} if n == 7 else set())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sweeps=-1), "sweeps=-1"),
        (dict(corrections=1.5), "corrections=1.5"),
        (dict(linearization="diagonal"), "linearization='diagonal'.*identity, zero"),
        (dict(init="tree"), "init='tree'.*input, first"),
        (dict(path=(2, 6)), "dyadic"),
        (dict(inference="tree", path=(4,)), "the tree trains all paths"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LocalObjective(small_hierarchy(3), **{"inference": "sweeps", **options})
