"""The data files of a folder: those of each split, and those that are left aside, with the reason."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from hbll_seq.data.text_files import KINDS, PACKINGS, kind_of
from hbll_seq.utils.reading import quote, shorten

_WORDS = {
    "train": "train(?:ing)?",
    "validation": "valid(?:ation)?|val|dev|eval(?:uation)?|h[eo]ld[ ._-]?out",
    "test": "test(?:ing)?",
}
_ANY_WORD = "|".join(f"(?P<{split}>{words})" for split, words in _WORDS.items())
# A split's word stands between characters that are no letters, and not before a blank: "test of time" is a title.
_IN_NAME = re.compile(rf"(?<![^\W\d_])(?:{_ANY_WORD})[ _.-]?(?:set|data)?(?=$|[\d_]|[^\w\s])", re.IGNORECASE)
_WHOLE = re.compile(rf"(?:{_ANY_WORD})[ _.-]?(?:set|data)?", re.IGNORECASE)
_WIKITEXT_CONFIG = re.compile(r"wikitext-(2|103)(-raw)?-v1")


class Folder(NamedTuple):
    """kind: of its files. splits: the files of each. aside: names of what is not read, by the reason. is_wikitext: it has
    WikiText's layout, whose rows are lines."""

    kind: str
    splits: dict[str, list[Path]]
    aside: dict[str, list[str]]
    is_wikitext: bool


def split_named(word: str) -> str | None:
    """The split that a word means, whatever its case: 'val', 'dev', 'eval' and 'heldout' are validation."""
    match = _WHOLE.fullmatch(word)
    return match.lastgroup if match else None


def find_folder(folder: Path) -> Folder:
    """Finds the data files of a folder and of those in it, and which split each belongs to.

    The name of a file says its split, or the folders that it lies in. Files that name none are training text; beside files
    that name 'train' and others that name another split it would be a guess, and is refused.
    Raises ValueError: no data files, several kinds, a name with two splits, files that belong to no split.
    """
    files, aside = _without_copies(*_walk(folder))
    kinds = sorted({kind_of(path)[0] for path in files})
    if len(kinds) != 1:
        found = f"{' and '.join(kinds)} files" if files else f"no {'/'.join(KINDS)} file"
        raise ValueError(f"data folder {quote(str(folder))} holds {found}; give a folder with files of one of these kinds")
    configs = sorted({p.relative_to(folder).parts[0] for p in files if len(p.relative_to(folder).parts) > 1})
    if len(configs) > 1 and all(_WIKITEXT_CONFIG.fullmatch(name) for name in configs):
        raise ValueError(f"data folder {quote(str(folder))} holds several data sets; give one of its folders {configs}")
    named: dict[str, list[Path]] = {}
    unnamed = []
    for path in files:
        split = _split_of(path.relative_to(folder), folder)
        (named.setdefault(split, []) if split else unnamed).append(path)
    is_wikitext = any(_WIKITEXT_CONFIG.fullmatch(p.name) for p in (folder, *(f.parent for f in files)))
    if unnamed and (is_wikitext or ("train" in named and len(named) > 1)):
        raise ValueError(
            f"data folder {quote(str(folder))} names the splits {', '.join(sorted(named))}, but the file "
            f"{shorten(quote(unnamed[0].name), 100)} belongs to none ({len(unnamed)} such files); "
            "put 'train', 'validation' or 'test' into its name or move it"
        )
    if unnamed:
        named["train"] = sorted(named.get("train", []) + unnamed)
    return Folder(kinds[0], named, aside, is_wikitext)


def _split_of(path: Path, folder: Path) -> str | None:
    *parents, name = path.parts
    while os.path.splitext(name)[1].lower() in (*KINDS, *PACKINGS) and kind_of(name):
        name = os.path.splitext(name)[0]
    splits = {match.lastgroup for match in _IN_NAME.finditer(name)} or {split_named(part) for part in parents} - {None}
    if len(splits) > 1:
        raise ValueError(
            f"data folder {shorten(quote(str(folder)), 150)}: {shorten(quote(str(path)), 150)} names several splits, "
            f"{' and '.join(sorted(splits))}; rename it so that it names one"
        )
    return next(iter(splits), None)


def _walk(root: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """The data files below a folder, sorted, and what is left aside. Linked folders are read, each folder once."""
    files: list[Path] = []
    aside: dict[str, list[str]] = {}
    seen: set[tuple[int, int]] = {_identity(parent) for parent in root.resolve().parents}  # a link up leads back here
    pending, links = [root], []
    while pending or links:
        here = pending.pop() if pending else links.pop(0)  # a folder's own place counts before links to it
        try:
            identity = _identity(here)
            if identity in seen:
                aside.setdefault("folders that are read already", []).append(str(here.relative_to(root)))
                continue
            seen.add(identity)
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            if here == root:
                raise ValueError(f"cannot read data folder {quote(str(root))}: {error.strerror}") from error
            aside.setdefault("unreadable folders", []).append(str(here.relative_to(root)))
            continue
        for entry in entries:
            reason = _reason_aside(entry)
            if reason:
                aside.setdefault(reason, []).append(str((here / entry.name).relative_to(root)))
            elif not entry.is_dir():
                files.append(here / entry.name)
            else:
                (links if entry.is_symlink() else pending).append(here / entry.name)
    return sorted(files), aside


def _identity(folder: Path) -> tuple[int, int]:
    info = folder.stat()
    return info.st_dev, info.st_ino


def _reason_aside(entry: os.DirEntry[str]) -> str | None:
    """Why a folder's entry is not read; None when it is."""
    if entry.name.startswith("."):
        return "hidden"
    try:
        if entry.is_dir():
            return None
        if not entry.is_file():
            return "broken links" if entry.is_symlink() and not os.path.exists(entry.path) else "neither files nor folders"
        return None if kind_of(entry.name) else "other endings"
    except OSError:  # a link to itself
        return "broken links"


def _without_copies(files: list[Path], aside: dict[str, list[str]]) -> tuple[list[Path], dict[str, list[str]]]:
    """Keeps one of a file and its packed copies: the file itself if it is there."""
    chosen: dict[Path, Path] = {}
    for path in sorted(files, key=lambda path: kind_of(path)[1]):
        plain = path.with_suffix("") if kind_of(path)[1] else path
        if chosen.setdefault(plain, path) != path:
            aside.setdefault("packed copies of what is read", []).append(path.name)
    return sorted(chosen.values()), aside
