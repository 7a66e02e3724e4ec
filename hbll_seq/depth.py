"""The hierarchy over depth: any list of blocks between an embedding and a head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hbll_seq.cells.base import Cell
from hbll_seq.messages import Chain
from hbll_seq.posterior import STATE_FAMILIES, TARGET_FAMILIES
from hbll_seq.seeds import fork_rng_of, mix_seeds
from hbll_seq.tree import DyadicTree


class DepthChain(Chain):
    """The blocks as transitions; f_n is ``blocks[n - 1]``.

    The blocks of one call do not depend on each other. On one device they are queued one after the other here.
    """

    def __init__(self, blocks: nn.ModuleList, dropout_seed: int | None = None):
        self.blocks = blocks
        self.dropout_seed = dropout_seed

    def with_dropout(self, seed: int) -> DepthChain:
        """The same blocks, each drawing the same dropout at all its evaluations: a sweep refines a state, not its noise."""
        return DepthChain(self.blocks, seed)

    def apply(self, indices: Sequence[int], states: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`Chain.apply`; states are [batch, ..., width]."""
        return [self._run(n, state) for n, state in zip(indices, states)]

    def _run(self, n: int, state: Tensor) -> Tensor:
        block = self.blocks[n - 1]
        with fork_rng_of(state) if self.dropout_seed is not None else contextlib.nullcontext():
            if self.dropout_seed is not None:
                torch.manual_seed(mix_seeds(self.dropout_seed, n))
            return block(state)[0] if isinstance(block, Cell) else block(state)


class DepthHierarchy(nn.Module):
    """``N - 1`` blocks of equal input and output width, an embedding before them and a prediction head behind.

    Args:
        blocks: ``2**D - 1`` modules, each a map of [batch, ..., width] to the same shape (or a :class:`Cell`).
        head: module from a state to the parameters of ``p(y | z_{N-1})``, such as logits; shared by all depths.
        embed: module from the raw input to z_0, which must have the states' width; None where the input has it already.
        state_family: ``"gaussian"`` or ``"bernoulli"`` (states are then logits): what inner states are.
        default_paths: which path a depth names, ``"spine"`` or ``"prefix"``; see :meth:`DyadicTree.path_for_depth`.
        width: of the states; only ``linearization="secant"`` asks for it.
        target_family: what y is and the head predicts: ``"categorical"`` (class numbers, logits), ``"gaussian"`` (vectors,
            their means) or ``"bernoulli"`` (vectors of bits, logits).

    Raises:
        ValueError: the number of blocks is not ``2**D - 1``, or a family is unknown.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        head: nn.Module,
        embed: nn.Module | None = None,
        *,
        state_family: str = "gaussian",
        target_family: str = "categorical",
        default_paths: str = "spine",
        width: int | None = None,
    ):
        super().__init__()
        blocks = nn.ModuleList(blocks)
        n_level = (len(blocks) + 1).bit_length() - 1
        if len(blocks) < 1 or 2**n_level - 1 != len(blocks):
            raise ValueError(
                f"{len(blocks)} blocks: a binary tree needs 2**D - 1 of them (1, 3, 7, 15, ..); "
                f"use {2**n_level - 1} or {2 ** (n_level + 1) - 1}"
            )
        for name, value, allowed in (
            ("state_family", state_family, STATE_FAMILIES),
            ("target_family", target_family, TARGET_FAMILIES),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")
        self.tree, self.width = DyadicTree(n_level, default_paths), width
        self.state_family, self.target_family = STATE_FAMILIES[state_family](), TARGET_FAMILIES[target_family]()
        self.embed = embed if embed is not None else nn.Identity()
        self.blocks = blocks
        self.head = head
        self.chain = DepthChain(blocks)

    def resolve_path(self, depth: int | None = None, path: Sequence[int] | None = None) -> tuple[int, ...]:
        """The path that ``depth`` or ``path`` names; the full one where both are None.

        Raises:
            ValueError: both are given, or the one given is not possible in this tree.
        """
        if depth is not None and path is not None:
            raise ValueError(f"depth={depth!r} and path={path!r} are both given: choose one of them")
        if path is not None:
            return self.tree.validate_path(path)
        return self.tree.path_for_depth(self.tree.n_nodes if depth is None else depth)

    def prepare(self, inputs: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the chain reads and what its head is scored on; a language model shifts here."""
        if labels is None:
            raise ValueError("labels=None: this model needs labels to be scored on; pass them")
        return inputs, labels

    def before_head(self, state: Tensor, path: Sequence[int]) -> Tensor:
        """What the head reads of the state after the blocks ``path``: the state itself, unless a model says otherwise."""
        return state

    def read_out(self, state: Tensor, path: Sequence[int]) -> Tensor:
        """The head's output for the state after the blocks ``path``."""
        return self.head(self.before_head(state, path))

    def score(self, state: Tensor, targets: Tensor, path: Sequence[int]) -> Tensor:
        """Discrepancy of the prediction after the blocks ``path``, summed over positions (classes: -2 log p(y | state))."""
        return self.target_family.discrepancy(self.read_out(state, path), targets).sum()

    def n_scored(self, state: Tensor, targets: Tensor) -> Tensor | int:
        """How many positions of ``state`` [..., width] have a target."""
        return self.target_family.n_scored(state.shape[:-1].numel(), targets)

    def run(self, inputs: Tensor, path: Sequence[int] | None = None) -> Tensor:
        """The plain network along ``path`` (default: full): raw inputs -> the head's output."""
        state, path = self.embed(inputs), self.resolve_path(path=path)
        for n in path:
            (state,) = self.chain.apply((n,), (state,))
        return self.read_out(state, path)

    def forward(self, inputs: Tensor, path: Sequence[int] | None = None) -> Tensor:
        """Same as :meth:`run`."""
        return self.run(inputs, path)
