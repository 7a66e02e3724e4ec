"""Arguments of another type are named in a ValueError; whole numbers of NumPy are taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import TokenStream, load_tokenizer, load_tokens
from hbll_seq.data.windows import TokenWindows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_dir": ""}, "path '' is empty"),
        ({"cache_dir": "x" * 300}, "too long for a file name"),
        ({"cache_dir": "a\0b"}, "NUL"),
        ({"cache_dir": 3}, "cache_dir is 3; it must name a folder"),
        ({"num_proc": "x"}, "num_proc='x': must be a whole number of at least 1"),
        ({"num_proc": 2.0}, r"num_proc=2\.0"),
        ({"num_proc": True}, "num_proc=True"),
        ({"num_proc": 0}, "num_proc=0"),
        ({"source": None}, "source is None"),
        ({"source": 3}, "source is 3"),
        ({"split": None}, "split is None"),
        ({"column": 1}, "column is 1"),
        ({"tokenizer": "default"}, r"tokenizer is 'default'; it must be a Tokenizer, such as Tokenizer\.default\(\)"),
        ({"tokenizer": None}, "tokenizer is None"),
    ],
)
def test_arguments_of_load_tokens(arguments: dict, message: str, text: str, tokenizer: Tokenizer, cache: Path) -> None:
    given = {"source": text, "split": "train", "tokenizer": tokenizer, "cache_dir": cache, **arguments}
    with pytest.raises(ValueError, match=message):
        load_tokens(**given)


@pytest.mark.parametrize("vocab_size", [300.0, "300", None, True, 0, 1 << 31, pytest.param(10**400, id="huge")])
def test_arguments_of_load_tokenizer(vocab_size: object, text: str, cache: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size=.*: must be a whole number"):
        load_tokenizer(text, vocab_size, cache_dir=cache)
    assert not cache.exists()


def test_whole_numbers_of_numpy_are_taken(text: str, tokenizer: Tokenizer, cache: Path) -> None:
    assert load_tokenizer(text, np.int32(300), cache_dir=cache).vocab_size == 300
    stream = load_tokens(text, "train", tokenizer, cache_dir=cache, num_proc=np.int64(1))
    windows, number = TokenWindows(stream, np.int64(16)), np.int64(3)
    assert torch.equal(windows.batch(number, number, number, np.int8(1), np.int8(2)), windows.batch(3, 3, 3, 1, 2))


@pytest.mark.parametrize("bad", [1.0, True, "1", None, -1, float("nan"), [1], pytest.param(10**400, id="huge")])
def test_arguments_of_windows(bad: object, text: str, tokenizer: Tokenizer, cache: Path) -> None:
    stream = load_tokens(text, "train", tokenizer, cache_dir=cache)
    windows = TokenWindows(stream, 16)
    calls = [
        lambda: TokenWindows(stream, bad),
        lambda: windows.batch(1, bad, 0),
        lambda: windows.batch(1, 1, 0, bad, 1),
        lambda: windows.contiguous_batch(0, range(1), bad, 0),
        lambda: windows.contiguous_batch(0, bad, 4, 0),
    ]
    if bad != 10**400:  # any step, epoch and seed is a number of its own, and all the text fits into a large batch
        calls += [
            lambda: windows.batch(bad, 1, 0),
            lambda: windows.batch(1, 1, bad),
            lambda: windows.epoch_order(0, bad),
            lambda: windows.contiguous_batch(bad, range(1), 4, 0),
            lambda: windows.contiguous_batch(0, range(1), 4, bad),
            lambda: next(windows.evaluation_batches(bad)),
            lambda: next(windows.contiguous_evaluation_batches(bad)),
        ]
        if bad is not None:
            calls.append(lambda: next(windows.contiguous_evaluation_batches(2, bad)))
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert len(str(error.value)) <= 500 and "must" in str(error.value) or "one window needs" in str(error.value)


@pytest.mark.parametrize("stream", [None, [1, 2, 3], "text", *(
    TokenStream(tokens, 1, 1, "x") for tokens in (None, np.ones(99), np.ones((9, 9), np.int64)))])  # fmt: skip
def test_windows_of_something_else(stream: object) -> None:
    with pytest.raises(ValueError, match="it must be a TokenStream of a 1-D array of whole numbers"):
        TokenWindows(stream, 4)


def test_stream_of_something_else(tokenizer: Tokenizer) -> None:
    for bad in (None, b"text", 3, ["text"]):
        with pytest.raises(ValueError, match="text is"):
            TokenStream.from_text(bad, tokenizer)
    with pytest.raises(ValueError, match="tokenizer is None"):
        TokenStream.from_text("text", None)
