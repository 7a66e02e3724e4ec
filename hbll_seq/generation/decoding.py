"""Token ids in, token ids out, along any dyadic path: prefill, decode_one_token, and the loop over them.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hbll_seq.generation.path_cache import PathCache
from hbll_seq.generation.protocol import CausalLM
from hbll_seq.generation.runner import Runner
from hbll_seq.generation.sampling import SamplingParams, as_sampling, sample
from hbll_seq.utils.modules import evaluation_mode
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import whole_or_none


def prefill(model: CausalLM, input_ids: Tensor, path: Sequence[int], start: Tensor | None = None) -> tuple[Tensor, PathCache]:
    """Read the prompts [B, T] at once.

    Args:
        model: in evaluation mode.
        input_ids: [B, T]; shorter prompts are padded on the LEFT with any token.
        path: block numbers, see ``model.resolve_path``.
        start: [B] number of padding positions of each row, or None.

    Returns:
        Logits [B, V] of the token that follows, and the cache to hand to :func:`decode_one_token`.

    Raises:
        ValueError: the path is not dyadic.
    """
    cache = PathCache(model, [path], start)
    cache.append(input_ids)
    return model.read_out(cache.advance(path)[:, -1], path), cache


def decode_one_token(model: CausalLM, tokens: Tensor, path: Sequence[int], cache: PathCache) -> Tensor:
    """Add one token to each row of the cache, ``tokens`` [B], and return the logits [B, V] of the next."""
    cache.append(tokens.unsqueeze(1))
    return model.read_out(cache.advance(path)[:, -1], path)


def generate_ids(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    path: Sequence[int],
    sampling: SamplingParams | None = None,
    *,
    eos_id: int | None = None,
    n_tokens: int | None = None,
) -> Iterator[list[int | None]]:
    """Token ids in, token ids out, one step at a time. Errors are raised by this call, not by the first step.

    Args:
        model: see :class:`hbll_seq.generation.protocol.CausalLM`.
        prompts: B non-empty lists of token ids, of any lengths.
        path: block numbers.
        sampling: None has the defaults of :class:`SamplingParams`.
        eos_id: a row ends with this token, which is not yielded.
        n_tokens: only ids below it are drawn (a vocabulary may be padded beyond its tokenizer); None for all.

    Yields:
        For each step B ids, None in a row that has ended; ends when all rows have.

    Raises:
        ValueError: ``sampling`` is no SamplingParams, or the path or a prompt is not possible.
    """
    path, sampling = model.resolve_path(path=path), as_sampling(sampling, {})
    prompts = _check_prompts(prompts, model.config.vocab_size)
    return _steps(model, prompts, path, sampling, eos_id, n_tokens)


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    """Lists of plain ids. Raises ValueError unless they are non-empty lists (or tensors) of ids of the vocabulary."""
    try:
        given = [ids.tolist() if isinstance(ids, Tensor) else list(ids) for ids in prompts]
    except TypeError:
        given = []
    if not given or not all(isinstance(ids, list) and ids for ids in given):  # a tensor may have no dimension
        raise ValueError(f"prompts={quote(prompts)}: must be a non-empty list of non-empty lists of token ids")
    rows = [[whole_or_none(token) for token in ids] for ids in given]
    for ids, row in zip(given, rows):
        if not all(token is not None and 0 <= token < vocab_size for token in row):
            raise ValueError(f"prompts hold {quote(ids)}: token ids must be whole numbers from 0 to {vocab_size - 1}")
    return rows


def _steps(
    model: CausalLM,
    prompts: list[list[int]],
    path: tuple[int, ...],
    sampling: SamplingParams,
    eos_id: int | None,
    n_tokens: int | None,
) -> Iterator[list[int | None]]:
    """What :func:`generate_ids` yields, of checked arguments."""
    device = model.embed.weight.device
    longest = max(map(len, prompts))
    start = torch.tensor([longest - len(ids) for ids in prompts], device=device)
    input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
    generator = sampling.generator()
    running, runner, tokens = [True] * len(prompts), None, input_ids
    for _ in range(sampling.max_new_tokens):
        with evaluation_mode(model):
            if runner is None:  # without padding no start is given: the blocks then need no mask of their own
                runner = Runner(model, path, start if start.any() else None)
                logits = runner.prefill(input_ids)
            else:
                logits = runner.step(tokens)
            tokens = sample(logits[:, :n_tokens], sampling, generator)
        step = tokens.tolist()
        running = [alive and token != eos_id for alive, token in zip(running, step)]
        if not any(running):
            return
        yield [token if alive else None for alive, token in zip(running, step)]
