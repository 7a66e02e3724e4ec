"""Padded batches are their sequences alone, and steps without a target have no loss: every model and objective."""

import pytest
import torch
from helpers.language_models import small_lm
from torch import nn

from hbll_seq.chains.time_tree import RecurrentTree
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.models.recurrent import RecurrentLM, RecurrentModel
from hbll_seq.models.sequence_classification import HBLLClassifierConfig, HBLLForSequenceClassification
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import Sweeps, TimeTree, Tree, TreeGuess
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective, RecurrentLocalObjective

LENGTHS = [3, 7, 1, 7, 4]
SIDES = ("right", "left")


def tree():
    torch.manual_seed(3)
    return RecurrentTree("gru", 2, 6, 3).double()


OBJECTIVES = {
    "backprop": RecurrentBackpropObjective,
    "truncated": lambda m: RecurrentBackpropObjective(m, window=2),
    "zero": lambda m: RecurrentLocalObjective(m, Sweeps(7, 7, 1, "zero")),
    "zero, short": lambda m: RecurrentLocalObjective(m, Sweeps(1, 1, 1, "zero")),
    "diagonal": lambda m: RecurrentLocalObjective(m, Sweeps(7, 7, 1, "diagonal")),
    "diagonal, chunks": lambda m: RecurrentLocalObjective(m, Sweeps(7, 7, 3, "diagonal")),
    "shared matrix": lambda m: RecurrentLocalObjective(m, Sweeps(7, 7, 2, "shared_matrix")),
    "sweeps from the tree": lambda m: RecurrentLocalObjective(m, Sweeps(7, 7, init=TreeGuess(tree()))),
    "tree": lambda m: RecurrentLocalObjective(m, TimeTree(tree(), 2)),
    "tree alone": lambda m: RecurrentLocalObjective(m, TimeTree(tree(), 0)),
}


def classifier(cell="gru"):
    torch.manual_seed(0)
    config = HBLLClassifierConfig(n_inputs=14, n_steps=7, n_classes=3, cell=cell, hidden_size=6)
    return HBLLForSequenceClassification(config).double()


def batch(side, filler=float("nan")):
    """Chunks [5, 7, 2] padded on one side with what must not be read."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in LENGTHS]
    padded = torch.full((5, 7, 2), filler, dtype=torch.float64)
    for row, padding in zip(rows, padded):
        padding[: len(row)] = row
        if side == "left":
            padding.copy_(padding.roll(7 - len(row), 0))
    return rows, padded


def gradients(objective, loss):
    objective.zero_grad()
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in objective.parameters()]
    return found


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_padded_batch_is_the_mean_over_its_sequences(name, side):
    objective = OBJECTIVES[name](classifier())
    objective.eval()  # learned maps stay as they are
    rows, padded = batch(side)
    labels, states = torch.tensor([0, 2, 1, 0, 1]), 0.1 * torch.randn(5, 6, dtype=torch.float64)
    alone = [objective(row[None], labels[i : i + 1], state=states[i : i + 1]) for i, row in enumerate(rows)]
    expected = torch.stack([o.loss.detach() for o in alone]).mean()
    wanted = [sum(parts) / 5 for parts in zip(*(gradients(objective, o.loss) for o in alone))]
    together = objective(padded, labels, state=states, lengths=LENGTHS, padding_side=side)
    torch.testing.assert_close(together.loss.detach(), expected)
    torch.testing.assert_close(together.metrics["ce"], torch.stack([o.metrics["ce"] for o in alone]).mean())
    torch.testing.assert_close(together.state, torch.cat([o.state for o in alone]))
    for p, gradient, want in zip(objective.parameters(), gradients(objective, together.loss), wanted):
        assert (gradient - want).abs().max() < 1e-10 * (1 + want.abs().max()), tuple(p.shape)
    with torch.no_grad():
        torch.testing.assert_close(
            objective(padded, labels, state=states, lengths=LENGTHS, padding_side=side).metrics["ce"], together.metrics["ce"]
        )


@pytest.mark.parametrize("cell", ["gru", "mingru", "elman"])
@pytest.mark.parametrize("side", SIDES)
def test_the_classifier_reads_the_last_real_state(cell, side):
    model = classifier(cell)
    rows, padded = batch(side)
    expected = torch.cat([model(row[None]) for row in rows])
    torch.testing.assert_close(model(padded, LENGTHS, side), expected)
    found = model.predict(padded, batch_size=2, lengths=torch.tensor(LENGTHS), padding_side=side)
    assert torch.equal(found, expected.argmax(-1))
    whole = torch.randn(3, 7, 2)
    assert torch.equal(model(whole, [7, 7, 7]), model(whole))
    chunks, labels = model.prepare(padded, torch.zeros(5).long(), LENGTHS, side)
    assert torch.isfinite(chunks).all() and labels.tolist() == [0] * 5


def test_a_sequence_without_a_label_counts_for_nothing():
    rows, padded = batch("right")
    for name, make in OBJECTIVES.items():
        objective = make(classifier()).eval()
        some = objective(padded, torch.tensor([0, -100, 1, -100, 2]), lengths=LENGTHS).loss
        keep = [0, 2, 4]
        rest = objective(padded[keep], torch.tensor([0, 1, 2]), lengths=[LENGTHS[i] for i in keep]).loss
        torch.testing.assert_close(some, rest, msg=name)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if "tree" not in name])
def test_a_language_models_padding_is_as_labels_of_none(name, side):
    torch.manual_seed(0)
    model = RecurrentLM(17, make_cell("gru", 2, 6)).double()
    objective = OBJECTIVES[name](model).eval()
    tokens, lengths = torch.randint(17, (3, 8)), [8, 2, 5]
    labels = tokens.clone()
    for row, n in zip(labels, lengths):
        row[n:] = -100
    expected = objective(tokens, labels).loss
    padded = tokens.clone()
    for row, n in zip(padded, lengths):
        row[n:] = -7  # no id at all
        if side == "left":
            row.copy_(row.roll(8 - n))
    together = objective(padded, lengths=lengths, padding_side=side)
    torch.testing.assert_close(together.loss, expected)
    alone = [objective(row[None, :n]) for row, n in zip(tokens, lengths)]
    if name != "zero, short":
        torch.testing.assert_close(together.loss, sum(o.loss * (n - 1) for o, n in zip(alone, lengths)) / (sum(lengths) - 3))
    torch.testing.assert_close(together.state, torch.cat([o.state for o in alone]))
    want = gradients(objective, expected)
    for gradient, wanted in zip(gradients(objective, together.loss), want):
        torch.testing.assert_close(gradient, wanted)


def test_the_tree_over_time_takes_padded_language():
    torch.manual_seed(0)
    objective = RecurrentLocalObjective(RecurrentLM(17, make_cell("gru", 2, 6)).double(), TimeTree(tree(), 2))
    tokens, lengths = torch.randint(17, (4, 8)), [8, 2, 5, 5]
    alone = [objective(row[None, :n]).loss for row, n in zip(tokens, lengths)]
    together = objective(tokens, lengths=lengths).loss
    torch.testing.assert_close(together, sum(loss * (n - 1) for loss, n in zip(alone, lengths)) / (sum(lengths) - 4))


@pytest.mark.parametrize("readout", ["every", "last"])
@pytest.mark.parametrize("family", ["gaussian", "bernoulli"])
def test_vectors_as_targets(family, readout):
    torch.manual_seed(0)
    model = RecurrentModel(make_cell("gru", 2, 6), nn.Linear(6, 3), readout=readout, target_family=family).double()
    rows, padded = batch("left")
    targets = torch.full((5, 7, 3), float("nan"), dtype=torch.float64) if readout == "every" else torch.rand(5, 3).double()
    if readout == "every":
        for row, n in zip(targets, LENGTHS):
            row[7 - n :] = torch.rand(n, 3)
    exact = RecurrentLocalObjective(model, Sweeps(7, 7, 3, "diagonal"))
    for objective in (RecurrentBackpropObjective(model), exact):
        parts = targets if readout == "last" else [t[7 - n :] for t, n in zip(targets, LENGTHS)]
        losses = [objective(row[None], t[None]).loss for row, t in zip(rows, parts)]
        weights = LENGTHS if readout == "every" else [1] * 5
        expected = sum(w * loss for w, loss in zip(weights, losses)) / sum(weights)
        together = objective(padded, targets, lengths=LENGTHS, padding_side="left").loss
        torch.testing.assert_close(together, expected)
        for gradient, want in zip(gradients(objective, together), gradients(objective, expected)):
            torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize(
    "lengths, side, message",
    [
        ([3, 7, 1, 7], "right", "5 whole numbers"),
        ([3, 7, 1, 7, 0], "right", "from 1 to 7"),
        ([3, 7, 1, 7, 8], "right", "from 1 to 7"),
        ([3, 7, 1, 7, -1], "right", "from 1 to 7"),
        ([3, 7, 1, 7, 4.0], "right", "whole numbers"),
        ([3, 7, 1, 7, True], "right", "whole numbers"),
        (torch.tensor([3.0, 7, 1, 7, 4]), "right", "whole numbers"),
        (torch.tensor([[3, 7, 1, 7, 4]]), "right", "whole numbers"),
        (3, "right", "lengths=3"),
        ("37174", "right", "lengths='37174'"),
        (LENGTHS, "both", "padding_side='both'.*right, left"),
        (LENGTHS, None, "padding_side=None"),
        (None, "left", "padding_side='left' without lengths.*give lengths"),
        (None, "both", "padding_side='both'.*right, left"),
    ],
    ids=str,
)
def test_lengths_that_do_not_fit_are_named(lengths, side, message):
    model, padded = classifier(), batch("right")[1]
    options = dict(lengths=lengths, padding_side=side)
    for call in (lambda: model(padded, **options), lambda: model.predict(padded, **options),
                 lambda: RecurrentBackpropObjective(model)(padded, torch.zeros(5).long(), **options)):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_lengths_of_values_are_refused():
    with pytest.raises(ValueError, match="they count chunks"):
        classifier()(torch.randn(2, 14), [3, 4])
    with pytest.raises(ValueError, match="from 2 to 8"):
        RecurrentBackpropObjective(RecurrentLM(17, make_cell("gru", 2, 6)))(torch.randint(17, (2, 8)), lengths=[1, 8])


# --------------------------------------------------------------------------------------------------- nothing to score


def zero(objective, *arguments):
    objective.zero_grad()
    output = objective(*arguments)
    assert output.loss.item() == 0 and output.metrics["ce"].item() == 0
    output.loss.backward()
    return all(p.grad is None or not p.grad.any() for p in objective.parameters())


DEPTH = {
    "backprop": BackpropObjective,
    "backprop, mix": lambda m: BackpropObjective(m, depths="octaves"),
    "sweeps": lambda m: LocalObjective(m, "sweeps"),
    "sweeps, mix": lambda m: LocalObjective(m, "sweeps", depths="octaves"),
    "V-cycles": lambda m: LocalObjective(m, "v_cycles"),
    "tree": LocalObjective,
    "tree, samples": lambda m: LocalObjective(m, Tree(0.1, 2, free_energy=True)),
}


@pytest.mark.parametrize("name", DEPTH)
def test_labels_of_none_give_no_loss_over_depth(name):
    tokens = torch.randint(17, (2, 9))
    assert zero(DEPTH[name](small_lm()), tokens, torch.full_like(tokens, -100))
    plain = DepthHierarchy([nn.Linear(4, 4) for _ in range(7)], nn.Linear(4, 3))
    assert zero(DEPTH[name](plain), torch.randn(2, 4), torch.tensor([-100, -100]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_labels_of_none_give_no_loss_over_time(name):
    assert zero(OBJECTIVES[name](classifier()), torch.randn(2, 7, 2), torch.tensor([-100, -100]))
    tokens = torch.randint(17, (2, 8))
    assert zero(OBJECTIVES[name](RecurrentLM(17, make_cell("gru", 2, 6)).double()), tokens, torch.full_like(tokens, -100))
    assert zero(OBJECTIVES[name](classifier()), batch("right")[1], torch.full((5,), -100), 0, None, LENGTHS)


def test_labels_of_none_give_no_loss_in_the_model_itself():
    model, tokens = small_lm(), torch.randint(17, (2, 9))
    loss = model(tokens, labels=torch.full_like(tokens, -100)).loss
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    some = tokens.clone()
    some[:, 5:] = -100
    expected = torch.nn.functional.cross_entropy(model(tokens).logits[:, :4].flatten(0, 1), tokens[:, 1:5].flatten())
    torch.testing.assert_close(model(tokens, labels=some).loss, expected)
