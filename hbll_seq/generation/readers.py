"""Which reader a text is written by: plain, speculative, or with blocks side by side.

Shapes: P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from hbll_seq.generation.protocol import CausalLM
from hbll_seq.generation.runner import Runner
from hbll_seq.generation.sampler import Sampler
from hbll_seq.generation.side_by_side import SideBySideRunner, check_in_order
from hbll_seq.generation.speculative import Speculation, Speculator, drafters_of
from hbll_seq.utils.reading import quote


def as_speculation(speculative: object, paths: Sequence[tuple[int, ...]], temperature: float) -> Speculation | None:
    """What ``speculative`` means for rows along these paths; None: plain decoding.

    Raises:
        ValueError: it is something else, or is asked for where rows have different paths.
    """
    if speculative is None:  # plain decoding is never slower, and a seed gives the same text (docs/results.md 17)
        return None
    if not isinstance(speculative, (bool, Speculation)):
        raise ValueError(
            f"speculative={quote(speculative)}: must be True, False, None, or a Speculation, such as Speculation(drafter=1)"
        )
    if not speculative:
        return None
    if len(set(paths)) > 1:
        raise ValueError(
            f"speculative={quote(speculative)} with rows of different paths {quote(sorted(set(paths)))}: give all prompts "
            "one depth, or leave speculative out"
        )
    if speculative is not True:
        return speculative
    # In a drawn text too few guesses are right, and of one block a check is not known to be cheap (docs/results.md 17).
    return Speculation(drafter="text") if temperature == 0 and len(paths[0]) > 1 else None


def reader_of(
    model: CausalLM, paths: Sequence[tuple[int, ...]], sampler: Sampler, speculative: object, in_order: int | None
) -> Callable[[Tensor | None, int], Runner | Speculator]:
    """What makes the reader of these prompts, of their left padding [P] or None and the number n of rows of each prompt; what
    is not possible is said at once. A :class:`Speculator` reads all rows from the start, the others the prompts.

    Raises:
        ValueError: an option is not possible for these paths.
    """
    if in_order is None:
        named = as_speculation(speculative, paths, sampler.sampling.temperature)
        if named is None:
            return lambda start, n: Runner(model, list(paths)[::n], start)
        drafters_of(model, paths[0], None, named)
        return lambda start, n: Speculator(model, paths[0], start, sampler, named, n)
    if speculative:
        raise ValueError(
            f"in_order={quote(in_order)} and speculative={quote(speculative)} are both given: leave one out; to draft with "
            f"blocks side by side pass speculative=Speculation(in_order={quote(in_order)})"
        )
    if len(set(paths)) > 1:
        raise ValueError(f"in_order={quote(in_order)} with rows of different paths: give all prompts one depth")
    check_in_order(in_order, paths[0])
    return lambda start, n: SideBySideRunner(model, paths[0], in_order, start)
