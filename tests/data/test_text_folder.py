"""What a folder's files are used for is said, never guessed: splits by name, linked folders, what is left aside."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import kill_and_resume as kr
import pytest

from hbll_seq.data import sources
from hbll_seq.data.sources import open_corpus


def text_of(source: str | Path, split: str, column: str = "text") -> str:
    return "".join(segment for segment in open_corpus(str(source), split, column).segments() if segment is not None)


def lines(word: str, n: int = 40) -> str:
    return "".join(f"{word} {i}\n" for i in range(n))


def make(folder: Path, **texts: str) -> None:
    """Files by name; two underscores stand for the dot."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_book_beside_a_test_is_the_training_text(tmp_path: Path) -> None:
    make(tmp_path, book__txt=lines("book"), test__txt=lines("other", 30))
    assert text_of(tmp_path, "test") == lines("other", 30)
    assert text_of(tmp_path, "train") + text_of(tmp_path, "validation") == lines("book")
    assert text_of(tmp_path, "validation").count("\n") == 2


@pytest.mark.parametrize(
    ("name", "split"),
    [("Test.TXT", "test"), ("TESTING.txt", "test"), ("x-Val.txt", "validation"), ("dev.txt", "validation"),
     ("eval.Txt", "validation"), ("heldout.txt", "validation"), ("held-out.txt", "validation"),
     ("Held_Out.txt", "validation"), ("validation.txt", "validation"), ("VALID.txt", "validation"),
     ("wiki test.txt", "test"), ("test1.txt", "test"),
     ("testset.txt", "test"), ("test_data.txt", "test"), ("my_test_results.txt", "test"), ("01test.txt", "test")],
)  # fmt: skip
def test_names_of_splits_in_any_case_and_their_synonyms(name: str, split: str, tmp_path: Path) -> None:
    make(tmp_path, book__txt=lines("book"))
    (tmp_path / name).write_text("held out\n")
    assert text_of(tmp_path, split) == "held out\n"
    assert "held out" not in text_of(tmp_path, "train")


@pytest.mark.parametrize("name", ["contest", "latest", "protests", "devil", "evaluate", "trainer", "Test of Time", "invalid"])
def test_words_that_hold_a_split_name_are_none(name: str, tmp_path: Path) -> None:
    make(tmp_path, book__txt=lines("book"))
    (tmp_path / f"{name}.txt").write_text(lines("more"))
    assert all("book" in text_of(tmp_path, "train") and "more" in text_of(tmp_path, split) for split in sources.SPLITS)


@pytest.mark.parametrize("name", ["Test", "dev", "test_set", "TestData"])
def test_folders_name_splits_too(name: str, tmp_path: Path) -> None:
    make(tmp_path, a__txt=lines("book"))
    make(tmp_path / name, a__txt="held out\n")
    assert text_of(tmp_path, "validation" if name == "dev" else "test") == "held out\n"


@pytest.mark.parametrize("name", ["train_test.txt", "test-train-00000.txt", "dev.testing.txt", "train/dev/a.txt"])
def test_a_name_with_two_splits_is_refused(name: str, tmp_path: Path) -> None:
    make(tmp_path, book__txt=lines("book"))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(lines("more"))
    for split in sources.SPLITS:
        with pytest.raises(ValueError, match="names several splits, .* and .*; rename it"):
            open_corpus(str(tmp_path), split)


def test_the_name_of_a_file_counts_before_its_folder(tmp_path: Path) -> None:
    make(tmp_path / "dev", train__txt=lines("book"), test__txt="held out\n")
    assert text_of(tmp_path, "test") == "held out\n" and "book" in text_of(tmp_path, "train")


def test_beside_training_files_others_are_training_text_where_nothing_else_is_named(tmp_path: Path) -> None:
    make(tmp_path, train__txt=lines("one"), more__txt=lines("two"))
    assert all("one" in text_of(tmp_path, split) and "two" in text_of(tmp_path, split) for split in sources.SPLITS)
    make(tmp_path, test__txt="held out\n")  # now 'more' may belong anywhere
    with pytest.raises(ValueError, match="names the splits test, train, but the file 'more.txt' belongs to none"):
        open_corpus(str(tmp_path), "train")


def test_a_folder_of_test_files_has_no_training_text(tmp_path: Path) -> None:
    make(tmp_path, test__txt=lines("one"), test2__txt=lines("two"))
    for read in (lambda: open_corpus(str(tmp_path), "train"), lambda: sources.describe_source(str(tmp_path))):
        with pytest.raises(ValueError, match="no split 'train'; it has test; the training text's files are named 'train' or"):
            read()


def test_what_is_read_held_out_and_left_aside_is_said(tmp_path: Path) -> None:
    make(tmp_path, book__txt=lines("book"), test__txt="t\n", notes__md="n", a__csv="", b__csv="", c__csv="", none__txt="")
    make(tmp_path / ".git", config__txt="x")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "s.txt"))
    assert sources.describe_source(str(tmp_path)) == [
        "data: train is 'book.txt', without what is held out",
        "data: validation is held out of the training text",
        "data: test is 'test.txt'",
        "data: left aside, broken links: 'gone.txt', 'self.txt'",
        "data: left aside, empty files: 'none.txt'",
        "data: left aside, hidden: '.git'",
        "data: left aside, neither files nor folders: 'pipe.txt', 's.txt'",
        "data: left aside, other endings: 'a.csv', 'b.csv', 'c.csv' and 1 more",
    ]
    assert text_of(tmp_path, "train") + text_of(tmp_path, "validation") == lines("book")
    assert sources.describe_source("bundled") == ["data: train, validation and test are those of the bundled WikiText-2"]
    assert sources.describe_source(str(tmp_path / "book.txt"))[0] == "data: train is 'book.txt', without what is held out"
    assert sources.describe_source(str(tmp_path / "none.txt"))[0] == "data: train is empty, without what is held out"


def test_a_description_is_short_whatever_the_names(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / ("x\n" * 100 + f"{i:02d}.txt")).write_text(lines("text"))
        (tmp_path / f"{'y' * 240}{i:02d}.md").write_text("")
    said = sources.describe_source(str(tmp_path))
    assert len(said) == 4 and all(len(line) < 300 and line.isprintable() for line in said)


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", part__txt=lines("linked"))
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder / "real", book__txt=lines("book"))
    (folder / "a_link").symlink_to("../elsewhere")
    (folder / "again").symlink_to("real")  # its own place counts
    (folder / "real" / "loop").symlink_to("..")
    (folder / "up").symlink_to("../..")  # the folders around it hold this one
    (folder / "z_link").symlink_to("../elsewhere")
    for split in sources.SPLITS:
        assert "linked" in text_of(folder, split) and "book" in text_of(folder, split)
    assert "".join(text_of(folder, split) for split in sources.SPLITS).count("book 7\n") == 1
    aside = sources.describe_source(str(folder))[3:]
    assert aside == ["data: left aside, folders that are read already: 'again', 'real/loop', 'up' and 1 more"]


def test_a_linked_split_is_that_split(tmp_path: Path) -> None:
    make(tmp_path / "store", x__txt="held out\n")
    make(tmp_path / "data", book__txt=lines("book"))
    (tmp_path / "data" / "test").symlink_to(tmp_path / "store")
    assert text_of(tmp_path / "data", "test") == "held out\n"


def test_a_packed_copy_is_not_read_twice(tmp_path: Path) -> None:
    import gzip

    make(tmp_path, book__txt=lines("book"))
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(lines("book").encode()))
    (tmp_path / "second.txt.gz").write_bytes(gzip.compress(lines("second").encode()))
    whole = "".join(text_of(tmp_path, split) for split in sources.SPLITS)
    assert whole.count("book 7\n") == 1 and whole.count("second 7\n") == 1
    assert sources.describe_source(str(tmp_path))[3:] == ["data: left aside, packed copies of what is read: 'book.txt.gz'"]


def test_a_folder_that_looks_like_a_file(tmp_path: Path) -> None:
    make(tmp_path / "x.txt", inner__txt=lines("book"))
    assert "book" in text_of(tmp_path, "test") and "book" in text_of(tmp_path / "x.txt", "test")


def test_names_that_are_no_unicode_are_data(tmp_path: Path) -> None:
    name = os.fsdecode(b"b\xffok.txt")
    (tmp_path / name).write_text(lines("book"))
    assert "book" in text_of(tmp_path, "test") and "book" in text_of(tmp_path / name, "test")
    for line in [*sources.describe_source(str(tmp_path)), open_corpus(str(tmp_path / name), "test").name]:
        line.encode()  # can be printed
    (tmp_path / name).write_bytes(b"caf\xe9\n" * 40)
    with pytest.raises(ValueError, match="not UTF-8: byte 0xe9 at byte offset 3") as raised:
        text_of(tmp_path / name, "train")
    str(raised.value).encode()


def test_a_run_says_what_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "data", book__txt=lines("some words of a book", 400), Test__TXT=lines("other words", 40), notes__md="")
    monkeypatch.setenv("HBLL_CACHE", str(tmp_path / "cache"))
    script = kr.load_script()
    script.data(script.resolve(script.read_preset("debug", script.PRESETS), {"data": str(tmp_path / "data")}))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data: ")]
    assert said == [
        "data: train is 'book.txt', without what is held out",
        "data: validation is held out of the training text",
        "data: test is 'Test.TXT'",
        "data: left aside, other endings: 'notes.md'",
    ]
