"""A training step of several processes, as ``bench_parallel.py`` and ``bench_sequence.py`` measure it: what all kinds share,
and the baselines that both have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hbll_seq.distributed.gradients import clip_gradients, squared_norm

N_BATCHES = 4  # that are trained on by turns: losses at equal steps then mean something


class Case(ABC):
    """What is trained: a model of some size, its batches, and the methods that train it.

    Attributes:
        batch_size, context_length, vocab: of a batch of token windows.
        lr, clip: of AdamW, and the largest norm of a gradient.
        device: ``"cpu"``, or ``"cuda"``: each process the one that it has set.
        can_recompute: whether there is activation checkpointing.
    """

    batch_size: int
    context_length: int
    vocab: int
    lr: float
    clip: float
    device: str
    can_recompute: bool

    @abstractmethod
    def model(self) -> nn.Module:
        """The same weights on every process."""

    @abstractmethod
    def training(self, name: str, n_ranks: int, *, recompute: bool = False, hooked: bool = False) -> Training:
        """The method of that name on this process of R in the group; all must call it. Raises ValueError where it cannot be.

        ``recompute``: nothing inside a block is kept for the backward. ``hooked``: what DistributedDataParallel sends goes
        through Python, where it can be held back.
        """

    @abstractmethod
    def baseline(self) -> Training:
        """What all methods are measured beside, on one process."""

    @abstractmethod
    def processes(self, name: str, ranks: int) -> int:
        """How many of R processes the method of that name takes."""

    @abstractmethod
    def is_exact(self, name: str) -> bool:
        """Whether the method has the baseline's gradients, whatever its options."""

    def batch(self, step: int) -> Tensor:
        """Token windows [B, T + 1], random ones that come again."""
        made = torch.Generator().manual_seed(1 + step % N_BATCHES)
        return torch.randint(self.vocab, (self.batch_size, self.context_length + 1), generator=made).to(self.device)


class Training:
    """A model that this process trains, or its part of one.

    Args:
        parts: trained parameters of which every rank has other ones.
        common: those that have the same gradient on all ranks that hold them, once they are reduced.

    Attributes:
        total: whether the loss of a step is the sum of all ranks' (else their mean).
        norm: of the last step's gradient before it was clipped, the same on every rank.
    """

    total = True

    def __init__(self, case: Case, parts: Sequence[Tensor] = (), common: Sequence[Tensor] = ()):
        self.case, self.parts, self.common = case, list(parts), list(common)
        self.optimizer = torch.optim.AdamW([*self.parts, *self.common], lr=case.lr)

    def differentiate(self, step: int) -> Tensor:
        """Forward and backward of a batch: this rank's part of the loss, detached. Raises ValueError as torch does."""
        raise NotImplementedError

    def end(self, loss: Tensor) -> None:
        """Reduces and clips the gradients. Here they are whole, or are shards whose norm is put together."""
        squares = squared_norm([_Local(p) for p in self.parts])
        if self.parts and distributed.get_world_size() > 1:
            distributed.all_reduce(squares)
        self.norm = float(squares + squared_norm(self.common)) ** 0.5
        clip_gradients([_Local(p) for p in (*self.parts, *self.common)], self.norm, self.case.clip)

    def step(self, number: int) -> Tensor:
        """A whole training step; the loss as :meth:`differentiate` gives it."""
        self.optimizer.zero_grad()
        loss = self.differentiate(number)
        self.end(loss)
        self.optimizer.step()
        return loss

    def held_bytes(self) -> tuple[int, int]:
        """Bytes of the parameters and of the optimizer's state that are here; after a step."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return tuple(sum(local(t).numel() * t.element_size() for t in ts) for ts in (trained, states))

    def buffers(self) -> list[Tensor]:
        """What is kept from step to step to receive activations into."""
        return []

    def idle_segments(self) -> list[int]:
        """Segments that no loss reaches, from 0."""
        return []


class Backprop(Training):
    """One process with everything."""

    def __init__(self, case: Case, objective: nn.Module):
        self.objective = objective
        super().__init__(case, common=[p for p in self.objective.parameters() if p.requires_grad])

    def differentiate(self, step: int) -> Tensor:
        loss = self.objective(self.case.batch(step), step=step).loss
        loss.backward()
        return loss.detach()


class Replica(Training):
    """Backprop of a part of the rows: ``kind`` ``"ddp"`` or ``"fsdp"`` (every block a unit, embedding and head another).
    Raises ValueError where ranks would have different numbers of rows."""

    total = False

    def __init__(self, case: Case, objective: nn.Module, kind: str, n_ranks: int, hooked: bool = False):
        if case.batch_size % n_ranks:
            raise ValueError(f"batch_size={case.batch_size} with {n_ranks} ranks: {kind} gives each the same rows")
        self.n_ranks, self.rank, self.is_ddp = n_ranks, distributed.get_rank(), kind == "ddp"
        if kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(case.device, (n_ranks,))
            for block in objective.model.blocks:
                fully_shard(block, mesh=mesh)
            self.module = fully_shard(objective, mesh=mesh)
            super().__init__(case, parts=list(objective.parameters()))
            return
        self.module = DistributedDataParallel(objective, gradient_as_bucket_view=True)
        if hooked:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            self.module.register_comm_hook(None, allreduce_hook)
        super().__init__(case, common=[p for p in objective.parameters() if p.requires_grad])

    def differentiate(self, step: int) -> Tensor:
        rows = self.case.batch(step).chunk(self.n_ranks)[self.rank]
        loss = self.module(rows, step=step).loss
        loss.backward()
        return loss.detach()

    def reduced_bytes(self) -> list[int]:
        """Of DistributedDataParallel: the bytes of each of its collectives of a step, as its reducer says."""
        data = self.module._get_ddp_logging_data()
        sizes = data.get("rebuilt_bucket_sizes") or data["bucket_sizes"]
        return [int(size) for size in str(sizes).split(",")]


class _Local:
    """The part of a sharded parameter that is here, with its gradient; of another one all of it."""

    def __init__(self, parameter: Tensor):
        self.grad = None if parameter.grad is None else local(parameter.grad)


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is here; of another one all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
