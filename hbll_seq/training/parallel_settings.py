"""Which settings a run can have whose blocks are spread over ranks (``--block-parallel``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hbll_seq.distributed.blocks import blocks_of_rank
from hbll_seq.objectives.ahead import obstacle
from hbll_seq.objectives.depth_mix import paths_of_mix
from hbll_seq.objectives.options import Sweeps
from hbll_seq.tree.topology import DyadicTree

#: linearizations whose answer a rank can give for its own blocks; the others learn from all
_LINEARIZATIONS = ("zero", "identity")


def check_block_parallel(settings: Any, decided: dict[str, Any]) -> None:
    """Raises ValueError for what cannot be spread over several ranks, or not so that they work ahead of each other.

    Args:
        settings: a :class:`hbll_seq.training.settings.TrainingSettings`.
        decided: what became of those of its values that were left open.
    """

    def refuse(what: str, why: str, remedy: str) -> None:
        raise ValueError(f"block_parallel={settings.block_parallel} with {what}: {why}; {remedy}, or --block-parallel 1")

    def of(name: str) -> Any:
        return decided.get(name, getattr(settings, name))

    if settings.block_parallel == 1:
        raise ValueError("ahead=True with block_parallel=1: one rank has nobody to be ahead of; give --block-parallel 2, or "
                         "--no-ahead")  # fmt: skip
    if settings.objective != "sweeps":
        refuse(f"objective={settings.objective!r}", "only the segments of sweeps can work on several ranks",
               "use --objective sweeps")
    if of("linearization") not in _LINEARIZATIONS:
        refuse(f"linearization={of('linearization')!r}", "its maps are learned from the states of all blocks",
               f"use --linearization {' or '.join(_LINEARIZATIONS)}")
    if settings.control != "none":
        refuse(f"control={settings.control!r}", "it compares gradients of all blocks, and no rank has them",
               "use --control none")
    if settings.init == "tree":
        refuse("init='tree'", "the tree's jumps run through blocks of all ranks", "use --init first or input")
    # of the mix "prefixes" every exit lies on the path itself
    if of("depth_mix") not in ("none", "prefixes") and of("default_paths") == "spine":
        refuse(f"default_paths='spine' and depth_mix={of('depth_mix')!r}",
               "its short paths jump over blocks, and so over ranks", "use --default-paths prefix, or --depth-mix none")
    length = 2**settings.n_level - 1 if settings.path_blocks is None else len(settings.path_blocks)
    blocks_of_rank(length, of("chunk_size"), 0, settings.block_parallel)
    if settings.ahead:
        _check_ahead(settings, of)


def _check_ahead(settings: Any, of: Callable[[str], Any]) -> None:
    """Raises ValueError for what ranks that work ahead of each other cannot do, or would not train."""

    def refuse(what: str, why: str, remedy: str) -> None:
        given = f"block_parallel={settings.block_parallel} with ahead=True"
        raise ValueError(f"{given} and {what}: {why}; {remedy}, or --no-ahead")

    if settings.has_recurrence:
        refuse(f"cell={settings.cell!r}", "ranks exchange estimates of recurrent blocks' states", "use --cell transformer")
    if of("depth_mix") == "none" and not settings.auxiliary_exits:
        refuse("depth_mix='none'", "every rank needs an exit of its own, and all but the last would never be trained",
               "use --depth-mix octaves" if settings.path_blocks is None else "use --path full with --depth-mix octaves")
    tree = DyadicTree(settings.n_level, of("default_paths"))
    main = tree.path_for_depth(tree.n_nodes)
    paths = paths_of_mix(of("depth_mix"), tree, main)
    if paths == "default":
        paths = [tree.path_for_depth(depth) for depth in range(1, tree.N)]
    sweeps = Sweeps(of("forward"), of("backward"), of("chunk_size"), of("linearization"),
                    auxiliary_exits=settings.auxiliary_exits)  # fmt: skip
    ends = [] if paths == "all" else [path[-1] for path in paths]  # the objective refuses all
    if found := obstacle(sweeps, main, ends, settings.block_parallel):
        values = {} if found.ranks is None else {"block_parallel": found.ranks}
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in {**values, **found.remedy}.items())
        refuse(found.what, found.why, f"use {flags}")
