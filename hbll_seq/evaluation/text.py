"""Windows of a text, as a model reads it: a text of one's own, or a split of a data set by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import TokenStream, load_tokens
from hbll_seq.data.windows import TokenWindows
from hbll_seq.evaluation.perplexity import evaluate_paths
from hbll_seq.models.causal_lm import HBLLForCausalLM


def evaluate_text(
    model: HBLLForCausalLM, text: str, paths: Mapping[str, Sequence[int]] | None = None, **options: Any
) -> list[dict]:
    """Perplexity of a text along each path: per token, per word, and in bits per byte.

    The text is one document: its first token is predicted from the end-of-text token before it, and its end is predicted too.
    It is read in windows of the model's context, each from its own start.

    Args:
        model: the model, with its tokenizer.
        text: any text.
        paths, options: see :func:`evaluate_paths`, whose rows are returned.

    Raises:
        ValueError: the text is empty or no valid Unicode, the model has no tokenizer, or as :func:`evaluate_paths`.
    """
    return evaluate_paths(model, text_windows(model, text), paths, **options)


def text_windows(model: HBLLForCausalLM, text: str) -> TokenWindows:
    """A text in windows of the model's context, or of its own length where that is shorter. Raises as above."""
    if not text:
        raise ValueError("text='': there is nothing to evaluate; give some text")
    return _windows(model, TokenStream.from_text(text, tokenizer_of(model)))


def split_windows(
    model: HBLLForCausalLM, data: str, split: str, *, column: str = "text", cache_dir: str | os.PathLike[str] | None = None
) -> TokenWindows:
    """A split of a data set in windows of the model's context; the arguments and errors are those of ``load_tokens``."""
    return _windows(model, load_tokens(data, split, tokenizer_of(model), column=column, cache_dir=cache_dir))


def _windows(model: HBLLForCausalLM, stream: TokenStream) -> TokenWindows:
    return TokenWindows(stream, min(model.config.context_length, stream.n_tokens - 1))


def tokenizer_of(model: HBLLForCausalLM) -> Tokenizer:
    """The tokenizer that the model was trained with. Raises ValueError where it has none."""
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, which text needs: load a folder that holds tokenizer.model, or set "
                         "model.tokenizer to the Tokenizer it was trained with")
    return model.tokenizer
