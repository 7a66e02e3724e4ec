"""A path with its first blocks in order and the others side by side: one sweep over them in place of a walk.

With s the state after k blocks in order, the path ends in ``s + sum of the others' branches at s``: one forward iteration
with the identity for their Jacobians (docs/method.md 2.2). It has the work of all blocks and the span of k + 1.

Shapes: B rows of a batch, T and K tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hbll_seq.generation.protocol import CausalLM
from hbll_seq.generation.runner import Runner
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


class SideBySideRunner:
    """Reads a batch along a path whose last blocks are side by side; used as :class:`hbll_seq.generation.runner.Runner` is.

    Args:
        model: see :class:`hbll_seq.generation.protocol.CausalLM`.
        path: block numbers.
        in_order: how many blocks are taken in order.
        start: [B], the number of left-padding positions of each row, or None for none.
        rollback: how many of the last tokens :meth:`truncate` can take back.

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
        self._runner = Runner(model, self.path, start, rollback=rollback)  # whose decoders and head are used by hand
        decoders = [self._runner.decoder(self.path[: k + 1]) for k in range(len(self.path))]
        self._decoders = [*decoders[: self.in_order], SideBySide(decoders[self.in_order :], rollback)]

    @property
    def length(self) -> int:
        """Positions read, left padding included."""
        return self._decoders[-1].length

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Read the prompts [B, T] -> logits [B, V] of the token that follows."""
        return self._runner.logits(self._states(input_ids)[:, -1])

    def step(self, tokens: Tensor) -> Tensor:
        """One more token for each row, [B] -> logits [B, V] of the next."""
        x = self.model.embed(tokens.unsqueeze(1))[:, 0]
        for decoder in self._decoders:
            x = decoder.step(x)
        return self._runner.logits(x)

    def read(self, tokens: Tensor) -> Tensor:
        """The next tokens at once, [B, K] -> logits [B, K, V] of what follows each."""
        return self._runner.logits(self._states(tokens))

    def _states(self, tokens: Tensor) -> Tensor:
        x = self.model.embed(tokens)
        for decoder in self._decoders:
            x = decoder.read(x)
        return x

    def truncate(self, length: int) -> None:
        """Forget the positions from ``length`` on. Raises ValueError as :meth:`Runner.truncate` does."""
        for decoder in self._decoders:
            decoder.truncate(length)

    def keep(self, rows: Sequence[int] | Tensor) -> None:
        """Go on with these rows alone."""
        index = torch.as_tensor(rows, device=self.model.embed.weight.device)
        for decoder in self._decoders:
            decoder.keep(index)


class SideBySide(Decoder):
    """Blocks that all read the same state, by their own decoders: x plus the sum of their branches at x."""

    def __init__(self, decoders: Sequence[Decoder], rollback: int = ROLLBACK):
        super().__init__(rollback)
        self.decoders = decoders

    def read(self, x: Tensor) -> Tensor:
        """See :meth:`Decoder.read`."""
        self.length += x.shape[1]
        total = torch.sub(self.decoders[0].read(x), x, alpha=len(self.decoders) - 1)
        for decoder in self.decoders[1:]:
            total += decoder.read(x)
        return total

    def step(self, x: Tensor) -> Tensor:
        """See :meth:`Decoder.step`."""
        self.length += 1
        total = torch.sub(self.decoders[0].step(x), x, alpha=len(self.decoders) - 1)
        for decoder in self.decoders[1:]:
            total += decoder.step(x)
        return total

    def _truncate(self, length: int) -> None:
        for decoder in self.decoders:
            decoder.truncate(length)

    def keep(self, rows: Tensor) -> None:
        """See :meth:`Decoder.keep`."""
        for decoder in self.decoders:
            decoder.keep(rows)
