"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from hbll_seq.utils.console import say
from hbll_seq.utils.reading import quote, shorten

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

#: start of the name under which something is written before it is whole.
ASIDE = ".aside-"
_HALF_WRITTEN = re.compile(re.escape(ASIDE) + r".+\.[0-9a-f]{8}")  # a file of atomic_write
#: folder inside a folder: the version that counts, while another one is being put in its place.
PINNED = ".previous-version"
#: seconds that a save waits for another one of the same folder.
PATIENCE = 60.0


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
def atomic_folder(folder: Path, names: Sequence[str], keep: Collection[str] = ()) -> Iterator[Path]:
    """A place to write the files of a new version, which takes the old one's place when the block ends without an error.

    A new folder appears whole, by one rename. In an existing one the old version is first pinned: hard links to its files
    (copies where there can be none) are put into the folder ``PINNED`` inside, which is what readers look into
    (:func:`whole_folder`) while the files themselves are replaced one by one. The new version counts from the moment at
    which the pin is taken away, by one rename. A save that is killed or fails leaves the old version, and the next one first
    puts its files back. Other files in the folder are left alone. Two saves at once wait for each other, where the file
    system has locks.

    Args:
        folder: made where it is missing, with its parents.
        names: every file that a version may have, in the order in which they are replaced. Give the list of sums first, so
            that a mixture never fits it, and last the file without which a folder is no version. Those that the block does
            not write are removed.
        keep: of ``names``, those that are the user's: neither replaced nor removed.

    Raises:
        ValueError: the folder cannot be written (an OSError or SafetensorError inside the block included).
    """
    made: list[Path] = []
    aside = None
    with ExitStack() as locks:
        try:
            if os.path.lexists(folder):  # one look: another save may make it before the next
                if not folder.is_dir():
                    raise NotADirectoryError("it is a file")
                locks.enter_context(_locked(folder))
                _roll_back(folder, names, keep)
                aside = _make_aside(folder, folder, locks)
            else:
                made += [parent for parent in folder.absolute().parents if not parent.exists()]
                aside = _make_beside(folder, made, locks)
            yield aside
            for path in aside.iterdir():
                path.chmod(aside.stat().st_mode & 0o666)  # safetensors makes private files; the folder has the umask
                fsync(path)
            fsync(aside)
            if aside.parent != folder and _becomes(aside, folder):
                _flush_names(folder.absolute().parent)
            else:
                if aside.parent != folder:  # another save has made it meanwhile
                    locks.enter_context(_locked(folder))
                    _roll_back(folder, names, keep)
                    os.rename(aside, folder / aside.name)
                    aside = folder / aside.name
                _replace(folder, aside, names, keep)
        except BaseException as error:
            state = _clean_up(folder, aside, made, names, keep)
            if isinstance(error, (OSError, SafetensorError)):
                raise ValueError(
                    f"cannot write to {quote(os.fspath(folder))}: {shorten(error, 120)}. {state}; choose a folder that you "
                    "may write to, on a disk with room"
                ) from error
            raise


def whole_folder(folder: Path) -> Path:
    """The folder to read from: ``folder`` itself, or the old version inside it while a save replaces it or after a save was
    cut short."""
    pinned = folder / PINNED
    return pinned if pinned.is_dir() else folder


def roll_back(folder: Path, names: Sequence[str], keep: Collection[str] = ()) -> None:
    """Put the files of the version that counts back in their places, after a save that was cut short; else do nothing.

    Code that removes or replaces such files by other means must call this first, or they come back.

    Args:
        folder, names, keep: as :func:`atomic_folder` has them.

    Raises:
        OSError: a file cannot be put back; the old version still counts.
    """
    if (folder / PINNED).is_dir():
        with _locked(folder):
            _roll_back(folder, names, keep)


def _roll_back(folder: Path, names: Sequence[str], keep: Collection[str]) -> None:
    pinned = folder / PINNED
    if not pinned.is_dir():
        return
    with ExitStack() as locks:
        aside = _make_aside(folder, folder, locks)
        try:
            for name in names:
                old, now = pinned / name, folder / name
                if name in keep:
                    continue
                if not old.is_file():
                    now.unlink(missing_ok=True)
                elif not now.is_file() or not os.path.samefile(old, now):
                    _link_or_copy(old, aside / name)
                    os.replace(aside / name, now)
            fsync(folder)
            os.rename(pinned, aside / PINNED)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    _flush_names(folder)


def _becomes(aside: Path, folder: Path) -> bool:
    """Make ``aside`` the folder, by one rename; gives whether it is, and not where another save has made the folder. Only the
    rename can tell: the other one may come between a look and it."""
    if folder.is_dir():  # an empty one too, which the rename would take the place of
        return False
    try:
        os.rename(aside, folder)
    except OSError:
        if folder.is_dir():
            return False
        raise
    return True


def _replace(folder: Path, aside: Path, names: Sequence[str], keep: Collection[str]) -> None:
    """The files of ``aside`` in place of those of ``folder``."""
    for name in names:
        if name not in keep and (folder / name).exists() and not (folder / name).is_file():
            raise IsADirectoryError(f"its {name} is {'a folder' if (folder / name).is_dir() else 'no regular file'}")
    (aside / PINNED).mkdir()
    for name in names:
        if (folder / name).is_file():
            _link_or_copy(folder / name, aside / PINNED / name)
    fsync(aside / PINNED)
    os.rename(aside / PINNED, folder / PINNED)
    fsync(folder)
    for name in names:
        if (aside / name).exists():
            os.replace(aside / name, folder / name)
        elif name not in keep:
            (folder / name).unlink(missing_ok=True)
    fsync(folder)
    os.rename(folder / PINNED, aside / PINNED)  # from here on the new version counts
    _flush_names(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _clean_up(folder: Path, aside: Path | None, made: list[Path], names: Sequence[str], keep: Collection[str]) -> str:
    """Undo a failed save; returns in words what the folder now holds."""
    state = "Nothing was changed there"
    if aside is not None:
        if aside.parent == folder:  # which is held then
            try:
                _roll_back(folder, names, keep)
            except OSError:
                state = f"What was there still loads, from {PINNED} inside it"
        shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):
        for parent in made:
            parent.rmdir()  # fails where something is in it
    return state


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # a file system without hard links, or a link to another one
        shutil.copy2(source, target)
        fsync(target)


def _flush_names(folder: Path) -> None:
    """Flush a folder after the save has taken effect: a failure is reported, and no longer fails the save."""
    try:
        fsync(folder)
    except OSError as error:
        say(f"hbll_seq: {folder} is saved, but could not be flushed ({shorten(error)}): a power cut may undo it")


# ----------------------------------------------------------------------------------- folders to write in


def _make_aside(where: Path, folder: Path, locks: ExitStack) -> Path:
    """A new folder in ``where`` to write files of ``folder`` in, held so that no other save takes it for a dead one's."""
    _sweep(where, folder)
    aside = where / f"{_start_of_name(folder)}{uuid.uuid4().hex[:8]}.tmp"
    aside.mkdir()  # not mkdtemp, whose mode 0700 the finished folder would keep
    try:
        locks.enter_context(_locked(aside))
    except BaseException:
        aside.rmdir()
        raise
    return aside


def _make_beside(folder: Path, made: list[Path], locks: ExitStack) -> Path:
    """A new folder beside ``folder``, which does not exist, in the parents ``made`` for it."""
    for parent in reversed(made):
        parent.mkdir(exist_ok=True)
    parent = folder.absolute().parent
    with _locked(parent):  # until the new one is held
        return _make_aside(parent, folder, locks)


def sweep(folder: Path) -> None:
    """Remove what killed calls of :func:`atomic_write` and :func:`atomic_folder` left in ``folder``; what cannot be removed
    stays. Only for the owner of a folder: another process may be writing there."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if _HALF_WRITTEN.fullmatch(path.name) and path.is_file():
                path.unlink()
            elif _is_version(path, folder):
                shutil.rmtree(path, ignore_errors=True)


def _sweep(where: Path, folder: Path) -> None:
    """Remove what killed saves of ``folder`` left in ``where``; a running save holds its files."""
    for path in list(where.iterdir()):
        if _is_version(path, folder):
            with suppress(OSError), _locked(path, seconds=0) as is_held:
                if is_held:
                    shutil.rmtree(path, ignore_errors=True)


def _is_version(path: Path, folder: Path) -> bool:
    """Whether a version of ``folder`` was being written there."""
    pattern = re.escape(_start_of_name(folder)) + r"[0-9a-f]{8}\.tmp"
    return re.fullmatch(pattern, path.name) is not None and path.is_dir() and not path.is_symlink()


def _start_of_name(folder: Path) -> str:
    return f".{folder.absolute().name[:60]}."  # at most 240 of the 255 bytes that a name may have


@contextmanager
def _locked(folder: Path, seconds: float | None = None) -> Iterator[bool]:
    """Hold a folder against other saves, those of this process too; gives whether the file system has such locks.

    Args:
        folder: the folder.
        seconds: how long another save is waited for; None: ``PATIENCE``.

    Raises:
        TimeoutError: another save holds it all the time.
        OSError: it cannot be opened.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    is_held = False
    try:
        is_held = _wait_for(handle, PATIENCE if seconds is None else seconds)
        yield is_held
    finally:
        if is_held:
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone does not do it where a forked process has the handle too
        os.close(handle)


def _wait_for(handle: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                raise TimeoutError(f"another process has been saving there for {seconds:g} seconds") from None
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return False
