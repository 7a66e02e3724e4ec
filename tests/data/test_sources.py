"""Text of every kind of source becomes documents without loss; what cannot be read is named.

The network is the only thing that is replaced; everything else is the real libraries on small files.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from hbll_seq.data import sources, text_files
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import TokenStream, load_tokens

BUNDLED = {
    "train": ("train", 10_797_148, 2_088_628, 600),
    "validation": ("valid", 1_121_681, 217_646, 60),
    "test": ("test", 1_256_449, 245_569, 60),
}
ARTICLES = [
    " \n = One = \n \n First text . \n \n = = Part = = \n \n More . \n \n",
    " = Two = \n \n Second \u2581 \U0001f600 . \n",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.default()


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HBLL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HBLL_DATA", raising=False)
    return tmp_path / "cache"


def documents(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    """The texts between the end-of-text ids."""
    ends = np.flatnonzero(stream.tokens == tokenizer.eos_id)
    assert ends[0] == 0 and ends[-1] == stream.n_tokens - 1
    return [tokenizer.decode(stream.tokens[a + 1 : b]) for a, b in pairwise(ends)]


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: texts, "id": list(range(len(texts)))}), path)


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> None:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")


@pytest.mark.parametrize("split", BUNDLED)
def test_bundled_text_is_whole(split: str, tokenizer: Tokenizer) -> None:
    name, n_bytes, n_words, n_articles = BUNDLED[split]
    packed = resources.files("hbll_seq") / "assets" / f"wikitext-2.{name}.txt.xz"
    text = lzma.decompress(packed.read_bytes()).decode()
    stream = load_tokens("bundled", split, tokenizer)
    assert (stream.n_bytes, stream.n_words) == (n_bytes, n_words)
    articles = documents(stream, tokenizer)
    assert len(articles) == n_articles and "".join(articles) == text
    assert all(article.startswith(" = ") for article in articles[1:])
    assert stream.n_bytes / stream.n_tokens > 3.5  # bytes per token
    assert stream.tokens.dtype == np.uint16 and not isinstance(stream.tokens, np.memmap)  # which dies with its file


def test_licence_travels_with_the_text() -> None:
    text = (resources.files("hbll_seq") / "assets" / "ATTRIBUTION.txt").read_text()
    assert all(word in text for word in ("CC BY-SA 3.0", "GFDL", "Merity", "1609.07843"))


def test_articles_start_at_level_one_headings_between_blank_lines() -> None:
    caption = (
        " \n = One = \n \n Note : \n = Goals ; A = \n = Points = \n \n = = Part = = \n \n = = = X = = = \n \n text \n"
    )
    assert "".join(
        x or "|" for x in sources.split_articles([*caption.splitlines(True), " \n", " = Two = \n", " \n"])
    ) == (caption + " \n| = Two = \n \n|")
    assert list(sources.split_articles([])) == []
    assert list(sources.split_articles(["one line"])) == ["one line", None]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_folder_with_its_own_splits(kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = {"train": ["first\r\ntext  ", "\ttab\n\n"], "val": ["\u2581 and \U0001f600\n"], "test": ["e\u0301 last"]}
    folder = tmp_path / "mine"
    folder.mkdir()
    for split, rows in texts.items():
        for number, row in enumerate(rows):
            path = folder / f"{split}-{number:05d}.{kind}"
            if kind == "txt":
                path.write_bytes(row.encode())
            elif kind == "jsonl":
                write_jsonl(path, [row, ""])  # an empty row is no document
            else:
                write_parquet(path, [row, None, ""])
    for split, name in {"train": "train", "validation": "val", "test": "test"}.items():
        stream = load_tokens(str(folder), split, tokenizer)
        assert documents(stream, tokenizer) == texts[name]
        assert stream.n_bytes == sum(len(row.encode()) for row in texts[name])
        assert stream.n_words == sum(len(row.split()) + row.count("\n") for row in texts[name])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_divided_when_there_are_no_splits(kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [f"row {i}\nof text" for i in range(45)]
    path = tmp_path / f"rows.{kind}"
    (write_jsonl if kind == "jsonl" else write_parquet)(path, rows, "body")
    found = {s: documents(load_tokens(str(path), s, tokenizer, column="body"), tokenizer) for s in sources.SPLITS}
    assert found["validation"] == [rows[18], rows[38]] and found["test"] == [rows[19], rows[39]]
    assert sorted(found["train"] + found["validation"] + found["test"]) == sorted(rows)
    # Words do not run together where one document ends and the next begins.
    assert load_tokens(str(path), "train", tokenizer, column="body").n_words == 41 * 5


def test_text_file_is_divided_at_line_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "book.txt"
    lines = [f"line {i} \u00e9\n" * (1 + i % 3) for i in range(300)]
    path.write_bytes("".join(lines).encode())
    parts = [documents(load_tokens(str(path), split, tokenizer), tokenizer) for split in sources.SPLITS]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert "".join(part[0] for part in parts) == "".join(lines)
    assert all(part[0].startswith("line ") and part[0].endswith("\n") for part in parts)
    assert [round(20 * len(part[0]) / len("".join(lines))) for part in parts] == [18, 1, 1]


def test_many_text_files_are_divided_as_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(f"file {i}\n")
    (tmp_path / ".hidden.txt").write_text("not this")
    found = {s: documents(load_tokens(str(tmp_path), s, tokenizer), tokenizer) for s in sources.SPLITS}
    assert found["validation"] == ["file 18\n"] and found["test"] == ["file 19\n"]
    assert found["train"] == [f"file {i}\n" for i in range(18)]


def test_a_split_that_is_lacking_is_taken_from_training_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [f"row {i}" for i in range(40)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", ["held out"])
    found = {s: documents(load_tokens(str(tmp_path), s, tokenizer), tokenizer) for s in sources.SPLITS}
    assert found["test"] == ["held out"] and found["validation"] == [rows[19], rows[39]]
    assert found["train"] == [row for i, row in enumerate(rows) if i not in (19, 39)]


def test_folders_named_after_splits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The data folder's own name says nothing: here it holds the name of this test."""
    assert "test" in tmp_path.name
    for name in ("train", "dev"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.txt").write_text(f"{name}\n" * 20)
    assert documents(load_tokens(str(tmp_path), "validation", tokenizer), tokenizer) == ["dev\n" * 20]
    assert documents(load_tokens(str(tmp_path), "train", tokenizer), tokenizer) == ["train\n" * 19]
    assert documents(load_tokens(str(tmp_path), "test", tokenizer), tokenizer) == ["train\n"]


def test_files_that_name_no_split_are_training_text_beside_one_that_does(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a_test.jsonl").write_text('{"text": "one"}\n' * 10)
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n' * 10)
    assert documents(load_tokens(str(tmp_path), "train", tokenizer), tokenizer) == ["two"] * 9
    assert documents(load_tokens(str(tmp_path), "validation", tokenizer), tokenizer) == ["two"]
    assert documents(load_tokens(str(tmp_path), "test", tokenizer), tokenizer) == ["one"] * 10


def wikitext_folder(tmp_path: Path, name: str = "wikitext-103-raw-v1") -> tuple[Path, str]:
    """A small copy in the Hub's layout: one row a line, blank lines empty, several files of training rows."""
    text = "".join(ARTICLES)
    rows = ["" if line == " \n" else line for line in text.splitlines(True)]
    folder = tmp_path / name
    write_parquet(folder / "train-00000-of-00002.parquet", rows[:5])
    write_parquet(folder / "train-00001-of-00002.parquet", rows[5:])
    write_parquet(folder / "validation-00000-of-00001.parquet", rows)
    write_parquet(folder / "test-00000-of-00001.parquet", rows * 2)
    return folder, text


@pytest.mark.parametrize("how", ["folder", "parent", "HBLL_DATA"])
def test_wikitext_from_a_local_copy(
    how: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, text = wikitext_folder(tmp_path / "hub")
    if how == "HBLL_DATA":
        monkeypatch.setenv("HBLL_DATA", str(folder.parent))
    source = {"folder": str(folder), "parent": str(folder.parent), "HBLL_DATA": "wikitext-103"}[how]
    for split in ("train", "validation"):
        stream = load_tokens(source, split, tokenizer)
        assert documents(stream, tokenizer) == ARTICLES
        assert stream.n_words == len(text.split()) + text.count("\n")
    assert len(documents(load_tokens(source, "test", tokenizer), tokenizer)) == 4


def test_wikitext_reports_the_published_word_count(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Word-level perplexity is over the token version's count; the raw version's own differs a little."""
    folder, _ = wikitext_folder(tmp_path)
    write_parquet(folder / "validation-00000-of-00001.parquet", [" a\n"] * 3760)
    write_parquet(folder / "test-00000-of-00001.parquet", [" a\n"] * 4358)
    assert load_tokens(str(folder), "validation", tokenizer).n_words == 217_646
    assert load_tokens(str(folder), "test", tokenizer).n_words == 245_569


def test_wikitext_copies_are_not_mixed_or_divided(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder, _ = wikitext_folder(tmp_path)
    (folder / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        load_tokens(str(folder), "test", tokenizer)
    (folder / "validation-00000-of-00001.parquet").unlink()
    assert documents(load_tokens(str(folder), "train", tokenizer), tokenizer) == ARTICLES  # not a twentieth less
    wikitext_folder(tmp_path, "wikitext-2-raw-v1")
    with pytest.raises(ValueError, match="several data sets.*wikitext-103-raw-v1.*wikitext-2-raw-v1"):
        load_tokens(str(tmp_path), "train", tokenizer)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[str]]], list[tuple]]:
    """Stands in for the network only: `load_dataset` reads local rows with the real library."""
    import datasets

    load, calls = datasets.load_dataset, []

    def serve(rows: dict[str, list[str]]) -> list[tuple]:
        for split, texts in rows.items():
            write_parquet(tmp_path / "served" / f"{split}.parquet", texts)
        files = {split: str(tmp_path / "served" / f"{split}.parquet") for split in rows}

        def local_load(*args: object) -> datasets.DatasetDict:
            calls.append(args)
            return load("parquet", data_files=files, cache_dir=str(tmp_path / "hf"))

        monkeypatch.setattr(datasets, "load_dataset", local_load)
        return calls

    datasets.disable_progress_bars()
    return serve


def test_wikitext_from_the_hub(hub: Callable, tokenizer: Tokenizer) -> None:
    rows = ["" if line == " \n" else line for line in "".join(ARTICLES).splitlines(True)]
    calls = hub({"train": rows, "validation": rows, "test": rows})
    assert documents(load_tokens("wikitext-103", "train", tokenizer), tokenizer) == ARTICLES
    assert documents(load_tokens("wikitext-2", "test", tokenizer), tokenizer) == ARTICLES
    assert calls == [("Salesforce/wikitext", "wikitext-103-raw-v1"), ("Salesforce/wikitext", "wikitext-2-raw-v1")]


def test_any_hub_id(hub: Callable, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"row {i}\n two" for i in range(20)]
    calls = hub({"train": rows})
    found = {s: documents(load_tokens("some-one/a.set:de", s, tokenizer), tokenizer) for s in sources.SPLITS}
    assert (found["train"], found["validation"], found["test"]) == (rows[:18], rows[18:19], rows[19:])
    assert calls[0] == ("some-one/a.set", "de")
    monkeypatch.setattr("datasets.Dataset.cache_files", [])  # as when it was loaded into memory
    in_memory = load_tokens("some-one/a.set", "train", tokenizer)
    assert documents(in_memory, tokenizer) == rows[:18]
    hub({"train": [row + "!" for row in rows]})
    assert load_tokens("some-one/a.set", "train", tokenizer).fingerprint != in_memory.fingerprint
    with pytest.raises(ValueError, match="has no column 'body'; its columns are 'text', 'id'"):
        load_tokens("some-one/a.set", "train", tokenizer, column="body")
    with pytest.raises(ValueError, match="column 'id' holds a int"):
        load_tokens("some-one/a.set", "train", tokenizer, column="id")


def test_splits_of_the_hub_are_known_by_their_synonyms(hub: Callable, tokenizer: Tokenizer) -> None:
    rows = [f"row {i}" for i in range(40)]
    hub({"train": rows, "dev": ["a dev row"], "unsupervised": ["no label"]})
    found = {s: documents(load_tokens("some/set", s, tokenizer), tokenizer) for s in sources.SPLITS}
    assert found["validation"] == ["a dev row"] and found["test"] == rows[19::20]
    assert found["train"] == [row for i, row in enumerate(rows) if i % 20 != 19]
    assert sources.describe_source("some/set")[1:] == [
        "data: validation is that of 'some/set'",
        "data: test is held out of the training text",
        "data: left aside, other splits: 'unsupervised'",
    ]
    hub({"train": rows, "dev": ["a dev row"], "validation": ["the row"], "test": ["t"]})  # the exact name is meant
    assert documents(load_tokens("some/set", "validation", tokenizer), tokenizer) == ["the row"]
    assert sources.describe_source("some/set")[3:] == ["data: left aside, other splits: 'dev'"]
    hub({"train": rows, "dev": ["a dev row"], "eval": ["an eval row"]})
    with pytest.raises(ValueError, match="several splits that mean 'validation': 'dev', 'eval'; save the one"):
        sources.open_corpus("some/set", "train")


def test_empty_rows_of_the_hub_take_no_slot(hub: Callable, tokenizer: Tokenizer) -> None:
    rows = [f"row {i}" for i in range(40)]
    hub({"train": [x for row in rows for x in (row, "", None)]})
    found = {s: documents(load_tokens("some/set", s, tokenizer), tokenizer) for s in sources.SPLITS}
    assert found["validation"] == rows[18::20] and found["test"] == rows[19::20] and len(found["train"]) == 36
    hub({"train": ["one", "two"]})
    with pytest.raises(ValueError, match="test' holds no text; give more text, .* there are 2 rows with text"):
        sources.open_corpus("some/set", "test")


@pytest.mark.parametrize("source", ["wikitext-103", "some/set"])
def test_no_network_and_no_copy(
    source: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, private_cache: Path
) -> None:
    import datasets

    def no_network(*args: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(ValueError, match="ConnectionError: Couldn't reach.*hf download .* --repo-type dataset") as info:
        load_tokens(source, "train", tokenizer)
    assert ("FOLDER/wikitext-103-raw-v1" in str(info.value)) == (source == "wikitext-103")
    assert not private_cache.exists()


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.*give a file with text"),
        ("empty.jsonl", b"", "empty.*give a file with text"),
        ("blank.jsonl", b"\n\n", "holds no text"),
        ("latin.txt", b"caf\xc3\xa9 and caf\xe9.\n", "latin.txt' is not UTF-8: byte 0xe9 at byte offset 13 "),
        ("cut.txt", b"abc\n\xf0\x9f\x98", "not UTF-8: byte 0xf0 at byte offset 4 "),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "not UTF-8: byte 0xe9 at byte offset 24 "),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("list.jsonl", b'["a"]\n', "line 1: not a JSON object but list"),
        ("column.jsonl", b'{"body": "a", "id": 1}\n', "has no column 'text'; its columns are 'body', 'id': name the one"),
        ("number.jsonl", b'{"text": 5}\n', "column 'text' holds a int"),
        ("surrogate.jsonl", b'{"text": "a \\ud800"}\n', "lone surrogate, U.D800"),
        ("bad.parquet", b"not parquet", "not a readable parquet file"),
        ("text.pdf", b"%PDF", "suffix '.pdf'; it must be one of"),
    ],
)
def test_bad_files(
    name: str, content: bytes, message: str, tmp_path: Path, tokenizer: Tokenizer, private_cache: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokens(str(tmp_path / name), "train", tokenizer)
    assert not [p for p in private_cache.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_offset_of_bad_bytes_behind_the_first_block(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "BLOCK", 7)
    content = "\u00e9".encode() * 40 + b"\n"
    for bad_at in (30, 31, 43):  # a character stands across two blocks at 31
        broken = content[:bad_at] + b"\xff" + content[bad_at:]
        # A character cut in two by the bad byte is what is reported.
        first = bad_at - bad_at % 2
        (tmp_path / "t.txt").write_bytes(broken)
        with pytest.raises(ValueError, match=f"offset {first} "):
            load_tokens(str(tmp_path / "t.txt"), "train", tokenizer)


def test_bad_sources(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # whatever lies beside the repository
    for source in ("nope", str(tmp_path / "none.txt"), "./a/b.jsonl", "../x", "a/b/c", "data/none.txt", ""):
        with pytest.raises(ValueError, match="there is no data .*bundled.*wikitext-103.*owner/name"):
            load_tokens(source, "train", tokenizer)
    (tmp_path / "dir").mkdir()
    with pytest.raises(ValueError, match="holds no .txt/.jsonl/.parquet file"):
        load_tokens(str(tmp_path / "dir"), "train", tokenizer)
    (tmp_path / "dir" / "a.txt").write_text("a")
    (tmp_path / "dir" / "a.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="holds .jsonl and .txt files"):
        load_tokens(str(tmp_path / "dir"), "train", tokenizer)
    for split in ("valid", "dev", ""):
        with pytest.raises(ValueError, match=f"unknown split '{split}'; choose one of train, validation, test"):
            load_tokens("bundled", split, tokenizer)
    with pytest.raises(ValueError, match="num_proc=0"):
        load_tokens("bundled", "test", tokenizer, num_proc=0)


def test_folder_without_training_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("valid", "test"):
        (tmp_path / f"{name}.txt").write_text("text\n")
    assert documents(load_tokens(str(tmp_path), "test", tokenizer), tokenizer) == ["text\n"]
    with pytest.raises(ValueError, match="has no split 'train'; it has test, validation"):
        load_tokens(str(tmp_path), "train", tokenizer)
    (tmp_path / "more.txt").write_text("more\n")  # then it is the training text
    assert documents(load_tokens(str(tmp_path), "train", tokenizer), tokenizer) == ["more\n"]
    (tmp_path / "train.txt").write_text("text\n")  # now it is neither left out silently nor mixed in
    for split in sources.SPLITS:
        with pytest.raises(ValueError, match="splits test, train, validation, but the file 'more.txt' belongs to none"):
            load_tokens(str(tmp_path), split, tokenizer)


def test_text_too_short_to_divide(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "one.txt").write_text("one line only\n")
    assert documents(load_tokens(str(tmp_path / "one.txt"), "train", tokenizer), tokenizer) == ["one line only\n"]
    with pytest.raises(ValueError, match="holds no text; give more text, or a split of its own"):
        load_tokens(str(tmp_path / "one.txt"), "validation", tokenizer)
