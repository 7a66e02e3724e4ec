"""Cross-entropy of a linear projection onto a vocabulary, in chunks: no [positions, vocabulary] tensor outlives its chunk.

With 50,000 pieces the logits of a batch, their float32 copy and their gradient are the largest tensors of a training step.
Loss and gradients of a chunk are computed together and only the gradients, of the size of the inputs, are kept. The
idea is that of Liger Kernel's fused linear cross-entropy (arXiv 2410.10989) and of torchtune's chunked loss.

Shapes: P positions, C width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: logits of a chunk: 16M numbers, 64 MiB in float32.
CHUNK_ELEMENTS = 2**24


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Sum over positions of ``-log softmax(hidden @ weight.T)[target]``, a scalar in nats, in at least float32.

    The gradients, [P, C] and [V, C], are computed with the loss and kept until the graph is freed, so that each backward
    pass costs one multiplication. There is no second derivative.

    Args:
        hidden: [P, C].
        weight: [V, C].
        targets: [P] of int64; ``ignore_index`` is not scored.
    """
    return weighted_cross_entropy(hidden, weight, targets, None, ignore_index)[0]


def weighted_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor | None, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """As :func:`linear_cross_entropy`, each position with a weight of its own.

    Args:
        hidden, weight, targets, ignore_index: as there.
        row_weights: [P], constants; None for 1 each.

    Returns:
        The weighted sum, a scalar, and the nats of each position, [P], unweighted and detached; 0 where none is scored.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, row_weights, ignore_index)
    return _chunked(hidden, weight, targets, row_weights, ignore_index, False, False)[:2]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, row_weights, ignore_index):
        needs = ctx.needs_input_grad[:2]
        total, nats, d_hidden, d_weight = _chunked(hidden, weight, targets, row_weights, ignore_index, *needs)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(nats)
        ctx.set_materialize_grads(False)
        return total, nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        d_hidden, d_weight = ctx.saved_tensors
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        return (
            (gradient * d_hidden).to(d_hidden.dtype) if needs_hidden else None,
            (gradient * d_weight).to(d_weight.dtype) if needs_weight else None,
            None,
            None,
            None,
        )


def _chunked(hidden, weight, targets, row_weights, ignore_index, needs_hidden, needs_weight):
    """The sum, the nats of each row, and the sum's gradients by hidden and weight where they are needed (else None)."""
    work = torch.promote_types(hidden.dtype, torch.float32)
    nats = torch.zeros(len(hidden), dtype=work, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if needs_hidden else None
    d_weight = torch.zeros(weight.shape, dtype=work, device=weight.device) if needs_weight else None
    scales = (targets != ignore_index).to(work)
    if row_weights is not None:
        scales *= row_weights
    rows = max(1, CHUNK_ELEMENTS // len(weight))
    for low in range(0, len(hidden), rows):
        part, answer = hidden[low : low + rows], targets[low : low + rows]
        scored, scale = (answer != ignore_index).unsqueeze(1), scales[low : low + rows].unsqueeze(1)
        answer = answer.unsqueeze(1).masked_fill(~scored, 0)  # gather refuses any other wrong label
        logits = (part @ weight.T).to(work)  # autocast lowers the product, never the sum below
        log_norm = logits.logsumexp(1, keepdim=True)
        nats[low : low + rows] = ((log_norm - logits.gather(1, answer)) * scored).squeeze(1)
        if not (needs_hidden or needs_weight):
            continue
        d_logits = logits.sub_(log_norm).exp_()
        d_logits.scatter_add_(1, answer, torch.full_like(log_norm, -1.0))
        d_logits = d_logits.mul_(scale).to(part.dtype)
        if needs_hidden:
            d_hidden[low : low + rows] = d_logits @ weight.to(part.dtype)
        if needs_weight:
            if d_weight.dtype == part.dtype and not torch.is_autocast_enabled(part.device.type):
                d_weight.addmm_(d_logits.T, part)  # no second [V, C]
            else:
                d_weight += d_logits.T @ part
    total = nats.sum() if row_weights is None else (nats * row_weights).sum()
    return total, nats, d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype)
