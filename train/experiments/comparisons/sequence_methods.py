"""Ways to train a recurrent language model on R processes, each a training step with the same data, loss, clipping and AdamW.

    bptt                  backpropagation through time, a loop over the cell, on one process; all others wait
    fused                 the same by torch's layer of the cell, also on one process
    ddp, ddp:fused        one of these with batch / R rows on each process
    truncated:window=16   fused, and cut: a backward pass for every 16 steps, credit within them alone; on one process
    ours:K=1,M=1,...      sweeps with these options, a part of the steps of every sequence on each process; A=zero, c=8,
                          ranks=1: on one process

Credit goes back all steps, with truncated through a window at most, and with ours (M + 1) c steps where A is zero. The cell,
embedding and head are on every process; their gradients are summed once a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from comparisons.fused import FusedObjective
from comparisons.parallel_methods import SHORT
from comparisons.parallel_training import Backprop, Case, Replica, Training
from hbll_seq.distributed.gradients import reduce_gradients
from hbll_seq.distributed.ranks import ALONE, make_ranks
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.recurrent import RecurrentLM
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective, RecurrentLocalObjective, RecurrentObjective

BACKPROP = ("bptt", "fused", "ddp", "ddp:fused")
_ON_ONE = "ranks=1"


@dataclass(frozen=True)
class Sequences(Case):
    """What is trained: a recurrent model, and long sequences."""

    context_length: int = 1024
    hidden_size: int = 128
    batch_size: int = 4
    vocab: int = 256
    cell: str = "gru"
    lr: float = 1e-3
    clip: float = 1.0
    device: str = "cpu"
    can_recompute: ClassVar[bool] = False

    def model(self) -> RecurrentLM:
        """Symbols are embedded in half of the state's width."""
        torch.manual_seed(0)
        cell = make_cell(self.cell, max(1, self.hidden_size // 2), self.hidden_size)
        return RecurrentLM(self.vocab, cell).to(self.device)

    def fused(self) -> FusedObjective:
        """Backprop by torch's layer, which has copies of the cell's weights and is trained in its place. Raises ValueError
        for a cell of which torch has none."""
        model = self.model()
        objective = FusedObjective(model).to(self.device)
        model.cell.requires_grad_(False)
        return objective

    def training(self, name: str, n_ranks: int, *, recompute: bool = False, hooked: bool = False) -> Training:
        check_method(name)
        kind, _, rest = name.partition(":")
        if kind == "ours":
            return Segments(self, inference_of(name), n_ranks)
        if kind == "truncated":
            return Truncated(self, self.fused(), window_of(name))
        objective = self.fused() if "fused" in (kind, rest) else RecurrentBackpropObjective(self.model())
        return Replica(self, objective, "ddp", n_ranks, hooked) if kind == "ddp" else Backprop(self, objective)

    def baseline(self) -> Training:
        return Backprop(self, RecurrentBackpropObjective(self.model()))

    def processes(self, name: str, ranks: int) -> int:
        is_alone = name in ("bptt", "fused") or name.startswith("truncated") or _ON_ONE in name.partition(":")[2].split(",")
        return 1 if is_alone else ranks

    def is_exact(self, name: str) -> bool:
        return name in BACKPROP


def check_method(name: str) -> None:
    """Raises ValueError for a method that there is not."""
    kind = name.partition(":")[0]
    if kind == "ours":
        RecurrentLocalObjective(Sequences(hidden_size=2, vocab=2).model(), inference_of(name))
    elif kind == "truncated":
        window_of(name)
    elif name not in BACKPROP:
        raise ValueError(f"method {name!r}: allowed are {', '.join(BACKPROP)}, truncated:window=16, and ours with options, "
                         "as in ours:K=1,M=1,A=zero,c=8")  # fmt: skip


def inference_of(name: str) -> str:
    """The sweeps of a method of ours, as text."""
    options = [part.partition("=") for part in name.partition(":")[2].split(",") if part and part != _ON_ONE]
    return "sweeps:" + ",".join(f"{SHORT.get(option, option)}={value}" for option, _, value in options)


def window_of(name: str) -> int:
    """Steps of a window. Raises ValueError where there are none."""
    option, _, value = name.partition(":")[2].partition("=")
    if option != "window" or not value.isdecimal() or int(value) < 1:
        raise ValueError(f"method {name!r}: say how many steps a window has, as in truncated:window=16")
    return int(value)


class Truncated(Training):
    """Backprop through windows of steps, one after the other, from the state in which the one before has ended."""

    def __init__(self, case: Sequences, objective: RecurrentObjective, window: int):
        self.objective, self.window = objective, window
        super().__init__(case, common=[p for p in objective.parameters() if p.requires_grad])

    def differentiate(self, step: int) -> Tensor:
        batch, state, total = self.case.batch(step), None, 0.0
        n_steps = batch.shape[1] - 1
        for begin in range(0, n_steps, self.window):
            part = batch[:, begin : begin + self.window + 1]
            output = self.objective(part, step=step, state=state)
            loss = output.loss * ((part.shape[1] - 1) / n_steps)
            loss.backward()
            total, state = total + loss.detach(), output.state
        return total


class Segments(Training):
    """Local losses, a part of the steps on each process."""

    def __init__(self, case: Sequences, inference: str, n_ranks: int):
        self.ranks = make_ranks(n_ranks, case.device) if n_ranks > 1 else ALONE
        self.objective = RecurrentLocalObjective(case.model(), inference, ranks=self.ranks).to(case.device)
        super().__init__(case, common=list(self.objective.parameters()))

    def differentiate(self, step: int) -> Tensor:
        output = self.objective(self.case.batch(step), step=step)
        output.loss.backward()
        return output.metrics["ce"]

    def end(self, loss: Tensor) -> None:
        reduce_gradients([], self.common, self.ranks)
        super().end(loss)
