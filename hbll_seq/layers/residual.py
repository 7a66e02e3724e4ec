"""What the blocks of a language model share: the normalisation and the MLP branch behind the branch that mixes tokens.

Shapes: B batch, T tokens, C width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hbll_seq.layers.base import Cell
from hbll_seq.utils.values import check_choice

#: the normalisation layers.
NORMS = ("rmsnorm", "layernorm")
#: the MLP branches: ``out(gelu(in(x)))``, and ``out(silu(gate(x)) * in(x))`` (Shazeer 2020, arXiv 2002.05202).
MLPS = ("gelu", "swiglu")


def make_norm(norm: str, width: int) -> nn.Module:
    """A normalisation layer over the last dimension, C wide; ``norm`` is one of ``NORMS``."""
    return nn.LayerNorm(width) if norm == "layernorm" else nn.RMSNorm(width, eps=1e-6)


def hidden_width(mlp: str, width: int, mlp_ratio: int) -> int:
    """Hidden width of an MLP branch: ``mlp_ratio * width`` for GELU. SwiGLU has three matrices in place of two, so two
    thirds of that give as many parameters; rounded up to a multiple of 8.
    """
    whole = mlp_ratio * width
    return whole if mlp == "gelu" else -(-2 * whole // 24) * 8


class ResidualBlock(Cell):
    """A block ``x + mixed(norm(x))``, then ``+ mlp(norm(.))``; a subclass says how tokens are mixed.

    The output projections of both branches start at zero, so that a new block is the identity and a deep stack starts as
    well-conditioned as a shallow one; the other matrices start at ``1 / sqrt(fan_in)``.
    """

    def _add_mlp(self, width: int, mlp_ratio: int, norm: str, dropout: float, mlp: str) -> None:
        """Register the MLP branch, unless ``mlp_ratio=0`` leaves it out, and dropout."""
        check_choice("mlp", mlp, MLPS)
        self.mlp, self.has_mlp = mlp, mlp_ratio > 0
        if self.has_mlp:
            hidden = hidden_width(mlp, width, mlp_ratio)
            self.norm_mlp = make_norm(norm, width)
            # Of SwiGLU the rows of the gate come first.
            self.mlp_in = nn.Linear(width, hidden if mlp == "gelu" else 2 * hidden, bias=False)
            self.mlp_out = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def _start(self, inner: list[nn.Linear], last: list[nn.Linear]) -> None:
        """Fill the matrices of the branch that mixes tokens, and those of the MLP branch where there is one."""
        for layer in [*inner, self.mlp_in] if self.has_mlp else inner:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        for layer in [*last, self.mlp_out] if self.has_mlp else last:
            nn.init.zeros_(layer.weight)

    def _add_branches(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add the mixed tokens [B, T, C] to ``x`` [B, T, C], then the MLP branch."""
        x = x + self.dropout(mixed)
        if not self.has_mlp:
            return x
        return x + self.dropout(self.mlp_out(self._activate(self.mlp_in(self.norm_mlp(x)))))

    def _activate(self, hidden: Tensor) -> Tensor:
        """What ``mlp_in`` makes, [..., M], or [..., 2 M] of SwiGLU -> what ``mlp_out`` reads, [..., M]."""
        if self.mlp == "gelu":
            return F.gelu(hidden, approximate="tanh")
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value
