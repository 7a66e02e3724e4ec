"""What every recurrent cell keeps, so that all time steps of a sequence can be evaluated at once.

A cell is split in two. ``project`` makes the input's part of all gates, for a whole sequence in one product.
``transition`` takes a state one step further, for any number of (state, input) pairs at once. Their Jacobian is known:

    d s_t / d s_{t-1} = diag(direct) + sum_g diag(gains_g) W_g

with W_g the recurrent matrix of gate g. Its diagonal, and its product with a vector, cost less than the cell itself. The
cells are in ``elman.py``, ``gru.py`` and ``mingru.py``; ``cells.py`` makes them by name.

Shapes: B batch, T tokens, I input width, H hidden width, G gates, ``...`` any leading dimensions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbll_seq.layers.base import Cell
from hbll_seq.layers.gate_arithmetic import is_large, tiles
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_whole


class Jacobian(NamedTuple):
    """d s_t / d s_{t-1} of many transitions, detached: ``diag(direct) + sum_g diag(gains_g) W_g``.

    direct: [..., H]: how much of a state goes straight into the next one; None for none.
    gains: [..., G * H]: how much the next state follows what W_g adds to gate g; None where no gate reads the state, and the
        Jacobian is diagonal.
    weight: [G * H, H], the recurrent matrices W_g, one for all transitions; None without gains.
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
        """``J^T message``: the transposed Jacobians times [..., H], in one product with W for all transitions."""
        if self.gains is None:
            return self.direct * message
        if is_large(self.gains):
            product = torch.empty_like(message)
            for part in tiles(self.gains):
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
        """Draw the biases of the gates anew, so that at first units forget in some 2 to ``longest`` steps, evenly spread.

        The odds that a gate keeps its state are uniform in 1 .. longest - 1 (chrono initialisation: Tallec and Ollivier
        2018, arXiv 1804.11188).

        Raises:
            ValueError: the number is less than 2, or the cell has no gate that keeps its state.
        """
        if not isinstance(longest, (int, float)) or isinstance(longest, bool) or not 2 <= longest < math.inf:
            raise ValueError(f"memory={quote(longest)}: must be a number of steps, at least 2, such as the span that matters")
        self._set_keeping_odds(torch.empty_like(self.bias_ih[: self.hidden_size]).uniform_(1.0, longest - 1.0))

    def _set_keeping_odds(self, odds: Tensor) -> None:
        raise ValueError(
            f"memory with a {type(self).__name__}: it has no gate that keeps its state; leave memory out, or choose the cell "
            "gru or mingru"
        )

    def project(self, x: Tensor) -> Tensor:
        """The input's part of the gates, ``x`` [..., I] -> [..., G * H], of all tokens at once.

        An input narrower than I is read as though zeros stood before it, so that one cell can read windows of several
        lengths.

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
        """``state`` [..., H], ``projected`` [..., G * H] -> next states [..., H] in the dtype of ``state``.

        A single state [1, ..., H] may stand for those of all transitions, as at the start of an iteration, where they are all
        s_0; the recurrent matrix is then multiplied with it once::

            state      [1, B, H]  --W-->  [1, B, G * H]  \\
                                                           +  -->  gates [N, B, G * H]  -->  next states [N, B, H]
            projected                     [N, B, G * H]  /
        """

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
