"""Text in, text out, along any dyadic path: what ``model.generate`` and ``model.stream`` do."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from typing_extensions import Unpack

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.generation.decoding import Decoding, TokenLogprobs, check_paths
from hbll_seq.generation.protocol import CausalLM
from hbll_seq.generation.sampling import SamplingOptions, SamplingParams, as_sampling
from hbll_seq.generation.speculative import Speculation
from hbll_seq.generation.text_pieces import Alternative, Generation, TextPieces, stdout_writer
from hbll_seq.utils.console import warn_user
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_flag, as_whole

#: what names the network of one prompt, or of each of several
Depth = int | str | None
Depths = Depth | Sequence[int | str]
Paths = Sequence[int] | Sequence[Sequence[int]] | None

#: paths that each model has warned about.
_warned: weakref.WeakKeyDictionary[CausalLM, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()


class TextGeneration:
    """Text in, text out: the methods of a model that is a :class:`hbll_seq.generation.protocol.CausalLM`.

    Attributes:
        tokenizer: the one that the model was trained with; None is refused when a text is asked for.
    """

    tokenizer: Tokenizer | None = None

    def generate(
        self,
        prompt: str | list[str],
        depth: Depths = None,
        path: Paths = None,
        *,
        sampling: SamplingParams | None = None,
        stream: bool = False,
        truncate_prompt: bool = False,
        speculative: bool | Speculation | None = None,
        in_order: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> str | list[str] | list[list[str]]:
        """The prompt and its continuation, up to ``max_new_tokens`` tokens, the end of the text or a stop string.

        Args:
            prompt: a text, or a list of texts, which are continued together.
            depth: number of blocks to run, 1 to all, or a word that the model knows (``"best"``, ``"fast"``); None for all.
                A list has one for each prompt. See ``DyadicTree.path_for_depth``.
            path: block numbers to run, such as ``[4, 6, 7]``, instead of ``depth``. A list of such has one for each prompt.
            sampling: how tokens are drawn, how many, and how often.
            stream: also write the text to stdout as it comes (one text only). What stdout cannot take is no error, and a
                terminal shows control characters as escapes; the text that is returned holds all.
            truncate_prompt: keep the last tokens of a prompt that is longer than the model's context, instead of refusing
                it. A model of recurrent blocks alone reads prompts of any length, and whole.
            speculative: guesses are checked several at once by the network that was asked for. True: in a greedy
                text what followed where the last three tokens stood before, else plain decoding; a
                :class:`hbll_seq.generation.speculative.Speculation` names what drafts; False and None: plain decoding.
            in_order: take only so many of the blocks in order and the others side by side, each on the state before them.
            options: the fields of :class:`SamplingParams`, in place of ``sampling``: ``max_new_tokens=40, seed=0``.

        Returns:
            A text for a text, a list for a list. With ``n`` above 1 a list of n texts stands in the place of each.

        Raises:
            ValueError: an option is unknown; an option, a depth, a path or a prompt is not possible; or the model has no
                tokenizer.
        """
        texts, stream = [prompt] if isinstance(prompt, str) else prompt, as_flag("stream", stream)
        sampling = as_sampling(sampling, options)
        if stream and isinstance(texts, (list, tuple)) and len(texts) != 1:
            raise ValueError(f"stream=True with {len(texts)} prompts: it writes one text; pass one prompt")
        if stream:
            _check_one_sample(sampling)
        run = _start(self, texts, depth, path, sampling, truncate_prompt, speculative=speculative, in_order=in_order)
        write = stdout_writer() if stream else lambda text: None
        write(texts[0])
        for _, piece in run.pieces():
            write(piece)
        write("\n")
        whole = [text + row.text for text, row in zip(run.texts, run.rows)]
        if sampling.n > 1:
            whole = [whole[at : at + sampling.n] for at in range(0, len(whole), sampling.n)]
        return whole[0] if isinstance(prompt, str) else whole

    def generate_detailed(
        self,
        prompt: str | list[str],
        depth: Depths = None,
        path: Paths = None,
        *,
        sampling: SamplingParams | None = None,
        alternatives: int = 0,
        truncate_prompt: bool = False,
        speculative: bool | Speculation | None = None,
        in_order: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Generation]:
        """As :meth:`generate`, with the log-probability of every new token, and why each text ended.

        Args:
            alternatives: how many of the most probable tokens are returned at each new one.
            prompt, depth, path, sampling, truncate_prompt, speculative, in_order, options: see :meth:`generate`.

        Returns:
            A list, of one prompt too: the n samples of the first prompt, then those of the next.

        Raises:
            ValueError: as :meth:`generate`; or there are not that many alternatives.
        """
        texts, sampling = [prompt] if isinstance(prompt, str) else prompt, as_sampling(sampling, options)
        if self.tokenizer is not None:
            alternatives = as_whole("alternatives", alternatives, 0, self.tokenizer.vocab_size)
        faster = dict(speculative=speculative, in_order=in_order)
        run = _start(self, texts, depth, path, sampling, truncate_prompt, logprobs=alternatives, **faster)
        details = []
        for _ in run.pieces():
            pass
        for number, row in enumerate(run.rows):
            told = [[Alternative(i, self.tokenizer.decode([i]), p) for i, p in each.best] for each in row.logprobs]
            details.append(Generation(
                run.texts[number], row.text, tuple(row.ids), tuple(each.logprob for each in row.logprobs),
                tuple(map(tuple, told)), run.decoding.reasons[number], run.decoding.paths[number], number % sampling.n,
            ))  # fmt: skip
        return details

    def stream(
        self,
        prompt: str,
        depth: Depth = None,
        path: Sequence[int] | None = None,
        *,
        sampling: SamplingParams | None = None,
        truncate_prompt: bool = False,
        speculative: bool | Speculation | None = None,
        in_order: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """The continuation of one prompt, piece by piece as it is generated; the prompt itself is not repeated.

        Arguments and errors are those of :meth:`generate`; errors are raised by this call, not by the first piece.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"prompt={quote(prompt)}: stream continues one text; pass a str, or use generate for a list")
        _check_one_sample(sampling := as_sampling(sampling, options))
        run = _start(self, [prompt], depth, path, sampling, truncate_prompt, speculative=speculative, in_order=in_order)
        return (piece for _, piece in run.pieces() if piece)

    def warn_if_untrained(self, path: tuple[int, ...]) -> None:
        """Once for every path of this model that its config says was not trained."""
        config, warned = self.config, _warned.setdefault(self, set())
        if path in warned or config.is_trained(path):
            return
        warned.add(path)
        mixed = config.trained_paths == "default"
        remedy = "choose one of these"
        remedy += "" if mixed else ", or train all depths (train/lm.py --depth-mix octaves)"
        warn_user(
            f"depth {len(path)} (path {quote(list(path))}) of this model was not trained; expect worse text; "
            f"trained: {config.trained_depths}; {remedy}"
        )


def _start(
    model: CausalLM,
    texts: list[str],
    depth: Depths,
    path: Paths,
    sampling: SamplingParams,
    truncate_prompt: bool,
    **how: Any,
) -> _Run:
    """Check everything that the user gave, then hand out the decoding, no step of it run yet; ``how`` is for it."""
    n_prompts = len(texts) if isinstance(texts, (list, tuple)) else 1
    paths = _paths(model, depth, path, n_prompts)
    truncate_prompt = as_flag("truncate_prompt", truncate_prompt)
    if model.tokenizer is None:
        raise ValueError(
            "this model has no tokenizer, which text needs: load a folder that holds tokenizer.model, set "
            "model.tokenizer to the Tokenizer it was trained with, or use generate_ids for token ids"
        )
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompt={quote(texts)}: must be a text or a non-empty list of texts")
    prompts = [_encode(model, text, truncate_prompt) for text in texts]
    for each in dict.fromkeys(paths):
        model.warn_if_untrained(each)
    ends = dict(eos_id=model.tokenizer.eos_id, n_tokens=model.tokenizer.vocab_size)
    decoding = Decoding(model, prompts, paths, sampling, **ends, **how)
    return _Run(model.tokenizer, decoding, [text for text in texts for _ in range(sampling.n)])


def _paths(model: CausalLM, depth: Depths, path: Paths, n_prompts: int) -> list[tuple[int, ...]]:
    """The path of each prompt. Raises ValueError for what is not possible."""
    if depth is None and path is not None:
        return check_paths(model, path, n_prompts)
    if not isinstance(depth, (list, tuple)) or path is not None:
        return [model.resolve_path(depth, path)] * n_prompts
    if len(depth) != n_prompts:
        raise ValueError(f"depth={quote(depth)} has {len(depth)} for {n_prompts} prompts: give one, or one for each")
    return [model.resolve_path(each) for each in depth]


def _encode(model: CausalLM, text: str, truncate: bool) -> list[int]:
    """Token ids of a prompt. Raises ValueError for an empty one, and for one that is longer than the context."""
    if not text:
        raise ValueError("prompt='': nothing to continue; give at least one character, such as a line break")
    ids = model.tokenizer.encode(text)
    if not model.config.has_attention:  # the states of recurrent blocks hold a prompt of any length
        return ids
    limit = model.config.context_length
    if len(ids) > limit and not truncate:
        raise ValueError(
            f"the prompt has {len(ids)} tokens ({quote(text[:40])}...), more than the model's context of {limit} "
            f"(context_length): shorten it, or pass truncate_prompt=True to keep its last {limit} tokens"
        )
    return ids[-limit:]


class _Row:
    """What one row has drawn."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams):
        self.pieces = TextPieces(tokenizer, sampling.stop)
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.text = ""


class _Run:
    """A decoding, the text before each of its rows, and what each has drawn."""

    def __init__(self, tokenizer: Tokenizer, decoding: Decoding, texts: list[str]):
        self.decoding, self.texts = decoding, texts
        self.rows = [_Row(tokenizer, decoding.sampling) for _ in texts]

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Run the decoding; fills the rows and yields (row, piece of its text), of every token and at the end."""
        for tokens, logprobs in self.decoding:
            for number, token in enumerate(tokens):
                if token is None:
                    continue
                row = self.rows[number]
                row.ids.append(token)
                if logprobs is not None:
                    row.logprobs.append(logprobs[number])
                yield number, self._add(number, row.pieces.push(token))
        for number, row in enumerate(self.rows):
            yield number, self._add(number, row.pieces.flush())

    def _add(self, number: int, piece: str) -> str:
        row = self.rows[number]
        if row.pieces.stopped:
            self.decoding.end(number)
        row.text += piece
        return piece


def _check_one_sample(sampling: SamplingParams) -> None:
    if sampling.n > 1:
        raise ValueError(f"n={sampling.n} with a stream, which is one text: leave n out, or use generate without stream")
