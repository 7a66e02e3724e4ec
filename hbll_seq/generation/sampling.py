"""Sampling options as one object: how many tokens are drawn, from which of the model's, and what ends a text."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from hbll_seq.utils.options import check_options, option
from hbll_seq.utils.reading import quote

#: the other arguments of ``generate`` and ``stream``, which a mistyped name may mean too.
_OTHER_ARGUMENTS = ("depth", "path", "stream", "truncate_prompt", "speculative", "in_order")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn, and how many.

    A token's score (logit) passes the repetition penalty, then the temperature; ``top_k``, ``top_p`` and ``min_p`` then
    each leave tokens out, and those that all three keep are drawn from in proportion to their probabilities.

    Attributes:
        max_new_tokens: the most tokens that are added to a prompt. They may pass the model's context: attention then looks
            back as far as it can, and recurrent blocks remember what their states hold.
        temperature: 0 is greedy (always the most probable token); 1 draws from the model's own distribution.
        top_k: keeps the k most probable tokens, of equally probable ones those with the lower id; None keeps all.
        top_p: keeps the fewest most probable tokens whose probabilities sum to at least this (nucleus sampling, Holtzman et
            al. 2020, arXiv 1904.09751), after ``top_k`` has left tokens out; None keeps all.
        min_p: keeps the tokens at least this times as probable as the most probable one (Nguyen et al. 2024, arXiv
            2407.01082); None keeps all.
        repetition_penalty: divides the positive scores of the tokens that prompt and new text hold, and multiplies the
            negative ones (Keskar et al. 2019, arXiv 1909.05858, who take 1.2); 1 changes nothing.
        stop: texts that end a row's text: the new text ends before the first that appears. One text or
            several; None for none.
        n: how many texts are drawn for each prompt.
        seed: makes the draw repeatable on every device, whatever else is in the batch: a prompt's k-th sample is a function
            of seed and k. None takes seeds from torch's global generator, another for each text.

    Raises:
        ValueError: an option is out of range.
    """

    max_new_tokens: int = option(100, "the most tokens that are added to a prompt", low=1)
    temperature: float = option(0.8, "0 always takes the most probable token", low=0, below=math.inf, remedy=" (0 is greedy)")
    top_k: int | None = option(None, "keep the k most probable tokens", low=1, remedy=", or None to keep every token")
    top_p: float | None = option(
        None, "keep the fewest tokens of this probability", above=0, high=1, remedy=", or None to keep every token"
    )
    min_p: float | None = option(
        None, "keep tokens of this times the highest probability", above=0, high=1, remedy=", or None to keep every token"
    )
    repetition_penalty: float = option(
        1.0, "makes tokens that the text already holds less probable", above=0, below=math.inf, remedy=" (1 changes nothing)"
    )
    stop: str | tuple[str, ...] | None = option(None, "the text ends before one of these")
    n: int = option(1, "texts for each prompt", low=1)
    seed: int | None = option(None, "makes the draw repeatable", low=0, high=2**63 - 1, remedy=", or None")

    def __post_init__(self):
        check_options(self)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if stop is None:
            return
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop={quote(self.stop)}: must be a text of at least one character, a list of them, or None")
        object.__setattr__(self, "stop", tuple(dict.fromkeys(stop)) or None)


class SamplingOptions(TypedDict, total=False):
    """The fields of :class:`SamplingParams` as keyword arguments, for type checkers."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    stop: str | tuple[str, ...] | list[str] | None
    n: int
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
