"""Which sweeps can be trained by ranks that hold a model's blocks between them: the one place that says what cannot.

Ranks that work ahead of each other (:mod:`hbll_seq.distributed.lagged`) take *segments alone*: exact states, and no adjoint
that would have to come back from a later batch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hbll_seq.distributed.blocks import blocks_of_rank, largest_chunk
from hbll_seq.engine.linearization.base import Identity, Zero
from hbll_seq.objectives.auxiliary import segment_ends
from hbll_seq.objectives.branches import Branch, split_off
from hbll_seq.objectives.depth_mix import paths_of_mix, whole
from hbll_seq.objectives.options import Sweeps
from hbll_seq.tree.topology import DyadicTree


class Obstacle(NamedTuple):
    """What stands in the way.

    given: the options that do, with their values.
    why: they do.
    remedies: values of options each of which would do; ``"ranks"`` is how many there are.
    of_ahead: whether it is in the way of ranks ahead of each other alone.
    """

    given: dict[str, Any]
    why: str
    remedies: tuple[dict[str, Any], ...]
    of_ahead: bool = False

    def said(self, n_ranks: int) -> str:
        """A message by the names of Python."""
        given = " and ".join(f"{name}={value!r}" for name, value in self.given.items())
        words = (", ".join(_said(name, value) for name, value in values.items()) for values in self.remedies)
        remedy = f"use {', or '.join(words)}{', or leave ahead out' if self.of_ahead else ''}"
        return f"{'ahead=True' if self.of_ahead else f'{n_ranks} ranks'} with {given}: {self.why}; {remedy}"


def _said(name: str, value: Any) -> str:
    return f"{value} ranks" if name == "ranks" else f"{name}={value!r}"


def obstacle(
    sweeps: Sweeps,
    tree: DyadicTree,
    path: Sequence[int],
    mix: str,
    n_ranks: int,
    ahead: bool = False,
    shares: Sequence[int] | None = None,
) -> Obstacle | None:
    """The first thing that stands in the way of spreading sweeps over ranks, None where nothing does.

    Args:
        sweeps: resolved for depth.
        tree: of the model.
        path: block numbers of the main path.
        mix: name of the depth mix.
        n_ranks: R.
        ahead: whether the ranks are to work ahead of each other. Without a mix none of them but the last has an exit, and who
            asks for that is let.
        shares: segments that each rank holds, None for equal ones.

    Raises:
        ValueError: there are fewer segments than ranks, or ``shares`` do not fit them.
    """
    path, whole_model = tuple(path), "it needs all blocks on one rank"
    if not isinstance(sweeps.linearization, (Identity, Zero)):
        others = tuple({"linearization": kind.name} for kind in (Identity, Zero))
        return Obstacle({"linearization": sweeps.linearization.name}, whole_model, others)
    if sweeps.init == "tree":
        return Obstacle({"init": "tree"}, whole_model, ({"init": "first"}, {"init": "input"}))
    if sweeps.control is not None:
        return Obstacle({"control": sweeps.control.name}, whole_model, ({"control": None},))
    trained, branches, are_short = _paths(mix, tree.n_level, tree.family, path)
    if not are_short:
        return Obstacle({"default_paths": tree.family, "depths": mix}, "it trains paths that leave the main one for long",
                        ({"default_paths": "prefix", "depths": "octaves"}, {"depths": "none"}))  # fmt: skip
    blocks_of_rank(len(path), sweeps.chunk_size, 0, n_ranks, shares)  # refuses segments that do not fit the ranks
    if not ahead:
        return None
    if shares is not None:
        why = "a rank that goes on ahead holds one segment, or as many as the others"
        return Obstacle({"shares": shares}, why, ({"shares": None},), True)
    return _of_passes(sweeps, len(path), n_ranks) or _of_mix(sweeps, path, mix, trained, branches, n_ranks)


@functools.lru_cache(maxsize=8)  # settings are checked several times in a run, and ask for hundreds of paths where it is deep
def _paths(mix: str, n_level: int, family: str, path: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[Branch], bool]:
    """The paths that a mix may train, those of them that leave the main one as branches, and whether all of these do."""
    tree = DyadicTree(n_level, family)
    trained = paths_of_mix(mix, tree, path)
    if trained == "all":
        return [], [], False
    trained = [tree.path_for_depth(k) for k in range(1, tree.N)] if trained == "default" else list(trained)
    leaving = [whole(other) for other in trained if other != path[: len(other)]]
    branches, others = split_off(path, leaving, n_level)
    return trained, branches, not others


def _alone(length: int, size: int) -> dict[str, Any]:
    """Sweeps whose segments of ``size`` of ``length`` blocks are alone."""
    return {"chunk_size": size, "forward": -(-length // size) - 1, "backward": 0, "linearization": "zero"}


def _of_passes(sweeps: Sweeps, length: int, n_ranks: int) -> Obstacle | None:
    """What other passes than those of segments alone need of ranks that are ahead of each other."""
    size, n_segments = sweeps.chunk_size, -(-length // sweeps.chunk_size)
    remedy, linearization = _alone(length, size), sweeps.linearization.name
    if size == 1:
        part = min(-(-length // n_ranks), largest_chunk(length, n_ranks))
        longer = _alone(length, part) if part > 1 else {"ranks": 2, **_alone(length, -(-length // 2))}
        return Obstacle({"chunk_size": 1}, "passes over single blocks exchange their states", (longer,), True)
    if linearization != Zero.name:
        return Obstacle({"linearization": linearization}, "segments would send each other adjoints", (remedy,), True)
    if sweeps.backward > 0:
        return Obstacle({"backward": sweeps.backward}, "a rank is at another batch when an adjoint comes", (remedy,), True)
    if sweeps.forward < n_segments - 1:
        why = f"the states of {n_segments} segments would be estimates"
        return Obstacle({"forward": sweeps.forward}, why, (remedy,), True)
    if sweeps.damping != 1:
        return Obstacle({"damping": sweeps.damping}, "states would be estimates", ({**remedy, "damping": 1},), True)
    if sweeps.tolerance > 0:
        why = "ranks would have to agree when to stop"
        return Obstacle({"tolerance": sweeps.tolerance}, why, ({**remedy, "tolerance": 0},), True)
    return None


def _of_mix(
    sweeps: Sweeps, path: tuple[int, ...], mix: str, trained: Sequence[tuple[int, ...]], branches: Sequence[Branch],
    n_ranks: int,
) -> Obstacle | None:  # fmt: skip
    """What a depth mix needs of ranks that are ahead of each other, or would not train.

    Args:
        sweeps, path, mix, n_ranks: see :func:`obstacle`.
        trained: the paths of the mix.
        branches: those of them that leave the main path.
    """
    length, size = len(path), sweeps.chunk_size
    owned = [blocks_of_rank(length, size, r, n_ranks) for r in range(n_ranks)]
    rank_of = {path[position]: r for r, own in enumerate(owned) for position in own}
    halves = {**({"ranks": 2} if n_ranks > 2 else {}), **_alone(length, -(-length // 2))}
    octaves = {"default_paths": "prefix", "depths": "octaves", **halves}
    on_path = {"depths": "prefixes", "auxiliary_exits": 1}
    # Of a branch nothing comes back to another rank.
    left = {branch.before[-1] for branch in branches if branch.start}
    heard = left - {path[own.stop - 1] for own in owned} | {other[-1] for other in trained if other == path[: len(other)]}
    never = [n for n in segment_ends(path, size) if n not in heard]
    if never and mix != "none" and not sweeps.auxiliary_exits:
        why = f"no path of the depth mix ends in block {never[0]}, the last of its segment, so that it would never be trained"
        if n_ranks == 2 and size == halves["chunk_size"]:
            return Obstacle({"depths": mix}, why, (octaves, on_path), True)
        return Obstacle({"chunk_size": size}, why, (halves, on_path), True)
    for branch in branches:
        if _strays(branch, path, rank_of):
            why = (f"it trains the path {list(branch.whole)}, which would need another state of the rank before than that "
                   "behind its last block, which alone is sent")  # fmt: skip
            return Obstacle({"depths": mix}, why, (octaves, on_path), True)
    return None


def _strays(branch: Branch, path: Sequence[int], rank_of: Mapping[int, int]) -> bool:
    """Whether a branch goes from rank to rank elsewhere than from the end of one, where the next one begins."""
    ranks = {rank_of[n] for n in branch.path}
    if not branch.start:
        return ranks != {0}  # which has the embedded input
    last = branch.before[-1]
    at_end = rank_of[path[path.index(last) + 1]] > rank_of[last]
    return ranks != {rank_of[last] + at_end}
