"""The two halves of a backward pass apart: products by a transition's input now, those by its weights later.

A segment on another rank waits for the adjoint that comes out of this one, and not for this one's gradients. So a rank makes
first what it has to send, and its weights' gradients while the others go on (Qi et al. 2023, arXiv 2401.10241, split the
passes of a pipeline in this way).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.overrides import TorchFunctionMode


class _Kept(NamedTuple):
    """What the gradients of a linear layer's weight [O, I] and bias [O] are made of."""

    weight: Tensor
    bias: Tensor | None
    read: Tensor  # [R, I]
    gradient: Tensor  # [R, O], of what it made


class WeightsLater(TorchFunctionMode):
    """Linear layers (``torch.nn.functional.linear`` of a weight [O, I] and a bias [O] that are leaves) called inside leave
    the gradients of their weights to be made later, where they are asked to. All else is differentiated as always.
    """

    def __init__(self):
        super().__init__()
        self._kept: list[_Kept] | None = None
        self._pass: int | None = None  # autograd's number of the backward pass that leaves them

    def __torch_function__(self, func: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        if func is F.linear and not types and torch.is_grad_enabled():  # types: tensors that know linear layers of their own
            x, weight, bias = _arguments(*args, **(kwargs or {}))
            if _is_layer(weight, bias) and _is_differentiated_back_alone(x) and not _is_kept_by_others():
                # Of rows, since what a function makes must be no view: an activation in place could not write into it.
                rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
                rows = rows.to(_cast_to(rows))  # what is kept is of that size
                return _Linear.apply(self, rows, weight, bias).view(*x.shape[:-1], len(weight))
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def left_out(self, outputs: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the backward pass from ``outputs`` makes no gradients of these weights. One within that pass makes its own,
        such as that of a block that finds the gradient of a fixed point."""

        def begins(_: Tensor) -> None:
            if self._pass is None:
                self._pass = torch._C._current_graph_task_id()

        handles = [output.register_hook(begins) for output in outputs]
        try:
            yield
        finally:
            self._pass = None
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def kept(self, into: list[_Kept], output: Tensor) -> Iterator[None]:
        """Inside, the backward pass from ``output`` adds to ``into`` what these weights' gradients are made of, for
        :func:`add_gradients`."""
        self._kept = into
        try:
            with self.left_out([output]):
                yield
        finally:
            self._kept = None

    def takes(self, weight: Tensor, bias: Tensor | None, read: Tensor, gradient: Tensor) -> bool:
        """Whether the gradients of a layer are not to be made now."""
        if self._pass != torch._C._current_graph_task_id():
            return False
        if self._kept is not None:
            self._kept.append(_Kept(weight, bias, read.detach(), gradient))  # without the graph that made it
        return True


def add_gradients(kept: list[_Kept], parameters: Sequence[Tensor], gradients: list[Tensor | None]) -> None:
    """Adds what was left to the gradients of parameters, in their order, None for one without any; ``kept`` is emptied."""
    number = {id(p): i for i, p in enumerate(parameters)}
    while kept:
        weight, bias, read, gradient = kept.pop()
        for parameter, made in ((weight, _by_weight), (bias, _by_bias)):
            i = number.get(id(parameter))
            if i is not None:
                new = made(read, gradient).to(parameter.dtype)
                gradients[i] = new if gradients[i] is None else gradients[i] + new


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _is_layer(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether both are of a layer's shapes, and trained; torch takes other shapes too."""
    if weight.dim() != 2 or not _is_trained(weight):
        return False
    return bias is None or (bias.shape == weight.shape[:1] and _is_trained(bias))


def _is_trained(weight: Tensor) -> bool:
    return weight.is_leaf and weight.requires_grad and weight.is_floating_point()


def _is_differentiated_back_alone(x: Tensor) -> bool:
    """Whether neither ``torch.func`` nor forward mode is at work, which do not know how this function is differentiated."""
    return not torch._C._are_functorch_transforms_active() and forward_ad.unpack_dual(x).tangent is None


def _by_weight(read: Tensor, gradient: Tensor) -> Tensor:
    return gradient.T @ read.to(gradient.dtype)


def _by_bias(read: Tensor, gradient: Tensor) -> Tensor:
    return gradient.sum(0)


def _is_kept_by_others() -> bool:
    """Whether hooks take what is saved for a backward pass, as activation checkpointing inside a block does: computed again,
    a layer has to save the same; and what comes back is another tensor than the parameter."""
    try:
        with disable_saved_tensors_hooks("are there any?"):
            return False
    except RuntimeError:  # there are
        return True


def _cast_to(x: Tensor) -> torch.dtype:
    """The dtype that autocast would give a tensor which a layer reads."""
    kind, casts = x.device.type, x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if casts and torch.is_autocast_enabled(kind) else x.dtype


class _Linear(torch.autograd.Function):
    """``x W^T + b``, [R, I] -> [R, O]."""

    @staticmethod
    def forward(ctx, owner: WeightsLater, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.owner = owner
        ctx.save_for_backward(x, weight, *([] if bias is None else [bias]))
        # Cast here and not by autocast, which in older torch would hand out these gradient-free casts to who reads next.
        return F.linear(x, *(None if t is None else t.to(_cast_to(t)) for t in (weight, bias)))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of operations that autograd follows: a block may differentiate what it has made of a gradient."""
        x, weight, *bias = ctx.saved_tensors
        by_x = (gradient @ weight.to(gradient.dtype)).to(x.dtype) if ctx.needs_input_grad[1] else None
        if ctx.owner.takes(weight, bias[0] if bias else None, x, gradient):
            return None, by_x, None, None
        by_bias = _by_bias(x, gradient).to(bias[0].dtype) if bias else None
        return None, by_x, _by_weight(x, gradient).to(weight.dtype), by_bias
