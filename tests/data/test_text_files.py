"""Data files of every form: packed, marked, odd or hostile. What cannot be read is a ValueError that names the file."""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hbll_seq.data.sources import SPLITS, describe_source, open_corpus

TEXT = "".join(f"line {i} \u00e9\n" for i in range(400))
ROWS = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(60))


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def read(source: object, split: str = "train", column: str = "text") -> str:
    return "".join(s for s in open_corpus(source, split, column).segments() if s is not None)


def refused(source: object, match: str, split: str = "train", column: str = "text") -> str:
    """The message, which is one short line that names the file."""
    with pytest.raises(ValueError, match=match) as raised:
        read(source, split, column)
    message = str(raised.value)
    assert len(message) <= 500 and "\n" not in message and os.path.basename(os.fsdecode(source))[:20] in message
    return message


# -- packed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(("kind", "text"), [("txt", TEXT), ("txt", "one line of words " * 300), ("jsonl", ROWS)])
def test_packed_text_is_that_text(packing: str, kind: str, text: str, tmp_path: Path) -> None:
    plain, packed = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}{packing}"
    plain.write_text(text)
    packed.write_bytes(PACK[packing](text.encode()))
    for split in SPLITS:
        assert read(packed, split) == read(plain, split) != ""
        assert open_corpus(packed, split).digest == open_corpus(plain, split).digest  # a cache serves both


@pytest.mark.parametrize("packing", PACK)
def test_parts_packed_one_after_another_are_one_text(packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"TRAIN.TXT{packing}"
    path.write_bytes(PACK[packing](TEXT[:1000].encode()) + PACK[packing](TEXT[1000:].encode()))
    assert "".join(read(path, split) for split in SPLITS) == TEXT


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("harm", ["cut", "flipped", "garbage", "none", "tail"])
def test_broken_packed_files_are_named(packing: str, harm: str, tmp_path: Path) -> None:
    data = PACK[packing](random.Random(0).randbytes(3000).hex().encode())
    harmed = {"cut": data[:-30], "flipped": data[:900] + bytes([data[900] ^ 4]) + data[901:], "garbage": b"no archive" * 9,
              "none": b"\x1f", "tail": data + b"garbage"}[harm]  # fmt: skip
    path = tmp_path / f"t.txt{packing}"
    path.write_bytes(harmed)
    if packing == ".zst" and harm == "flipped":  # this packer writes no checksum: another text may come out
        return
    refused(path, "cannot read data file.*; pack it again")


def test_a_packed_empty_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(b""))
    refused(tmp_path / "t.txt.gz", "is empty")


PROGRAM = """
import sys
from pathlib import Path
from hbll_seq.data.sources import open_corpus

def most():  # of getrusage a child inherits its parent's figure
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

for path in ["/dev/null", *sys.argv[1:]]:
    before = most()
    try:
        n = sum(len(s) for s in open_corpus(path, "test").segments() if s is not None)
    except ValueError as error:
        n = str(error)
    print((most() - before) // 1024, n)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say how much memory was taken")
def test_bombs_and_endless_rows_do_not_fill_the_memory(tmp_path: Path) -> None:
    """MiB that reading a file takes in a process of its own."""
    paths = [tmp_path / "bomb.txt.gz", tmp_path / "bomb.txt.zst", tmp_path / "rows.jsonl"]
    block = b"a" * (1 << 20)
    with gzip.open(paths[0], "wb", 1) as packed, pyarrow.output_stream(paths[1], compression="zstd") as other:
        for _ in range(64):
            packed.write(block)
            other.write(block)
    with paths[2].open("wb") as file:
        file.write(b'{"text": "first"}\n{"text": "')
        file.truncate(256 << 20)  # it takes no disk
    done = subprocess.run([sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True, timeout=120, check=True)
    _, *taken = (line.split(" ", 1) for line in done.stdout.splitlines())
    assert [result for _, result in taken[:2]] == [str((64 << 20) - (64 << 20) * 19 // 20)] * 2
    assert "rows.jsonl', line 2: a row may have at most 67,108,864 bytes" in taken[2][1]
    assert all(int(memory) < limit for (memory, _), limit in zip(taken, (55, 55, 180), strict=True))


# -- marks and encodings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["", *PACK])
def test_byte_order_marks_are_dropped(packing: str, tmp_path: Path) -> None:
    for kind, text in (("txt", TEXT), ("jsonl", ROWS)):
        path, plain = tmp_path / f"a.{kind}{packing}", tmp_path / f"plain.{kind}"
        plain.write_text(text)
        path.write_bytes(PACK.get(packing, bytes)(codecs.BOM_UTF8 + text.encode()))
        for split in SPLITS:
            assert read(path, split) == read(plain, split)
            assert open_corpus(path, split).digest != open_corpus(plain, split).digest


def test_a_mark_within_a_text_stays_and_errors_count_the_mark(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\ufeffone\n\ufefftwo\n")
    assert read(tmp_path, "train") == "one\n\ufefftwo\n"[: len(read(tmp_path, "train"))] != ""
    (tmp_path / "bad.txt").write_bytes(codecs.BOM_UTF8 + b"ab\xe9c\n" * 20)
    refused(tmp_path / "bad.txt", "byte 0xe9 at byte offset 5 ")
    (tmp_path / "bad.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "\xe9"}\n' * 20)
    refused(tmp_path / "bad.jsonl", "byte 0xe9 at byte offset 13 ")
    (tmp_path / "only.txt").write_bytes(codecs.BOM_UTF8)
    refused(tmp_path / "only.txt", "holds no text")


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_other_encodings_are_named_with_their_remedy(kind: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / f"t.{kind}"
    path.write_bytes((TEXT if kind == "txt" else ROWS).encode(encoding))
    message = refused(path, "t UTF-8 OLD > NEW")
    name = message.split("iconv -f ")[1].split()[0]
    assert codecs.lookup(name) == codecs.lookup(encoding)


def test_zero_bytes_are_text(tmp_path: Path) -> None:
    for i, text in enumerate(["\0" * 100, "a\0\0\0b" * 50, "ab\0" * 50]):
        (tmp_path / f"{i}.txt").write_text(text)
        assert "".join(read(tmp_path / f"{i}.txt", split) for split in SPLITS) == text


# -- rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [("[" * 100_000, "not JSON .it is nested too deeply"), ('{"text": ' * 50_000, "nested too deeply"),
     ('{"text": "a \\ud800 b"}', "lone surrogate, U.D800, at character 2"),
     ('{"text": NaN}', "not finite"), ('{"text": -Infinity}', "not finite"), ('{"text": 1e999}', "not finite"),
     ('{"text": "a", "n": %s}' % ("7" * 5000), "not JSON .*digits"), ('{"text": "a", "text": "b"}', "twice"),
     ('{"%s": 1}' % ("k" * 10**6), "no column 'text'"), (json.dumps({f"k{i}": 1 for i in range(9999)}), "no column"),
     ('{"text": ["%s"]}' % ("x" * 10**6), "holds a list"), ("x" * 10**6, "not JSON"),
     ('{"text": "a"} {"text": "b"}', "Extra data"), ('{"text": "a\tb"}', "not JSON"),
     ("\ufeff" + '{"text": "a"}', "not JSON"), ("3", "not a JSON object but int; write rows as"),
     ('["a"]', "not a JSON object but list; write rows as")],
    ids=range(17),
)  # fmt: skip
def test_hostile_rows_are_named_by_line(line: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS + line + "\n" + ROWS)
    assert "rows.jsonl', line 61" in refused(path, problem)


def test_other_columns_may_hold_what_programs_write(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    line = '{"score": %s, "text": "row", "other": "\\ud800"}\n'
    path.write_text("".join(line % value for value in ("NaN", "-Infinity", "1e999", "null", "10000")) * 8)
    assert "".join(read(path, split) for split in SPLITS) == "row" * 40


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n\r\n", "\r\r"])
def test_rows_may_end_in_carriage_returns(end: str, tmp_path: Path) -> None:
    path, plain = tmp_path / "rows.jsonl", tmp_path / "plain.jsonl"
    plain.write_text(ROWS)
    path.write_text(ROWS.replace("\n", end), newline="")
    assert [read(path, split) for split in SPLITS] == [read(plain, split) for split in SPLITS]
    path.write_text(ROWS.replace(": ", ":\r"), newline="")  # which may stand within a row as well
    assert [read(path, split) for split in SPLITS] == [read(plain, split) for split in SPLITS]
    path.write_text(ROWS.replace("\n", end) + "{" + end, newline="")
    refused(path, "not JSON")


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {i}" * 9 for i in range(500)]}), tmp_path / "good.parquet")
    data, rng, whole = (tmp_path / "good.parquet").read_bytes(), random.Random(0), read(tmp_path / "good.parquet")
    for i in range(150):
        harmed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            harmed[rng.randrange(len(data))] = rng.randrange(256)
        if i % 10 == 0:
            harmed = harmed[: rng.randrange(len(data))]
        path = tmp_path / f"bad{i}.parquet"
        path.write_bytes(harmed)
        try:
            assert len(read(path)) <= 2 * len(whole)  # pages carry no checksum: another text may come out
        except ValueError as error:
            assert len(str(error)) <= 500 and "\n" not in str(error)
    (tmp_path / "cut.parquet").write_bytes(data[:-100])
    refused(tmp_path / "cut.parquet", "not a readable parquet file.*write it again")


def test_what_has_not_the_marks_of_parquet_is_not_read_whole(tmp_path: Path) -> None:
    """Files as large as no disk: reading all of one would not end."""
    for name, start in (("zeros", b""), ("started", b"PAR1")):
        with open(tmp_path / f"{name}.parquet", "wb") as file:
            file.write(start)
            file.truncate(1 << 42)
        refused(tmp_path / f"{name}.parquet", "lacks the mark PAR1")
    for data in (b"PAR1", b"PAR1PAR1", b"x" * 12, b"PAR1" + bytes(20)):
        (tmp_path / "small.parquet").write_bytes(data)
        refused(tmp_path / "small.parquet", "lacks the mark PAR1")


def test_parquet_of_names_that_are_no_unicode(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.parquet")
    with open(path, "wb") as file:
        pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {i}" for i in range(40)]}), file)
    assert read(path).startswith("row 0row 1")


def test_parquet_text_that_is_no_unicode(tmp_path: Path) -> None:
    raw = pyarrow.array([b"caf\xe9"] * 40, pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 40, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "t.parquet")
    refused(tmp_path / "t.parquet", "not UTF-8")


# -- what is no file, or no longer the same -------------------------------------------------------------------------------


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / "pipe.jsonl.gz")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "null.parquet").symlink_to("/dev/null")
    problems = {"pipe.txt": "a pipe", "pipe.jsonl.gz": "a pipe", "zero.txt": "a device", "null.parquet": "a device"}
    done = []
    thread = threading.Thread(target=lambda: done.extend(refused(tmp_path / n, p) for n, p in problems.items()), daemon=True)
    thread.start()
    thread.join(20)
    assert len(done) == 4
    with pytest.raises(ValueError, match="holds no .txt/.jsonl/.parquet file"):
        describe_source(str(tmp_path))


@pytest.mark.parametrize("how", ["cut", "grown", "gone", "replaced"])
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.txt.gz", "t.parquet"])
def test_a_file_that_changes_while_it_is_read_is_named(how: str, name: str, tmp_path: Path) -> None:
    path, text = tmp_path / name, "".join(f"line {i}\n" for i in range(200_000))
    if name == "t.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": text.split("\n")}), path)
    else:
        lines = (json.dumps({"text": line}) + "\n" for line in text.split("\n")[:90_000])
        data = ("".join(lines) if name == "t.jsonl" else text).encode()
        path.write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
    corpus = open_corpus(path, "train")
    segments = corpus.segments()
    if how != "replaced":
        assert next(segments)
    if how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "grown":
        with path.open("ab") as file:
            file.write(b" ")
    elif how == "gone":
        path.unlink()
        segments = corpus.segments()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        os.utime(path, ns=(0, 0))
    cut_row = "|, line .* not JSON" if name == "t.jsonl" else ""
    with pytest.raises(ValueError, match=f"{name}'( has changed while it was in use; start again|: No such file{cut_row})"):
        list(segments)


# -- sources that cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    ["", " ", "a\0b", "x" * 5000, "x" * 300, "a/" * 3000, "\ud800", "\udcff/\udcff", "~nobody-at-all/x", None, 5, 1.5, [],
     b"\0", object(), "/proc/self/mem", "\n", "owner/name:con fig", "a/b/c", ".txt"],
)  # fmt: skip
def test_sources_that_cannot_be(source: object) -> None:
    for find in (lambda: open_corpus(source, "train"), lambda: describe_source(source)):
        with pytest.raises(ValueError, match="there is no data|suffix|cannot read") as raised:
            find()
        assert len(str(raised.value)) <= 500 and str(raised.value).isprintable()


def test_home_is_no_data_when_nobody_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="holds no .txt/.jsonl/.parquet file"):
        open_corpus("~", "train")
    (tmp_path / "t.txt").write_text(TEXT)
    assert read("~/t.txt", "test") and read(b"~/t.txt", "test") and read(Path("~/t.txt"), "test")


@pytest.mark.parametrize(
    ("split", "column"), [(None, "text"), ("x" * 10**6, "text"), (["train"], "text"), ("train", None), ("train", 5)]
)
def test_odd_splits_and_columns(split: object, column: object) -> None:
    with pytest.raises(ValueError, match="unknown split|column is") as raised:
        open_corpus("bundled", split, column)
    assert len(str(raised.value)) <= 500
