"""Steps timed by turns: one of each in a round, real training steps, stored for the report."""

import json

import pytest
import torch
from test_compare_rnn import TINY
from test_fit import Line

import compare_rnn
from comparisons import turns
from comparisons.results import Results
from comparisons.turns import WARM_UP, Training, seconds_by_turns, with_step_times


def training(name, seen, cost, carry=None):
    class Counted(Line):
        def forward(self, *args, **kwargs):
            seen.append((name, kwargs["step"], kwargs.get("state")))
            clock[0] += cost if kwargs["step"] >= WARM_UP else 1000.0
            return super().forward(*args, **kwargs)

    line = Counted()
    return Training(line, line, torch.optim.SGD(line.parameters(), lr=0.1), lambda s: (torch.zeros(()), None), 9.0, carry)


clock = [0.0]


def test_each_round_takes_a_step_of_each_and_the_first_rounds_do_not_count(monkeypatch):
    seen = []
    monkeypatch.setattr(turns, "work_clock", lambda tensor: clock[0])
    both = {"a": training("a", seen, 2.0), "b": training("b", seen, 3.0, carry="state")}
    assert seconds_by_turns(both, 25) == {"a": 2.0, "b": 3.0}
    assert [name for name, *_ in seen] == ["a", "b"] * (WARM_UP + 25)
    assert [state for name, _, state in seen if name == "b"][:3] == [None, 1, 2]  # carried on, as in a run
    assert both["a"].model.a.item() == pytest.approx(-0.1 * (WARM_UP + 25))  # whole steps, the optimizer's too
    with pytest.raises(ValueError, match="rounds=-1: must be at least 1"):
        seconds_by_turns(both, -1)


def test_times_by_turns_go_before_a_runs_own_only_if_every_method_has_one():
    runs = {"a": [{"description": "a {}", "step_seconds": 1.0}], "b": [{"description": "b {}"}]}
    assert with_step_times(runs, {"a {}": 5.0}) == runs
    found = with_step_times(runs, {"a {}": 5.0, "b {}": 7.0, "c {}": 9.0})
    assert [found[name][0]["step_seconds"] for name in "ab"] == [5.0, 7.0] and "step_seconds" not in runs["b"][0]


def test_the_script_stores_them_and_later_runs_keep_them(tmp_path, capsys):
    output = tmp_path / "r.json"
    argv = [*TINY, "--task", "copy-64", "--seeds", "0", "--output", str(output), "--methods", "bptt"]
    compare_rnn.main([*argv, "one-step", "--time-rounds", "2"])
    times = json.loads(output.read_text())["step_times"]
    assert list(times) == ["bptt {}", "one-step {}"] and min(times.values()) > 0
    shown = capsys.readouterr().out
    assert f"{times['bptt {}']:.4f}" in shown
    assert f"milliseconds of a step, taken by turns: bptt {{}} {1e3 * times['bptt {}']:.1f}; one-step {{}} " in shown
    compare_rnn.main([*argv, "--seeds", "1"])
    stored = json.loads(output.read_text())
    assert stored["step_times"] == times and len(stored["runs"]) == 3
    Results(output, stored["setting"], "time").add_step_times({"bptt {}": 1.0})
    assert json.loads(output.read_text())["step_times"] == {"bptt {}": 1.0}  # the others were not taken beside it
