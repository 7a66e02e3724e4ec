"""Devices, precision, threads and trackers of a run, through Accelerate."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, LoggerType

from hbll_seq.training.settings import TrainingSettings

if torch.distributed.is_available():
    import torch.distributed.nn  # noqa: F401  its default arguments keep the process group that exists when it is imported

_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """An Accelerator with the settings' precision, accumulation and trackers; sets the number of CPU threads.

    Raises:
        ValueError: float16, a tracker that is unknown or not installed, or a way to distribute that does not work here.
    """
    trackers = _trackers(settings.log_with)
    bfloat16 = _choose_precision(settings.precision) == "bfloat16"
    accelerator = Accelerator(
        mixed_precision="bf16" if bfloat16 else "no",
        log_with=trackers or None,
        project_dir=settings.output_dir,
        gradient_accumulation_plugin=GradientAccumulationPlugin(settings.grad_accum, sync_with_dataloader=False),
        # the others wait in a collective while the first process evaluates and exports (for a text being tokenised they
        # wait at the cache's file lock, which no timeout ends); one that died is noticed by the launcher
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=1))],
    )
    if accelerator.distributed_type not in _DISTRIBUTED:
        raise ValueError(
            f"accelerate was told to use {accelerator.distributed_type.value}: local losses need each block whole on "
            "every process; launch with plain data parallelism (--multi_gpu) or a single process"
        )
    torch.set_num_threads(settings.threads or default_threads())
    return accelerator


def precision_name(accelerator: Accelerator) -> str:
    """The precision that "auto" came to: float32 or bfloat16."""
    return "bfloat16" if accelerator.mixed_precision == "bf16" else "float32"


def default_threads() -> int:
    """The cores that this process may use, divided by the processes on this machine.

    ``accelerate launch`` sets OMP_NUM_THREADS=1 on a CPU, which would leave all cores but one idle.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _choose_precision(wanted: str) -> str:
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", "bf16"):
        raise ValueError(
            f"accelerate was told to use mixed precision {launcher!r}, which is refused: a loss scaler does not reach "
            "the gradients inside the local losses; launch with --mixed_precision bf16 or no"
        )
    if wanted != "auto":
        return wanted
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    if launcher == "bf16" or on_gpu and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"


def _trackers(names: str | None) -> list[str]:
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    known, installed = [str(t) for t in LoggerType.list()], [str(t) for t in get_available_trackers()]
    for name in wanted:
        if name not in known:
            raise ValueError(f"log_with={name!r}: Accelerate knows {', '.join(known)}")
        if name != "all" and name not in installed:
            others = f"use an installed one ({', '.join(installed)})" if installed else "leave --log-with out"
            none = "" if installed else " and none is installed"
            raise ValueError(f"log_with={name!r}: its package is not installed{none}; install it, or {others} "
                             "(metrics.jsonl is always written)")
    return wanted
