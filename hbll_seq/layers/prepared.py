"""Parts of a block prepared for a few rows at a time, as when text is generated token by token.

On a CPU the time of such a product is that of reading its matrix. A matrix whose outputs stand in panels of 16, each panel
one stretch of memory, is read about as fast as the memory allows (bench_generation.py); and what can be multiplied into a
matrix beforehand costs nothing later. Elsewhere the modules' own products are used as they are.

Prepared parts are copies, kept beside the module for its next text and made anew when its weights are others.

Shapes: R rows (batch times tokens), I inputs, O outputs of a matrix.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: outputs of a panel, the floats of one vector register.
PANEL = 16
#: rows up to which panels are faster than one product with the transposed matrix.
FEW_ROWS = 8
#: rows up to which prepared matrices are used at all.
MANY_ROWS = 64


def can_prepare(module: nn.Module, kinds: Iterable[type[nn.Module]] = ()) -> bool:
    """Whether prepared copies of this module's matrices do what the module does, and faster.

    False on a GPU, in half precision (also by autocast), and where torch lacks the batched products of MKL; and where
    anybody has put a hook, or a module of another kind than its author's, inside.
    """
    p = next(module.parameters())
    fits = p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64) and torch.backends.mkl.is_available()
    return fits and not torch.is_autocast_enabled("cpu") and is_plain(module, kinds)


def is_plain(module: nn.Module, kinds: Iterable[type[nn.Module]], *, deep: bool = True) -> bool:
    """Whether this module, and with ``deep`` all inside, are of these kinds (no subclass) and have no hooks."""
    allowed = {nn.Linear, nn.RMSNorm, nn.LayerNorm, nn.Dropout, *kinds}
    modules = module.modules() if deep else [module]
    return all(type(m) in allowed and not m._forward_hooks and not m._forward_pre_hooks for m in modules)


#: what was prepared of each module, and of which weights
_kept: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Any]] = weakref.WeakKeyDictionary()


def prepared(module: nn.Module, make: Callable[[nn.Module], Any]) -> Any:
    """``make(module)``, or what it gave before if the module's parameters have the values that they had then.

    What it makes must not hold the module itself, which would then never be freed.
    """
    weights, kept = _identity(module), _kept.get(module)
    if kept is None or kept[0] != weights:
        kept = _kept[module] = (weights, make(module))
    return kept[1]


@torch.no_grad()
def _identity(module: nn.Module) -> tuple:
    """What changes with a parameter's values: torch's counter of changes, and for those it misses (``p.data``) two sums."""
    return tuple(
        (p.data_ptr(), p.shape, p.dtype, 0 if p.is_inference() else p._version, p.sum().item(), p.norm().item())
        for p in module.parameters()
    )


class Norm:
    """A normalisation layer on rows [..., C]; what can be left to the next matrix is its ``scale`` [C] (None: nothing).

    Args:
        norm: an nn.RMSNorm or nn.LayerNorm.
    """

    def __init__(self, norm: nn.Module):
        self._norm, self.scale = norm, None
        if isinstance(norm, nn.RMSNorm):
            width = norm.weight.numel()
            self.scale = norm.weight.detach() * math.sqrt(width)
            self._floor = norm.weight.new_tensor(math.sqrt(norm.eps * width))

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [..., C] -> [..., C], to be multiplied by ``scale``."""
        if self.scale is None:
            return self._norm(x)
        # hypot(|x|, sqrt(eps C)) = sqrt(C (mean of x^2 + eps)): three calls in place of seven
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._floor)


class Matrix:
    """``x`` [R, I] -> ``x * scale @ weight.T + bias`` [R, O]. Copies are made when they are first wanted.

    Args:
        weight: [O, I].
        scale: [I], of the inputs; None for 1.
        bias: [O] or None.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None):
        self.bias = None if bias is None else bias.detach()
        self._given, self._scale = weight.detach(), scale
        self._panels: Tensor | None = None
        self._transposed: Tensor | None = None
        self._few = FEW_ROWS if len(weight) % PANEL == 0 else 0

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [R, I] -> [R, O], a new tensor."""
        n_rows = x.shape[0]
        if n_rows > self._few:
            weight = self._as_transposed()
            return torch.mm(x, weight) if self.bias is None else torch.addmm(self.bias, x, weight)
        y = self._by_panels(x, n_rows)
        return y if self.bias is None else y.add_(self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual`` [R, O] plus what this gives for ``x`` [R, I] (no bias), a new tensor."""
        n_rows = x.shape[0]
        if n_rows > self._few:
            return torch.addmm(residual, x, self._as_transposed())
        return self._by_panels(x, n_rows).add_(residual)

    def _by_panels(self, x: Tensor, n_rows: int) -> Tensor:
        panels = self._panels
        if panels is None:
            panels = self._given.view(-1, PANEL, self._given.shape[1]).transpose(1, 2)
            panels = panels.contiguous() if self._scale is None else panels * self._scale[:, None]
            self._panels = panels = panels.contiguous()  # [O / 16, I, 16]
        y = torch.bmm(x.expand(panels.shape[0], n_rows, x.shape[1]), panels)  # [O / 16, R, 16]
        return y.view(1, -1) if n_rows == 1 else y.transpose(0, 1).reshape(n_rows, -1)

    def _as_transposed(self) -> Tensor:
        if self._transposed is None:
            scaled = self._given if self._scale is None else self._given * self._scale
            self._transposed = scaled.t().contiguous()
        return self._transposed


class MLP:
    """The MLP branch of a :class:`hbll_seq.layers.residual.ResidualBlock`, added to its input.

    Args:
        block: the block.
    """

    def __init__(self, block: nn.Module):
        self._is_there, self._gated = block.has_mlp, block.has_mlp and block.mlp == "swiglu"
        if block.has_mlp:
            self._norm = Norm(block.norm_mlp)
            self._first, self._last = Matrix(block.mlp_in.weight, self._norm.scale), Matrix(block.mlp_out.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [R, C] -> [R, C]."""
        if not self._is_there:
            return x
        hidden = self._first(self._norm(x))
        if self._gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate).mul_(value)
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        return self._last.add_to(x, hidden)


class ReadOut:
    """Normalisation and projection of states, for a few rows at a time.

    Args:
        norm, projection: an nn.RMSNorm or nn.LayerNorm, and an nn.Linear without bias.
    """

    def __init__(self, norm: nn.Module, projection: nn.Linear):
        self._modules = nn.Sequential(norm, projection)
        self._norm = Norm(norm)
        self._matrix = Matrix(projection.weight, self._norm.scale)

    def __call__(self, states: Tensor) -> Tensor:
        """``states`` [..., C] -> [..., V]."""
        if states.numel() > MANY_ROWS * states.shape[-1]:
            return self._modules(states)
        rows = self._matrix(self._norm(states).view(-1, states.shape[-1]))
        return rows.view(*states.shape[:-1], -1)
