"""Token ids in, token ids out, along any dyadic path: the loop over tokens.

Rows may go along different paths: one model serves every depth at once.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbll_seq.generation.protocol import CausalLM
from hbll_seq.generation.readers import reader_of
from hbll_seq.generation.runner import Runner
from hbll_seq.generation.sampler import Sampler
from hbll_seq.generation.sampling import SamplingParams, as_sampling
from hbll_seq.generation.speculative import Speculation, Speculator
from hbll_seq.utils.modules import evaluation_mode
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_whole, whole_or_none

Path = tuple[int, ...]


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities under the model's own distribution: temperature 1, nothing left out.

    ``logprob``: of the token that was drawn. ``best``: the most probable ids with theirs, the most probable first.
    """

    logprob: float
    best: tuple[tuple[int, float], ...]


class Step(NamedTuple):
    """One step of a :class:`Decoding`: for each row the new token, None where it has ended; and :class:`TokenLogprobs` of
    each, or None where they were not asked for."""

    tokens: list[int | None]
    logprobs: list[TokenLogprobs | None] | None


class Decoding:
    """The loop over the tokens of a batch, as an iterator of :class:`Step`. Errors are raised here, not by the first step.

    With ``sampling.n`` above 1 each prompt has n rows, which follow one another.

    Args:
        model: see :class:`hbll_seq.generation.protocol.CausalLM`.
        prompts: B non-empty lists of token ids, of any lengths.
        path: block numbers; or a list of such, one for each prompt.
        sampling: None has the defaults of :class:`SamplingParams`. Its ``stop`` is for who knows text: see :meth:`end`.
        eos_id: a row ends with this token, which is not handed out.
        n_tokens: only ids below it are drawn (a vocabulary may be padded beyond its tokenizer); None for all.
        logprobs: how many of the most probable ids each step tells; None: it tells no probabilities.
        speculative, in_order: see :meth:`hbll_seq.generation.text.TextGeneration.generate`.

    Attributes:
        prompts: token ids of each row.
        paths: of each row.
        reader: what reads the rows; None before the first step.
        reasons: of each row why it ended, ``"eos"``, ``"stop"`` or ``"length"``; None while it goes on.

    Raises:
        ValueError: ``sampling`` is no SamplingParams, or a path, a prompt or ``logprobs`` is not possible.
    """

    def __init__(
        self,
        model: CausalLM,
        prompts: Sequence[Sequence[int]],
        path: Sequence[int] | Sequence[Sequence[int]],
        sampling: SamplingParams | None = None,
        *,
        eos_id: int | None = None,
        n_tokens: int | None = None,
        logprobs: int | None = None,
        speculative: bool | Speculation | None = None,
        in_order: int | None = None,
    ):
        self.model, self.sampling, self.eos_id, self.logprobs = model, as_sampling(sampling, {}), eos_id, logprobs
        prompts = _check_prompts(prompts, model.config.vocab_size)
        paths = check_paths(model, path, len(prompts))
        if logprobs is not None:
            self.logprobs = as_whole("logprobs", logprobs, 0, n_tokens or model.config.vocab_size)
        times = range(self.sampling.n)
        self.prompts = [ids for ids in prompts for _ in times]
        self.paths = [each for each in paths for _ in times]
        self.reasons: list[str | None] = [None] * len(self.prompts)
        self.sampler = Sampler(self.sampling, self.prompts, n_tokens)
        self._modules = list(model.modules())
        self._open = reader_of(model, self.paths, self.sampler, speculative, in_order)
        self.reader: Runner | Speculator | None = None
        self._tokens: Tensor | None = None
        self._n_steps = 0

    def end(self, row: int, reason: str = "stop") -> None:
        """No more tokens for this row: its text holds a stop string, or nobody reads it."""
        if self.reasons[row] in (None, "length"):  # the last token may complete a stop string
            self.reasons[row] = reason

    def __iter__(self) -> Decoding:
        return self

    def __next__(self) -> Step:
        if self._n_steps == self.sampling.max_new_tokens or None not in self.reasons:
            raise StopIteration
        with evaluation_mode(self.model, self._modules):
            logits = self._next_logits()
            told = None if self.logprobs is None else _logprobs_of(logits, self._tokens, self.logprobs, self.sampler.n_tokens)
        drawn = self._tokens.tolist()
        self._n_steps += 1
        for row, token in enumerate(drawn):
            if token == self.eos_id:
                self.end(row, "eos")
        if None not in self.reasons:
            raise StopIteration
        step = [token if reason is None else None for token, reason in zip(drawn, self.reasons)]
        self.sampler.accept(drawn)
        if self._n_steps == self.sampling.max_new_tokens:
            self.reasons = [reason or "length" for reason in self.reasons]
        return Step(step, told and [each if token is not None else None for token, each in zip(step, told)])

    def _next_logits(self) -> Tensor:
        """The logits [B, V] of the next tokens, which it draws."""
        logits = self._begin() if self.reader is None else None
        if isinstance(self.reader, Speculator):
            left = self.sampling.max_new_tokens - self._n_steps
            self._tokens, logits = self.reader.next([reason is None for reason in self.reasons], left)
            return logits
        if logits is None:
            logits = self.reader.step(self._tokens)
        self._tokens = self.sampler.draw(logits)
        return logits

    def _begin(self) -> Tensor | None:
        """Make what reads the rows, and read the prompts: logits [B, V] of the first tokens, None where it keeps them."""
        n = self.sampling.n
        prompts, device = self.prompts[::n], self.model.embed.weight.device
        longest = max(map(len, prompts))
        start = torch.tensor([longest - len(ids) for ids in prompts], device=device)
        input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
        # without padding no start is given: the blocks then need no mask of their own
        self.reader = self._open(start if start.any() else None, n)
        logits = self.reader.prefill(input_ids)
        if n == 1 or logits is None:
            return logits
        rows = torch.arange(len(prompts), device=device).repeat_interleave(n)  # a prompt is read once for all its samples
        self.reader.keep(rows)
        return logits[rows]


def generate_ids(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    path: Sequence[int] | Sequence[Sequence[int]],
    sampling: SamplingParams | None = None,
    **options: Any,
) -> Iterator[list[int | None]]:
    """Token ids in, token ids out, one step at a time: the tokens of a :class:`Decoding`, whose arguments and errors these
    are. Errors are raised by this call, not by the first step.

    Yields:
        For each step the ids of the rows, None in a row that has ended; ends when all rows have. There are
        ``sampling.n`` rows for each prompt, next to each other.
    """
    return (step.tokens for step in Decoding(model, prompts, path, sampling, **options))


def is_list_of(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether it is a list or tuple, not empty, of such objects alone."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(each, kinds) for each in value)


def check_paths(model: CausalLM, path: Any, n_prompts: int) -> list[Path]:
    """The path of each prompt, of one path or a list of them. Raises ValueError where there are not as many as prompts."""
    if not is_list_of(path, (list, tuple)):
        return [model.resolve_path(path=path)] * n_prompts
    if len(path) != n_prompts:
        raise ValueError(f"path={quote(path)} has {len(path)} paths for {n_prompts} prompts: give one path, or one for each")
    return [model.resolve_path(path=each) for each in path]


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


def _logprobs_of(logits: Tensor, tokens: Tensor, n_best: int, n_tokens: int | None) -> list[TokenLogprobs]:
    """Of logits [B, V] and the tokens [B] drawn from them; only ids below ``n_tokens`` are among the best."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist()
    values, ids = (part.tolist() for part in logprobs[:, :n_tokens].topk(n_best, dim=-1))
    return [TokenLogprobs(mine, tuple(zip(*best))) for mine, best in zip(own, zip(ids, values))]
