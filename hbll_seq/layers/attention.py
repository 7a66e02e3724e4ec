"""Pre-norm Transformer block with rotary positions and a sliding attention window.

Shapes: B batch, T tokens in this call, S keys in sight, C width, H heads, K heads of keys and values, D = C / H width of a
head.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from hbll_seq.layers.attention_arithmetic import KVState, attention, rotate, rotation, sight, turns
from hbll_seq.layers.attention_decoder import AttentionDecoder
from hbll_seq.layers.base import ROLLBACK, Decoder
from hbll_seq.layers.prepared import is_plain
from hbll_seq.layers.residual import ResidualBlock, make_norm
from hbll_seq.utils.reading import quote


def check_kv_heads(n_head: int, n_kv_head: int | None) -> None:
    """Raises ValueError unless ``n_kv_head`` is a divisor of ``n_head``, or None for as many."""
    is_whole = isinstance(n_kv_head, int) and not isinstance(n_kv_head, bool)
    if n_kv_head is not None and (not is_whole or n_kv_head < 1 or n_head % n_kv_head):
        divisors = [k for k in range(1, n_head + 1) if n_head % k == 0]
        raise ValueError(f"n_kv_head={quote(n_kv_head)} does not divide n_head={n_head}: choose one of {quote(divisors)}, or "
                         "None for as many as n_head")


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` in the dtype of its scale, as torch wants it: under autocast ``x`` has another one."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


class TransformerBlock(ResidualBlock):
    """``x + attention(norm(x))``, then ``+ mlp(norm(.))``.

    Args:
        width: C.
        n_head: H; must divide C into heads of even width.
        window: tokens that a query sees, itself included.
        mlp_ratio: hidden width of the MLP in units of C, see :func:`residual.hidden_width`; 0 leaves the branch out.
        norm: one of ``residual.NORMS``.
        dropout: probability of dropping a unit of a branch in training.
        rope_base: base of the rotary positions' wavelengths.
        n_kv_head: K, heads of keys and values, each read by H / K heads of queries; None is H.
        mlp: one of ``residual.MLPS``.
        qk_norm: queries and keys are normalised over D (RMS, with a learned scale) before they are turned (Dehghani et al.
            2023, arXiv 2302.05442).

    Raises:
        ValueError: ``n_kv_head`` does not divide H, or ``mlp`` is unknown.
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
        n_kv_head: int | None = None,
        mlp: str = "gelu",
        qk_norm: bool = False,
    ):
        super().__init__()
        check_kv_heads(n_head, n_kv_head)
        self.n_head, self.n_kv_head = n_head, n_head if n_kv_head is None else n_kv_head
        self.window, self.rope_base, self.qk_norm = window, rope_base, qk_norm
        self.norm_attention = make_norm(norm, width)
        head_width = width // n_head
        self.qkv = nn.Linear(width, width + 2 * self.n_kv_head * head_width, bias=False)
        if qk_norm:
            self.norm_q, self.norm_k = make_norm("rmsnorm", head_width), make_norm("rmsnorm", head_width)
        self.attention_out = nn.Linear(width, width, bias=False)
        self._add_mlp(width, mlp_ratio, norm, dropout, mlp)
        self._start([self.qkv], [self.attention_out])

    def initial_state(self, start: Tensor | None = None) -> KVState:
        """See :meth:`Cell.initial_state`."""
        return KVState(start=start)

    def decoder(self, start: Tensor | None = None, *, rollback: int = ROLLBACK) -> Decoder:
        """See :meth:`Cell.decoder`."""
        if not is_plain(self, [TransformerBlock], deep=False):  # a subclass or a hook expects its own forward to be called
            return super().decoder(start, rollback=rollback)
        return AttentionDecoder(self, start, rollback)

    def forward(self, x: Tensor, state: KVState | None = None) -> tuple[Tensor, KVState]:
        """See :meth:`Cell.forward`."""
        attended, state = self._attend(self.norm_attention(x), state or KVState())
        return self._add_branches(x, self.attention_out(attended)), state

    def enter(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, D], keys and values [B, K, T, D] of ``x`` [B, T, C], whose tokens stand at ``positions`` [T].

        Queries and keys are turned. A cache that is not ours goes between here and :meth:`leave`.
        """
        return self._turned(self.norm_attention(x), positions)

    def leave(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
        """The block's output [B, T, C] for its input ``x`` [B, T, C].

        Args:
            q: [B, H, T, D] of :meth:`enter`.
            k, v: [B, K, S, D], of earlier tokens and of these.
            mask: True where a query sees a key, broadcast to [B, H, T, S]; None: all are seen, or with ``is_causal`` those
                that do not come after the query.
        """
        attended = attention(q, k, v, mask, is_causal=is_causal)
        return self._add_branches(x, self.attention_out(rearrange(attended, "b h t d -> b t (h d)")))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, D], keys and values [B, K, T, D] of what the block reads, [B, T, C]; nothing is turned yet."""
        n_heads = (self.n_head, self.n_kv_head, self.n_kv_head)
        qkv = rearrange(self.qkv(x), "b t (h d) -> b h t d", h=sum(n_heads))
        q, k, v = qkv.split(n_heads, dim=1)
        return (_normalised(self.norm_q, q), _normalised(self.norm_k, k), v) if self.qk_norm else (q, k, v)

    def _turned(self, x: Tensor, positions: Tensor, first: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``first``: the positions follow one another from there on, so that their angles are in the table of all blocks."""
        q, k, v = self._heads(x)
        if first is None or torch.compiler.is_compiling():  # which would trace the making of the table
            cos, sin = rotation(positions, q.shape[-1], self.rope_base)
        else:
            end = first + len(positions)
            table = turns(first, end, q.shape[-1], self.rope_base, q)
            here = table.rows(first, end)
            cos, sin = table.cos[here], table.sin[here]
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _attend(self, x: Tensor, state: KVState) -> tuple[Tensor, KVState]:
        n_new = x.shape[1]
        for name, part in (("state", state.keys), ("start", state.start)):
            if part is not None and len(part) != len(x):  # which torch would broadcast
                raise ValueError(f"{name} of {len(part)} rows with inputs of shape {tuple(x.shape)}: must have {len(x)}")
        positions = torch.arange(state.seen, state.seen + n_new, device=x.device)
        q, k, v = self._turned(x, positions, state.seen)
        if state.keys is not None:
            k, v = torch.cat((state.keys, k), dim=2), torch.cat((state.values, v), dim=2)
        n_keys = k.shape[2]
        mask = self._mask(positions, n_keys, state)
        is_causal = mask is None and n_new > 1  # one new token sees every key that the state still holds
        y = attention(q, k, v, mask, is_causal=is_causal)
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
        real = None if state.start is None else key_positions >= state.start[:, None]  # [B, S]
        return sight(positions, key_positions, self.window, real)
