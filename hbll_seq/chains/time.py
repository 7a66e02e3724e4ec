"""One recurrent cell at all steps of a sequence, as a chain of the engine (docs/method.md 2.2, 2.4).

N is in the hundreds or thousands and a transition is tiny, so that a slice of transitions is ONE call of the cell over
[R, B, ...] tensors. Products with the Jacobians come from their known form (:class:`hbll_seq.layers.recurrent.Jacobian`), not
from autograd, and the gradients of the one cell are made by one call at the end, of all transitions at once.

With A the diagonal this is quasi-DEER (Lim et al. 2024, arXiv 2309.12252; Gonzalez et al. 2024, arXiv 2407.19115); with
A = 0 and segments it is block Jacobi iteration, the fine half of parareal (Lions, Maday, Turinici 2001). M backward
iterations carry exact products over M c transitions and approximate all others: truncated backpropagation through time,
evaluated in parallel at approximate states.

Where the segments lie on several ranks, each has the inputs, calls, states and Jacobians of its own transitions alone.

Shapes: N transitions, B batch, H hidden width, G gates; R of a slice, which are ``chunk_size`` apart or side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll_seq.engine.chain import Chain, Jacobians, Linearized
from hbll_seq.engine.placement import HERE, Placement
from hbll_seq.layers.recurrent import Jacobian, RecurrentCell


class TimeChain(Chain):
    """s_n = f(s_{n-1}, x_n) of one cell.

    Args:
        cell: f.
        projected: [N, B, G * H], ``cell.project`` of the inputs, time first; stays attached to what made it.
        clip: diagonals of Jacobians are held within -clip .. clip, so that a scan of many cannot explode. Where the diagonal
            is the whole Jacobian it is left as it is: clipped it would never be exact.
        differentiates: whether anybody will ask for gradients; None: where they are enabled now.
        placement: where the segments are. Where they are spread, ``projected`` is of the transitions that are here.
        n_steps: N, where they are spread.
        first: number, from 0, of the first transition that is here.
    """

    has_diagonal = True

    def __init__(
        self,
        cell: RecurrentCell,
        projected: Tensor,
        clip: float = 1.0,
        differentiates: bool | None = None,
        *,
        placement: Placement = HERE,
        n_steps: int | None = None,
        first: int = 0,
    ):
        self.cell, self.projected, self.clip = cell, projected, clip
        self.placement, self.n_steps, self.first = placement, len(projected) if n_steps is None else n_steps, first
        self.differentiates = torch.is_grad_enabled() if differentiates is None else differentiates
        self._fixed = projected.detach()

    def apply(self, rows: slice, states: Tensor) -> Tensor:
        """See :meth:`Chain.apply`; where one state stands for all, the cell multiplies it with its matrix only once."""
        return self.cell.transition(states, self._fixed[behind(rows, self.first)])

    def apply_with_diagonal(self, rows: slice, states: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Chain.apply_with_diagonal`."""
        outputs, jacobian = self.cell.differentiate(states, self._fixed[behind(rows, self.first)])
        return outputs, clipped(jacobian, self.clip)

    def linearize(self, s0: Tensor, chunk_size: int) -> TimeRows:
        """See :meth:`Chain.linearize`."""
        return TimeRows(self, chunk_size)


class KnownJacobians(Jacobians):
    """Transitions of a cell whose Jacobians are known.

    Args:
        jacobian: of the transitions, [S c, ...]; of those behind the last one no use is made.
        clip: see :class:`TimeChain`.
        diagonal: of the same, [S c, B, H], where it is known already.
        first: number of the first of them; see :class:`TimeChain`.
    """

    def __init__(self, jacobian: Jacobian, clip: float = 1.0, diagonal: Tensor | None = None, first: int = 0):
        self.jacobian, self.clip, self._diagonal, self.first = jacobian, clip, diagonal, first

    @property
    def is_diagonal(self) -> bool:
        """See :class:`Jacobians`."""
        return self.jacobian.gains is None

    def diagonal(self) -> Tensor:
        """See :meth:`Jacobians.diagonal`."""
        if self._diagonal is None:
            self._diagonal = clipped(self.jacobian, self.clip)
        return self._diagonal

    def vjp(
        self, rows: slice, cotangents: Tensor, n_final: int = 0, wanted: bool = True, later: bool = False
    ) -> Tensor:
        """See :meth:`Jacobians.vjp`; a new tensor."""
        here = behind(rows, self.first)
        return self.jacobian.between(here.start, here.stop, here.step).vjp(cotangents)


class TimeRows(KnownJacobians, Linearized):
    """The differentiated calls of a :class:`TimeChain`.

    Attributes:
        attached: [N, B, H], a_1 .. a_N, attached to the cell's parameters and to ``projected``: what autograd makes of an
            adjoint there is the local product of every transition. Where segments are spread, of those that are here.
    """

    def __init__(self, chain: TimeChain, chunk_size: int):
        super().__init__(Jacobian(None), chain.clip, first=chain.first)
        self.chain, self.chunk_size, self.placement, self.n_steps = chain, chunk_size, chain.placement, chain.n_steps
        projected, n_missing = chain.projected, -len(chain.projected) % chunk_size
        with torch.set_grad_enabled(chain.differentiates):
            if n_missing:
                projected = F.pad(projected, (0, 0) * (projected.dim() - 1) + (0, n_missing))
            # split once: the backward pass of a strided slice fills a tensor of the whole size
            self._given = projected.unflatten(0, (-1, chunk_size)).unbind(1) if chunk_size > 1 else (projected,)
        self._parts: list[tuple[Tensor, Jacobian]] = []
        self.attached: Tensor | None = None

    def call(self, rows: slice, states: Tensor) -> Tensor:
        """See :meth:`Linearized.call`: position by position of all segments."""
        # The calls without gradient shared this autocast region: older torch would hand out their gradient-free casts.
        torch.clear_autocast_cache()
        with torch.set_grad_enabled(self.chain.differentiates):
            self._parts.append(self.chain.cell.differentiate(states, self._given[rows.start - self.first]))
            outputs = self._parts[-1][0].detach()
            if len(self._parts) == self.chunk_size:
                self._join()
        return outputs

    def _join(self) -> None:
        outputs, jacobians = zip(*self._parts)
        self.attached = _interleaved(outputs)[: len(self.chain.projected)]
        direct, gains, weights = zip(*jacobians)
        self.jacobian = Jacobian(_interleaved(direct), _interleaved(gains), weights[0])
        self.outputs = self.attached.detach()
        self._parts.clear()


def behind(rows: slice, first: int) -> slice:
    """The same rows, counted from number ``first`` on."""
    return slice(rows.start - first, rows.stop - first, rows.step) if first else rows


def _interleaved(parts: Sequence[Tensor | None]) -> Tensor | None:
    """[S, ...] of each position in a segment -> [S c, ...], in order of time."""
    if parts[0] is None:
        return None
    return parts[0] if len(parts) == 1 else torch.stack(list(parts), dim=1).flatten(0, 1)


def clipped(jacobian: Jacobian, clip: float) -> Tensor:
    """Diagonals of Jacobians [..., H], held within -clip .. clip unless they are the whole Jacobian."""
    return jacobian.direct if jacobian.gains is None else jacobian.diagonal().clamp_(-clip, clip)
