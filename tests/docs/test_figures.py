"""The figures of the README's table are those of the stored results."""

import json
import re
from statistics import mean

import pytest
from pages import ROOT

ROWS = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("| ")]


def runs(name: str) -> list[dict]:
    return json.loads((ROOT / "train" / "results" / f"{name}.json").read_text("utf-8"))["runs"]


def of(name: str, method: str, lr: float, figure: str) -> list[float]:
    """A figure of the test split on the deepest path, by seed."""
    found = sorted((run for run in runs(name) if (run["side"], run["lr"]) == (method, lr)), key=lambda run: run["seed"])
    return [run["test"][figure] if isinstance(run["test"], dict) else run["test"][-1][figure] for run in found]


def row(beginning: str) -> str:
    (found,) = [line.replace("*", "") for line in ROWS if line.startswith(f"| {beginning}")]
    return found


def test_the_table_has_six_rows():
    assert len(ROWS) == 7  # and its heading


@pytest.mark.parametrize(
    "method, figure", [("backprop-7", "90.9"), ("sweeps:linearization=secant", "91.2"), ("sweeps", "92.7")]
)
def test_full_path_alone(method, figure):
    assert f"{mean(of('compare', method, 1.5e-3, 'perplexity')):.1f}" == figure and figure in row("full path alone")


def test_all_depths_with_the_same_mix():
    both = ("mix", "backprop-mix")
    for test in [run["test"] for run in runs("compare") if run["seed"] == 0 and run["side"] in both]:
        first, last = (test[i]["perplexity"] for i in (0, -1))
        assert f"{first:.2f}, {last:.2f}" in row("all depths from one model")


@pytest.mark.parametrize("method", ["bptt", "sweeps", "truncated:window=16"])
def test_gru_on_text(method):
    values = of("compare-rnn-bytes-gru", method, 4e-3, "bits")
    assert len(values) == 2 and ", ".join(f"{value:.3f}" for value in values) in row("GRU on text")


@pytest.mark.parametrize("method", ["bptt", "sweeps:sweeps=4,corrections=3,chunk=8,linearization=secant,init=state"])
def test_long_memory(method):
    values = of("psmnist-64-gru", method, 2e-3, "deployed")
    assert len(values) == 2 and ", ".join(f"{value:.1f}" for value in values) in row("long memory")


def test_seconds_and_work():
    points = json.loads((ROOT / "train" / "results" / "bench_rnn.json").read_text("utf-8"))["points"]
    by_batch = {point["batch_size"]: point["sides"] for point in points if point["steps"] == 256}
    text = row("seconds of a GRU step")
    default = next(name for name in by_batch[4] if re.fullmatch(r"sweeps(:.*)?", name) and "secant" not in name)
    ours, bptt = (1000 * by_batch[4][name]["processor"]["min"] for name in (default, "bptt"))
    assert f"{ours:.1f} ms" in text and f"{bptt:.1f} ms" in text
    speedup = by_batch[32]["bptt"]["processor"]["min"] / by_batch[32][default]["processor"]["min"]
    assert f"{speedup:.1f} times as fast at batch 32" in text
    text = row("work over depth")
    work = {run["side"]: run["work"] for run in runs("compare")}
    assert f"{work['sweeps']:.0f} block calls" in text and f"{work['backprop-7']:.0f} block calls" in text
