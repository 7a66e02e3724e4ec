"""What the ranks of one model hold, put together on the first of them: for evaluation and export."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from hbll_seq.distributed.ranks import Ranks


def gather_to_first(tensors: Mapping[str, Tensor], ranks: Ranks, targets: Mapping[str, Tensor]) -> None:
    """Copy the tensors of all ranks of a replica into the ``targets`` of its first rank. Every rank must call it.

    Each goes to the CPU at its owner and from there into its target, one after the other: no process needs room for more
    than its own tensors, the targets and one tensor. A name that several ranks have is sent by none but the first of them.

    Args:
        tensors: of this rank, of any shapes and dtypes.
        ranks: where this process stands, among several ranks.
        targets: on the first rank contiguous tensors on the CPU, of all names, and of their shapes and dtypes.

    Raises:
        ValueError: on every rank, where the targets are others; nothing is copied.
    """
    own = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    listed: list = [None] * ranks.n_ranks
    distributed.all_gather_object(listed, own, group=ranks.host_group)
    owners: dict[tuple, int] = {}
    for rank in reversed(range(ranks.n_ranks)):  # the first one stays
        owners.update(dict.fromkeys(listed[rank], rank))
    wanted = {(name, tuple(target.shape), target.dtype) for name, target in targets.items()}
    odd = [min(owners.keys() ^ wanted, key=str, default=None)]
    distributed.broadcast_object_list(odd, distributed.get_global_rank(ranks.host_group, 0), group=ranks.host_group)
    if odd[0] is not None:
        raise ValueError(f"the ranks hold other tensors than the whole model, such as {odd[0]}")
    with torch.no_grad():
        for (name, *_), owner in owners.items():
            if ranks.rank == owner == 0:
                targets[name].copy_(tensors[name])
            elif ranks.rank == owner:
                tensor = tensors[name].detach().to("cpu").contiguous()
                distributed.send(tensor, distributed.get_global_rank(ranks.host_group, 0), group=ranks.host_group)
            elif ranks.rank == 0:
                source = distributed.get_global_rank(ranks.host_group, owner)
                distributed.recv(targets[name].detach(), source, group=ranks.host_group)
