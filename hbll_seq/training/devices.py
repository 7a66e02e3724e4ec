"""Devices, precision, threads and trackers of a run, through Accelerate."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    AutocastKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)

from hbll_seq.models.config import HBLLConfig
from hbll_seq.training.graph_settings import check_graph_device
from hbll_seq.training.settings import MOST_THREADS, TrainingSettings
from hbll_seq.utils.console import is_first_process, say
from hbll_seq.utils.reading import quote, shorten

if torch.distributed.is_available():
    import torch.distributed.nn  # noqa: F401  its default arguments keep the process group that exists when it is imported

#: the others wait in a collective while the first process evaluates and exports (for a text being tokenised they wait at the
#: cache's file lock, which no timeout ends); one that died is noticed by the launcher
_PATIENCE = timedelta(hours=1)
_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


T = TypeVar("T")
#: what is wrong where processes do not find what others have written
ONE_FOLDER = "ranks on several machines need an --output-dir that all of them see"


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """What Accelerate raises inside, of many types, as a ValueError: it alone checks the variables of a launcher."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"accelerate cannot start in this environment ({type(error).__name__}: {shorten(error)}); mend the "
                         "variable that it names (ACCELERATE_..., RANK, WORLD_SIZE, MASTER_ADDR), or unset it") from None


def join_processes() -> PartialState:
    """The process group of the launch, before anything is known of the run; :func:`make_accelerator` goes on with it.

    Raises:
        ValueError: Accelerate cannot start with the launcher's variables.
    """
    with _starting():
        # an Accelerator asks ACCELERATE_USE_CPU by itself, a PartialState does not
        return PartialState(cpu=_on_cpu_alone(), timeout=_PATIENCE)


def on_main(work: Callable[[], T]) -> T | None:
    """Do ``work`` on the main process while the others wait; what it raises is raised on every process.

    Returns:
        Its result on the main process, None on the others.
    """
    result, problem, processes = None, [None], PartialState()
    if processes.is_main_process:
        try:
            result = work()
        except Exception as error:
            if processes.num_processes == 1:
                raise
            problem = [_sendable(error)]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise problem[0]
    return result


def on_all(work: Callable[[], T]) -> T:
    """Do ``work`` on every process; where one fails, all raise: what it raised itself, the others that of the first one."""
    result, problem = None, None
    try:
        result = work()
    except Exception as error:
        problem = error
    found = [error for error in gather_object([problem and _sendable(problem)]) if error is not None]
    if problem is not None or found:
        raise problem or found[0]
    return result


def _sendable(error: Exception) -> Exception:
    """The error, or one of its words where it cannot go to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does there
        return RuntimeError(f"{type(error).__name__}: {shorten(error)}")
    return error


def all_alike(value: object) -> bool:
    """Whether every process has the same value; each must ask."""
    return all(other == value for other in gather_object([value]))


@contextlib.contextmanager
def leaving_processes() -> Iterator[None]:
    """Ends, after the body, the process group that it has joined: the group's threads have ended when this returns.

    A finished process can fail at two places. Gloo's threads need the GIL to drop the tensors of the last collectives, and
    the group's destructor waits for these threads: who destroys it while holding the GIL may wait for ever. And a thread that
    still owns a tensor when the interpreter ends aborts it (pytorch issue 190489). DistributedDataParallel, a cycle of
    objects, keeps a reference that is dropped while holding the GIL; Python's own handle of the group releases the GIL first.
    So the handle is dropped last, when nothing of the body is left.
    """
    try:
        yield
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None and _in_group():
            traceback.clear_frames(cause.__traceback__)  # they hold the model
            cause = cause.__context__
        raise
    finally:
        if _in_group():
            group = torch.distributed.group.WORLD
            torch.distributed.destroy_process_group()
            gc.collect()
            del group


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()  # asking Accelerate could start a new one


def check_memory(config: HBLLConfig, own: Collection[int] | None = None, gathers: bool = False) -> None:
    """Raises ValueError for a model whose weights, gradients and Adam's moments cannot fit this machine's memory.

    Args:
        config: of the model.
        own: numbers of the blocks that this process holds; None is all of them.
        gathers: whether it puts the whole model together to evaluate and to export it.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows, and other systems that do not tell
        return
    attention = 2 + 2 * (config.n_kv_head or config.n_head) / config.n_head
    matrices = [(attention if cell == "transformer" else 2) + 2 * config.mlp_ratio for cell in config.cells]  # at least
    sizes = [int(size * config.n_embd**2) for size in matrices]
    mine = sum(size for n, size in enumerate(sizes, start=1) if own is None or n in own) + config.vocab_size * config.n_embd
    others = sum(sizes) + config.vocab_size * config.n_embd - mine
    # on a GPU the weights alone pass through here. What is put together are weights alone, while there are no gradients
    needed = mine * (4 if torch.cuda.is_available() else 16) + others * 4 * gathers
    if needed > memory:
        raise ValueError(
            f"n_embd={config.n_embd} with n_level={config.n_level}, mlp_ratio={config.mlp_ratio} and a vocabulary of "
            f"{config.vocab_size}: {mine + others * gathers:,} parameters or more need {needed / 2**30:,.0f} GiB of memory, "
            f"and this machine has {memory / 2**30:,.0f}; choose a smaller --n-embd or --n-level"
        )


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """An Accelerator with the settings' precision, accumulation and trackers; sets the number of CPU threads.

    Raises:
        ValueError: float16, a tracker that is unknown or not installed, or a way to distribute that does not work here;
            variables of a launcher with which Accelerate cannot start; ``cuda_graph`` without a CUDA device.
    """
    trackers = _trackers(settings.log_with)
    _speak_of_dynamo()
    bfloat16 = _choose_precision(settings.precision) == "bfloat16"
    with _starting():
        accelerator = Accelerator(
            mixed_precision="bf16" if bfloat16 else "no",
            dynamo_backend="no",
            log_with=trackers or None,
            project_dir=settings.output_dir,
            gradient_accumulation_plugin=GradientAccumulationPlugin(settings.grad_accum, sync_with_dataloader=False),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=_PATIENCE),
                # a graph must not hold what autocast made for another one
                AutocastKwargs(cache_enabled=not settings.cuda_graph),
            ],
        )
    if accelerator.distributed_type not in _DISTRIBUTED:
        raise ValueError(
            f"accelerate was told to use {accelerator.distributed_type.value}: local losses need each block whole on "
            "every process; launch with plain data parallelism (--multi_gpu) or a single process"
        )
    if settings.cuda_graph:
        check_graph_device(accelerator.device, accelerator.num_processes)
    torch.set_num_threads(settings.threads or default_threads())
    return accelerator


def _speak_of_dynamo() -> None:
    """An objective asks autograd for gradients inside its forward pass, which no compiler of whole modules follows."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no" and is_first_process():
        say(f"ACCELERATE_DYNAMO_BACKEND={quote(backend)} is left aside: an objective takes gradients inside its forward pass "
            "and is not compiled as a whole; the losses are the same")


def start_trackers(accelerator: Accelerator, settings: TrainingSettings) -> None:
    """Give the trackers of ``log_with`` the run's settings.

    Raises:
        ValueError: one cannot be started (no account, no network, a folder that cannot be written).
    """
    values = {name: "none" if value is None else value for name, value in asdict(settings).items()}
    try:
        accelerator.init_trackers("hbll_seq", values)
    except Exception as error:  # whatever a tracker's own package raises
        raise ValueError(f"log_with={quote(settings.log_with)}: it cannot be started ({shorten(error)}); set it up, or leave "
                         "--log-with out (metrics.jsonl is always written)") from None


def track(accelerator: Accelerator, values: dict[str, float], step: int) -> None:
    """Pass figures on to the trackers. One that fails is told once and gets no more: metrics.jsonl has all figures, and a
    service out of reach is no reason to end a run."""
    for tracker in list(accelerator.trackers):
        try:
            tracker.log(values, step=step)
        except Exception as error:
            accelerator.trackers.remove(tracker)
            say(f"warning: the tracker {quote(tracker.name)} failed at step {step} and gets no more figures "
                f"({shorten(error)}); metrics.jsonl has them all")


def end_trackers(accelerator: Accelerator) -> None:
    """Finish the trackers, whatever becomes of them."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:
            say(f"warning: the tracker {quote(tracker.name)} could not be finished ({shorten(error)})")
    accelerator.trackers.clear()


def precision_name(accelerator: Accelerator) -> str:
    """The precision that "auto" came to: float32 or bfloat16."""
    return "bfloat16" if accelerator.mixed_precision == "bf16" else "float32"


#: variables of a process that ``accelerate launch`` or ``torchrun`` has started
_OF_LAUNCHERS = ("ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID")


def default_threads() -> int:
    """What OMP_NUM_THREADS says, else the cores that this process may use, divided by the processes on this machine.

    A launcher sets OMP_NUM_THREADS=1 where nobody has set it, which would leave all cores but one idle: there a 1 does not
    count, since nothing tells who has set it.

    Raises:
        ValueError: OMP_NUM_THREADS, or the launcher's LOCAL_WORLD_SIZE, is no such number.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2": of each level, the outermost first
    if asked and not (asked == "1" and any(name in os.environ for name in _OF_LAUNCHERS)):
        if not (asked.isascii() and asked.isdigit() and 0 < int(asked[:9]) <= MOST_THREADS):
            raise ValueError(f"OMP_NUM_THREADS={quote(os.environ['OMP_NUM_THREADS'])}: must be a number of threads from 1 to "
                             f"{MOST_THREADS}; unset it, or give --threads")
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not (processes.isascii() and processes.isdigit() and int(processes) > 0):
        raise ValueError(f"LOCAL_WORLD_SIZE={quote(processes)}: must be the number of processes here; unset it, or "
                         "give --threads")
    return max(1, cores // int(processes))


def _on_cpu_alone() -> bool:
    return parse_flag_from_env("ACCELERATE_USE_CPU")


def _choose_precision(wanted: str) -> str:
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", "bf16"):
        raise ValueError(
            f"accelerate was told to use mixed precision {launcher!r}, which is refused: a loss scaler does not reach "
            "the gradients inside the local losses; launch with --mixed_precision bf16 or no"
        )
    if wanted != "auto":
        return wanted
    on_gpu = torch.cuda.is_available() and not _on_cpu_alone()
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
