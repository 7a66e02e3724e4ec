"""The lock of a run folder: one run at a time, and the second is told who is first."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import kill_and_resume as kr
import pytest
from forked import pair

from hbll_seq.training import run_lock
from hbll_seq.training.run_lock import LOCK, FolderLock
from hbll_seq.training.run_record import is_finished

pytestmark = pytest.mark.usefixtures("blank_figures")

lm = kr.load_script()


@pytest.fixture(scope="module")
def holder(lm_options, tmp_path_factory):
    """A run in a process of its own, held in the middle: it would take a core from the other tests."""
    folder = tmp_path_factory.mktemp("holder") / "held"
    options = ["--max-steps", "100000", "--save-every", "5", "--eval-every", "0", "--output-dir", str(folder)]
    process = kr.start([*lm_options, *options], stdout=-3, stderr=-3)
    kr.wait_for_step(process, folder, 6)
    process.send_signal(signal.SIGSTOP)
    yield process, folder
    process.kill()
    process.wait()


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
def test_a_second_run_is_refused_with_the_name_of_the_first(holder, lm_options, tmp_path, capsys, more):
    process, folder = holder
    other_name = tmp_path / "link"
    other_name.symlink_to(folder)
    given = [] if "--resume" in more else lm_options
    for name in (folder, other_name):
        options = [*given, *more, "--output-dir", str(name)]
        kr.fails(options, capsys, "held by another run", f"process {process.pid} on ", "since")
    assert process.poll() is None and kr.lines(folder)


def test_a_dry_run_takes_no_lock(holder, lm_options):
    assert lm.main([*lm_options, "--dry-run", "--output-dir", str(holder[1])]) == 0
    assert holder[0].poll() is None


def test_the_lock_of_a_killed_run_is_no_hindrance(lm_options, tmp_path):
    folder = tmp_path / "run"
    kr.kill_at(6, [*lm_options, "--max-steps", "12", "--save-every", "2"], folder)
    assert (folder / LOCK).exists()  # nobody holds it now
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0
    assert is_finished(folder) and not (folder / LOCK).exists()


def test_two_processes_are_refused_together(lm_options, tmp_path):
    """The main one takes the lock; all of them end with the same words, and none waits for the others."""
    folder, script = tmp_path / "run", tmp_path / "told.py"
    folder.mkdir()
    lock = FolderLock(folder)
    script.write_text(f"""\
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import kill_and_resume as kr
script = kr.load_script()
start = script.start
def told(*arguments):
    try:
        return start(*arguments)
    except ValueError as error:
        sys.stderr.write(f"rank {{os.environ['RANK']}} is told: {{error}}\\n")
        raise
script.start = told
code = script.main(sys.argv[1:])
sys.stderr.write(f"rank {{os.environ['RANK']}} ends with {{code}}\\n")
sys.exit(code)
""")
    codes, said = pair([str(script), *lm_options, "--output-dir", str(folder)], kr.environment_of_scripts())
    lock.release()
    assert codes == [2, 2] and "".join(said).count("\nerror: ") + "".join(said).startswith("error: ") == 1  # one speaks
    for rank in (0, 1):
        assert f"rank {rank} is told: output_dir='{folder}' is held by another run (process {os.getpid()} " in said[rank]
        assert f"rank {rank} ends with 2" in said[rank]
    assert os.listdir(folder) == []


def test_a_folder_that_only_the_lock_made_goes_with_it(tmp_path):
    lock = FolderLock(tmp_path / "a" / "b")
    with pytest.raises(ValueError, match=f"process {os.getpid()} on "):
        FolderLock(tmp_path / "a" / "b")
    lock.release()
    assert os.listdir(tmp_path) == []
    (tmp_path / "a" / "b").mkdir(parents=True)
    FolderLock(tmp_path / "a" / "b").release()
    assert (tmp_path / "a" / "b").is_dir() and os.listdir(tmp_path / "a" / "b") == []


def test_a_lock_that_was_let_go_while_another_took_it_is_taken_anew(tmp_path, monkeypatch):
    """The first run removes the file that the second has opened but not locked yet."""
    first, flock = FolderLock(tmp_path), run_lock.fcntl.flock

    def late(handle, how):
        if first._handle is not None:
            first.release()
        flock(handle, how)

    monkeypatch.setattr(run_lock.fcntl, "flock", late)
    second = FolderLock(tmp_path)
    with pytest.raises(ValueError, match="held by another run"):
        FolderLock(tmp_path)
    second.release()


@pytest.mark.parametrize("content", ["mine", "{}", "pipe", "folder"])
def test_a_foreign_file_of_the_locks_name_stays(tmp_path, content):
    path = tmp_path / LOCK
    {"pipe": os.mkfifo, "folder": os.mkdir}.get(content, lambda path: path.write_text(content))(path)
    with pytest.raises(ValueError, match="not the lock of a run|cannot be written.*Is a directory"):
        FolderLock(tmp_path)
    assert path.exists() and (not path.is_file() or path.read_text() == content)


def test_where_the_file_system_has_no_locks_the_description_decides(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", no_locks)
    held = FolderLock(tmp_path)
    assert "has no locks" in capsys.readouterr().err
    with pytest.raises(ValueError, match="held by another run.*or remove"):
        FolderLock(tmp_path)
    description = json.loads((tmp_path / LOCK).read_text())
    held.release()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for change in ({"host": "elsewhere"}, {"process": "x"}, {"process": 10**30}):
        (tmp_path / LOCK).write_text(json.dumps({**description, **change}))
        with pytest.raises(ValueError, match="held by another run"):
            FolderLock(tmp_path)
    (tmp_path / LOCK).write_text(json.dumps({**description, "process": ended.pid}))
    FolderLock(tmp_path).release()  # it has ended


def test_a_full_disk_does_not_keep_the_lock_from_holding(tmp_path):
    """A limit on the size of files stands in for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        lock = FolderLock(tmp_path)
        with pytest.raises(ValueError, match="has not said its name"):
            FolderLock(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lock.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("target", ["nowhere", "nowhere/deeper", "link"])  # the last one leads to itself
def test_a_link_to_nothing_is_refused_and_not_tried_for_ever(lm_options, tmp_path, capsys, target):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / target)
    kr.fails([*lm_options, "--output-dir", str(link)], capsys, "output_dir=", "link to nothing", "another --output-dir")
    kr.fails([*lm_options, "--output-dir", str(link / "run")], capsys, "link to nothing")
    with pytest.raises(ValueError, match="link to nothing; remove the link"):
        FolderLock(link)
    assert os.listdir(tmp_path) == ["link"]
