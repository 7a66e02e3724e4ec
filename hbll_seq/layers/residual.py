"""What the blocks of a language model share: the normalisation and the MLP branch behind the branch that mixes tokens.

Shapes: B batch, T tokens, C width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hbll_seq.layers.base import Cell

#: the normalisation layers.
NORMS = ("rmsnorm", "layernorm")


def make_norm(norm: str, width: int) -> nn.Module:
    """A normalisation layer over the last dimension, C wide; ``norm`` is one of ``NORMS``."""
    return nn.LayerNorm(width) if norm == "layernorm" else nn.RMSNorm(width, eps=1e-6)


class ResidualBlock(Cell):
    """A block ``x + mixed(norm(x))``, then ``+ mlp(norm(.))``; a subclass says how tokens are mixed.

    The output projections of both branches start at zero, so that a new block is the identity and a deep stack starts as
    well-conditioned as a shallow one; the other matrices start at ``1 / sqrt(fan_in)``.
    """

    def _add_mlp(self, width: int, mlp_ratio: int, norm: str, dropout: float) -> None:
        """Register the MLP branch, unless ``mlp_ratio=0`` leaves it out, and dropout."""
        self.has_mlp = mlp_ratio > 0
        if self.has_mlp:
            self.norm_mlp = make_norm(norm, width)
            self.mlp_in = nn.Linear(width, mlp_ratio * width, bias=False)
            self.mlp_out = nn.Linear(mlp_ratio * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    @staticmethod
    def _start(inner: list[nn.Linear], last: list[nn.Linear]) -> None:
        for layer in inner:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        for layer in last:
            nn.init.zeros_(layer.weight)

    def _add_branches(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add the mixed tokens [B, T, C] to ``x`` [B, T, C], then the MLP branch."""
        x = x + self.dropout(mixed)
        if not self.has_mlp:
            return x
        hidden = F.gelu(self.mlp_in(self.norm_mlp(x)), approximate="tanh")
        return x + self.dropout(self.mlp_out(hidden))
