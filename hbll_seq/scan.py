"""Associative scan of affine maps: s_n = a_n * s_{n-1} + b_n for all n at once, in O(log N) dependent operations.

Composition of affine maps is associative, so a chain of N of them is a parallel scan (METHOD 2.2; Blelloch 1990). The
slow obvious form stays as the oracle of the fast one. Shapes: N transitions first, anything after.
"""

from __future__ import annotations

import torch
from torch import Tensor


def affine_scan(b: Tensor, a: Tensor | float, initial: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """All s_n of ``s_n = a_n * s_{n-1} + b_n`` with s_0 = ``initial``.

    Args:
        b: [N, ...], N at least 1.
        a: diagonal factors [N, ...] of the shape of ``b``; or 1.0 (identity: a cumulative sum) or 0.0 (no coupling).
        initial: [...], the state before the first map; None is zero.
        reverse: run from the end: ``s_n = a_n * s_{n+1} + b_n`` with s_{N+1} = ``initial``.

    Returns:
        [N, ...] in the dtype of ``b``; half precision is accumulated in float32.

    Raises:
        ValueError: ``a`` is another number than 0 or 1, or has another shape than ``b``.
    """
    if isinstance(a, Tensor):
        if a.shape != b.shape:
            raise ValueError(f"a of shape {tuple(a.shape)} with b of shape {tuple(b.shape)}: must be the same")
    elif a not in (0.0, 1.0):
        raise ValueError(f"a={a!r}: a number must be 0 or 1; other factors are given as a tensor of b's shape")
    dtype, work = b.dtype, torch.promote_types(b.dtype, torch.float32)
    b = b.to(work)
    if reverse:
        b, a = b.flip(0), a.flip(0) if isinstance(a, Tensor) else a
    if isinstance(a, Tensor):
        states = _diagonal_scan(b, a.to(work), initial)
    elif a == 0.0:
        states = b  # s_0 reaches nothing
    else:
        if not (reverse or dtype != work):  # else b is ours already
            b = b.clone()
        if initial is not None:
            b[0] += initial
        states = b.cumsum_(0)  # in place: of long chains this is among the largest tensors of a training step
    return (states.flip(0) if reverse else states).to(dtype)


def _diagonal_scan(b: Tensor, a: Tensor, initial: Tensor | None) -> Tensor:
    """Hillis and Steele's scan: after round r every element composes the 2**r maps that end in it."""
    if initial is not None:
        b = torch.cat((b[:1] + a[:1] * initial, b[1:]))
    shift = 1
    while shift < len(b):
        b = torch.cat((b[:shift], b[shift:] + a[shift:] * b[:-shift]))
        a = torch.cat((a[:shift], a[shift:] * a[:-shift]))
        shift *= 2
    return b


def sequential_scan(b: Tensor, a: Tensor | float, initial: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """What :func:`affine_scan` computes, one map after the other."""
    state = torch.zeros_like(b[0]) if initial is None else initial
    states: list[Tensor] = [state] * len(b)
    for n in reversed(range(len(b))) if reverse else range(len(b)):
        state = (a[n] if isinstance(a, Tensor) else a) * state + b[n]
        states[n] = state
    return torch.stack(states)
