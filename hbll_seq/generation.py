"""Text in, text out, along any dyadic path: prefill, decode_one_token and sample, and the mixin over them.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll_seq.path_cache import PathCache

if TYPE_CHECKING:  # model.py imports this file
    from hbll_seq.model import HBLLForCausalLM
    from hbll_seq.tokenizer import Tokenizer


def prefill(
    model: HBLLForCausalLM, input_ids: Tensor, path: Sequence[int], start: Tensor | None = None
) -> tuple[Tensor, PathCache]:
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


def decode_one_token(model: HBLLForCausalLM, tokens: Tensor, path: Sequence[int], cache: PathCache) -> Tensor:
    """Add one token to each row of the cache, ``tokens`` [B], and return the logits [B, V] of the next."""
    cache.append(tokens.unsqueeze(1))
    return model.read_out(cache.advance(path)[:, -1], path)


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
        ValueError: an option is out of range, or a logit is NaN or +inf.
    """
    check_sampling(temperature, top_k, top_p)
    if torch.isnan(logits).any() or torch.isposinf(logits).any():
        raise ValueError("the model's logits hold NaN or inf: its weights or precision are broken; load sound ones")
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Shifted by the maximum first, so that a tiny temperature gives -inf (probability 0) and never NaN.
    logits = logits.float()
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)
    order = None
    if (top_k is not None and top_k < scaled.shape[-1]) or (top_p is not None and top_p < 1):
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        scaled = scaled[:, :top_k]  # top_k=None keeps all
        if top_p is not None and top_p < 1:
            mass_up_to = scaled.softmax(dim=-1).cumsum(dim=-1)
            mass_before = F.pad(mass_up_to[:, :-1], (1, 0))
            scaled = scaled.masked_fill(mass_before >= top_p, -math.inf)
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
    uniform = torch.rand(len(scaled), 1, generator=generator).to(scaled.device)
    # The first index whose cumulative mass exceeds the draw; a float32 below 1 times the total stays below the total.
    index = (cumulative <= uniform * cumulative[:, -1:]).sum(dim=-1)
    return index if order is None else order.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError where a sampling option is out of range."""
    if not _is_number(temperature) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature!r}: must be a number of at least 0 (0 is greedy)")
    if top_k is not None and (not _is_whole(top_k) or top_k < 1):
        raise ValueError(f"top_k={top_k!r}: must be a whole number of at least 1, or None to keep every token")
    if top_p is not None and (not _is_number(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p={top_p!r}: must be a number above 0 and at most 1, or None to keep every token")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """No gradient and no dropout inside; training flags are put back as they were.

    Not ``inference_mode``: a tensor that a block caches in there could not be used in training afterwards.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def generate_ids(
    model: HBLLForCausalLM,
    prompts: Sequence[Sequence[int]],
    path: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_id: int | None = None,
    n_tokens: int | None = None,
) -> Iterator[list[int | None]]:
    """Token ids in, token ids out, one step at a time.

    Args:
        prompts: B non-empty lists of token ids, of any lengths.
        seed: starts a generator of its own; None uses torch's global one.
        eos_id: a row ends with this token, which is not yielded.
        n_tokens: only ids below it are drawn (a vocabulary may be padded beyond its tokenizer); None for all.

    Yields:
        For each step B ids, None in a row that has ended; ends when all rows have.
    """
    device = model.embed.weight.device
    longest = max(map(len, prompts))
    start = torch.tensor([longest - len(ids) for ids in prompts], device=device)
    input_ids = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    running, cache, tokens = [True] * len(prompts), None, input_ids
    for _ in range(max_new_tokens):
        with _evaluation_mode(model):
            if cache is None:  # without padding no start is given: the blocks then need no mask of their own
                logits, cache = prefill(model, input_ids, path, start if start.any() else None)
            else:
                logits = decode_one_token(model, tokens, path, cache)
            tokens = sample(logits[:, :n_tokens], temperature, top_k, top_p, generator)
        step = tokens.tolist()
        running = [alive and token != eos_id for alive, token in zip(running, step)]
        if not any(running):
            return
        yield [token if alive else None for alive, token in zip(running, step)]


class _TextPieces:
    """Turns token ids into text as they come; a character split across tokens comes out once it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._held: list[int] = []  # ids whose bytes do not form a character (yet)

    def push(self, token: int) -> str:
        """Text that ``token`` completes; may be empty."""
        self._held.append(token)
        text = self.tokenizer.decode(self._held)
        if text.endswith("\ufffd"):  # what such bytes decode to; they may still become a character
            return ""
        self._held = []
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for bytes that never became a character."""
        text, self._held = self.tokenizer.decode(self._held), []
        return text


class GenerationMixin:
    """Gives a causal language model with ``tree``, ``embed``, ``blocks`` and ``head`` its text interface."""

    def generate(
        self,
        prompt: str | list[str],
        depth: int | None = None,
        path: Sequence[int] | None = None,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stream: bool = False,
        truncate_prompt: bool = False,
    ) -> str | list[str]:
        """The prompt and its continuation, up to ``max_new_tokens`` tokens or the end of the text.

        Args:
            prompt: a text, or a list of texts, which are continued together.
            depth: number of blocks to run, 1 to ``config.n_layer``; None for all. See ``DyadicTree.path_for_depth``.
            path: block numbers to run, such as ``[4, 6, 7]``, instead of ``depth``.
            max_new_tokens: may pass the context: attention then looks ``block_size`` tokens back, and recurrent blocks
                remember what their states hold, in the same memory for every token.
            temperature: 0 is greedy (always the most probable token).
            top_k, top_p: see :func:`sample`.
            seed: makes the draw repeatable; None uses torch's global generator.
            stream: also write the text to stdout as it comes (one prompt only).
            truncate_prompt: keep the last ``block_size`` tokens of a longer prompt instead of refusing it. A model of
                recurrent blocks alone reads prompts of any length, and whole.

        Returns:
            A text for a text, a list for a list.

        Raises:
            ValueError: an option, the depth, the path or a prompt is not possible, or the model has no tokenizer.
        """
        texts = [prompt] if isinstance(prompt, str) else prompt
        if stream and isinstance(texts, (list, tuple)) and len(texts) != 1:
            raise ValueError(f"stream=True with {len(texts)} prompts: it writes one text; pass one prompt")
        steps = self._start(
            texts, depth, path, max_new_tokens, temperature, top_k, top_p, seed, truncate_prompt
        )
        new_ids: list[list[int]] = [[] for _ in texts]
        pieces = _TextPieces(self.tokenizer)
        if stream:
            print(texts[0], end="", flush=True)
        for step in steps:
            for row, token in zip(new_ids, step):
                if token is not None:
                    row.append(token)
            if stream:
                print(pieces.push(step[0]), end="", flush=True)
        if stream:
            print(pieces.flush(), flush=True)
        whole = [text + self.tokenizer.decode(ids) for text, ids in zip(texts, new_ids)]
        return whole[0] if isinstance(prompt, str) else whole

    def stream(
        self,
        prompt: str,
        depth: int | None = None,
        path: Sequence[int] | None = None,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        truncate_prompt: bool = False,
    ) -> Iterator[str]:
        """The continuation of one prompt, piece by piece as it is generated (the prompt itself is not repeated).

        Options and errors are those of :meth:`generate`; errors are raised by this call, not by the first piece.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"prompt={prompt!r}: stream continues one text; pass a str, or use generate for a list")
        steps = self._start(
            [prompt], depth, path, max_new_tokens, temperature, top_k, top_p, seed, truncate_prompt
        )
        return self._pieces(steps)

    def _pieces(self, steps: Iterator[list[int | None]]) -> Iterator[str]:
        pieces = _TextPieces(self.tokenizer)
        for (token,) in steps:
            if piece := pieces.push(token):
                yield piece
        if piece := pieces.flush():
            yield piece

    def _start(
        self, texts, depth, path, max_new_tokens, temperature, top_k, top_p, seed, truncate_prompt
    ) -> Iterator[list[int | None]]:
        """Check everything that the user gave, then hand out the steps, none of them run yet."""
        path = self.resolve_path(depth, path)
        check_sampling(temperature, top_k, top_p)
        if not _is_whole(max_new_tokens) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r}: must be a whole number of at least 1")
        if seed is not None and (not _is_whole(seed) or not 0 <= seed < 2**63):
            raise ValueError(f"seed={seed!r}: must be a whole number from 0 to 2**63 - 1, or None")
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer, which text needs: load a folder that holds tokenizer.model, set "
                "model.tokenizer to the Tokenizer it was trained with, or use generate_ids for token ids"
            )
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompt={texts!r}: must be a text or a non-empty list of texts")
        prompts = [self._encode_prompt(text, truncate_prompt) for text in texts]
        return generate_ids(
            self, prompts, path, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed, eos_id=self.tokenizer.eos_id, n_tokens=self.tokenizer.vocab_size,
        )  # fmt: skip

    def _encode_prompt(self, text: str, truncate: bool) -> list[int]:
        if not text:
            raise ValueError("prompt='': nothing to continue; give at least one character, such as a line break")
        ids = self.tokenizer.encode(text)
        if not self.config.has_attention:  # the states of recurrent blocks hold a prompt of any length
            return ids
        limit = self.config.block_size
        if len(ids) > limit and not truncate:
            raise ValueError(
                f"the prompt has {len(ids)} tokens ({text[:40]!r}...), more than the model's context of {limit} "
                f"(block_size): shorten it, or pass truncate_prompt=True to keep its last {limit} tokens"
            )
        return ids[-limit:]


def generate(
    prompt: str | list[str],
    depth: int | None = None,
    model: HBLLForCausalLM | str | PathLike | None = None,
    *,
    path: Sequence[int] | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stream: bool = False,
    truncate_prompt: bool = False,
) -> str | list[str]:
    """``model.generate`` for a model given by name: see :meth:`GenerationMixin.generate`.

    Args:
        model: a model object; a folder; a Hub id; ``"latest"`` for the newest finished run under ``./runs``, which is
            named on stderr. A folder or Hub id is loaded at every call: to call often, load it once with
            ``HBLLForCausalLM.from_pretrained`` and pass the object.

    Raises:
        ValueError: as :meth:`GenerationMixin.generate` and ``from_pretrained``; or ``model`` is None.
    """
    if model is None:
        raise ValueError(
            "model=None: no model is bundled with hbll_seq yet. Train one with `accelerate launch train/lm.py` and "
            'pass model="latest", or pass a folder, a Hub id or a model object'
        )
    if isinstance(model, (str, PathLike)):
        from hbll_seq.hub import find_latest_run
        from hbll_seq.model import HBLLForCausalLM

        if model == "latest":
            model = find_latest_run()
            print(f"hbll_seq: model from {model}", file=sys.stderr)
        model = HBLLForCausalLM.from_pretrained(model)
    elif not isinstance(model, GenerationMixin):
        raise ValueError(
            f"model={type(model).__name__} object: must be an HBLLForCausalLM, a folder, a Hub id or 'latest'; of a "
            "wrapped model (DistributedDataParallel, LocalObjective) pass the model inside"
        )
    return model.generate(
        prompt, depth=depth, path=path, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, seed=seed, stream=stream, truncate_prompt=truncate_prompt,
    )  # fmt: skip
