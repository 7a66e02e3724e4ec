"""The training loop: optimizer steps, metrics, evaluation and checkpoints, such that a resumed run is the same run.

Everything a step depends on is either in the checkpoint (weights, optimizer, carried states, those under way between ranks,
random number generators) or a pure function of the step: the learning rate, the batch, and the noise of the objective.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from hbll_seq.chains.depth import Prefix
from hbll_seq.data.windows import TokenWindows
from hbll_seq.distributed.ranks import Ranks
from hbll_seq.training.checkpoint import CheckpointError, TensorGroups
from hbll_seq.training.checkpoint_contents import (
    check_module,
    check_optimizer,
    load_module,
    load_optimizer,
    optimizer_tensors,
)
from hbll_seq.training.devices import on_main, precision_name, track
from hbll_seq.training.failures import RunFailed, append_line, check_finite, remedy_for
from hbll_seq.training.graphed import GraphedStep
from hbll_seq.training.optimizer import make_optimizer
from hbll_seq.training.random_state import rng_state, set_rng_state
from hbll_seq.training.run_record import CHECKPOINTS, METRICS, lines_of
from hbll_seq.training.run_state import check_run_state, name_carried, read_carried
from hbll_seq.training.schedule import rate_of_step
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.training.share import Share
from hbll_seq.training.signals import StopNow, StopSignal
from hbll_seq.utils.reading import quote, shorten
from hbll_seq.utils.tensors import module_tensors

States = dict[Prefix, torch.Tensor]
#: seconds between two flushes of metrics.jsonl to the disk, beside the one before each checkpoint.
FLUSH_SECONDS = 5.0


class Stopped(Exception):
    """The run was stopped by a signal and has been saved."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped by signal {signal_number} after step {step}")
        self.step, self.signal_number = step, signal_number


class Trainer:
    """Trains an objective to ``total_steps`` optimizer steps and keeps the run's files.

    Args:
        accelerator: devices, precision, accumulation (its ``gradient_accumulation_steps`` is ``settings.grad_accum``).
        objective: a module whose ``forward(windows [B, T+1], step=...)`` returns an ``ObjectiveOutput``; not prepared. With
            ``settings.carry_state`` it is also given the ``states`` that it returned for the same rows the step before.
        windows: training windows.
        settings: of the run.
        folder: of the run; must exist. Gets ``metrics.jsonl`` and ``checkpoints/``.
        identity: JSON values stored in every checkpoint (settings, fingerprints), for the check at a resume.
        stop: asked after every step.
        evaluate: called with the number of steps done, on every process; must not change any training state.
        added: steps that each extension of the run adds to those of the settings.
        share: what this process holds of the objective's model; None is all of it, on every process.

    Raises:
        ValueError: a step takes more windows than the training text has.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: nn.Module,
        windows: TokenWindows,
        settings: TrainingSettings,
        folder: Path,
        identity: dict[str, Any],
        stop: StopSignal,
        evaluate: Callable[[int], None],
        added: Sequence[int] = (),
        share: Share | None = None,
    ):
        self.accelerator, self.settings, self.windows = accelerator, settings, windows
        self.folder, self.identity, self.stop, self.evaluate = folder, identity, stop, evaluate
        self.plain_objective = objective
        alone = Ranks(replica=accelerator.process_index, n_replicas=accelerator.num_processes)
        self.share = Share(objective, alone) if share is None else share
        self.ranks = self.share.ranks
        self.windows_per_step = settings.batch_size * settings.grad_accum * self.ranks.n_replicas
        if self.windows_per_step > windows.n_windows:
            sides = f"{self.ranks.n_replicas} {'processes' if self.ranks.n_ranks == 1 else 'replicas'}"
            raise ValueError(
                f"batch_size={settings.batch_size} x grad_accum={settings.grad_accum} x {sides} "
                f"are {self.windows_per_step} windows a step, but the training text has only "
                f"{windows.n_windows} windows of {windows.context_length} tokens; give a smaller --batch-size, --grad-accum "
                "or --context-length, or more text"
            )
        self.objective, self.optimizer = self.share.prepare(accelerator, make_optimizer(objective, settings))
        self.graphed = GraphedStep(self.objective, precision_name(accelerator)) if settings.cuda_graph else None
        self.metrics = lines_of(folder, METRICS, FLUSH_SECONDS)
        self.parts = [settings.max_steps or math.ceil(settings.epochs * windows.n_windows / self.windows_per_step), *added]
        self.total_steps = sum(self.parts)
        self.done, self.seconds = 0, 0.0  # seconds of training alone, over all sittings
        self.states: list[States] = [{} for _ in range(settings.grad_accum)]  # carried, of the rows of each micro batch
        self._saved: int | None = None  # step of the newest checkpoint that is known to be good
        self._logged = (0, 0.0)  # steps and seconds at the last line of metrics.jsonl

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / CHECKPOINTS

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.done * self.windows_per_step * self.windows.context_length

    # ------------------------------------------------------------------------------------------ state

    def restore(self, groups: TensorGroups, state: dict[str, Any]) -> int:
        """Take up the run at a loaded checkpoint, and return its step.

        Raises:
            CheckpointError: it does not fit this model or run, or its state is not one that a run has written; nothing is
                changed, and every rank of a model raises it.
        """
        self.share.agree(lambda: self._checked(groups, state))()
        self.done, self.seconds = state["step"], state["seconds"]
        self._logged, self._saved = (self.done, self.seconds), self.done
        return self.done

    def _checked(self, groups: TensorGroups, state: dict[str, Any]) -> Callable[[], None]:
        """Checks what a checkpoint holds for this process; takes it when called."""
        check_run_state(state)
        step, rng, settings = state["step"], state["rng"], self.settings
        allowed = {"model", "optimizer", *["carried"] * settings.carry_state, *["ahead"] * settings.ahead}
        if not {"model", "optimizer"} <= set(groups) <= allowed:
            raise CheckpointError(f"the checkpoint holds the files {quote(sorted(groups))}; this run takes "
                                  f"{', '.join(sorted(allowed))} and needs model and optimizer")
        if step > self.total_steps:
            raise CheckpointError(f"the checkpoint is that of step {step}; this run has {self.total_steps} steps")
        groups = self.share.part_of(groups)
        check_module(module_tensors(self.plain_objective), groups["model"], "the checkpoint")
        check_optimizer(self.optimizer.optimizer, self.plain_objective, groups["optimizer"])
        if any(not 0 < count <= step for name, count in groups["optimizer"].items() if name.endswith("|step")):
            raise CheckpointError(f"the checkpoint of step {step} counts other steps in its optimizer")
        states, shape = self._own_states(groups.get("carried", {})), (settings.batch_size, settings.context_length)
        take_up = self.share.taking_up(groups.get("ahead", {}), (*shape, settings.n_embd))

        def take() -> None:
            load_module(self.plain_objective, groups["model"], "the checkpoint")
            load_optimizer(self.optimizer.optimizer, self.plain_objective, groups["optimizer"])
            self.states = states
            take_up()
            # no step draws from them: with another number of processes any will do
            set_rng_state(rng[self.accelerator.process_index % len(rng)])

        return take

    def save(self) -> None:
        """Write a checkpoint, each process what it holds. Raises RunFailed on every process when it cannot be written."""
        if self._saved == self.done:
            return
        state = {**self.identity, "seconds": self.seconds, "rng": gather_object([rng_state()])}
        groups = {
            "model": module_tensors(self.plain_objective),
            "optimizer": optimizer_tensors(self.optimizer.optimizer, self.plain_objective),
            **({"carried": self._all_states()} if self.settings.carry_state else {}),
            **({"ahead": self.share.under_way(self.accelerator)} if self.settings.ahead else {}),
        }
        try:
            on_main(self.metrics.flush)  # no checkpoint is ahead of its metrics, whenever the power fails
            self.share.save(self.checkpoints, self.done, groups, state, self.settings.keep_checkpoints)
        except (OSError, ValueError) as error:
            then = "go on with --resume" if self.done else "start again with --overwrite"
            kept = "older ones are kept: " if self.done else ""
            raise RunFailed(f"the checkpoint of step {self.done} could not be saved in {self.checkpoints}: {shorten(error)}; "
                            f"{kept}{remedy_for(error)}, then {then}") from None
        self._saved = self.done

    def _all_states(self) -> dict[str, torch.Tensor]:
        """Carried states of all replicas, [replicas * B, C] by micro batch and path, as a checkpoint names them."""
        return {
            name_carried(micro, prefix): self.share.of_replicas(self.accelerator, state)
            for micro, states in enumerate(self.states)
            for prefix, state in states.items()
        }

    def _own_states(self, tensors: Mapping[str, torch.Tensor]) -> list[States]:
        """Inverse of :meth:`_all_states`: own rows, of own blocks. Raises CheckpointError where one does not fit."""
        states: list[States] = [{} for _ in range(self.settings.grad_accum)]
        n_rows, width = self.settings.batch_size, self.settings.n_embd
        expected = (n_rows * self.ranks.n_replicas, width)
        own = slice(self.ranks.replica * n_rows, (self.ranks.replica + 1) * n_rows)
        for micro, prefix, tensor in read_carried(tensors, len(states), expected, 2**self.settings.n_level - 1):
            if self.share.holds(prefix[-1]):
                states[micro][prefix] = tensor[own].to(self.accelerator.device, copy=True)
        return states

    # ------------------------------------------------------------------------------------------ loop

    def run(self, evaluated: int = 0) -> None:
        """Train from ``self.done`` to the end, where a checkpoint is always saved.

        Args:
            evaluated: number of steps at the last evaluation on record.

        Raises:
            RunFailed: the loss or the gradient is not finite, or a file cannot be written.
            Stopped: a signal came; the run is saved.
        """
        if self.done == 0:  # so that --resume always finds something, and a disk too small shows now
            self.save()
        if evaluated < self.done:
            self._evaluate_if_due()
        terminal = sys.stderr.isatty()
        with tqdm(
            total=self.total_steps, initial=self.done, unit="step", dynamic_ncols=terminal,
            mininterval=0.2 if terminal else 10.0, disable=not self.accelerator.is_main_process,
        ) as bar:
            while self.done < self.total_steps:
                row, stopping = self._step()
                self.done += 1
                bar.set_postfix(self._log(row), refresh=False)
                bar.update()
                last = self.done == self.total_steps
                if stopping:
                    self._stop()
                # saved first: an evaluation that fails costs no step, and a resumed run makes up for it
                if last or _due(self.done, self.settings.save_every):
                    self.save()
                if not last:
                    self._evaluate_if_due()

    def _step(self) -> tuple[dict[str, Any], bool]:
        """One optimizer step: its line of metrics, and whether a process was asked to stop."""
        settings, accelerator, start = self.settings, self.accelerator, time.perf_counter()
        lr = rate_of_step(self.done, self.parts, peak=settings.lr, warmup=settings.warmup_steps, floor=settings.min_lr_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        report, first = 0.0, self.done * settings.grad_accum
        self.share.fill(lambda behind: self._forward(first + behind, 0))
        for micro in range(settings.grad_accum):
            with accelerator.accumulate(self.objective):
                output = self._forward(first + micro + self.share.lead, micro)
                if self.graphed is None:  # else a graph has done it
                    accelerator.backward(output.loss)
            if settings.carry_state:
                self.states[micro] = output.states
            names = sorted(output.metrics)
            values = [output.loss.detach(), *(output.metrics[name] for name in names)]
            report = report + torch.cat([torch.stack([v.float() for v in values]), output.node_losses.detach().float()])
        (stopping, loss, *values), norm = self._reduced(report)
        check_finite(loss, norm, self.done + 1, self.checkpoints)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds += time.perf_counter() - start
        row = {"step": self.done + 1, "loss": loss, **dict(zip(names, values)), "grad_norm": norm, "lr": lr,
               "node_losses": values[len(names):]}
        return row, stopping > 0

    def _forward(self, index: int, micro: int) -> Any:
        """What the objective makes of micro-batch ``index`` of the run, which is also that of the noise and the mix."""
        batch, carried = self._batch(index, micro)
        return (self.graphed or self.objective)(batch.to(self.accelerator.device), step=index, **carried)

    def _reduced(self, report: torch.Tensor) -> tuple[list[float], float]:
        """Whether a process was asked to stop and the report, a mean over processes and micro batches, and the norm of the
        gradient, which is clipped: the same numbers on every process."""
        accumulated, accelerator = self.settings.grad_accum, self.accelerator
        asked = torch.tensor([float(bool(self.stop.received)) * accumulated], device=report.device)
        if self.ranks.n_ranks > 1:
            return self.share.end_step(torch.cat([asked, report]) / accumulated, self.settings.clip)
        norm = accelerator.clip_grad_norm_(self.objective.parameters(), self.settings.clip or math.inf)
        report = accelerator.reduce(torch.cat([asked, report]), "mean") / accumulated
        return report.tolist(), float(norm)  # one wait for the device

    def _batch(self, index: int, micro: int) -> tuple[torch.Tensor, dict[str, States]]:
        """Windows of a micro batch of this replica, and the states that they start from, where states are carried."""
        settings, replica, n_replicas = self.settings, self.ranks.replica, self.ranks.n_replicas
        if not settings.carry_state:
            return self.windows.batch(index, settings.batch_size, settings.seed, replica, n_replicas), {}
        first = (micro * n_replicas + replica) * settings.batch_size  # each micro batch of each replica has rows of its own
        rows = range(first, first + settings.batch_size)
        windows = self.windows.contiguous_batch(self.done, rows, self.windows_per_step, settings.seed)
        return windows, {"states": self.states[micro]}

    def _log(self, row: dict[str, Any]) -> dict[str, str]:
        """Write the line when it is due; what the progress bar shows."""
        if self.done % self.settings.log_every and self.done < self.total_steps:
            return self._shown(row)
        tokens = self.windows_per_step * self.windows.context_length
        steps, seconds = self._logged
        row["tokens"] = self.tokens
        row["tokens_per_s"] = (self.done - steps) * tokens / max(self.seconds - seconds, 1e-9)
        row["epoch"] = self.done * self.windows_per_step / self.windows.n_windows
        row["seconds"] = self.seconds
        self._logged = (self.done, self.seconds)
        if self.accelerator.is_main_process:
            append_line(self.metrics, row)
        track(self.accelerator, {name: value for name, value in row.items() if isinstance(value, (int, float))}, self.done)
        return self._shown(row)

    def _shown(self, row: dict[str, Any]) -> dict[str, str]:
        speed = self.done and self.windows_per_step * self.windows.context_length / max(self.seconds / self.done, 1e-9)
        return {"loss": f"{row['loss']:.3f}", "ce": f"{row['ce']:.3f}", "tokens/s": f"{speed:,.0f}"}

    def _evaluate_if_due(self) -> None:
        if self.done < self.total_steps and _due(self.done, self.settings.eval_every):
            try:
                with self.stop.interruptible(self.accelerator.num_processes == 1):
                    self.evaluate(self.done)
            except StopNow:
                self._stop()

    def _stop(self) -> None:
        self.save()
        raise Stopped(self.done, self.stop.received)


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
