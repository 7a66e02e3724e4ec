"""``info`` of every kind of model: the figures are the library's, and a kind that it cannot describe is named."""

import json
import shutil

import pytest
import torch

from hbll_seq import HBLLClassifierConfig, HBLLForImageClassification, HBLLForSequenceClassification, HBLLImageConfig
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.model_files import CONFIG_NAME, FILES, WEIGHTS_NAME
from hbll_seq.utils.integrity import SUMS_NAME

TREE = """\
tree (8 is the head), and the path of each depth
  level 0                    4
  level 1            2               6
  level 2        1       3       5       7

  depth 1    0---------------4---------------8
  depth 2    0-------2-------4---------------8
  depth 3    0---1---2-------4---------------8
"""
SEQUENCES = HBLLClassifierConfig(n_inputs=10, n_steps=4, n_classes=3, hidden_size=6, permutation_seed=5)
IMAGES = HBLLImageConfig(image_size=8, patch_size=2, n_channels=1, n_classes=3, n_embd=16, n_head=2, exit_rank=2,
                         exit_by="depth", class_names=("ant", "bee", "cow"), trained_paths=((4,), (4, 6)))  # fmt: skip


def saved(model, folder):
    model.save_pretrained(folder)
    return model


@pytest.fixture
def sequences(tmp_path):
    torch.manual_seed(0)
    return saved(HBLLForSequenceClassification(SEQUENCES), tmp_path / "sequences")


@pytest.fixture
def images(tmp_path):
    torch.manual_seed(0)
    return saved(HBLLForImageClassification(IMAGES), tmp_path / "images")


def size_of(model):
    return sum(p.numel() for p in model.parameters())


def table_of(folder, config):
    """The lines of the files and of the configuration."""
    files = [name for name in FILES if (folder / name).exists()]
    return (f"files in {folder}\n" + "".join(f"  {name:<18} {(folder / name).stat().st_size:>12,} bytes\n" for name in files)
            + "\nconfiguration\n" + "".join(f"  {name:<18} {value}\n" for name, value in config.to_dict().items()))


def test_a_language_model_to_the_letter(cli, lm):
    model = HBLLForCausalLM.from_pretrained(lm)
    assert cli("info", lm).startswith(
        f"model          {lm} (HBLLForCausalLM)\n"
        f"parameters     {size_of(model):,} ({4 * size_of(model) / 1e6:.1f} MB of float32)\n"
        "blocks         7, which 25 paths run\n"
        "trained paths  every dyadic path, 1 to 7 blocks\n"
        f"tokenizer      {model.tokenizer.vocab_size:,} pieces\n\n" + table_of(lm, model.config) + "\n" + TREE
    )
    assert list(cli.json("info", lm)) == ["model", "folder", "class", "parameters", "bytes", "dtype", "blocks",
        "dyadic_paths", "trained_paths", "tokenizer_pieces", "files", "config", "depths"]  # fmt: skip


def test_a_classifier_of_sequences(cli, sequences, tmp_path):
    folder, n = tmp_path / "sequences", size_of(sequences)
    assert cli("info", folder) == (
        f"model          {folder} (HBLLForSequenceClassification)\n"
        "kind           sequence classifier\n"
        f"parameters     {n:,} (0.0 MB of float32)\n"
        "cell           gru\n"
        "blocks         1, the cell: every step runs it, and there is no other depth\n"
        "width          6\n"
        "sequences      10 values in 4 steps of 3, in a fixed order of their own\n"
        "classes        3\n\n" + table_of(folder, sequences.config)
    )
    told = cli.json("info", folder)
    assert told["class"] == "HBLLForSequenceClassification" and told["kind"] == "sequence classifier"
    assert (told["cell"], told["blocks"], told["width"], told["parameters"], told["bytes"]) == ("gru", 1, 6, n, 4 * n)
    assert (told["values"], told["steps"], told["step_size"], told["classes"]) == (10, 4, 3, 3)
    assert told["folder"] == str(folder) and told["files"][WEIGHTS_NAME] == (folder / WEIGHTS_NAME).stat().st_size
    assert told["config"] == sequences.config.to_dict() and "depths" not in told


def test_values_that_come_in_their_own_order(cli, tmp_path):
    config = HBLLClassifierConfig(n_inputs=6, n_steps=6, n_classes=2, cell="mingru", hidden_size=4)
    saved(HBLLForSequenceClassification(config), tmp_path / "plain")
    shown = cli("info", tmp_path / "plain")
    assert "\nsequences      6 values in 6 steps of 1\n" in shown and "\ncell           mingru\n" in shown


def test_a_classifier_of_images(cli, images, tmp_path):
    folder, n = tmp_path / "images", size_of(images)
    shown = cli("info", folder)
    assert shown.startswith(
        f"model          {folder} (HBLLForImageClassification)\n"
        "kind           image classifier\n"
        f"parameters     {n:,} ({4 * n / 1e6:.1f} MB of float32)\n"
        "cell           transformer\n"
        "blocks         7, which 25 paths run\n"
        "width          16\n"
        "trained paths  1 blocks [4], 2 blocks [4, 6]\n"
        "images         8 x 8 pixels of 1 channel, in 16 patches of 2 x 2\n"
        "classes        3: 'ant', 'bee', 'cow'\n\n" + table_of(folder, images.config)
    )
    assert "the path of each depth (* not trained)\n" in shown and "\n  depth 1    0---------------4---" in shown
    assert "\n  depth 7 *  0---1---2---3---4---5---6---7---8\n" in shown
    told = cli.json("info", folder)
    assert told["class"] == "HBLLForImageClassification" and told["kind"] == "image classifier"
    assert (told["cell"], told["blocks"], told["dyadic_paths"], told["width"]) == ("transformer", 7, 25, 16)
    assert (told["image_size"], told["channels"], told["patch_size"], told["classes"]) == (8, 1, 2, 3)
    assert told["class_names"] == ["ant", "bee", "cow"] and told["config"] == json.loads(json.dumps(images.config.to_dict()))
    assert [(row["depth"], row["trained"]) for row in told["depths"]] == [(k, k <= 2) for k in range(1, 8)]
    assert [row["parameters"] for row in told["depths"]] == [images.n_parameters(row["path"]) for row in told["depths"]]


def test_parameters_of_a_path_are_those_that_it_touches(images):
    """Counted by what the gradient reaches: embedding, the path's blocks, its exit's correction and the head."""
    for p in images.parameters():
        p.data.normal_()
    for path in images.tree.paths():
        images.zero_grad(set_to_none=True)
        images(torch.rand(2, 1, 8, 8), path=path).square().sum().backward()
        touched = 0
        for name, p in images.named_parameters():
            if p.grad is not None:
                rows = p.grad.flatten(1).any(1) if name.startswith("exits.") else None
                touched += p.numel() if rows is None else int(rows.sum()) * p[0].numel()
        assert images.n_parameters(path) == touched


# -------------------------------------------------------------------------------------------------------- other kinds


def edit(folder, **changes):
    values = json.loads((folder / CONFIG_NAME).read_text()) | changes
    (folder / CONFIG_NAME).write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    (folder / SUMS_NAME).unlink(missing_ok=True)


@pytest.mark.parametrize("changes, kind", [
    (dict(architectures=["GPT2LMHeadModel"], model_type="gpt2"), "['GPT2LMHeadModel']"),
    (dict(architectures=["MyLM"]), "['MyLM']"),
    (dict(architectures=None, model_type="gpt2"), "'gpt2'"),
    (dict(architectures=["HBLLForCausalLM", "MyLM"]), "['HBLLForCausalLM', 'MyLM']"),
    (dict(architectures="HBLLForCausalLM"), "'HBLLForCausalLM'"),
    (dict(architectures=None, model_type=7), "7"),
])  # fmt: skip
def test_a_kind_that_it_cannot_describe_is_named(cli, lm, tmp_path, changes, kind):
    folder = shutil.copytree(lm, tmp_path / "other")
    edit(folder, **changes)
    said = cli("info", folder, code=2)
    assert f"{CONFIG_NAME} is for {kind}: info describes HBLLForCausalLM, HBLLForSequenceClassification and " in said
    assert "HBLLForImageClassification" in said and "or load it by the class that wrote it" in said
    assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("name", ["lm", "sequences", "images"])
def test_without_architectures_the_model_type_tells(cli, lm, sequences, images, tmp_path, name):
    folder = shutil.copytree(lm, tmp_path / "lm") if name == "lm" else tmp_path / name
    told = cli.json("info", folder)
    edit(folder, architectures=None)
    again = cli.json("info", folder)
    assert again["class"] == told["class"] and again["config"] == told["config"]
    if name == "lm":  # one of before, with neither
        edit(folder, model_type=None)
        assert cli.json("info", folder)["class"] == "HBLLForCausalLM"


def test_what_cannot_be_read_is_told_by_loading(cli, sequences, tmp_path):
    folder = tmp_path / "sequences"
    (folder / SUMS_NAME).unlink()
    (folder / CONFIG_NAME).write_text("{")
    assert "config.json is not valid JSON" in cli("info", folder, code=2)
    (folder / CONFIG_NAME).unlink()
    assert "has no config.json" in cli("info", folder, code=2)


def test_the_version_that_counts_is_described(cli, images, tmp_path):
    """A save that was cut short left the older model in its own folder; the files beside it are of another kind."""
    from hbll_seq.utils.atomic import PINNED

    folder = tmp_path / "images"
    shutil.copytree(folder, tmp_path / "old")
    saved(HBLLForSequenceClassification(SEQUENCES), folder)
    (tmp_path / "old").rename(folder / PINNED)
    assert cli.json("info", folder)["kind"] == "image classifier"
