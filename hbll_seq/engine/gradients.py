"""Gradients that were found in the forward pass, handed to autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor


@contextlib.contextmanager
def hooks_left_out(tensors: Sequence[Tensor]) -> Iterator[None]:
    """No hook on these tensors runs inside: those on parameters belong to the backward call that delivers the gradients."""
    hooked = [(t, t._backward_hooks) for t in tensors if t._backward_hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


def inject_gradients(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A zero, to be added to a loss, whose gradient by each of ``tensors`` is the given one of the same shape.

    So what was differentiated early reaches ``.grad`` by the one backward call of a training step, on which
    DistributedDataParallel, gradient accumulation and clipping rely. Local losses are formed so:
    ``||a_n - sg mu_n||^2 / 2 sigma^2`` with ``mu_n = a_n - sigma^2 lambda_n`` has the gradient lambda_n by a_n
    (docs/method.md 2.2), and float32 could not hold that difference.
    """
    return _Injected.apply(len(tensors), *gradients, *tensors)


def injected(tensors: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> Tensor | float:
    """:func:`inject_gradients` of those that have a gradient; a zero."""
    pairs = [(t, g) for t, g in zip(tensors, gradients) if g is not None]
    return inject_gradients(*zip(*pairs)) if pairs else 0.0


class _Injected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n_tensors: int, *both: Tensor) -> Tensor:
        gradients = both[:n_tensors]
        ctx.save_for_backward(*gradients)
        return torch.zeros((), dtype=gradients[0].dtype, device=gradients[0].device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return None, *(None for _ in gradients), *(scale.to(gradient.dtype) * gradient for gradient in gradients)
