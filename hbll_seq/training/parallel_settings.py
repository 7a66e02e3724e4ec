"""Which settings a run can have whose blocks are spread over ranks (``--block-parallel``)."""

from __future__ import annotations

from typing import Any

from hbll_seq.objectives.options import Sweeps
from hbll_seq.objectives.spread import Obstacle, obstacle
from hbll_seq.tree.topology import DyadicTree
from hbll_seq.utils.reading import quote

#: options of Python that have another name as a setting
_SETTINGS = {"depths": "depth_mix", "ranks": "block_parallel", "shares": "block_shares"}


def check_block_parallel(settings: Any, decided: dict[str, Any]) -> None:
    """Raises ValueError for what cannot be spread over several ranks, or not so that they work ahead of each other.

    Args:
        settings: a :class:`hbll_seq.training.settings.TrainingSettings`.
        decided: what became of those of its values that were left open.
    """
    n_ranks, ahead = settings.block_parallel, settings.ahead

    def of(name: str) -> Any:
        return decided.get(name, getattr(settings, name))

    if n_ranks == 1 and settings.block_shares is not None:
        raise ValueError(f"block_shares={quote(settings.block_shares)} with block_parallel=1: one rank holds all segments; "
                         "give --block-parallel, or --block-shares none")  # fmt: skip
    if n_ranks == 1:
        raise ValueError("ahead=True with block_parallel=1: one rank has nobody to be ahead of; give --block-parallel 2, or "
                         "--no-ahead")  # fmt: skip
    if settings.objective != "sweeps":
        raise ValueError(f"block_parallel={n_ranks} with objective={settings.objective!r}: only the segments of sweeps can "
                         "work on several ranks; use --objective sweeps, or --block-parallel 1")  # fmt: skip
    tree = DyadicTree(settings.n_level, of("default_paths"))
    path, mix = settings.path_blocks or tree.path_for_depth(tree.n_nodes), of("depth_mix")
    sweeps = Sweeps(of("forward"), of("backward"), of("chunk_size"), of("linearization"), settings.init,
                    control=settings.control_object(), auxiliary_exits=settings.auxiliary_exits,
                    auxiliary_blocks=settings.auxiliary_blocks)  # fmt: skip
    found = obstacle(sweeps, tree, path, mix, n_ranks, ahead, settings.shares)
    if ahead and not (found and not found.of_ahead):
        found = _of_ahead(settings, mix) or found
    if found:
        raise ValueError(_said(found, n_ranks))


def _of_ahead(settings: Any, mix: str) -> Obstacle | None:
    """What ranks that work ahead of each other cannot do, or would not train, that is seen by settings alone."""
    if settings.has_recurrence:
        return Obstacle({"cell": settings.cell}, "ranks exchange estimates of recurrent blocks' states",
                        ({"cell": "transformer"},), True)  # fmt: skip
    if mix == "none" and not settings.auxiliary_exits:
        mixed = {"depths": "octaves"} if settings.path_blocks is None else {"path": "full", "depths": "octaves"}
        why = "every rank needs an exit of its own, and all but the last would never be trained"
        return Obstacle({"depths": "none"}, why, (mixed, {"auxiliary_exits": 1}), True)
    return None


def _said(found: Obstacle, n_ranks: int) -> str:
    """A message by the names of settings."""
    given = " and ".join(f"{_SETTINGS.get(name, name)}={_word(value)!r}" for name, value in found.given.items())
    remedies = (" ".join(f"--{_SETTINGS.get(name, name).replace('_', '-')} {_word(value)}" for name, value in values.items())
                for values in found.remedies)  # fmt: skip
    without = "--no-ahead" if found.of_ahead else "--block-parallel 1"
    ahead = "ahead=True and " if found.of_ahead else ""
    return f"block_parallel={n_ranks} with {ahead}{given}: {found.why}; use {', or '.join(remedies)}, or {without}"


def _word(value: Any) -> Any:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else value
