"""Ours on R processes, a training step of ``bench_parallel.py``."""

from __future__ import annotations

from torch import Tensor

from comparisons.parallel_training import Case, Training
from hbll_seq.distributed.ranks import ALONE, make_ranks
from hbll_seq.objectives.base import ObjectiveOutput
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.registry import parse_inference
from hbll_seq.training.share import Share


class Ours(Training):
    """Segments on ranks, as ``train/lm.py --block-parallel`` trains them, or with ``--ahead`` too."""

    def __init__(
        self,
        case: Case,
        inference: str,
        depths: str | None,
        n_ranks: int,
        recompute: bool = False,
        ahead: bool = False,
        shares: tuple[int, ...] | None = None,
    ):
        ranks = make_ranks(n_ranks, case.device, shares=shares) if n_ranks > 1 else ALONE
        self.objective = LocalObjective(
            case.model(), inference, ranks=ranks, depths=depths, recompute=recompute, ahead=ahead
        )
        self.is_ahead, self.done = ahead, 0
        self.share = Share(self.objective, ranks, parse_inference(inference).chunk_size)
        super().__init__(case, self.share.own, self.share.shared)

    def differentiate(self, step: int) -> Tensor:
        if self.is_ahead:  # what is under way belongs to the next batch, whichever is asked for
            step, self.done = self.done, self.done + 1
            self.share.fill(self._forward)
        output = self._forward(step + self.share.lead)
        output.loss.backward()
        return output.metrics["ce"].detach()

    def _forward(self, number: int) -> ObjectiveOutput:
        return self.objective(self.case.batch(number), step=number)

    def end(self, loss: Tensor) -> None:
        _, self.norm = self.share.end_step(loss[None], self.case.clip)

    def idle_segments(self) -> list[int]:
        objective, inference = self.objective, self.objective.inference
        if inference.backward > 0 or inference.linearization.name != "zero" or inference.auxiliary_exits:
            return []
        main, *others = objective.sub_networks(0)
        reached = {*main.exits, *(n for network in others for n in network.path)}
        segments = {objective.path.index(n) // inference.chunk_size for n in reached if n in objective.path}
        return sorted(set(range(-(-len(objective.path) // inference.chunk_size))) - segments)
