"""The file of results, and the choice of learning rates."""

import dataclasses

import pytest

from comparisons.depth_methods import DepthMethod
from comparisons.digits_table import error_rate, stored_files
from comparisons.results import Comparison, Results, StoredMethod, stored_setting, tune


def test_tuning_goes_past_the_edge_and_stops():
    assert tune(lambda lr: abs(lr - 4.5), [2, 4, 8]) == 4
    assert tune(lambda lr: abs(lr - 16), [1, 2, 4]) == 16
    assert tune(lambda lr: lr, [4, 8]) == 0.5  # three steps past the grid, and no further
    assert tune(lambda lr: lr, [4]) == 4
    assert tune(lambda lr: float("nan") if lr < 2 else abs(lr - 2), [1, 2, 4]) == 2


def test_a_shared_results_file_keeps_what_the_other_process_added(tmp_path):
    one, two = (Results(tmp_path / "r.json", {"a": 1}, "depth") for _ in range(2))
    one.add({"method": "tree", "lr": 1.0, "seed": 0})
    two.add({"method": "mix", "lr": 1.0, "seed": 0})
    assert [run["method"] for run in Results(tmp_path / "r.json", {"a": 1}, "depth").runs] == ["tree", "mix"]
    assert one.find("mix", 1.0, 0) is not None
    one.add({"method": "sweeps", "lr": 1.0, "seed": 0, "description": "K = 3"})
    assert one.find("sweeps", 1.0, 0, "K = 4") is None  # another default since then
    one.add({"method": "sweeps", "lr": 1.0, "seed": 0, "description": "K = 4"})
    assert [one.find("sweeps", 1.0, 0, f"K = {k}")["description"] for k in (3, 4)] == ["K = 3", "K = 4"]


@pytest.mark.parametrize("text", ['[{"objective": "tree"}]', "{}", "cut off {"])
def test_a_file_of_another_form_is_named(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    for read in (lambda path: Results(path, {"a": 1}, "depth"), stored_setting):
        with pytest.raises(ValueError, match="r.json holds no runs with their setting.*give another --output"):
            read(tmp_path / "r.json")
    Results(tmp_path / "s.json", {"mix": "all"}, "depth").add({"method": "tree", "lr": 1.0, "seed": 0})
    assert stored_setting(tmp_path / "s.json") == {"depth_mix": "all"}


def test_a_comparison_makes_what_is_missing_at_the_best_rate_and_finds_it_again(tmp_path):
    made = []

    def train(method, lr, seed):
        made.append((method.name, lr, seed))
        loss = abs(lr - {"tree": 2.0, "sweeps": 4.0}[method.name])
        return {"method": method.name, "description": method.description, "lr": lr, "seed": seed,
                "validation": [{"depth": 1, "loss": 9.0 - loss}, {"depth": 3, "loss": loss}]}  # fmt: skip

    methods = [DepthMethod.named(name) for name in ("tree", "sweeps")]
    results = Results(tmp_path / "r.json", {"a": 1}, "depth")
    comparison = Comparison(results, train)
    runs = comparison.at_rates(methods, lambda method: comparison.rate(method, [1.0, 2.0, 4.0, 8.0], 0), [0, 1])
    assert {name: [(run["lr"], run["seed"]) for run in found] for name, found in runs.items()} == {
        "tree": [(2.0, 0), (2.0, 1)], "sweeps": [(4.0, 0), (4.0, 1)]}  # fmt: skip
    assert made[-2:] == [("tree", 2.0, 1), ("sweeps", 4.0, 1)] and len(made) == 2 * 4 + 2
    stored = Comparison(results, None)
    found = stored.at_rates(methods, lambda method: stored.rate(method, [64.0], 0), [0, 1, 2])  # nothing is made
    assert found == runs and len(made) == 10
    own = dataclasses.replace(methods[0], lr=16.0)
    assert comparison.rate(own, [1.0, 2.0], 0) == 16.0
    with pytest.raises(ValueError, match="no run of sweeps:forward=9.*--report-only"):
        stored.at_rates([DepthMethod.named("sweeps:forward=9")], lambda method: stored.rate(method, [1.0], 0), [0])


def stored_runs(tmp_path, *rows):
    """A file of runs of sMNIST by (method, description, rate, seed, accuracy on the held-out sequences or None)."""
    setting = {"permutation_seed": 0, "cell": "gru", "n_steps": 4}
    results = Results(tmp_path / "psmnist-4-gru.json", setting, "time")
    for name, description, lr, seed, accuracy in rows:
        held_out = {} if accuracy is None else {"validation": {"deployed": accuracy}}
        results.add({"method": name, "description": description, "lr": lr, "seed": seed, **held_out})
    return results


def test_of_rates_that_are_as_good_the_methods_own_first_one_is_taken(tmp_path):
    """Not one that another seed, or the same name with older defaults, has tried before."""
    old, new = ("bptt", "as it was"), ("bptt", "as it is")
    results = stored_runs(tmp_path, (*old, 4.0, 0, None), (*new, 1.0, 0, None), (*new, 4.0, 1, None), (*new, 2.0, 0, None),
                          (*new, 4.0, 0, None), (*new, 1.0, 1, None))  # fmt: skip
    comparison = Comparison(results, None, error_rate)
    assert [comparison.stored_rate(StoredMethod(*which), 0) for which in (old, new)] == [4.0, 1.0]
    assert comparison.stored_rate(StoredMethod(*new), 1) == 4.0 and comparison.stored_rate(StoredMethod(*new), 2) is None
    (file,) = stored_files(tmp_path)  # the table's
    assert [(run["lr"], run["seed"], run["description"]) for run in file.runs["bptt"]] == [(1.0, 0, "as it is"),
                                                                                          (1.0, 1, "as it is")]  # fmt: skip


def test_the_table_takes_each_method_at_the_rate_that_its_own_first_seed_found_best(tmp_path):
    one, two = ("bptt", "B"), ("tree", "T")
    stored_runs(tmp_path, (*one, 1.0, 3, 80.0), (*one, 2.0, 3, 90.0), (*one, 4.0, 3, 85.0), (*two, 1.0, 1, 70.0),
                (*two, 2.0, 1, 60.0), (*one, 2.0, 0, 10.0), (*one, 1.0, 0, 99.0), (*two, 1.0, 3, 1.0),
                (*two, 2.0, 3, 95.0))  # fmt: skip
    (file,) = stored_files(tmp_path)
    assert list(file.runs) == ["bptt", "tree"]
    assert [(run["lr"], run["seed"]) for run in file.runs["bptt"]] == [(2.0, 0), (2.0, 3)]
    assert [(run["lr"], run["seed"]) for run in file.runs["tree"]] == [(1.0, 1), (1.0, 3)]
