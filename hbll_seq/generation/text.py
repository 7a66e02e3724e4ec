"""Text in, text out, along any dyadic path: what ``model.generate`` and ``model.stream`` do."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence

from typing_extensions import Unpack

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.generation.decoding import generate_ids
from hbll_seq.generation.protocol import CausalLM
from hbll_seq.generation.sampling import SamplingOptions, SamplingParams, as_sampling
from hbll_seq.utils.console import ForgivingStream, printable, warn_user
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_flag

#: paths that each model has warned about.
_warned: weakref.WeakKeyDictionary[CausalLM, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()


class TextGenerator:
    """The text interface of a language model and its tokenizer.

    Args:
        model: see :class:`hbll_seq.generation.protocol.CausalLM`.
        tokenizer: the one that the model was trained with; None is refused when a text is asked for.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer | None):
        self.model, self.tokenizer = model, tokenizer

    def generate(
        self,
        prompt: str | list[str],
        depth: int | None = None,
        path: Sequence[int] | None = None,
        *,
        sampling: SamplingParams | None = None,
        stream: bool = False,
        truncate_prompt: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> str | list[str]:
        """The prompt and its continuation, up to ``max_new_tokens`` tokens or the end of the text.

        Args:
            prompt: a text, or a list of texts, which are continued together.
            depth: number of blocks to run, 1 to all; None for all. See ``DyadicTree.path_for_depth``.
            path: block numbers to run, such as ``[4, 6, 7]``, instead of ``depth``.
            sampling: how tokens are drawn, and how many.
            stream: also write the text to stdout as it comes (one prompt only). What stdout cannot take is no error, and a
                terminal shows control characters as escapes; the text that is returned holds all.
            truncate_prompt: keep the last tokens of a prompt that is longer than the model's context, instead of refusing
                it. A model of recurrent blocks alone reads prompts of any length, and whole.
            options: the fields of :class:`SamplingParams`, in place of ``sampling``: ``max_new_tokens=40, seed=0``.

        Returns:
            A text for a text, a list for a list.

        Raises:
            ValueError: an option is unknown; an option, the depth, the path or a prompt is not possible; or the model has no
                tokenizer.
        """
        texts, stream = [prompt] if isinstance(prompt, str) else prompt, as_flag("stream", stream)
        if stream and isinstance(texts, (list, tuple)) and len(texts) != 1:
            raise ValueError(f"stream=True with {len(texts)} prompts: it writes one text; pass one prompt")
        steps = self._start(texts, depth, path, as_sampling(sampling, options), truncate_prompt)
        new_ids: list[list[int]] = [[] for _ in texts]
        pieces, write = TextPieces(self.tokenizer), _writer() if stream else lambda text: None
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
        *,
        sampling: SamplingParams | None = None,
        truncate_prompt: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """The continuation of one prompt, piece by piece as it is generated; the prompt itself is not repeated.

        Arguments and errors are those of :meth:`generate`; errors are raised by this call, not by the first piece.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"prompt={quote(prompt)}: stream continues one text; pass a str, or use generate for a list")
        return self._pieces(self._start([prompt], depth, path, as_sampling(sampling, options), truncate_prompt))

    def _pieces(self, steps: Iterator[list[int | None]]) -> Iterator[str]:
        pieces = TextPieces(self.tokenizer)
        for (token,) in steps:
            if piece := pieces.push(token):
                yield piece
        if piece := pieces.flush():
            yield piece

    def _start(
        self,
        texts: list[str],
        depth: int | None,
        path: Sequence[int] | None,
        sampling: SamplingParams,
        truncate_prompt: bool,
    ) -> Iterator[list[int | None]]:
        """Check everything that the user gave, then hand out the steps, none of them run yet."""
        path = self.model.resolve_path(depth, path)
        truncate_prompt = as_flag("truncate_prompt", truncate_prompt)
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer, which text needs: load a folder that holds tokenizer.model, set "
                "model.tokenizer to the Tokenizer it was trained with, or use generate_ids for token ids"
            )
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompt={quote(texts)}: must be a text or a non-empty list of texts")
        prompts = [self._encode(text, truncate_prompt) for text in texts]
        self._warn_if_untrained(path)
        eos_id, n_tokens = self.tokenizer.eos_id, self.tokenizer.vocab_size
        return generate_ids(self.model, prompts, path, sampling, eos_id=eos_id, n_tokens=n_tokens)

    def _encode(self, text: str, truncate: bool) -> list[int]:
        """Token ids of a prompt. Raises ValueError for an empty one, and for one that is longer than the context."""
        if not text:
            raise ValueError("prompt='': nothing to continue; give at least one character, such as a line break")
        ids = self.tokenizer.encode(text)
        if not self.model.config.has_attention:  # the states of recurrent blocks hold a prompt of any length
            return ids
        limit = self.model.config.context_length
        if len(ids) > limit and not truncate:
            raise ValueError(
                f"the prompt has {len(ids)} tokens ({quote(text[:40])}...), more than the model's context of {limit} "
                f"(context_length): shorten it, or pass truncate_prompt=True to keep its last {limit} tokens"
            )
        return ids[-limit:]

    def _warn_if_untrained(self, path: tuple[int, ...]) -> None:
        """Once for every path of this model that its config says was not trained."""
        config, warned = self.model.config, _warned.setdefault(self.model, set())
        if path in warned or config.is_trained(path):
            return
        warned.add(path)
        mixed = config.trained_paths == "default"
        remedy = "choose one of these"
        remedy += "" if mixed else ", or train all depths (train/lm.py --depth-mix octaves)"
        warn_user(
            f"depth {len(path)} (path {quote(list(path))}) of this model was not trained, so that its text is worse; "
            f"trained: {config.trained_depths}; {remedy}"
        )


class TextPieces:
    """Turns token ids into text as they come; a character split across tokens comes out once it is whole.

    Args:
        tokenizer: decodes the ids.
    """

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


def _writer() -> Callable[[str], None]:
    """A function that writes text to stdout at once. It never raises: the text is also returned. On a terminal it shows
    control characters as escapes, since they could steer it."""
    out = ForgivingStream(sys.stdout)
    shown = printable if out.isatty() else str

    def write(text: str) -> None:
        out.write(shown(text))
        out.flush()

    return write
