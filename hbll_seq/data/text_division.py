"""Which part of a source's text each split gets: a split of its own, or a part held out of the training text.

Texts are divided at line ends where that is possible, and as whole documents where there are 20 of them. Where a split would
get no text, the cut goes to the next blank, else to the next character, else between documents. Every rule but the first one
has a name, which is part of the text's fingerprint.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO, NamedTuple

from hbll_seq.data import text_files
from hbll_seq.data.text_files import DataFile
from hbll_seq.utils.reading import quote

SPLITS = ("train", "validation", "test")
N_SLOTS = 20  # a split that a source lacks is one slot in 20 of its training documents

# A cut goes behind the first match that starts at the byte before its place, or later.
_CUTS = {
    "lines": re.compile(rb"\n"),
    "line ends": re.compile(rb"\r\n?|\n"),
    "blanks": re.compile(rb"\r\n|[ \t\n\v\f\r]"),
    "characters": re.compile(rb"(?s:.)[\x80-\xbf]{0,3}"),
}


class Share(NamedTuple):
    """The part of one of the source's own splits that a wanted split gets.

    split: which of the source's own. held: how many splits are held out of it, each at its end. place: which one of them this
    is; None for what is left to training.
    """

    split: str
    held: int = 0
    place: int | None = None

    def slots(self, n: int = N_SLOTS) -> range:
        """Which of every n documents, or of n slices of a text."""
        first = n - self.held
        return range(first) if self.place is None else range(first + self.place, first + self.place + 1)


def divide(name: str, own: list[str], split: str, may_carve: bool = True) -> Share:
    """Where a split of a source comes from.

    A validation or test split that the source lacks is the last, or last but one, of every 20 training documents (of a
    text file: twentieths of its bytes, cut at line ends); the training split is then what is left.
    Raises ValueError: there is no such split, and it cannot be held out.
    """
    if split in own and (split != "train" or not may_carve):
        return Share(split)
    if "train" not in own or not may_carve:
        remedy = "" if not may_carve else "; the training text's files are named 'train' or after no split"
        raise ValueError(f"data {quote(name)} has no split {split!r}; it has {', '.join(sorted(own)) or 'none'}{remedy}")
    missing = [s for s in SPLITS[1:] if s not in own]
    return Share("train", len(missing), None if split == "train" else missing.index(split))


class Piece(NamedTuple):
    """A text that may be cut: how its bytes are opened at a place, and where it starts and ends."""

    open: Callable[[int], AbstractContextManager[BinaryIO]]
    start: int
    end: int


def _cut_after(piece: Piece, position: int, pattern: re.Pattern[bytes]) -> int:
    """The first place at `position` or later that the pattern allows; the end of the text if there is none."""
    if position <= piece.start:
        return piece.start
    at, data = position - 1, b""
    with piece.open(at) as file:
        while more := file.read(text_files.BLOCK):
            data += more
            match = pattern.search(data)
            if match and match.end() < len(data):
                return at + match.end()
            kept = data[match.start() :] if match else b""  # with more text behind it the match may be longer
            at, data = at + len(data) - len(kept), kept
    return at + len(data)


def _cut(piece: Piece, held: int, pattern: re.Pattern[bytes]) -> list[tuple[int, int]]:
    """The parts that training keeps and the parts that are held out, as places in the text."""
    size = piece.end - piece.start
    cuts: list[int] = []
    for slot in range(N_SLOTS - held, N_SLOTS):
        place = piece.start + size * slot // N_SLOTS
        passed = cuts and cuts[-1] >= place  # then the last cut is the first one behind this place too
        cuts.append(cuts[-1] if passed else _cut_after(piece, place, pattern))
    return list(zip([piece.start, *cuts], [*cuts, piece.end], strict=True))


def _cut_pieces(pieces: list[Piece], held: int) -> tuple[str, list[list[tuple[int, int]]]] | None:
    """The first rule that gives every part some text, and the parts of every piece; None when there is none."""
    for rule, pattern in _CUTS.items():
        if rule == "lines" or sum(piece.end - piece.start for piece in pieces) >= N_SLOTS:
            parts = [_cut(piece, held, pattern) for piece in pieces]
            if all(any(start < end for start, end in column) for column in zip(*parts, strict=True)):
                return rule, parts
    return None


class FilePart(NamedTuple):
    """What a split gets of text files: where it starts and ends in which; the rule, '' when it is the usual one."""

    ranges: list[tuple[DataFile, int, int]]
    rule: str


def part_of_files(files: list[tuple[DataFile, int, int]], share: Share) -> FilePart:
    """What a split gets of text files, each given with the places where its text starts and ends.

    Files without text take no slot. The ranges are empty when there is too little text to divide.
    """
    filled = [(file, start, end) for file, start, end in files if start < end]
    if not share.held:
        return FilePart(filled, "")
    period = min(N_SLOTS, len(filled))
    by_document = [part for i, part in enumerate(filled) if i % period in share.slots(period)]
    if len(filled) >= N_SLOTS:
        counted = [part for i, part in enumerate(files) if i % N_SLOTS in share.slots() and part[1] < part[2]]
        return FilePart(by_document, "" if by_document == counted else "files with text")
    pieces = [Piece(file.open, start, end) for file, start, end in filled]
    index = 0 if share.place is None else 1 + share.place
    if cut := _cut_pieces(pieces, share.held):
        rule, parts = cut
        usual = rule == "lines" and len(files) < N_SLOTS
        return FilePart([(f[0], *part[index]) for f, part in zip(filled, parts, strict=True)], "" if usual else rule)
    if len(filled) > share.held:
        return FilePart(by_document, "files")
    at_lines = [(f[0], *_cut(piece, share.held, _CUTS["lines"])[index]) for f, piece in zip(filled, pieces, strict=True)]
    return FilePart([part for part in at_lines if part[1] < part[2]], "")


class RowPart(NamedTuple):
    """What a split gets of rows, those without text not counted.

    Of every `period` rows those of the slots; with ranges, these bytes of every row. rule: '' when it is the usual one.
    n_rows: how many rows there are; None where they need not be counted.
    """

    period: int
    slots: range
    rule: str
    n_rows: int | None = None
    ranges: list[tuple[int, int]] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether this is known to be no text at all."""
        if self.ranges is not None:
            return all(start == end for start, end in self.ranges)
        return self.n_rows is not None and self.n_rows <= self.slots.start

    def select(self, rows: Iterable[str]) -> Iterator[str]:
        """The texts of this part."""
        for i, row in enumerate(filter(None, rows)):
            if self.ranges is not None:
                start, end = self.ranges[i]
                yield row.encode()[start:end].decode()
            elif i % self.period in self.slots:
                yield row


def part_of_rows(have_text: Iterable[bool], rows: Callable[[], Iterable[str]], share: Share) -> RowPart:
    """The rows of a split, where it is known which rows have text and rows can be read repeatedly."""
    if not share.held:
        return RowPart(N_SLOTS, range(N_SLOTS), "")
    slots, n_rows = share.slots(), 0
    usual = []  # for the first rows, whether this part would get them if empty rows took a slot
    moved = False  # whether it gets other rows than those
    for i, has_text in enumerate(have_text):
        if has_text:
            if n_rows < N_SLOTS:
                usual.append(i % N_SLOTS in slots)
            moved = moved or (i % N_SLOTS in slots) != (n_rows % N_SLOTS in slots)
            n_rows += 1
    if n_rows >= N_SLOTS:
        return RowPart(N_SLOTS, slots, "rows with text" if moved else "", n_rows)
    if n_rows > share.held:
        last = share.slots(n_rows)
        return RowPart(n_rows, last, "" if usual == [i in last for i in range(n_rows)] else "last rows", n_rows)
    texts = [row.encode() for row in filter(None, rows())]
    pieces = [Piece(lambda at, text=text: io.BytesIO(text[at:]), 0, len(text)) for text in texts]
    if pieces and (cut := _cut_pieces(pieces, share.held)):
        index = 0 if share.place is None else 1 + share.place
        return RowPart(N_SLOTS, slots, f"rows at {cut[0]}", n_rows, [part[index] for part in cut[1]])
    return RowPart(N_SLOTS, slots, "rows with text" if moved else "", n_rows)
