"""Cross-entropy of a linear projection onto a vocabulary, in chunks: no [positions, vocabulary] tensor outlives its chunk.

With 50,000 pieces the logits of a batch, their float32 copy and their gradient are the largest tensors of a training step.
Loss and gradients of a chunk are computed together and only the gradients, of the size of the inputs, are kept. The
idea is that of Liger Kernel's fused linear cross-entropy (arXiv 2410.10989) and of torchtune's chunked loss.

Shapes: P positions, C width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hbll_seq.utils.fast_products import fast_products

#: logits of a chunk: 16M numbers, 64 MiB in float32.
CHUNK_ELEMENTS = 2**24
#: of a CPU for each thread 2M, 8 MiB, which its cache holds; smaller chunks would make threads wait for each other.
CPU_ELEMENTS = 2**21
#: but at least so many rows: products of fewer take longer.
CPU_ROWS = 128


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
    needs = [torch.is_grad_enabled() and each.requires_grad for each in (hidden, weight)]
    with torch.no_grad():
        total, nats, *gradients = _chunked(hidden, weight, targets, row_weights, ignore_index, *needs)
    # Each input has a node of its own: who asks for the gradient by one of them does not pay for the other's.
    nodes = [_Zero.apply(x, gradient, total) for needed, x, gradient in zip(needs, (hidden, weight), gradients) if needed]
    return sum(nodes, total), nats


class _Zero(torch.autograd.Function):
    """0 with this gradient by ``x``."""

    @staticmethod
    def forward(ctx, x, gradient, like):
        ctx.save_for_backward(gradient)
        return torch.zeros_like(like)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (upstream * gradient).to(gradient.dtype), None, None


def _chunked(hidden, weight, targets, row_weights, ignore_index, needs_hidden, needs_weight):
    """The sum, the nats of each row, and the sum's gradients by hidden and weight where they are needed (else None)."""
    work = torch.promote_types(hidden.dtype, torch.float32)
    scored = targets != ignore_index
    answers = targets.masked_fill(~scored, 0).unsqueeze(1)  # gather refuses any other wrong label
    scales = scored.to(work) if row_weights is None else scored * row_weights.to(work)
    scaled = hidden * scales.to(hidden.dtype).unsqueeze(1) if needs_weight else None
    d_hidden = torch.empty_like(hidden) if needs_hidden else None
    d_weight = torch.zeros(weight.shape, dtype=work, device=weight.device) if needs_weight else None
    autocast = torch.is_autocast_enabled(hidden.device.type)
    plain = hidden.dtype == weight.dtype == work and not autocast  # nothing is cast on the way
    fast = plain and hidden.device.type == "cpu"
    rows, found = _rows_of_chunk(weight), []
    buffer = hidden.new_empty(min(rows, len(hidden)), len(weight)) if fast else None
    with fast_products(hidden):
        for low in range(0, len(hidden), rows):
            here = slice(low, low + rows)
            part, answer = hidden[here], answers[here]
            p, nats = _softmax_in(buffer, part, weight, answer) if fast else _softmax(part, weight, answer)
            found.append(nats)
            if not (needs_hidden or needs_weight):
                continue
            # The row's weight comes after the product: there it multiplies C numbers, not V.
            d_logits = p.scatter_add_(1, answer, nats.new_full(answer.shape, -1.0)).to(hidden.dtype)
            if needs_hidden and plain:
                torch.mm(d_logits, weight, out=d_hidden[here])
            elif needs_hidden:
                d_hidden[here] = d_logits @ weight.to(hidden.dtype)
            if needs_weight and plain:
                d_weight.addmm_(d_logits.T, scaled[here])  # no second [V, C]
            elif needs_weight:
                d_weight += d_logits.T @ scaled[here]
    nats = torch.cat(found).squeeze(1).masked_fill(~scored, 0.0) if found else scales
    total = nats.sum() if row_weights is None else (nats * scales).sum()
    if needs_hidden:
        d_hidden *= scales.to(hidden.dtype).unsqueeze(1)
    return total, nats, d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype)


def _rows_of_chunk(weight: Tensor) -> int:
    if weight.device.type == "cpu":
        return max(CPU_ROWS, min(CPU_ELEMENTS * torch.get_num_threads(), CHUNK_ELEMENTS) // len(weight))
    return max(1, CHUNK_ELEMENTS // len(weight))


def _softmax(part: Tensor, weight: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """``softmax(part @ weight.T)`` [rows, V] in at least float32, a new tensor, and the nats of the answers [rows, 1]."""
    # autocast lowers the product, never the sum
    logs = torch.log_softmax(part @ weight.T, 1, dtype=torch.promote_types(part.dtype, torch.float32))
    nats = logs.gather(1, answer).neg_()
    return logs.exp_(), nats


def _softmax_in(buffer: Tensor, part: Tensor, weight: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_softmax`, in a buffer that stays in a CPU's cache, with one exponential for each logit and no more."""
    p = torch.mm(part, weight.T, out=buffer[: len(part)])
    torch.softmax(p, 1, out=p)
    of_answer = p.gather(1, answer)
    nats = of_answer.log().neg_()
    if of_answer.min() < (least := torch.finfo(p.dtype).tiny):  # too unlikely for this dtype
        lost = (of_answer < least).squeeze(1)
        logits = part[lost] @ weight.T
        nats[lost] = logits.logsumexp(1, keepdim=True) - logits.gather(1, answer[lost])
    return p, nats
