"""Ways to train a language model on R processes, each a training step with the same data, loss, clipping and AdamW.

    backprop              one process; all others wait
    ddp, fsdp             backprop, each process with batch / R rows, so that the work is the same
    1f1b:m=4, gpipe:m=4   a pipeline of R stages and m micro-batches (torch.distributed.pipelining)
    interleaved:m=4       1F1B with two stages for each process, s and s + R
    zero-bubble:m=4       the same stages; the backward of inputs goes before that of weights
    zbv:m=4               the same with stages s and 2 R - 1 - s
    exact                 ours, a segment for each rank, K = M = S - 1; shares=1+3: of S = 4 segments so many on each
    local                 ours with A = 0, K = S - 1, M = 0: segments learn from exits on their own blocks alone; c=19: of 19
                          blocks
    ahead                 the same, each rank a batch ahead of the next one, on states that are a step old
    ours:K=1,M=1,...      ours with these options of sweeps; segments=S (default R), depths=MIX

Stages have equal numbers of blocks; the first also has the embedding, the last the head. Their matrix is one (tied), as
everywhere here: where the two are on different processes, each has a copy, and the gradients are summed once a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hbll_seq.distributed.gradients import clip_gradients, squared_norm
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.objectives.backprop import BackpropObjective

#: pipelines: class of the schedule in torch, and stages for each process
PIPELINES = {
    "1f1b": ("Schedule1F1B", 1),
    "gpipe": ("ScheduleGPipe", 1),
    "interleaved": ("ScheduleInterleaved1F1B", 2),
    "zero-bubble": ("ScheduleInterleavedZeroBubble", 2),
    "zbv": ("ScheduleZBVZeroBubble", 2),
}
OURS = ("exact", "local", "ahead", "ours")
KINDS = ("backprop", "ddp", "fsdp", *PIPELINES, *OURS)
N_BATCHES = 4  # that are trained on by turns: losses at equal steps then mean something
_SHORT = {"K": "forward", "M": "backward", "A": "linearization", "c": "chunk_size"}


@dataclass(frozen=True)
class Shape:
    """What is trained: a model of ``blocks`` blocks, and its batches."""

    blocks: int = 31
    width: int = 128
    heads: int = 4
    batch_size: int = 4
    context_length: int = 128
    vocab: int = 4096
    lr: float = 1e-3
    clip: float = 1.0
    device: str = "cpu"  # or "cuda": each process the one that it has set

    def model(self) -> HBLLForCausalLM:
        """The same weights on every process. No block begins as the identity: it would hide what is sent."""
        torch.manual_seed(0)
        model = HBLLForCausalLM(HBLLConfig(vocab_size=self.vocab, n_level=self.blocks.bit_length(), n_embd=self.width,
                                           n_head=self.heads, context_length=self.context_length))  # fmt: skip
        for p in model.blocks.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.02)
        return model.to(self.device)

    def batch(self, step: int) -> Tensor:
        """Token windows [B, T + 1], random ones that come again."""
        made = torch.Generator().manual_seed(1 + step % N_BATCHES)
        return torch.randint(self.vocab, (self.batch_size, self.context_length + 1), generator=made).to(self.device)


@dataclass(frozen=True)
class Method:
    """A way to train: ``name`` as it was given, its ``kind``, and its options."""

    name: str
    kind: str
    options: dict[str, str]

    @classmethod
    def named(cls, name: str) -> Method:
        """The method of that name. Raises ValueError for a kind or option that there is not."""
        kind, _, rest = name.partition(":")
        options = dict(part.partition("=")[::2] for part in rest.split(",") if part)
        if kind not in KINDS:
            raise ValueError(f"method {name!r}: allowed are {', '.join(KINDS)}; options follow a colon, as in 1f1b:m=4")
        allowed = {"m"} if kind in PIPELINES else {"depths"} if kind in OURS else set()
        allowed |= {"shares"} if kind == "exact" else {"c"} if kind in ("local", "ahead") else set()
        if kind != "ours" and (unknown := options.keys() - allowed):
            raise ValueError(f"method {name!r}: {kind} has no option {min(unknown)!r}; it has {', '.join(allowed) or 'none'}")
        if kind in PIPELINES and not (options.get("m", "").isdecimal() and int(options["m"]) > 0):
            raise ValueError(f"method {name!r}: say how many micro-batches, as in {kind}:m=4")
        return cls(name, kind, options)

    @property
    def is_exact(self) -> bool:
        """Whether its gradients are backprop's whatever the number of ranks."""
        return self.kind not in ("local", "ahead", "ours")

    @property
    def shares(self) -> tuple[int, ...] | None:
        """Segments of each rank, None for as equal as they go."""
        given = self.options.get("shares")
        if given is not None and not all(part.isdecimal() and int(part) for part in given.split("+")):
            raise ValueError(f"method {self.name!r}: shares are numbers above 0, one for each rank, as in exact:shares=1+3")
        return None if given is None else tuple(map(int, given.split("+")))

    def inference(self, n_blocks: int, n_ranks: int) -> str:
        """Sweeps of one of ours, as text. Raises ValueError where so many blocks are not cut into so many segments."""
        options = {_SHORT.get(name, name): value for name, value in self.options.items() if name not in ("depths", "shares")}
        if self.shares is not None and len(self.shares) != n_ranks:
            raise ValueError(f"method {self.name!r}: {len(self.shares)} shares for {n_ranks} ranks; give one for each")
        segments = int(options.pop("segments", sum(self.shares or (n_ranks,))))
        size = -(-n_blocks // segments)
        if -(-n_blocks // size) != segments and "chunk_size" not in options:
            raise ValueError(f"method {self.name!r}: {n_blocks} blocks are {-(-n_blocks // size)} segments of {size}, not "
                             f"{segments}; give another number of segments or blocks")  # fmt: skip
        given = options.get("chunk_size", "")
        if given.isdecimal() and int(given):  # sweeps refuse what is no such number
            segments = -(-n_blocks // int(given))
        most = str(segments - 1)
        alone = {"forward": most, "backward": "0", "linearization": "zero"}
        preset = {"exact": {"forward": most, "backward": most}, "local": alone, "ahead": alone}.get(self.kind, {})
        options = {"chunk_size": str(size), **preset, **options}
        return "sweeps:" + ",".join(f"{name}={value}" for name, value in options.items())

    def training(self, shape: Shape, n_ranks: int, *, recompute: bool = False, hooked: bool = False) -> Training:
        """The method on this process of R in the group; all must call it. Raises ValueError where it cannot be.

        ``recompute``: nothing inside a block is kept for the backward. ``hooked``: what DistributedDataParallel sends goes
        through Python, where it can be held back.
        """
        if self.kind == "backprop":
            return Backprop(shape, recompute)
        if self.kind in PIPELINES:
            return Pipeline(shape, *PIPELINES[self.kind], int(self.options["m"]), n_ranks, recompute)
        if self.kind in OURS:
            from comparisons.parallel_ours import Ours

            return Ours(shape, self.inference(shape.blocks, n_ranks), self.options.get("depths"), n_ranks, recompute,
                        ahead=self.kind == "ahead", shares=self.shares)  # fmt: skip
        if shape.batch_size % n_ranks:
            raise ValueError(f"batch_size={shape.batch_size} with {n_ranks} ranks: {self.kind} gives each the same rows")
        return Replica(shape, self.kind, n_ranks, recompute, hooked)


class Training:
    """A model that this process trains, or its part of one.

    Args:
        parts: trained parameters of which every rank has other ones.
        common: those that have the same gradient on all ranks that hold them, once they are reduced.

    Attributes:
        total: whether the loss of a step is the sum of all ranks' (else their mean).
    """

    total = True

    def __init__(self, shape: Shape, parts: Sequence[Tensor] = (), common: Sequence[Tensor] = ()):
        self.shape, self.parts, self.common = shape, list(parts), list(common)
        self.optimizer = torch.optim.AdamW([*self.parts, *self.common], lr=shape.lr)

    def differentiate(self, step: int) -> Tensor:
        """Forward and backward of a batch: this rank's part of the loss, detached. Raises ValueError as torch does."""
        raise NotImplementedError

    def end(self, loss: Tensor) -> None:
        """Reduces and clips the gradients. Here they are whole, or are shards whose norm is put together."""
        squares = squared_norm([_Local(p) for p in self.parts])
        if self.parts and distributed.get_world_size() > 1:
            distributed.all_reduce(squares)
        squares = squares + squared_norm(self.common)
        clip_gradients([_Local(p) for p in (*self.parts, *self.common)], float(squares) ** 0.5, self.shape.clip)

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

    def __init__(self, shape: Shape, recompute: bool = False):
        self.objective = BackpropObjective(shape.model(), recompute=recompute)
        super().__init__(shape, common=list(self.objective.parameters()))

    def differentiate(self, step: int) -> Tensor:
        loss = self.objective(self.shape.batch(step), step=step).loss
        loss.backward()
        return loss.detach()


class Replica(Training):
    """Backprop of a part of the rows: ``kind`` ``"ddp"`` or ``"fsdp"`` (every block a unit, embedding and head another)."""

    total = False

    def __init__(self, shape: Shape, kind: str, n_ranks: int, recompute: bool = False, hooked: bool = False):
        self.n_ranks, self.rank, self.is_ddp = n_ranks, distributed.get_rank(), kind == "ddp"
        objective = BackpropObjective(shape.model(), recompute=recompute)
        if kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(shape.device, (n_ranks,))
            for block in objective.model.blocks:
                fully_shard(block, mesh=mesh)
            self.module = fully_shard(objective, mesh=mesh)
            super().__init__(shape, parts=list(objective.parameters()))
            return
        self.module = DistributedDataParallel(objective, gradient_as_bucket_view=True)
        if hooked:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            self.module.register_comm_hook(None, allreduce_hook)
        super().__init__(shape, common=list(objective.parameters()))

    def differentiate(self, step: int) -> Tensor:
        rows = self.shape.batch(step).chunk(self.n_ranks)[self.rank]
        loss = self.module(rows, step=step).loss
        loss.backward()
        return loss.detach()

    def reduced_bytes(self) -> list[int]:
        """Of DistributedDataParallel: the bytes of each of its collectives of a step, as its reducer says."""
        data = self.module._get_ddp_logging_data()
        sizes = data.get("rebuilt_bucket_sizes") or data["bucket_sizes"]
        return [int(size) for size in str(sizes).split(",")]


class Pipeline(Training):
    """A pipeline of torch: this process has one or two of its stages."""

    def __init__(self, shape: Shape, schedule: str, per_rank: int, m: int, n_ranks: int, recompute: bool = False):
        from torch.distributed import pipelining

        rank, n_stages, model = distributed.get_rank(), per_rank * n_ranks, shape.model()
        if shape.batch_size % m:
            raise ValueError(f"{m} micro-batches of {shape.batch_size} rows: they must be of equal size; choose a "
                             "divisor, or a larger --batch-size")  # fmt: skip
        folded = schedule == "ScheduleZBVZeroBubble"
        numbers = [rank] if per_rank == 1 else [rank, 2 * n_ranks - 1 - rank if folded else rank + n_ranks]
        last_rank = 0 if folded else n_ranks - 1
        blocks, path = list(model.blocks), model.config.full_path
        model.blocks = nn.ModuleList()  # of other stages nothing is left
        self.model, self.is_first, self.is_last = model, 0 in numbers, n_stages - 1 in numbers
        self.stages = []
        for s in numbers:
            own = blocks[s * len(blocks) // n_stages : (s + 1) * len(blocks) // n_stages]
            stage = Stage(model.embed if s == 0 else None, own, model.head if s == n_stages - 1 else None, recompute)
            self.stages.append(pipelining.PipelineStage(stage, s, n_stages, torch.device(shape.device)))
        # Torch would divide by m stage by stage, the matrix of two stages of one process twice.
        score = lambda state, targets: model.score_exits([state], targets, [path], [1.0])[0] / m
        self.schedule = getattr(pipelining, schedule)(self.stages[0] if per_rank == 1 else self.stages, m, loss_fn=score,
                                                      scale_grads=False)  # fmt: skip
        takes = inspect.signature(self.schedule.step).parameters
        self.options = {"return_outputs": False} if "return_outputs" in takes else {}
        self.tied = model.embed.weight if last_rank != 0 and (self.is_first or self.is_last) else None
        self.ends = distributed.new_group([0, last_rank]) if last_rank != 0 else None
        held = {id(p): p for stage in self.stages for p in stage.submod.parameters()}.values()
        # The head's copy is not counted in the norm a second time.
        self.copy = [p for p in held if p is self.tied and not self.is_first]
        super().__init__(shape, parts=[p for p in held if p is not self.tied or self.is_first])
        if self.copy:
            self.optimizer.add_param_group({"params": self.copy})

    def differentiate(self, step: int) -> Tensor:
        inputs, targets = self.model.prepare(self.shape.batch(step))
        losses: list[Tensor] = []
        given = {"target": targets, "losses": losses} if self.is_last else {}
        self.schedule.step(*([inputs] if self.is_first else []), **given, **self.options)
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=inputs.device)

    def end(self, loss: Tensor) -> None:
        if self.tied is not None:
            distributed.all_reduce(self.tied.grad, group=self.ends)
        squares = squared_norm(self.parts)
        distributed.all_reduce(squares)
        clip_gradients([*self.parts, *self.copy], float(squares) ** 0.5, self.shape.clip)

    def buffers(self) -> list[Tensor]:
        infos = [info for stage in self.stages for received in (stage.args_recv_info, stage.grad_recv_info)
                 for of_batch in received.values() for info in of_batch]  # fmt: skip
        return [info.buffer for info in infos if getattr(info, "buffer", None) is not None]


class Stage(nn.Module):
    """Blocks one after the other, behind the embedding where there is one. The head is a part whose parameters are trained
    here; the loss function calls it."""

    def __init__(self, embed: nn.Module | None, blocks: Sequence[nn.Module], head: nn.Module | None, recompute: bool):
        super().__init__()
        self.embed, self.blocks, self.head, self.recompute = embed, nn.ModuleList(blocks), head, recompute

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for block in self.blocks:
            x = checkpoint(lambda s, block=block: block(s)[0], x, use_reentrant=False) if self.recompute else block(x)[0]
        return x


class _Local:
    """The part of a sharded parameter that is here, with its gradient; of another one all of it."""

    def __init__(self, parameter: Tensor):
        self.grad = None if parameter.grad is None else local(parameter.grad)


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is here; of another one all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
