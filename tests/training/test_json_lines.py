"""The growing files of a run: whatever happened to them, good lines are kept and missing ones are told."""

import json
import os
import resource

import kill_and_resume as kr
import pytest

from hbll_seq.training import json_lines
from hbll_seq.training.json_lines import JsonLines

pytestmark = pytest.mark.usefixtures("blank_figures")

GOOD = [b'{"step": %d, "loss": %d.5}\n' % (step, step) for step in range(1, 9)]


def written(tmp_path, content):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.path.write_bytes(content)
    return log


def steps(log):
    return [row["step"] for row in log.rows()]


def test_a_cut_line_is_dropped_in_silence_and_the_rest_rewound(tmp_path, capsys):
    log = JsonLines(tmp_path / "m.jsonl")
    assert log.rows() == []
    values = [0.1, 1e-45, 16.637069702148438]
    for step, value in enumerate(values, start=1):
        log.append({"step": step, "loss": value})
    assert [row["loss"] for row in log.rows()] == values  # full precision
    with open(log.path, "ab") as file:
        file.write(b'{"step": 4, "lo')
    assert len(log.rows()) == 3
    log.rewind(2)
    assert log.path.read_text() == '{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 1e-45}\n'
    assert capsys.readouterr().err == "" and os.listdir(tmp_path) == ["m.jsonl"]


def test_a_last_line_that_lacks_its_end_alone_is_completed(tmp_path):
    log = written(tmp_path, b"".join(GOOD).rstrip(b"\n"))
    log.rewind(8)
    assert log.path.read_bytes() == b"".join(GOOD)


DAMAGES = {
    "flipped": (b'{"step": 4, "loss": 4.5}\n', b'{"step": 4, "loss"; 4.5}\n'),
    "no object": (b'{"step": 4, "loss": 4.5}\n', b"[4]\n"),
    "no step": (b'{"step": 4, "loss": 4.5}\n', b'{"stop": 4, "loss": 4.5}\n'),
    "step is a fraction": (b'"step": 4', b'"step": 4.0'),
    "step is true": (b'"step": 4', b'"step": true'),
    "step below zero": (b'"step": 4', b'"step": -4'),
    "no text": (b'"loss": 4.5', b'"loss": \xff\xfe'),
    "zeroed": (b'{"step": 4, "loss": 4.5}', b"\0" * 24),
    "deep": (b'"loss": 4.5', b'"loss": ' + b"[" * 100_000),
    "key twice": (b'"loss": 4.5', b'"loss": 4.5, "loss": 5.5'),
    "digits": (b'"step": 4', b'"step": ' + b"4" * 5000),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_one_damaged_line_costs_one_line(tmp_path, capsys, name):
    content = b"".join(GOOD).replace(*DAMAGES[name])
    log = written(tmp_path, content)
    assert steps(log) == [1, 2, 3, 5, 6, 7, 8]
    log.rewind(7)
    assert log.path.read_bytes() == b"".join(GOOD[:3] + GOOD[4:7])  # those after the damage too
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == content
    message = capsys.readouterr().err
    assert "1 damaged line, missing" in message and "metrics.jsonl.damaged-1" in message and len(message) < 500


def test_a_lost_line_end_is_one_damaged_line(tmp_path, capsys):
    log = written(tmp_path, b"".join(GOOD).replace(b"4.5}\n", b"4.5}"))
    log.rewind(8)
    assert steps(log) == [1, 2, 3, 6, 7, 8] and "1 damaged line" in capsys.readouterr().err


def test_no_damaged_file_is_ever_overwritten(tmp_path):
    log = written(tmp_path, GOOD[0] + b"x\n")
    log.rewind(1)
    log.path.write_bytes(GOOD[0] + b"y\n")
    log.rewind(1)
    found = [(tmp_path / f"metrics.jsonl.damaged-{number}").read_bytes()[-2:] for number in (1, 2)]
    assert found == [b"x\n", b"y\n"] and log.path.read_bytes() == GOOD[0]


def test_lines_twice_or_out_of_order_are_put_in_order_and_told(tmp_path, capsys):
    log = written(tmp_path, GOOD[0] + GOOD[2] + GOOD[1] + b'{"step": 3, "loss": 9.5}\n' + GOOD[3])
    log.rewind(8)
    assert log.rows() == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": 2.5}, {"step": 3, "loss": 9.5},
                          {"step": 4, "loss": 4.5}]
    assert "2 lines twice or out of order" in capsys.readouterr().err and (tmp_path / "metrics.jsonl.damaged-1").exists()


def test_what_is_not_finite_is_null(tmp_path, capsys):
    log = written(tmp_path, b'{"step": 1, "loss": NaN, "ce": [Infinity, -Infinity, 1e999]}\n')  # of an older version
    log.append({"step": 2, "loss": float("inf"), "node_losses": [float("nan"), 1.0]})
    log.rewind(2)
    texts = log.path.read_text().splitlines()
    assert [json.loads(text, parse_constant=pytest.fail) for text in texts] == [
        {"step": 1, "loss": None, "ce": [None, None, None]}, {"step": 2, "loss": None, "node_losses": [None, 1.0]}]
    assert capsys.readouterr().err == ""


def test_a_line_longer_than_any_is_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_LINE", 100)
    exact = b'{"step": 9, "x": "' + b"a" * 79 + b'"}\n'
    assert len(exact) == 100
    log = written(tmp_path, GOOD[0] + b'{"step": 2, "x": "' + b"a" * 1000 + b'"}\n' + GOOD[2] + exact + b"b" * 1000)
    assert steps(log) == [1, 3, 9]
    log.rewind(9)
    assert steps(log) == [1, 3, 9] and (tmp_path / "metrics.jsonl.damaged-1").stat().st_size > 2000


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/null")}[kind]()
    log = JsonLines(path)
    for attempt in (log.rows, lambda: log.rewind(1)):
        with pytest.raises(ValueError, match="metrics.jsonl.*regular file"):
            attempt()
    with pytest.raises((OSError, ValueError)):
        log.append({"step": 1})


def test_a_file_larger_than_any_run_writes_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with open(path, "wb") as file:
        file.truncate(json_lines.MAX_FILE + 1)
    for attempt in (JsonLines(path).rows, lambda: JsonLines(path).rewind(1)):
        with pytest.raises(ValueError, match="metrics.jsonl' has 1,073,741,825 bytes.*move it away"):
            attempt()
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_line_that_does_not_fit_is_taken_back(tmp_path):
    """A limit on the size of files stands in for the full disk."""
    log = JsonLines(tmp_path / "m.jsonl")
    log.append({"step": 1})
    whole = log.path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 3, before[1]))
    try:
        with pytest.raises(OSError, match="disk is full"):
            log.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log.path.read_bytes() == whole
    log.append({"step": 2})
    assert steps(log) == [1, 2]


def test_no_room_for_the_copy_leaves_the_damaged_file_alone(tmp_path):
    content = b"".join(GOOD) + b"x\n"
    log = written(tmp_path, content)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError):
            log.rewind(8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log.path.read_bytes() == content and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_lines_reach_the_disk(tmp_path, monkeypatch):
    """Each one, or, where a pause is allowed, when they are asked to: before a checkpoint."""
    flushed = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.append(os.fstat(handle).st_size), original(handle)))
    each, pausing = JsonLines(tmp_path / "each"), JsonLines(tmp_path / "pausing", flush_seconds=3600)
    for step in (1, 2):
        each.append({"step": step})
    assert flushed == [12, 24]
    for step in (1, 2, 3):
        pausing.append({"step": step})
    assert flushed == [12, 24, 12]
    pausing.flush()
    assert flushed[3:] == [36]


def test_a_run_with_a_damaged_line_goes_on_and_tells_it(stopped_run, whole_run, capsys):
    path = stopped_run / "metrics.jsonl"
    content = path.read_bytes().replace(b'{"step": 3,', b'{"step" 3,')
    path.write_bytes(content)
    capsys.readouterr()
    assert kr.load_script().main(["--resume", "--output-dir", str(stopped_run)]) == 0
    message = capsys.readouterr().err
    assert "1 damaged line, missing from now on" in message and "metrics.jsonl.damaged-1" in message
    assert (stopped_run / "metrics.jsonl.damaged-1").read_bytes() == content
    assert kr.steps_of(stopped_run) == [1, 2, *range(4, 61)]
    assert (stopped_run / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()
