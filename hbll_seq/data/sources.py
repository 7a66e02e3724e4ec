"""Where text comes from: the bundled WikiText-2, a local file or folder, a dataset of the Hugging Face Hub.

`open_corpus` finds the text of one split and returns a `Corpus`: what identifies its content, and a stream of its lines
with the ends of documents marked. `describe_source` says what is read, held out and left aside. Nothing here holds more
than one document (text files: one line) in memory.

WikiText: Merity et al. 2016 (arXiv 1609.07843). Its documents are articles; joined, they are the exact text.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from hbll_seq.data import text_files
from hbll_seq.data.hub_datasets import load_hub_dataset
from hbll_seq.data.pieces import split_lines
from hbll_seq.data.text_division import N_SLOTS, SPLITS, Share, divide, part_of_files, part_of_rows
from hbll_seq.data.text_files import (
    KINDS,
    DataFile,
    as_text,
    check_marks,
    have_text,
    kind_of,
    no_column,
    read_lines,
    read_rows,
    rows_with_text,
)
from hbll_seq.data.text_folder import find_folder, split_named
from hbll_seq.utils.integrity import sha256
from hbll_seq.utils.reading import possible_name, quote, shorten

HUB_WIKITEXT = "Salesforce/wikitext"

_ARTICLE = re.compile(r" = (?!= ).* = \n?")
# Word counts (end of line counted as one) that word-level perplexity is reported over, for the token version and, by
# convention, for the raw version too, whose own count differs a little. The number of lines tells the texts apart.
_WIKITEXT_WORDS = {3760: 217_646, 4358: 245_569, 36_718: 2_088_628, 1_801_350: 103_227_021}

Segments = Iterator["str | None"]  # lines as split_lines cuts them; None ends a document


@dataclass(frozen=True)
class Corpus:
    """The text of one split.

    digest: sha256 of the content and of how it is cut into documents. n_bytes: about how much there is to read, for
    progress. words_by_lines: word counts to report instead of the counted ones, by the number of lines. segments raises
    ValueError when a file cannot be read, or has changed since it was opened.
    """

    name: str
    digest: str
    n_bytes: int | None
    segments: Callable[[], Segments]
    words_by_lines: dict[int, int] | None = None


@dataclass(frozen=True)
class _Found:
    """A source. kind: 'bundled', 'hub' or that of its files. splits: the files of each split, or the Hub's rows."""

    name: str
    kind: str
    splits: dict[str, Any]
    is_wikitext: bool = False
    aside: dict[str, list[str]] = field(default_factory=dict)


def open_corpus(source: str, split: str, column: str = "text") -> Corpus:
    """Finds one split of a source.

    Args:
        source: see `load_tokens`. Text and jsonl may be packed (.gz, .xz, .zst). A folder's files belong to the split that
            they or their folders name, in any case ('val', 'dev', 'eval', 'heldout': validation); those that name none are
            training text.
        split: "train", "validation" or "test". One that the source lacks is held out of the training text: one in 20 of its
            files or rows, of fewer than 20 files the last twentieth of each, of fewer than 20 rows the last one. Empty ones
            do not count. Where a text has too few lines it is cut at blanks, else at characters.
        column: the text of jsonl, parquet and the Hub.

    Raises:
        ValueError: no such source or split, a file that cannot be read, text that is not UTF-8, a split without text.
    """
    if not isinstance(split, str) or split not in SPLITS:
        raise ValueError(f"unknown split {quote(split)}; choose one of {', '.join(SPLITS)}")
    if not isinstance(column, str):
        raise ValueError(f"column is {quote(column)}; it must be the name of a column")
    found = _find(source)
    if found.kind == "bundled":
        return _open_bundled(split)
    share = divide(found.name, list(found.splits), split, may_carve=not found.is_wikitext)
    if found.kind == "hub":
        return _open_hub(found, share, split, column)
    return _open_files(found, share, split, column)


def describe_source(source: str) -> list[str]:
    """What is read for each split, what is held out and what is left aside, each on one line.

    Raises ValueError: there is no such source, or it lacks a split that cannot be held out.
    """
    found = _find(source)
    if found.kind == "bundled":
        return ["data: train, validation and test are those of the bundled WikiText-2"]
    lines = []
    for split in SPLITS:
        share = divide(found.name, list(found.splits), split, may_carve=not found.is_wikitext)
        if share.place is not None:
            lines.append(f"data: {split} is held out of the training text")
            continue
        if found.kind == "hub":
            what = f"that of {shorten(quote(found.name), 100)}"
        else:
            what = _names([file.path.name for file in found.splits[share.split] if file.stamp[0]]) or "empty"
        lines.append(f"data: {split} is {what}{', without what is held out' * bool(share.held)}")
    for reason, names in sorted(found.aside.items()):
        lines.append(f"data: left aside, {reason}: {_names(sorted(names))}")
    return lines


def _names(names: list[str]) -> str:
    shown = ", ".join(shorten(quote(name), 60) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3:,} more"


def _find(source: str) -> _Found:
    try:
        source = os.fsdecode(source)
        path = possible_name(source)
    except (TypeError, ValueError):
        raise _no_source(source) from None
    if source == "bundled":
        return _Found(source, source, {})
    if source in ("wikitext-2", "wikitext-103"):
        config = f"{source}-raw-v1"
        root = os.environ.get("HBLL_DATA")
        if root and (folder := possible_name(root) / config).is_dir():
            return _found_folder(folder, str(folder))
        return _found_hub(HUB_WIKITEXT, config)
    try:
        is_folder = path.is_dir()
        exists = is_folder or path.exists()
    except OSError as error:
        raise ValueError(f"cannot read data {quote(source)}: {error.strerror}") from error
    if is_folder:
        return _found_folder(path, str(path))
    if exists:
        file = DataFile.find(path)
        return _Found(source, file.kind, {"train": [file]})
    hub_id = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*?)(?::([\w.-]+))?", source)
    if hub_id and kind_of(source) is None:
        return _found_hub(hub_id.group(1), hub_id.group(2))
    raise _no_source(source)


def _no_source(source: object) -> ValueError:
    return ValueError(
        f"there is no data {quote(source)}; give 'bundled', 'wikitext-2', 'wikitext-103', an existing "
        f"{'/'.join(KINDS)} file or folder, or a Hub id 'owner/name' or 'owner/name:config'"
    )


def _found_folder(folder: Path, name: str) -> _Found:
    content = find_folder(folder)
    splits = {split: [DataFile.find(path) for path in paths] for split, paths in content.splits.items()}
    empty = [file.path.name for files in splits.values() for file in files if not file.stamp[0]]
    aside = {**content.aside, "empty files": empty} if empty else content.aside
    return _Found(name, content.kind, splits, content.is_wikitext, aside)


# -- the bundled text ---------------------------------------------------------------------------------------------


def _open_bundled(split: str) -> Corpus:
    name = f"wikitext-2.{'valid' if split == 'validation' else split}.txt.xz"
    packed = resources.files("hbll_seq") / "assets" / name

    def segments() -> Segments:
        with packed.open("rb") as file, lzma.open(file) as text:
            yield from split_articles(read_lines(iter(lambda: text.read(text_files.BLOCK), b""), name))

    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    return Corpus(f"bundled {split}", _combine("articles", digest), None, segments)


def split_articles(lines: Iterable[str]) -> Segments:
    """Marks the ends of WikiText's articles. One starts at a level-1 heading ' = Title = ' that stands between blank
    lines (a few table captions look alike but do not); a blank line before the first belongs to the first."""
    before, line, has_text = "", None, False
    for after in lines:
        if line is not None:
            if has_text and not before.strip() and not after.strip() and _ARTICLE.fullmatch(line):
                yield None
            has_text = has_text or bool(line.strip())
            yield line
            before = line
        line = after
    if line is not None:
        yield line
        yield None


# -- local files --------------------------------------------------------------------------------------------------


def _open_files(found: _Found, share: Share, split: str, column: str) -> Corpus:
    files, wikitext, name = found.splits[share.split], found.is_wikitext, _printable(f"{found.name} {split}")
    for file in files:
        check_marks(file)
    measured = [file.measure() for file in files]
    n_bytes = sum(size for _, size in measured)
    if n_bytes == 0:
        raise ValueError(f"data {quote(found.name)} is empty ({files[0].path.name}: 0 bytes); give a file with text")
    starts = [0 if found.kind == ".parquet" else file.text_start() for file in files]
    if found.kind == ".txt":
        places = [(file, start, size) for file, start, (_, size) in zip(files, starts, measured, strict=True)]
        ranges, rule = part_of_files(places, share)
        if not ranges:
            raise _too_little(name, f"{n_bytes:,} bytes", share)

        def segments() -> Segments:
            texts = (read_lines(file.blocks(start, end), str(file.path), start) for file, start, end in ranges)
            return split_articles(line for lines in texts for line in lines) if wikitext else _documents(texts)

        n_bytes = sum(end - start for _, start, end in ranges)
    else:

        def rows() -> Iterator[str]:
            return (row for file in files for row in read_rows(file, column))

        flags = (row for file in files for row in rows_with_text(file, column))
        segments, rule = _read_rows(name, flags, rows, share, wikitext)
        n_bytes = n_bytes * len(share.slots()) // N_SLOTS

    cut = [wikitext, found.kind, column if found.kind != ".txt" else "", list(share.slots())]
    changed = [rule] * bool(rule) + ["without byte order mark"] * any(starts)
    digest = _combine(json.dumps(cut + changed), *(sha for sha, _ in measured))
    known = None if found.kind == ".parquet" else n_bytes  # the size of packed columns says little
    return Corpus(name, digest, known, segments, _WIKITEXT_WORDS if wikitext else None)


def _read_rows(
    name: str, flags: Iterable[bool], rows: Callable[[], Iterator[str]], share: Share, wikitext: bool
) -> tuple[Callable[[], Segments], str]:
    """The segments of a part of the rows, and the rule that gives the part; ``flags`` say which rows have text."""
    part = part_of_rows(flags, rows, share)
    if part.is_empty:
        raise _too_little(name, f"{part.n_rows} rows with text", share)

    def segments() -> Segments:
        if wikitext:
            return split_articles(line for text in rows() for line in split_lines(text or " \n"))
        return _documents(map(split_lines, part.select(rows())))

    return segments, part.rule


def _too_little(name: str, amount: str, share: Share) -> ValueError:
    return ValueError(
        f"data {quote(name)} holds no text; give more text, or a split of its own: there are {amount}, too little to divide "
        f"in {share.held + 1}"
    )


def _documents(texts: Iterable[Iterable[str]]) -> Segments:
    for lines in texts:
        is_empty = True
        for line in lines:
            is_empty = False
            yield line
        if not is_empty:
            yield None


# -- the Hub ------------------------------------------------------------------------------------------------------


def _found_hub(repo: str, config: str | None) -> _Found:
    name = repo if config is None else f"{repo}:{config}"
    wikitext = repo == HUB_WIKITEXT
    try:
        loaded = load_hub_dataset(repo, config)
    except Exception as error:  # the Hub's clients raise unrelated types: no network, no such id, gated, no such config
        folder = f"FOLDER/{config} as the data, or set HBLL_DATA=FOLDER" if wikitext else "FOLDER as the data"
        raise ValueError(
            f"data {shorten(quote(name), 80)} is no file or folder here, and loading it from the Hugging Face Hub failed "
            f"({type(error).__name__}: {shorten(error, 100)}). Without network, fetch it elsewhere with "
            f"`hf download {shorten(repo, 60)} --repo-type dataset --local-dir FOLDER` and give {folder}"
        ) from error
    splits, aside = {}, []
    for key, rows in loaded.items():
        split = split_named(str(key))
        if split is None or (split in loaded and split != key):  # two splits fit: only the exact name counts
            split = str(key)
            aside.append(split)
        elif split in splits:
            raise ValueError(
                f"data {shorten(quote(name), 100)} has several splits that mean {split!r}: "
                f"{_names([str(k) for k in loaded if split_named(str(k)) == split])}; save the one you want to a file"
            )
        splits[split] = rows
    return _Found(name, "hub", splits, wikitext, {"other splits": aside} if aside else {})


def _open_hub(found: _Found, share: Share, split: str, column: str) -> Corpus:
    data, wikitext, name = found.splits[share.split], found.is_wikitext, quote(found.name)
    if column not in data.column_names:
        raise no_column(name, column, data.column_names)
    cache_files, data = data.cache_files, data.select_columns([column])

    def rows() -> Iterator[str]:
        return (as_text(row, name, column) for batch in data.iter(batch_size=1024) for row in batch[column])

    tables = data.with_format("arrow").iter(batch_size=1024)
    flags = (flag for table in tables for flag in have_text(table[column]))
    segments, rule = _read_rows(f"{found.name} {split}", flags, rows, share, wikitext)
    cut = [wikitext, "hub", column, list(share.slots()), *[rule] * bool(rule)]
    stored = [sha256(file["filename"]) for file in cache_files]
    digest = _combine(json.dumps(cut), *(stored or (line or "\0" for line in segments())))  # or held in memory
    return Corpus(f"{found.name} {split}", digest, None, segments, _WIKITEXT_WORDS if wikitext else None)


def _combine(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _printable(name: str) -> str:
    """A file name for a message: bytes that are not UTF-8 are written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
