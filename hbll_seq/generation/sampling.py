"""One token from logits: temperature, top-k, nucleus; and what these options may be.

Shapes: B rows of a batch, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_whole, number_or_none, whole_or_none


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row: logits [B, V] -> ids [B].

    ``temperature=0`` takes the most probable token. ``top_k`` keeps the k most probable tokens (of equal ones those
    with the lower id); ``top_p``, applied after it, keeps the fewest most probable tokens whose probabilities sum to at
    least ``top_p`` (nucleus sampling, Holtzman et al., arXiv 1904.09751).

    The uniform number is drawn on the CPU, by ``generator`` or by torch's global one, so a seed means the same draw on
    every device.

    Raises:
        ValueError: an option is out of range, a logit is NaN or +inf, or all of a row are -inf.
    """
    temperature, top_k, top_p = check_sampling(temperature, top_k, top_p)
    if logits.dim() != 2 or not logits.numel() or not logits.is_floating_point():
        raise ValueError(f"logits of shape {tuple(logits.shape)} and {logits.dtype}: must be [batch, vocabulary] numbers")
    if not torch.isfinite(logits.amax(dim=-1)).all():  # the maximum of a row that holds NaN is NaN
        raise ValueError("the model's logits hold NaN or inf: its weights or precision are broken; load sound ones")
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Shifted by the maximum first, so that a tiny temperature gives -inf (probability 0) and never NaN.
    logits = logits.float()
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)
    order = None
    if (top_k is not None and top_k < scaled.shape[-1]) or (top_p is not None and top_p < 1):
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        scaled = scaled[:, : min(top_k or scaled.shape[-1], scaled.shape[-1])]  # None keeps all
        if top_p is not None and top_p < 1:
            mass_up_to = scaled.softmax(dim=-1).cumsum(dim=-1)
            mass_before = F.pad(mass_up_to[:, :-1], (1, 0))
            scaled = scaled.masked_fill(mass_before >= top_p, -math.inf)
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
    uniform = torch.rand(len(scaled), 1, generator=generator).to(scaled.device)
    # The first index whose cumulative mass exceeds the draw; a float32 below 1 times the total stays below the total.
    index = (cumulative <= uniform * cumulative[:, -1:]).sum(dim=-1)
    return index if order is None else order.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def check_sampling(temperature: object, top_k: object, top_p: object) -> tuple[float, int | None, float | None]:
    """The sampling options as plain numbers.

    Raises:
        ValueError: one is out of range.
    """
    heat, mass = number_or_none(temperature), number_or_none(top_p)
    if heat is None or not 0 <= heat < math.inf:
        raise ValueError(f"temperature={quote(temperature)}: must be a number of at least 0 (0 is greedy)")
    kept = whole_or_none(top_k)
    if top_k is not None and (kept is None or kept < 1):
        raise ValueError(f"top_k={quote(top_k)}: must be a whole number of at least 1, or None to keep every token")
    if top_p is not None and (mass is None or not 0 < mass <= 1):
        raise ValueError(f"top_p={quote(top_p)}: must be a number above 0 and at most 1, or None to keep every token")
    return heat, kept, mass


def check_seed(seed: object) -> int | None:
    """The seed as an int, or None. Raises ValueError for anything else."""
    return None if seed is None else as_whole("seed", seed, 0, 2**63 - 1, ", or None")
