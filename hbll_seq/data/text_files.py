"""Data files: what they are, how they are unpacked, and the lines and rows in them.

A file is read as a stream; nothing here holds more than one block of text or one row in memory. Every error of reading is a
ValueError that names the file. A file that has changed since it was found is an error too, because its stored digest and
size no longer hold.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import io
import itertools
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hbll_seq.data.pieces import MAX_LINE, split_lines
from hbll_seq.utils.reading import open_regular, parse_json, quote, shorten

KINDS = (".txt", ".jsonl", ".parquet")
PACKINGS = (".gz", ".xz", ".zst")  # of text; parquet packs its columns itself
ENDINGS = (*KINDS, *(kind + packing for kind in KINDS[:2] for packing in PACKINGS))
BLOCK = 1 << 20  # bytes read at once
MAX_ROW = 1 << 26  # bytes of a row of jsonl: parsed, small values take 24 times their text
XZ_MEMORY = 1 << 29  # bytes that unpacking may take; `xz -9` asks for 65 MiB
_PARQUET = b"PAR1"
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKS = {  # in this order: UTF-32's mark starts with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def kind_of(name: str | os.PathLike[str]) -> tuple[str, str] | None:
    """(kind, packing) of a file by the ending of its name; the packing is '' for none. None for any other file."""
    stem, ending = os.path.splitext(os.path.basename(name).lower())
    if ending in KINDS:
        return ending, ""
    kind = os.path.splitext(stem)[1]
    return (kind, ending) if ending in PACKINGS and kind in KINDS[:2] else None


@dataclass(frozen=True)
class DataFile:
    """A data file as it was when it was found. Every method raises ValueError when it cannot be read or has changed.

    kind, packing: see `kind_of`. stamp: its size and the time of its last change.
    """

    path: Path
    kind: str
    packing: str
    stamp: tuple[int, int]

    @classmethod
    def find(cls, path: Path) -> DataFile:
        """Raises ValueError: no regular file, not to be opened, an ending that is not one of ENDINGS."""
        kind = kind_of(path)
        if kind is None:
            raise ValueError(
                f"data file {quote(str(path))} has suffix {quote(path.suffix)}; it must be one of {', '.join(ENDINGS)}"
            )
        try:
            with open_regular(path) as file:
                return cls(path, *kind, _stamp(file))
        except OSError as error:
            raise _unreadable(path, error) from error

    @contextlib.contextmanager
    def open(self, start: int = 0) -> Iterator[BinaryIO]:
        """The unpacked content from byte `start` on."""
        try:
            with open_regular(self.path) as raw, self._unpack(raw) as file:
                self._check(raw)
                if not self.packing:
                    file.seek(start)
                while self.packing and start and (skipped := len(file.read(min(start, BLOCK)))):
                    start -= skipped
                try:
                    yield file
                except Exception:
                    self._check(raw)  # a file that was cut meanwhile is reported as such
                    raise
                self._check(raw)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise _unreadable(self.path, error) from error

    def _unpack(self, raw: BinaryIO) -> Any:
        if self.packing == ".gz":
            return gzip.GzipFile(fileobj=raw)
        if self.packing == ".xz":
            lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY).decompress(raw.read(1 << 12), max_length=1)
            raw.seek(0)
            return lzma.LZMAFile(raw, format=lzma.FORMAT_XZ)
        if self.packing == ".zst":
            import pyarrow  # a large package that only these files need

            return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"), BLOCK)
        return raw

    def _check(self, file: BinaryIO) -> None:
        if _stamp(file) != self.stamp:
            raise ValueError(f"data file {quote(str(self.path))} has changed while it was in use; start again")

    def measure(self) -> tuple[str, int]:
        """The sha256 of the unpacked content, and its bytes."""
        digest, n_bytes = hashlib.sha256(), 0
        for block in self.blocks():
            digest.update(block)
            n_bytes += len(block)
        return digest.hexdigest(), n_bytes

    def text_start(self) -> int:
        """How many bytes a byte order mark takes. Raises ValueError for UTF-16 and UTF-32, marked or not."""
        with self.open() as file:
            start = file.read(1 << 10)
        if name := _other_encoding(start):
            raise ValueError(
                f"data file {quote(str(self.path))} is {name}; convert it to UTF-8: `iconv -f {name} -t UTF-8 OLD > NEW`"
            )
        return len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0

    def blocks(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The unpacked content between two bytes."""
        with self.open(start) as file:
            while block := file.read(BLOCK if end is None else min(BLOCK, end - start)):
                start += len(block)
                yield block


def _stamp(file: BinaryIO) -> tuple[int, int]:
    info = os.fstat(file.fileno())
    return info.st_size, info.st_mtime_ns


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = shorten(getattr(error, "strerror", None) or error)
    remedy = "; pack it again" if kind_of(path) and kind_of(path)[1] else ""
    return ValueError(f"cannot read data file {quote(str(path))}: {reason}{remedy}")


def _other_encoding(start: bytes) -> str | None:
    """UTF-16 or UTF-32 by its mark, or by where the zero bytes of Latin letters stand."""
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            return name
    zero = [[byte == 0 for byte in start[i::4]] for i in range(4)]
    if len(zero[3]) < 2:
        return None
    share = [sum(column) / len(column) for column in zero]
    for name, letters in {"UTF-32LE": (0,), "UTF-32BE": (3,), "UTF-16LE": (0, 2), "UTF-16BE": (1, 3)}.items():
        if all(share[i] < 0.1 if i in letters else share[i] > 0.9 for i in range(4)):
            return name
    return None


# -- text -----------------------------------------------------------------------------------------------------------------


def read_lines(blocks: Iterable[bytes], name: str, offset: int = 0) -> Iterator[str]:
    """Decodes UTF-8 and cuts it into lines (no newline is translated). Raises ValueError with the byte offset of what
    is not UTF-8; `offset` is where the first block stands in the file."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
    for block in itertools.chain(blocks, [b""]):  # the empty block is the end
        offset += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, offset - len(error.object) + error.start, error) from error
        lines, rest = list(split_lines(rest + text)), ""
        if lines and block and not lines[-1].endswith("\n") and len(lines[-1]) < MAX_LINE:
            rest = lines.pop()  # the line may go on in the next block
        yield from lines


def _not_utf8(name: str, offset: int, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"data file {quote(name)} is not UTF-8: byte 0x{error.object[error.start]:02x} at byte offset {offset} "
        f"({error.reason}); convert it, e.g. with `iconv -f LATIN1 -t UTF-8`"
    )


# -- rows -----------------------------------------------------------------------------------------------------------------


def read_rows(file: DataFile, column: str) -> Iterator[str]:
    """The text of every row. A missing value and a blank line are the empty text.

    Raises ValueError: what is no row, a row of jsonl above MAX_ROW bytes, a column that is missing or holds no text, text
    that is not Unicode.
    """
    if file.kind == ".jsonl":
        for number, offset, line in _json_lines(file):
            yield _json_text(file, number, offset, line, column)
    else:
        for array in _parquet_arrays(file, column):
            try:
                texts = array.to_pylist()
            except UnicodeDecodeError as error:
                raise ValueError(f"data file {quote(str(file.path))} is not UTF-8: {shorten(error)}") from error
            for text in texts:
                yield as_text(text, quote(str(file.path)), column)


def rows_with_text(file: DataFile, column: str) -> Iterator[bool]:
    """Whether a row has text, for every row: much quicker than reading them."""
    if file.kind == ".jsonl":
        for number, offset, line in _json_lines(file):
            maybe_empty = b'""' in line or b"null" in line or line.isspace()
            yield not maybe_empty or bool(_json_text(file, number, offset, line, column))
    else:
        for array in _parquet_arrays(file, column):
            yield from have_text(array)


def have_text(array: Any) -> list[bool]:
    """For each value of an Arrow array, whether it is more than an empty text."""
    import pyarrow.compute

    try:
        return [bool(n) for n in pyarrow.compute.binary_length(array).to_pylist()]
    except pyarrow.ArrowNotImplementedError:  # of another form (or no text, which reading the values finds)
        return [value is not None and value != "" for value in array.to_pylist()]


def _json_lines(file: DataFile) -> Iterator[tuple[int, int, bytes]]:
    """The lines with their numbers and byte offsets. Lines may end in a carriage return alone."""
    number, offset = 0, file.text_start()
    with file.open(offset) as content:
        while whole := content.readline(MAX_ROW + 1):
            if len(whole) > MAX_ROW:
                raise ValueError(
                    f"data file {quote(str(file.path))}, line {number + 1}: a row may have at most {MAX_ROW:,} bytes; "
                    "divide it into several, or give the text as .txt"
                )
            # no JSON string holds a bare carriage return, but one may stand between the values of a row
            bare = b"\r" in whole and b"\r" in whole.strip()
            for line in filter(None, re.split(rb"(?<=\r)", whole)) if bare and not _is_json(whole) else (whole,):
                number += 1
                yield number, offset, line
                offset += len(line)


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line.decode("utf-8"), null_for_non_finite=True)
    except ValueError:
        return False
    return True


def _json_text(file: DataFile, number: int, offset: int, line: bytes, column: str) -> str:
    """The text of a line. Other columns may hold NaN, which many programs write."""
    if line.isspace():
        return ""
    where = f"{quote(str(file.path))}, line {number}"
    try:
        row = parse_json(line.decode("utf-8"), null_for_non_finite=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(str(file.path), offset + error.start, error) from error
    except ValueError as error:
        raise ValueError(f"data file {where}: not JSON ({error}); mend or remove the line") from error
    if not isinstance(row, dict):
        raise ValueError(f'data file {where}: not a JSON object but {type(row).__name__}; write rows as {{"text": ..}}')
    if column not in row:
        raise no_column(where, column, row)
    if row[column] is None and b"null" not in line:  # it was read as such
        raise ValueError(f"data {where}: column {quote(column)} holds a number that is not finite; name a column of text")
    text = as_text(row[column], where, column)
    if not text.isascii() and (bad := _SURROGATE.search(text)):
        raise ValueError(
            f"data file {where}: the text holds a lone surrogate, U+{ord(bad.group()):04X}, at character {bad.start()}; "
            "it is not valid Unicode: repair it or drop it"
        )
    return text


def check_marks(file: DataFile) -> None:
    """Raises ValueError where a parquet file lacks the marks at its start and end: checked before the whole file is read."""
    if file.kind != ".parquet" or not file.stamp[0]:
        return
    with file.open() as content:
        start, size = content.read(4), file.stamp[0]
        content.seek(max(0, size - 4))
        end = content.read(4)
    if size < 12 or start != _PARQUET or end != _PARQUET:
        raise _no_parquet(file.path, f"it lacks the mark {_PARQUET.decode()} at its start or end")


def _no_parquet(path: Path, reason: str) -> ValueError:
    return ValueError(f"data file {quote(str(path))} is not a readable parquet file ({reason}); copy or write it again")


def _parquet_arrays(file: DataFile, column: str) -> Iterator[Any]:
    import pyarrow.parquet

    with file.open() as content:
        try:
            parquet = pyarrow.parquet.ParquetFile(content)
            names = parquet.schema_arrow.names
            if column in names:
                yield from (batch.column(0) for batch in parquet.iter_batches(batch_size=1024, columns=[column]))
        # pyarrow raises what its parts raise: no number, no UTF-8, no memory for a size that is wrong
        except (pyarrow.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
            raise _no_parquet(file.path, shorten(error)) from error
        if column not in names:
            raise no_column(quote(str(file.path)), column, names)


def as_text(value: Any, where: str, column: str) -> str:
    """A row's value, which must be a text or missing. Raises ValueError."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"data {where}: column {quote(column)} holds a {type(value).__name__}; name a column of text")
    return value


def no_column(where: str, column: str, columns: Iterable[str]) -> ValueError:
    """The error that a source has no such column."""
    names = shorten(", ".join(quote(name) for name in itertools.islice(columns, 20)), 100)
    return ValueError(
        f"data {where} has no column {shorten(quote(column), 80)}; its columns are {names}: name the one that "
        "holds the text by --column (in Python column=), or give every row one"
    )
