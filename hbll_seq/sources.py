"""Where text comes from: the bundled WikiText-2, a local file or folder, a dataset of the Hugging Face Hub.

`open_corpus` finds the text of one split and returns a `Corpus`: what identifies its content, and a stream of its lines
with the ends of documents marked. Nothing here holds more than one document (text files: one line) in memory.

WikiText: Merity et al. 2016 (arXiv 1609.07843). Its documents are articles; joined, they are the exact text.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .tokenizer import MAX_LINE, split_lines

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".jsonl", ".parquet")
HUB_WIKITEXT = "Salesforce/wikitext"
BLOCK = 1 << 20  # bytes read at once
N_SLOTS = 20  # a split that a source lacks is one slot in 20 of its training documents

_SPLIT_NAME = re.compile(r"(?:^|[._-])(train|valid|validation|val|dev|test)(?=[._-]|$)")
_CANONICAL = {"valid": "validation", "val": "validation", "dev": "validation"}
_WIKITEXT_CONFIG = re.compile(r"wikitext-(2|103)(-raw)?-v1")
_ARTICLE = re.compile(r" = (?!= ).* = \n?")
# Word counts (end of line counted as one) that word-level perplexity is reported over, for the token version and, by
# convention, for the raw version too, whose own count differs a little. Told apart by the number of lines.
_WIKITEXT_WORDS = {3760: 217_646, 4358: 245_569, 36_718: 2_088_628, 1_801_350: 103_227_021}

Segments = Iterator["str | None"]  # lines as split_lines cuts them; None ends a document


@dataclass(frozen=True)
class Corpus:
    """The text of one split.

    digest: sha256 of the content and of how it is cut into documents. n_bytes: about how much there is to read, for
    progress. words_by_lines: word counts to report instead of the counted ones, by the number of lines.
    """

    name: str
    digest: str
    n_bytes: int | None
    segments: Callable[[], Segments]
    words_by_lines: dict[int, int] | None = None


def open_corpus(source: str, split: str, column: str = "text") -> Corpus:
    """Finds one split of a source; see `hbll_seq.data.load_tokens` for what a source is and the errors raised."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    source = os.fspath(source)
    if source == "bundled":
        return _open_bundled(split)
    if source in ("wikitext-2", "wikitext-103"):
        config = f"{source}-raw-v1"
        root = os.environ.get("HBLL_DATA")
        if root and (folder := Path(root).expanduser() / config).is_dir():
            return _open_folder(folder, split, column)
        return _open_hub(HUB_WIKITEXT, config, split, column)
    path = Path(source).expanduser()
    if source and path.is_dir():
        return _open_folder(path, split, column)
    if source and path.exists():
        return _open_files(source, {"train": [path]}, split, column)
    hub_id = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*?)(?::([\w.-]+))?", source)
    if hub_id and path.suffix not in SUFFIXES:
        return _open_hub(hub_id.group(1), hub_id.group(2), split, column)
    raise ValueError(
        f"there is no data {source!r}; give 'bundled', 'wikitext-2', 'wikitext-103', an existing "
        f"{'/'.join(SUFFIXES)} file or folder, or a Hub id 'owner/name' or 'owner/name:config'"
    )


# -- the bundled text ---------------------------------------------------------------------------------------------


def _open_bundled(split: str) -> Corpus:
    name = f"wikitext-2.{'valid' if split == 'validation' else split}.txt.xz"
    packed = resources.files("hbll_seq") / "assets" / name

    def segments() -> Segments:
        with packed.open("rb") as file, lzma.open(file) as text:
            yield from split_articles(read_lines(iter(lambda: text.read(BLOCK), b""), name))

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


def _open_folder(folder: Path, split: str, column: str) -> Corpus:
    found = (p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    files = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    suffixes = sorted({p.suffix for p in files})
    if len(suffixes) != 1:
        kinds = f"{' and '.join(suffixes)} files" if files else f"no {'/'.join(SUFFIXES)} file"
        raise ValueError(f"data folder {str(folder)!r} holds {kinds}; give a folder with files of one of these kinds")
    configs = sorted({p.relative_to(folder).parts[0] for p in files if len(p.relative_to(folder).parts) > 1})
    if len(configs) > 1 and all(_WIKITEXT_CONFIG.fullmatch(name) for name in configs):
        raise ValueError(f"data folder {str(folder)!r} holds several data sets; give one of its folders {configs}")
    named: dict[str, list[Path]] = {}
    for path in files:
        *parents, name = path.relative_to(folder).with_suffix("").parts
        words = _SPLIT_NAME.findall(name) + [part for part in parents if part in (*SPLITS, *_CANONICAL)]
        if words:
            named.setdefault(_CANONICAL.get(words[0], words[0]), []).append(path)
    wikitext = any(_WIKITEXT_CONFIG.fullmatch(p.name) for p in (folder, *(f.parent for f in files)))
    # One named split alone is no division: the whole folder is the text, divided like a single file.
    splits = named if len(named) > 1 or wikitext else {"train": files}
    if others := sorted(path.name for path in set(files).difference(*splits.values())):
        raise ValueError(
            f"data folder {str(folder)!r} names the splits {', '.join(sorted(named))}, but the file {others[0]!r} "
            f"belongs to none ({len(others)} such files); put 'train', 'validation' or 'test' into its name or move it"
        )
    return _open_files(str(folder), splits, split, column, wikitext=wikitext)


def _open_files(name: str, splits: dict[str, list[Path]], split: str, column: str, wikitext: bool = False) -> Corpus:
    own, slots = divide(name, list(splits), split, may_carve=not wikitext)
    files = splits[own]
    for path in files:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"data file {str(path)!r} has suffix {path.suffix!r}; it must be one of {SUFFIXES}")
        try:
            path.open("rb").close()
        except OSError as error:
            raise ValueError(f"cannot read data file {str(path)!r}: {error.strerror}") from error
    n_bytes = sum(path.stat().st_size for path in files)
    if n_bytes == 0:
        raise ValueError(f"data {name!r} is empty ({files[0].name}: 0 bytes); give a file with text")
    suffix = files[0].suffix

    def segments() -> Segments:
        if suffix == ".txt":
            texts = _read_texts(files, slots)
        else:
            read = _read_jsonl if suffix == ".jsonl" else _read_parquet
            rows = (row for path in files for row in read(path, column))
            texts = (split_lines(row or " \n" * wikitext) for i, row in enumerate(rows) if i % N_SLOTS in slots)
        return split_articles(line for text in texts for line in text) if wikitext else _documents(texts)

    cut = [wikitext, suffix, column if suffix != ".txt" else "", sorted(slots)]
    digest = _combine(json.dumps(cut), *map(_hash_file, files))
    n_bytes = None if suffix == ".parquet" else n_bytes * len(slots) // N_SLOTS
    return Corpus(f"{name} {split}", digest, n_bytes, segments, _WIKITEXT_WORDS if wikitext else None)


def divide(name: str, own: list[str], split: str, may_carve: bool = True) -> tuple[str, set[int]]:
    """Which of a source's own splits holds a split, and which of every N_SLOTS = 20 of its documents.

    A validation or test split that the source lacks is the last, or last but one, of every 20 training documents (of a
    text file: twentieths of its bytes, cut at line ends); the training split is then what is left."""
    if split in own and (split != "train" or not may_carve):
        return split, set(range(N_SLOTS))
    if "train" not in own or not may_carve:
        raise ValueError(f"data {name!r} has no split {split!r}; it has {', '.join(sorted(own)) or 'none'}")
    missing = [s for s in SPLITS[1:] if s not in own]
    first = N_SLOTS - len(missing)
    return "train", set(range(first)) if split == "train" else {first + missing.index(split)}


def _read_texts(files: list[Path], slots: set[int]) -> Iterator[Iterator[str]]:
    """Lines of every text file of the slots; of that part of every file when there are fewer files than slots."""
    for index, path in enumerate(files):
        if len(files) < N_SLOTS:
            start, end = _byte_range(path, slots)
        else:
            start, end = 0, path.stat().st_size if index % N_SLOTS in slots else 0
        yield read_lines(_read_blocks(path, start, end), str(path), start)


def _byte_range(path: Path, slots: set[int]) -> tuple[int, int]:
    """The slots' twentieths of a file, both ends moved on to the next line start. (Slots are consecutive.)"""
    size = path.stat().st_size
    with path.open("rb") as file:

        def line_start(slot: int) -> int:
            position = size * slot // N_SLOTS
            if position == 0:
                return 0
            file.seek(position - 1)
            while (line := file.readline(BLOCK)) and not line.endswith(b"\n"):
                pass
            return file.tell()

        return line_start(min(slots)), line_start(max(slots) + 1)


def _read_blocks(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (block := file.read(min(BLOCK, end - start))):
            start += len(block)
            yield block


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
        f"data file {name!r} is not UTF-8: byte 0x{error.object[error.start]:02x} at byte offset {offset} "
        f"({error.reason}); convert it, e.g. with `iconv -f LATIN1 -t UTF-8`"
    )


def _documents(texts: Iterable[Iterable[str]]) -> Segments:
    for lines in texts:
        is_empty = True
        for line in lines:
            is_empty = False
            yield line
        if not is_empty:
            yield None


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line.decode("utf-8")) if line.strip() else {column: ""}
            except UnicodeDecodeError as error:
                raise _not_utf8(str(path), offset + error.start, error) from error
            except ValueError as error:
                raise ValueError(f"data file {str(path)!r}, line {number}: not JSON ({error})") from error
            offset += len(line)
            if not isinstance(row, dict):
                raise ValueError(f"data file {str(path)!r}, line {number}: not a JSON object but {type(row).__name__}")
            if column not in row:
                raise _no_column(f"{str(path)!r}, line {number}", column, row)
            yield _as_text(row[column], f"{str(path)!r}, line {number}", column)


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow.parquet  # a large package that only these files need

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(repr(str(path)), column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    yield _as_text(text, repr(str(path)), column)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"data file {str(path)!r} is not a readable parquet file: {error}") from error


def _as_text(value: Any, where: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"data {where}: column {column!r} holds a {type(value).__name__}; name a column of text")
    return value


def _no_column(where: str, column: str, columns: Iterable[str]) -> ValueError:
    return ValueError(f"data {where} has no column {column!r}; its columns are {', '.join(map(repr, columns))}")


# -- the Hub ------------------------------------------------------------------------------------------------------


def _open_hub(repo: str, config: str | None, split: str, column: str) -> Corpus:
    import datasets  # takes seconds; only these sources need it

    name = repo if config is None else f"{repo}:{config}"
    wikitext = repo == HUB_WIKITEXT
    try:
        loaded = datasets.load_dataset(repo, config)
    except Exception as error:  # the Hub's clients raise unrelated types: no network, no such id, gated, no such config
        folder = f"FOLDER/{config} as the data, or set HBLL_DATA=FOLDER" if wikitext else "FOLDER as the data"
        raise ValueError(
            f"data {name!r} is no file or folder here, and loading it from the Hugging Face Hub failed "
            f"({type(error).__name__}: {str(error)[:300]}). Without network, fetch it elsewhere with "
            f"`hf download {repo} --repo-type dataset --local-dir FOLDER` and give {folder}"
        ) from error
    splits = {_CANONICAL.get(str(key), str(key)): rows for key, rows in loaded.items()}
    own, slots = divide(name, list(splits), split, may_carve=not wikitext)
    rows = splits[own]
    if column not in rows.column_names:
        raise _no_column(f"{name!r}", column, rows.column_names)

    def segments() -> Segments:
        batches = rows.select_columns([column]).iter(batch_size=1024)
        texts = (_as_text(row, repr(name), column) for batch in batches for row in batch[column])
        if wikitext:
            return split_articles(line for text in texts for line in split_lines(text or " \n"))
        return _documents(split_lines(text) for i, text in enumerate(texts) if i % N_SLOTS in slots)

    cut = [wikitext, "hub", column, sorted(slots)]
    stored = [_hash_file(Path(file["filename"])) for file in rows.cache_files]
    digest = _combine(json.dumps(cut), *(stored or (line or "\0" for line in segments())))  # or held in memory
    return Corpus(f"{name} {split}", digest, None, segments, _WIKITEXT_WORDS if wikitext else None)


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _read_blocks(path, 0, path.stat().st_size):
        digest.update(block)
    return digest.hexdigest()


def _combine(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
