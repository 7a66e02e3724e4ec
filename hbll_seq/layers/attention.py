"""Pre-norm Transformer block with rotary positions and a sliding attention window.

Shapes: B batch, T tokens in this call, S keys in sight, C width, H heads, D = C / H width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hbll_seq.layers.residual import ResidualBlock, make_norm


def rotation(positions: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, D/2] of the rotary angles (Su et al. 2021, arXiv 2104.09864); ``positions`` [T]."""
    half = head_width // 2
    frequencies = base ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions.to(torch.float32)[:, None] * frequencies  # float32 also under bf16: positions reach thousands
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [B, H, T, D] with each pair (d, d + D/2) turned, so that scores depend on the distance of positions only."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class KVState(NamedTuple):
    """What attention remembers: at most ``window - 1`` keys and values.

    keys, values: [B, H, S, D] or None before the first token (keys are already turned).
    seen: number of tokens read so far.
    start: [B] number of left-padding positions of each row, or None.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    seen: int = 0
    start: Tensor | None = None


class TransformerBlock(ResidualBlock):
    """``x + attention(norm(x))``, then ``+ mlp(norm(.))``.

    Args:
        width: C.
        n_head: H; must divide C into heads of even width.
        window: tokens that a query sees, itself included.
        mlp_ratio: hidden width of the MLP in units of C.
        norm: one of ``residual.NORMS``.
        dropout: probability of dropping a unit of a branch in training.
        rope_base: base of the rotary positions' wavelengths.
    """

    def __init__(
        self,
        width: int,
        n_head: int,
        *,
        window: int,
        mlp_ratio: int = 4,
        norm: str = "rmsnorm",
        dropout: float = 0.0,
        rope_base: float = 10000.0,
    ):
        super().__init__()
        self.n_head, self.window, self.rope_base = n_head, window, rope_base
        self.norm_attention = make_norm(norm, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self._add_mlp(width, mlp_ratio, norm, dropout)
        self._start([self.qkv, self.mlp_in], [self.attention_out, self.mlp_out])

    def initial_state(self, start: Tensor | None = None) -> KVState:
        """See :meth:`Cell.initial_state`."""
        return KVState(start=start)

    def forward(self, x: Tensor, state: KVState | None = None) -> tuple[Tensor, KVState]:
        """See :meth:`Cell.forward`."""
        attended, state = self._attend(self.norm_attention(x), state or KVState())
        return self._add_branches(x, self.attention_out(attended)), state

    def enter(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, T, D] of ``x`` [B, T, C], whose tokens stand at ``positions`` [T].

        Queries and keys are turned. A cache that is not ours goes between here and :meth:`leave`.
        """
        q, k, v = rearrange(self.qkv(self.norm_attention(x)), "b t (three h d) -> three b h t d", three=3, h=self.n_head)
        cos, sin = rotation(positions, q.shape[-1], self.rope_base)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def leave(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
        """The block's output [B, T, C] for its input ``x`` [B, T, C].

        Args:
            q: [B, H, T, D] of :meth:`enter`.
            k, v: [B, H, S, D], of earlier tokens and of these.
            mask: True where a query sees a key, broadcast to [B, H, T, S]; None: all are seen, or with ``is_causal`` those
                that do not come after the query.
        """
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self._add_branches(x, self.attention_out(rearrange(attended, "b h t d -> b t (h d)")))

    def _attend(self, x: Tensor, state: KVState) -> tuple[Tensor, KVState]:
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.n_head)
        n_new = x.shape[1]
        for name, part in (("state", state.keys), ("start", state.start)):
            if part is not None and len(part) != len(x):  # which torch would broadcast
                raise ValueError(f"{name} of {len(part)} rows with inputs of shape {tuple(x.shape)}: must have {len(x)}")
        positions = torch.arange(state.seen, state.seen + n_new, device=x.device)
        cos, sin = rotation(positions, q.shape[-1], self.rope_base)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if state.keys is not None:
            k, v = torch.cat((state.keys, k), dim=2), torch.cat((state.values, v), dim=2)
        n_keys = k.shape[2]
        mask = self._mask(positions, n_keys, state)
        is_causal = mask is None and n_new > 1  # one new token sees every key that the state still holds
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        keep = min(n_keys, self.window - 1)
        kept = (k[:, :, n_keys - keep :], v[:, :, n_keys - keep :])
        return rearrange(y, "b h t d -> b t (h d)"), KVState(*kept, state.seen + n_new, state.start)

    def _mask(self, positions: Tensor, n_keys: int, state: KVState) -> Tensor | None:
        """Which keys each query sees, [T, S] or [B, 1, T, S]; None where the kernel's own causal form says the same."""
        n_new = len(positions)
        windowed = n_keys > self.window
        plain = state.keys is None or n_new == 1
        if plain and not windowed and state.start is None:
            return None
        key_positions = torch.arange(state.seen + n_new - n_keys, state.seen + n_new, device=positions.device)
        distance = positions[:, None] - key_positions  # [T, S]
        mask = (distance >= 0) & (distance < self.window)
        if state.start is None:
            return mask
        visible = key_positions >= state.start[:, None]  # [B, S]
        # A padding query sees itself: an empty row of the mask would turn into NaN.
        return (mask & visible[:, None] | (distance == 0))[:, None]
