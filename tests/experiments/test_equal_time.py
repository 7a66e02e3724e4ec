"""Figures at equal time: interpolated in the stored curve, by the processor's clock of the steps alone."""

import json
import time

import pytest
import torch

from comparisons import fit as fitting
from comparisons.equal_time import WORK, at_equal_time, figure_at, first_seen, told_step_time, until_reached
from comparisons.fit import fit, usual_step
from comparisons.report import report_time
from comparisons.results import Results

plain = lambda value: value


def run(seed=0, step_seconds=0.5, evaluations=((10, 40.0), (20, 60.0), (40, 90.0)), **more):
    steps = evaluations[-1][0]
    return {"seed": seed, "step_seconds": step_seconds, "evaluations": [list(point) for point in evaluations],
            "curve": [[steps, 1.0]], "lr": 1e-3, "alignment": [], "seconds": 99.0,
            "test": [{"depth": 1, "accuracy": evaluations[-1][1]}], **more}  # fmt: skip


def test_a_figure_at_a_time_is_interpolated_between_two_evaluations():
    assert [figure_at(run(), s, plain) for s in (5.0, 10.0, 12.5, 20.0)] == [40.0, 60.0, 67.5, 90.0]
    assert figure_at(run(), 4.9, plain) is None  # before the first evaluation nothing is known
    assert figure_at(run(), 20.1, plain) is None  # and nothing after the end
    perplexities = run(evaluations=((10, 100.0), (20, 25.0)))
    assert figure_at(perplexities, 7.5, plain, geometric=True) == pytest.approx(50.0)
    by_path = run(evaluations=((10, {"depth 3": 8.0}), (20, {"depth 3": 4.0})))
    assert figure_at(by_path, 7.5, lambda row: row.get("depth 3")) == 6.0
    assert figure_at(by_path, 7.5, lambda row: row.get("depth 7")) is None


def test_the_cheapest_method_sets_the_time_and_seeds_are_paired():
    """Sweeps cost half a step: they are through after 10 s, where BPTT is at step 20 of 40."""
    runs = {"bptt": [run(0), run(1, evaluations=((10, 42.0), (20, 64.0), (40, 94.0)))],
            "sweeps": [run(0, 0.25), run(1, 0.25)]}  # fmt: skip
    head, bptt, sweeps = at_equal_time(runs, "bptt", "accuracy", plain)
    assert "10.0 processor seconds" in head and "when sweeps was through" in head
    assert bptt.split() == ["bptt", "62", "±", "2.828"]
    assert "minus bptt's: +30.000, +26.000 (mean +28.000, 95% interval +2.588 to +53.412, p = 0.045)" in sweeps
    assert "step time / bptt's: 0.50, 0.50 (mean 0.50" in sweeps


def test_equal_work_counts_block_evaluations():
    """Sweeps cost 20 evaluations a step where backprop costs 10, whatever the seconds: at its end they are half through."""
    runs = {"backprop": [run(work=10.0), run(1, work=10.0)], "sweeps": [run(0, 0.01, work=20.0), run(1, 0.01, work=20.0)]}
    head, own, other = at_equal_time(runs, "backprop", "accuracy", plain, WORK)
    assert "at equal work, 400.0 block evaluations of training, when backprop was through" in head
    assert own.split()[:2] == ["backprop", "90"] and other.split()[:2] == ["sweeps", "60"]
    assert "minus backprop's: -30.000, -30.000" in other and "work of a step / backprop's: 2.00, 2.00" in other
    (line,) = at_equal_time({"bptt": [run()], "sweeps": [run(work=1.0)]}, "bptt", "accuracy", plain, WORK)
    assert line == "no work is stored of bptt: nothing at equal work"


def test_perplexities_are_compared_by_ratios_and_one_seed_is_called_that():
    runs = {"backprop-3": [run(evaluations=((10, 100.0), (20, 25.0)))], "sweeps": [run(0, 1.0, ((10, 100.0), (20, 25.0)))]}
    head, own, other = at_equal_time(runs, "backprop-3", "perplexity", plain)
    assert "when backprop-3 was through" in head and own.split() == ["backprop-3", "25.00"]
    assert "100.00; ratio to backprop-3: 4.000 (one seed); step time / backprop-3's: 2.00 (one seed)" in other


def test_time_until_the_reference_is_reached():
    runs = {"bptt": [run()], "fast": [run(0, 0.1, ((10, 70.0), (20, 89.5), (40, 89.6)))],
            "lost": [run(evaluations=((10, 33.0), (40, 35.0)))]}  # fmt: skip
    assert first_seen(runs["fast"][0], 89.0, plain) == 2.0 and first_seen(runs["lost"][0], 89.0, plain) is None
    head, bptt, fast, lost = until_reached(runs, "bptt", "accuracy", plain, 1.0)
    assert "within 1 of bptt's last" in head
    assert bptt.split()[1:3] == ["20.0;", "1.00"] and fast.split()[1:3] == ["2.0;", "0.10"]
    assert lost.endswith("not by 1 of 1 seeds")


def test_runs_without_the_processors_time_are_named_and_not_compared(stored_results):
    """The stored runs of before: their seconds are those of a machine that other jobs shared."""
    old = {k: v for k, v in run().items() if k != "step_seconds"}
    (line,) = at_equal_time({"bptt": [old], "sweeps": [run()]}, "bptt", "accuracy", plain)
    assert line == "no processor time is stored of bptt: nothing at equal time"
    assert told_step_time([old]) == "~2.4750" and told_step_time([run()]) == "0.5000"
    path = stored_results / "compare-rnn-copy-256-gru.json"
    runs: dict = {}
    for each in Results(path, json.loads(path.read_text())["setting"], "time").runs:
        runs.setdefault(each["method"], []).append(each)
    assert "no processor time is stored of these runs: nothing at equal time" in report_time(runs, "accuracy", "%")


def test_the_time_of_a_step_is_robust_and_keeps_dear_steps():
    assert usual_step([1.0] * 100 + [500.0] + [1.0] * 59) == 1.0  # what another job did to one step
    assert usual_step([1.0, 1.0, 1.0, 5.0] * 40) == pytest.approx(2.0)  # a random mix: each fourth step is dear
    assert usual_step([1.0, 3.0]) == 2.0 and usual_step([]) == 0.0


def test_the_training_steps_alone_are_timed_by_the_processors_clock(monkeypatch):
    """Neither batches, evaluations nor waiting counts; the arithmetic of a step does."""
    from test_fit import Line

    class Slow(Line):
        def forward(self, *args, **kwargs):
            begun = time.process_time()
            while time.process_time() - begun < 2e-3:
                pass
            time.sleep(4e-3)
            return super().forward(*args, **kwargs)

    def spin():
        begun = time.process_time()
        while time.process_time() - begun < 20e-3:
            pass

    line = Slow()
    fitted = fit(line, torch.optim.SGD(line.parameters(), lr=0.1), lambda step: spin() or (torch.zeros(()), None), 3,
                 evaluate=spin)  # fmt: skip
    assert 2e-3 <= fitted.step_seconds < 20e-3
    ticks = iter(range(1000))
    monkeypatch.setattr(fitting, "work_clock", lambda tensor: next(ticks) * 7.0)
    fitted = fit(line, torch.optim.SGD(line.parameters(), lr=0.1), lambda step: (torch.zeros(()), None), 3)
    assert fitted.step_seconds == 7.0
