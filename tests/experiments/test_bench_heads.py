"""The benchmark of the heads runs, and its file holds what it prints."""

import json

import pytest

import bench_heads


def test_a_small_run(tmp_path, capsys):
    output = tmp_path / "bench.json"
    sizes = "--exits 1 3 --n-embd 8 --vocab-size 20 --batch-size 2 --context-length 4 --repeats 2".split()
    rows = bench_heads.main([*sizes, "--output", str(output)])["rows"]
    assert json.loads(output.read_text())["rows"] == rows
    forms = [("one by one", "torch's"), ("together", "torch's"), ("one by one", "fast"), ("together", "fast")]
    assert [(row["exits"], row["form"], row["products"]) for row in rows] == [(n, *form) for n in (1, 3) for form in forms]
    assert all(row["ms"] > 0 for row in rows)
    assert capsys.readouterr().out.count(" ms") == len(rows)


@pytest.mark.parametrize("options", [["--exits", "8"], ["--repeats", "0"]])
def test_mistakes_are_named(options):
    with pytest.raises(ValueError, match=f"{options[0][2:]}="):
        bench_heads.main(options)
