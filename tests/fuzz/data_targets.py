"""Texts of the user's, as files and folders, and the library's own caches of tokens and tokenizers."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

from hbll_seq import load_tokens
from hbll_seq.data.tokens import load_tokenizer

from . import documents, files
from .oracle import Case, Violation
from .reference import SPLITS, Reference, words_of

_NAMES = (
    "book.txt", "train.txt", "test.txt", "valid.txt", "Val.txt", "TEST.txt", "dev-1.txt", "my_train_part.txt",
    "validation/a.txt", "test/a.txt",
    "heldout.txt", "eval.txt", "testing.txt", "a.md", "b.gz", "c.txt.gz", "d.txt.xz", ".hidden.txt", "sub/e.txt",
    "sub/train.txt", "caf\u00e9.txt",
    "\udcff.txt", "x y.txt", "test.md", "latest.txt", "contest.txt", "t" * 240 + ".txt", "a\nb.txt", "train/test.txt",
)  # fmt: skip
#: names of files that are held out, beyond doubt, where another file is there for training.
_HELD_OUT = ("test.txt", "TEST.txt", "valid.txt", "test/a.txt", "validation/a.txt")


def targets(reference: Reference) -> dict:
    """The targets over these unharmed texts."""
    return {"data": lambda rng, folder: data_case(reference, rng, folder), "caches": lambda rng,
            folder: cache_case(reference, rng, folder)}


def data_case(reference: Reference, rng: random.Random, folder: Path) -> Case:
    """A file of text, rows or columns, or a folder of files."""
    make = rng.choice((_text, _text, _rows, _rows, _columns, _packed, _folder, _folder))
    return make(reference, rng, folder)


def _read(reference: Reference, source: Path, folder: Path) -> dict[str, str]:
    """The text of every split."""
    streams = {split: load_tokens(str(source), split, reference.words, cache_dir=folder / "cache",
                                  num_proc=1) for split in SPLITS}
    return {split: reference.words.decode(stream.tokens) for split, stream in streams.items()}


def _same_letters(texts: dict[str, str], expected: str, what: str) -> str:
    """Nothing of the text was lost or made up, blanks aside."""
    found = Counter("".join(texts.values()))
    wanted = Counter(expected.removeprefix("\ufeff"))
    differing = {c: found[c] - wanted[c] for c in found.keys() | wanted.keys() if not c.isspace() and found[c] != wanted[c]}
    if differing:
        raise Violation("changed result", f"{what}: characters too many or too few: {str(differing)[:200]}")
    return "equal"


# ---------------------------------------------------------------------------------------------------- one file


def _text(reference: Reference, rng: random.Random, folder: Path) -> Case:
    path = folder / "book.txt"
    text = words_of(rng.choice((1, 3, 25, 60)), rng.randrange(9), rng.choice((1, 8)))
    style = rng.choice(("lines", "lines", "one line", "CR", "CRLF", "blank lines", "no blanks", "BOM", "utf-16", "latin-1"))
    text = {"one line": text.replace("\n", " "), "CR": text.replace("\n", "\r"), "CRLF": text.replace("\n", "\r\n"),
            "BOM": "\ufeff" + text,
            "blank lines": text.replace("\n", "\n\n\n"), "no blanks": text.replace(" ", "").replace("\n", "")}.get(style,
                                                                                                                   text)
    path.write_bytes(text.encode("utf-16" if style == "utf-16" else "utf-8") + b"\xe9\n" * (style == "latin-1"))
    what = style
    if rng.random() < 0.7:
        what += ", " + _harm(path, rng, files.PLACES_OF_BOUNDED_SIZE)

    def judge(texts: dict[str, str]) -> str:
        return _same_letters(texts, path.read_bytes().decode("utf-8"), "text")

    return Case(f"text, {what}", lambda: _read(reference, path, folder), judge, ("book.txt",))


def _rows(reference: Reference, rng: random.Random, folder: Path) -> Case:
    path = folder / "rows.jsonl"
    lines = (reference.root / "rows.jsonl").read_bytes().splitlines(keepends=True)
    if rng.random() < 0.5:
        at = rng.randrange(len(lines))
        text, what = documents.harm_json(json.loads(lines[at]), rng)
        lines[at] = documents.to_bytes(text, rng) + b"\n"
        what = f"line {at + 1}: {what}"
        path.write_bytes(b"".join(lines))
    else:
        sep = rng.choice((b"", b"\n", b"\r\n", b"  \n"))
        path.write_bytes(b"".join(line + sep for line in lines))
        what = f"{sep!r} after every line, {_harm(path, rng, files.PLACES_OF_BOUNDED_SIZE)}"

    def judge(texts: dict[str, str]) -> str:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        expected = [json.loads(line)["text"] or "" for line in lines if line.strip()]
        return _same_letters(texts, "".join(expected), "rows")

    return Case(f"rows, {what}", lambda: _read(reference, path, folder), judge, ("rows.jsonl",))


def _columns(reference: Reference, rng: random.Random, folder: Path) -> Case:
    path = Path(shutil.copy(reference.root / "rows.parquet", folder / "rows.parquet"))
    what = _harm(path, rng, tuple(files.PLACES))
    return Case(f"columns, {what}", lambda: _read(reference, path, folder), lambda texts: "accepted", ("rows.parquet",))


def _packed(reference: Reference, rng: random.Random, folder: Path) -> Case:
    suffix, pack = rng.choice(((".gz", gzip.compress), (".xz", lzma.compress)))
    inner = rng.choice((".txt", ".txt", ".jsonl"))
    path = folder / f"book{inner}{suffix}"
    text = words_of(60, 3) if inner == ".txt" else (reference.root / "rows.jsonl").read_text()
    path.write_bytes(pack(text.encode()))
    what = _harm(path, rng, tuple(files.PLACES)) if rng.random() < 0.8 else "unharmed"

    def judge(texts: dict[str, str]) -> str:
        if inner == ".txt":
            with (gzip if suffix == ".gz" else lzma).open(io.BytesIO(path.read_bytes())) as file:
                return _same_letters(texts, file.read().decode(), "packed text")
        return "accepted"

    return Case(f"packed {path.name}, {what}", lambda: _read(reference, path, folder), judge, (path.name,))


def _harm(path: Path, rng: random.Random, places: tuple[str, ...]) -> str:
    if rng.random() < 0.2:
        return files.harm_place(path, rng, places)
    data, what = files.harm_bytes(path.read_bytes(), rng, b"other words\n" * 3)
    path.write_bytes(data)
    return what


# ---------------------------------------------------------------------------------------------------- a folder


def _folder(reference: Reference, rng: random.Random, folder: Path) -> Case:
    """Files of many names and kinds. Each line has a number of its own, so that a line in two splits is seen."""
    source = folder / "texts"
    source.mkdir()
    names = rng.sample(_NAMES, rng.choice((1, 2, 3, 4)))
    lines: dict[str, list[str]] = {}
    for number, name in enumerate(names):
        path = source / name
        path.parent.mkdir(exist_ok=True)
        text = "".join(f"word f{number}n{line}e\n" for line in range(40))
        packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, lambda data: data)
        path.write_bytes(packed(text.encode()))
        lines[name] = re.findall(r"f\d+n\d+e", text)
    if rng.random() < 0.4:
        lines |= {name: [] for name in _stray(source, rng)}
    what = ", ".join(map(repr, lines))[:300]

    def judge(texts: dict[str, str]) -> str:
        where: dict[str, set[str]] = {}
        for split, text in texts.items():
            for line in re.findall(r"f\d+n\d+e", text):
                where.setdefault(line, set()).add(split)
        if twice := [line for line, splits in where.items() if len(splits) > 1]:
            raise Violation("changed result", f"{twice[:3]} in {[sorted(where[line]) for line in twice[:3]]}")
        for name in _HELD_OUT:
            seen = {split for line in lines.get(name, ()) for split in where.get(line, ())}
            if len(lines) > 1 and "train" in seen and not set(lines) <= set(_HELD_OUT):
                raise Violation("changed result", f"{name} beside {what} is in {sorted(seen)}")
        whole = {name: sum(line in where for line in own) for name, own in lines.items()}
        if cut := [name for name, count in whole.items() if 0 < count < len(lines[name])]:
            raise Violation("changed result", f"lines of {cut[:3]} are in no split")
        return "accepted"

    says = ("texts", *(Path(name).name for name in names))
    return Case(f"folder of {what}", lambda: _read(reference, source, folder), judge, says)


_LINKS = {"loop.txt": "loop.txt", "dangling.txt": "nowhere", "here": ".", "up": "..", "zero.txt": "/dev/zero"}
_STRAY = (*_LINKS, "pipe.txt", "empty.txt", "linked", "folder.txt", "bad.txt")


def _stray(source: Path, rng: random.Random) -> list[str]:
    """What folders hold beside texts."""
    kind = rng.choice(_STRAY)
    path = source / kind
    if kind == "pipe.txt":
        os.mkfifo(path)
    elif kind == "linked":
        (source.parent / "elsewhere").mkdir()
        (source.parent / "elsewhere" / "linked.txt").write_text("".join(f"word f99n{line}e\n" for line in range(40)))
        path.symlink_to(source.parent / "elsewhere")
    elif kind == "folder.txt":
        path.mkdir()
    elif kind in ("empty.txt", "bad.txt"):
        path.write_bytes(b"\xff\xfe\x00" * (kind == "bad.txt"))
    else:
        path.symlink_to(_LINKS[kind])
    return [kind]


# ---------------------------------------------------------------------------------------------------- caches


def cache_case(reference: Reference, rng: random.Random, folder: Path) -> Case:
    """A cache with one harmed file: what comes of it is rebuilt, or the unharmed one."""
    cache = Path(shutil.copytree(reference.root / "tokens", folder / "cache", symlinks=True))
    everything = sorted(path for path in cache.rglob("*") if path != cache)
    split, source = rng.choice(SPLITS), str(reference.root / "text.txt")
    for_tokenizer = rng.random() < 0.2
    kind = "tokenizers" if for_tokenizer else "tokens"
    own = [path for path in everything if path.relative_to(cache).parts[0] == kind]
    victim = rng.choice(own or everything)
    what = _harm_cache(victim, rng)

    def call() -> list[int]:
        if for_tokenizer:
            return load_tokenizer(source, 300, cache_dir=cache).model_proto
        return load_tokens(source, split, reference.words, cache_dir=cache, num_proc=1).tokens.tolist()

    def judge(found) -> str:
        expected = reference.cached_tokenizer if for_tokenizer else reference.tokens[split]
        if found != expected:
            raise Violation("changed result", f"{split}: {len(found)} tokens or bytes instead of these {len(expected)}")
        if call() != expected:
            raise Violation("changed result", "at the second reading")
        return "equal"

    return Case(f"{victim.relative_to(cache)}, {what}", call, judge, (victim.name, "cache"))


def _harm_cache(victim: Path, rng: random.Random) -> str:
    if victim.is_dir() or rng.random() < 0.2:
        return files.harm_place(victim, rng, files.PLACES_OF_BOUNDED_SIZE)
    data = victim.read_bytes()
    if victim.suffix == ".json" and rng.random() < 0.7:
        text, what = documents.harm_json(json.loads(data), rng)
        harmed = documents.to_bytes(text, rng)
    else:
        harmed, what = files.harm_bytes(data, rng, b"\1\0" * 300)
    victim.write_bytes(harmed)
    return what
