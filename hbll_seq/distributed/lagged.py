"""Ranks that work ahead of each other: what one has made of a batch, the next one reads a step later.

Where no adjoint goes from a segment to the one before it, nothing ever comes back to a rank, and it need not stay with the
batch. Of R ranks rank r is R - 1 - r batches ahead of the last:

    step          0    1    2    3                           sent, behind the step
    rank 0        b2   b3   b4   b5      states of b2 ..
    rank 1        b1   b2   b3   b4      states of b1 ..
    rank 2        b0   b1   b2   b3

so that what a rank sends in a step is what the next one needs in the step after it. Nobody waits for a forward pass of
another rank. The price: the state was made by weights that are one optimizer step older (of R ranks, the first one's R - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, distributed

from hbll_seq.distributed.placement import RankPlacement
from hbll_seq.distributed.ranks import Ranks


class LaggedPlacement(RankPlacement):
    """Segments over ranks, each of which works on a batch of its own (see above).

    A step is what follows a call of :meth:`check_alike`. In each one a rank sends one state to the next rank, the one with
    which its last segment ends, without waiting, and reads one that was sent a step earlier; whatever else begins behind that
    segment, as branches do, reads the same state. No adjoint is sent. The receive of a state is asked for a step before it
    is read, so that it arrives while both compute: every batch must have one shape.

    Before the first step rank r makes one pass for each of its ``lead`` batches before its first. To stop and go on later,
    keep :meth:`coming` of every rank.

    Args:
        ranks: with ``block_group``.

    Attributes:
        lead: batches by which this rank is ahead of the last one.
    """

    def __init__(self, ranks: Ranks):
        super().__init__(ranks)
        self.lead = ranks.n_ranks - 1 - ranks.rank
        self._shape: tuple[int, ...] | None = None  # of every batch
        self._step: int | None = None  # the last batch's number
        self._sent: tuple[Any, Tensor] | None = None  # under way, with the tensor that must live as long
        self._coming: tuple[Any, Tensor] | None = None  # asked for, with the tensor that it goes into; None: it is there
        self._has_sent, self._arrived = False, None  # in this step

    def check_alike(
        self, batch: Sequence[Tensor], shared: Sequence[Tensor], own: Sequence[Tensor], seed: int, step: int
    ) -> None:
        """Begins a step. See :meth:`RankPlacement.check_alike`, where of a batch the shapes alone must be the same. Raises
        ValueError, too, where a batch has another shape than those before it, or is not the one behind the last."""
        super().check_alike(batch, shared, own, seed, step)
        inputs = batch[0]
        if self._step is not None and step != self._step + 1:
            raise ValueError(
                f"step={step} after step={self._step}: of ranks that work ahead of each other each call reads what was sent "
                "for the batch behind the last one, also in an evaluation; number batches one by one and evaluate a model "
                "that was gathered (hbll_seq.distributed.whole), or call placement.discard() on all ranks and begin anew"
            )
        self._shape = self._shape or tuple(inputs.shape)
        if tuple(inputs.shape) != self._shape:
            raise ValueError(
                f"inputs of shape {list(inputs.shape)} after such of {list(self._shape)}: ranks that work ahead of each "
                "other ask for a state before its batch is there, so that all batches have one shape; leave out the rest "
                "of the data that does not fill a batch"
            )
        self._has_sent, self._arrived, self._step = False, None, step

    def _alike(self, batch: Sequence[Tensor]) -> list[tuple]:
        return [(tuple(t.shape), str(t.dtype)) for t in batch]  # each has a batch of its own

    def pass_on(self, state: Tensor, source: int, target: int, n_segments: int) -> Tensor:
        """See :meth:`Placement.pass_on`; of what the rank before has made of this batch a step ago. An adjoint, whose target
        comes before its source, stays where it is: on another rank zeros are returned."""
        sender, receiver, me = self.rank_of(source, n_segments), self.rank_of(target, n_segments), self.ranks.rank
        if sender == receiver or me not in (sender, receiver):
            return super().pass_on(state, source, target, n_segments)
        if sender > receiver:
            return state if me == sender else state.new_zeros((1, *state.shape[1:]))
        assert receiver == sender + 1, "a state is a step old behind every rank that it passes"
        if me == receiver:
            return self._received(state)
        self._send(state)
        return state

    def exchange(self, own: Tensor, segments: range, n_segments: int) -> Tensor:
        """Ranks that work on different batches have nothing to exchange."""
        raise AssertionError("an exchange between ranks that work ahead of each other")

    def discard(self) -> None:
        """Waits for what is under way and drops it, so that each rank can begin at another batch, or end."""
        self.coming()
        if self._sent is not None:
            self._sent[0].wait()
        self._coming = self._sent = self._step = None

    def coming(self) -> Tensor | None:
        """The state [1, ...] that this rank reads next, once it is there; None on the first rank, and before the first
        pass."""
        if self._coming is None:
            return None
        work, state = self._coming
        if work is not None:
            work.wait()
            self._coming = None, state
        return state

    def take_up(self, state: Tensor) -> None:
        """Lets this rank read ``state`` next, as :meth:`coming` has given it: ranks go on where they were."""
        self._coming = None, state

    def _send(self, state: Tensor) -> None:
        if self._has_sent:
            return
        if self._sent is not None:
            self._sent[0].wait()
        state, group = state.detach().contiguous(), self.ranks.block_group
        work = distributed.isend(state, group=group, dst=distributed.get_global_rank(group, self.ranks.rank + 1))
        self._sent, self._has_sent = (work, state), True
        self.traffic.messages += 1
        self.traffic.bytes += state.numel() * state.element_size()

    def _received(self, like: Tensor) -> Tensor:
        if self._arrived is None:
            self._coming = self._coming or self._ask(like)
            self._arrived = self.coming()
            self._coming = self._ask(self._arrived)
        return self._arrived

    def _ask(self, like: Tensor) -> tuple[Any, Tensor]:
        group = self.ranks.block_group
        state = like.new_empty((1, *like.shape[1:]))
        return distributed.irecv(state, group=group, src=distributed.get_global_rank(group, self.ranks.rank - 1)), state
