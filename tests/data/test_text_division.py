"""However a text is cut, nothing is lost, and no split is empty where there is text for it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hbll_seq.data.sources import SPLITS, open_corpus


def documents(source: str | Path, split: str) -> list[str]:
    texts = [""]
    for segment in open_corpus(str(source), split).segments():
        texts[-1:] = [texts[-1], ""] if segment is None else [texts[-1] + segment]
    assert texts[-1] == ""  # every document is ended
    return texts[:-1]


def shares(source: str | Path) -> list[str]:
    """The text of train, validation and test."""
    return ["".join(documents(source, split)) for split in SPLITS]


def words(n: int, blank: str = " ") -> str:
    rng = random.Random(0)
    return blank.join(rng.choice(["tree", "\u00e9t\u00e9", "node", "of", "the"]) for _ in range(n))


ODD_TEXTS = {
    "one line of 2 MB": (words(450_000), " "),
    "one word": ("ACGT" * 5000, None),
    "Chinese": ("\u4e2d\u6587\u5b57" * 3001, None),
    "four bytes a character": ("\U0001f600" * 70, None),
    "carriage returns": ("".join(f"a line, {i}\r" for i in range(300)), "\r"),
    "a long line, then few": (words(20_000) + "\nand\nthree\nmore\n", " "),
    "few lines, then a long one": ("and\nthree\nmore\n" + words(20_000), " "),
    "form feeds": (words(4000, "\f"), "\f"),
    "no-break blanks": ("\u00a0".join(["some"] * 3000), None),
    "CRLF, few lines": ("\r\n".join([words(1000)] * 4), " "),
    "just enough": ("a" * 20, None),
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_a_text_of_few_lines_is_cut_at_blanks_else_at_characters(name: str, tmp_path: Path) -> None:
    text, end = ODD_TEXTS[name]
    (tmp_path / "t.txt").write_text(text, newline="")
    parts = shares(tmp_path / "t.txt")
    assert "".join(parts) == text
    assert [round(20 * len(part) / len(text)) for part in parts] == [18, 1, 1]
    assert end is None or all(part[-1].isspace() for part in parts[:2])
    assert not any(part.endswith("\r") and after.startswith("\n") for part, after in zip(parts, parts[1:], strict=False))


def test_lines_of_crlf_are_kept_whole(tmp_path: Path) -> None:
    text = "".join(f"line {i}\r\n" for i in range(300))
    (tmp_path / "t.txt").write_text(text, newline="")
    parts = shares(tmp_path / "t.txt")
    assert "".join(parts) == text and all(part.startswith("line") and part.endswith("\r\n") for part in parts)


def test_several_files_of_one_line_each(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(words(500))
    for split in SPLITS:
        assert len(documents(tmp_path, split)) == 3
    assert sum(map(len, shares(tmp_path))) == 3 * len(words(500))


def test_files_too_small_to_cut_are_held_out_whole(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"{i}")
    assert shares(tmp_path) == ["01", "2", "3"]


@pytest.mark.parametrize("n", [20, 26, 45])
def test_empty_files_take_no_slot(n: int, tmp_path: Path) -> None:
    names = []
    for i in range(n + 20):
        empty = i % 2 == 1 and i < 40  # every other one
        (tmp_path / f"{i:03d}.txt").write_text("" if empty else f"file {i}\n")
        names += [] if empty else [f"file {i}\n"]
    assert len(names) == n
    parts = [documents(tmp_path, split) for split in SPLITS]
    assert parts[1] == names[18::20] and parts[2] == names[19::20]
    assert sorted(sum(parts, [])) == sorted(names)


def test_many_files_of_which_few_have_text(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_text("".join(f"{i} {j}\n" for j in range(60)) if i in (3, 7) else "")
    parts = [documents(tmp_path, split) for split in SPLITS]
    assert [len(part) for part in parts] == [2, 2, 2] and sum(len("".join(part).splitlines()) for part in parts) == 120


def write_rows(path: Path, rows: list[str | None]) -> None:
    if path.suffix == ".jsonl":  # an empty row is a blank line, or a row with an empty text
        kinds = [json.dumps({"text": row}) if row or i % 3 == 0 else " " * (i % 2) for i, row in enumerate(rows)]
        path.write_text("".join(f"{line}\n" for line in kinds))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())}), path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("n", [400, 45, 20, 19, 7, 3])
def test_empty_rows_take_no_slot(kind: str, n: int, tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(n)]
    write_rows(tmp_path / f"apart.{kind}", [x for i, row in enumerate(rows) for x in (row, "" if i % 2 else None)])
    parts = [documents(tmp_path / f"apart.{kind}", split) for split in SPLITS]
    first = 18 if n >= 20 else n - 2
    assert parts[1] == rows[first :: max(20, n)][:1] + rows[first + 20 :: 20] * (n >= 20)
    assert parts[2] == rows[first + 1 :: max(20, n)][:1] + rows[first + 21 :: 20] * (n >= 20)
    assert sorted(sum(parts, [])) == sorted(rows)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_one_long_row_is_cut_within(kind: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"book.{kind}", [None, words(3000), ""])
    parts = shares(tmp_path / f"book.{kind}")
    assert "".join(parts) == words(3000) and [round(20 * len(part) / len(words(3000))) for part in parts] == [18, 1, 1]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_too_little_text_is_told_with_how_much_there_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"t.{kind}"
    path.write_text("ten bytes\n") if kind == "txt" else write_rows(path, ["ten bytes"])
    assert shares_of_train(path).strip() == "ten bytes"
    amount = "10 bytes" if kind == "txt" else "1 rows with text"
    for split in SPLITS[1:]:
        with pytest.raises(ValueError, match=f"{split}' holds no text; give more text, or .* own: there are {amount}"):
            open_corpus(str(path), split)


def shares_of_train(path: Path) -> str:
    return "".join(documents(path, "train"))


def test_what_identifies_a_text_stays_where_its_outcome_does(tmp_path: Path) -> None:
    """Digests of the versions before: caches are found by them."""
    (tmp_path / "t.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    write_rows(tmp_path / "t.jsonl", [f"row {i}" for i in range(40)])
    (tmp_path / "tail.jsonl").write_text((tmp_path / "t.jsonl").read_text() + "\n\n")  # empty rows that move no other
    found = {(name, split): open_corpus(str(tmp_path / name), split).digest[:16]
             for name in ("t.txt", "t.jsonl", "tail.jsonl") for split in SPLITS}  # fmt: skip
    assert found == {
        ("t.txt", "train"): "d3f42809c1a7b490",
        ("t.txt", "validation"): "55f017dbe3cdd789",
        ("t.txt", "test"): "ba3dc1e982023ed0",
        ("t.jsonl", "train"): "652aa1d023eeb50c",
        ("t.jsonl", "validation"): "0ccd032307e1fe18",
        ("t.jsonl", "test"): "3525d92ed58a0c39",
        ("tail.jsonl", "train"): "f0789dae681e885d",
        ("tail.jsonl", "validation"): "c8c80ef9547b1bbc",
        ("tail.jsonl", "test"): "72166091b27c4cdd",
    }


def test_another_outcome_has_another_identity(tmp_path: Path) -> None:
    """Beside the bytes, what is cut at which places decides."""
    import hashlib

    path = tmp_path / "t.txt"
    path.write_text(words(1000))
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    for split, slots in (("train", [*range(18)]), ("validation", [18]), ("test", [19])):
        old = hashlib.sha256("\0".join([json.dumps([False, ".txt", "", slots]), sha]).encode()).hexdigest()
        assert open_corpus(str(path), split).digest != old
