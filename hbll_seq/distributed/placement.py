"""Segments of a chain on ranks: one collective a pass carries what ``compose`` needs, the ends of segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from hbll_seq.distributed.blocks import segments_of_rank
from hbll_seq.distributed.ranks import Ranks
from hbll_seq.engine.placement import Placement, overlap

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
#: its name up to torch 2.12
_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor


@dataclass
class Traffic:
    """What was sent so far, as this rank counts it.

    Attributes:
        collectives: of all ranks together: one for each pass, and the sums that are asked for.
        messages: from a rank to one other, where a segment goes on from the one before it.
        bytes: that this rank has sent: to each other rank in an exchange, and around a ring in a sum.
    """

    collectives: int = 0
    messages: int = 0
    bytes: int = 0


class RankPlacement(Placement):
    """Segments of a chain over the ranks of a replica: see :func:`hbll_seq.distributed.blocks.segments_of_rank`.

    All ranks solve the same chain at the same time, each with its own segments. What the engine does with the ends of all of
    them it does on every rank, which costs little and saves the way back.

    Args:
        ranks: with ``block_group``.
    """

    is_spread = True

    def __init__(self, ranks: Ranks):
        self.ranks, self.traffic, self._is_checked = ranks, Traffic(), False

    def check_alike(
        self, batch: Sequence[Tensor], shared: Sequence[Tensor], own: Sequence[Tensor], seed: int, step: int
    ) -> None:
        """Raises ValueError on every process where the ranks of a model are not given the same batch or seed, or do not begin
        with the same weights of what all of them hold, or where a replica begins with other weights; asked once.

        Args:
            batch: inputs, and labels where there are some.
            shared, own: parameters that all ranks hold, and those of this one's blocks.
            seed: of noise and dropout.
            step: number of the batch, which ranks that work ahead of each other look at.
        """
        if self._is_checked:
            return
        self._is_checked = True
        sums, are_replicas = [int(_bits(p).sum()) for p in shared], True
        if self.ranks.replica_group is not None:
            weights: list = [None] * self.ranks.n_replicas
            of_own = [int(_bits(p).sum()) for p in own]
            distributed.all_gather_object(weights, sums + of_own, group=self.ranks.replica_group)
            are_replicas = all(other == weights[0] for other in weights)
        told: list = [None] * self.ranks.n_ranks
        given = self._alike(batch), seed, sums, are_replicas
        distributed.all_gather_object(told, given, group=self.ranks.host_group or self.ranks.block_group)
        batches, seeds, weights, agree = zip(*told)
        if any(other != batches[0] for other in batches):
            shown = ", ".join(f"{list(shape)} of {dtype}" for (shape, dtype, *_), *_ in batches)
            raise ValueError(f"the ranks of a model are given different batches ({shown}): give all of them the same one, "
                             "labels included, such as by drawing it from one seed")  # fmt: skip
        if any(other != seed for other in seeds):
            raise ValueError("the ranks of a model have different seeds of dropout or of the depth mix: give all of them one "
                             "seed, and as rank the number of their replica")  # fmt: skip
        if any(other != sums for other in weights):
            raise ValueError("embedding or head differ between the ranks of a model: draw the weights from one seed "
                             "(torch.manual_seed) on all of them")  # fmt: skip
        if not all(agree):
            raise ValueError("the replicas of a model begin with different weights, which would be trained apart: draw them "
                             "from one seed (torch.manual_seed) on all processes")  # fmt: skip

    def _alike(self, batch: Sequence[Tensor]) -> list[tuple]:
        """What of a batch must be the same on all ranks."""
        ordered = [_bits(t).flatten() * torch.arange(1, 1 + t.numel(), device=t.device) for t in batch]
        return [(tuple(t.shape), str(t.dtype), int(each.sum())) for t, each in zip(batch, ordered)]

    def own(self, n_segments: int, rank: int | None = None) -> range:
        """See :meth:`Placement.own`; those of this rank, or of another."""
        rank = self.ranks.rank if rank is None else rank
        return segments_of_rank(n_segments, rank, self.ranks.n_ranks, self.ranks.shares)

    def rank_of(self, segment: int, n_segments: int) -> int:
        """The rank that has a segment."""
        return next(r for r in range(self.ranks.n_ranks) if segment in self.own(n_segments, r))

    def together(self, first: int, second: int, n_segments: int) -> bool:
        """See :meth:`Placement.together`."""
        return self.rank_of(first, n_segments) == self.rank_of(second, n_segments)

    def exchange(self, own: Tensor, segments: range, n_segments: int) -> Tensor:
        """See :meth:`Placement.exchange`: one collective of all ranks."""
        shares = [len(overlap(self.own(n_segments, r), segments)) for r in range(self.ranks.n_ranks)]
        most, shape = max(shares), own.shape[1:]
        # A rank with fewer segments than another sends as many: a collective takes equal parts.
        sent = own if len(own) == most else torch.cat((own, own.new_zeros((most - len(own), *shape))))
        received = sent.new_empty((len(shares) * most, *shape))
        _gather(received, sent.contiguous(), group=self.ranks.block_group)
        self.traffic.collectives += 1
        self.traffic.bytes += (len(shares) - 1) * sent.numel() * sent.element_size()
        if len(set(shares)) == 1:
            return received
        return torch.cat([part[:share] for part, share in zip(received.split(most), shares)])

    def total(self, part: Tensor) -> Tensor:
        """See :meth:`Placement.total`: one collective of all ranks."""
        part = part.detach().clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(part, group=self.ranks.block_group)
        self.traffic.collectives += 1
        self.traffic.bytes += 2 * (self.ranks.n_ranks - 1) * part.numel() * part.element_size() // self.ranks.n_ranks
        return part

    def pass_on(self, state: Tensor, source: int, target: int, n_segments: int) -> Tensor:
        """See :meth:`Placement.pass_on`: one message, where the two are on different ranks."""
        sender, receiver = self.rank_of(source, n_segments), self.rank_of(target, n_segments)
        me, group = self.ranks.rank, self.ranks.block_group
        if sender == receiver == me:
            return state
        if me == receiver:
            state = state.new_empty((1, *state.shape[1:]))
            distributed.recv(state, group=group, src=distributed.get_global_rank(group, sender))
        elif me == sender:
            state = state.contiguous()
            distributed.send(state, group=group, dst=distributed.get_global_rank(group, receiver))
            self.traffic.messages += 1
            self.traffic.bytes += state.numel() * state.element_size()
        else:
            state = state.new_zeros(()).expand(1, *state.shape[1:])
        return state


def _bits(tensor: Tensor) -> Tensor:
    """Its bits as whole numbers, whose sum is the same in whatever order they are added, and of NaN too."""
    return tensor.detach().contiguous().view(_WHOLE[tensor.element_size()])
