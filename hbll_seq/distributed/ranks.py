"""Where a process stands in a launch that spreads a model's blocks over ranks, and the groups that it speaks with.

P = R x D processes train D replicas of a model, each of whose blocks lie on R ranks. Process p is rank p % R of replica
p // R: the ranks of a replica, which speak most, are neighbours. Ranks that share the steps of a recurrent model's sequences
stand the same way; each of them has the whole model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import ProcessGroup

#: how long a rank waits in a collective of a step for one that does not answer. One that died is noticed at once, since its
#: connections close; evaluating and saving is waited for elsewhere
PATIENCE = timedelta(minutes=5)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: rank of n_ranks that hold a model's blocks between them, in replica of n_replicas.

    Attributes:
        rank, n_ranks: number of this rank, and how many hold the blocks of one model; 1 is the whole model on every process.
        replica, n_replicas: number of the model that it belongs to, and how many there are, each with its own batches.
        block_group: the ranks of this replica; None where it is alone.
        replica_group: the same rank of all replicas; None where there is one.
        step_group: all processes, for the collectives of a step; None where it is alone.
        host_group: as ``block_group``, for tensors on the CPU.
        patience: how long a collective of these groups waits for one that does not answer.
        shares: how many segments of the main path each rank holds; None: as equal as they go.
    """

    rank: int = 0
    n_ranks: int = 1
    replica: int = 0
    n_replicas: int = 1
    block_group: ProcessGroup | None = None
    replica_group: ProcessGroup | None = None
    step_group: ProcessGroup | None = None
    host_group: ProcessGroup | None = None
    patience: timedelta = PATIENCE
    shares: tuple[int, ...] | None = None

    def __deepcopy__(self, memo: dict) -> Ranks:
        """Itself: what a copy of an objective is told stays this process, and its groups."""
        return self


#: one process, with the whole model
ALONE = Ranks()


def make_ranks(
    block_parallel: int,
    device_type: str = "cpu",
    patience: timedelta = PATIENCE,
    shares: tuple[int, ...] | None = None,
) -> Ranks:
    """Where this process of the launch stands; every process must call it.

    With ``block_parallel`` 1 each process is a replica, and no group is made.

    Args:
        block_parallel: R, ranks that hold the blocks of one model between them.
        device_type: where the tensors of collectives lie, ``"cpu"`` or ``"cuda"``.
        patience: how long a collective of the ranks waits for one that does not answer.
        shares: see :class:`Ranks`.

    Raises:
        ValueError: the number of processes is no multiple of R, or there are shares of one rank.
    """
    joined = distributed.is_available() and distributed.is_initialized()
    process, n_processes = (distributed.get_rank(), distributed.get_world_size()) if joined else (0, 1)
    if not joined and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError(
            f"block_parallel={block_parallel} in a launch of {os.environ['WORLD_SIZE']} processes that have not joined: call "
            "torch.distributed.init_process_group first"
        )
    if block_parallel < 1 or n_processes % block_parallel:
        raise ValueError(
            f"block_parallel={block_parallel} with {n_processes} process{'es' * (n_processes > 1)}: the processes of a "
            "launch must be a multiple of the ranks that hold one model's blocks; launch as many (accelerate launch "
            f"--multi_gpu --num_processes {max(1, block_parallel)}; on CPUs ACCELERATE_USE_CPU=true torchrun "
            f"--nproc_per_node {max(1, block_parallel)}), or give a --block-parallel that divides {n_processes}"
        )
    n_replicas = n_processes // block_parallel
    replica, rank = divmod(process, block_parallel)
    if block_parallel == 1 and shares is not None:
        raise ValueError(f"shares={shares} with block_parallel=1: one rank holds all segments; give more ranks, or leave "
                         "shares out")  # fmt: skip
    if block_parallel == 1:
        return Ranks(replica=replica, n_replicas=n_replicas)
    layout = torch.arange(n_processes).view(n_replicas, block_parallel)
    data, _ = distributed.new_subgroups_by_enumeration(layout.T.tolist(), timeout=patience)
    block, _ = distributed.new_subgroups_by_enumeration(layout.tolist(), timeout=patience)
    host = block
    if device_type != "cpu":
        host, _ = distributed.new_subgroups_by_enumeration(layout.tolist(), timeout=patience, backend="gloo")
    if n_replicas == 1:
        return Ranks(rank, block_parallel, replica, n_replicas, block, None, block, host, patience, shares)
    step = distributed.new_group(timeout=patience)
    return Ranks(rank, block_parallel, replica, n_replicas, block, data, step, host, patience, shares)
