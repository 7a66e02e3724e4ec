"""What guesses the next tokens cheaply: a shorter path, or the same path with its last blocks side by side.

Shapes: B rows of a batch, K tokens read at once, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hbll_seq.generation.protocol import CausalLM
from hbll_seq.generation.runner import Runner
from hbll_seq.generation.side_by_side import SideBySide, check_in_order
from hbll_seq.layers.base import Decoder

Path = tuple[int, ...]


class Drafter(Protocol):
    """Reads tokens behind those that a runner has read, and guesses what follows.

    Attributes:
        name: the same for drafters that do the same.
    """

    name: str

    def begin(self, runner: Runner, history: list[Tensor]) -> None:
        """A draft begins where the runner stands; ``history`` [B, K] each is what the runner has read."""

    def step(self, tokens: Tensor) -> Tensor:
        """The next token of each row [B] -> logits [B, V]."""

    def end(self) -> None:
        """The draft is done: the runner stands where it stood."""

    def truncate(self, length: int) -> None:
        """What was read from the position ``length`` on is forgotten."""


class PathDrafter:
    """A shorter path.

    Args:
        model: see :class:`hbll_seq.generation.protocol.CausalLM`.
        path: the shorter path.
        start: [B] number of left-padding positions of each row, or None.
        is_shared: it is a beginning of the runner's path, and the runner was made for both: their blocks are shared.
    """

    def __init__(self, model: CausalLM, path: Path, start: Tensor | None, is_shared: bool):
        self.model, self.path, self.start, self.is_shared = model, path, start, is_shared
        self.name = f"path {'-'.join(map(str, path))}"
        self._runner: Runner | None = None
        self._late: Tensor | None = None

    def begin(self, runner: Runner, history: list[Tensor]) -> None:
        """See :class:`Drafter`. Tokens that the runner has read and this path has not are read with the first one."""
        if self._runner is None:
            self._runner = runner if self.is_shared else Runner(self.model, self.path, self.start)
        n_late = runner.length - self._runner.position(self.path)
        self._late = _last(history, n_late) if n_late > 0 else None

    def step(self, tokens: Tensor) -> Tensor:
        """See :class:`Drafter`."""
        if self._late is None:
            return self._runner.step(tokens, self.path)
        tokens, self._late = torch.cat((self._late, tokens.unsqueeze(1)), dim=1), None
        return self._runner.logits(self._runner.states(tokens, self.path)[:, -1], self.path)

    def end(self) -> None:
        """See :class:`Drafter`."""

    def truncate(self, length: int) -> None:
        """See :class:`Drafter`."""
        if self._runner is not None and not self.is_shared and self._runner.length > length:
            self._runner.truncate(length)


def _last(history: list[Tensor], n: int) -> Tensor:
    """The last n tokens of pieces [B, K]; the pieces are joined where many are needed."""
    if len(history) > 1 and n > history[-1].shape[1]:
        history[:] = [torch.cat(history, dim=1)]
    return history[-1][:, -n:]


class SweepDrafter:
    """The runner's own path with ``in_order`` blocks in order and the others side by side, each on the state before them.

    It reads the runner's exact keys, values and states. What it adds to them is a guess, taken back when the draft ends.

    Raises:
        ValueError: the path has no blocks that could be side by side.
    """

    def __init__(self, model: CausalLM, path: Path, in_order: int):
        self.model, self.path, self.in_order = model, path, check_in_order(in_order, path)
        self.name = f"in order {in_order}"
        self._runner: Runner | None = None
        self._decoders: Sequence[Decoder] = ()
        self._length = 0

    def begin(self, runner: Runner, history: list[Tensor]) -> None:
        """See :class:`Drafter`."""
        if self._runner is not runner:
            self._runner = runner
            self._decoders = [runner.decoder(self.path[: k + 1]) for k in range(len(self.path))]
        self._length = runner.length

    def step(self, tokens: Tensor) -> Tensor:
        """See :class:`Drafter`."""
        x = self.model.embed(tokens.unsqueeze(1))[:, 0]
        for decoder in self._decoders[: self.in_order]:
            x = decoder.step(x)
        return self._runner.logits(SideBySide(self._decoders[self.in_order :]).step(x), self.path)

    def end(self) -> None:
        """See :class:`Drafter`."""
        for decoder in self._decoders:
            decoder.truncate(self._length)

    def truncate(self, length: int) -> None:
        """Nothing is left of a draft that has ended."""
