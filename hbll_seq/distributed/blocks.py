"""Which blocks of a path a rank holds, and a model without the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hbll_seq.utils.modules import plain_module
from hbll_seq.utils.reading import quote
from hbll_seq.utils.tensors import module_tensors

#: beginnings of names, in an objective, of what belongs to single blocks and lies with them; the rest lies on every rank
OF_BLOCKS = ("model.blocks.", "auxiliary.blocks.")


class RemoteBlock(nn.Module):
    """Stands for a block that another rank holds, so that a rank's own keep their numbers; it has no parameters.

    Args:
        n: its number.
        block: what it stands for. It is not kept.

    Attributes:
        kind: class of the block.
        n_parameters: of the block.
        tensors: its parameters and persistent buffers by name, on the meta device.
    """

    def __init__(self, n: int, block: nn.Module):
        super().__init__()
        self.n, self.kind = n, type(plain_module(block))
        self.n_parameters = sum(p.numel() for p in block.parameters())
        self.tensors = _without_values(block)

    def initial_state(self, start: Any = None) -> Any:
        """Raises ValueError: the block is elsewhere."""
        raise ValueError(
            f"block {self.n} is held by another rank of this run (--block-parallel): gather the whole model first "
            "(hbll_seq.distributed.whole), or use the model that the run has saved"
        )

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """Raises ValueError: the block is elsewhere."""
        return self.initial_state()

    def extra_repr(self) -> str:
        """Its number, for ``print(model)``."""
        return f"{self.n}"


def segments_of_rank(n_segments: int, rank: int, n_ranks: int, shares: Sequence[int] | None = None) -> range:
    """Rank r of R holds the segments r S // R to (r + 1) S // R - 1 of S: their numbers differ by one at most.

    Args:
        n_segments, rank, n_ranks: S, r and R.
        shares: how many each rank holds instead, from the first rank on.

    Raises:
        ValueError: ``shares`` are not R numbers of at least 1 that add up to S.
    """
    if shares is not None:
        if len(shares) != n_ranks or min(shares) < 1 or sum(shares) != n_segments:
            given = quote(",".join(map(str, shares)))
            raise ValueError(
                f"block_shares={given} with block_parallel={n_ranks}: must be {n_ranks} numbers of at least 1 that add up to "
                f"the {n_segments} segments of the path; change them or --chunk-size, or give --block-shares none for equal "
                "ones"
            )
        return range(sum(shares[:rank]), sum(shares[: rank + 1]))
    return range(rank * n_segments // n_ranks, (rank + 1) * n_segments // n_ranks)


def blocks_of_rank(
    path_length: int, chunk_size: int, rank: int, n_ranks: int, shares: Sequence[int] | None = None
) -> range:
    """The positions on the path, from 0, of the blocks that a rank holds.

    A path of N blocks is cut into S = ceil(N / c) segments of c blocks from its beginning; a rank holds whole ones, see
    :func:`segments_of_rank`.

    Args:
        path_length: N.
        chunk_size: c.
        rank, n_ranks: r and R.
        shares: segments that each rank holds, as equal as they go where None.

    Raises:
        ValueError: there are fewer segments than ranks, or ``shares`` do not fit them.
    """
    n_segments = -(-path_length // chunk_size)
    if n_segments < n_ranks:
        fits = path_length // n_ranks
        smaller = f"give a --chunk-size of at most {largest_chunk(path_length, n_ranks)}, " if fits else ""
        raise ValueError(
            f"block_parallel={n_ranks} with chunk_size={chunk_size}: {path_length} blocks make {n_segments} "
            f"segment{'s' * (n_segments != 1)} of at most {chunk_size}, and every rank needs one at least; {smaller}a larger "
            f"--n-level, or {'no --block-parallel' if n_segments == 1 else f'a --block-parallel of at most {n_segments}'}"
        )
    own = segments_of_rank(n_segments, rank, n_ranks, shares)
    return range(own.start * chunk_size, min(own.stop * chunk_size, path_length))


def largest_chunk(path_length: int, n_ranks: int) -> int:
    """The largest size of a segment with which a path has a segment for every rank; there must be a block for each."""
    return max(c for c in range(1, path_length + 1) if -(-path_length // c) >= n_ranks)


def numbers_kept(n_blocks: int, path: Sequence[int], owned: range) -> list[int]:
    """Numbers, from 1, of the blocks that a rank keeps: its own ones on the path. The rank that has the path's first block
    keeps those beside the path too: nobody trains them, but they belong to the model and its files."""
    own = {path[position] for position in owned}
    beside = set(range(1, n_blocks + 1)) - set(path) if owned.start == 0 else set()
    return sorted(own | beside)


def keep_own(model: nn.Module, path: Sequence[int], owned: range) -> None:
    """Replace every block that this rank does not keep (:func:`numbers_kept`) by a :class:`RemoteBlock`, so that its memory
    is free.

    Args:
        model: with ``blocks``, such as a :class:`DepthHierarchy`; a rank holds all of it otherwise.
        path: block numbers of the main path.
        owned: positions on it, as :func:`blocks_of_rank` gives them.

    Raises:
        ValueError: a parameter is in blocks of several ranks, of which this one keeps one, or in a block and outside of all:
            there would be two of it, which are trained apart; or the model was made without a block that is to be kept. The
            model is unchanged.
    """
    kept = numbers_kept(len(model.blocks), path, owned)
    if lost := [n for n in kept if isinstance(model.blocks[n - 1], RemoteBlock)]:
        raise ValueError(f"block {lost[0]} is to be kept by this rank, but the model was made without it: give the model's "
                         f"class own={kept}, or leave own out")
    owners: dict[int, set[bool | None]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else None
        owners.setdefault(id(parameter), set()).add(None if block is None else block in kept)
        if len(owners[id(parameter)]) > 1:
            raise ValueError(
                f"the parameter {name!r} is also one of another part of the model: on different ranks the two would be "
                "trained apart; give each part its own, or use one rank"
            )
    for n in range(1, len(model.blocks) + 1):
        if n not in kept and not isinstance(model.blocks[n - 1], RemoteBlock):
            model.blocks[n - 1] = RemoteBlock(n, model.blocks[n - 1])


def _without_values(module: nn.Module) -> dict[str, Tensor]:
    # detached: a copy with a history would keep the values
    return {name: tensor.detach().to("meta") for name, tensor in module_tensors(module).items()}


def kind_of(block: nn.Module) -> type[nn.Module]:
    """The class of a block, wherever it is held."""
    return block.kind if isinstance(block, RemoteBlock) else type(plain_module(block))


def whole_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of ``module`` by name, those of other ranks' blocks in it included, on the meta
    device."""
    found = _without_values(module)
    for place, block in module.named_modules():
        if isinstance(block, RemoteBlock):
            found.update({f"{place}.{name}": tensor for name, tensor in block.tensors.items()})
    return found
