"""The text of SymPy's source: divided by whole files, the same from every source, and refused where it is another."""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

import compare
from comparisons import code_text
from comparisons.code_text import SPLITS, code_folder, digest_of, divided, split_of

FILES = {f"sympy/part{i}.py": f"def f{i}(x):\n    return x + {i}\n".encode() * 20 for i in range(60)}
LICENCE = b"the licence\n"


@pytest.fixture()
def index(tmp_path, monkeypatch):
    """A package index in which SymPy has 60 files; how often it was asked. SymPy is not installed."""
    asked = []

    def pip(command, **options):
        asked.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "sympy-1.14.0-py3-none-any.whl", "w") as wheel:
            for name, data in {**FILES, "sympy/empty.py": b"", "other.py": b"no", "sympy/x.txt": b"no",
                               "sympy-1.14.0.dist-info/licenses/LICENSE": LICENCE}.items():  # fmt: skip
                wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(code_text.subprocess, "run", pip)
    monkeypatch.setattr(code_text, "_installed", dict)
    monkeypatch.setattr(code_text, "SHA256", digest_of(divided(FILES)))
    return asked


def test_every_file_is_whole_in_one_split_that_its_name_decides():
    parts = divided(dict(reversed(FILES.items())))
    assert parts == divided(FILES)
    rows = {split: [json.loads(line) for line in lines.splitlines()] for split, lines in parts.items()}
    assert {row["name"]: row["text"].encode() for found in rows.values() for row in found} == FILES
    assert all(split_of(row["name"]) == split for split, found in rows.items() for row in found)
    assert [row["name"] for row in rows["train"]] != sorted(row["name"] for row in rows["train"])  # a prefix is a sample


def test_shares_are_90_5_5():
    found = [split_of(f"sympy/module_{i}.py") for i in range(4000)]
    assert [found.count(split) / 4000 for split in SPLITS] == pytest.approx([0.90, 0.05, 0.05], abs=0.012)


def test_it_is_fetched_once_and_a_damaged_copy_again(index, tmp_path):
    folder = code_folder(tmp_path)
    assert folder.parent == tmp_path and (folder / "LICENSE").read_bytes() == LICENCE and len(index) == 1
    assert "sympy==1.14.0" in index[0] and "--no-deps" in index[0]
    assert code_folder(tmp_path) == folder and len(index) == 1
    (folder / "test.jsonl").write_text("{}\n")
    code_folder(tmp_path)
    digest = hashlib.sha256(b"".join((folder / f"{split}.jsonl").read_bytes() for split in SPLITS)).hexdigest()
    assert len(index) == 2 and digest == code_text.SHA256


def test_an_installed_copy_is_taken_only_if_it_is_the_very_text(index, tmp_path, monkeypatch):
    own = {**FILES, "sympy-1.14.0.dist-info/licenses/LICENSE": LICENCE}
    monkeypatch.setattr(code_text, "_installed", lambda: own)
    code_folder(tmp_path / "installed")
    assert index == []
    monkeypatch.setattr(code_text, "_installed", lambda: {**own, "sympy/part0.py": b"changed = True\n"})
    code_folder(tmp_path / "changed")
    assert len(index) == 1


def test_another_text_and_an_index_without_it_are_refused(index, tmp_path, monkeypatch):
    monkeypatch.setattr(code_text, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="SHA-256 is [0-9a-f]{64}, not 0{64}; take another index"):
        code_folder(tmp_path)
    fails = lambda command, **options: subprocess.CompletedProcess(command, 1, "", "ERROR: no such thing\n")
    monkeypatch.setattr(code_text.subprocess, "run", fails)
    with pytest.raises(ValueError, match="cannot download sympy==1.14.0: ERROR: no such thing; install that version"):
        code_folder(tmp_path)
    assert not list(tmp_path.iterdir())  # nothing that is wrong is kept


def test_the_comparison_reads_it_with_a_tokenizer_of_its_own(index, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "VOCAB_SIZE", 300)
    args = compare.parse(["--data", "code", "--cache", str(tmp_path), "--context-length", "16"])
    assert args.output.name == "compare-code.json" and compare.setting_of(args)["data"] == "code"
    assert compare.parse(["--data", "code", "--n-level", "2", "--quick"]).output.name == "compare-code-2-quick.json"
    assert compare.parse(["--data", "code", "--task", "recall"]).output.name == "compare-recall.json"
    task = compare.task_of(args)
    assert task.vocab_size == 300 and task.windows["test"].stream.n_bytes < task.windows["train"].stream.n_bytes
    assert {path.name for path in tmp_path.iterdir()} == {"code-sympy-1.14.0", "tokenizers", "tokens"}
    assert len(index) == 1
