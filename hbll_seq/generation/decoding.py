"""Text in, text out, along any dyadic path: prefill and decode_one_token, and the mixin over them.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hbll_seq.generation.path_cache import PathCache
from hbll_seq.generation.sampling import check_sampling, check_seed, sample
from hbll_seq.utils.console import ForgivingStream, printable
from hbll_seq.utils.modules import evaluation_mode
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_flag, as_whole, whole_or_none

if TYPE_CHECKING:  # model.py imports this file
    from hbll_seq.data.tokenizer import Tokenizer
    from hbll_seq.models.causal_lm import HBLLForCausalLM


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
    """Token ids in, token ids out, one step at a time. Options and errors are told by this call, not by the first step.

    Args:
        prompts: B non-empty lists of token ids, of any lengths.
        seed: starts a generator of its own; None uses torch's global one.
        eos_id: a row ends with this token, which is not yielded.
        n_tokens: only ids below it are drawn (a vocabulary may be padded beyond its tokenizer); None for all.

    Yields:
        For each step B ids, None in a row that has ended; ends when all rows have.

    Raises:
        ValueError: an option, the path or a prompt is not possible.
    """
    path, sampling = model.resolve_path(path=path), check_sampling(temperature, top_k, top_p)
    max_new_tokens, seed = as_whole("max_new_tokens", max_new_tokens, 1), check_seed(seed)
    prompts = _check_prompts(prompts, model.config.vocab_size)
    return _steps(model, prompts, path, max_new_tokens, sampling, seed, eos_id, n_tokens)


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


def _steps(model, prompts, path, max_new_tokens, sampling, seed, eos_id, n_tokens) -> Iterator[list[int | None]]:
    """What :func:`generate_ids` yields, of checked arguments."""
    device = model.embed.weight.device
    longest = max(map(len, prompts))
    start = torch.tensor([longest - len(ids) for ids in prompts], device=device)
    input_ids = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    running, cache, tokens = [True] * len(prompts), None, input_ids
    for _ in range(max_new_tokens):
        with evaluation_mode(model):
            if cache is None:  # without padding no start is given: the blocks then need no mask of their own
                logits, cache = prefill(model, input_ids, path, start if start.any() else None)
            else:
                logits = decode_one_token(model, tokens, path, cache)
            tokens = sample(logits[:, :n_tokens], *sampling, generator)
        step = tokens.tolist()
        running = [alive and token != eos_id for alive, token in zip(running, step)]
        if not any(running):
            return
        yield [token if alive else None for alive, token in zip(running, step)]


def _writer() -> Callable[[str], None]:
    """Writes text to stdout at once, whatever becomes of that: the text is also returned. A terminal is not steered."""
    out = ForgivingStream(sys.stdout)
    shown = printable if out.isatty() else str

    def write(text: str) -> None:
        out.write(shown(text))
        out.flush()

    return write


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
            max_new_tokens: may pass the context: attention then looks ``context_length`` tokens back, and recurrent blocks
                remember what their states hold, in the same memory for every token.
            temperature: 0 is greedy (always the most probable token).
            top_k, top_p: see :func:`sample`.
            seed: makes the draw repeatable; None uses torch's global generator.
            stream: also write the text to stdout as it comes (one prompt only). What stdout cannot take is no error, and
                control characters are shown as escapes on a terminal; the text that is returned holds all.
            truncate_prompt: keep the last ``context_length`` tokens of a longer prompt instead of refusing it. A model of
                recurrent blocks alone reads prompts of any length, and whole.

        Returns:
            A text for a text, a list for a list.

        Raises:
            ValueError: an option, the depth, the path or a prompt is not possible, or the model has no tokenizer.
        """
        texts, stream = [prompt] if isinstance(prompt, str) else prompt, as_flag("stream", stream)
        if stream and isinstance(texts, (list, tuple)) and len(texts) != 1:
            raise ValueError(f"stream=True with {len(texts)} prompts: it writes one text; pass one prompt")
        steps = self._start(
            texts, depth, path, max_new_tokens, temperature, top_k, top_p, seed, truncate_prompt
        )
        new_ids: list[list[int]] = [[] for _ in texts]
        pieces, write = _TextPieces(self.tokenizer), _writer() if stream else lambda text: None
        write(texts[0])
        for step in steps:
            for row, token in zip(new_ids, step):
                if token is not None:
                    row.append(token)
            if stream:
                write(pieces.push(step[0]))
        write(pieces.flush() + "\n")
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
            raise ValueError(f"prompt={quote(prompt)}: stream continues one text; pass a str, or use generate for a list")
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
        truncate_prompt = as_flag("truncate_prompt", truncate_prompt)
        temperature, top_k, top_p = check_sampling(temperature, top_k, top_p)
        max_new_tokens, seed = as_whole("max_new_tokens", max_new_tokens, 1), check_seed(seed)
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer, which text needs: load a folder that holds tokenizer.model, set "
                "model.tokenizer to the Tokenizer it was trained with, or use generate_ids for token ids"
            )
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompt={quote(texts)}: must be a text or a non-empty list of texts")
        prompts = [self._encode_prompt(text, truncate_prompt) for text in texts]
        self._warn_if_untrained(path)
        return generate_ids(
            self, prompts, path, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed, eos_id=self.tokenizer.eos_id, n_tokens=self.tokenizer.vocab_size,
        )  # fmt: skip

    def _warn_if_untrained(self, path: tuple[int, ...]) -> None:
        """Once for every path of this model that its config says was not trained."""
        warned = self.__dict__.setdefault("_warned_paths", set())
        if path in warned or self.config.is_trained(path):
            return
        warned.add(path)
        named = f"depth {len(path)} (path {quote(list(path))})"
        mixed = self.config.trained_paths == "default"
        remedy = "choose one of these" + ("" if mixed else ", or train all depths (train/lm.py --depth-mix octaves)")
        warnings.warn(
            f"{named} of this model was not trained, so that its text is worse; trained: {self.config.trained_depths}; "
            f"{remedy}",
            UserWarning,
            stacklevel=4,  # the caller of generate or stream
        )

    def _encode_prompt(self, text: str, truncate: bool) -> list[int]:
        if not text:
            raise ValueError("prompt='': nothing to continue; give at least one character, such as a line break")
        ids = self.tokenizer.encode(text)
        if not self.config.has_attention:  # the states of recurrent blocks hold a prompt of any length
            return ids
        limit = self.config.context_length
        if len(ids) > limit and not truncate:
            raise ValueError(
                f"the prompt has {len(ids)} tokens ({quote(text[:40])}...), more than the model's context of {limit} "
                f"(context_length): shorten it, or pass truncate_prompt=True to keep its last {limit} tokens"
            )
        return ids[-limit:]

