"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

#: start of the name under which something is written before it is whole.
ASIDE = ".aside-"


def fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened, nor a file that is open for reading be synced
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a file whole or not at all: aside, flushed, renamed.

    Raises:
        OSError: the folder is not writable or the disk is full; an older file of that name is untouched.
    """
    path = Path(path)
    aside = path.with_name(f"{ASIDE}{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(aside, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def atomic_folder(folder: Path, last: str, stale: str) -> Iterator[Path]:
    """A place to write files, which are moved to ``folder`` when the block ends without an error.

    A new folder appears whole, by one rename. In an existing one each file is replaced by a rename; the place to write
    is then inside it, the same file system even where the folder is a mount point. Other files there are left alone.

    Args:
        folder: made where it is missing, with its parents.
        last: name of the file that is moved last.
        stale: name of a file that is removed from an existing folder when the block does not write it.

    Raises:
        ValueError: the folder cannot be written (an OSError or SafetensorError inside the block included).
    """
    made: list[Path] = []
    moved: list[str] = []
    name = f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    exists = folder.is_dir()
    aside = folder / name if exists else folder.absolute().parent / name
    try:
        if not exists:
            if folder.exists():
                raise NotADirectoryError("it is a file")
            made = [parent for parent in aside.parents if not parent.exists()]
        for parent in reversed(made):
            parent.mkdir(exist_ok=True)
        aside.mkdir()  # not mkdtemp, whose mode 0700 the finished folder would keep
        yield aside
        written = sorted(aside.iterdir(), key=lambda path: path.name == last)
        if blocked := [path.name for path in written if (folder / path.name).is_dir()]:
            raise IsADirectoryError(f"its {blocked[0]} is a folder")
        for path in written:
            path.chmod(aside.stat().st_mode & 0o666)  # safetensors makes private files; the folder has the umask
            fsync(path)
        if exists:
            for path in written:
                os.replace(path, folder / path.name)
                moved.append(path.name)
            if stale not in moved:
                (folder / stale).unlink(missing_ok=True)
            aside.rmdir()
            fsync(folder)
        else:
            os.rename(aside, folder)
            moved = [path.name for path in written]
            fsync(folder.absolute().parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            state = f"Already replaced there: {', '.join(moved)}" if moved else "Nothing was changed there"
            raise ValueError(
                f"cannot write to {os.fspath(folder)!r}: {error}. {state}; choose a folder that you may write to, on a "
                "disk with room"
            ) from error
        raise
