"""A path with its first blocks in order and the others side by side: one sweep over them in place of a walk.

With s the state after k blocks in order, the path ends in ``s + sum of the others' branches at s``: one forward iteration
with the identity for their Jacobians (docs/method.md 2.2). It has the work of all blocks and the span of k + 1.

Shapes: B rows of a batch, T and K tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hbll_seq.generation.protocol import CausalLM
from hbll_seq.generation.runner import Path, Runner, SharedPaths
from hbll_seq.layers.base import ROLLBACK, Decoder
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import whole_or_none


def check_in_order(in_order: object, path: Sequence[int]) -> int:
    """The number as an int. Raises ValueError unless at least two blocks of the path are left to be side by side."""
    number = whole_or_none(in_order)
    if number is None or not 0 <= number <= len(path) - 2:
        most = f"a whole number of 0 to {len(path) - 2}" if len(path) > 1 else "left out"
        raise ValueError(
            f"in_order={quote(in_order)} with the {len(path)} blocks {list(path)}: must be {most}; the blocks behind these "
            "are evaluated side by side, at least two of them"
        )
    return number


class SideBySide:
    """Blocks that all read the same state, by their own decoders: x plus the sum of their branches at x."""

    def __init__(self, decoders: Sequence[Decoder]):
        self.decoders = decoders

    def read(self, x: Tensor) -> Tensor:
        """See :meth:`Decoder.read`."""
        return self._sum(x, (decoder.read(x) for decoder in self.decoders))

    def step(self, x: Tensor) -> Tensor:
        """See :meth:`Decoder.step`."""
        return self._sum(x, (decoder.step(x) for decoder in self.decoders))

    def _sum(self, x: Tensor, outputs: Iterator[Tensor]) -> Tensor:
        total = torch.sub(next(outputs), x, alpha=len(self.decoders) - 1)
        for y in outputs:
            total += y
        return total


class _SideBySidePath(SharedPaths):
    """One path, all rows along it: the decoders are those of the walk in order, and differ in what they read."""

    def __init__(self, model: CausalLM, path: Path, in_order: int, start: Tensor | None, rollback: int):
        super().__init__(model, path, [path], start, rollback)
        self._chain = [*self._chain[:in_order], SideBySide(self._chain[in_order:])]

    def states(self, x: Tensor, path: Path) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        for decoder in self._chain:
            x = decoder.read(x)
        return x


class SideBySideRunner(Runner):
    """Reads a batch along a path whose last blocks are side by side.

    Args:
        model: see :class:`hbll_seq.generation.protocol.CausalLM`.
        path: block numbers.
        in_order: how many blocks are taken in order.
        start, rollback: see :class:`hbll_seq.generation.runner.Runner`.

    Raises:
        ValueError: the path is not dyadic, or fewer than two blocks are left.
    """

    def __init__(
        self,
        model: CausalLM,
        path: Sequence[int],
        in_order: int,
        start: Tensor | None = None,
        *,
        rollback: int = ROLLBACK,
    ):
        self.model, self.path = model, model.resolve_path(path=path)
        self.in_order = check_in_order(in_order, self.path)
        self._walk = _SideBySidePath(model, self.path, self.in_order, start, rollback)
