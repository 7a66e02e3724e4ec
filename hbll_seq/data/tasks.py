"""Synthetic sequence tasks that need depth, drawn on the fly, to compare methods of training a language model.

Shapes: B batch, T context_length, V vocab_size. Tokens and labels are int64 [B, T + 1], as the model's ``prepare`` wants
them: the prediction made at position t has read the tokens 0 .. t and is scored on ``labels[:, t + 1]``, unless that is
``IGNORE_INDEX``. So ``labels[:, 0]`` is never scored and the last token never read.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hbll_seq.tree.posterior import IGNORE_INDEX
from hbll_seq.utils.reading import quote
from hbll_seq.utils.seeds import mix_seeds
from hbll_seq.utils.values import as_whole, check_choice

SPLITS = ("train", "validation", "test")


class Task(ABC):
    """Windows of a synthetic task; the answer at a position depends on the tokens up to that position only.

    ``name``: its key in ``TASKS``. ``vocab_size`` V: tokens and answers are below it. ``context_length`` T.
    """

    name: str
    vocab_size: int
    context_length: int

    def batch(self, step: int, batch_size: int, seed: int, split: str = "train") -> tuple[Tensor, Tensor]:
        """Tokens and labels, int64 [B, T + 1]: a pure function of the arguments.

        Other steps, seeds and splits give unrelated streams.

        Raises:
            ValueError: an argument is out of range.
        """
        step, seed = as_whole("step", step, 0), as_whole("seed", seed, 0)
        batch_size = as_whole("batch_size", batch_size, 1)
        check_choice("split", split, SPLITS)
        # Not torch.Generator, which keeps 32 bits of the seed on the CPU: batches of a long run would come again.
        rng = np.random.default_rng(mix_seeds(seed, SPLITS.index(split), step))
        return self._draw(rng, batch_size)

    @abstractmethod
    def _draw(self, rng: np.random.Generator, batch_size: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels, int64 [B, T + 1]."""


class Induction(Task):
    """Induction heads of k hops (Sanford, Hsu, Telgarsky 2024, arXiv 2402.09268): what followed the last time?

    Tokens are i.i.d. uniform. A hop goes from position t to p + 1, where p < t is the most recent earlier occurrence of
    the token at t. The answer at t is the token that ``hops`` hops lead to; where a hop finds no earlier occurrence,
    there is none. One block of attention cannot do one hop unless it is exponentially larger (arXiv 2408.14332).

    By default 57 % (one hop) or 28 % (two hops) of the positions are scored. Chance is 1 / n_symbols, 3 %. Without any
    hop, naming the token before the one just read is right in 13 % of them (one hop), repeating the one just read in
    19 % (two hops); one hop in place of two in 11 %. For more hops, give a longer block or fewer symbols: with the
    defaults, four hops leave 6 % of the positions, and repeating the token just read is right in half of them.

    Args:
        hops: number of hops, at least 1.
        n_symbols: number of symbols. With many more than ``context_length`` next to no position has an answer.
        context_length: T, at least 2.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "induction"

    def __init__(self, hops: int = 1, n_symbols: int = 32, context_length: int = 64):
        self.hops, self.vocab_size = as_whole("hops", hops, 1), as_whole("n_symbols", n_symbols, 2)
        self.context_length = as_whole("context_length", context_length, 2)

    def labels(self, tokens: Tensor) -> Tensor:
        """The labels of ``tokens``, both int64 [B, T + 1]."""
        read = tokens[:, :-1]
        previous = _previous_occurrence(read)
        at = torch.arange(read.shape[1], device=read.device).expand_as(read)
        for _ in range(self.hops):
            at = previous.gather(1, at) + 1  # without an earlier occurrence 0, from where no hop leads anywhere else
        answers = read.gather(1, at).masked_fill(at == 0, IGNORE_INDEX)
        return F.pad(answers, (1, 0), value=IGNORE_INDEX)

    def _draw(self, rng: np.random.Generator, batch_size: int) -> tuple[Tensor, Tensor]:
        tokens = torch.from_numpy(rng.integers(self.vocab_size, size=(batch_size, self.context_length + 1)))
        return tokens, self.labels(tokens)


def _previous_occurrence(tokens: Tensor) -> Tensor:
    """[B, T] -> [B, T]: where each token occurred last before, -1 where it is new."""
    order = tokens.argsort(dim=1, stable=True)  # the occurrences of a symbol are neighbours, in order of time
    ordered = tokens.gather(1, order)
    earlier = order[:, :-1].masked_fill(ordered[:, 1:] != ordered[:, :-1], -1)
    return torch.full_like(tokens, -1).scatter(1, order[:, 1:], earlier)


class AssociativeRecall(Task):
    """Multi-query associative recall (MQAR; Arora et al. 2023, arXiv 2312.04927): look the key's value up.

    A window is ``k1 v1 k2 v2 ...``, different keys with different values, and then keys of the window until it is full:
    each of them once in random order, then each again, and so on. The answer at a queried key is its value. As in the
    paper, values do not follow the queries. Unlike in the paper, every position after the pairs is a query.

    By default 32 positions of a window, half of them, are scored. Chance is 1 / n_values, 3 %; to name any value of the
    window scores 1 / n_pairs, 6 %.

    Args:
        n_keys, n_values: how many there are, at least ``n_pairs``. Tokens: the keys, then the values.
        n_pairs: pairs in a window.
        context_length: T, at least ``2 * n_pairs + 1``; from ``3 * n_pairs`` on every key is queried.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "recall"

    def __init__(self, n_keys: int = 32, n_values: int = 32, n_pairs: int = 16, context_length: int = 64):
        self.n_pairs = n_pairs = as_whole("n_pairs", n_pairs, 1)
        why = f", as many as n_pairs={n_pairs}, since those of a window differ"
        self.n_keys = as_whole("n_keys", n_keys, n_pairs, remedy=why)
        self.n_values = as_whole("n_values", n_values, n_pairs, remedy=why)
        self.vocab_size = self.n_keys + self.n_values
        room = f", the room of n_pairs={n_pairs} pairs and one query; give fewer pairs or a longer block"
        self.context_length = as_whole("context_length", context_length, 2 * n_pairs + 1, remedy=room)

    def _draw(self, rng: np.random.Generator, batch_size: int) -> tuple[Tensor, Tensor]:
        keys = _permutations(rng, (batch_size,), self.n_keys)[:, : self.n_pairs]
        values = self.n_keys + _permutations(rng, (batch_size,), self.n_values)[:, : self.n_pairs]
        n_queries = self.context_length + 1 - 2 * self.n_pairs  # the last one is not read
        n_rounds = -(-n_queries // self.n_pairs)
        queried = _permutations(rng, (batch_size, n_rounds), self.n_pairs).reshape(batch_size, -1)[:, :n_queries]
        pairs = np.stack((keys, values), axis=2).reshape(batch_size, -1)
        tokens = np.concatenate((pairs, np.take_along_axis(keys, queried, axis=1)), axis=1)
        labels = np.full_like(tokens, IGNORE_INDEX)
        labels[:, 2 * self.n_pairs + 1 :] = np.take_along_axis(values, queried[:, :-1], axis=1)
        return torch.from_numpy(tokens), torch.from_numpy(labels)


def _permutations(rng: np.random.Generator, shape: tuple[int, ...], n: int) -> np.ndarray:
    """Independent permutations of 0 .. n - 1, int64 [*shape, n]."""
    return rng.permuted(np.broadcast_to(np.arange(n, dtype=np.int64), (*shape, n)), axis=-1)


def _floor_of_median(values: Sequence[int]) -> int:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


LISTOPS_TOKENS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]", "<pad>")  # a digit's id is its value
_OPERATORS = {10: min, 11: max, 12: _floor_of_median, 13: lambda values: sum(values) % 10}
_CLOSE, _PAD = 14, 15


class ListOps(Task):
    """The value of a nested expression of lists of digits (Nangia, Bowman 2018, arXiv 1804.06028).

    A window is one expression such as ``[MAX 2 9 [MIN 4 7 ] 0 ]``, then padding; see ``LISTOPS_TOKENS``. MED is the
    median, rounded down, SM the sum modulo 10. The answer, a digit, is scored once, at the bracket that closes the
    expression. Depths 1 .. max_depth come with weights 1 .. max_depth, so that most expressions are deep and some easy;
    an argument's depth is uniform in 0 (a digit) .. what its list has room for, and one argument has the greatest.

    By default half of the expressions have depth 3 and a sixth depth 1; lengths are 4 .. 64, 24 on average. The most
    frequent answer scores 11 % (majority class), the most frequent one of the outermost operator 23 %, that operator
    applied to all digits, as if nothing were nested, 41 % (100 % of depth 1, 36 % of depth 2, 26 % of depth 3).

    Args:
        max_depth: deepest nesting, 1 is lists of digits.
        max_args: most arguments of an operator, at least 2; their number is uniform from 2, as far as there is room.
        context_length: T, at least ``3 * max_depth + 1``; expressions are no longer.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "listops"
    vocab_size = len(LISTOPS_TOKENS)

    def __init__(self, max_depth: int = 3, max_args: int = 5, context_length: int = 64):
        self.max_depth, self.max_args = as_whole("max_depth", max_depth, 1), as_whole("max_args", max_args, 2)
        room = f", the room of max_depth={self.max_depth} nested lists; give a smaller depth or a longer block"
        self.context_length = as_whole("context_length", context_length, _shortest(self.max_depth), remedy=room)

    def _draw(self, rng: np.random.Generator, batch_size: int) -> tuple[Tensor, Tensor]:
        tokens = torch.full((batch_size, self.context_length + 1), _PAD)
        labels = torch.full_like(tokens, IGNORE_INDEX)
        draw = random.Random(int(rng.integers(1 << 63)))  # many times faster than numpy at one number at a time
        depths = range(1, self.max_depth + 1)
        for row, depth in enumerate(draw.choices(depths, weights=depths, k=batch_size)):
            expression, value = self._expression(draw, depth, self.context_length)
            tokens[row, : len(expression)] = torch.tensor(expression)
            labels[row, len(expression)] = value
        return tokens, labels

    def _expression(self, draw: random.Random, depth: int, room: int) -> tuple[list[int], int]:
        """Tokens, at most ``room``, and value of an expression of exactly this depth; depth 0 is a digit."""
        if depth == 0:
            digit = draw.randrange(10)
            return [digit], digit
        # Brackets take 2 tokens, the argument of the greatest depth and the others (at first digits) what they must.
        n_args = draw.randint(2, min(self.max_args, room - 1 - _shortest(depth - 1)))
        spare = room - 2 - _shortest(depth - 1) - (n_args - 1)
        arguments: list[list[int]] = [[]] * n_args
        values = [0] * n_args
        for rank, index in enumerate(draw.sample(range(n_args), n_args)):  # in order, the first would take the room
            inner = min(draw.randrange(depth), spare // 3) if rank else depth - 1
            least = 1 if rank else _shortest(depth - 1)
            arguments[index], values[index] = self._expression(draw, inner, least + spare)
            spare -= len(arguments[index]) - least
        operator = draw.choice(tuple(_OPERATORS))
        tokens = [operator, *(token for argument in arguments for token in argument), _CLOSE]
        return tokens, _OPERATORS[operator](values)


def _shortest(depth: int) -> int:
    """Length of the shortest expression of a depth: two arguments, all but one of them digits."""
    return 3 * depth + 1


def count_correct(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """(scored positions whose likeliest token is the label, scored positions); the ratio of sums is the accuracy.

    Args:
        logits: [B, T, V], of the tokens ``tokens[:, :-1]``.
        labels: [B, T + 1], as :meth:`Task.batch` returns them; shifted inside.

    Raises:
        ValueError: the shapes do not agree.
    """
    if logits.dim() != 3 or labels.shape != (logits.shape[0], logits.shape[1] + 1):
        raise ValueError(
            f"logits {tuple(logits.shape)} with labels {tuple(labels.shape)}: must be [B, T, V] and [B, T + 1]; give "
            "the logits of the tokens but the last, and the labels unshifted"
        )
    targets = labels[:, 1:]
    scored = targets != IGNORE_INDEX
    return int(((logits.argmax(-1) == targets) & scored).sum()), int(scored.sum())


TASKS: dict[str, type[Task]] = {task.name: task for task in (Induction, AssociativeRecall, ListOps)}


def make_task(name: str, **options: int) -> Task:
    """The task of that name with its options, such as ``make_task("induction", hops=2)``.

    Raises:
        ValueError: there is no such task, or an option is out of range.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"task {quote(name)}: allowed are {', '.join(TASKS)}")
    return TASKS[name](**options)
