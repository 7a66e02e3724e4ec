"""Speculative decoding: something cheap guesses some tokens, the path that is asked for checks them all in one call.

A round drafts n tokens after the last one that is known and reads all of them at once along the path. Greedy decoding takes
the guesses that the path would have chosen itself, and its own choice behind them. Sampling takes a guess d, drawn from the
drafter's distribution q, with probability min(1, p(d) / q(d)), and draws from the positive part of p - q where it is turned
down: the tokens then follow p exactly (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318).

Rows of a batch share one length. A row that took more guesses than another keeps them: they are certain, and in the next
round they stand where guesses stand.

Shapes: B rows of a batch, K tokens read at once, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll_seq.generation.draft_control import LONGEST, Control, Fixed, clock
from hbll_seq.generation.drafters import Drafter, PathDrafter, SweepDrafter
from hbll_seq.generation.protocol import CausalLM
from hbll_seq.generation.runner import Runner
from hbll_seq.generation.sampler import Sampler
from hbll_seq.generation.text_drafter import Budget, RepeatedText
from hbll_seq.utils.options import check_options, option
from hbll_seq.utils.reading import quote

#: what a row's random numbers are used for, beside drawing a token
_DRAFT, _ACCEPT, _RESIDUAL = 1, 2, 3


@dataclass(frozen=True)
class Speculation:
    """How tokens are drafted. What is left out is chosen while the text is written.

    Attributes:
        drafter: the depth that drafts, or the path; or ``"text"``: what followed where the last three tokens stood before.
            None chooses a depth by measured time and acceptance.
        in_order: in place of ``drafter``: the path itself drafts with its first ``in_order`` blocks in order and the others
            side by side (docs/method.md 2.2).
        n_draft: how many tokens are drafted at once. With the drafter named as well nothing falls back to plain decoding.
            A text depends on the clock only where a depth or its length is to be chosen.

    Raises:
        ValueError: an option is out of range, or two drafters are named.
    """

    drafter: int | Sequence[int] | str | None = None
    in_order: int | None = option(None, "blocks that a draft takes in order", low=0, remedy=", or None")
    n_draft: int | None = option(None, "tokens that are drafted at once", low=1, high=LONGEST, remedy=", or None to choose")

    def __post_init__(self):
        check_options(self)
        if isinstance(self.drafter, str) and self.drafter != "text":
            raise ValueError(f"drafter={quote(self.drafter)}: must be a depth, a path, 'text' or None")
        if self.drafter is not None and self.in_order is not None:
            raise ValueError(
                f"drafter={quote(self.drafter)} and in_order={self.in_order} are both given: a draft is made by a shorter "
                "path or by the same path with blocks side by side; choose one"
            )
        if isinstance(self.drafter, list):
            object.__setattr__(self, "drafter", tuple(self.drafter))


class Speculator:
    """Writes a batch along one path by speculation: gives the next token of every row, call by call.

    Args:
        model: see :class:`hbll_seq.generation.protocol.CausalLM`; in evaluation mode, and without gradients.
        path: of all rows.
        start: [P], the number of left-padding positions of each prompt, or None for none.
        sampler: of the rows, before their first token. It is copied.
        speculation: what is named.
        n: rows of each prompt, next to one another.

    Attributes:
        control: chooses drafter and length, and counts; see :class:`hbll_seq.generation.draft_control.Control`.

    Raises:
        ValueError: the drafter is not possible for this path.
    """

    def __init__(
        self,
        model: CausalLM,
        path: Sequence[int],
        start: Tensor | None,
        sampler: Sampler,
        speculation: Speculation,
        n: int = 1,
    ):
        start = None if start is None else start.repeat_interleave(n)
        self.model, self.path, self.n = model, model.resolve_path(path=path), n
        shared, self._drafters = drafters_of(model, self.path, start, speculation)
        self.runner = Runner(model, self.path, start, also=shared)
        self._sampler = sampler.copy()
        self._rule = _rule(self._sampler)
        n_rows = len(sampler.uniforms())
        self._is_text, self._padding = speculation.drafter == "text", [0] * n_rows if start is None else start.tolist()
        self._texts: list[RepeatedText] = []  # of each row, where the text itself is what drafts
        names = [drafter.name for drafter in self._drafters]
        if speculation.n_draft and len(names) < 2:
            self.control: Control | Fixed | Budget = Fixed(speculation.n_draft)
        elif self._is_text:
            self.control = Budget(n_rows)
        else:
            setting = (self.path, sampler.sampling.temperature == 0, n_rows)
            self.control = Control(names, model, setting, n_draft=speculation.n_draft)
        self._clock = clock(model.embed.weight.device)
        self._history: list[Tensor] = []  # [B, K]: what the runner has read, in order
        self._tails: list[list[int]] = []  # of each row the known tokens that the runner has not read
        self._queues: list[deque[tuple[int, Tensor]]] = []  # and those that no one has been told yet, with their logits
        self._guesses: list[list[int]] = []  # of each row, behind its tail
        self._blank: Tensor | None = None

    def prefill(self, input_ids: Tensor) -> None:
        """Read the prompts [P, T]."""
        input_ids = input_ids.repeat_interleave(self.n, dim=0)
        self._history = [input_ids]
        if self._is_text:
            self._texts = [RepeatedText(ids[n:]) for ids, n in zip(input_ids.tolist(), self._padding)]
        logits = self.runner.prefill(input_ids).unsqueeze(1)
        rows = range(len(input_ids))
        self._tails, self._queues, self._blank = [[] for _ in rows], [deque() for _ in rows], logits[0, 0]
        self._take(self._rule.decide(logits, input_ids[:, -1:], [1] * len(input_ids)), logits, [0] * len(input_ids))

    def next(self, running: Sequence[bool], remaining: int) -> tuple[Tensor, Tensor]:
        """The next token of each row [B], and the logits [B, V] that it comes from; of a row that does not run anything.

        Args:
            running: which rows still go on; at least one. A row that has stopped stays so.
            remaining: how many tokens a row may still get, at least 1.
        """
        alive = [row for row, runs in enumerate(running) if runs]
        while not all(self._queues[row] for row in alive):
            drafter, n_draft = self.control.choose()
            n_draft = min(n_draft, remaining - 1)
            if self._texts and n_draft > 0:
                n_draft = self._guess(n_draft, alive)
            before = self._clock()
            if n_draft < 1 and max(map(len, self._tails)) == 1 and not any(self._queues):
                told = self._plain_step()
                self.control.note(drafter, 0, 1, self._clock() - before)
                return told
            gained = self._round(None if n_draft < 1 or self._texts else self._drafters[drafter], n_draft, alive)
            self.control.note(drafter, n_draft, gained, self._clock() - before)
        told = [queue.popleft() if runs else (0, self._blank) for queue, runs in zip(self._queues, running)]
        tokens = torch.tensor([token for token, _ in told], device=self._blank.device)
        return tokens, torch.stack([logits for _, logits in told])

    def _guess(self, n_draft: int, alive: Sequence[int]) -> int:
        """Looks up what may follow in every row; returns how many tokens can be checked, at most ``n_draft``."""
        self._guesses = [[] for _ in self._tails]
        for row in alive:
            n_certain = len(self._tails[row]) - 1
            self._guesses[row] = self._texts[row].guesses(n_draft - n_certain) if n_certain < n_draft else []
            n_draft = min(n_draft, n_certain + len(self._guesses[row]))
        return n_draft

    def _add_history(self, tokens: Tensor) -> None:
        if self._drafters:  # they may have to catch up
            self._history.append(tokens)

    def _plain_step(self) -> tuple[Tensor, Tensor]:
        """What :meth:`next` returns, as plain decoding makes it."""
        tokens = torch.tensor(self._tails, device=self._history[0].device)
        logits = self.runner.step(tokens[:, 0])
        drawn = self._sampler.draw(logits)
        ids = drawn.tolist()
        self._sampler.accept(ids)
        self._add_history(tokens)
        self._tails = [[token] for token in ids]
        for text, token in zip(self._texts, ids):
            text.append([token])
        return drawn, logits

    def _round(self, drafter: Drafter | None, n_draft: int, alive: Sequence[int]) -> int:
        """Drafts and checks; returns by how many tokens the text of all rows has become longer."""
        length, device = self.runner.length, self._history[0].device
        n_known = [len(tail) for tail in self._tails]  # a row may know more than is read in this round
        guesses = self._guesses if self._texts else [[]] * len(n_known)
        rows = [(tail + guess + [0] * n_draft)[: n_draft + 1] for tail, guess in zip(self._tails, guesses)]
        known = torch.tensor(rows, device=device)
        is_known = None
        if n_draft > 0 and max(n_known) > 1:
            is_known = known.new_tensor(n_known)[:, None] > torch.arange(n_draft + 1, device=device)
        if n_draft < 1:
            tokens = known
            logits = self.runner.step(tokens[:, 0]).unsqueeze(1)
        else:
            tokens = self._draft(drafter, known, is_known)
            logits = self.runner.read(tokens)
        new = self._rule.decide(logits, tokens, n_known)
        self._take(new, logits, [n - 1 for n in n_known])
        gained = min(len(self._tails[row]) for row in alive) - 1
        if gained <= n_draft:
            self.runner.truncate(length + gained)
            tokens = tokens[:, :gained]
        self._add_history(tokens)
        for other in self._drafters:
            other.truncate(length + gained)
        self._tails = [tail[gained:] or [0] for tail in self._tails]  # of a row that has stopped anything will do
        return gained

    def _draft(self, drafter: Drafter, known: Tensor, is_known: Tensor | None) -> Tensor:
        """Tokens [B, K]: those that are known, and guesses behind them."""
        if drafter is None:
            self._rule.begin(n_sure=known.shape[1] - 1)
            return known
        columns = [known[:, 0]]
        drafter.begin(self.runner, self._history)
        self._rule.begin()
        for j in range(1, known.shape[1]):
            logits = drafter.step(columns[-1])
            certain = None if is_known is None else is_known[:, j]
            guess = self._rule.propose(logits, certain)
            columns.append(guess if certain is None else torch.where(certain, known[:, j], guess))
        drafter.end()
        return torch.stack(columns, dim=1)

    def _take(self, new: list[list[int]], logits: Tensor, first: list[int]) -> None:
        """Adds what was decided: of each row the tokens that the logits [B, K, V] from position ``first`` on gave."""
        for row, tokens in enumerate(new):
            self._tails[row] += tokens
            if self._texts:
                self._texts[row].append(tokens)
            self._queues[row].extend(zip(tokens, logits[row, first[row] :]))


def drafters_of(
    model: CausalLM, path: tuple[int, ...], start: Tensor | None, speculation: Speculation
) -> tuple[list[tuple[int, ...]], list[Drafter]]:
    """Paths that share the runner of ``path``, and the drafters that may be chosen from."""
    if speculation.drafter == "text":
        return [], []
    if speculation.in_order is not None:
        return [], [SweepDrafter(model, path, speculation.in_order)]
    if speculation.drafter is not None:
        by_depth = isinstance(speculation.drafter, int)
        named = model.resolve_path(speculation.drafter) if by_depth else model.resolve_path(path=speculation.drafter)
        if len(named) >= len(path):
            raise ValueError(
                f"drafter={quote(speculation.drafter)} has {len(named)} blocks, and the path {list(path)} has {len(path)}: "
                "a drafter must be shorter; choose a smaller depth"
            )
        is_shared = path[: len(named)] == named
        return [named] * is_shared, [PathDrafter(model, named, start, is_shared)]
    shorter = [model.resolve_path(depth) for depth in range(1, min(len(path), 3))]
    trained = [each for each in shorter if model.config.is_trained(each)] or shorter[:1]
    return [], [PathDrafter(model, each, start, False) for each in trained]


# ------------------------------------------------------------------------------------------------------- rules


def _rule(sampler: Sampler) -> _Greedy | _Drawn:
    """What decides which tokens are taken."""
    greedy = sampler.sampling.temperature == 0 and sampler.sampling.repetition_penalty == 1
    return _Greedy(sampler.n_tokens) if greedy else _Drawn(sampler)


class _Greedy:
    """The most probable token. What :class:`_Drawn` does at temperature 0, in one call for all positions."""

    def __init__(self, n_tokens: int | None):
        self.n_tokens = n_tokens

    def begin(self, n_sure: int = 0) -> None:
        """Nothing is remembered."""

    def propose(self, logits: Tensor, certain: Tensor | None) -> Tensor:
        return logits[:, : self.n_tokens].argmax(dim=-1)

    def decide(self, logits: Tensor, tokens: Tensor, n_known: list[int]) -> list[list[int]]:
        chosen = logits[..., : self.n_tokens]
        if not torch.isfinite(chosen.amax(dim=-1)).all():
            raise ValueError("the model's logits hold NaN or inf: its weights or precision are broken; load sound ones")
        new = []
        for row, read, n in zip(chosen.argmax(dim=-1).tolist(), tokens.tolist(), n_known):
            last = n - 1  # the position whose logits decide the first unknown token
            while last + 1 < len(read) and read[last + 1] == row[last]:
                last += 1
            new.append(row[n - 1 : last + 1])
        return new


class _Drawn:
    """Draws from the sampler's distribution, with guesses taken and turned down so that nothing but speed depends on them."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self._ahead = sampler  # the same rows with the guesses of a round behind them
        self._guessed: list[Tensor | None] = []  # [B, V]: what each guess was drawn from; None: it was not drawn

    def begin(self, n_sure: int = 0) -> None:
        self._ahead, self._guessed = self.sampler.copy(), [None] * n_sure

    def propose(self, logits: Tensor, certain: Tensor | None) -> Tensor:
        q = self._ahead.probabilities(logits)
        guess = self._ahead.pick(q, _DRAFT)
        self._guessed.append(q)
        ids = guess.tolist()
        self._ahead.accept(ids if certain is None else [None if c else token for token, c in zip(ids, certain.tolist())])
        return guess

    def decide(self, logits: Tensor, tokens: Tensor, n_known: list[int]) -> list[list[int]]:
        new: list[list[int]] = [[] for _ in n_known]
        open_rows, read = [True] * len(n_known), tokens.tolist()
        for i in range(min(n_known) - 1, logits.shape[1]):
            here = [is_open and i >= n - 1 for is_open, n in zip(open_rows, n_known)]
            if not any(here):
                continue
            is_last = i + 1 == logits.shape[1]
            drawn, taken = self._one(logits[:, i], None if is_last else tokens[:, i + 1], i)
            self.sampler.accept([token if decides else None for token, decides in zip(drawn, here)])
            for row, decides in enumerate(here):
                if decides:
                    new[row].append(drawn[row])
                    open_rows[row] = not is_last and taken[row] and read[row][i + 1] == drawn[row]
        return new

    def _one(self, logits: Tensor, guess: Tensor | None, i: int) -> tuple[list[int], list[bool]]:
        """A token of each row by the logits [B, V], and whether it is the guess, which the i-th draft was."""
        p = self.sampler.probabilities(logits)
        if guess is None:
            return self.sampler.pick(p).tolist(), [False] * len(p)
        q = self._guessed[i]
        q = F.one_hot(guess, p.shape[1]).to(p.dtype) if q is None else q
        of_guess = guess.unsqueeze(1)
        uniform = self.sampler.uniforms(_ACCEPT).to(p.device)
        taken = uniform * q.gather(1, of_guess)[:, 0] < p.gather(1, of_guess)[:, 0]
        rest = residual(p, q)
        drawn = torch.where(taken, guess, self.sampler.pick(rest, _RESIDUAL))
        return drawn.tolist(), taken.tolist()


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What a token is drawn from where a guess drawn from ``q`` was turned down: the positive part of ``p - q``, [B, V],
    which need not sum to one. Where nothing is left (but for rounding the two are equal) it is ``p``."""
    rest = (p - q).clamp(min=0)
    return torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)
