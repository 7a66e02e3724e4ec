"""What others do to a cache file under a running job: the job goes on with the same ids, or says what happened."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cache_entries import entry, flip, load, same

from hbll_seq.data import token_cache
from hbll_seq.data.file_tokens import FileTokens
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import TokenStream
from hbll_seq.data.windows import TokenWindows


def test_small_caches_are_in_memory(text: str, tokenizer: Tokenizer, cache: Path) -> None:
    stream = load(text, tokenizer, cache)
    ids = stream.tokens.tolist()
    os.truncate(entry(cache) / "tokens.bin", 0)
    assert stream.tokens.tolist() == ids and not stream.tokens.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        stream.tokens[0] = 1


@pytest.fixture
def large(text: str, tokenizer: Tokenizer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TokenStream, np.ndarray]:
    """A stream that is read from its file, and its ids."""
    ids = np.array(load(text, tokenizer, cache).tokens)
    monkeypatch.setattr(token_cache, "IN_MEMORY", 100)
    stream = load(text, tokenizer, cache)
    assert isinstance(stream.tokens, FileTokens)
    return stream, ids


def test_large_caches_are_read_slice_by_slice(large: tuple[TokenStream, np.ndarray]) -> None:
    stream, ids = large
    tokens = stream.tokens
    assert (len(tokens), tokens.shape, tokens.ndim, tokens.dtype, stream.n_tokens) == (
        len(ids), ids.shape, 1, ids.dtype, len(ids)
    )  # fmt: skip
    assert np.array_equal(tokens, ids) and tokens[-1] == ids[-1] and tokens[np.int64(7)] == ids[7]
    ends = [(3, 90, 1), (None, None, None), (-5, None, None), (9, 2, 1), (0, 10**9, 1), (1, 50, 7), (None, None, -3)]
    for part in (slice(*numbers) for numbers in ends):
        assert np.array_equal(tokens[part], ids[part])
    assert list(tokens) == ids.tolist() and torch.from_numpy(tokens[:5].astype(np.int64)).tolist() == ids[:5].tolist()
    for bad in (len(ids), -len(ids) - 1):
        with pytest.raises(IndexError):
            tokens[bad]
    assert np.array_equal(pickle.loads(pickle.dumps(tokens)), ids)  # for a loader's workers
    n = len(ids)
    indices = np.array([[n - 2, n - 1, n, n + 1], [5, 6, 7, 8], [3 * n, 2, -1, 0]])
    assert np.array_equal(tokens.take(indices, mode="wrap"), ids.take(indices, mode="wrap"))
    with pytest.raises(IndexError):
        tokens.take(indices)


def test_whatever_reads_tokens_takes_large_caches(large: tuple[TokenStream, np.ndarray], tokenizer: Tokenizer) -> None:
    stream, ids = large
    memory = TokenStream(ids, stream.n_words, stream.n_bytes, stream.fingerprint)
    read, expected = TokenWindows(stream, 16), TokenWindows(memory, 16)
    assert torch.equal(read.batch(3, 8, 0), expected.batch(3, 8, 0))
    assert torch.equal(read.contiguous_batch(3, range(8), 8, 0), expected.contiguous_batch(3, range(8), 8, 0))
    pairs = list(zip(read.evaluation_batches(50), expected.evaluation_batches(50), strict=True))
    assert all(torch.equal(one, other) for one, other in pairs)
    assert tokenizer.decode(stream.tokens) == tokenizer.decode(ids)


@pytest.mark.parametrize("change", ["cut", "emptied", "written to", "cut and filled"])
def test_changed_under_a_running_job(change: str, large: tuple[TokenStream, np.ndarray], cache: Path) -> None:
    """A memory map would end the process by SIGBUS, or hand over other ids."""
    stream, ids = large
    windows, path = TokenWindows(stream, 16), entry(cache) / "tokens.bin"
    first = windows.batch(0, 4, 0)
    size = path.stat().st_size
    if change == "written to":
        flip(path, 8 * size - 1)
    else:
        os.truncate(path, {"cut": size - 2, "emptied": 0, "cut and filled": 4096}[change])
        if change == "cut and filled":
            os.truncate(path, size)
    os.utime(path, ns=(1, 1))  # whatever the clock's resolution
    with pytest.raises(ValueError, match=r"tokens\.bin.*start again, and the cache is made anew"):
        windows.batch(0, 4, 0)
    assert len(first) == 4


def test_touched_or_deleted_under_a_running_job(
    large: tuple[TokenStream, np.ndarray], text: str, tokenizer: Tokenizer, cache: Path
) -> None:
    """No harm is done to the ids, so the job goes on."""
    stream, ids = large
    os.utime(entry(cache) / "tokens.bin", ns=(1, 1))
    assert np.array_equal(stream.tokens, ids)
    shutil.rmtree(cache)
    assert np.array_equal(stream.tokens, ids)
    assert same(load(text, tokenizer, cache), stream)


def test_damaged_large_cache_is_made_again(large: tuple[TokenStream, np.ndarray], text: str, tokenizer: Tokenizer,
                                           cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("hbll_seq.data.file_tokens.BLOCK", 64)
    path = entry(cache) / "tokens.bin"
    for damage in (lambda: flip(path, 12_345), lambda: flip(path, 3), lambda: path.write_bytes(path.read_bytes() + b"xx")):
        damage()
        assert np.array_equal(load(text, tokenizer, cache).tokens, large[1])
