"""Images as states: patches with positions, and blocks in which every patch sees every other one (docs/method.md 1.6).

Shapes: B batch, C channels, H x W pixels, T states of an image, D width of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from hbll_seq.layers.attention import TransformerBlock
from hbll_seq.layers.attention_arithmetic import KVState, attention
from hbll_seq.layers.residual import make_norm

#: how a head makes one vector of the states of an image: their mean, or the first one, which stands for no patch
POOLINGS = ("mean", "token")


class PatchEmbedding(nn.Module):
    """Pixels of 0 to 1 [B, C, H, W] -> states [B, T, D]: a linear map of every patch, plus its learned position.

    Pixels are normalised here, so that a loaded model reads images as they are. With ``has_token`` a learned state goes
    before those of the patches (Dosovitskiy et al. 2021, arXiv 2010.11929).

    Args:
        grid: rows and columns of patches.
        patch_size: height and width of a patch in pixels.
        mean, std: of the pixels, a number for each of the C channels.
        width: D.
        has_token: whether T is one more than the number of patches.
    """

    def __init__(
        self, grid: tuple[int, int], patch_size: int, mean: Sequence[float], std: Sequence[float], width: int, has_token: bool
    ):
        super().__init__()
        self.patch_size, self.has_token = patch_size, has_token
        # not in the file of weights: config.json determines them
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.get_default_dtype())[:, None, None], persistent=False)
        n_values, n_patches = len(mean) * patch_size**2, grid[0] * grid[1]
        self.projection = nn.Linear(n_values, width)
        nn.init.normal_(self.projection.weight, std=n_values**-0.5)
        nn.init.zeros_(self.projection.bias)
        self.positions = nn.Parameter(torch.empty(n_patches, width))
        nn.init.normal_(self.positions, std=0.2)
        if has_token:
            self.token = nn.Parameter(torch.empty(1, width))
            nn.init.normal_(self.token, std=0.2)

    def forward(self, pixels: Tensor) -> Tensor:
        """``pixels`` [B, C, H, W] -> [B, T, D]."""
        size, mean, std = self.patch_size, self.mean.to(pixels), self.std.to(pixels)  # loaded weights may have another dtype
        patches = rearrange((pixels - mean) / std, "b c (h p) (w q) -> b (h w) (c p q)", p=size, q=size)
        states = self.projection(patches) + self.positions
        return torch.cat((self.token.expand(len(states), 1, -1), states), dim=1) if self.has_token else states


class PoolingHead(nn.Module):
    """Normalises the states of an image, makes one vector of them and projects it onto the classes.

    Args:
        norm: one of ``residual.NORMS``.
        width: D.
        n_classes: V.
        pooling: one of ``POOLINGS``.
    """

    def __init__(self, norm: str, width: int, n_classes: int, pooling: str):
        super().__init__()
        self.pooling, self.norm = pooling, make_norm(norm, width)
        self.projection = nn.Linear(width, n_classes)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, state: Tensor) -> Tensor:
        """``state`` [B, T, D] -> logits [B, V]."""
        pooled = self.norm(state[:, 0]) if self.pooling == "token" else self.norm(state).mean(1)
        return self.projection(pooled)


class FullAttentionBlock(TransformerBlock):
    """A :class:`TransformerBlock` in which every state sees every other one, and none is turned.

    Positions are the embedding's. It reads all states of an input at once: there is nothing to carry on from, and no token
    after token.

    Args:
        width, n_head, mlp_ratio, norm, dropout, mlp, qk_norm: see :class:`TransformerBlock`.
    """

    def __init__(
        self,
        width: int,
        n_head: int,
        *,
        mlp_ratio: int = 4,
        norm: str = "rmsnorm",
        dropout: float = 0.0,
        mlp: str = "gelu",
        qk_norm: bool = False,
    ):
        super().__init__(width, n_head, window=1, mlp_ratio=mlp_ratio, norm=norm, dropout=dropout, mlp=mlp, qk_norm=qk_norm)

    def initial_state(self, start: Tensor | None = None) -> KVState:
        """Raises ValueError: there is no state to begin with."""
        raise ValueError("a FullAttentionBlock reads all states at once: it has no state to begin with; call it on them all")

    def step(self, x_t: Tensor, state: KVState) -> tuple[Tensor, KVState]:
        """Raises ValueError: what is read first depends on what is read last."""
        return self.initial_state()

    def _turned(self, x: Tensor, positions: Tensor, first: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return self._heads(x)

    def _attend(self, x: Tensor, state: KVState) -> tuple[Tensor, KVState]:
        if state != KVState():
            self.initial_state()
        return rearrange(attention(*self._heads(x), None), "b h t d -> b t (h d)"), state
