"""The decoder of a Transformer block: keys and values in one buffer that is written in place.

The buffer is longer than the window. Keys are written one after the other, and when its end is reached, what is still in
sight moves to its beginning. So the keys in sight are always one stretch, in order, and a mask is only needed where several
tokens are read at once or where padding is in sight; a window that slides needs none.

Shapes: B batch, T tokens of a call, S keys in sight, C width, H heads, K heads of keys and values, G = H / K, D width of a
head, P positions that the buffer holds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hbll_seq.layers.attention_arithmetic import KVState, Turns, attention, band, rotate, turns
from hbll_seq.layers.base import ROLLBACK, Decoder
from hbll_seq.layers.prepared import MANY_ROWS, MLP, Matrix, Norm, can_prepare, prepared

#: positions that a buffer has at least beyond what it must hold.
SPARE = 64


def in_pairs(x: Tensor) -> Tensor:
    """Heads [..., D] whose pairs (d, d + D/2) are brought side by side, as complex numbers want them."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


class PreparedAttention:
    """A Transformer block's matrices for a few rows at a time; see :mod:`hbll_seq.layers.prepared`.

    Queries come out divided by sqrt(D), and pairs that rotary positions turn stand side by side in queries and keys.

    Args:
        block: a TransformerBlock.
    """

    def __init__(self, block: nn.Module):
        n_head, n_kv_head = block.n_head, block.n_kv_head
        self.n_turned = n_head + n_kv_head
        weight = block.qkv.weight.detach()
        width = weight.shape[0] // (self.n_turned + n_kv_head)
        self.head_width, divisor = width, 1 / math.sqrt(width)
        heads = weight.unflatten(0, (-1, width))  # [H + 2 K, D, C]
        turned = in_pairs(heads[: self.n_turned].transpose(1, 2)).transpose(1, 2)
        self.scale: Tensor | None = None  # of queries and keys, [H + K, D]
        if block.qk_norm:
            scales = [block.norm_q.weight * divisor] * n_head + [block.norm_k.weight] * n_kv_head
            self.scale = in_pairs(torch.stack([scale.detach() * math.sqrt(width) for scale in scales]))
            self._floor = weight.new_tensor(math.sqrt(block.norm_q.eps * width))
        else:
            turned = torch.cat((turned[:n_head] * divisor, turned[n_head:]))
        self.norm = Norm(block.norm_attention)
        self.qkv = Matrix(torch.cat((turned, heads[self.n_turned :])).flatten(0, 1), self.norm.scale)
        self.out, self.mlp = Matrix(block.attention_out.weight), MLP(block)

    def project(self, x: Tensor, turns: Tensor) -> Tensor:
        """Rows [R, C], turns [R or 1, D/2] -> queries, keys and values [R, H + 2 K, D], turned."""
        heads = self.qkv(self.norm(x)).view(x.shape[0], -1, self.head_width)
        turned = heads[:, : self.n_turned]
        if self.scale is not None:
            lengths = torch.hypot(torch.linalg.vector_norm(turned, dim=-1, keepdim=True), self._floor)
            turned.div_(lengths).mul_(self.scale)
        torch.view_as_complex(turned.view(x.shape[0], self.n_turned, -1, 2)).mul_(turns[:, None])
        return heads


class AttentionDecoder(Decoder):
    """See :class:`hbll_seq.layers.base.Decoder`.

    Args:
        block: a TransformerBlock.
        start, rollback: see :meth:`hbll_seq.layers.base.Cell.decoder`.
    """

    def __init__(self, block: nn.Module, start: Tensor | None, rollback: int = ROLLBACK):
        super().__init__(rollback, start)
        self.block = block
        self._buffer: Tensor | None = None  # [2, B, K, P, D]
        self._first = 0  # position of the buffer's first key
        self._hidden: Tensor | None = None  # [B, P], -inf where a key is padding
        self._table: Turns | None = None
        self._prepared = prepared(block, PreparedAttention) if can_prepare(block, [type(block)]) else None

    def step(self, x: Tensor) -> Tensor:
        """See :meth:`Decoder.step`."""
        if self._prepared is None or x.shape[0] > MANY_ROWS or self.length < self._last_start:
            return self._read(x.unsqueeze(1)).squeeze(1)
        return self._read_few(x, x.shape[0], 1)

    def read(self, x: Tensor) -> Tensor:
        """See :meth:`Decoder.read`."""
        batch, n_new, width = x.shape
        if self._prepared is None or batch * n_new > MANY_ROWS or self.length < self._last_start:
            return self._read(x)
        return self._read_few(x.reshape(-1, width), batch, n_new).view(x.shape)

    def _read(self, x: Tensor) -> Tensor:
        """``x`` [B, T, C] -> [B, T, C], with the block's own modules."""
        block, (batch, n_new, _) = self.block, x.shape
        q, k, v = block._heads(block.norm_attention(x))
        table, here = self._turns(n_new, q)
        cos, sin = table.cos[here], table.sin[here]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self._prepared is not None:
            q, k = in_pairs(q), in_pairs(k)
        self._reserve(batch, n_new, k)
        low, high = self._sight(n_new)
        self._buffer[0, :, :, high - n_new : high], self._buffer[1, :, :, high - n_new : high] = k, v
        keys, values = self._buffer[:, :, :, low:high]
        state = KVState(keys if self.length else None, values, self.length, self._padding_in(low))
        mask = block._mask(torch.arange(self.length, self.length + n_new, device=x.device), high - low, state)
        y = attention(q, keys, values, mask, is_causal=mask is None and n_new > 1)
        self.length += n_new
        return block._add_branches(x, block.attention_out(y.transpose(1, 2).flatten(2)))

    def _read_few(self, x: Tensor, batch: int, n_new: int) -> Tensor:
        """Rows [B * T, C] -> [B * T, C], with the prepared weights."""
        parts, n_head, n_kv, width = self._prepared, self.block.n_head, self.block.n_kv_head, self._prepared.head_width
        table, here = self._turns(n_new, x)
        turns = table.both[here]
        heads = parts.project(x, turns if batch == 1 or n_new == 1 else turns.repeat(batch, 1))
        q, kv = heads[:, :n_head], heads[:, n_head:]
        self._reserve(batch, n_new, kv)
        low, high = self._sight(n_new)
        if n_new == 1:
            q = q.reshape(batch * n_kv, -1, width)
            self._buffer.select(3, high - 1).copy_(kv.view(batch, 2, n_kv, width).transpose(0, 1))
        else:
            q = q.reshape(batch, n_new, n_kv, -1, width).permute(0, 2, 3, 1, 4).reshape(batch * n_kv, -1, width)
            kv = kv.view(batch, n_new, 2, n_kv, width).permute(2, 0, 3, 1, 4)
            self._buffer.narrow(3, high - n_new, n_new).copy_(kv)
        scores = torch.bmm(q, self._keys.narrow(1, low, high - low).transpose(1, 2))  # [B * K, G * T, S]
        if n_new > 1:
            sight = band(n_new, high - low, self.block.window, x.dtype)
            scores.view(batch * n_kv, -1, n_new, high - low).add_(sight)
        if self._padding_in(low) is not None:
            scores.view(batch, -1, high - low).add_(self._hidden[:, None, low:high])
        y = torch.bmm(scores.softmax(dim=-1), self._values.narrow(1, low, high - low))
        if n_new > 1:
            y = y.view(batch, n_kv, -1, n_new, width).permute(0, 3, 1, 2, 4)
        self.length += n_new
        return parts.mlp(parts.out.add_to(x, y.reshape(batch * n_new, -1)))

    def _turns(self, n_new: int, like: Tensor) -> tuple[Turns, slice]:
        """A table that holds the angles of the tokens being read, and where."""
        end = self.length + n_new
        if self._table is None or not self._table.reaches(self.length, end):
            width = self.block.qkv.out_features // (self.block.n_head + 2 * self.block.n_kv_head)
            self._table = turns(self.length, end, width, self.block.rope_base, like)
        return self._table, self._table.rows(self.length, end)

    def _sight(self, n_new: int) -> tuple[int, int]:
        """Where in the buffer the keys stand that the tokens being read see, from the first token's first key on."""
        high = self.length + n_new - self._first
        return max(0, self.length + 1 - self.block.window - self._first), high

    def _padding_in(self, low: int) -> Tensor | None:
        """``start``, where a key from the buffer's ``low`` on is padding."""
        return self.start if self._last_start > self._first + low else None

    def _reserve(self, batch: int, n_new: int, like: Tensor) -> None:
        """Room for that many more keys; a new buffer of twice the size at first, then what is out of sight is given up."""
        used = self.length - self._first
        if self._buffer is not None and used + n_new <= self._buffer.shape[3]:
            return
        window, n_kv, width = self.block.window, self.block.n_kv_head, like.shape[-1]
        kept = min(used, window - 1 + self.rollback)
        room = kept + n_new + max(SPARE, min(kept + n_new, window))
        buffer = like.new_empty((2, batch, n_kv, room, width))
        if kept:
            buffer[:, :, :, :kept] = self._buffer[:, :, :, used - kept : used]
        self._buffer, self._first = buffer, self.length - kept
        self._look()

    def _look(self) -> None:
        """What follows from the buffer and its first position."""
        _, batch, n_kv, room, width = self._buffer.shape
        self._keys, self._values = self._buffer.view(2, batch * n_kv, room, width)  # [B * K, P, D]
        self._hidden = None
        if self._last_start > self._first:
            positions = torch.arange(self._first, self._first + room, device=self._buffer.device)
            self._hidden = self._buffer.new_zeros((batch, room)).masked_fill_(positions < self.start[:, None], -math.inf)

    def _truncate(self, length: int) -> None:
        """See :meth:`Decoder.truncate`: what lies behind is written over."""

    def keep(self, rows: Tensor) -> None:
        """See :meth:`Decoder.keep`."""
        super().keep(rows)
        if self._buffer is not None:
            self._buffer = self._buffer.index_select(1, rows)
            self._look()
