"""Which sweeps can be trained by ranks that work ahead of each other (:mod:`hbll_seq.distributed.lagged`).

They are those of *segments alone*: exact states, and no adjoint that would have to come back from a later batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from hbll_seq.distributed.blocks import blocks_of_rank
from hbll_seq.engine.linearization.base import Zero
from hbll_seq.layers.recurrent_block import RecurrentBlock
from hbll_seq.objectives.branches import Branch
from hbll_seq.objectives.options import Sweeps
from hbll_seq.utils.modules import plain_module


class Obstacle(NamedTuple):
    """``what`` stands in the way, ``why``, and values of the sweeps that would do, by name; ``ranks``: and how many ranks."""

    what: str
    why: str
    remedy: dict[str, Any]
    ranks: int | None = None


def obstacle(sweeps: Sweeps, path: Sequence[int], ends: Iterable[int], n_ranks: int) -> Obstacle | None:
    """The first thing about sweeps that stands in the way, None where nothing does.

    Args:
        sweeps: resolved for depth.
        path: block numbers of the main path.
        ends: of the paths that a step may train beside it, the last blocks. Where there are none no rank but the last has an
            exit, and who asks for that is let.
        n_ranks: R.
    """
    length, size, ends = len(path), sweeps.chunk_size, set(ends)

    def found(what: str, why: str, size: int = size, ranks: int | None = None, **more: Any) -> Obstacle:
        exact = {"chunk_size": size, "forward": -(-length // size) - 1, "backward": 0, "linearization": "zero"}
        return Obstacle(what, why, {**exact, **more}, ranks)

    part = -(-length // n_ranks)
    if size == 1:
        return found("chunk_size=1", "passes over single blocks exchange their states", part)
    if not isinstance(sweeps.linearization, Zero):
        return found(f"linearization={sweeps.linearization.name!r}", "segments would send each other adjoints")
    if sweeps.backward > 0:
        return found(f"backward={sweeps.backward}", "a rank is at another batch when an adjoint comes")
    if sweeps.forward < -(-length // size) - 1:
        return found(f"forward={sweeps.forward}", f"the states of {-(-length // size)} segments would be estimates")
    if sweeps.damping != 1:
        return found(f"damping={sweeps.damping}", "states would be estimates", damping=1)
    if sweeps.tolerance > 0:
        return found(f"tolerance={sweeps.tolerance}", "ranks would have to agree when to stop", tolerance=0)
    lasts = [path[blocks_of_rank(length, size, r, n_ranks).stop - 1] for r in range(n_ranks - 1)]
    never = [n for n in lasts if ends and n not in ends]
    if never and not sweeps.auxiliary_exits:
        why = f"no path of the depth mix ends in block {never[0]}, its rank's last, so that it would never be trained"
        return found(f"chunk_size={size}", why, -(-length // 2), 2 if n_ranks > 2 else None)
    return None


def check_ahead(
    sweeps: Sweeps,
    blocks: Iterable[nn.Module],
    path: Sequence[int],
    ends: Iterable[int],
    branches: Iterable[Branch],
    n_ranks: int,
) -> None:
    """Raises ValueError for what ranks that work ahead of each other cannot do.

    Args:
        sweeps, path, ends, n_ranks: see :func:`obstacle`.
        blocks: of the model.
        branches: off the main path, all that a step may have.
    """
    if any(isinstance(plain_module(block), RecurrentBlock) for block in blocks):
        raise ValueError("ahead=True with recurrent blocks: ranks exchange estimates of their states; use blocks without "
                         "recurrence, or leave ahead out")  # fmt: skip
    if found := obstacle(sweeps, path, ends, n_ranks):
        values = ", ".join(f"{name}={value!r}" for name, value in found.remedy.items())
        ranks = "" if found.ranks is None else f"{found.ranks} ranks and "
        raise ValueError(f"ahead=True with {found.what}: {found.why}; use {ranks}{values}, or leave ahead out")
    owned = [blocks_of_rank(len(path), sweeps.chunk_size, r, n_ranks) for r in range(n_ranks)]
    rank_of = {path[position]: r for r, own in enumerate(owned) for position in own}
    for branch in branches:
        if _strays(branch, path, rank_of):
            raise ValueError(f"ahead=True with a depth mix that trains the path {list(branch.whole)}: it would need another "
                             "state of the rank before than that behind its last block, which alone is sent; use "
                             "'prefixes' (with auxiliary_exits=1 on more than two ranks), on two ranks "
                             "default_paths='prefix' with 'octaves', 'all' or 'few', or leave ahead out")  # fmt: skip


def _strays(branch: Branch, path: Sequence[int], rank_of: Mapping[int, int]) -> bool:
    """Whether a branch goes from rank to rank elsewhere than from the end of one, where the next one begins."""
    ranks = {rank_of[n] for n in branch.path}
    if not branch.start:
        return ranks != {0}  # which has the embedded input
    last = branch.before[-1]
    at_end = rank_of[path[path.index(last) + 1]] > rank_of[last]
    return ranks != {rank_of[last] + at_end}
