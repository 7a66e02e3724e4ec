"""What the ranks of one model hold, put together on the first of them: for checkpoints, evaluation and export."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from hbll_seq.distributed.ranks import Ranks


def gather_to_first(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors of all ranks of a replica by name, on its first rank; on the others nothing. Every rank must call it.

    What came from others lies on the CPU: it goes there at its owner, tensor by tensor, so that no device needs room for
    more than its own. A name that several ranks have is sent by none but the first of them.

    Args:
        tensors: of this rank, of any shapes and dtypes.
        ranks: where this process stands; with one rank the tensors are given back as they are.
    """
    if ranks.n_ranks == 1:
        return dict(tensors)
    own = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    listed: list = [None] * ranks.n_ranks
    distributed.all_gather_object(listed, own, group=ranks.host_group)
    found = dict(tensors) if ranks.rank == 0 else {}
    taken = {name for name, *_ in listed[0]}
    for rank in range(1, ranks.n_ranks):
        for name, shape, dtype in listed[rank]:
            if name in taken:
                continue
            taken.add(name)
            if ranks.rank == rank:
                tensor = tensors[name].detach().to("cpu").contiguous()
                distributed.send(tensor, distributed.get_global_rank(ranks.host_group, 0), group=ranks.host_group)
            elif ranks.rank == 0:
                found[name] = torch.empty(shape, dtype=dtype)
                distributed.recv(found[name], distributed.get_global_rank(ranks.host_group, rank), group=ranks.host_group)
    return found
