"""Recurrent cells: Elman, GRU and minGRU, written so that all time steps of a sequence can be evaluated at once.

A cell is split in two: ``project`` makes the input's part of all gates for a whole sequence in one product, and
``transition`` takes a state one step further, for any number of (state, input) pairs at once. Their Jacobian is known:

    d s_t / d s_{t-1} = diag(direct) + sum_g diag(gains_g) W_g

with W_g the recurrent matrix of gate g. Its diagonal, and its product with a message, cost less than the cell itself.

Shapes: B batch, T tokens, I input width, H hidden width, G gates, ``...`` any leading dimensions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbll_seq.engine.scan import affine_scan
from hbll_seq.layers.base import Cell
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_whole, check_choice


class Jacobian(NamedTuple):
    """d s_t / d s_{t-1} of many transitions, detached: ``diag(direct) + sum_g diag(gains_g) W_g``.

    direct: [..., H], or None for zero.
    gains: [..., G * H], or None where no gate reads the state.
    weight: [G * H, H], the recurrent matrices, or None.
    """

    direct: Tensor | None
    gains: Tensor | None = None
    weight: Tensor | None = None

    def between(self, low: int, high: int | None = None, step: int = 1) -> Jacobian:
        """Those of the transitions low .. high - 1, every ``step``-th of them, along the first dimension."""
        direct, gains = (None if part is None else part[low:high:step] for part in (self.direct, self.gains))
        return Jacobian(direct, gains, self.weight)

    def diagonal(self) -> Tensor:
        """Diagonals of the matrices, [..., H]."""
        if self.gains is None:
            return self.direct
        diagonals = self.weight.view(-1, *self.weight.shape[1:] * 2).diagonal(dim1=-2, dim2=-1)  # [G, H]
        gains = self.gains.unflatten(-1, diagonals.shape)
        total = torch.zeros_like(gains[..., 0, :]) if self.direct is None else self.direct.clone()
        for gain, diagonal in zip(gains.unbind(-2), diagonals):
            total.addcmul_(gain, diagonal)
        return total

    def vjp(self, message: Tensor) -> Tensor:
        """``J^T message``, transposed Jacobian times [..., H]: a product with W for all transitions at once."""
        if self.gains is None:
            return self.direct * message
        if _is_large(self.gains):
            product = torch.empty_like(message)
            for part in _tiles(self.gains):
                product[part] = self.between(part.start, part.stop).vjp(message[part])
            return product
        scaled = (self.gains.unflatten(-1, (-1, message.shape[-1])) * message.unsqueeze(-2)).flatten(-2)
        product = (scaled @ self.weight).to(message.dtype)  # under autocast the product is in its precision
        return product if self.direct is None else product.addcmul_(self.direct, message)


class RecurrentState(NamedTuple):
    """What a recurrent cell remembers.

    hidden: [B, H], or None before the first token (zero).
    padding: [B] how many of the tokens to come are left padding, which leaves the state as it is; None for none.
    """

    hidden: Tensor | None = None
    padding: Tensor | None = None


class RecurrentCell(Cell):
    """A cell s_t = f(s_{t-1}, x_t) whose output is its state.

    Args:
        input_size: I.
        hidden_size: H.

    Attributes:
        n_gates: G, number of [H] blocks that ``project`` makes of an input.

    Raises:
        ValueError: a size is not a whole number of at least 1.
    """

    n_gates = 1
    #: whether the gates read the state through a matrix; one without is exact in one scan.
    has_recurrent_weight = True

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        input_size, hidden_size = as_whole("input_size", input_size, 1), as_whole("hidden_size", hidden_size, 1)
        self.input_size, self.hidden_size = input_size, hidden_size
        width = self.n_gates * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(width, input_size))  # names and layout of torch.nn.GRUCell, RNNCell
        self.bias_ih = nn.Parameter(torch.empty(width))
        if self.has_recurrent_weight:
            self.weight_hh = nn.Parameter(torch.empty(width, hidden_size))
            self.bias_hh = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ``+- 1 / sqrt(H)``, as torch.nn.GRU and torch.nn.RNN start."""
        bound = self.hidden_size**-0.5
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    @torch.no_grad()
    def set_memory(self, longest: float) -> None:
        """Draws the biases of the gates anew so that at first units forget in some 2 to ``longest`` steps, evenly spread: the
        odds that a gate keeps its state are uniform in 1 .. longest - 1 (chrono initialisation: Tallec and Ollivier 2018,
        arXiv 1804.11188).

        Raises:
            ValueError: the number is less than 2, or the cell has no gate that keeps its state.
        """
        if not isinstance(longest, (int, float)) or isinstance(longest, bool) or not 2 <= longest < math.inf:
            raise ValueError(f"memory={quote(longest)}: must be a number of steps, at least 2, such as the span that matters")
        self._set_keeping_odds(torch.empty_like(self.bias_ih[: self.hidden_size]).uniform_(1.0, longest - 1.0))

    def _set_keeping_odds(self, odds: Tensor) -> None:
        raise ValueError(f"memory with a {type(self).__name__}: it has no gate that keeps its state; leave memory out, or "
                         "choose the cell gru or mingru")  # fmt: skip

    def project(self, x: Tensor) -> Tensor:
        """The input's part of the gates, ``x`` [..., I] -> [..., G * H], of all tokens at once.

        An input narrower than I is read as though zeros stood before it: so one cell can read windows of several lengths.

        Raises:
            ValueError: the input is wider than I.
        """
        width = x.shape[-1]
        if width > self.input_size:
            raise ValueError(f"input of width {width}: this cell reads at most {self.input_size}; set input_size={width}")
        weight = self.weight_ih if width == self.input_size else self.weight_ih[:, -width:]
        return F.linear(x, weight, self.bias_ih)

    @abstractmethod
    def transition(self, state: Tensor, projected: Tensor) -> Tensor:
        """``state`` [..., H], ``projected`` [..., G * H] -> next state [..., H] in the dtype of ``state``."""

    @abstractmethod
    def differentiate(self, state: Tensor, projected: Tensor) -> tuple[Tensor, Jacobian]:
        """What :meth:`transition` gives, attached, and the Jacobians by the state at the same inputs, detached."""

    @torch.no_grad()
    def diagonal(self, state: Tensor, projected: Tensor) -> Tensor:
        """Diagonals of d s_t / d s_{t-1}, [..., H], detached."""
        return self.differentiate(state, projected)[1].diagonal()

    def initial_state(self, start: Tensor | None = None) -> RecurrentState:
        """See :meth:`Cell.initial_state`."""
        return RecurrentState(padding=start)

    def forward(self, x: Tensor, state: RecurrentState | None = None) -> tuple[Tensor, RecurrentState]:
        """See :meth:`Cell.forward`; ``x`` [B, T, I] -> all states [B, T, H]. One transition after the other."""
        hidden, padding, mask = self._begin(x, state)
        projected = self.project(x)
        outputs = []
        for t, p in enumerate(projected.unbind(1)):
            new = self.transition(hidden, p)
            hidden = new if mask is None else torch.where(mask[:, t, None], hidden, new)
            outputs.append(hidden)
        return torch.stack(outputs, dim=1), RecurrentState(hidden, padding)

    def _begin(self, x: Tensor, state: RecurrentState | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """First state [B, H], padding after this call, and which tokens of it are padding [B, T]."""
        state, shape = state or RecurrentState(), (x.shape[0], self.hidden_size)
        if x.dim() != 3 or not x.shape[1]:
            raise ValueError(f"inputs of shape {tuple(x.shape)}: a recurrent cell reads [batch, steps, width], steps above 0")
        for name, part, expected in (("state", state.hidden, shape), ("padding", state.padding, shape[:1])):
            if part is not None and tuple(part.shape) != expected:  # which torch would broadcast
                given = f"{name} of shape {tuple(part.shape)} with inputs of shape {tuple(x.shape)}"
                raise ValueError(f"{given}: must be of shape {expected}")
        hidden = x.new_zeros((x.shape[0], self.hidden_size)) if state.hidden is None else state.hidden
        if state.padding is None:
            return hidden, None, None
        mask = torch.arange(x.shape[1], device=x.device) < state.padding[:, None]
        return hidden, (state.padding - x.shape[1]).clamp(min=0), mask

    def extra_repr(self) -> str:
        """Sizes, for ``print(cell)``."""
        return f"{self.input_size}, {self.hidden_size}"


class ElmanCell(RecurrentCell):
    """``s_t = phi(W_ih x_t + b_ih + W_hh s_{t-1} + b_hh)`` (Elman 1990); tanh: equations of torch.nn.RNN.

    Args:
        input_size, hidden_size: see :class:`RecurrentCell`.
        nonlinearity: ``"tanh"`` or ``"sigmoid"``.

    Raises:
        ValueError: the nonlinearity is another one.
    """

    def __init__(self, input_size: int, hidden_size: int, nonlinearity: str = "tanh"):
        check_choice("nonlinearity", nonlinearity, ("tanh", "sigmoid"))
        super().__init__(input_size, hidden_size)
        self.nonlinearity = nonlinearity

    def transition(self, state: Tensor, projected: Tensor) -> Tensor:
        """See :meth:`RecurrentCell.transition`."""
        if _is_large(projected) and not torch.is_grad_enabled():
            return _by_tiles(self.transition, state, projected)
        before = _add(_recurrent_part(state, self.weight_hh, self.bias_hh), projected)
        return _tanh_(before) if self.nonlinearity == "tanh" else before.sigmoid_()

    def differentiate(self, state: Tensor, projected: Tensor) -> tuple[Tensor, Jacobian]:
        """See :meth:`RecurrentCell.differentiate`: phi' of tanh is 1 - s^2, of sigmoid s (1 - s)."""
        output = self.transition(state, projected)
        s = output.detach()
        slope = 1 - s * s if self.nonlinearity == "tanh" else s - s * s
        return output, Jacobian(None, slope, self.weight_hh.detach())


class GRUCell(RecurrentCell):
    """The gated recurrent unit (Cho et al. 2014, arXiv 1406.1078) with the equations of torch.nn.GRU:

    ``r, z = sigmoid(W_i x + b_i + W_h s + b_h)``, ``n = tanh(W_in x + b_in + r (W_hn s + b_hn))``, ``s' = (1 - z) n + z s``.
    """

    n_gates = 3

    def transition(self, state: Tensor, projected: Tensor) -> Tensor:
        """See :meth:`RecurrentCell.transition`."""
        if _is_large(projected) and not torch.is_grad_enabled():
            return _by_tiles(self.transition, state, projected)
        _, z, n, _ = self._gates(state, projected)
        return torch.lerp(n, state, z)

    def differentiate(self, state: Tensor, projected: Tensor) -> tuple[Tensor, Jacobian]:
        """See :meth:`RecurrentCell.differentiate`."""
        output, gains, direct = _DifferentiatedGRU.apply(state, projected, self.weight_hh, self.bias_hh)
        return output, Jacobian(direct, gains, self.weight_hh.detach())

    def _set_keeping_odds(self, odds: Tensor) -> None:
        update = slice(self.hidden_size, 2 * self.hidden_size)  # z, of r, z, n; it keeps the state where it is 1
        self.bias_ih[update], self.bias_hh[update] = odds.log(), 0.0

    def _gates(self, state: Tensor, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _gru_gates(_recurrent_part(state, self.weight_hh, self.bias_hh), projected)


def _gru_gates(hidden: Tensor, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r, z, n and ``W_hn s + b_hn``, each [..., H], of the recurrent and the input's part of the gates [..., 3 * H]."""
    width = hidden.shape[-1] // 3
    # split, because the backward pass of a slice fills a tensor of the whole width with zeros
    hidden_rz, hidden_n = hidden.split((2 * width, width), dim=-1)
    projected_rz, projected_n = projected.split((2 * width, width), dim=-1)
    r, z = _add(hidden_rz, projected_rz).sigmoid_().split(width, dim=-1)
    n = _tanh_(torch.addcmul(projected_n, r, hidden_n))
    return r, z, n, hidden_n


class _DifferentiatedGRU(torch.autograd.Function):
    """A GRU's transition with its Jacobian, from which its backward pass is made too: autograd would keep every gate beside
    it and put the gradients of the gates together again from parts.

    ``(state, projected, weight_hh, bias_hh)`` -> next state, gains, direct; the latter two as in :class:`Jacobian`.
    """

    @staticmethod
    def forward(ctx, state: Tensor, projected: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        device, width = state.device.type, state.shape[-1]
        ctx.precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        low_weight = weight if ctx.precision is None else weight.to(ctx.precision)  # once, and not in autocast's cache
        output, direct, by_n = (torch.empty_like(state) for _ in range(3))
        gains = state.new_empty((*state.shape[:-1], 3 * width))
        for part in _tiles(projected) if _is_large(projected) else [slice(None)]:
            s, inner = state[part], by_n[part]
            r, z, n, hidden_n = _gru_gates(_recurrent_part(s, low_weight, bias), projected[part])
            torch.lerp(n, s, z, out=output[part])
            direct[part] = z
            # derivatives of s' by what the recurrent matrices add to r, z and n before their nonlinearities
            gain_r, gain_z, gain_n = gains[part].split(width, dim=-1)
            torch.mul(n, n, out=inner).sub_(1).mul_(z - 1)  # (1 - z) (1 - n^2), by n's pre-activation
            torch.mul(inner, r, out=gain_n)
            by_r, by_z = gain_n * hidden_n, (s - n).mul_(z)
            torch.addcmul(by_r, by_r, r, value=-1.0, out=gain_r)
            torch.addcmul(by_z, by_z, z, value=-1.0, out=gain_z)
        ctx.save_for_backward(state, weight, gains, direct, by_n)
        ctx.projected_dtype = projected.dtype
        ctx.mark_non_differentiable(gains, direct)
        ctx.set_materialize_grads(False)
        return output, gains, direct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_output: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        if by_output is None:
            return None, None, None, None
        state, weight, gains, direct, by_n = ctx.saved_tensors
        by_state, by_projected, by_weight, by_bias = (None,) * 4
        low = (lambda t: t) if ctx.precision is None else (lambda t: t.to(ctx.precision))
        width, low_weight = state.shape[-1], low(weight)
        by_gates = torch.empty_like(gains)
        if ctx.needs_input_grad[0]:
            by_state = torch.empty_like(state)
        if ctx.needs_input_grad[2]:
            by_weight = torch.zeros_like(weight)
        if ctx.needs_input_grad[3]:
            by_bias = weight.new_zeros(len(weight))
        for part in _tiles(gains) if _is_large(gains) else [slice(None)]:
            message, tile = by_output[part], by_gates[part]  # by the gates' recurrent part
            for gate, gain in zip(tile.split(width, dim=-1), gains[part].split(width, dim=-1)):
                torch.mul(gain, message, out=gate)
            flat = low(tile.reshape(-1, 3 * width))
            if by_weight is not None:
                by_weight += flat.t() @ low(state[part].reshape(-1, width))
            if by_bias is not None:
                by_bias += tile.reshape(-1, 3 * width).sum(0)
            if by_state is not None:
                through_gates = (flat @ low_weight).view(message.shape).to(state.dtype)
                torch.addcmul(through_gates, direct[part], message, out=by_state[part])
            torch.mul(by_n[part], message, out=tile[..., 2 * width :])  # by the input's part, which r does not scale
        if ctx.needs_input_grad[1]:
            by_projected = by_gates.to(ctx.projected_dtype)
        return by_state, by_projected, by_weight, by_bias


class MinGRUCell(RecurrentCell):
    """The minimal gated unit whose gates read the input alone (Feng et al. 2024, arXiv 2410.01201):

    ``z = sigmoid(W_z x + b_z)``, ``s' = (1 - z) s + z (W_n x + b_n)``. Its Jacobian is diagonal and does not depend on the
    state: one sweep with the diagonal is exact, and so is the first scan of the messages, without a correction.
    """

    n_gates = 2
    has_recurrent_weight = False

    def transition(self, state: Tensor, projected: Tensor) -> Tensor:
        """See :meth:`RecurrentCell.transition`."""
        z, candidate = projected.to(state.dtype).chunk(2, dim=-1)
        return torch.lerp(state, candidate, z.sigmoid())

    def differentiate(self, state: Tensor, projected: Tensor) -> tuple[Tensor, Jacobian]:
        """See :meth:`RecurrentCell.differentiate`: the diagonal is 1 - z."""
        z, candidate = projected.to(state.dtype).chunk(2, dim=-1)
        z = z.sigmoid()
        return torch.lerp(state, candidate, z), Jacobian(1 - z.detach())

    def _set_keeping_odds(self, odds: Tensor) -> None:
        self.bias_ih[: self.hidden_size] = -odds.log()  # z, which replaces the state where it is 1

    def forward(self, x: Tensor, state: RecurrentState | None = None) -> tuple[Tensor, RecurrentState]:
        """See :meth:`RecurrentCell.forward`; without gradients all states come from one scan."""
        if torch.is_grad_enabled():
            return super().forward(x, state)
        hidden, padding, mask = self._begin(x, state)
        z, candidate = self.project(x).transpose(0, 1).to(hidden.dtype).chunk(2, dim=-1)  # [T, B, H]
        z = z.sigmoid()
        if mask is not None:
            z = z.masked_fill(mask.T[..., None], 0.0)
        states = affine_scan(z * candidate, 1 - z, hidden)
        return states.transpose(0, 1), RecurrentState(states[-1], padding)


def _tanh_(x: Tensor) -> Tensor:
    """tanh, in place where that is possible. Large sweeps on a CPU take it from sigmoid, which torch vectorises there;
    the error is that of rounding at 1 and not relative to x, hence not in half precision."""
    wide = x.dtype in (torch.float32, torch.float64)
    if wide and x.device.type == "cpu" and x.numel() >= LARGE and not (torch.is_grad_enabled() and x.requires_grad):
        return x.mul_(2.0).sigmoid_().mul_(2.0).sub_(1.0)
    return x.tanh_()


def _recurrent_part(state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``W s + b``; one row, to be broadcast, where one state was expanded to stand for those of all transitions."""
    is_one = state.dim() > 2 and len(state) > 1 and state.stride(0) == 0
    return F.linear(state[:1] if is_one else state, weight, bias).to(state.dtype)


def _add(hidden: Tensor, projected: Tensor) -> Tensor:
    """Their sum, without a graph in place: making large tensors takes as long as the arithmetic on them."""
    in_place = not torch.is_grad_enabled() and hidden.shape == projected.shape
    return hidden.add_(projected) if in_place else hidden + projected


def _is_large(gates: Tensor) -> bool:
    """Whether to evaluate so many gates in tiles: on a CPU, where several of a tile's tensors fit the cache, and the
    allocator hands out the same memory for every tile, while that of larger tensors comes page by page from the system."""
    return gates.device.type == "cpu" and gates.numel() > TILE and len(gates) > 1


def _tiles(gates: Tensor) -> list[slice]:
    """Slices of the first dimension, of about ``TILE`` elements for every thread."""
    size = max(1, TILE * torch.get_num_threads() * len(gates) // gates.numel())
    return [slice(low, min(low + size, len(gates))) for low in range(0, len(gates), size)]


def _by_tiles(transition: Callable[[Tensor, Tensor], Tensor], state: Tensor, projected: Tensor) -> Tensor:
    output = torch.empty_like(state)
    for part in _tiles(projected):
        output[part] = transition(state[part], projected[part])
    return output


#: elements from which on the arithmetic of a tanh outweighs three more calls.
LARGE = 2**14
#: elements of the gates from which on a call is evaluated in tiles of this size.
TILE = 2**19
#: the kinds by name; see :func:`make_cell`.
CELL_KINDS = ("gru", "mingru", "elman", "elman-sigmoid")


def make_cell(kind: str, input_size: int, hidden_size: int, memory: float | None = None) -> RecurrentCell:
    """A recurrent cell by name: one of ``CELL_KINDS``; with a memory, see :meth:`RecurrentCell.set_memory`.

    Raises:
        ValueError: the kind is unknown, a size out of range, or the memory not to be had.
    """
    if not isinstance(kind, str) or kind not in CELL_KINDS:
        raise ValueError(f"cell kind {quote(kind)}: allowed are {', '.join(CELL_KINDS)}")
    if kind.startswith("elman"):
        cell = ElmanCell(input_size, hidden_size, "sigmoid" if kind == "elman-sigmoid" else "tanh")
    else:
        cell = {"gru": GRUCell, "mingru": MinGRUCell}[kind](input_size, hidden_size)
    if memory is not None:
        cell.set_memory(memory)
    return cell
