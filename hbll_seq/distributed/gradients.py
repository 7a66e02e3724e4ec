"""Gradients of a step after its backward calls: summed and averaged over ranks and replicas, and clipped by one norm.

A rank's own blocks are trained by it alone, and by the same rank of other replicas. What every rank holds (embedding, head,
exit adapters) is *shared*: each rank has that part of its gradient which its own blocks and exits make.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from hbll_seq.distributed.ranks import Ranks


def reduce_gradients(own: Sequence[nn.Parameter], shared: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Average the gradients of ``own`` over the replicas; sum those of ``shared`` over the ranks and average them over the
    replicas. Of one rank, nothing: DistributedDataParallel reduces its gradients.

    Each kind takes one all-reduce (of each dtype, where there are several), whatever the number of parameters. One without a
    gradient here counts as zero. One that has none anywhere stays without, so that an optimizer leaves it alone as it does
    in one process: the message carries a flag for each parameter.
    """
    if ranks.n_ranks > 1 and ranks.n_replicas > 1:
        _reduce(own, ranks.replica_group, ranks.n_replicas)
    if ranks.n_ranks > 1:
        _reduce(shared, ranks.step_group, ranks.n_replicas)


def _reduce(parameters: Sequence[nn.Parameter], group: ProcessGroup | None, n_replicas: int) -> None:
    """Sum over ``group``, divided by ``n_replicas``."""
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        chosen = [p for p in parameters if p.dtype == dtype]
        missing = [p.grad is None for p in chosen]
        flags = torch.tensor([float(not m) for m in missing], dtype=dtype, device=chosen[0].device)
        flat = torch.cat([flags, *((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in chosen)])
        distributed.all_reduce(flat, group=group)
        flags, *sums = flat.split([len(chosen), *(p.numel() for p in chosen)])
        anywhere = flags.tolist() if any(missing) else [1.0] * len(chosen)  # asking a GPU means waiting for it
        for p, has_gradient, total in zip(chosen, anywhere, sums):
            p.grad = total.view_as(p).div_(n_replicas) if has_gradient else None


def squared_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The sum of the squares of all gradients, a scalar in double precision."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters if p.grad is not None]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)


def clip_gradients(parameters: Sequence[nn.Parameter], norm: float, most: float) -> None:
    """Scale all gradients so that their norm, which is ``norm`` over all ranks, becomes at most ``most``, as
    ``torch.nn.utils.clip_grad_norm_`` does."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    scale = min(1.0, most / (norm + 1e-6))
    if gradients and scale < 1.0:
        torch._foreach_mul_(gradients, scale)
