"""Every file operation of a checkpoint's save fails once: older checkpoints are intact, the run says why it ends."""

import contextlib
import errno
import os
import sys

import pytest
import torch

from hbll_seq.training import checkpoint as ck
from hbll_seq.training.failures import remedy_for
from hbll_seq.utils import atomic

WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "os.listdir"}


class Faults:
    """While armed, the n-th file operation below a folder fails: Python itself asks before each."""

    def __init__(self):
        self.below, self.left, self.error, self.seen = None, None, errno.ENOSPC, []
        sys.addaudithook(self.ask)

    def ask(self, event, arguments):
        if self.below is None or event not in WATCHED or not str(arguments[0]).startswith(self.below):
            return
        self.seen.append((event, str(arguments[0])))
        if self.left is not None:
            self.left -= 1
            if self.left < 0 and (self.left == -1 or self.persistent):
                raise OSError(self.error, os.strerror(self.error), str(arguments[0]))

    @contextlib.contextmanager
    def failing(self, folder, number, persistent=False, error=errno.ENOSPC):
        self.below, self.left, self.persistent, self.error, self.seen = str(folder), number, persistent, error, []
        try:
            yield self
        finally:
            self.below = None


FAULTS = Faults()


def groups(value):
    return {"model": {"a": torch.full((3, 2), value)}, "optimizer": {"a|m": torch.zeros(3, 2)}}


def saved(folder):
    ck.save_checkpoint(folder, 1, groups(1.0), {})
    ck.save_checkpoint(folder, 2, groups(2.0), {})
    return folder


def operations(tmp_path):
    with FAULTS.failing(saved(tmp_path / "count"), None) as faults:
        ck.save_checkpoint(tmp_path / "count", 3, groups(3.0), {}, keep=1)
    return list(faults.seen)


@pytest.mark.parametrize("persistent", [False, True])
def test_an_error_at_any_operation_leaves_the_older_checkpoints(tmp_path, persistent):
    expected = operations(tmp_path)
    renamed = [i for i, (event, path) in enumerate(expected) if event == "os.rename" and path.endswith(".aside-3")]
    assert len(expected) > 20 and len(renamed) == 1
    swallowed = []
    for number in range(len(expected)):
        folder = saved(tmp_path / str(number))
        with FAULTS.failing(folder, number, persistent):
            try:
                ck.save_checkpoint(folder, 3, groups(3.0), {}, keep=1)
                swallowed.append(number)
            except OSError as error:
                assert error.errno == errno.ENOSPC and remedy_for(error) == "make room"
        steps = ck.list_checkpoints(folder)
        assert steps == ck.sound_checkpoints(folder) and steps, expected[number]
        if number not in swallowed:
            assert {1, 2} <= set(steps), expected[number]
        else:
            assert 3 in steps, expected[number]
        ck.save_checkpoint(folder, 4, groups(4.0), {}, keep=1)
        assert os.listdir(folder) == ["step-00000004"], expected[number]  # what lay aside is swept away
    assert any(number > renamed[0] for number in swallowed)  # removing older ones ends no run
    harmless = {("os.mkdir", str(tmp_path / "count")), ("os.listdir", str(tmp_path / "count"))}  # it exists; nothing to sweep
    assert all(expected[number] in harmless or number > renamed[0] for number in swallowed)


@pytest.mark.parametrize("call", range(8))
def test_a_flush_that_fails_is_an_error(tmp_path, monkeypatch, call):
    folder, original, calls = saved(tmp_path / "run"), os.fsync, []

    def flush(handle):
        calls.append(handle)
        if len(calls) == call + 1:
            raise OSError(errno.EIO, "Input/output error")
        return original(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", flush)
        with pytest.raises(OSError) if call < 7 else contextlib.nullcontext():
            ck.save_checkpoint(folder, 3, groups(3.0), {}, keep=9)
    assert set(ck.sound_checkpoints(folder)) >= {1, 2} and len(calls) == min(call + 1, 7)


def test_older_checkpoints_that_cannot_be_removed_end_no_run(tmp_path, capsys):
    folder = saved(tmp_path / "run")
    renames = [i for i, (event, path) in enumerate(operations(tmp_path)) if event == "os.rename"]
    number = renames[-2]  # of the older of the two that are one too many
    with FAULTS.failing(folder, number, error=errno.EACCES):
        ck.save_checkpoint(folder, 3, groups(3.0), {}, keep=1)
    assert ck.list_checkpoints(folder) == [1, 2, 3] and "could not be removed" in capsys.readouterr().err


def test_what_a_killed_run_left_is_swept(tmp_path):
    """And nothing else, however alike it is called."""
    folder = tmp_path / ("run" * 30)  # of a name that is cut in those of its versions
    for name in (".aside-3", ".aside-old-2", f".{folder.name[:60]}.0123abcd.tmp", ".run.0123abcd.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("half")
    (folder / ".aside-settings.yaml.0123abcd").write_text("half")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    (folder / ".aside-4").symlink_to(tmp_path / "mine")
    kept = [".aside-4", ".aside-notes", ".hidden", ".run.0123abcd.tmp", "notes.txt"]
    for name in (".aside-notes", ".hidden", "notes.txt"):
        (folder / name).write_text("kept")
    for sweep in (ck.sweep, atomic.sweep):
        sweep(folder)
        sweep(tmp_path / "nowhere")
    assert sorted(os.listdir(folder)) == kept and (tmp_path / "mine" / "file").exists()


@pytest.mark.parametrize("number, word", [(errno.ENOSPC, "room"), (errno.EDQUOT, "room"), (errno.EACCES, "may write"),
                                          (errno.EROFS, "may write"), (errno.EIO, "disk")])
def test_the_remedy_is_that_of_the_error(number, word):
    assert word in remedy_for(OSError(number, "x"))
    assert "room" not in remedy_for(ValueError("x"))
