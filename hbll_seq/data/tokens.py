"""Text to tokens: tokenised once, to a cache that is checked when it is opened."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from hbll_seq.data.file_tokens import FileTokens
from hbll_seq.data.pieces import MAX_VOCABULARY, split_lines
from hbll_seq.data.sources import Corpus, Segments, open_corpus
from hbll_seq.data.token_cache import (
    META,
    TOKENS,
    Missing,
    NotUsable,
    WithoutSums,
    open_tokenizer,
    open_tokens,
    remove,
    save_sum,
    seal,
    sum_path,
    sweep,
)
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.utils.atomic import atomic_write, fsync
from hbll_seq.utils.console import ForgivingStream, say
from hbll_seq.utils.reading import possible_name, quote, shorten
from hbll_seq.utils.values import as_whole

_T = TypeVar("_T")

FORMAT = 1  # a new number where the same text and tokenizer are stored in another way
BATCH_CHARS = 1 << 21  # text encoded at once: bounds memory
PROGRESS_AFTER_S = 2.0
_REMEDY = "set HBLL_CACHE (or cache_dir) to a folder that can be written and has room"


@dataclass(frozen=True)
class TokenStream:
    """One split as one sequence of ids: end-of-text first, then every document followed by end-of-text.

    tokens: 1-D, uint16 or (vocabulary above 65,536) uint32, in memory or (very large ones) in a file. n_words:
    blank-separated words plus newlines, the count word-level perplexity is over (WikiText from the Hub: the published
    count). n_bytes: UTF-8 length of the text. fingerprint: sha256 over content, cutting into documents and tokenizer.
    """

    tokens: np.ndarray | FileTokens
    n_words: int
    n_bytes: int
    fingerprint: str

    @property
    def n_tokens(self) -> int:
        """How many tokens the stream holds."""
        return len(self.tokens)

    @classmethod
    def from_text(cls, text: str, tokenizer: Tokenizer) -> TokenStream:
        """A stream of one document, held in memory. Raises ValueError for what is no text or no tokenizer."""
        if not isinstance(text, str):
            raise ValueError(f"text is {quote(text)}; it must be a str")
        _check_tokenizer(tokenizer)
        counts = _Counts()
        parts = list(_encode_segments(iter([*split_lines(text), None]), tokenizer, 1, counts))
        digest = hashlib.sha256(text.encode()).hexdigest()  # the parts above have found it to be valid Unicode
        return cls(np.concatenate(parts), counts.n_words, counts.n_bytes, _key(digest, tokenizer))


def load_tokens(
    source: str,
    split: str,
    tokenizer: Tokenizer,
    *,
    column: str = "text",
    cache_dir: str | os.PathLike[str] | None = None,
    num_proc: int | None = None,
) -> TokenStream:
    """Tokenises one split of a source, or opens the cache of an earlier call.

    source: "bundled" (WikiText-2, token version); "wikitext-2" or "wikitext-103" (raw version, from the folder
    $HBLL_DATA in the Hub's layout if it is there, else from the Hub); a .txt, .jsonl (both also packed: .gz, .xz, .zst) or
    .parquet file, or a folder of such files; or a Hub id "owner/name" or "owner/name:config". split: "train", "validation"
    or "test". A document is an article of WikiText, a text file, or a row (its `column`). How files and missing splits are
    divided: `hbll_seq.data.sources.open_corpus`.
    cache_dir: default $HBLL_CACHE, else $XDG_CACHE_HOME/hbll_seq, else ~/.cache/hbll_seq. num_proc: how many native
    threads tokenise; default: every core this process may use.

    The cache is keyed by content and tokenizer, and appears complete or not at all; processes that need the same one at
    once wait for the first. An existing cache is opened without a lock, also from a
    folder that cannot be written. Each process checks its bytes once. A broken cache is made again, and so is one of an older
    version, which has no sums; one line says so. Memory stays bounded, however large the corpus is.

    Raises ValueError: unknown source or split, missing or empty file, text that is not UTF-8 (with the byte offset),
    missing column, a split without text, a cache that cannot be written, a Hub that cannot be reached, an argument of
    another type.
    """
    num_proc = None if num_proc is None else as_whole("num_proc", num_proc, 1)
    _check_tokenizer(tokenizer)
    cache = cache_folder(cache_dir)
    corpus = _open_corpus(source, split, column)
    fingerprint = _key(corpus.digest, tokenizer)
    folder = cache / "tokens" / fingerprint[:32]

    def opened(without_sums: bool = False) -> TokenStream:
        found = open_tokens(folder, fingerprint, np.dtype(_dtype(tokenizer)), tokenizer.vocab_size, without_sums=without_sums)
        return TokenStream(*found, fingerprint)

    def make(found: NotUsable) -> None:
        if not isinstance(found, Missing):
            say(f"the token cache {quote(str(folder))} {found}; it is made again")
        _write_cache(folder, fingerprint, corpus, tokenizer, num_proc or _n_cores())

    return _cached("token cache", folder, opened, make)


def load_tokenizer(
    source: str, vocab_size: int, *, column: str = "text", cache_dir: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """A tokenizer trained on the source's training split, or the cached one of an earlier call.

    The cached one is checked by its sum, and trained again when it is broken. One of an older version has no sum and gets
    one: a new training might give another vocabulary, and models already use this one.

    Sources and errors: as for `load_tokens`; ValueError too when the text does not support the vocabulary size.
    """
    vocab_size = as_whole("vocab_size", vocab_size, 1, MAX_VOCABULARY)
    cache = cache_folder(cache_dir)
    corpus = _open_corpus(source, "train", column)
    key = hashlib.sha256(f"{FORMAT} {corpus.digest} {vocab_size}".encode()).hexdigest()
    path = cache / "tokenizers" / f"{key[:32]}.model"
    return _cached(
        "cached tokenizer",
        path,
        lambda without_sums=False: open_tokenizer(path, vocab_size, without_sums=without_sums),
        lambda found: _make_tokenizer(path, corpus, vocab_size, found),
    )


def _cached(what: str, path: Path, opened: Callable[..., _T], make: Callable[[NotUsable], None]) -> _T:
    """What `opened()` finds, where need be after `make` under the lock, else what `opened(without_sums=True)` finds.

    `make` is told why what is there cannot be used.

    Only making needs the lock and a folder that can be written.
    """
    try:
        return opened()
    except NotUsable:
        pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            sweep(path)
            try:
                return opened()  # another process may have made it meanwhile
            except NotUsable as found:
                make(found)
            return opened()
    except NotUsable as found:
        raise ValueError(f"the {what} {quote(str(path))} was just written and {shorten(found, 120)}; {_REMEDY}") from found
    except (OSError, ValueError) as error:  # ValueError: a text that cannot be read again, of the Hub say
        reason = shorten(getattr(error, "strerror", None) or error, 75)
        try:
            value = opened(without_sums=True)
        except NotUsable as found:
            if isinstance(error, ValueError):
                raise error
            there = f"; what is there {shorten(found, 85)}" if str(found) else ""
            raise ValueError(f"cannot write the {what} {quote(str(path))}: {reason}{there}; {_REMEDY}") from error
        say(f"the {what} {quote(str(path))} has no sums and cannot get any ({reason}); it is used as it is")
        return value


def _make_tokenizer(path: Path, corpus: Corpus, vocab_size: int, found: NotUsable) -> None:
    """The caller holds the lock."""
    if isinstance(found, WithoutSums):
        say(f"the cached tokenizer {quote(str(path))} {found}; it gets one")
        save_sum(path, open_tokenizer(path, vocab_size, without_sums=True))
        return
    if not isinstance(found, Missing):
        say(f"the cached tokenizer {quote(str(path))} {found}; it is trained again")
    say(f"training a tokenizer of {vocab_size} pieces on {corpus.name}")
    tokenizer = Tokenizer.train((s for s in _segments(corpus) if s is not None), vocab_size)
    for old in (path, sum_path(path)):  # in this order, a model without a sum is whole even if this process is killed
        remove(old)
    tokenizer.save(path)
    save_sum(path, tokenizer)


def _open_corpus(source: str | os.PathLike[str], split: str, column: str) -> Corpus:
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"source is {quote(source)}; it must name a file, a folder or a data set")
    for name, value in (("split", split), ("column", column)):
        if not isinstance(value, str):
            raise ValueError(f"{name} is {quote(value)}; it must be a str")
    return open_corpus(source, split, column)


def _segments(corpus: Corpus) -> Segments:
    """Its lines; an error of reading them is kept apart from one of writing the cache."""
    try:
        yield from corpus.segments()
    except OSError as error:
        raise ValueError(f"cannot read data {quote(corpus.name)}: {shorten(error)}") from error


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"tokenizer is {quote(tokenizer)}; it must be a Tokenizer, such as Tokenizer.default()")


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder given, else $HBLL_CACHE, else $XDG_CACHE_HOME/hbll_seq, else ~/.cache/hbll_seq.

    Raises ValueError when no folder could have that name.
    """
    if cache_dir is not None:
        if not isinstance(cache_dir, (str, os.PathLike)):
            raise ValueError(f"cache_dir is {quote(cache_dir)}; it must name a folder, or be None for the default")
        return possible_name(cache_dir)
    if own := os.environ.get("HBLL_CACHE"):
        return possible_name(own)
    return possible_name(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hbll_seq"


# -- the cache ----------------------------------------------------------------------------------------------------


@dataclass
class _Counts:
    n_tokens: int = 0
    n_words: int = 0
    n_bytes: int = 0
    n_lines: int = 0


def _key(digest: str, tokenizer: Tokenizer) -> str:
    return hashlib.sha256(f"{FORMAT} {digest} {tokenizer.fingerprint}".encode()).hexdigest()


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def _encode_segments(segments: Segments, tokenizer: Tokenizer, num_threads: int, counts: _Counts) -> Iterator[np.ndarray]:
    """Ids of the segments in arrays of bounded size; fills in `counts`."""
    dtype = _dtype(tokenizer)
    lines: list[str] = []
    ends: set[int] = set()  # the documents' last lines
    n_chars, inside_word = 0, False

    def flush() -> np.ndarray:
        ids: list[int] = []
        for index, line_ids in enumerate(tokenizer.encode_batch(lines, num_threads)):
            ids += line_ids
            if index in ends:
                ids.append(tokenizer.eos_id)
        counts.n_tokens += len(ids)
        lines.clear()
        ends.clear()
        return np.asarray(ids, dtype=dtype)

    counts.n_tokens = 1
    yield np.asarray([tokenizer.eos_id], dtype=dtype)
    for segment in segments:
        if segment is None:
            if not lines:
                lines.append("")  # an empty document
            ends.add(len(lines) - 1)
            inside_word = False
            continue
        if n_chars >= BATCH_CHARS:
            yield flush()
            n_chars = 0
        lines.append(segment)
        n_chars += len(segment)
        counts.n_bytes += len(segment) if segment.isascii() else len(segment.encode("utf-8", "surrogatepass"))
        # A line cut at MAX_LINE may be cut within a word, which must count once.
        counts.n_words += len(segment.split()) + segment.count("\n") - (inside_word and not segment[0].isspace())
        counts.n_lines += segment.endswith("\n")
        inside_word = not segment[-1].isspace()
    yield flush()


def _write_cache(folder: Path, fingerprint: str, corpus: Corpus, tokenizer: Tokenizer, num_threads: int) -> None:
    """Writes aside, then renames. The caller holds the lock of the folder."""
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.", suffix=".tmp"))
    try:
        counts, digest = _Counts(), hashlib.sha256()
        with (
            (aside / TOKENS).open("wb") as file,
            tqdm(
                desc=f"tokenizing {corpus.name}",
                total=corpus.n_bytes,
                unit="B",
                unit_scale=True,
                delay=PROGRESS_AFTER_S,
                file=ForgivingStream(sys.stderr),
            ) as progress,
        ):
            for ids in _encode_segments(_segments(corpus), tokenizer, num_threads, counts):
                ids.tofile(file)
                digest.update(ids)
                progress.update(counts.n_bytes - progress.n)
            if counts.n_bytes == 0:
                raise ValueError(f"data {corpus.name!r} holds no text; give more text, or a split of its own")
            os.fsync(file.fileno())
        meta = {
            "fingerprint": fingerprint,
            "dtype": np.dtype(_dtype(tokenizer)).name,
            "n_tokens": counts.n_tokens,
            "n_words": (corpus.words_by_lines or {}).get(counts.n_lines, counts.n_words),
            "n_bytes": counts.n_bytes,
            "source": corpus.name,
            "sha256": digest.hexdigest(),
        }
        atomic_write(aside / META, seal(meta))
        os.chmod(aside, 0o755)  # mkdtemp's 0700 would keep others from a shared cache
        remove(folder)  # a broken one, or it would have been opened
        os.rename(aside, folder)
        fsync(folder.parent)
    except BaseException:
        remove(aside)
        raise
