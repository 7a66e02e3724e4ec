"""Our blocks between the caches of transformers: what each block reads of a cache and leaves in it.

Attention blocks keep turned keys and values by ``cache.update``; recurrent blocks keep their state by
``cache.update_recurrent_state``. A cache belongs to one path; its layer i is the path's i-th block.

Shapes: B rows of a batch, T tokens of a call, S keys that the cache hands out, L tokens read so far and T, C width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hbll_seq.layers.attention import TransformerBlock
from hbll_seq.layers.attention_arithmetic import sight
from hbll_seq.layers.recurrent import RecurrentState
from hbll_seq.layers.recurrent_block import RecurrentBlock
from hbll_seq.utils.modules import plain_module

_NEW_CACHE = "make a new one, after set_depth: DynamicCache(config=model.config)"


def check_mask(mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """The padding mask [B, L] as bool; None where all tokens are real.

    Args:
        mask: of whole numbers or bool, 0 where a token is padding.
        shape: B and T.

    Raises:
        ValueError: it is of another shape.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != shape[0] or mask.shape[1] < shape[1]:
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask of {given} with inputs of shape {shape}: must be [batch, tokens], 0 for padding and 1 for "
            "tokens, with a column for each token in the cache too"
        )
    mask = mask.to(torch.bool)
    return None if bool(mask.all()) else mask


def has_gap(mask: Tensor | None) -> bool:
    """Whether padding follows a real token somewhere."""
    return mask is not None and bool((mask[:, :-1] & ~mask[:, 1:]).any())


class BlocksOverCache:
    """One call of the blocks along a path.

    Args:
        blocks: block n of a path is ``blocks[n - 1]``.
        path: block numbers.
        cache: of transformers, or None.
        mask: see :func:`check_mask`.

    Raises:
        ValueError: the cache was filled along another path, or recurrent blocks would read padding behind a token.
    """

    def __init__(self, blocks: nn.ModuleList, path: Sequence[int], cache: Cache | None, mask: Tensor | None):
        self.blocks, self.path, self.cache, self.mask = [blocks[n - 1] for n in path], tuple(path), cache, mask
        self._seen: tuple[Tensor, Tensor | None, bool] | None = None
        if cache is None:
            return
        filled = cache.__dict__.setdefault("hbll_path", self.path)
        if filled != self.path:
            raise ValueError(f"this cache was filled along path {list(filled)}, the model runs {list(path)}: {_NEW_CACHE}")
        if has_gap(mask) and any(isinstance(plain_module(block), RecurrentBlock) for block in self.blocks):
            raise ValueError(
                "attention_mask has padding behind tokens: recurrent blocks would take it for text; pad on the left "
                "(tokenizer.padding_side = 'left')"
            )

    def run(self, i: int, x: Tensor) -> Tensor:
        """The path's i-th block on ``x`` [B, T, C]. Raises ValueError for a kind of block that no cache is known for."""
        block, kind = self.blocks[i], plain_module(self.blocks[i])
        if self.cache is not None and len(self.cache.layers) > i:
            is_state = hasattr(self.cache.layers[i], "recurrent_states")
            if is_state != isinstance(kind, RecurrentBlock):
                raise ValueError(f"layer {i} of this cache is a {type(self.cache.layers[i]).__name__}, which block "
                                 f"{self.path[i]} cannot use: {_NEW_CACHE}")
        if isinstance(kind, RecurrentBlock):
            return self._recurrence(block, i, x)
        if isinstance(kind, TransformerBlock):
            return self._attention(kind, i, x)
        raise ValueError(f"block {self.path[i]} is a {type(kind).__name__}: transformers' caches are for our own blocks")

    def _attention(self, block: TransformerBlock, i: int, x: Tensor) -> Tensor:
        if self._seen is None:  # the same for all attention blocks of a call
            self._seen = self._positions_and_mask(block.window, i, x)
        positions, mask, is_causal = self._seen
        q, k, v = block.enter(x, positions)
        if self.cache is not None:
            k, v = self.cache.update(k, v, i)
        return block.leave(x, q, k, v, mask, is_causal)

    def _positions_and_mask(self, window: int, i: int, x: Tensor) -> tuple[Tensor, Tensor | None, bool]:
        """Positions [T], which keys each query sees, [T, S] or [B, 1, T, S], or None, and whether none comes after it."""
        n_new, seen, n_keys, first = x.shape[1], 0, x.shape[1], 0
        if self.cache is not None:
            seen = int(self.cache.get_seq_length(i))
            n_keys, first = self.cache.get_mask_sizes(n_new, i)
        positions = torch.arange(seen, seen + n_new, device=x.device)
        if self.mask is None and n_keys <= window and first + n_keys == seen + n_new and (n_new == 1 or n_keys == n_new):
            return positions, None, n_new > 1
        keys = torch.arange(first, first + n_keys, device=x.device)  # those of a static cache without values yet lie ahead
        if self.mask is None:
            return positions, sight(positions, keys, window), False
        if self.mask.shape[1] != seen + n_new:
            raise ValueError(f"attention_mask of {self.mask.shape[1]} columns, {seen} tokens in the cache and {n_new} new: "
                             f"it must have {seen + n_new}")
        real = F.pad(self.mask, (0, max(0, first + n_keys - seen - n_new)))[:, first : first + n_keys]
        return positions, sight(positions, keys, window, real), False

    def _recurrence(self, block: RecurrentBlock, i: int, x: Tensor) -> Tensor:
        padding = None if self.mask is None else (self.mask[:, -x.shape[1] :].cumsum(1) == 0).sum(1)
        state = None
        if self.cache is not None:
            if len(self.cache.layers) <= i:
                raise ValueError(f"this cache has no layer for the state of block {self.path[i]}: {_NEW_CACHE}")
            state = self.cache.layers[i].recurrent_states[0]
        y, state = block(x, RecurrentState(state, padding))
        if self.cache is not None:
            self.cache.update_recurrent_state(state.hidden.detach(), i)
        return y
