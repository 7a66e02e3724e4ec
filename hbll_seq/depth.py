"""The hierarchy over depth: any list of blocks between an embedding and a head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hbll_seq.cells import Cell, RecurrentBlock, RecurrentState
from hbll_seq.messages import Chain
from hbll_seq.posterior import STATE_FAMILIES, TARGET_FAMILIES
from hbll_seq.reading import quote
from hbll_seq.seeds import fork_rng_of, mix_seeds
from hbll_seq.tree import DyadicTree
from hbll_seq.values import check_choice, whole_or_none

#: The blocks that were walked up to and with one of them. Recurrent blocks keep a state for each: block 4 reads z_0 on one
#: path and z_3 on another (method.md 1.4).
Prefix = tuple[int, ...]


def prefixes(path: Sequence[int]) -> list[Prefix]:
    """The beginnings of a path, the shortest first and the path itself last."""
    return [tuple(path[:i]) for i in range(1, len(path) + 1)]


def plain_module(module: nn.Module) -> nn.Module:
    """The module inside of what ``torch.compile`` makes of it; any other as it is."""
    return getattr(module, "_orig_mod", module)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No gradient and no dropout inside; training flags are put back as they were.

    Not ``inference_mode``: a tensor that a block caches in there could not be used in training afterwards.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class DepthChain(Chain):
    """The blocks as transitions; f_n is ``blocks[n - 1]``.

    A transition is named by its block's number n, or by the blocks walked up to it, a :data:`Prefix` that ends in n. With
    the latter, recurrent blocks start from the state carried for it and leave their last one in ``last``; with a number
    they start from zero.

    The blocks of one call do not depend on each other. On one device they are queued one after the other here.

    Args:
        blocks: f_1, f_2, ..
        dropout_seed: each block draws the same dropout at all its evaluations: a sweep refines a state, not its noise. None
            draws from torch's global generator.
        carried: states [B, C] that recurrent blocks start from; none is zero.

    Attributes:
        last: states [B, C] after the last token, detached, of what was evaluated.
    """

    def __init__(
        self, blocks: nn.ModuleList, dropout_seed: int | None = None, carried: Mapping[Prefix, Tensor] | None = None
    ):
        self.blocks, self.dropout_seed, self.carried = blocks, dropout_seed, dict(carried or {})
        self.last: dict[Prefix, Tensor] = {}

    def apply(self, indices: Sequence[Prefix | int], states: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`Chain.apply`; states are [batch, ..., width]."""
        calls = [self.bind(index) for index in indices]
        return [call(state) for call, state in zip(calls, states)]

    def bind(self, index: Prefix | int) -> Callable[[Tensor], Tensor]:
        """See :meth:`Chain.bind`."""
        return lambda state: self._run(index, state)

    def _run(self, index: Prefix | int, state: Tensor, *hints: Tensor | None) -> Tensor:
        n = self.number(index)
        block = self.blocks[n - 1]
        kind = plain_module(block)
        with fork_rng_of(state) if self.dropout_seed is not None else contextlib.nullcontext():
            if self.dropout_seed is not None:
                torch.manual_seed(mix_seeds(self.dropout_seed, n))
            if isinstance(kind, RecurrentBlock):
                return self._recurrence(block, index, state, *hints)
            return block(state)[0] if isinstance(kind, Cell) else block(state)

    def _recurrence(self, block: RecurrentBlock, index: Prefix | int, x: Tensor) -> Tensor:
        output, state = block(x, RecurrentState(self.carried.get(index)))
        self._keep(index, state.hidden)
        return output

    def _keep(self, index: Prefix | int, state: Tensor) -> None:
        if isinstance(index, tuple):
            self.last[index] = state.detach().clone()  # a row of all states, which a view would keep alive


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
            check_choice(name, value, allowed)
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
            raise ValueError(f"depth={quote(depth)} and path={quote(path)} are both given: choose one of them")
        if path is not None:
            return self.tree.validate_path(path)
        return self.tree.path_for_depth(self.tree.n_nodes if depth is None else depth)

    def state_width(self, prefix: Prefix) -> int:
        """Width of the state that a recurrent block keeps after these blocks.

        Raises:
            ValueError: it is no beginning of a path that ends in a recurrent block.
        """
        numbers = tuple(whole_or_none(n) for n in prefix) if isinstance(prefix, tuple) else ()
        is_walk = all(n is not None for n in numbers) and all(self.tree.is_arc(i, j) for i, j in zip((0, *numbers), numbers))
        block = plain_module(self.blocks[numbers[-1] - 1]) if numbers and is_walk and numbers[-1] < self.tree.N else None
        if not isinstance(block, RecurrentBlock):
            raise ValueError(
                f"states of {quote(prefix)}: no recurrent block is reached so; their keys are tuples of the block numbers "
                "walked up to one, as the step before returned them"
            )
        return block.cell.hidden_size

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
