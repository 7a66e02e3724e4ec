"""The gated recurrent unit, with a backward pass of its own.

The Jacobian is wanted anyway, and from it the gradients follow in two products, faster than by autograd. With p_g what W_g
and b_g add to gate g (p_r and p_z stand beside the input's part, p_n is scaled by r first), and i_n the input's part of n,

    s' = (1 - z) n + z s        d s' / d i_n = (1 - z) (1 - n^2)                 by_n
                                d s' / d p_n = (1 - z) (1 - n^2) r               gain_n
                                d s' / d p_r = (1 - z) (1 - n^2) p_n r (1 - r)   gain_r
                                d s' / d p_z = (s - n) z (1 - z)                 gain_z
                                d s' / d s   = diag(z) + sum_g diag(gain_g) W_g  the Jacobian

and for an upstream gradient u of s', the gradients are

    by p    u * gains                     by s    z * u + (u * gains) W
    by W    (u * gains)^T s               by b    sum of u * gains
    by i    u * gains, but u * by_n for gate n

Shapes: H hidden width, ``...`` any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll_seq.layers.gate_arithmetic import add_, by_tiles, is_large, rows_of, tanh_, tiles
from hbll_seq.layers.recurrent import Jacobian, RecurrentCell


class GRUCell(RecurrentCell):
    """The gated recurrent unit (Cho et al. 2014, arXiv 1406.1078) with the equations of torch.nn.GRU:

    ``r, z = sigmoid(W_i x + b_i + W_h s + b_h)``, ``n = tanh(W_in x + b_in + r (W_hn s + b_hn))``, ``s' = (1 - z) n + z s``.
    """

    n_gates = 3

    def transition(self, state: Tensor, projected: Tensor) -> Tensor:
        """See :meth:`RecurrentCell.transition`."""
        if is_large(projected) and not torch.is_grad_enabled():
            return by_tiles(self.transition, state, projected)
        _, z, n, _ = _gates(state, projected, self.weight_hh, self.bias_hh)
        return torch.lerp(n, state, z)

    def differentiate(self, state: Tensor, projected: Tensor) -> tuple[Tensor, Jacobian]:
        """See :meth:`RecurrentCell.differentiate`."""
        if torch.is_grad_enabled() and state.shape[:-1] != projected.shape[:-1]:
            state = state.expand(*projected.shape[:-1], self.hidden_size)  # the backward pass wants a row for each
        output, gains, direct = _DifferentiatedGRU.apply(state, projected, self.weight_hh, self.bias_hh)
        return output, Jacobian(direct, gains, self.weight_hh.detach())

    def _set_keeping_odds(self, odds: Tensor) -> None:
        update = slice(self.hidden_size, 2 * self.hidden_size)  # z, of r, z, n; it keeps the state where it is 1
        self.bias_ih[update], self.bias_hh[update] = odds.log(), 0.0


def _gates(state: Tensor, projected: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r, z, n and p_n = ``W_n s + b_n``, each [..., H]."""
    width = state.shape[-1]
    hidden = F.linear(state, weight, bias).to(state.dtype)
    # split, because the backward pass of a slice fills a tensor of the whole width with zeros
    hidden_rz, hidden_n = hidden.split((2 * width, width), dim=-1)
    projected_rz, projected_n = projected.split((2 * width, width), dim=-1)
    r, z = add_(hidden_rz, projected_rz).sigmoid_().split(width, dim=-1)
    n = tanh_(torch.addcmul(projected_n, r, hidden_n))
    return r, z, n, hidden_n


def _parts(gates: Tensor) -> list[slice]:
    """The tiles of a large call; the whole of another."""
    return tiles(gates) if is_large(gates) else [slice(None)]


class _DifferentiatedGRU(torch.autograd.Function):
    """A GRU's transition with its Jacobian, and the backward pass that follows from that (top of this file).

    ``(state, projected, weight, bias)`` -> next state, gains, direct; the latter two as in :class:`Jacobian`. Autograd would
    keep every gate beside the Jacobian, and would put the gradients of the gates together again from parts.
    """

    @staticmethod
    def forward(ctx, state: Tensor, projected: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Next state, gains and direct, tile by tile."""
        device, width, rows = state.device.type, state.shape[-1], projected.shape[:-1]
        ctx.precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        low_weight = weight if ctx.precision is None else weight.to(ctx.precision)  # once, and not in autocast's cache
        output, direct, by_n = (state.new_empty((*rows, width)) for _ in range(3))
        gains = state.new_empty((*rows, 3 * width))
        for part in _parts(projected):
            s = rows_of(state, part)
            r, z, n, hidden_n = _gates(s, projected[part], low_weight, bias)
            torch.lerp(n, s, z, out=output[part])
            direct[part] = z
            gain_r, gain_z, gain_n = gains[part].split(width, dim=-1)
            torch.mul(n, n, out=by_n[part]).sub_(1).mul_(z - 1)  # (1 - n^2) (1 - z)
            torch.mul(by_n[part], r, out=gain_n)
            by_r, by_z = gain_n * hidden_n, (s - n).mul_(z)
            torch.addcmul(by_r, by_r, r, value=-1.0, out=gain_r)  # by_r (1 - r)
            torch.addcmul(by_z, by_z, z, value=-1.0, out=gain_z)
        ctx.save_for_backward(state, weight, gains, direct, by_n)
        ctx.projected_dtype = projected.dtype
        ctx.mark_non_differentiable(gains, direct)
        ctx.set_materialize_grads(False)
        return output, gains, direct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        """Gradients by state, projected, weight and bias, each where it is asked for."""
        if upstream is None:
            return None, None, None, None
        state, weight, gains, direct, by_n = ctx.saved_tensors
        wants_state, wants_projected, wants_weight, wants_bias = ctx.needs_input_grad
        low = (lambda t: t) if ctx.precision is None else (lambda t: t.to(ctx.precision))
        width, low_weight = state.shape[-1], low(weight)
        by_gates = torch.empty_like(gains)
        by_state = torch.empty_like(state) if wants_state else None
        by_weight = torch.zeros_like(weight) if wants_weight else None
        by_bias = weight.new_zeros(len(weight)) if wants_bias else None
        for part in _parts(gains):
            u, tile = upstream[part], by_gates[part]
            for gate, gain in zip(tile.split(width, dim=-1), gains[part].split(width, dim=-1)):
                torch.mul(gain, u, out=gate)
            rows = tile.reshape(-1, 3 * width)  # u * gains
            low_rows = low(rows)
            if wants_weight:
                by_weight += low_rows.t() @ low(state[part].reshape(-1, width))
            if wants_bias:
                by_bias += rows.sum(0)
            if wants_state:
                through_gates = (low_rows @ low_weight).view(u.shape).to(state.dtype)
                torch.addcmul(through_gates, direct[part], u, out=by_state[part])
            torch.mul(by_n[part], u, out=tile[..., 2 * width :])  # r does not scale the input's part of n
        by_projected = by_gates.to(ctx.projected_dtype) if wants_projected else None
        return by_state, by_projected, by_weight, by_bias
