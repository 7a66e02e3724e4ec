"""The benchmark of generation: a run at a tiny shape beside transformers, its report, its mistakes, the stored run."""

import json
import sys

import pytest

import bench_generation

FORMS = ["generate", "forward loop", *(f"depth {k}" for k in range(7, 0, -1))]
TINY = ["--widths", "32", "--batches", "1", "2", "--new-tokens", "3", "--prompt-tokens", "2", "--vocab-size", "20",
        "--repeats", "1"]  # fmt: skip


def rows_of(seconds):
    """A run in which each form took so many seconds, by the clock and of the processor."""
    return [{"width": 32, "batch": 1, "form": form, "seconds": 2 * s, "cpu_seconds": s, "tokens_per_second": 4 / s,
             "tokens_per_cpu_second": 8 / s} for form, s in zip(FORMS, seconds)]  # fmt: skip


def test_a_tiny_run_holds_every_form_and_is_reported_again(tmp_path, capsys):
    pytest.importorskip("transformers")
    output = tmp_path / "bench.json"
    rows = bench_generation.main([*TINY, "--output", str(output)])
    assert [(row["batch"], row["form"]) for row in rows] == [(batch, form) for batch in (1, 2) for form in FORMS]
    for row in rows:
        assert row["seconds"] > 0 and row["tokens_per_second"] == pytest.approx(row["batch"] * 3 / row["seconds"])
    stored = json.loads(output.read_text(encoding="utf-8"))
    assert stored["rows"] == rows and stored["setting"]["new_tokens"] == 3 and stored["setting"]["transformers"]
    said = capsys.readouterr().out
    assert bench_generation.main(["--report-only", "--output", str(output)]) == rows
    assert capsys.readouterr().out == said


def test_ratios_are_of_processor_seconds():
    rows = rows_of([6.0, 5.0, 2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.5])
    assert "depth 7 / transformers' generate: 3.00 (width 32, batch 1)" in bench_generation.report_line(rows)
    assert "cost of depth 1 in units of depth 7: 0.25" in bench_generation.report_line(rows)
    depth_7 = next(line for line in bench_generation.table(rows).splitlines() if "depth 7" in line)
    assert depth_7.split() == ["32", "1", "depth", "7", "2", "4", "3.00", "2.50"]


def test_without_transformers_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"transformers is not installed.*hbll-seq\[hf\].*--report-only"):
        bench_generation.main([*TINY, "--output", str(tmp_path / "x.json")])


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--repeats", "0"], "repeats=0.*at least 1"),
        (["--widths", "40"], "widths=40.*multiple of 32"),
        (["--batches", "2", "0"], "batches=0.*at least 1"),
        (["--report-only", "--output", "nowhere.json"], "no results file nowhere.json"),
    ],
)
def test_mistakes_are_named(argv, message):
    with pytest.raises(ValueError, match=message):
        bench_generation.main(argv)
