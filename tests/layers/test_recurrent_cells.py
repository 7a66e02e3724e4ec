"""Recurrent cells: equations of torch's own, known Jacobians, one token at a time or all at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hbll_seq.layers import gate_arithmetic
from hbll_seq.layers.cells import CELL_KINDS, make_cell
from hbll_seq.layers.elman import ElmanCell
from hbll_seq.layers.gru import GRUCell
from hbll_seq.layers.recurrent import RecurrentState


def gru_reference(state, projected, weight, bias):
    """The transition in plain form, which autograd differentiates: gates r, z, n, each [..., H], side by side."""
    input_r, input_z, input_n = projected.chunk(3, dim=-1)
    hidden_r, hidden_z, hidden_n = F.linear(state, weight, bias).chunk(3, dim=-1)
    r = torch.sigmoid(input_r + hidden_r)
    z = torch.sigmoid(input_z + hidden_z)
    n = torch.tanh(input_n + r * hidden_n)
    return (1 - z) * n + z * state


def double_cell(kind, input_size=5, hidden_size=6):
    torch.manual_seed(0)
    return make_cell(kind, input_size, hidden_size).double()


@pytest.mark.parametrize("nonlinearity, n_steps", [("gru", 9), ("tanh", 9), ("gru", 1), ("tanh", 1)])
def test_torch_gives_the_same_with_copied_weights(nonlinearity, n_steps):
    torch.manual_seed(1)
    cell = (GRUCell(5, 6) if nonlinearity == "gru" else ElmanCell(5, 6, nonlinearity)).double()
    reference = (nn.GRU if nonlinearity == "gru" else nn.RNN)(5, 6, batch_first=True).double()
    with torch.no_grad():
        for name, p in cell.named_parameters():
            getattr(reference, f"{name}_l0").copy_(p)
    x, h0 = torch.randn(3, n_steps, 5, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    y, state = cell(x, RecurrentState(h0))
    expected, last = reference(x, h0[None])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.hidden, last[0], rtol=0, atol=1e-12)
    weights = torch.randn_like(y)  # and their gradients, by backpropagation through time on both sides
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, p in cell.named_parameters():
        torch.testing.assert_close(p.grad, getattr(reference, f"{name}_l0").grad, rtol=0, atol=1e-11)
    one = (nn.GRUCell if nonlinearity == "gru" else nn.RNNCell)(5, 6).double()
    one.load_state_dict(cell.state_dict())  # same names and layout
    torch.testing.assert_close(cell.step(x[:, 0], RecurrentState(h0))[0], one(x[:, 0], h0), rtol=0, atol=1e-12)


def test_sigmoid_elman_is_its_equation():
    cell = double_cell("elman-sigmoid")
    x, h = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)
    expected = (x @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T + cell.bias_hh).sigmoid()
    torch.testing.assert_close(cell.transition(h, cell.project(x)), expected)


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_jacobians_are_those_of_autograd(kind):
    cell = double_cell(kind)
    x, s = torch.randn(7, 2, 5, dtype=torch.float64), torch.randn(7, 2, 6, dtype=torch.float64)
    projected = cell.project(x)
    output, jacobian = cell.differentiate(s, projected)
    torch.testing.assert_close(output, cell.transition(s, projected))
    message = torch.randn_like(s)
    for t in range(7):
        for b in range(2):
            exact = torch.autograd.functional.jacobian(lambda v: cell.transition(v, projected[t, b]), s[t, b])
            torch.testing.assert_close(cell.diagonal(s, projected)[t, b], exact.diagonal(), rtol=0, atol=1e-12)
            torch.testing.assert_close(jacobian.vjp(message)[t, b], message[t, b] @ exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(jacobian.between(3, 6).vjp(message[3:6]), jacobian.vjp(message)[3:6])
    assert not cell.diagonal(s, projected).requires_grad


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("n_tokens", [1, 2, 63])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_is_step_after_step(kind, n_tokens, padded, grad):
    cell = double_cell(kind)
    x = torch.randn(3, n_tokens, 5, dtype=torch.float64)
    start = torch.tensor([0, min(1, n_tokens - 1), n_tokens - 1]) if padded else None
    with torch.set_grad_enabled(grad):
        y, state = cell(x, cell.initial_state(start))
        one, outputs = cell.initial_state(start), []
        for t in range(n_tokens):
            output, one = cell.step(x[:, t], one)
            outputs.append(output)
        torch.testing.assert_close(y, torch.stack(outputs, dim=1), rtol=0, atol=1e-12)
        torch.testing.assert_close(state.hidden, one.hidden, rtol=0, atol=1e-12)
        first, middle = cell(x[:, : n_tokens // 2 + 1], cell.initial_state(start))  # in two calls, and the state unchanged
        kept = middle.hidden.clone()
        if n_tokens > 1:
            second, last = cell(x[:, n_tokens // 2 + 1 :], middle) if n_tokens > 2 else (y[:, :0], state)
            torch.testing.assert_close(torch.cat((first, second), dim=1), y, rtol=0, atol=1e-12)
        assert torch.equal(kept, middle.hidden)
        if padded:  # padding leaves no trace: the row alone, without it, gives the same
            alone, _ = cell(x[2:, start[2] :])
            torch.testing.assert_close(y[2:, start[2] :], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_a_narrow_input_is_one_after_zeros(kind):
    cell = double_cell(kind, input_size=6)
    x = torch.randn(4, 2, dtype=torch.float64)
    whole = torch.cat((x.new_zeros(4, 4), x), dim=1)
    torch.testing.assert_close(cell.project(x), cell.project(whole))
    with pytest.raises(ValueError, match="width 7.*at most 6.*input_size=7"):
        cell.project(x.new_zeros(4, 7))


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="kind 'lstm'.*gru, mingru"):
        make_cell("lstm", 3, 4)
    with pytest.raises(ValueError, match="hidden_size=0"):
        make_cell("gru", 3, 0)
    with pytest.raises(ValueError, match="nonlinearity='relu'.*tanh, sigmoid"):
        ElmanCell(3, 4, "relu")


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_large_sweeps_are_the_same_function(kind, dtype, tolerance):
    """They take tanh from sigmoid."""
    torch.manual_seed(0)
    cell = make_cell(kind, 5, 64).to(dtype)
    x, s = 5 * torch.randn(300, 5, dtype=dtype), torch.randn(300, 64, dtype=dtype)
    with torch.no_grad():
        large, small = cell.transition(s, cell.project(x)), [cell.transition(a, cell.project(b)) for a, b in zip(s, x)]
    torch.testing.assert_close(large, torch.stack(small), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("tile", [1, 100, 300])
def test_tiles_are_the_same_function(kind, tile, monkeypatch):
    cell = double_cell(kind)
    s, message = torch.randn(2, 11, 2, 6, dtype=torch.float64)
    projected = cell.project(torch.randn(11, 2, 5, dtype=torch.float64)).detach()

    def everything():
        output, jacobian = cell.differentiate(s, projected)
        with torch.no_grad():
            return cell.transition(s, projected), output, jacobian.diagonal(), jacobian.vjp(message)

    whole = everything()
    reference = gradients(cell.transition, cell, s, projected, message)
    monkeypatch.setattr(gate_arithmetic, "TILE", tile)
    for tiled, expected in zip(everything(), whole):
        torch.testing.assert_close(tiled, expected, rtol=0, atol=1e-14)
    ours = gradients(lambda *inputs: cell.differentiate(*inputs)[0], cell, s, projected, message)
    for gradient, expected in zip(ours, reference):  # a GRU makes its own
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows, width", [((), 1), ((1,), 3), ((7, 3), 5), ((2, 1, 3), 2), ((131, 1), 65)], ids=str)
@pytest.mark.parametrize("tile", [1, 100, 2**19])
def test_a_gru_and_its_own_backward_pass_are_the_reference(rows, width, tile, monkeypatch):
    """Outputs, all four gradients and the Jacobian, at odd sizes."""
    monkeypatch.setattr(gate_arithmetic, "TILE", tile)
    cell = double_cell("gru", 5, width)
    s, projected, upstream = (torch.randn(*rows, n * width, dtype=torch.float64) for n in (1, 3, 1))
    inputs = [s.requires_grad_(), projected.requires_grad_(), cell.weight_hh, cell.bias_hh]
    expected = gru_reference(*inputs)
    output, jacobian = cell.differentiate(s, projected)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(cell.transition(s, projected), expected, rtol=0, atol=1e-14)
    by_autograd = torch.autograd.grad(expected, inputs, upstream)
    for ours, reference in zip(torch.autograd.grad(output, inputs, upstream), by_autograd):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(jacobian.vjp(upstream), by_autograd[0], rtol=1e-12, atol=1e-13)
    for wanted in (0, 1, 2, 3):  # each by itself: the others' gradients are left out
        (alone,) = torch.autograd.grad(cell.differentiate(s, projected)[0], inputs[wanted], upstream)
        torch.testing.assert_close(alone, by_autograd[wanted], rtol=1e-12, atol=1e-13)


def gradients(f, cell, s, projected, message):
    """By state, projected input and what multiplies the state."""
    inputs = [s.clone().requires_grad_(True), projected.clone().requires_grad_(True)]
    weights = [cell.weight_hh, cell.bias_hh] if cell.has_recurrent_weight else []
    return torch.autograd.grad(f(*inputs), [*inputs, *weights], message)


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_gradients_under_autocast_are_those_of_autograd(kind):
    torch.manual_seed(0)
    cell = make_cell(kind, 5, 6)
    s, message = torch.randn(2, 11, 2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        projected = cell.project(torch.randn(11, 2, 5)).detach()
        reference = gradients(cell.transition, cell, s, projected, message)
        ours = gradients(lambda *inputs: cell.differentiate(*inputs)[0], cell, s, projected, message)
    for gradient, expected in zip(ours, reference):
        assert gradient.dtype == expected.dtype
        torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("tile", [100, 2**19])
def test_one_state_for_all_transitions(kind, tile, monkeypatch):
    """A state [1, ...] is multiplied with the matrix once."""
    monkeypatch.setattr(gate_arithmetic, "TILE", tile)
    cell = double_cell(kind)
    s = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    projected = cell.project(torch.randn(11, 2, 5, dtype=torch.float64)).detach()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            everywhere = s.expand(11, 2, 6)
            torch.testing.assert_close(cell.transition(s, projected), cell.transition(everywhere, projected))
            (output, jacobian), (expected, known) = (cell.differentiate(state, projected) for state in (s, everywhere))
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close(jacobian.diagonal(), known.diagonal())
            if grad:
                for transition in (cell.transition, lambda *given: cell.differentiate(*given)[0]):
                    ours, of_all = (torch.autograd.grad(transition(x, projected).square().sum(), s) for x in (s, everywhere))
                    torch.testing.assert_close(ours, of_all)


@pytest.mark.parametrize("kind", ["gru", "mingru"])
def test_memory_sets_how_long_units_keep_their_state(kind):
    torch.manual_seed(0)
    cell = make_cell(kind, 3, 2000, memory=100)
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh"):
            getattr(cell, name, torch.zeros(())).zero_()
        kept = cell.diagonal(torch.zeros(1, 2000), cell.project(torch.zeros(1, 3)))[0]
    odds = kept / (1 - kept)  # of keeping a state for one more step
    assert odds.min() > 0.99 and odds.max() < 99.1
    torch.testing.assert_close(odds.mean().item(), 50.0, rtol=0.05, atol=0)


@pytest.mark.parametrize("kind, memory, message", [
    ("gru", 1, "memory=1.*at least 2"), ("gru", "long", "memory='long'"), ("gru", float("inf"), "memory=inf"),
    ("elman", 10, "ElmanCell.*no gate.*gru or mingru"),
])  # fmt: skip
def test_memory_that_cannot_be_had(kind, memory, message):
    with pytest.raises(ValueError, match=message):
        make_cell(kind, 3, 4, memory=memory)
