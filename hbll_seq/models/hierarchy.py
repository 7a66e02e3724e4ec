"""The hierarchy over depth: any list of blocks between an embedding and a head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hbll_seq.chains.depth import BlockCalls, Prefix
from hbll_seq.distributed.blocks import RemoteBlock
from hbll_seq.layers.recurrent_block import RecurrentBlock
from hbll_seq.tree.posterior import STATE_FAMILIES, TARGET_FAMILIES
from hbll_seq.tree.topology import DyadicTree
from hbll_seq.utils.modules import plain_module
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import check_choice, whole_or_none


class DepthHierarchy(nn.Module):
    """``N - 1`` blocks of equal input and output width, an embedding before them and a prediction head behind.

    Args:
        blocks: ``2**D - 1`` modules, each a map of [batch, ..., width] to the same shape (or a :class:`Cell`).
        head: module from a state to the parameters of ``p(y | z_{N-1})``, such as logits; shared by all depths.
        embed: module from the raw input to z_0, which must have the states' width; None where the input has it already.
        state_family: ``"gaussian"`` or ``"bernoulli"`` (states are then logits): what inner states are.
        default_paths: which path a depth names, ``"spine"`` or ``"prefix"``; see :meth:`DyadicTree.path_for_depth`.
        width: of the states; only ``linearization="low_rank"`` asks for it.
        target_family: what the head predicts: ``"categorical"`` (class numbers, from logits), ``"gaussian"`` (vectors, from
            their means) or ``"bernoulli"`` (vectors of bits, from logits).

    Raises:
        ValueError: the number of blocks is not ``2**D - 1``, something is no module, or a family is unknown.
    """

    #: whether labels are inputs that come later, as a language model's are: no block may then read what was corrected by them
    labels_are_inputs = False

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
        blocks = _as_modules(blocks)
        for name, module in (("head", head), ("embed", embed)):
            if not isinstance(module, nn.Module) and (name == "head" or module is not None):
                raise ValueError(f"{name}={quote(module)}: must be a torch.nn.Module; wrap a function in one")
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
        self.calls = BlockCalls(blocks)

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

    def n_parameters(self, path: Sequence[int] | None = None) -> int:
        """Number of parameters that ``path`` (default: full) uses; embedding, head and its exit's correction included.

        Raises:
            ValueError: the path is not dyadic.
        """
        parts = [self.embed, self.head, *(self.blocks[n - 1] for n in self.resolve_path(path=path))]
        shared = sum({id(p): p.numel() for part in parts for p in part.parameters()}.values())
        exits = getattr(self, "exits", None)  # of models that have a configuration
        return shared + (0 if exits is None else exits.n_parameters_each)

    def state_width(self, prefix: Prefix) -> int:
        """Width of the state that a recurrent block keeps after these blocks.

        Raises:
            ValueError: it is no beginning of a path that ends in a recurrent block.
        """
        numbers = tuple(whole_or_none(n) for n in prefix) if isinstance(prefix, tuple) else ()
        is_walk = all(n is not None for n in numbers) and all(self.tree.is_arc(i, j) for i, j in zip((0, *numbers), numbers))
        block = plain_module(self.blocks[numbers[-1] - 1]) if numbers and is_walk and numbers[-1] < self.tree.N else None
        if isinstance(block, RemoteBlock):
            raise ValueError(f"states of {quote(prefix)}: another rank holds that block; give each rank those of its own")
        if not isinstance(block, RecurrentBlock):
            raise ValueError(
                f"states of {quote(prefix)}: no recurrent block is reached so; their keys are tuples of the block numbers "
                "walked up to one, as the step before returned them"
            )
        return block.cell.hidden_size

    def prepare(self, inputs: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inputs and labels -> what the blocks read and what the head is scored on; a language model shifts here."""
        if labels is None:
            raise ValueError("labels=None: this model needs labels to be scored on; pass them")
        return inputs, labels

    def before_head(self, state: Tensor, path: Sequence[int]) -> Tensor:
        """The state after the blocks ``path`` as the head reads it: unchanged, unless a model overrides this."""
        return state

    def read_out(self, state: Tensor, path: Sequence[int]) -> Tensor:
        """The head's output for the state after the blocks ``path``."""
        return self.head(self.before_head(state, path))

    def score(self, state: Tensor, targets: Tensor, path: Sequence[int]) -> Tensor:
        """Energy of the prediction after the blocks ``path``, summed over positions (classes: -2 log p(y | state))."""
        return self.target_family.energy(self.read_out(state, path), targets).sum()

    def n_scored(self, state: Tensor, targets: Tensor) -> Tensor | int:
        """How many positions of ``state`` [..., width] have a target."""
        return self.target_family.n_scored(state.shape[:-1].numel(), targets)

    def score_exits(
        self, states: Sequence[Tensor], targets: Tensor, paths: Sequence[Sequence[int]], weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """All exits of a step together: half of :meth:`score` per scored position, its sum over the exits by weight.

        A model whose head can read many states at once overrides this; here each is scored on its own.

        Args:
            states: what the head reads at each exit, each [batch, ..., width].
            targets: of every exit.
            paths: the blocks walked up to each exit.
            weights: of each exit.

        Returns:
            The weighted sum, a scalar, once differentiable by the states and by what reads them; and the nats of each exit,
            [exits], detached.

        Raises:
            ValueError: there is no exit, or not one path and one weight for each.
        """
        check_exits(states, paths, weights)
        nats = [0.5 * self.score(z, targets, path) / self.n_scored(z, targets) for z, path in zip(states, paths)]
        return sum(w * value for w, value in zip(weights, nats)), torch.stack([value.detach() for value in nats])

    def score_heads(self, states: Sequence[Tensor], targets: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """As :meth:`score_exits`, of states that the head reads as they are, without :meth:`before_head`.

        Args:
            states: what the head reads, each [batch, ..., width].
            targets: of every one.
            weights: of each loss.

        Returns:
            See :meth:`score_exits`.
        """
        energies = [self.target_family.energy(self.head(z), targets).sum() for z in states]
        nats = [0.5 * energy / self.n_scored(z, targets) for z, energy in zip(states, energies)]
        return sum(w * value for w, value in zip(weights, nats)), torch.stack([value.detach() for value in nats])

    def run(self, inputs: Tensor, path: Sequence[int] | None = None) -> Tensor:
        """The plain network along ``path`` (default: full): raw inputs -> the head's output.

        Raises:
            ValueError: the path is not dyadic, or a block changes the shape of the states.
        """
        state, path = self.embed(inputs), self.resolve_path(path=path)
        for n in path:
            (state,) = self.calls.apply((n,), (state,))
        return self.read_out(state, path)

    def forward(self, inputs: Tensor, path: Sequence[int] | None = None) -> Tensor:
        """Same as :meth:`run`."""
        return self.run(inputs, path)


def check_exits(states: Sequence[Tensor], paths: Sequence[Sequence[int]], weights: Sequence[float]) -> None:
    """Raises ValueError unless there is an exit, and a path and a weight for each."""
    if not len(states) == len(paths) == len(weights) > 0:
        raise ValueError(
            f"{len(states)} states, {len(paths)} paths and {len(weights)} weights of exits: give one exit or more, and for "
            "each its state, the blocks walked up to it, and its weight"
        )


def _as_modules(blocks: Iterable[nn.Module]) -> nn.ModuleList:
    """The blocks as a list of modules. Raises ValueError where one is none."""
    try:
        blocks = list(blocks)
    except TypeError:
        raise ValueError(f"blocks={type(blocks).__name__} object: must be a list of torch.nn.Module") from None
    for n, block in enumerate(blocks, start=1):
        if not isinstance(block, nn.Module):
            raise ValueError(f"block {n} is {quote(block)}: must be a torch.nn.Module; wrap a function in one")
    return nn.ModuleList(blocks)
