"""Processes of a group, started by a script: forks of a server that has imported what they need, of one thread each."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from hbll_seq.utils.atomic import atomic_write

_IMPORTED = ["comparisons.parallel_worker", "comparisons.parallel_ours", "comparisons.scaling_costs", "torch._dynamo",
             "torch.distributed.pipelining", "torch.distributed.fsdp"]  # fmt: skip
#: of glibc: memory that is let go of stays with the process. What goes back to the system after a step comes again page by
#: page, and a rank waits for the pages of another
_KEPT = {"MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_MMAP_THRESHOLD_": "1073741824"}
_GRACE = 5.0  # seconds that the others have to say what is wrong, once one has


def run_group(
    target: Callable[..., None], n_ranks: int, folder: Path, arguments: tuple, patience: float, device: str = "cpu"
) -> tuple[list[dict] | None, str]:
    """What each rank of a group has left in its file (see :func:`join_group`), None unless all have; and what went wrong.

    Args:
        target: a function of a module; called with rank, number of ranks, folder and ``arguments``.
        folder: an empty one, for the files of the group.
        patience: seconds after which it is given up.
        device: ``"cpu"``, or ``"cuda"``: rank r has GPU r.
    """
    # The server's imports need the path of the scripts, and its forks one thread.
    os.environ["OMP_NUM_THREADS"] = "1"
    for name, value in _KEPT.items():
        os.environ.setdefault(name, value)
    here = str(Path(__file__).resolve().parents[1])
    if here not in (paths := os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, *paths]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    given = lambda rank: (rank, n_ranks, folder, target, arguments, device)
    processes = [context.Process(target=join_group, args=given(rank)) for rank in range(n_ranks)]
    for process in processes:
        process.start()
    until, why = time.monotonic() + patience, ""
    try:
        while any(process.is_alive() for process in processes):
            time.sleep(0.02)
            failed = any(process.exitcode for process in processes) or any(folder.glob("*.error"))
            if failed:
                until = min(until, time.monotonic() + _GRACE)
            if time.monotonic() > until:
                why = "a process has ended" if failed else f"not done in {patience:g} seconds"
                break
    finally:
        for process in processes:
            process.kill()
            process.join()
    errors = [path.read_text(encoding="utf-8").split("\n")[0] for path in sorted(folder.glob("*.error"))]
    why = errors[0] if errors else why
    files = [folder / f"rank-{rank}.json" for rank in range(n_ranks)]
    if not all(file.exists() for file in files):
        return None, why or "a process has ended without a word"
    return [json.loads(file.read_text(encoding="utf-8")) for file in files], why


def join_group(rank: int, n_ranks: int, folder: Path, target: Callable[..., None], arguments: tuple, device: str) -> None:
    """Join the group and call ``target``, which leaves what it finds with :func:`leave`; an error goes to a file too."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_script, daemon=True).start()
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here changes one in place
    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
        backend = "nccl" if device == "cuda" else "gloo"
        distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks,
                                       timeout=timedelta(minutes=10))  # fmt: skip
        target(rank, n_ranks, folder, *arguments)
        distributed.barrier()
        distributed.destroy_process_group()
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        atomic_write(folder / f"rank-{rank}.error", message + "\n\n" + traceback.format_exc())


def _end_with_the_script() -> None:
    """A script that is killed leaves nobody behind who waits in a collective."""
    multiprocessing.parent_process().join()
    os._exit(1)


def leave(folder: Path, rank: int, found: Any) -> None:
    """What a rank has found so far, for :func:`run_group`."""
    atomic_write(folder / f"rank-{rank}.json", json.dumps(found))
