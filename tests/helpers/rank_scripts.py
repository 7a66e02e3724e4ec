"""How a helper is run as a script in several real processes over gloo, and what each of them finds comes back."""

import sys
from datetime import timedelta
from pathlib import Path

import forked
import kill_and_resume as kr
import torch
from torch import distributed


def found_by(script, n, arguments, folder):
    """What each of ``n`` processes of a script that ends in :func:`as_rank` finds."""
    codes, said = forked.group(n, [script, str(folder), *map(str, arguments)], kr.environment_of_scripts(), timeout=300)
    assert codes == [0] * n, "\n".join(said)
    return [torch.load(Path(folder) / f"found-{process}.pt", weights_only=True) for process in range(n)]


def as_rank(work):
    """Joins the group of the environment and saves what ``work`` of the script's arguments returns."""
    folder, *arguments = sys.argv[1:]
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.save(work(arguments), Path(folder) / f"found-{distributed.get_rank()}.pt")
    distributed.destroy_process_group()
