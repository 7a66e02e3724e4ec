"""Blocks side by side as batched products, against the loop over the blocks themselves."""

import pytest
import torch
from torch import nn

from hbll_seq.chains.stacked import StackedBlocks
from hbll_seq.layers.attention import TransformerBlock

FORMS = {
    "plain": {},
    "grouped": dict(n_kv_head=2), "one key head": dict(n_kv_head=1),
    "swiglu": dict(mlp="swiglu"), "wide mlp": dict(mlp_ratio=3),
    "qk norm": dict(qk_norm=True), "qk norm, grouped": dict(qk_norm=True, n_kv_head=2),
    "layernorm": dict(norm="layernorm"), "window": dict(window=3), "window of one": dict(window=1),
    "another base": dict(rope_base=50.0),
    "all": dict(norm="layernorm", mlp="swiglu", qk_norm=True, n_kv_head=2, window=4, rope_base=500.0),
}  # fmt: skip
WIDTH, N_HEAD = 24, 4  # heads of 6


def blocks_of(n=5, width=WIDTH, dtype=torch.float64, **options):
    """Blocks whose parameters are all away from where they begin, so that every one of them matters."""
    torch.manual_seed(0)
    blocks = [TransformerBlock(width, N_HEAD, **{"window": 64, **options}).to(dtype) for _ in range(n)]
    for block in blocks:
        for p in block.parameters():
            nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2)
    return blocks


def states_of(rows, batch=3, tokens=7, width=WIDTH, dtype=torch.float64):
    return torch.randn(len(rows), batch, tokens, width, dtype=dtype, requires_grad=True)


def loop(blocks, rows, states):
    return torch.stack([blocks[r](s)[0] for r, s in zip(rows, states)])


def derivatives(outputs, states, blocks, upstream):
    """By the states, and by every parameter of every block."""
    parameters = [p for block in blocks for p in block.parameters()]
    return torch.autograd.grad(outputs, [states, *parameters], upstream, allow_unused=True, retain_graph=True)


def assert_equal_to_loop(blocks, rows, states, tolerance=1e-12):
    stacked, expected = StackedBlocks.of(blocks)(rows, states), loop(blocks, rows, states)
    torch.testing.assert_close(stacked, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(expected)
    for found, right in zip(*(derivatives(y, states, blocks, upstream) for y in (stacked, expected))):
        assert (found is None) == (right is None)
        if right is not None:
            assert states.shape[2] == 1 or right.abs().max() > 1e-3  # one token alone does not depend on its query
            torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance * max(1.0, right.abs().max().item()))
    with torch.no_grad():
        torch.testing.assert_close(StackedBlocks.of(blocks)(rows, states), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch, tokens", [(3, 7), (1, 1), (2, 1), (1, 5)])
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_outputs_and_all_gradients_are_those_of_the_loop(options, batch, tokens):
    rows = range(5)
    assert_equal_to_loop(blocks_of(**options), rows, states_of(rows, batch, tokens), 1e-12)


@pytest.mark.parametrize("rows", [[0], [4], [1, 2, 3], [0, 2, 4], [1, 4], [3, 1], [0, 1, 3], [4, 3, 2], [2, 2, 0]], ids=str)
def test_any_rows_in_any_order(rows):
    assert_equal_to_loop(blocks_of(qk_norm=True), rows, states_of(rows))


def test_a_width_that_no_register_divides_and_states_that_are_a_view():
    blocks = blocks_of(3, width=40, n_kv_head=2, mlp="swiglu", mlp_ratio=1)
    states = torch.randn(3, 11, 2, 40, dtype=torch.float64).transpose(1, 2).requires_grad_()
    assert_equal_to_loop(blocks, range(3), states)


@pytest.mark.parametrize("options", [{}, FORMS["all"]], ids=["plain", "all"])
def test_single_precision(options):
    rows = range(5)
    assert_equal_to_loop(blocks_of(dtype=torch.float32, **options), rows, states_of(rows, dtype=torch.float32), 2e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch, of the loop's qk_norm
@pytest.mark.parametrize("options", [{}, FORMS["all"]], ids=["plain", "all"])
def test_autocast_rounds_as_the_loop_does(options):
    blocks, rows = blocks_of(dtype=torch.float32, **options), range(5)
    states = states_of(rows, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        stacked, expected = StackedBlocks.of(blocks)(rows, states), loop(blocks, rows, states)
    exact = loop(blocks, rows, states)
    assert stacked.dtype == expected.dtype == torch.float32
    upstream = torch.randn_like(expected)
    found, right, precise = (derivatives(y, states, blocks, upstream) for y in (stacked, expected, exact))
    off = []
    for a, b, c in zip([stacked, *found], [expected, *right], [exact, *precise]):
        assert a.dtype == b.dtype
        off.append(torch.stack([(a - c).norm(), (b - c).norm()]) / c.norm())
    ours, of_loop = torch.stack(off).mean(dim=0).tolist()
    assert of_loop > 1e-3 and ours < 1.1 * of_loop  # the loop was in half precision, and stacked rows are no further off


def test_autocast_leaves_double_precision_alone():
    blocks, rows = blocks_of(), range(5)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_to_loop(blocks, rows, states_of(rows))


def test_gradients_are_accumulated():
    blocks, rows = blocks_of(3), [0, 2, 0]
    states, upstream = states_of(rows), torch.randn(3, 3, 7, WIDTH, dtype=torch.float64)
    for _ in range(2):
        StackedBlocks.of(blocks)(rows, states).backward(upstream)
    found = [[p.grad for p in block.parameters()] for block in blocks]
    assert all(g is None for g in found[1])
    for block in blocks:
        block.zero_grad()
    for _ in range(2):
        loop(blocks, rows, states).backward(upstream)
    for block, gradients in zip(blocks[::2], found[::2]):
        for p, g in zip(block.parameters(), gradients):
            torch.testing.assert_close(g, p.grad, rtol=1e-12, atol=1e-11)


def test_gradients_lie_in_memory_as_the_parameters_do():
    blocks, rows = blocks_of(3), range(3)
    y = StackedBlocks.of(blocks)(rows, states_of(rows))
    parameters = [p for block in blocks for p in block.parameters()]
    for p, g in zip(parameters, torch.autograd.grad(y.sum(), parameters)):
        assert g.stride() == p.stride()  # or torch would copy it


def test_a_product_by_the_states_alone_computes_no_gradient_of_a_matrix():
    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "bmm" in str(func):
                self.shapes.append(tuple(out.shape))
            return out

    blocks, rows = blocks_of(3), range(3)
    states = states_of(rows)
    y = StackedBlocks.of(blocks)(rows, states)
    upstream = torch.randn_like(y)
    with Products() as seen:
        torch.autograd.grad(y, states, upstream, retain_graph=True)
    assert sorted(seen.shapes) == sorted([(3, 21, WIDTH)] * 3 + [(3, 21, 4 * WIDTH)])
    with Products() as seen:
        y.backward(upstream)
    assert len(seen.shapes) == 8


@pytest.mark.parametrize("frozen", ["qkv.weight", "norm_attention.weight", "mlp_out.weight"])
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(frozen):
    blocks, rows = blocks_of(3), range(3)
    dict(blocks[1].named_parameters())[frozen].requires_grad_(False)
    states, upstream = states_of(rows), torch.randn(3, 3, 7, WIDTH, dtype=torch.float64)
    StackedBlocks.of(blocks)(rows, states).backward(upstream)
    found = [(p, p.grad) for block in blocks for p in block.parameters()]
    for block in blocks:
        block.zero_grad()
    loop(blocks, rows, states).backward(upstream)
    assert sum(g is None for _, g in found) == 1
    for p, g in found:
        assert (g is None) == (not p.requires_grad)
        if g is not None:
            torch.testing.assert_close(g, p.grad, rtol=1e-12, atol=1e-12)


def test_all_frozen_or_states_without_gradient():
    blocks, rows = blocks_of(3), range(3)
    states = states_of(rows)
    y = StackedBlocks.of(blocks)(rows, states.detach())
    y.sum().backward()
    assert all(p.grad is not None for block in blocks for p in block.parameters())
    for block in blocks:
        block.requires_grad_(False)
    assert not StackedBlocks.of(blocks)(rows, states.detach()).requires_grad
    (found,) = torch.autograd.grad(StackedBlocks.of(blocks)(rows, states).square().sum(), states)
    (right,) = torch.autograd.grad(loop(blocks, rows, states).square().sum(), states)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_changed_weights_are_seen_and_an_older_graph_keeps_its_own():
    blocks, rows = blocks_of(3), range(3)
    stack, states = StackedBlocks.of(blocks), states_of(rows)
    y, upstream = stack(rows, states), torch.randn(3, 3, 7, WIDTH, dtype=torch.float64)
    (right,) = torch.autograd.grad(loop(blocks, rows, states), states, upstream)
    with torch.no_grad():
        blocks[2].mlp_in.weight.mul_(2)
        torch.testing.assert_close(stack(rows, states), loop(blocks, rows, states), rtol=1e-12, atol=1e-12)
        blocks[0].norm_mlp.weight.data = blocks[0].norm_mlp.weight.data + 1
        torch.testing.assert_close(stack(rows, states), loop(blocks, rows, states), rtol=1e-12, atol=1e-12)
        blocks[1].qkv.weight.data.mul_(2)  # which torch does not count
        stack.refresh()
        torch.testing.assert_close(stack(rows, states), loop(blocks, rows, states), rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(y, states, upstream)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_weights_are_copied_once_while_they_stay():
    blocks, rows = blocks_of(4), range(3)
    stack, states = StackedBlocks.of(blocks), states_of(rows)
    stack([1, 2], states[:2])
    copies = stack._copies
    with torch.no_grad():
        stack(rows, states)
    stack([3], states[:1]).sum().backward()
    assert stack._copies is copies
    with torch.autocast("cpu", torch.bfloat16):
        stack(rows, states)
    assert stack._copies is copies  # of double precision autocast makes nothing


def test_what_was_copied_in_inference_mode_serves_training():
    blocks, rows = blocks_of(3, window=4), range(3)
    stack, states = StackedBlocks.of(blocks), states_of(rows)
    with torch.inference_mode():
        stack(rows, states.detach())
    stack(rows, states).sum().backward()
    assert blocks[0].qkv.weight.grad is not None


def test_second_derivatives_are_refused():
    blocks, rows = blocks_of(2), range(2)
    states = states_of(rows)
    y = StackedBlocks.of(blocks)(rows, states)
    with pytest.raises(RuntimeError, match="first derivatives only.*the blocks themselves"):
        torch.autograd.grad(y.sum(), states, create_graph=True)


def test_recomputed_by_a_checkpoint():
    blocks, rows = blocks_of(3), range(3)
    states, upstream = states_of(rows), torch.randn(3, 3, 7, WIDTH, dtype=torch.float64)
    stack = StackedBlocks.of(blocks)
    y = torch.utils.checkpoint.checkpoint(lambda s: stack(rows, s), states, use_reentrant=False, preserve_rng_state=False)
    for found, right in zip(*(derivatives(out, states, blocks, upstream) for out in (y, loop(blocks, rows, states)))):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-11)
