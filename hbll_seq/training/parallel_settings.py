"""Which settings a run can have whose blocks are spread over ranks (``--block-parallel``)."""

from __future__ import annotations

from typing import Any

from hbll_seq.distributed.blocks import blocks_of_rank

#: linearizations whose answer a rank can give for its own blocks; the others learn from all
_LINEARIZATIONS = ("zero", "identity")


def check_block_parallel(settings: Any, decided: dict[str, Any]) -> None:
    """Raises ValueError for what cannot be spread over several ranks.

    Args:
        settings: a :class:`hbll_seq.training.settings.TrainingSettings`.
        decided: what became of those of its values that were left open.
    """

    def refuse(what: str, why: str, remedy: str) -> None:
        raise ValueError(f"block_parallel={settings.block_parallel} with {what}: {why}; {remedy}, or --block-parallel 1")

    def of(name: str) -> Any:
        return decided.get(name, getattr(settings, name))

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
    if of("depth_mix") != "none" and of("default_paths") == "spine":
        refuse(f"default_paths='spine' and depth_mix={of('depth_mix')!r}",
               "its short paths jump over blocks, and so over ranks", "use --default-paths prefix, or --depth-mix none")
    length = 2**settings.n_level - 1 if settings.path_blocks is None else len(settings.path_blocks)
    blocks_of_rank(length, of("chunk_size"), 0, settings.block_parallel)
