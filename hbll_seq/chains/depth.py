"""Blocks as the transitions of a chain over depth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hbll_seq.engine.calls import Calls
from hbll_seq.layers.base import Cell
from hbll_seq.layers.recurrent import RecurrentState
from hbll_seq.layers.recurrent_block import RecurrentBlock
from hbll_seq.utils.modules import plain_module
from hbll_seq.utils.seeds import fork_rng_of, mix_seeds

#: The blocks that were walked up to and with one of them. Recurrent blocks keep a state for each: block 4 reads z_0 on one
#: path and z_3 on another (docs/method.md 1.4).
Prefix = tuple[int, ...]


def prefixes(path: Sequence[int]) -> list[Prefix]:
    """The beginnings of a path, the shortest first and the path itself last."""
    return [tuple(path[:i]) for i in range(1, len(path) + 1)]


def number_of(index: Prefix | int) -> int:
    """The number of the block that a call is named by, from 1."""
    return index[-1] if isinstance(index, tuple) else index


class BlockCalls(Calls):
    """Calls of blocks in one step; f_n is ``blocks[n - 1]``.

    A transition is named by its block's number n, or by the blocks walked up to it, a :data:`Prefix` that ends in n. With
    the latter, recurrent blocks start from the state carried for it and leave their last one in ``last``; with a number
    they start from zero.

    The blocks of one call do not depend on each other. On one device they are queued one after the other here.

    Args:
        blocks: f_1, f_2, ..
        dropout_seed: each block draws the same dropout at all its evaluations: an iteration refines a state, not its noise.
            None draws from torch's global generator.
        carried: states [B, C] that recurrent blocks start from; none is zero.

    Attributes:
        last: states [B, C] after the last token, detached, of what was evaluated.
    """

    def __init__(
        self, blocks: nn.ModuleList, dropout_seed: int | None = None, carried: Mapping[Prefix, Tensor] | None = None
    ):
        self.blocks, self.dropout_seed, self.carried = blocks, dropout_seed, dict(carried or {})
        self.last: dict[Prefix, Tensor] = {}
        self._parameters: dict[int, list[Tensor]] = {}  # asked for at every evaluation; to find them takes longer than some

    def apply(self, indices: Sequence[Prefix | int], states: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`Calls.apply`; states are [batch, ..., width]. Raises ValueError where a block changes their shape."""
        calls = [self.bind(index) for index in indices]
        return [call(state) for call, state in zip(calls, states)]

    def bind(self, index: Prefix | int) -> Callable[[Tensor], Tensor]:
        """See :meth:`Calls.bind`."""
        return lambda state: self._run(index, state)

    def parameters(self, index: Prefix | int) -> list[Tensor]:
        """See :meth:`Calls.parameters`: those that the block registers."""
        n = number_of(index)
        if n not in self._parameters:
            self._parameters[n] = [p for p in self.blocks[n - 1].parameters() if p.requires_grad]
        return self._parameters[n]

    def _run(self, index: Prefix | int, state: Tensor, *hints: Tensor | None) -> Tensor:
        n = number_of(index)
        block = self.blocks[n - 1]
        kind = plain_module(block)
        with fork_rng_of(state) if self.dropout_seed is not None else contextlib.nullcontext():
            if self.dropout_seed is not None:
                torch.manual_seed(mix_seeds(self.dropout_seed, n))
            if isinstance(kind, RecurrentBlock):
                return self._recurrence(block, index, state, *hints)
            try:
                output = block(state)[0] if isinstance(kind, Cell) else block(state)
            except RuntimeError as error:
                raise _wrong_width(n, kind, state) or error
        if getattr(output, "shape", None) != state.shape:
            raise _wrong_output(n, kind, state, output)
        return output

    def _recurrence(self, block: RecurrentBlock, index: Prefix | int, x: Tensor) -> Tensor:
        output, state = block(x, RecurrentState(self.carried.get(index)))
        self._keep(index, state.hidden)
        return output

    def _keep(self, index: Prefix | int, state: Tensor) -> None:
        if isinstance(index, tuple):
            self.last[index] = state.detach().clone()  # a row of all states, which a view would keep alive


def _wrong_width(n: int, block: nn.Module, state: Tensor) -> ValueError | None:
    """The error that a part of block n is made for another width than what reaches it; None where that is not the fault."""
    found: list[ValueError] = []

    def compare(name: str, module: nn.Module, given: tuple) -> None:
        own, x = _input_width(module), given[0] if given else None
        if own is not None and isinstance(x, Tensor) and x.dim() and x.shape[-1] != own and not found:
            part = f"its {name} ({type(module).__name__}) reads" if name else "it reads"
            found.append(ValueError(
                f"block {n} ({type(block).__name__}) cannot take states of shape {tuple(state.shape)}: {part} width {own} "
                f"and is given {x.shape[-1]}; all blocks must read and return the width that the embedding makes, "
                f"{state.shape[-1]}"
            ))

    hooks = [module.register_forward_pre_hook(lambda module, given, name=name: compare(name, module, given))
             for name, module in block.named_modules()]
    try:
        with torch.no_grad():
            block(state)  # once more, to see which part it was
    except RuntimeError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _input_width(module: nn.Module) -> int | None:
    """The width that a module of torch reads, None of one that does not say it."""
    if isinstance(module, nn.RNNBase):
        return module.input_size
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return module.normalized_shape[-1]
    return module.in_features if isinstance(module, nn.Linear) else None


def _wrong_output(n: int, block: nn.Module, state: Tensor, output: object) -> ValueError:
    """The error that block n has not kept the shape of its input."""
    made = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    return ValueError(
        f"block {n} ({type(block).__name__}) makes {made} of states of shape {tuple(state.shape)}: a block must return one "
        "tensor of its input's shape; give it equal input and output width (one that also returns a state is a Cell)"
    )
