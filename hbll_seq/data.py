"""Text to packed windows of tokens: tokenised once to a memory-mapped cache, then served in a seeded order.

Shapes: B batch (of one process), T block_size.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from .atomic import atomic_write, fsync
from .sources import Corpus, Segments, open_corpus
from .tokenizer import Tokenizer, split_lines

FORMAT = 1  # raise it when the same text and tokenizer would be stored differently
BATCH_CHARS = 1 << 21  # text encoded at once: bounds memory
PROGRESS_AFTER_S = 2.0
_CONTIGUOUS = 1 << 32  # no epoch has this number: a seed stream of its own


@dataclass(frozen=True)
class TokenStream:
    """One split as one sequence of ids: end-of-text first, then every document followed by end-of-text.

    tokens: 1-D, uint16 or (vocabulary above 65,536) uint32, usually a memory map. n_words: blank-separated words plus
    newlines, the count word-level perplexity is over (WikiText from the Hub: the published count). n_bytes: UTF-8
    length of the text. fingerprint: sha256 over content, cutting into documents and tokenizer.
    """

    tokens: np.ndarray
    n_words: int
    n_bytes: int
    fingerprint: str

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @classmethod
    def from_text(cls, text: str, tokenizer: Tokenizer) -> TokenStream:
        """A stream of one document, held in memory."""
        counts = _Counts()
        parts = list(_encode_segments(iter([*split_lines(text), None]), tokenizer, 1, counts))
        digest = hashlib.sha256(text.encode()).hexdigest()
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
    $HBLL_DATA in the Hub's layout if it is there, else from the Hub); a .txt, .jsonl or .parquet file, or a folder of
    such files; or a Hub id "owner/name" or "owner/name:config". split: "train", "validation" or "test".
    A document is an article of WikiText, a text file, or a row (its `column`). Files of a folder belong to the split
    that their name or folder names. A validation or test split that a source lacks is taken from its training split,
    one document in 20 for each, or one twentieth of the lines of every text file when they are fewer than 20.
    cache_dir: default $HBLL_CACHE, else $XDG_CACHE_HOME/hbll_seq, else ~/.cache/hbll_seq. num_proc: how many native
    threads tokenise; default: every core this process may use.

    The cache is keyed by content and tokenizer, and appears complete or not at all; processes that need the same one at
    once wait for the first. Memory stays bounded whatever the size of the corpus.

    Raises ValueError: unknown source or split, missing or empty file, text that is not UTF-8 (with the byte offset),
    missing column, a split without text, a cache that cannot be written, a Hub that cannot be reached.
    """
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc is {num_proc}; it must be at least 1, or None for every core")
    corpus = open_corpus(source, split, column)
    fingerprint = _key(corpus.digest, tokenizer)
    folder = cache_folder(cache_dir) / "tokens" / fingerprint[:32]
    stream = _open_cached(folder, fingerprint)
    if stream is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                stream = _open_cached(folder, fingerprint)  # another process may have made it meanwhile
                if stream is None:
                    _write_cache(folder, fingerprint, corpus, tokenizer, num_proc or _n_cores())
                    stream = _open_cached(folder, fingerprint)
        except OSError as error:
            raise ValueError(
                f"cannot write the token cache in {str(folder.parent)!r}: {error}; set HBLL_CACHE (or cache_dir) to a "
                "folder that can be written and has room"
            ) from error
    assert stream is not None
    return stream


def load_tokenizer(
    source: str, vocab_size: int, *, column: str = "text", cache_dir: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """A tokenizer trained on the source's training split, or the cached one of an earlier call.

    Sources and errors: as for `load_tokens`; ValueError too when the text does not support the vocabulary size.
    """
    corpus = open_corpus(source, "train", column)
    key = hashlib.sha256(f"{FORMAT} {corpus.digest} {vocab_size}".encode()).hexdigest()
    path = cache_folder(cache_dir) / "tokenizers" / f"{key[:32]}.model"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                print(f"training a tokenizer of {vocab_size} pieces on {corpus.name}", file=sys.stderr)
                Tokenizer.train((s for s in corpus.segments() if s is not None), vocab_size).save(path)
    except OSError as error:
        raise ValueError(f"cannot write the tokenizer cache {str(path)!r}: {error}; set HBLL_CACHE") from error
    return Tokenizer.from_file(path)


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder given, else $HBLL_CACHE, else $XDG_CACHE_HOME/hbll_seq, else ~/.cache/hbll_seq."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("HBLL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hbll_seq"


class TokenWindows:
    """A stream cut into windows of block_size + 1 tokens; a window's last token is the next one's first.

    Raises ValueError when the stream is shorter than one window or block_size is below 1.
    """

    def __init__(self, stream: TokenStream, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; it must be at least 1")
        if stream.n_tokens < block_size + 1:
            raise ValueError(
                f"the text has {stream.n_tokens} tokens, but one window needs block_size + 1 = {block_size + 1}; "
                "give more text or a smaller block_size"
            )
        self.stream, self.block_size = stream, block_size
        # An epoch starts at a random offset below block_size; n_windows is what fits behind every offset.
        self.n_windows = max(1, (stream.n_tokens - block_size) // block_size)
        self._n_offsets = min(block_size, stream.n_tokens - self.n_windows * block_size)
        self._orders: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def epoch_order(self, seed: int, epoch: int) -> tuple[int, np.ndarray]:
        """(where the first window starts, order of the n_windows windows): a pure function of seed and epoch."""
        if seed < 0 or epoch < 0:
            raise ValueError(f"seed {seed} and epoch {epoch} must not be negative")
        if (seed, epoch) not in self._orders:
            rng = np.random.default_rng([seed, epoch])
            offset, order = int(rng.integers(self._n_offsets)), rng.permutation(self.n_windows)
            order.flags.writeable = False
            while len(self._orders) > 1:  # a batch spans two epochs at most, as a rule
                del self._orders[next(iter(self._orders))]
            self._orders[seed, epoch] = offset, order
        return self._orders[seed, epoch]

    def batch(self, step: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> torch.Tensor:
        """Training windows, LongTensor [B, T + 1]: a pure function of the arguments.

        The ranks' batches of a step joined are the batch that one process with batch_size * world_size would get;
        consecutive steps walk through one epoch's order after the other, a batch may span two.
        """
        if step < 0 or batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"step {step} must be >= 0, batch_size {batch_size} >= 1 and rank {rank} in 0 .. world_size - 1 "
                f"(world_size {world_size})"
            )
        first = (step * world_size + rank) * batch_size
        return torch.stack([self._window(*divmod(i, self.n_windows), seed) for i in range(first, first + batch_size)])

    def contiguous_batch(self, step: int, rows: range, n_rows: int, seed: int) -> torch.Tensor:
        """Training windows for states that are carried, LongTensor [len(rows), T + 1]: a pure function of the arguments.

        Each of ``n_rows`` rows reads the text window after window from a start of its own, row r at step s + 1 what follows
        its window of step s. The starts are spread evenly behind a seeded one; behind the text's last window comes its
        first one. After ``n_windows / n_rows`` steps every window was read once.

        Raises ValueError: there are more rows than windows, or a row is not one of them.
        """
        if step < 0 or not 0 <= rows.start <= rows.stop <= n_rows or n_rows > self.n_windows:
            raise ValueError(
                f"step {step} must be >= 0, rows {rows.start} .. {rows.stop - 1} below n_rows {n_rows}, and that at most "
                f"the {self.n_windows} windows of the text; give a smaller batch or more text"
            )
        rng = np.random.default_rng([seed, _CONTIGUOUS])
        offset, first = int(rng.integers(self._n_offsets)), int(rng.integers(self.n_windows))
        windows = ((first + r * self.n_windows // n_rows + step) % self.n_windows for r in rows)
        return torch.stack([self._slice(offset + window * self.block_size) for window in windows])

    def _window(self, epoch: int, position: int, seed: int) -> torch.Tensor:
        offset, order = self.epoch_order(seed, epoch)
        return self._slice(offset + int(order[position]) * self.block_size)

    def _slice(self, start: int) -> torch.Tensor:
        tokens = self.stream.tokens[start : start + self.block_size + 1]
        return torch.from_numpy(tokens.astype(np.int64))

    def evaluation_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """The whole stream in order, LongTensors [b, t + 1] with b <= batch_size and t <= T.

        Every token after the first is predicted exactly once. What is left over behind the last full window comes last,
        as one shorter row.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        n_full = (self.stream.n_tokens - 1) // self.block_size
        for first in range(0, n_full, batch_size):
            rows = range(first, min(first + batch_size, n_full))
            yield torch.stack([self._slice(row * self.block_size) for row in rows])
        if n_full * self.block_size < self.stream.n_tokens - 1:
            yield self._slice(n_full * self.block_size)[None]


    def contiguous_evaluation_batches(self, n_rows: int, max_windows: int | None = None) -> Iterator[torch.Tensor]:
        """As :meth:`evaluation_batches` for states that are carried: row b of a batch goes on where row b before it ended.

        The windows (all, or the first ``max_windows``) lie in ``n_rows`` stretches side by side. What is left over behind
        them goes on from the last row, in batches of one row. Every token but the first is predicted exactly once.
        """
        if n_rows < 1:
            raise ValueError(f"n_rows is {n_rows}; it must be at least 1")
        n_full = (self.stream.n_tokens - 1) // self.block_size
        limited = max_windows is not None and max_windows <= n_full
        n_windows = max_windows if limited else n_full
        length = n_windows // n_rows
        for step in range(length):
            yield torch.stack([self._slice((row * length + step) * self.block_size) for row in range(n_rows)])
        for window in range(n_rows * length, n_windows):
            yield self._slice(window * self.block_size)[None]
        if not limited and n_full * self.block_size < self.stream.n_tokens - 1:
            yield self._slice(n_full * self.block_size)[None]


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


def _encode_segments(
    segments: Segments, tokenizer: Tokenizer, num_threads: int, counts: _Counts
) -> Iterator[np.ndarray]:
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


def _open_cached(folder: Path, fingerprint: str) -> TokenStream | None:
    """The cached stream, or None when there is none or it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tokens = np.memmap(folder / "tokens.bin", dtype=np.dtype(meta["dtype"]), mode="r")
        if meta["fingerprint"] != fingerprint or len(tokens) != meta["n_tokens"]:
            return None
        return TokenStream(tokens, meta["n_words"], meta["n_bytes"], fingerprint)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_cache(folder: Path, fingerprint: str, corpus: Corpus, tokenizer: Tokenizer, num_threads: int) -> None:
    """Writes aside, then renames. The caller holds the lock of the folder."""
    for stale in folder.parent.glob(f"{folder.name}.*.tmp"):  # left by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.", suffix=".tmp"))
    try:
        counts = _Counts()
        with (
            (aside / "tokens.bin").open("wb") as file,
            tqdm(
                desc=f"tokenizing {corpus.name}",
                total=corpus.n_bytes,
                unit="B",
                unit_scale=True,
                delay=PROGRESS_AFTER_S,
                file=sys.stderr,
            ) as progress,
        ):
            for ids in _encode_segments(corpus.segments(), tokenizer, num_threads, counts):
                ids.tofile(file)
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
        }
        atomic_write(aside / "meta.json", json.dumps(meta, indent=1))
        os.chmod(aside, 0o755)  # mkdtemp's 0700 would keep others from a shared cache
        if folder.exists():  # damaged, or it would have been opened
            shutil.rmtree(folder)
        os.rename(aside, folder)
        fsync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
