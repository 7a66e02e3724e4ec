"""The table of the paper's tables: no empty cell, figures of ours that are stored, and figures of theirs that are printed."""

import json
import re
import sys

import pytest
from pages import ROOT

sys.path.insert(0, str(ROOT / "train" / "experiments"))
from comparisons import paper  # noqa: E402
from comparisons.digits_table import stored_files  # noqa: E402
from comparisons.mlp import last  # noqa: E402
from comparisons.report import paired  # noqa: E402
from comparisons.results import Results, deepest_loss, stored_setting  # noqa: E402
from comparisons.statistics import mean, told, told_paired  # noqa: E402
from comparisons.words import current_points  # noqa: E402
from mnist_mlp import networks_of, parse, stored_comparison  # noqa: E402

RESULTS = ROOT / "train" / "results"
LINES = (ROOT / "docs" / "reproduce.md").read_text("utf-8").splitlines()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if line.startswith("| ")]
HEADINGS, ROWS = ROWS[0], ROWS[1:]
OURS, THEIRS, STATUS = (HEADINGS.index(name) for name in ("our figure", "the paper's figure", "status"))


def row(beginning: str) -> list[str]:
    (found,) = [cells for cells in ROWS if cells[0].startswith(beginning)]
    return found


def seeds(runs: list) -> str:
    return {1: "one seed", 2: "two seeds", 3: "three seeds"}[len(runs)]


def test_no_cell_is_empty_and_a_figure_that_is_missing_has_its_reason():
    assert len(HEADINGS) == 8 and len(ROWS) > 15
    for cells in ROWS:
        assert len(cells) == 8 and all(len(cell) > 1 for cell in cells), cells[0]
        assert re.search(r"\d", cells[OURS]) or re.match(r"not run: .{10}", cells[OURS]), cells[0]
        assert re.match(r"(holds|in part|does not hold|not run)\b", cells[STATUS]), cells[0]
        assert cells[OURS].startswith("not run") == cells[STATUS].startswith("not run"), cells[0]


@pytest.mark.parametrize("n_blocks", paper.LANGUAGE)
def test_language_model_by_path(n_blocks):
    path = RESULTS / "compare-tree-1000.json"
    results = Results(path, stored_setting(path), "depth")
    figures = []
    for name in ("tree", f"backprop-{n_blocks}"):
        own = [run for run in results.runs if run["method"] == name]
        best = min((run for run in own if run["seed"] == 0), key=deepest_loss)["lr"]
        at_best = [run["test"] for run in own if run["lr"] == best]
        figures.append([row_["perplexity"] for test in at_best for row_ in test if row_["depth"] == n_blocks])
    tree, backprop = map(mean, figures)
    cells = row(f"language model, WikiText-103, {n_blocks} block")
    assert cells[OURS] == f"{tree:.2f} / {backprop:.2f} = {tree / backprop:.3f} ({seeds(figures[0])})"
    backprop, tree = paper.LANGUAGE[n_blocks]
    assert cells[THEIRS] == f"{tree:.2f} / {backprop:.2f} = {tree / backprop:.3f}"
    assert f"{sum(run['seconds'] for run in results.runs) / 60:.0f}" in cells[2]


@pytest.mark.parametrize("name", ["psmnist-16-gru-tuned", "psmnist-64-gru-tuned"])
def test_digits_over_time(name):
    (file,) = [file for file in stored_files(RESULTS) if file.name == name]
    permuted, cell, n = file.task
    def cell_of(method: str, read: str) -> str:
        values = [run["test"][read] for run in file.runs[method]]
        return told(values) + (" (one seed)" if len(values) == 1 else "")

    tree = "tree:consistency=4"
    parts = cell_of(tree, "deployed"), cell_of(tree, "tree"), cell_of("bptt", "deployed")
    cells = row(f"permuted MNIST over time, GRU, N = {n} ")
    assert cells[OURS] == f"{' / '.join(parts)}; sweeps {cell_of('sweeps', 'deployed')}"
    assert cells[THEIRS] == " / ".join(f"{value:.1f}" for value in paper.DIGITS_OVER_TIME[cell, permuted][n])
    runs = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["runs"]
    assert cells[2].startswith(f"{sum(run['seconds'] for run in runs) / 60:.0f}")


def test_every_n_of_digits_over_time_has_the_papers_figures():
    names = {("gru", False): "MNIST over time, GRU", ("elman", False): "MNIST over time, Elman",
             ("gru", True): "permuted MNIST over time, GRU", ("elman", True): "permuted MNIST over time, Elman"}  # fmt: skip
    for task, figures in paper.DIGITS_OVER_TIME.items():
        told_here = ", ".join(cells[THEIRS] for cells in ROWS if cells[0].startswith(names[task]))
        for values in figures.values():
            assert all(f"{value:.1f}" in told_here for value in values)


def test_speed_over_n():
    points = json.loads((RESULTS / "bench_rnn.json").read_text("utf-8"))["points"]
    by_size = {(p["steps"], p["batch_size"]): p["methods"] for p in current_points(points)}

    def ratios(method: str, batch: int, sizes) -> str:
        times = (by_size[n, batch] for n in sizes)
        return ", ".join(f"{t['bptt']['processor']['min'] / t[method]['processor']['min']:.2f}" for t in times)

    sizes = list(paper.SPEEDUP)
    tree = row("speed of a training step over N")
    assert tree[OURS] == f"batch 128: {ratios('tree:consistency=4', 128, sizes)}; batch 4: " \
                         f"{ratios('tree:consistency=4', 4, sizes)}"  # fmt: skip
    assert tree[THEIRS] == ", ".join(f"{value:g}" for value in paper.SPEEDUP.values())
    ours = "sweeps:forward=1,backward=1,linearization=zero,chunk_size=8"
    assert row("the same by sweeps")[OURS] == f"batch 4: {ratios(ours, 4, sizes)}"


#: of the MLPs: the weight of the losses on states was chosen on the validation images
TREE = "tree:state_weight=0.001"


def mlp_runs() -> tuple[list[dict], dict[tuple[int, int], dict[str, list[dict]]]]:
    """All stored runs, and those of each network by method at the rate that its first seed found best."""
    args = parse(["--report-only"])
    comparison = stored_comparison(args)
    held = networks_of(args, comparison.results.runs)
    rate = lambda method: comparison.stored_rate(method, 0)
    runs = {network: comparison.at_rates(methods, rate, (0, 1, 2)) for network, methods in held.items()}
    return comparison.results.runs, runs


def test_sigmoid_mlps():
    stored, runs = mlp_runs()
    minutes = sum(run["seconds"] for run in stored) / 60
    for (layers, units), (backprop, tree) in paper.MLP.items():
        cells = row(f"MNIST MLP, {layers} layers of {units} units")
        assert cells[THEIRS] == f"{tree:.2f} / {backprop:.2f}"
        of_network = runs.get((layers, units), {})
        name = TREE if TREE in of_network else "tree"  # the second where the first has no run of that network
        if not {name, "backprop"} <= of_network.keys():
            assert cells[OURS].startswith("not run")
            continue
        figures = [told([run["test"][str(layers - 1)] for run in of_network[name]]) for name in (name, "backprop")]
        weight = "" if name == TREE else ", weight of states 0.1"
        assert cells[OURS] == f"{' / '.join(figures)} ({seeds(of_network[name])}{weight})"
        assert cells[2].startswith(f"{minutes:.0f}")


def test_sigmoid_mlps_in_the_results():
    """Every network and method that is stored has its row, whose figures are the stored ones."""
    text = (ROOT / "docs" / "results.md").read_text("utf-8")
    section = text[text.index("## 12. ") : text.index("## 13. ")].replace("*", "")
    for (layers, units), of_network in mlp_runs()[1].items():
        for name, of_method in of_network.items():
            depths = (str(depth) for depth in (layers - 1, layers.bit_length() - 1, 1))
            figures = [told([run["test"][depth] for run in of_method if depth in run["test"]]) for depth in depths]
            backprop = of_network.get("backprop", ())
            pairs = paired(of_method, backprop, lambda run, other: last(run["test"]) - last(other["test"]))
            beside = told_paired(pairs, "+.2f") if name != "backprop" and pairs else "-"
            cells = [f"{layers}", f"{units}", f"`{name}`", f"{of_method[0]['lr']:g}", f"{len(of_method)}", *figures, beside]
            assert f"| {' | '.join(cells)} |" in section


@pytest.mark.parametrize("depth", paper.IMAGES["CIFAR-10"])
def test_images_by_depth(depth):
    cells = row(f"CIFAR-10, {depth} block")
    tree, backprop = (accuracy("cifar-10", method, depth) for method in ("tree", f"backprop-{depth}"))
    assert cells[OURS] == f"{tree:.2f} / {backprop:.2f} (one seed)"
    backprop, tree = paper.IMAGES["CIFAR-10"][depth]
    assert cells[THEIRS] == f"{tree:.2f} / {backprop:.2f}"


HARMED = [
    (0.5, "of the input missing", paper.MISSING, "cifar-10-missing-0.5"),
    (0.2, "of the labels wrong", paper.WRONG, "cifar-10-wrong-0.2"),
]


@pytest.mark.parametrize("share, kind, table, name", HARMED)
def test_harmed_images(share, kind, table, name):
    cells = row(f"CIFAR-10, {share:.0%} {kind}")
    told = [f"{accuracy(name, 'tree', n):.2f} / {accuracy(name, f'backprop-{n}', n):.2f}" for n in (7, 3)]
    mix = ", 3 blocks ".join(f"{accuracy(name, 'mix', n):.2f}" for n in (7, 3))
    assert cells[OURS] == f"{told[0]}; 3 blocks {told[1]}; sweeps with a mix {mix} (one seed)"
    assert accuracy(name, "mix", 7) > accuracy(name, "backprop-7", 7)
    backprop, tree = table[share]
    assert cells[THEIRS] == f"{tree:.2f} / {backprop:.2f}"


def accuracy(name: str, method: str, depth: int) -> float:
    runs = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["runs"]
    (run,) = [run for run in runs if run["method"] == method]
    return next(row_["accuracy"] for row_ in run["test"] if row_["depth"] == depth)
