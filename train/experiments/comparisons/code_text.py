"""A text where depth matters: the Python source of SymPy 1.14.0 (BSD 3-clause licence), which is not part of this library.

It is taken from the installed package where that is this very version, else from the wheel that ``pip download`` fetches. The
files are divided by whole files into training, validation and test text, and written as three files of JSON lines with
SymPy's licence beside them. One stored SHA-256 over the three says that they are what every earlier run read: a changed
install, another wheel or a damaged cache is not used.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from hbll_seq.data.tokens import cache_folder
from hbll_seq.utils.atomic import atomic_write
from hbll_seq.utils.console import say
from hbll_seq.utils.reading import shorten

PACKAGE, VERSION = "sympy", "1.14.0"
LICENCE = "LICENSE"
SPLITS = ("train", "validation", "test")
#: pieces of its tokenizer, which is trained on the training files
VOCAB_SIZE = 2048
#: of the three files of JSON lines, one after the other in the order of SPLITS
SHA256 = "184bb31e351f667e14c31e9c5b130f7a3e254dd663b001ff5ac8c83f073cdf0b"


def code_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``, made where it is not there yet.

    Args:
        cache_dir: where it is kept; default: where the library keeps tokens, see ``load_tokens``.

    Raises:
        ValueError: neither the installed package nor the index has the text, or the folder cannot be written.
    """
    folder = cache_folder(cache_dir).expanduser() / f"code-{PACKAGE}-{VERSION}"
    if _is_right({split: _read(folder / f"{split}.jsonl") for split in SPLITS}):
        return folder
    parts, licence = _found()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / LICENCE, licence)
        for split, lines in parts.items():
            atomic_write(folder / f"{split}.jsonl", lines)
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error.strerror}; give another --cache") from error
    return folder


def split_of(name: str) -> str:
    """Which split a file belongs to: by a hash of its name, 90, 5 and 5 of 100."""
    place = int(_hash(name), 16) % 100
    return "train" if place < 90 else "validation" if place < 95 else "test"


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def divided(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """By split the lines of JSON, one a file; files without text are left out.

    The order is that of the names' hashes, so that the beginning of a split, which is what an evaluation reads, is a sample
    of the whole and not its first folders.

    Args:
        files: the bytes of each file, UTF-8, by its name within the package with "/" between folders.
    """
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, data in sorted(files.items(), key=lambda item: _hash(item[0])):
        if text := data.decode():
            lines[split_of(name)].append(json.dumps({"name": name, "text": text}) + "\n")
    return {split: "".join(found).encode() for split, found in lines.items()}


def digest_of(parts: Mapping[str, bytes]) -> str:
    """What is compared with ``SHA256``."""
    return hashlib.sha256(b"".join(parts[split] for split in SPLITS)).hexdigest()


def _is_right(parts: Mapping[str, bytes | None]) -> bool:
    return None not in parts.values() and digest_of(parts) == SHA256


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _found() -> tuple[dict[str, bytes], bytes]:
    """The text by split and the licence, of the first source that has the right ones."""
    for source in (_installed, _downloaded):
        files = source()
        parts = divided({name: data for name, data in files.items() if _is_code(name)})
        licence = next((data for name, data in files.items() if name.endswith(f"/{LICENCE}")), None)
        if _is_right(parts) and licence is not None:
            return parts, licence
    raise ValueError(f"what the package index calls {PACKAGE} {VERSION} is not the text that the comparisons read: its "
                     f"SHA-256 is {digest_of(parts)}, not {SHA256}; take another index")  # fmt: skip


def _is_code(name: str) -> bool:
    return name.startswith(f"{PACKAGE}/") and name.endswith(".py")


def _is_wanted(name: str) -> bool:
    return _is_code(name) or (".dist-info/" in name and name.endswith(f"/{LICENCE}"))


def _installed() -> dict[str, bytes]:
    """Files of the installed package by name; none where it is not installed, or another version."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
        if package.version != VERSION:
            return {}
        return {file.as_posix(): file.read_binary() for file in package.files or () if _is_wanted(file.as_posix())}
    except (importlib.metadata.PackageNotFoundError, OSError):  # OSError: an install with a file missing
        return {}


def _downloaded() -> dict[str, bytes]:
    """Files of the wheel that pip fetches, by name. Raises ValueError where it cannot."""
    wanted = f"{PACKAGE}=={VERSION}"
    say(f"downloading {wanted} (BSD licence), whose source is the text")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
        done = subprocess.run([*command, wanted], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = shorten(done.stderr.strip() or "no wheel came", 200)
            raise ValueError(f"cannot download {wanted}: {reason}; install that version by pip, or give other --data")
        with zipfile.ZipFile(wheels[0]) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if _is_wanted(name)}
