"""Transformer blocks that all read the same state, as stacked rows: their branches' sum in the calls of about one block.

All queries, keys and values are one product, since the blocks read one input; all heads are the heads of one attention; the
MLPs' first matrices are one batched product, and their last ones one product again, whose sum over hidden units adds the
branches up.

Shapes: B batch, T tokens of a call, S keys in sight, R blocks, H heads of a block, D width of a head, C width, M hidden
width of an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbll_seq.layers.attention import TransformerBlock
from hbll_seq.layers.attention_arithmetic import Turns, rotate, rotation_table
from hbll_seq.layers.base import Cell, Decoder

#: positions that a buffer has beyond those that it must hold.
_SPARE = 256


def stacked_decoder(blocks: Sequence[Cell], start: Tensor | None, rollback: int) -> StackedDecoder | None:
    """A decoder of these blocks side by side; None where they are not all alike and of the kind that can be stacked."""
    first = blocks[0]
    for block in blocks:
        if type(block) is not TransformerBlock or not block.has_mlp or block.mlp != "gelu" or block.qk_norm:
            return None
        plain = not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())
        if not plain or block.n_head != block.n_kv_head or not isinstance(block.norm_attention, nn.RMSNorm):
            return None
        if (block.n_head, block.window, block.rope_base) != (first.n_head, first.window, first.rope_base):
            return None
    return StackedDecoder(blocks, start, rollback)


class StackedDecoder(Decoder):
    """``x + sum of the blocks' branches at x``; see :class:`hbll_seq.layers.base.Decoder`.

    Args:
        blocks: TransformerBlocks of one shape.
        start, rollback: see :meth:`Cell.decoder`.
    """

    def __init__(self, blocks: Sequence[TransformerBlock], start: Tensor | None, rollback: int):
        super().__init__(rollback)
        block, self.start = blocks[0], start
        self.n_blocks, self.n_head, self.window, self.base = len(blocks), block.n_head, block.window, block.rope_base
        self.eps = block.norm_attention.eps

        def all_of(part):
            return torch.stack([part(each).detach() for each in blocks])

        qkv = all_of(lambda each: each.qkv.weight * each.norm_attention.weight)  # [R, 3 C, C]
        width = qkv.shape[-1]
        # queries of all blocks first, then keys, then values
        self._qkv = qkv.view(len(blocks), 3, width, width).transpose(0, 1).reshape(-1, width).t().contiguous()
        self._out = all_of(lambda each: each.attention_out.weight).transpose(1, 2).contiguous()  # [R, C, C]
        self._in = all_of(lambda each: each.mlp_in.weight * each.norm_mlp.weight).transpose(1, 2).contiguous()  # [R, C, M]
        last = all_of(lambda each: each.mlp_out.weight)  # [R, C, M]
        self._last = last.transpose(1, 2).reshape(-1, width).contiguous()  # [R M, C]
        self._buffer: Tensor | None = None  # [2, B, R H, P, D]
        self._first = 0  # position of the buffer's first key
        self._table: Turns | None = None

    def step(self, x: Tensor) -> Tensor:
        """See :meth:`Decoder.step`."""
        return self._read(x, len(x), 1)

    def read(self, x: Tensor) -> Tensor:
        """See :meth:`Decoder.read`."""
        return self._read(x.reshape(-1, x.shape[-1]), *x.shape[:2]).view(x.shape)

    def _read(self, x: Tensor, batch: int, n_new: int) -> Tensor:
        """Rows [B * T, C] -> [B * T, C]."""
        width, n_rows = x.shape[-1], len(x)
        heads = torch.mm(self._norm(x), self._qkv).view(batch, n_new, 3, self.n_blocks * self.n_head, -1)
        heads = heads.permute(2, 0, 3, 1, 4)  # [3, B, R H, T, D]
        turned = rotate(heads[:2], *self._turns(n_new, heads.shape[-1], x.device))
        self._reserve(batch, n_new, turned[1])
        high = self.length + n_new - self._first
        low = max(0, self.length + 1 - self.window - self._first)
        self._buffer[0, :, :, high - n_new : high], self._buffer[1, :, :, high - n_new : high] = turned[1], heads[2]
        keys, values = self._buffer[:, :, :, low:high]
        y = F.scaled_dot_product_attention(turned[0], keys, values, attn_mask=self._mask(n_new, high - low, x.device))
        self.length += n_new
        y = y.unflatten(1, (self.n_blocks, -1)).permute(1, 0, 3, 2, 4).reshape(self.n_blocks, n_rows, width)
        mixed = torch.bmm(y, self._out)  # [R, B T, C]
        hidden = F.gelu(torch.bmm(self._norm(mixed + x), self._in), approximate="tanh")  # [R, B T, M]
        total = mixed.sum(dim=0).add_(x)
        return total.addmm_(hidden.transpose(0, 1).reshape(n_rows, -1), self._last)

    def _turns(self, n_new: int, width: int, device: torch.device) -> list[Tensor]:
        """Cosines and sines [T, D/2] of the positions being read."""
        needed = self.length + n_new
        if self._table is None or len(self._table.cos) < needed:
            self._table = rotation_table(max(256, 1 << (needed - 1).bit_length()), width, self.base, device)
        return [part[self.length : needed] for part in (self._table.cos, self._table.sin)]

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def _mask(self, n_new: int, n_keys: int, device: torch.device) -> Tensor | None:
        """Which keys each query sees, [T, S] or [B, 1, T, S]; None for all."""
        if n_new == 1 and self.start is None:
            return None
        end = self.length + n_new
        key_positions = torch.arange(end - n_keys, end, device=device)
        distance = key_positions[n_keys - n_new :, None] - key_positions
        mask = (distance >= 0) & (distance < self.window)
        if self.start is None:
            return mask
        visible = key_positions >= self.start[:, None]
        return (mask & visible[:, None] | (distance == 0))[:, None]  # a padding query sees itself: no row is empty

    def _reserve(self, batch: int, n_new: int, like: Tensor) -> None:
        """Room for that many more keys; what is out of sight of every position that may come back is given up."""
        used = self.length - self._first
        if self._buffer is not None and used + n_new <= self._buffer.shape[3]:
            return
        kept = min(used, self.window - 1 + self.rollback)
        buffer = like.new_empty((2, batch, like.shape[1], kept + n_new + _SPARE, like.shape[-1]))
        if kept:
            buffer[:, :, :, :kept] = self._buffer[:, :, :, used - kept : used]
        self._buffer, self._first = buffer, self.length - kept

    def _truncate(self, length: int) -> None:
        """See :meth:`Decoder.truncate`: what lies behind is written over."""

    def keep(self, rows: Tensor) -> None:
        """See :meth:`Decoder.keep`."""
        self.start = None if self.start is None else self.start.index_select(0, rows)
        self._buffer = None if self._buffer is None else self._buffer.index_select(1, rows)
