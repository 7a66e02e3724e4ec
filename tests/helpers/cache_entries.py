"""Entries of the token cache, for the tests that look into them and damage them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import TokenStream, load_tokens


def load(text: str, tokenizer: Tokenizer, cache: Path) -> TokenStream:
    return load_tokens(text, "train", tokenizer, cache_dir=cache)


def entry(cache: Path) -> Path:
    return next(path for path in (cache / "tokens").iterdir() if path.is_dir())


def same(one: TokenStream, other: TokenStream) -> bool:
    return (one.n_words, one.n_bytes, one.fingerprint) == (other.n_words, other.n_bytes, other.fingerprint) and (
        np.array_equal(one.tokens, other.tokens)
    )


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
