"""The rehearsal of the large preset: real files, a real run, and the estimate's arithmetic."""

import json

import pyarrow.parquet
import pytest

import rehearse


def test_a_quick_rehearsal(tmp_path, capsys):
    output = tmp_path / "rehearse.json"
    found = rehearse.main(["--quick", "--steps", "2", "--threads", "1", "--objectives", "tree", "--output", str(output)])
    row = found["objectives"]["tree"]
    assert json.loads(output.read_text()) == found
    assert len(row["nats_a_token"]) == 2 and row["nats_a_token"][0] == pytest.approx(5.99, abs=0.1)
    assert 0.1 < row["peak_memory_gib"] < 4 and min(row["seconds_a_step"]) > 0
    assert "an H100: 10 epochs in" in capsys.readouterr().out


def test_the_files_are_those_of_the_hub(tmp_path):
    counts = rehearse.write_rows(tmp_path, 11, 9)
    names = {path.name for path in (tmp_path / rehearse.NAME).iterdir()}
    assert counts == {"train": 11, "validation": 9, "test": 9}
    assert names == {"train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet",
                     "test-00000-of-00001.parquet"}  # fmt: skip
    parts = [pyarrow.parquet.read_table(tmp_path / rehearse.NAME / f"train-0000{k}-of-00002.parquet") for k in (0, 1)]
    rows = [row for part in parts for row in part["text"].to_pylist()]
    assert len(rows) == 11 and "" in rows and all(row == "" or row.endswith("\n") for row in rows)


def test_hours():
    assert rehearse.hours(103_227_021 * 1.17 * 10 / 3600) == pytest.approx(1.0)
    assert rehearse.hours(1000.0, 8) == pytest.approx(rehearse.hours(1000.0) / 8)


def test_a_failed_run_says_what_it_printed(tmp_path):
    with pytest.raises(RuntimeError, match="ended with 2: .*--no-such"):
        rehearse.run([rehearse.sys.executable, str(rehearse.ROOT / "train" / "lm.py"), "--no-such"], tmp_path / "log")


@pytest.mark.parametrize("option", ["steps", "threads"])
def test_mistakes_are_named(option):
    with pytest.raises(ValueError, match=f"{option}=0"):
        rehearse.main([f"--{option}", "0"])
