"""Pipelines of torch on R processes, a training step of ``bench_parallel.py``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from comparisons.parallel_training import Case, Training
from hbll_seq.distributed.gradients import clip_gradients, squared_norm


class Pipeline(Training):
    """A pipeline of torch: this process has one or two of its stages."""

    def __init__(self, case: Case, schedule: str, per_rank: int, m: int, n_ranks: int, recompute: bool = False):
        from torch.distributed import pipelining

        rank, n_stages, model = distributed.get_rank(), per_rank * n_ranks, case.model()
        if case.batch_size % m:
            raise ValueError(f"{m} micro-batches of {case.batch_size} rows: they must be of equal size; choose a "
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
            self.stages.append(pipelining.PipelineStage(stage, s, n_stages, torch.device(case.device)))
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
        super().__init__(case, parts=[p for p in held if p is not self.tied or self.is_first])
        if self.copy:
            self.optimizer.add_param_group({"params": self.copy})

    def differentiate(self, step: int) -> Tensor:
        inputs, targets = self.model.prepare(self.case.batch(step))
        losses: list[Tensor] = []
        given = {"target": targets, "losses": losses} if self.is_last else {}
        self.schedule.step(*([inputs] if self.is_first else []), **given, **self.options)
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=inputs.device)

    def end(self, loss: Tensor) -> None:
        if self.tied is not None:
            distributed.all_reduce(self.tied.grad, group=self.ends)
        squares = squared_norm(self.parts)
        distributed.all_reduce(squares)
        self.norm = float(squares) ** 0.5
        clip_gradients([*self.parts, *self.copy], self.norm, self.case.clip)

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
