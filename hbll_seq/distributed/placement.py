"""Segments of a chain on ranks: one collective a pass carries what ``compose`` needs, the ends of segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from hbll_seq.distributed.blocks import segments_of_rank
from hbll_seq.distributed.ranks import Ranks
from hbll_seq.engine.placement import Placement, overlap

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

    def check_alike(self, inputs: Tensor, shared: Sequence[Tensor]) -> None:
        """Raises ValueError on every rank where they are not given the same batch, or do not begin with the same weights of
        what all of them hold; asked once."""
        if self._is_checked:
            return
        self._is_checked = True
        sums = [float(p.detach().double().sum()) for p in shared]
        own = self._alike(inputs), sums
        told: list = [None] * self.ranks.n_ranks
        distributed.all_gather_object(told, own, group=self.ranks.host_group or self.ranks.block_group)
        if any(batch != told[0][0] for batch, _ in told):
            given = ", ".join(f"{list(shape)} of {dtype}" for (shape, dtype, *_), _ in told)
            raise ValueError(f"the ranks of a model are given different batches ({given}): give all of them the same one, "
                             "such as by drawing it from one seed")  # fmt: skip
        if any(other != sums for _, other in told):
            raise ValueError("embedding or head differ between the ranks of a model: draw the weights from one seed "
                             "(torch.manual_seed) on all of them")  # fmt: skip

    def _alike(self, inputs: Tensor) -> tuple:
        """What of a batch must be the same on all ranks."""
        return tuple(inputs.shape), str(inputs.dtype), float(inputs.double().sum())

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
