"""What a checkpoint of a run holds beside its tensors, and whether it can be what a run has written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hbll_seq.chains.depth import Prefix
from hbll_seq.training.checkpoint import CheckpointError
from hbll_seq.training.initial_model import check_record
from hbll_seq.training.random_state import check_rng_state
from hbll_seq.utils.reading import quote

_TEXTS = ("preset", "precision", "device", "tokenizer", "data")
_COUNTS = ("num_processes", "threads")
_LONGEST, _LONGEST_PATH = 128, 4096  # characters of a name or fingerprint; a preset may be the path of a file
_MOST_SECONDS = 1e12
_CARRIED = re.compile(r"([0-9]{1,6})\|([0-9]{1,6}(?:,[0-9]{1,6})*)")


def check_run_state(state: dict[str, Any]) -> None:
    """Raises CheckpointError where an entry that a run has written is missing from ``state`` or of another kind."""

    def refuse(name: str, allowed: str) -> None:
        found = f"is {quote(state[name])}" if name in state else "is missing"
        raise CheckpointError(f"the checkpoint's state.json is damaged: {name} {found}; it must be {allowed}")

    for name in _TEXTS:
        longest = _LONGEST_PATH if name == "preset" else _LONGEST
        if not isinstance(state.get(name), str) or len(state[name]) > longest:
            refuse(name, f"text of at most {longest} characters")
    for name in _COUNTS:
        if type(state.get(name)) is not int or state[name] < 1:
            refuse(name, "a whole number above 0")
    if not isinstance(state.get("settings"), dict):
        refuse("settings", "the run's settings")
    n_ranks = state["settings"].get("block_parallel", 1)
    if type(n_ranks) is not int or n_ranks < 1 or state["num_processes"] % n_ranks:
        refuse("num_processes", f"a multiple of block_parallel, which is {quote(n_ranks)}")
    extended = state.get("extended", [])
    if not isinstance(extended, list) or any(type(steps) is not int or steps < 1 for steps in extended):
        refuse("extended", "a list of whole numbers above 0")
    seconds = state.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < _MOST_SECONDS:
        refuse("seconds", "a number of at least 0")
    check_record(state)
    rng = state.get("rng")
    if not isinstance(rng, list) or len(rng) != state["num_processes"]:
        refuse("rng", f"a list of the {state['num_processes']} processes' random generators")
    for of_process in rng:
        try:
            check_rng_state(of_process)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint's state.json is damaged: {error}") from None


def name_carried(micro: int, prefix: Prefix) -> str:
    """Name in a checkpoint of the state that micro batch ``micro`` carries after the blocks ``prefix``."""
    return f"{micro}|{','.join(map(str, prefix))}"


def read_carried(
    tensors: Mapping[str, Tensor], micro_batches: int, shape: tuple[int, ...], blocks: int
) -> list[tuple[int, Prefix, Tensor]]:
    """Inverse of :func:`name_carried` for all of a checkpoint's carried states.

    Raises:
        CheckpointError: one has another shape, or belongs to no micro batch or path of this run.
    """
    found = []
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"carried state {quote(name)} of shape {tuple(tensor.shape)} does not fit this run, which carries {shape}: "
                "it belongs to a run of another batch or model"
            )
        match = _CARRIED.fullmatch(name)
        micro, prefix = (int(match[1]), tuple(map(int, match[2].split(",")))) if match else (micro_batches, ())
        rising = all(one < other for one, other in zip((0, *prefix), prefix))
        if micro >= micro_batches or not rising or prefix[-1] > blocks or name != name_carried(micro, prefix):
            raise CheckpointError(f"carried state {quote(name)} belongs to no path of this run: it belongs to a run of "
                                  "another batch or model")
        found.append((micro, prefix, tensor))
    return found
