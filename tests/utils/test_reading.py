"""Reading foreign files: regular, bounded, strict; messages stay short whatever the value."""

import os
import threading

import pytest

from hbll_seq.utils import reading
from hbll_seq.utils.integrity import format_sums, read_sums, sha256


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


class Rude:
    def __repr__(self):
        raise RuntimeError("no name")


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, b"y" * 10**7, 10**20000, -(10**20000), list(range(10**6)), {i: i for i in range(10**5)}, nested(10**5),
     "line\nline\x1b[2J", Rude(), {"a": Rude()}, "\udc80", {"k" * 10**6: "v" * 10**6}],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_quoted_value_is_one_short_line(value):
    text = reading.quote(value)
    assert len(text) <= reading.MAX_QUOTED and text.isprintable()


def test_short_values_are_quoted_whole():
    for value in ("small", 7, 0.5, None, True, ["a", 1], {"a": (1, 2)}):
        assert reading.quote(value) == repr(value)


def test_a_bomb_of_shared_lists_is_quoted_at_once():
    bomb = ["x"] * 10
    for _ in range(30):
        bomb = [bomb] * 10  # 10**31 values
    assert len(reading.quote(bomb)) <= reading.MAX_QUOTED


@pytest.mark.parametrize("text, problem", [
    ("[" * 100_000, "nested too deeply"), ('{"a": 1, "a": 2}', "'a' stands in it twice"), ('{"a": NaN}', "NaN"),
    ("-Infinity", "Infinity"), ("1e999", "1e999"), ("1" * 5000, "digits"), ("{", "Expecting"), ("", "Expecting"),
    (b"\xff\xfe\xfd", "decode"),
])  # fmt: skip
def test_json_is_strict(text, problem):
    with pytest.raises(ValueError, match=problem) as raised:
        reading.parse_json(text)
    assert len(str(raised.value)) <= reading.MAX_QUOTED


def test_json_of_older_versions_may_hold_infinity():
    assert reading.parse_json('{"a": Infinity, "b": [NaN, 1e999, 1.5]}', null_for_non_finite=True) == {
        "a": None, "b": [None, None, 1.5]}  # fmt: skip


def test_json_is_written_strictly():
    value = {"a": float("inf"), "b": [float("nan"), 1, 0.5], "c": {"d": (float("-inf"), "x", None, True)}}
    assert reading.parse_json(reading.to_json(value)) == {
        "a": None, "b": [None, 1, 0.5], "c": {"d": [None, "x", None, True]}}  # fmt: skip


@pytest.mark.parametrize("text, problem", [
    ("[" * 20_000, "deeply"), ("a: &x [1]\nb: *x", "aliases"), ("a: 1\na: 2", "twice"), ("a: [", "while"),
    ("a: 2020-13-45", "month"), ("!!python/object/apply:os.system ['true']", "python"), ("? [1, 2]\n: 3", "key"),
])  # fmt: skip
def test_yaml_is_strict(text, problem):
    with pytest.raises(ValueError, match=problem) as raised:
        reading.parse_yaml(text)
    assert len(str(raised.value)) <= reading.MAX_QUOTED


def test_yaml_of_plain_values_is_read():
    assert reading.parse_yaml("a: 1\nb: [x, 2.5]\nc: null\nd: {e: true}") == {
        "a": 1, "b": ["x", 2.5], "c": None, "d": {"e": True}}  # fmt: skip


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder"), ("/dev/null", "a device")):
        done = []

        def read():
            with pytest.raises(ValueError, match=kind):
                reading.read_bytes(path)
            done.append(True)

        thread = threading.Thread(target=read, daemon=True)  # a pipe that nobody writes to would be waited for
        thread.start()
        thread.join(10)
        assert done == [True]
    with pytest.raises(FileNotFoundError):
        reading.read_bytes(tmp_path / "missing")


def test_size_is_bounded_and_links_are_followed(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert reading.read_bytes(tmp_path / "link", 5) == b"12345"
    with pytest.raises(ValueError, match="5 bytes; it may have at most 4"):
        reading.read_bytes(tmp_path / "link", 4)
    (tmp_path / "zeros").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="a device"):
        reading.read_bytes(tmp_path / "zeros")


@pytest.mark.parametrize("name, problem", [("", "empty"), (" ", "empty"), ("a\0b", "NUL"), ("x" * 300, "too long"),
                                           ("a/" * 3000, "too long"), ("~nobody-of-that-name/x", "write the folder out"),
                                           ("\ud800", "lone surrogate; no file"), ("runs/a\udfff", "lone surrogate")])
def test_impossible_names_are_refused(name, problem):
    with pytest.raises(ValueError, match=problem) as raised:
        reading.possible_name(name)
    assert len(str(raised.value)) <= 500


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(reading.possible_name("~/runs/one")) == "/somewhere/runs/one"


def test_sums_are_those_of_sha256sum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b c.txt").write_bytes(b"")
    (tmp_path / "SHA256SUMS").write_text(format_sums(tmp_path, ["b c.txt", "a"]))
    sums = read_sums(tmp_path / "SHA256SUMS")
    assert list(sums) == ["a", "b c.txt"]
    assert sums["a"] == sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("line", ["", "abc  a", "0" * 64 + "  ../a", "0" * 64 + "  ..", "0" * 64 + " a",
                                  "0" * 64 + "  a\n" + "1" * 64 + "  a"])
def test_lines_that_are_no_sums_are_refused(tmp_path, line):
    (tmp_path / "SHA256SUMS").write_text(line + "\n")
    with pytest.raises(ValueError, match="no line of `sha256sum`"):
        read_sums(tmp_path / "SHA256SUMS")
