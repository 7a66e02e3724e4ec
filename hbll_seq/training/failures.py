"""What kind of failure an error is, and what can be done about it."""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hbll_seq.distributed.lost import is_first_to_speak, is_lost
from hbll_seq.distributed.ranks import Ranks
from hbll_seq.training.json_lines import JsonLines
from hbll_seq.utils.console import is_first_process
from hbll_seq.utils.exhausted import disk_is_full
from hbll_seq.utils.reading import quote, shorten


class RunFailed(RuntimeError):
    """The run cannot go on (loss not finite, disk full); the message says what is kept and what to do."""


@contextlib.contextmanager
def one_voice(ranks: Ranks, checkpoints: Path) -> Iterator[None]:
    """Where blocks lie on several ranks, what goes wrong on one ends all, and :func:`speaks` is true for one alone: that on
    which something went wrong, or the first that notices that another is gone.

    Args:
        ranks: where this process stands.
        checkpoints: of the run.

    Raises:
        RunFailed: another process has ended, or did not answer in time.
    """
    try:
        yield
    except Exception as error:
        if ranks.n_ranks == 1:
            raise
        if is_lost(error):
            seconds = ranks.patience.total_seconds()
            error = RunFailed(
                f"another process of this launch ended, or did not answer for {seconds:g} seconds ({shorten(error, 120)}): "
                f"all stop. The last checkpoint in {checkpoints} stands; when its cause is mended, launch as many again with "
                "--resume"
            )
        error.speaks = is_first_to_speak()
        raise error


def speaks(error: BaseException | None) -> bool:
    """Whether this process says how the run ended; of several processes one does."""
    return getattr(error, "speaks", is_first_process())


_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def check_finite(loss: float, norm: float, step: int, checkpoints: Path) -> None:
    """Raises RunFailed where the loss or the gradient's norm of a step is not finite."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise RunFailed(
            f"loss={loss} and gradient norm={norm} at step {step}: the run is stopped before they reach the weights. "
            f"Checkpoints up to the last good one are kept in {checkpoints}; try a smaller --lr, a longer --warmup-steps or "
            "a smaller --clip in a new --output-dir"
        )


def append_line(file: JsonLines, row: dict[str, Any]) -> None:
    """Add a line to a file of the run. Raises RunFailed when the disk is full or the file cannot be written."""
    try:
        file.append(row)
    except (OSError, ValueError) as error:
        remedy = f"{remedy_for(error)}, then go on with --resume"
        raise RunFailed(f"{file.path} cannot be written: {shorten(error)}; {remedy}") from None


def remedy_for(error: BaseException) -> str:
    """What helps against a file that could not be written, by the kind of error."""
    if disk_is_full(error):
        return "make room"
    if getattr(error, "errno", None) in _FORBIDDEN:
        return "see that you may write there"
    return "see to the disk" if isinstance(error, OSError) else "mend what is named"


def cannot_write(folder: Path, error: Exception, resuming: bool = False) -> Exception:
    """What to raise where the folder of a run cannot be written: ValueError, of a full disk RunFailed."""
    what = f"output_dir={quote(str(folder))} cannot be written ({shorten(error)})"
    if disk_is_full(error):
        return RunFailed(f"{what}; make room on that disk, then give the same command again")
    if resuming:
        return ValueError(f"{what}; see that it can be written, then give the same command again")
    return ValueError(f"{what}; choose another --output-dir")
