"""Sampling options as one object, and one token from logits: temperature, top-k, nucleus.

Shapes: B rows of a batch, V vocabulary.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll_seq.utils.options import check_options, option
from hbll_seq.utils.reading import quote

#: the other arguments of ``generate`` and ``stream``, which a mistyped name may mean too.
_OTHER_ARGUMENTS = ("depth", "path", "stream", "truncate_prompt")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn, and how many.

    Attributes:
        max_new_tokens: the most tokens that are added to a prompt. They may pass the model's context: attention then looks
            back as far as it can, and recurrent blocks remember what their states hold.
        temperature: 0 is greedy (always the most probable token); 1 draws from the model's own distribution.
        top_k: keeps the k most probable tokens, of equally probable ones those with the lower id; None keeps all.
        top_p: keeps the fewest most probable tokens whose probabilities sum to at least this (nucleus sampling, Holtzman et
            al. 2020, arXiv 1904.09751); applied after ``top_k``; None keeps all.
        seed: makes the draw repeatable on every device; None uses torch's global generator.

    Raises:
        ValueError: an option is out of range.
    """

    max_new_tokens: int = option(100, "the most tokens that are added to a prompt", low=1)
    temperature: float = option(0.8, "0 always takes the most probable token", low=0, below=math.inf, remedy=" (0 is greedy)")
    top_k: int | None = option(None, "keep the k most probable tokens", low=1, remedy=", or None to keep every token")
    top_p: float | None = option(
        None, "keep the fewest tokens of this probability", above=0, high=1, remedy=", or None to keep every token"
    )
    seed: int | None = option(None, "makes the draw repeatable", low=0, high=2**63 - 1, remedy=", or None")

    def __post_init__(self):
        check_options(self)

    def generator(self) -> torch.Generator | None:
        """A new generator that starts from the seed; None where there is no seed."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)


class SamplingOptions(TypedDict, total=False):
    """The fields of :class:`SamplingParams` as keyword arguments, for type checkers."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None


def as_sampling(sampling: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    """The sampling options, given as one object or as keyword arguments.

    Args:
        sampling: the object, or None.
        options: fields of :class:`SamplingParams`; those that are missing have its defaults.

    Raises:
        ValueError: an option is unknown or out of range, both ways are used, or ``sampling`` is another object.
    """
    known = [field.name for field in fields(SamplingParams)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *_OTHER_ARGUMENTS], n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown option {quote(name)}: {hint}The sampling options are {', '.join(known)}")
    if sampling is None:
        return SamplingParams(**options)
    if options:
        raise ValueError(
            f"sampling and {', '.join(options)} are both given: put {'it' if len(options) == 1 else 'them'} into "
            "SamplingParams(...), or leave sampling out"
        )
    if not isinstance(sampling, SamplingParams):
        raise ValueError(f"sampling={quote(sampling)}: must be a SamplingParams, such as SamplingParams(temperature=0)")
    return sampling


def sample(logits: Tensor, sampling: SamplingParams, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row: logits [B, V] -> ids [B].

    The uniform number is drawn on the CPU, so that a seed means the same draw on every device.

    Args:
        logits: [B, V].
        sampling: temperature, top_k and top_p; its other options are those of a whole text.
        generator: draws the uniform numbers; None is torch's global one.

    Raises:
        ValueError: a logit is NaN or +inf, or all of a row are -inf.
    """
    if logits.dim() != 2 or not logits.numel() or not logits.is_floating_point():
        raise ValueError(f"logits of shape {tuple(logits.shape)} and {logits.dtype}: must be [batch, vocabulary] numbers")
    if not torch.isfinite(logits.amax(dim=-1)).all():  # the maximum of a row that holds NaN is NaN
        raise ValueError("the model's logits hold NaN or inf: its weights or precision are broken; load sound ones")
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # Shifted by the maximum first, so that a tiny temperature gives -inf (probability 0) and never NaN.
    logits = logits.float()
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    scaled, order = _keep_most_probable(scaled, sampling.top_k, sampling.top_p)
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
    uniform = torch.rand(len(scaled), 1, generator=generator).to(scaled.device)
    # The first index whose cumulative mass exceeds the draw; a float32 below 1 times the total stays below the total.
    index = (cumulative <= uniform * cumulative[:, -1:]).sum(dim=-1)
    return index if order is None else order.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _keep_most_probable(logits: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits [B, V] -> those that are kept, most probable first, [B, k], and their ids [B, V]; None: all, by id."""
    n_tokens = logits.shape[-1]
    cuts_rank, cuts_mass = top_k is not None and top_k < n_tokens, top_p is not None and top_p < 1
    if not cuts_rank and not cuts_mass:
        return logits, None
    kept, order = logits.sort(dim=-1, descending=True, stable=True)
    if cuts_rank:
        kept = kept[:, :top_k]
    if cuts_mass:
        mass_up_to = kept.softmax(dim=-1).cumsum(dim=-1)
        mass_before = F.pad(mass_up_to[:, :-1], (1, 0))
        kept = kept.masked_fill(mass_before >= top_p, -math.inf)
    return kept, order
