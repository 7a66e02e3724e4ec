"""Key-value cache keyed by path prefix: the slow, obvious form of ``generation/runner.py``, by immutable states.

A cache belongs to a *path prefix*, not to a block: on the path (4, 6) block 6 reads what block 4 made, on the path
(2, 4, 6) something else. Only paths that share a prefix share its cache (arXiv 2606.21497; docs/method.md 1.4).

Shapes: B rows of a batch, T tokens, S tokens not yet read by a path, P outputs kept for later readers, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbll_seq.generation.protocol import CausalLM

Prefix = tuple[int, ...]


class _Entry(NamedTuple):
    """What the last block of one path prefix has done so far."""

    state: Any  # of the block; None for the empty prefix, which is the embedding
    length: int  # positions written
    pending: Tensor | None  # [B, P, C]: the last P outputs, those that some reader has yet to take


class PathCache:
    """States of the blocks for one batch of sequences, keyed by path prefix.

    Tokens are appended once; each path then catches up with them when it is advanced, and a prefix that two paths share
    is evaluated once. An output is kept until every reader that ``paths`` implies has taken it, so with one path
    nothing is kept but the states.

    Args:
        model: see :class:`hbll_seq.generation.protocol.CausalLM`.
        paths: the paths that will be advanced, each a tuple of block numbers.
        start: [B] number of left-padding positions of each row, or None.

    Raises:
        ValueError: a path is not dyadic.
    """

    def __init__(self, model: CausalLM, paths: Sequence[Sequence[int]], start: Tensor | None = None):
        self.model = model
        self.paths = frozenset(model.resolve_path(path=path) for path in paths)
        self.start = start
        #: readers of each prefix and how many of its positions each has taken; the reader ``None`` is the head.
        self._taken: dict[Prefix, dict[int | None, int]] = {}
        for path in sorted(self.paths):
            for k, block in enumerate(path):
                self._taken.setdefault(path[:k], {})[block] = 0
            self._taken.setdefault(path, {})[None] = 0
        self._entries = {
            prefix: _Entry(model.blocks[prefix[-1] - 1].initial_state(start) if prefix else None, 0, None)
            for prefix in self._taken
        }

    def copy(self) -> PathCache:
        """An independent cache with the same content; cheap, because states are never changed in place."""
        twin = object.__new__(PathCache)
        twin.model, twin.paths, twin.start = self.model, self.paths, self.start
        twin._entries = dict(self._entries)
        twin._taken = {prefix: dict(readers) for prefix, readers in self._taken.items()}
        return twin

    def append(self, input_ids: Tensor) -> None:
        """Add tokens [B, T] to every sequence; nothing but the embedding is evaluated."""
        self._write((), None, self.model.embed(input_ids))

    def advance(self, path: Sequence[int]) -> Tensor:
        """Evaluate ``path`` on the tokens it has not seen; returns the states [B, S, C] that the head is to read.

        Raises:
            ValueError: the cache was not made for this path, or no token was appended since its last call.
        """
        path = tuple(path)
        if path not in self.paths:
            raise ValueError(f"path={list(path)}: this cache was made for {sorted(self.paths)}; name it there")
        for k, block_number in enumerate(path):
            x = self._take(path[:k], reader=block_number)
            if x is None:  # another path has brought this prefix up to date
                continue
            block, prefix = self.model.blocks[block_number - 1], path[: k + 1]
            state = self._entries[prefix].state
            if x.shape[1] == 1:
                y, state = block.step(x[:, 0], state)
                y = y.unsqueeze(1)
            else:
                y, state = block(x, state)
            self._write(prefix, state, y)
        output = self._take(path, reader=None)
        if output is None:
            raise ValueError(f"path={list(path)} has seen every token of this cache: append tokens before advancing it")
        return output

    def _write(self, prefix: Prefix, state: Any, y: Tensor) -> None:
        old = self._entries[prefix]
        pending = y if old.pending is None else torch.cat((old.pending, y), dim=1)
        self._entries[prefix] = _Entry(state, old.length + y.shape[1], pending)

    def _take(self, prefix: Prefix, reader: int | None) -> Tensor | None:
        """Outputs of ``prefix`` that ``reader`` has not had, [B, S, C]; None where there are none."""
        entry, taken = self._entries[prefix], self._taken[prefix]
        if taken[reader] == entry.length:
            return None
        first = entry.length - entry.pending.shape[1]
        x = entry.pending[:, taken[reader] - first :]
        taken[reader] = entry.length
        oldest = min(taken.values())
        pending = entry.pending[:, oldest - first :] if oldest < entry.length else None
        self._entries[prefix] = entry._replace(pending=pending)
        return x


def prefill(model: CausalLM, input_ids: Tensor, path: Sequence[int], start: Tensor | None = None) -> tuple[Tensor, PathCache]:
    """Read the prompts [B, T] at once.

    Args:
        model: in evaluation mode.
        input_ids: [B, T]; shorter prompts are padded on the LEFT with any token.
        path: block numbers, see ``model.resolve_path``.
        start: [B] number of padding positions of each row, or None.

    Returns:
        Logits [B, V] of the token that follows, and the cache to hand to :func:`decode_one_token`.

    Raises:
        ValueError: the path is not dyadic.
    """
    cache = PathCache(model, [path], start)
    cache.append(input_ids)
    return model.read_out(cache.advance(path)[:, -1], path), cache


def decode_one_token(model: CausalLM, tokens: Tensor, path: Sequence[int], cache: PathCache) -> Tensor:
    """Add one token to each row of the cache, ``tokens`` [B], and return the logits [B, V] of the next."""
    cache.append(tokens.unsqueeze(1))
    return model.read_out(cache.advance(path)[:, -1], path)
