"""The sequence classifier: what it reads, in which order, that it is saved and loaded as strictly as the language model."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hbll_seq import HBLLClassifierConfig, HBLLForCausalLM, HBLLForSequenceClassification, RecurrentLocalObjective
from hbll_seq.layers.cells import CELL_KINDS
from hbll_seq.models import hub
from hbll_seq.models.sequence_classification import fixed_order

CONFIG, WEIGHTS, _, CARD, SUMS, _ = hub.FILES
TINY = HBLLClassifierConfig(n_inputs=10, n_steps=4, n_classes=3, cell="gru", hidden_size=6, permutation_seed=0)


def model_of(config=TINY, seed=0):
    torch.manual_seed(seed)
    return HBLLForSequenceClassification(config).eval()


@pytest.fixture
def saved(tmp_path):
    """A folder of a model, to damage."""
    model_of().save_pretrained(tmp_path / "saved", data="digits", accuracy=98.5)
    return tmp_path / "saved"


# ---------------------------------------------------------------------------------------------------- what is read


def test_zeros_are_put_before_the_first_value():
    model = model_of(replace(TINY, permutation_seed=None))
    values = torch.arange(1.0, 11.0).repeat(2, 1)
    values[1] *= 10
    chunks, _ = model.prepare(values, torch.tensor([0, 1]))
    assert chunks[0].tolist() == [[0, 0, 1], [2, 3, 4], [5, 6, 7], [8, 9, 10]]  # 10 values in 4 steps of 3
    assert torch.equal(chunks[1], 10 * chunks[0])


@pytest.mark.parametrize("n_steps, shape", [(2, (2, 392)), (16, (16, 49)), (32, (32, 25)), (256, (256, 4)), (784, (784, 1))])
def test_images_are_cut_whether_the_steps_divide_them_or_not(n_steps, shape):
    model = model_of(HBLLClassifierConfig(n_steps=n_steps, hidden_size=2))
    values = torch.rand(3, 784)
    chunks = model.chunks(values)
    assert chunks.shape == (3, *shape) and model.cell.input_size == shape[1]
    read = chunks.flatten(1)
    assert torch.equal(read[:, -784:], values) and not read[:, :-784].any()


def test_the_order_is_a_fixed_permutation_of_all_values():
    order = fixed_order(784, 0)
    assert sorted(order) == list(range(784)) and order != sorted(order)
    assert order[:6] == [463, 735, 472, 674, 38, 63]  # a saved model is useless once this changes
    assert fixed_order(784, 1) != order and fixed_order(784, None) == list(range(784))
    values = torch.rand(2, 10)
    permuted = model_of().chunks(values).flatten(1)[:, 2:]
    assert torch.equal(permuted, values[:, fixed_order(10, 0)]) and not torch.equal(permuted, values)


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_logits_are_the_heads_of_the_last_state_of_the_plain_recurrence(kind):
    model = model_of(replace(TINY, cell=kind))
    values = torch.rand(5, 10)
    chunks, state = model.chunks(values), torch.zeros(5, 6)
    for t in range(4):
        state = model.cell.transition(state, model.cell.project(chunks[:, t]))
    expected = model.head(state)
    torch.testing.assert_close(model(values), expected)
    torch.testing.assert_close(model(chunks), expected)  # chunks are read as they are, in any number
    assert model(chunks[:, :2]).shape == (5, 3)
    assert torch.equal(model.predict(values, batch_size=2), expected.argmax(-1)) and not model.predict(values).requires_grad


def test_an_objective_takes_the_values_themselves():
    model = model_of()
    output = RecurrentLocalObjective(model, "sweeps:forward=3,backward=3")(torch.rand(2, 10), torch.tensor([0, 2]))
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(cell="lstm"), "cell='lstm': allowed are gru, mingru, elman"),
        (dict(n_steps=0), "n_steps=0: must be a whole number of at least 1"),
        (dict(n_steps=785), "n_steps=785 of n_inputs=784.*at most 784"),
        (dict(hidden_size=2.0), "hidden_size=2.0: must be a whole number"),
        (dict(n_classes=1), "n_classes=1: must be at least 2"),
        (dict(permutation_seed=-1), "permutation_seed=-1: must be a whole number of at least 0, or None"),
        (dict(permutation_seed=True), "permutation_seed=True"),
    ],
)
def test_configurations_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        HBLLClassifierConfig(**values)


def test_inputs_that_cannot_be_read_are_named():
    model = model_of()
    for x, message in (
        (torch.zeros(2, 9), r"inputs of shape \(2, 9\).*\[batch, 10\] values.*\[batch, steps, 3\] chunks"),
        (torch.zeros(2, 4, 4), r"inputs of shape \(2, 4, 4\)"),
        (torch.zeros(2, 0, 3), r"inputs of shape \(2, 0, 3\)"),
        (torch.zeros(2, 10, dtype=torch.uint8), r"torch.uint8.*floating point.*x.float\(\) / 255"),
    ):
        for read in (model, model.predict, lambda x: model.prepare(x, torch.tensor([0, 1]))):
            with pytest.raises(ValueError, match=message):
                read(x)
    for labels, message in (
        (None, "labels=None"),
        (torch.tensor([0]), r"labels of shape \(1,\) and torch.int64 .*\[2\]"),
        (torch.tensor([0.0, 1.0]), "torch.float32"),
        (torch.tensor([0, 3]), r"labels from 0 to 3.*0 .. 2.*n_classes"),
    ):
        with pytest.raises(ValueError, match=message):
            model.prepare(torch.zeros(2, 10), labels)
    with pytest.raises(ValueError, match="batch_size=0: must be a whole number of at least 1"):
        model.predict(torch.zeros(2, 10), batch_size=0)


# -------------------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_a_loaded_classifier_is_the_saved_one(tmp_path, kind):
    model = model_of(replace(TINY, cell=kind, permutation_seed=3))
    model.save_pretrained(tmp_path / "m")
    state = torch.get_rng_state()
    loaded = HBLLForSequenceClassification.from_pretrained(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.config == model.config and not loaded.training
    values = torch.rand(7, 10)
    assert torch.equal(loaded(values), model(values)) and torch.equal(loaded.predict(values), model.predict(values))
    assert {path.name for path in (tmp_path / "m").iterdir()} == {CONFIG, WEIGHTS, CARD, SUMS}
    half = model_of().bfloat16()
    half.save_pretrained(tmp_path / "half")
    assert HBLLForSequenceClassification.from_pretrained(tmp_path / "half")(values).dtype == torch.bfloat16


def edit_config(folder, **changes):
    config = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def edit_weights(folder, name, tensor):
    weights = {**load_file(folder / WEIGHTS), name: tensor}
    save_file({k: v for k, v in weights.items() if v is not None}, folder / WEIGHTS)


DAMAGE = {
    "missing weight": (lambda f: edit_weights(f, "cell.weight_hh", None), "lacks 'cell.weight_hh' of 6 weights"),
    "unexpected weight": (lambda f: edit_weights(f, "cell.other", torch.zeros(2)), "holds 'cell.other', which this"),
    "wrong shape": (lambda f: edit_weights(f, "head.bias", torch.zeros(1)), r"'head.bias' has shape \[1\].*\[3\]"),
    "unknown key": (lambda f: edit_config(f, hidden=6), "unknown config key 'hidden': known are n_inputs"),
    "missing key": (lambda f: edit_config(f, permutation_seed="gone"), "lacks 'permutation_seed'; add what"),
    "bad value": (lambda f: edit_config(f, cell="lstm"), "cell='lstm'"),
    "a language model": (lambda f: edit_config(f, model_type="hbll"), "model_type='hbll'.*for 'hbll-classifier' alone"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named(saved, damage, message):
    HBLLForSequenceClassification.from_pretrained(saved)
    (saved / SUMS).unlink()  # which would tell any of it, but not what it is
    damage(saved)
    with pytest.raises(ValueError, match=message):
        HBLLForSequenceClassification.from_pretrained(saved)


def test_the_two_models_are_not_taken_for_each_other(saved):
    with pytest.raises(ValueError, match=r"is for \['HBLLForSequenceClassification'\], not HBLLForCausalLM; use that class"):
        HBLLForCausalLM.from_pretrained(saved)


def test_the_card_tells_what_it_is_and_its_example_runs(saved, monkeypatch, capsys):
    card = (saved / CARD).read_text()
    n_parameters = sum(p.numel() for p in model_of().parameters())
    assert "library_name: hbll_seq" in card and "# HBLL sequence classifier" in card
    assert f"{n_parameters:,} parameters" in card
    assert "| permutation_seed | 0 |" in card and "| accuracy | 98.5 |" in card and "pipeline_tag" not in card
    monkeypatch.chdir(saved.parent)
    exec(compile(card.split("```python\n")[1].split("```")[0], "card", "exec"), {})
    assert capsys.readouterr().out.startswith("tensor([")


def test_it_is_pushed_in_one_commit(tmp_path, monkeypatch):
    uploads = []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path, **options):
            uploads.append((sorted(path.name for path in folder_path.iterdir()), (folder_path / CARD).read_text()))
            return "commit"

    monkeypatch.setattr(hub, "HfApi", Api)
    assert model_of().push_to_hub("me/digits") == "commit"
    ((names, card),) = uploads
    assert names == sorted([CONFIG, WEIGHTS, CARD, SUMS])
    assert 'HBLLForSequenceClassification.from_pretrained("me/digits")' in card
