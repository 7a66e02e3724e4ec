"""HBLL-RNN: the binary tree over time, with a cell for every span (docs/method.md 1.5, Eq. 12 and Eqs. 13-15).

The states are h_0 .. h_N with N = 2**D. Node n, with 2**l the largest power of two that divides it, folds its left input
span into a state: ``h_n = f_l(h_{n - 2**l}, x_{n - 2**l} .. x_{n-1})``; the whole is ``h_N = f_D(h_0, x_0 .. x_{N-1})``. Its
right parent ``n + 2**l`` is only ever a target. f_0 is the deployed cell, an ordinary recurrent network.

Any length T is a tree of the next power of two whose first N - T steps are padding: their states are h_0, no state counts
them, and a window that begins in them reads zeros there.

Shapes: T steps, B batch, I symbol width, H hidden width, w symbols in a window; time is first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbll_seq.chains.time import TimeChain
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization.base import Zero
from hbll_seq.engine.solve import solve
from hbll_seq.layers.cells import make_cell
from hbll_seq.layers.recurrent import RecurrentCell
from hbll_seq.utils.values import as_whole, check_choice

SHARES = ("none", "capped", "all")


class RecurrentTree(nn.Module):
    """The cells f_1 .. f_D of the spans 2 .. 2**D; f_0 is the model's own cell and is passed to every call.

    Training alone needs it: the deployed model is f_0. All states between nodes are detached.

    Args:
        cell: of what kind its cells are: a name that :func:`make_cell` knows, such as ``"gru"``, or
            ``(input_size, hidden_size) -> cell``, such as :class:`hbll_seq.layers.gru.GRUCell`.
        symbol_size: I.
        hidden_size: H, the same for all levels.
        n_level: D; sequences have at most ``2**D`` steps.
        max_symbols: an arc reads at most this many of its last symbols (where the tree only makes a first estimate, 8
            suffice). None for all of them: inputs of the top cell then grow with N.
        share: ``"none"``: a cell for each level; ``"capped"``: one for all levels whose windows ``max_symbols`` cuts to
            the same width; ``"all"``: f_0 serves every arc, and must then read ``max_symbols`` symbols itself (a narrower
            input counts as one after zeros).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        cell: str | Callable[[int, int], RecurrentCell],
        symbol_size: int,
        hidden_size: int,
        n_level: int,
        *,
        max_symbols: int | None = None,
        share: str = "none",
    ):
        super().__init__()
        n_level = as_whole("n_level", n_level, 1)
        max_symbols = 2**n_level if max_symbols is None else as_whole("max_symbols", max_symbols, 1)
        check_choice("share", share, SHARES)
        self.symbol_size, self.hidden_size, self.n_level, self.share = symbol_size, hidden_size, n_level, share
        self.max_symbols = max_symbols
        new_cell = partial(make_cell, cell) if isinstance(cell, str) else cell
        self.cells = nn.ModuleList()
        widths = [self.width(level) for level in range(n_level + 1)]
        for level in range(1, n_level + 1) if share != "all" else ():
            if share == "none" or widths[level] != widths[level - 1] or level == 1:
                self.cells.append(new_cell(widths[level] * symbol_size, hidden_size))
        self._index = [sum(w != v for v, w in zip(widths[1:level], widths[2 : level + 1])) for level in range(n_level + 1)]

    @property
    def has_own_cells(self) -> bool:
        """Whether there are cells besides f_0."""
        return self.share != "all"

    def width(self, level: int) -> int:
        """Number of symbols that an arc of span ``2**level`` reads."""
        return min(2**level, self.max_symbols)

    def cell(self, level: int, f0: RecurrentCell) -> RecurrentCell:
        """f_level; ``f0`` is the deployed cell."""
        if level == 0 or self.share == "all":
            return f0
        return self.cells[self._index[level] if self.share == "capped" else level - 1]

    # ------------------------------------------------------------------------------------------------ states

    def states(self, f0: RecurrentCell, symbols: Tensor, h0: Tensor, *, own_only: bool = False) -> Tensor:
        """The tree pass: one batched call per level, root first (Eq. 12).

        Args:
            f0: the deployed cell.
            symbols: [T, B, I].
            h0: [B, H].
            own_only: no gradient reaches f0.

        Returns:
            h_1 .. h_T [T, B, H], each attached to the one cell that made it (and to its symbols) and to nothing before.

        Raises:
            ValueError: the sequence is empty or longer than ``2**n_level``.
        """
        return self._pass(f0, symbols, h0, own_only)[0]

    def own_states(self, n_steps: int) -> Tensor:
        """Which of h_1 .. h_T the tree's own cells make, [T] of bool: even n (and all padding is left out)."""
        n = torch.arange(1, n_steps + 1) + (2 ** self._level_of(n_steps) - n_steps)
        return (n % 2 == 0) if self.has_own_cells else torch.zeros(n_steps, dtype=torch.bool)

    def states_and_arcs(self, f0: RecurrentCell, symbols: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        """States as :meth:`states` gives them, and the arc losses: for every arc n -> j to a right parent

        ``1/2 ||f_l(sg h_n, x_n .. x_{j-1}) - sg h_j||^2`` by the cell of the arc's length, one batched call per level; summed
        over features, mean over arcs and batch. It trains the arc's cell alone.
        """
        states, windows, padding = self._pass(f0, symbols, h0, False)
        n_level, n_padded = self._level_of(len(symbols)), padding + len(symbols)
        known = torch.cat((h0.detach().expand(padding + 1, *h0.shape), states.detach()))  # h_0 .. h_N
        total, n_arcs = symbols.new_zeros(()), 0
        for level in range(n_level):
            span = 2**level
            first = _first_node(padding, span) // (2 * span)  # right arcs whose node is not padding
            source = known[span : n_padded : 2 * span][first:]
            cell = self.cell(level, f0)
            predicted = cell.transition(source, cell.project(windows[level][1::2][first:]).to(source.dtype))
            total = total + 0.5 * (predicted - known[2 * span :: 2 * span][first:]).square().sum()
            n_arcs += len(source)
        return states, total / max(1, n_arcs * h0.shape[0])

    def _pass(self, f0: RecurrentCell, symbols: Tensor, h0: Tensor, own_only: bool) -> tuple[Tensor, list[Tensor], int]:
        """States [T, B, H], windows by level, number of padding steps."""
        n_level, n_steps = self._level_of(len(symbols)), len(symbols)
        padding = 2**n_level - n_steps
        windows = self._windows(symbols, n_level, padding)
        known = h0.detach().expand(2**n_level + 1, *h0.shape).clone()  # padding nodes keep h_0
        attached: list[Tensor] = []
        order: list[Tensor] = []
        nodes = torch.arange(2**n_level + 1, device=h0.device)
        for level in range(n_level, -1, -1):
            span = 2**level
            step = 2 * span if level < n_level else span
            first = _first_node(padding, span) // step if level < n_level else 0
            left, inputs = known[: 2**n_level : step][first:], windows[level][:: step // span][first:]
            cell = self.cell(level, f0)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not (own_only and cell is f0)):
                new = cell.transition(left.clone(), cell.project(inputs).to(h0.dtype))
            known[span::step][first:] = new.detach()
            attached.append(new)
            order.append(nodes[span::step][first:])
        states = torch.cat(attached)[torch.argsort(torch.cat(order))]
        return states, windows, padding

    def _windows(self, symbols: Tensor, n_level: int, padding: int) -> list[Tensor]:
        """By level l: the last symbols of every arc of that span, [N / 2**l, B, w * I]."""
        padded = F.pad(symbols, (0, 0, 0, 0, padding, 0))
        windows = []
        for level in range(n_level + 1):
            parts = padded.unflatten(0, (-1, 2**level))[:, -self.width(level) :]  # [N / 2**l, w, B, I]
            windows.append(parts.transpose(1, 2).flatten(-2))
        return windows

    def _level_of(self, n_steps: int) -> int:
        n_level = max(0, (n_steps - 1).bit_length())
        if n_steps < 1 or n_level > self.n_level:
            raise ValueError(
                f"a sequence of {n_steps} steps: a tree with n_level={self.n_level} takes 1 to {2**self.n_level}; "
                "cut it into windows, or build the tree with more levels"
            )
        return n_level

    # ----------------------------------------------------------------------------------------------- exits

    def jump(self, f0: RecurrentCell, symbols: Tensor, h0: Tensor) -> Tensor:
        """h_N by f_D alone [B, H]: a feed-forward net on the whole input, to be reported separately (docs/method.md 1.5)."""
        n_level = self._level_of(len(symbols))
        window = self._windows(symbols, n_level, 2**n_level - len(symbols))[n_level][0]
        cell = self.cell(n_level, f0)
        return cell.transition(h0, cell.project(window).to(h0.dtype))

    def readout_path(self, f0: RecurrentCell, symbols: Tensor, h0: Tensor) -> Tensor:
        """The tree readout [B, H]: along 0 -> N/2 -> 3N/4 -> .. -> N - 1 -> N, D + 1 cells one after the other."""
        n_level = self._level_of(len(symbols))
        padding = 2**n_level - len(symbols)
        windows, state, at = self._windows(symbols, n_level, padding), h0, 0
        for level in [*range(n_level - 1, -1, -1), 0]:
            cell = self.cell(level, f0)
            state = cell.transition(state, cell.project(windows[level][at >> level]).to(h0.dtype))
            at += 2**level
        return state

    def consistency(self, f0: RecurrentCell, symbols: Tensor, h0: Tensor, states: Tensor, n_iterations: int) -> Tensor:
        """Loss of the deployed cell against exposure bias (Eqs. 13-15): from the tree's states, which are the clean targets
        too, K Jacobi iterations of f_0, of which only the last is differentiated; ``||h~_n - sg hbar_n||^2`` summed over
        features, mean over positions and batch.

        Args:
            f0, symbols, h0: as in :meth:`states`.
            states: [T, B, H], the tree's.
            n_iterations: K of at least 1.
        """
        clean = states.detach()
        jacobi = Iterations(n_iterations - 1, linearization=Zero())
        solution = solve(TimeChain(f0, f0.project(symbols)), h0.detach(), jacobi, start=clean[:-1])
        return (solution.linearized.attached - clean).square().sum(-1).mean()


def _first_node(padding: int, span: int) -> int:
    """How far from 0 the first node of a span is that is not padding: the smallest odd multiple of it above ``padding``,
    less the span."""
    odd = (padding // span + 1) | 1
    return (odd - 1) * span
