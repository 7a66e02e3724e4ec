"""Running regressions: what the learned Jacobian approximations share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hbll_seq.engine.placement import Placement
from hbll_seq.utils.modules import KeepsPrecision


def full_precision(x: Tensor) -> torch.autocast:
    """No autocast inside: its products would round what sums and solves have to keep."""
    return torch.autocast(x.device.type, enabled=False)


class RunningFit(KeepsPrecision, ABC):
    """What learned approximations share: second moments averaged over steps, in buffers, and maps fitted to them.

    The buffers are part of the objective's state, so that a resumed run repeats the unbroken one. Where several processes
    train, DistributedDataParallel gives all of them the first one's whenever it synchronises; that one learns from its own
    text alone. Ranks that share the steps of one sequence learn from all of them. An observation that holds a NaN or an
    infinity teaches nothing.

    Args:
        decay: of the averages, per observation.
        every: steps (micro batches) between two fits.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, decay: float, every: int):
        super().__init__()
        if not isinstance(every, int) or isinstance(every, bool) or every < 1 or not 0 < decay < 1:
            raise ValueError(f"decay={decay!r}, every={every!r}: must be a number between 0 and 1, and a whole one from 1")
        self.decay, self.every = decay, every
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.int64))
        self._counted: tuple[int, Tensor, int] | None = None  # the count, the buffer, and its number of changes then

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_counted": None}  # a copy's buffer may have another value after as many changes

    def steps_done(self) -> int:
        """``n_steps``; a GPU is asked for it at first, and where anybody else has written or replaced the buffer."""
        buffer = self.n_steps
        if self._counted is None or self._counted[1] is not buffer or self._counted[2] != buffer._version:
            self._counted = (int(buffer), buffer, buffer._version)
        return self._counted[0]

    @torch.no_grad()
    def _average(self, change: Tensor, response: Tensor, *moments: Tensor, is_sound: Tensor | None = None) -> None:
        """Takes the second moments of ``change`` [n, C] and of it with ``response`` [n, C] into the averages, where they are
        sound."""
        with full_precision(change):
            self._take([value / len(change) for value in (change.T @ change, change.T @ response)], moments, is_sound)

    @torch.no_grad()
    def _average_all(self, samples: Sequence[Sequence[Tensor]], placement: Placement) -> None:
        """:meth:`_average` of samples (change, response, two averages), of which every place has some rows: one sum over the
        places for all of them."""
        if not (placement.is_spread and samples):
            for sample in samples:
                self._average(*sample)
            return
        with full_precision(samples[0][0]):
            sums = torch.stack([torch.cat((change.T @ change, change.T @ response)) for change, response, *_ in samples])
            counts = sums.new_tensor([len(change) for change, *_ in samples])
            total = placement.total(torch.cat((counts, sums.flatten())))
            counts, sums = total[: len(samples)], total[len(samples) :].view_as(sums)
            for count, value, (_, _, *moments) in zip(counts, sums, samples):
                self._take((value / count).chunk(2), moments)

    def _take(self, values: Sequence[Tensor], moments: Sequence[Tensor], is_sound: Tensor | None = None) -> None:
        with full_precision(values[0]):
            # a tensor that nothing asks for its value, so that no GPU is waited for
            finite = torch.isfinite(values[0]).all() & torch.isfinite(values[1]).all()
            finite = finite if is_sound is None else finite & is_sound
            for average, value in zip(moments, values):
                average.copy_(torch.where(finite, average.lerp(value.to(average.dtype), 1.0 - self.decay), average))

    @torch.no_grad()
    def end_step(self) -> None:
        """Fits the maps anew when it is time."""
        count = self.steps_done() + 1
        self.n_steps += 1
        self._counted = (count, self.n_steps, self.n_steps._version)
        if count % self.every:
            return
        with full_precision(self.n_steps):
            for way in ("forward", "backward"):
                self._fit(way)

    @abstractmethod
    def _fit(self, way: str) -> None:
        """Fits the maps of ``"forward"`` or ``"backward"`` to their moments."""


def ridge_factor(change: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of second moments [..., C, C] with a little added to their diagonals, and whether they are sound."""
    ridge = (1e-3 * change.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp(min=1e-30)
    eye = torch.eye(change.shape[-1], dtype=change.dtype, device=change.device)  # there: a copy from the CPU would wait
    factor, failed = torch.linalg.cholesky_ex(change + ridge[..., None, None] * eye)
    return factor, (failed == 0)[..., None, None]
