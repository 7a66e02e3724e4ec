"""What one process of a run holds of the model, and how the parts are put together for a step, a checkpoint, an evaluation.

In a run without ``--block-parallel`` every process holds all of it, and Accelerate does what is to be done.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn

from hbll_seq.distributed.blocks import OF_BLOCKS, RemoteBlock, blocks_of_rank, keep_own, numbers_kept, whole_tensors
from hbll_seq.distributed.gradients import clip_gradients, reduce_gradients, squared_norm
from hbll_seq.distributed.lagged import LaggedPlacement
from hbll_seq.distributed.ranks import ALONE, Ranks
from hbll_seq.distributed.whole import gather_to_first
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.objectives.base import Objective
from hbll_seq.training import checkpoint
from hbll_seq.training.checkpoint import TensorGroups
from hbll_seq.training.checkpoint_contents import check_module
from hbll_seq.training.devices import ONE_FOLDER, on_all, on_main
from hbll_seq.utils.stored_tensors import Entries
from hbll_seq.utils.tensors import WithoutValues, module_tensors

T = TypeVar("T")


class Share:
    """The part of an objective's model that this process holds.

    Args:
        objective: around the whole model, or one that was made with this rank's blocks alone, on the CPU; with several ranks
            it holds these alone afterwards.
        ranks: where this process stands.
        chunk_size: blocks of a segment; ranks hold whole ones.

    Attributes:
        n_parameters: of the whole model.
        own: trained parameters of this rank's blocks; of one rank, none.
        shared: trained parameters that every rank holds.
        lead: micro-batches by which this rank is ahead of the last one of its model; 0 where all work on the same one.

    Raises:
        ValueError: there are fewer segments than ranks; or as :func:`hbll_seq.distributed.blocks.keep_own`.
    """

    def __init__(self, objective: Objective, ranks: Ranks = ALONE, chunk_size: int = 1):
        self.objective, self.ranks, self.model = objective, ranks, objective.model
        self.lead, self._is_filled = objective.placement.lead, False
        elsewhere = [block for block in self.model.blocks if isinstance(block, RemoteBlock)]
        self.n_parameters = sum(p.numel() for p in self.model.parameters()) + sum(block.n_parameters for block in elsewhere)
        self._whole: dict[str, Tensor] = {}  # what the objective holds of the whole model, without values
        if ranks.n_ranks > 1:
            self._whole = whole_tensors(objective)
            owned = blocks_of_rank(len(objective.path), chunk_size, ranks.rank, ranks.n_ranks, ranks.shares)
            self.numbers = frozenset(numbers_kept(len(self.model.blocks), objective.path, owned))
            keep_own(self.model, objective.path, owned)
        trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        of_blocks = [name for name in trained if ranks.n_ranks > 1 and name.startswith(OF_BLOCKS)]
        self.own = [trained[name] for name in of_blocks]
        self.shared = [p for name, p in trained.items() if name not in of_blocks]

    # ---------------------------------------------------------------------------------------------------- a step

    def prepare(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The objective and its optimizer on their device; with one rank in DistributedDataParallel where there are several
        processes, with several ranks never: :meth:`end_step` does what it would."""
        if self.ranks.n_ranks == 1:
            return accelerator.prepare(self.objective, optimizer)
        return accelerator.prepare_model(self.objective, evaluation_mode=True), accelerator.prepare_optimizer(optimizer)

    def end_step(self, report: Tensor, clip: float) -> tuple[list[float], float]:
        """After the backward calls of a step: reduces the gradients and clips them.

        Takes three collectives at most, whatever the number of blocks.

        Args:
            report: [n], what this rank knows of figures that are sums over the ranks of a model.
            clip: largest norm; 0 does not clip.

        Returns:
            The figures, averaged over the replicas, and the norm of the gradient before it was clipped; the same on every
            process, NaN of one rank included.
        """
        reduce_gradients(self.own, self.shared, self.ranks)
        total = torch.cat([squared_norm(self.own).to(report.device).reshape(1), report.double()])
        distributed.all_reduce(total, group=self.ranks.step_group)
        squares, *figures = (total / self.ranks.n_replicas).tolist()
        norm = math.sqrt(squares + float(squared_norm(self.shared)))
        if clip:
            clip_gradients([*self.own, *self.shared], norm, clip)
        return figures, norm

    def fill(self, step: Callable[[int], object]) -> None:
        """Before a step: where ranks work ahead of each other and nothing is under way between them, each makes ``lead``
        passes without gradient, so that the next rank gets what it reads first.

        Args:
            step: a pass over the micro-batch of so many behind the next one of the last rank.
        """
        if not self._is_filled:
            with torch.no_grad():
                for behind in range(self.lead):
                    step(behind)
        self._is_filled = True

    def under_way(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """Where ranks work ahead of each other, the states that this one reads next, of all replicas [replicas, ..], by its
        number; before the first step none. Every process must call it between the same two steps."""
        placement = self.objective.placement
        state = placement.coming() if isinstance(placement, LaggedPlacement) else None
        return {} if state is None else {f"{self.ranks.rank}": self.of_replicas(accelerator, state)}

    def taking_up(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Callable[[], None]:
        """Checks what :meth:`under_way` of all ranks gave a checkpoint; takes this rank's part when called. Where there is
        nothing, or other ranks have left it, the next step fills anew.

        Args:
            tensors: by rank.
            shape: of a state without the replicas.

        Raises:
            CheckpointError: one does not fit.
        """
        if tensors.keys() != {f"{rank}" for rank in range(1, self.ranks.n_ranks)} or not tensors:
            return lambda: None
        like = next(self.model.parameters())
        expected = torch.empty((self.ranks.n_replicas, *shape), dtype=like.dtype, device="meta")
        check_module(dict.fromkeys(tensors, expected), dict(tensors), "what the checkpoint holds for ranks that go on ahead")

        def take() -> None:
            if self.ranks.rank > 0:
                own = tensors[f"{self.ranks.rank}"][self.ranks.replica : self.ranks.replica + 1]
                self.objective.placement.take_up(own.to(next(self.model.parameters()).device, copy=True))
            self._is_filled = True

        return take

    def agree(self, work: Callable[[], T]) -> T:
        """``work()``; with several ranks an error of one is raised on all."""
        return work() if self.ranks.n_ranks == 1 else on_all(work)

    # -------------------------------------------------------------------------------------- checkpoints and evaluation

    def save(self, folder: Path, step: int, groups: TensorGroups, state: dict[str, Any], keep: int) -> None:
        """Write the checkpoint of ``step``; every process must call it, and an error of one is raised on all.

        With several ranks each of the first replica writes what it alone holds, the first one also what all hold, and no
        tensor is sent. Arguments and errors are those of :func:`hbll_seq.training.checkpoint.save_checkpoint`, of ``groups``
        what this process holds; every process names the same ones. One without tensors is left out where a process writes
        all of it, save for model and optimizer.
        """
        if self.ranks.n_ranks == 1:
            kept = {name: tensors for name, tensors in groups.items() if tensors or name in ("model", "optimizer")}
            on_main(lambda: checkpoint.save_checkpoint(folder, step, kept, state, keep))
            return
        groups, aside = self.written(groups), checkpoint.aside_path(folder, step)
        on_all(lambda: checkpoint.refuse_not_finite(step, groups))
        on_main(lambda: checkpoint.start(folder, step))
        with checkpoint.gone_on_error(aside) if PartialState().is_main_process else contextlib.nullcontext():
            files = gather_object([on_all(lambda: self._write(aside, groups))])
            listed = {name: entry for of_rank in files for name, entry in of_rank.items()}
            on_main(lambda: _check_seen(aside, listed))
            on_main(lambda: checkpoint.finish(aside, step, listed, state, keep))

    def written(self, groups: TensorGroups) -> TensorGroups:
        """Of what this rank holds of a model and an optimizer the part that it writes into a checkpoint."""
        if self.ranks.replica > 0:
            return {}
        if self.ranks.rank == 0:
            return groups
        own = {group: [name for name in groups[group] if name.startswith(OF_BLOCKS)] for group in ("model", "optimizer")}
        return {**groups, **{group: {name: groups[group][name] for name in names} for group, names in own.items()}}

    def _write(self, aside: Path, groups: TensorGroups) -> dict[str, dict[str, Any]]:
        if groups and not aside.is_dir():
            raise ValueError(f"rank {self.ranks.rank} does not see {aside.name}, which the first process has made there: "
                             f"{ONE_FOLDER}")
        return checkpoint.write_groups(aside, groups, self.ranks.rank + 1, self.ranks.n_ranks)

    def of_replicas(self, accelerator: Accelerator, state: Tensor) -> Tensor:
        """The rows [B, ..] of all replicas [replicas * B, ..], for what this rank has of each."""
        if self.ranks.n_ranks == 1:
            return accelerator.gather(state)
        if self.ranks.replica_group is None:
            return state
        rows = [torch.empty_like(state) for _ in range(self.ranks.n_replicas)]
        distributed.all_gather(rows, state.contiguous(), group=self.ranks.replica_group)
        return torch.cat(rows)

    def part_of(self, groups: TensorGroups) -> TensorGroups:
        """What this rank takes of a checkpoint's model and optimizer. Raises CheckpointError for another model's."""
        if self.ranks.n_ranks == 1:
            return groups
        check_module(self._whole, groups["model"], "the checkpoint")
        foreign = self._whole.keys() - module_tensors(self.objective).keys()
        part = {name: name for name in groups["model"] if name not in foreign}
        states = {name: name for name in groups["optimizer"] if name.rpartition("|")[0] not in foreign}
        return {**groups, "model": Entries(groups["model"], part), "optimizer": Entries(groups["optimizer"], states)}

    def holds(self, n: int) -> bool:
        """Whether block n is here."""
        return self.ranks.n_ranks == 1 or n in self.numbers

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[HBLLForCausalLM]:
        """The model with all its blocks, on the main process; every process must enter, and those of one model leave
        together.

        With several ranks it is a copy on the CPU, which is dropped again: 4 bytes a parameter beside what the process holds.
        The other processes get their part.
        """
        if self.ranks.n_ranks == 1:
            yield self.model
            return
        whole = on_main(self._without_values)  # for as long as that takes; a step's collectives wait minutes alone
        if self.ranks.replica == 0:
            gather_to_first(module_tensors(self.model), self.ranks, {} if whole is None else module_tensors(whole))
        yield self.model if whole is None else whole
        del whole
        PartialState().wait_for_everyone()  # for as long as the main process takes

    def _without_values(self) -> HBLLForCausalLM:
        """The whole model, whose values are all to be replaced."""
        with WithoutValues(), torch.random.fork_rng(devices=[]):
            whole = type(self.model)(self.model.config, tokenizer=self.model.tokenizer)
        return whole.to(next(self.model.parameters()).dtype)


def _check_seen(aside: Path, files: Mapping[str, dict[str, Any]]) -> None:
    """Raises ValueError where a file that another rank has written is not there."""
    for name, entry in files.items():
        if not (aside / name).is_file() or (aside / name).stat().st_size != entry["bytes"]:
            raise ValueError(f"the first process does not see {name}, which another rank has written: {ONE_FOLDER}")
