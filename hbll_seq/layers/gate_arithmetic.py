"""The arithmetic of gates on tensors of every size: large calls are evaluated in tiles that fit a processor's cache.

The functions give what torch's own give. Those that end in ``_`` may change their argument in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: elements from which on the arithmetic of a tanh outweighs three more calls.
LARGE = 2**14
#: elements of the gates from which on a call is evaluated in tiles of this size.
TILE = 2**19


def tanh_(x: Tensor) -> Tensor:
    """tanh, in place where that is possible.

    On a CPU large tensors take it from sigmoid, which torch vectorises there. The error is that of rounding at 1 and is not
    relative to x; half precision would feel it.
    """
    wide = x.dtype in (torch.float32, torch.float64)
    if wide and x.device.type == "cpu" and x.numel() >= LARGE and not (torch.is_grad_enabled() and x.requires_grad):
        return x.mul_(2.0).sigmoid_().mul_(2.0).sub_(1.0)
    return x.tanh_()


def add_(hidden: Tensor, projected: Tensor) -> Tensor:
    """Their sum; in place without a graph, because making a large tensor takes as long as the arithmetic on it."""
    in_place = not torch.is_grad_enabled() and hidden.shape == projected.shape
    return hidden.add_(projected) if in_place else hidden + projected


def is_large(gates: Tensor) -> bool:
    """Whether to evaluate these gates in tiles.

    Only on a CPU: several tensors of a tile fit its cache, and the allocator hands out the same memory for every tile, while
    the system hands out the memory of larger tensors page by page.
    """
    return gates.device.type == "cpu" and gates.numel() > TILE and gates.dim() > 1 and len(gates) > 1


def tiles(gates: Tensor) -> list[slice]:
    """Slices of the first dimension, of about ``TILE`` elements for every thread."""
    size = max(1, TILE * torch.get_num_threads() * len(gates) // gates.numel())
    return [slice(low, min(low + size, len(gates))) for low in range(0, len(gates), size)]


def by_tiles(transition: Callable[[Tensor, Tensor], Tensor], state: Tensor, projected: Tensor) -> Tensor:
    """``transition(state, projected)``, tile by tile; a single state is that of every tile."""
    output = state.new_empty((*projected.shape[:-1], state.shape[-1]))
    for part in tiles(projected):
        output[part] = transition(rows_of(state, part), projected[part])
    return output


def rows_of(state: Tensor, part: slice) -> Tensor:
    """The states of these transitions; a single one stands for all."""
    return state if len(state) == 1 else state[part]
