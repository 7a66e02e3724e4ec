"""The figures of a run say what the data say: no lag, the right front, each node's own loss; the card shows what there is."""

import math

import kill_and_resume as kr
import pytest

from hbll_seq import HBLLConfig, HBLLForCausalLM
from hbll_seq.objectives.options import DepthMix, Sweeps
from hbll_seq.training import plots, tree_plots
from hbll_seq.training.run_record import PICTURES
from hbll_seq.training.tree_plots import exit_weights, losses_of_nodes, pareto_front, time_paths
from hbll_seq.tree.topology import DyadicTree


def crossing(curve):
    """The index from which on a falling curve is below one half."""
    return next(i for i, value in enumerate(curve) if value < 0.5)


@pytest.mark.parametrize("n, at", [(400, 200), (400, 60), (70, 35), (1000, 900)])
def test_the_smoothed_crossing_of_a_step_is_where_the_step_is(n, at):
    smoothed = plots.smooth([1.0] * at + [0.0] * (n - at))
    assert abs(crossing(smoothed) - at) <= 1
    assert sum(0.01 < value < 0.99 for value in smoothed) >= 2  # it does smooth


def test_smoothing_keeps_a_straight_line_up_to_both_ends_and_leaves_gaps():
    line = [3.0 - 0.01 * i for i in range(200)]
    assert plots.smooth(line) == pytest.approx(line)
    smoothed = plots.smooth([1.0, math.nan, 3.0, 3.0, 3.0])
    assert math.isnan(smoothed[1]) and smoothed[0] == 1.0 and smoothed[2] == 3.0
    assert plots.smooth([4.0] * 40 + [math.nan] + [4.0] * 40)[39] == 4.0
    assert plots.smooth([]) == [] and plots.smooth([2.0]) == [2.0]


def test_a_steep_beginning_is_not_smoothed_away():
    losses = [5.0 + 3.0 * math.exp(-i / 8) for i in range(400)]
    assert max(abs(a - b) for a, b in zip(plots.smooth(losses), losses)) < 0.05


def test_the_front_holds_what_no_other_beats_in_both():
    assert pareto_front([(3.0, 5.0), (1.0, 9.0), (2.0, 9.5), (4.0, 5.0), (2.5, 7.0)]) == [1, 4, 0]
    assert pareto_front([]) == [] and pareto_front([(1.0, 2.0), (1.0, 2.0)]) == [0]


def test_the_losses_of_the_nodes_are_those_of_the_end():
    rows = [{"node_losses": [9.0, 9.0, 9.0]}] * 18 + [{"node_losses": [1.0, 2.0, 3.0]}, {"node_losses": [3.0, 4.0, 5.0]}]
    assert losses_of_nodes(rows, [1.0, 1.0, 1.0]) == [2.0, 3.0, 4.0] and losses_of_nodes(rows, [0.0, 6.0, 1.0]) == [0, 0.5, 4]
    for odd in ([], [{"node_losses": [5.0]}], [{"node_losses": None}, {"node_losses": [1.0, None, 1.0]}]):
        assert losses_of_nodes(odd, [1.0] * 3) == []


@pytest.mark.parametrize("mix, auxiliary", [("octaves", 0.0), ("few", 0.0), ("none", 0.0), ("few", 3.0)])
def test_a_nodes_loss_is_that_of_the_predictions_after_it(lm_options, tmp_path, blank_figures, monkeypatch, mix, auxiliary):
    """At the start every prediction costs log V: the weights of the mix, and of auxiliary exits, are taken out."""
    options = ["--depth-mix", mix, "--n-level", "3", "--max-steps", "40", "--lr", "1e-9", "--sample-tokens", "0",
               "--auxiliary-exits", str(auxiliary), "--chunk-size", "2"]  # fmt: skip
    folder, drawn = tmp_path / "run", []
    monkeypatch.setattr("hbll_seq.training.export.plot_tree", lambda tree, losses, *args: drawn.append(losses))
    assert kr.load_script().main([*lm_options, *options, "--eval-every", "0", "--output-dir", str(folder)]) == 0
    tree = DyadicTree(3, "spine" if mix == "none" else "prefix")
    weights = exit_weights(DepthMix(mix), tree, Sweeps(chunk_size=2, auxiliary_exits=auxiliary))
    losses = losses_of_nodes(kr.lines(folder), weights, share=1.0)
    assert drawn == [losses_of_nodes(kr.lines(folder), weights)]
    assert [n for n in (2, 4, 6) if losses[n - 1]] == ([] if mix == "none" else [2, 4, 6] if auxiliary else [4, 6])
    few = 0.5 if mix == "few" else 0.01  # which draws its paths, here in 40 steps
    assert losses[6] == pytest.approx(math.log(4096), rel=0.01)
    assert all(loss == 0 or loss == pytest.approx(math.log(4096), rel=few) for loss in losses)


def test_lines_join_evaluations_of_the_same_text_alone():
    """The end reads more text than the run did: its loss is no turn of the curve."""

    def evaluation(step, loss, tokens):
        return {"step": step, "validation": [{"name": f"depth {k}", "loss": loss - k / 9, "tokens": tokens} for k in (1, 3)]}

    def drawn(evaluations):
        figure = plots.new_figure(7.0, 5.0)
        plots._training_curve(figure, [{"step": 1, "ce": 8.0, "lr": 0.1}, {"step": 40, "ce": 5.0, "lr": 0.0}], evaluations)
        lines = [line for line in figure.axes[0].lines if line.get_color() != "0.7" and len(line.get_xdata())]
        labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        return [(list(line.get_xdata()), line.get_linestyle() != "None") for line in lines[1:]], labels

    during = [evaluation(10, 7.0, 2048), evaluation(20, 6.5, 2048)]
    lines, labels = drawn([*during, evaluation(40, 6.6, 9999)])
    assert lines == [([10, 20], True), ([40], False)] * 2
    assert labels == ["training", "validation, depth 1", "validation, depth 3", "on 9,999 tokens (the lines: 2,048 tokens)"]
    lines, labels = drawn([*during, evaluation(40, 6.4, 2048)])
    assert lines == [([10, 20, 40], True)] * 2 and len(labels) == 3
    old = [{"step": step, "validation": [{"name": "depth 1", "loss": 5.0}]} for step in (1, 2)]  # without `tokens`
    assert drawn(old)[0] == [([1, 2], True)] and drawn([*during, *old])[1][-1].startswith("on other text")


def test_every_path_is_timed_and_longer_ones_take_longer():
    model = HBLLForCausalLM(HBLLConfig(vocab_size=64, n_level=4, n_embd=16, n_head=2, context_length=8)).train()
    found = time_paths(model, {"short": (8,), "long": tuple(range(1, 16))})
    assert list(found) == ["short", "long"] and all(value > 0 for value in found.values())
    assert model.training and all(block.training for block in model.blocks)


def test_a_slow_model_is_not_timed_to_the_end(monkeypatch):
    monkeypatch.setattr(tree_plots, "_MOST_SECONDS", -1.0)
    assert time_paths(HBLLForCausalLM(HBLLConfig(vocab_size=64, n_level=1, n_embd=8, n_head=2)), {"a": (1,)}) == {}


def test_figures_of_odd_data_are_drawn_without_a_word(tmp_path, capsys):
    row = {"name": "depth 1", "depth": 1, "perplexity": float("inf")}
    tree_plots.plot_tradeoff([row], {"depth 1": 2.0}, tmp_path / "a.png")
    tree_plots.plot_tradeoff([], {}, tmp_path / "b.png")
    tree_plots.plot_tree(DyadicTree(1), [0.0], "sweeps", tmp_path / "c.png")
    tree_plots.plot_tree(DyadicTree(6), [float(n % 5) for n in range(63)], "tree", tmp_path / "d.png")
    assert capsys.readouterr().err == "" and len(list(tmp_path.iterdir())) == 4


def test_a_run_leaves_its_pictures_and_the_card_shows_them(whole_run, tmp_path):
    for name in PICTURES:
        assert (whole_run / name).read_bytes().startswith(b"\x89PNG"), name
        assert f"]({name})" in (whole_run / "README.md").read_text()
    HBLLForCausalLM.from_pretrained(whole_run).save_pretrained(tmp_path / "copy")
    card = (tmp_path / "copy" / "README.md").read_text()
    assert ".png" not in card and "## Pictures" not in card and "## Training" in card and "\n\n\n" not in card
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "tree.png").write_bytes((whole_run / "tree.png").read_bytes())
    HBLLForCausalLM.from_pretrained(whole_run).save_pretrained(tmp_path / "some")
    card = (tmp_path / "some" / "README.md").read_text()
    assert "## Pictures\n\n![tree](tree.png)\n\n## Training" in card and "tradeoff" not in card


@pytest.mark.parametrize("pictures", ["a.png", ["../a.png"], ["a.svg"], [3]])
def test_a_card_takes_no_other_pictures(tmp_path, pictures):
    model = HBLLForCausalLM(HBLLConfig(vocab_size=64, n_level=1, n_embd=8, n_head=2))
    with pytest.raises(ValueError, match="pictures="):
        model.save_pretrained(tmp_path / "m", pictures=pictures)


def test_a_path_alone_has_no_tree(lm_options, tmp_path, blank_figures):
    options = ["--objective", "backprop", "--path", "2,3", "--max-steps", "2", "--sample-tokens", "0"]
    assert kr.load_script().main([*lm_options, *options, "--output-dir", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "tree.png").exists() and (tmp_path / "run" / "tradeoff.png").exists()
