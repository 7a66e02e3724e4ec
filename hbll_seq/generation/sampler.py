"""One token for each row from logits: repetition penalty, temperature, top-k, nucleus, min-p.

Shapes: B rows of a batch, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.utils.seeds import mix_seeds

#: how many of the most probable tokens are ranked first for ``top_p``, and how many times as many each time these were not
#: enough; ranking all of a large vocabulary costs more than the rest of a draw.
_FIRST_RANKED, _MORE_RANKED = 64, 8


class Sampler:
    """Draws the next token of every row, and remembers what the rows hold.

    Each row has a stream of random numbers of its own: a function of seed, sample number and position in the new text. So a
    prompt gets the same text alone, in a batch and at any row. The numbers are made on the CPU, so that a seed means the same
    draw on every device.

    Args:
        sampling: the options.
        prompts: token ids of each row; with ``sampling.n`` above 1 the n rows of a prompt follow one another.
        n_tokens: only ids below it are drawn (a vocabulary may be padded beyond its tokenizer); None for all.
    """

    def __init__(self, sampling: SamplingParams, prompts: Sequence[Sequence[int]], n_tokens: int | None = None):
        self.sampling, self.n_tokens = sampling, n_tokens
        rows = range(len(prompts))
        if sampling.seed is not None or sampling.temperature == 0:  # greedy draws nothing: the global generator stays
            self._streams = [(sampling.seed or 0, row % sampling.n) for row in rows]
        else:
            self._streams = [(seed, 0) for seed in torch.randint(2**63 - 1, (len(prompts),)).tolist()]
        self._positions = [0 for _ in rows]
        self._prompts = [list(ids) for ids in prompts]
        self._seen: Tensor | None = None  # [B, V], made when the first logits tell V

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that the next token of each row is drawn from: logits [B, V] -> [B, V], at most ``n_tokens`` wide.

        At temperature 0 all of it is on one token.

        Raises:
            ValueError: a logit is NaN or +inf, or all of a row are -inf.
        """
        scores = self._scores(logits)
        if self.sampling.temperature == 0:
            return F.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(scores.dtype)
        return self._distribution(scores)

    def draw(self, logits: Tensor) -> Tensor:
        """One token for each row, logits [B, V] -> ids [B]; :meth:`accept` adds it to the row. Errors as in
        :meth:`probabilities`."""
        scores = self._scores(logits)
        return scores.argmax(dim=-1) if self.sampling.temperature == 0 else self.pick(self._distribution(scores))

    def pick(self, probabilities: Tensor, use: int = 0) -> Tensor:
        """The ids [B] that the rows' random numbers name in ``probabilities`` [B, V], which need not sum to one.

        Args:
            probabilities: of which each row has one above 0.
            use: see :meth:`uniforms`.
        """
        cumulative = probabilities.cumsum(dim=-1)
        uniform = self.uniforms(use).to(cumulative.device).unsqueeze(1)
        # The first index whose cumulative mass exceeds the draw; a float32 below 1 times the total stays below the total.
        return (cumulative <= uniform * cumulative[:, -1:]).sum(dim=-1)

    def uniforms(self, use: int = 0) -> Tensor:
        """A number in [0, 1) for the next position of each row, [B], on the CPU; another for every ``use``: 0 draws the
        token, and whoever needs further numbers there takes 1, 2, .. ."""
        mixed = [mix_seeds(*stream, position, use) for stream, position in zip(self._streams, self._positions)]
        return torch.tensor([number >> 39 for number in mixed], dtype=torch.float32) * 2.0**-24

    def accept(self, ids: Tensor | Sequence[int | None]) -> None:
        """Add a token [B] to each row; a row whose id is None stays as it is."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        self._positions = [at + (token is not None) for at, token in zip(self._positions, ids)]
        if self.sampling.repetition_penalty == 1:
            return
        if self._seen is None:  # no logits yet
            self._prompts = [row + ([] if token is None else [token]) for row, token in zip(self._prompts, ids)]
            return
        rows = [row for row, token in enumerate(ids) if token is not None]
        self._seen[rows, [ids[row] for row in rows]] = True

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        self._streams, self._positions, self._prompts = (
            [values[row] for row in rows] for values in (self._streams, self._positions, self._prompts)
        )
        self._seen = None if self._seen is None else self._seen[list(rows)]

    def copy(self) -> Sampler:
        """Another sampler in the same state, to try tokens that may be taken back."""
        twin = copy.copy(self)
        twin._seen = None if self._seen is None else self._seen.clone()
        return twin

    def _scores(self, logits: Tensor) -> Tensor:
        """Checked logits [B, V] of the ids that may be drawn, as float32, after the repetition penalty."""
        if logits.dim() != 2 or not logits.numel() or not logits.is_floating_point():
            raise ValueError(f"logits of shape {tuple(logits.shape)} and {logits.dtype}: must be [batch, vocabulary] numbers")
        logits = logits[:, : self.n_tokens]
        if not torch.isfinite(logits.amax(dim=-1)).all():  # the maximum of a row that holds NaN is NaN
            raise ValueError("the model's logits hold NaN or inf: its weights or precision are broken; load sound ones")
        logits, penalty = logits.float(), self.sampling.repetition_penalty
        if penalty == 1:
            return logits
        if self._seen is None:
            self._seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            for row, ids in enumerate(self._prompts):
                self._seen[row, [token for token in ids if token < logits.shape[-1]]] = True
        return torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def _distribution(self, scores: Tensor) -> Tensor:
        # Shifted by the maximum first, so that a tiny temperature gives -inf (probability 0) and never NaN.
        scaled = (scores - scores.amax(dim=-1, keepdim=True)) / max(self.sampling.temperature, 1e-30)
        return keep_most_probable(scaled, self.sampling).softmax(dim=-1)


def keep_most_probable(scaled: Tensor, sampling: SamplingParams) -> Tensor:
    """Scores [B, V], whose maximum is 0 in each row -> the same with -inf for what top_k, top_p or min_p leaves out."""
    left_out = None
    if (sampling.top_k or math.inf) < scaled.shape[-1] or (sampling.top_p or 1) < 1:
        ranked, counts = _ranked(scaled, sampling.top_k, sampling.top_p)
        last = ranked.gather(-1, counts - 1)  # the score of the last that is kept
        left_out = scaled < last
        if not torch.equal(scaled.shape[-1] - left_out.sum(dim=-1, keepdim=True), counts):  # of equal ones the lower ids
            above, equal = scaled > last, scaled == last
            left_out |= equal & (equal.cumsum(dim=-1) > counts - above.sum(dim=-1, keepdim=True))
    if sampling.min_p is not None:
        too_low = scaled < math.log(sampling.min_p)
        left_out = too_low if left_out is None else left_out | too_low
    return scaled if left_out is None else scaled.masked_fill(left_out, -math.inf)


def _ranked(scaled: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """The highest scores of each row in falling order [B, k], as many as are needed, and how many are kept [B, 1]."""
    n_tokens = scaled.shape[-1]
    if top_k is not None and top_k < n_tokens:
        ranked = scaled.topk(top_k, dim=-1).values
        if top_p is None or top_p == 1:
            return ranked, torch.full_like(ranked[:, :1], top_k, dtype=torch.long)
        mass = ranked.softmax(dim=-1).cumsum(dim=-1)
    else:
        total, n_ranked = scaled.logsumexp(dim=-1, keepdim=True), _FIRST_RANKED
        while True:
            ranked = scaled.topk(min(n_ranked, n_tokens), dim=-1).values
            mass = (ranked - total).exp().cumsum(dim=-1)
            if n_ranked >= n_tokens or bool((mass[:, -1] >= top_p).all()):
                break
            n_ranked *= _MORE_RANKED
    mass_before = F.pad(mass[:, :-1], (1, 0))
    return ranked, (mass_before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)  # float32 may round top_p to 0
