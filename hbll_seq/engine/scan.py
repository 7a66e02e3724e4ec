"""Associative scan of affine maps: s_n = a_n * s_{n-1} + b_n for all n at once, in O(log N) dependent operations.

Composition of affine maps is associative, so a chain of N of them is a parallel scan (docs/method.md 2.2; Blelloch 1990). The
slow obvious form stays as the oracle of the fast one. Shapes: N transitions first, anything after.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: maps composed one after the other in a round of the scan, which has log(N) / log(CHUNK) rounds.
CHUNK = 8
#: a sum over so few states is faster row by row on a CPU: torch's turns the tensor around and back.
FEW = 64


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
    if isinstance(a, Tensor):
        b, a = b.to(work, copy=True), a.to(work, copy=True)
        if initial is not None:
            b[-1 if reverse else 0] += a[-1 if reverse else 0] * initial
        _diagonal_scan(b, a, reverse)
        return b.to(dtype)
    if a == 1.0 and b.device.type == "cpu" and len(b) <= FEW:
        states = b.to(work, copy=True)
        order = range(len(b))[::-1] if reverse else range(len(b))
        if initial is not None:
            states[order[0]] += initial
        for before, n in zip(order, order[1:]):
            states[n] += states[before]
        return states.to(dtype)
    b = b.to(work)
    if reverse:
        b = b.flip(0)
    if a == 0.0:
        states = b  # s_0 reaches nothing
    else:
        if not (reverse or dtype != work):  # else b is ours already
            b = b.clone()
        if initial is not None:
            b[0] += initial
        states = b.cumsum_(0)  # in place: of long chains this is among the largest tensors of a training step
    return (states.flip(0) if reverse else states).to(dtype)


def _diagonal_scan(b: Tensor, a: Tensor, reverse: bool) -> None:
    """In place in ``b``; destroys ``a``. Chunks of a few maps are composed side by side, their ends by recursion, and then
    every end is carried through the chunk behind it: O(N) work, where Hillis and Steele's scan does N log N."""
    n_chunks = len(b) // CHUNK
    if n_chunks < 2:
        _follow(b, a, range(len(b)), reverse)
        return
    whole = n_chunks * CHUNK
    body = slice(len(b) - whole, None) if reverse else slice(whole)
    chunked_b, chunked_a = (t[body].unflatten(0, (n_chunks, CHUNK)) for t in (b, a))
    order = range(CHUNK - 1, -1, -1) if reverse else range(CHUNK)
    for before, j in zip(order, order[1:]):
        chunked_b[:, j].addcmul_(chunked_a[:, j], chunked_b[:, before])
        chunked_a[:, j].mul_(chunked_a[:, before])
    end = order[-1]
    _diagonal_scan(chunked_b[:, end], chunked_a[:, end], reverse)
    inner = slice(1, None) if reverse else slice(CHUNK - 1)
    behind, front = (slice(n_chunks - 1), slice(1, None)) if reverse else (slice(1, None), slice(n_chunks - 1))
    chunked_b[behind, inner].addcmul_(chunked_a[behind, inner], chunked_b[front, end].unsqueeze(1))
    _follow(b, a, range(len(b) - whole + 1) if reverse else range(whole - 1, len(b)), reverse)


def _follow(b: Tensor, a: Tensor, indices: range, reverse: bool) -> None:
    """One map after the other, in place in ``b``; the first of ``indices`` (reverse: the last) is a state already."""
    order = indices[::-1] if reverse else indices
    for before, n in zip(order, order[1:]):
        b[n].addcmul_(a[n], b[before])


def sequential_scan(b: Tensor, a: Tensor | float, initial: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """What :func:`affine_scan` computes, one map after the other."""
    state = torch.zeros_like(b[0]) if initial is None else initial
    states: list[Tensor] = [state] * len(b)
    for n in reversed(range(len(b))) if reverse else range(len(b)):
        state = (a[n] if isinstance(a, Tensor) else a) * state + b[n]
        states[n] = state
    return torch.stack(states)


def powers_of(matrix: Tensor, n_powers: int) -> Tensor:
    """A, A^2, .. A^n of a matrix [H, H]: [n, H, H], in log2 n products one after the other."""
    powers = matrix[None]
    while len(powers) < n_powers:
        powers = torch.cat((powers, powers @ powers[-1]))[:n_powers]
    return powers


def shared_scan(b: Tensor, powers: Tensor) -> Tensor:
    """All s_n of ``s_n = (s_{n-1} + b_n) A`` with s_0 = 0 and one matrix for all n, whose powers are known.

    With G powers, up to G states are sums of products that do not wait for each other, so their span is one product. Of more,
    groups of G are summed side by side, their ends by recursion, and every group then takes what came before it: two products
    for each level.

    Args:
        b: [N, ..., H]; states are rows.
        powers: A, A^2, .. A^G, [G, H, H].
    """
    n_steps, size = len(b), min(len(b), len(powers))
    n_groups = -(-n_steps // size)
    padding = b.new_zeros((n_groups * size - n_steps, *b.shape[1:]))
    grouped = torch.cat((b, padding)).unflatten(0, (n_groups, size))
    states = grouped @ powers[0]
    for lag in range(1, size):
        states[:, lag:] += grouped[:, :-lag] @ powers[lag]
    if n_groups > 1:
        ends = states[:-1, -1]  # before a group s is not 0: what it adds goes through as many powers as it is steps away
        jumps = torch.cat((ends[:1] * 0, ends[:-1]))
        before = ends + shared_scan(jumps, powers_of(powers[size - 1], size))
        for j in range(size):
            states[1:, j] += before @ powers[j]
    return states.flatten(0, 1)[:n_steps]
