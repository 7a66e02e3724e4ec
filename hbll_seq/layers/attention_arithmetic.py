"""The arithmetic of attention: rotary positions, and queries that read keys and values, by group.

Shapes: B batch, T tokens in this call, S keys in sight, H heads, K heads of keys and values, D width of a head.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def rotation(positions: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, D/2] of the rotary angles (Su et al. 2021, arXiv 2104.09864); ``positions`` [T]."""
    half = head_width // 2
    frequencies = base ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions.to(torch.float32)[:, None] * frequencies  # float32 also under bf16: positions reach thousands
    return angles.cos(), angles.sin()


#: positions after which a table begins anew: a text may go on without end
STRETCH = 8192


class Turns(NamedTuple):
    """Rotary angles of the positions ``first``, ``first`` + 1, .., each [.., D/2]: cosines and sines, and both as complex
    numbers."""

    first: int
    cos: Tensor
    sin: Tensor
    both: Tensor

    def reaches(self, first: int, end: int) -> bool:
        """Whether it holds the positions ``first`` .. ``end`` - 1."""
        return self.first <= first and end <= self.first + len(self.cos)

    def rows(self, first: int, end: int) -> slice:
        """Where in it the positions ``first`` .. ``end`` - 1 stand, all of which it holds."""
        return slice(first - self.first, end - self.first)


def _made(first: int, n_positions: int, head_width: int, base: float, device: torch.device) -> Turns:
    """:func:`rotation` of that many positions from ``first`` on, for all blocks; not to be written to."""
    with torch.inference_mode(False):  # who asks next may be in another mode
        cos, sin = rotation(torch.arange(first, first + n_positions, device=device), head_width, base)
        return Turns(first, cos, sin, torch.complex(cos, sin))


#: those that begin with position 0 are kept for good: a CUDA graph of a training step reads them where they lie
first_tables = cache(_made)
later_tables = lru_cache(maxsize=16)(_made)


def turns(first: int, end: int, head_width: int, base: float, like: Tensor) -> Turns:
    """A table that holds the positions ``first`` .. ``end`` - 1, on the device of ``like``.

    It begins at a multiple of ``STRETCH`` and is a power of two long, so that few tables serve all lengths, and none is the
    longer for what was read before. Tensors of a kind of their own, such as FakeTensors, that have shapes and no values, get
    one of that kind, which nobody else reads.
    """
    begin = first - first % STRETCH
    make = _made if type(like) is not Tensor else later_tables if begin else first_tables
    return make(begin, max(256, 1 << (end - begin - 1).bit_length()), head_width, base, like.device)


@lru_cache(maxsize=16)
def band(n_new: int, n_keys: int, window: int, dtype: torch.dtype) -> Tensor:
    """[T, S], on the CPU: 0 where the last T of S positions see a key, -inf where it is later or lies before the window."""
    with torch.inference_mode(False):
        ages = torch.arange(n_keys - n_new, n_keys, device="cpu")[:, None] - torch.arange(n_keys, device="cpu")
        return torch.zeros_like(ages, dtype=dtype).masked_fill_((ages < 0) | (ages >= window), -math.inf)


def sight(positions: Tensor, keys: Tensor, window: int, real: Tensor | None = None) -> Tensor:
    """Which keys each query sees: those at its own position and before it, ``window`` in all.

    Args:
        positions, keys: where the queries [T] and the keys [S] stand.
        window: tokens that a query sees, itself included.
        real: [B, S], False for padding; None where there is none.

    Returns:
        bool, [T, S], or [B, 1, T, S] with ``real``.
    """
    distance = positions[:, None] - keys
    seen = (distance >= 0) & (distance < window)
    # A padding query sees itself: an empty row of the mask would turn into NaN.
    return seen if real is None else (seen & real[:, None] | (distance == 0))[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [B, H, T, D] with each pair (d, d + D/2) turned, so that scores depend on the distance of positions only."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool = False) -> Tensor:
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245): head h reads the keys of head ``h * K // H``.

    Args:
        q: [B, H, T, D].
        k, v: [B, K, S, D]; K divides H.
        mask: bool, broadcast to [B, H, T, S], but equal for all heads; True where a query sees a key. None: all are seen.
        is_causal: in place of a mask, for T = S: a query sees no later key.

    Returns:
        [B, H, T, D].
    """
    (n_head, n_new), n_kv_head = q.shape[1:3], k.shape[1]
    if n_head == n_kv_head:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    if n_new == 1:  # the heads of a group are queries of one sequence: nothing is copied
        y = F.scaled_dot_product_attention(q.reshape(len(q), n_kv_head, -1, q.shape[-1]), k, v, attn_mask=mask)
        return y.reshape(q.shape)
    # torch's own enable_gqa is not faster on a CPU, and not in all of its kernels.
    k, v = (x.repeat_interleave(n_head // n_kv_head, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


class KVState(NamedTuple):
    """What attention remembers: at most ``window - 1`` keys and values.

    keys, values: [B, K, S, D] or None before the first token (keys are already turned).
    seen: number of tokens read so far.
    start: [B] number of left-padding positions of each row, or None.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    seen: int = 0
    start: Tensor | None = None
