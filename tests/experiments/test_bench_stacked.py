"""The benchmark of stacked rows: a run at tiny shapes, and its two forms doing the same."""

import json

import pytest
import torch

import bench_stacked

TINY = ["--widths", "8", "16", "--tokens", "3", "--batches", "1", "--rows", "2", "--n-head", "2", "--repeats", "1"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bench_stacked, "ENOUGH", 1e-4)
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


def test_writes_table_and_json(tmp_path, capsys):
    output = tmp_path / "new" / "stacked.json"
    rows = bench_stacked.main([*TINY, "--output", str(output)])
    stored = json.loads(output.read_text())
    assert stored["rows"] == rows and stored["setting"]["threads"] == 1
    assert [(row["width"], row["tokens"], row["batch"], row["rows"]) for row in rows] == [(8, 3, 1, 2), (16, 3, 1, 2)]
    for row in rows:
        for name in bench_stacked.TIMED:
            assert all(row[name][part] > 0 for part in ("loop", "stacked", "gain"))
            assert row[name]["gain"] == pytest.approx(row[name]["loop"] / row[name]["stacked"])  # of one round
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 + 1 and lines[2].split()[-1] == f"{rows[0]['step']['gain']:.2f}"


def test_quick_is_a_part_of_the_whole():
    args = bench_stacked.parse(["--quick"])
    whole = bench_stacked.parse([])
    for name in ("widths", "tokens", "batches", "rows"):
        assert set(getattr(args, name)) < set(getattr(whole, name))


def test_both_forms_compute_the_same_step():
    blocks = bench_stacked.blocks_of(3, tokens=4, width=8, n_head=2)
    states, upstream = torch.randn(2, 3, 2, 4, 8)
    found = []
    for kind in (bench_stacked.Loop, bench_stacked.Stacked):
        form = kind(blocks, states, upstream)
        bench_stacked.calls_of(form)["step"]()
        by_states = form.states[0].grad if len(form.states) == 1 else torch.stack([s.grad for s in form.states])
        found.append([by_states, *(p.grad.clone() for block in blocks for p in block.parameters())])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(g.abs().sum() > 0 for g in found[0])


def test_the_last_line_tells_what_the_rule_takes_and_leaves():
    rows = [{"width": width, "tokens": 8, "batch": 1, "rows": 2, "step": {"gain": gain}}
            for width, gain in ((32, 2.0), (64, 1.5), (100_000, 0.9))]  # fmt: skip
    assert bench_stacked.report_line(rows, "cpu") == ("2 of 3 settings are stacked: gain of a step 1.50 to 2.00; "
                                                      "1 of 3 settings are not: gain of a step 0.90 to 0.90")  # fmt: skip
    assert "are not" not in bench_stacked.report_line(rows[:2], "cpu")


def test_report_only_prints_what_is_stored(tmp_path, capsys):
    output = tmp_path / "stacked.json"
    rows = bench_stacked.main([*TINY, "--output", str(output)])
    printed, stored = capsys.readouterr().out, output.read_bytes()
    assert bench_stacked.main(["--report-only", "--output", str(output)]) == rows
    assert capsys.readouterr().out == printed and output.read_bytes() == stored
    with pytest.raises(ValueError, match="there is no results file .*leave --report-only out"):
        bench_stacked.main(["--report-only", "--output", str(tmp_path / "other.json")])


@pytest.mark.parametrize("argv, message", [
    (["--rows", "0"], r"rows=\[0\]: must be at least 1"),
    (["--widths", "12", "--n-head", "4"], "width=12 with n_head=4: heads must have an even width"),
])  # fmt: skip
def test_refuses(argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bench_stacked.main([*TINY, *argv, "--output", str(tmp_path / "stacked.json")])
    assert not list(tmp_path.iterdir())
