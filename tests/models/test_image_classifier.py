"""The image classifier: exact sweeps are backprop, every depth classifies, what was saved loads, refusals name the cause."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from hbll_seq import (
    BackpropObjective,
    HBLLForCausalLM,
    HBLLForImageClassification,
    HBLLImageConfig,
    LocalObjective,
    Sweeps,
    Tree,
)
from hbll_seq.models import hub

CONFIG, WEIGHTS, _, CARD, SUMS, _ = hub.FILES
TINY = HBLLImageConfig(image_size=8, n_classes=5, n_embd=16, n_head=2, pixel_mean=(0.4, 0.5, 0.6), pixel_std=0.2)
poolings = pytest.mark.parametrize("pooling", ["mean", "token"])


def model_of(config=TINY, seed=0, scale=0.1):
    """A model whose blocks do something: new ones are the identity."""
    torch.manual_seed(seed)
    model = HBLLForImageClassification(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model.eval()


def batch_of(n=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 8, 8, generator=generator, dtype=dtype), torch.randint(5, (n,), generator=generator)


def gradients(objective, inputs, labels):
    objective.model.zero_grad()
    objective(inputs, labels, step=3).loss.backward()
    return [p.grad for p in objective.model.parameters()]


def furthest(ours, exact):
    return max((a - b).abs().max().item() for a, b in zip(ours, exact, strict=True))


# ------------------------------------------------------------------------------------------------------------- training


@poolings
@pytest.mark.parametrize("depths", ["none", "octaves"])
@pytest.mark.parametrize(
    "sweeps", [Sweeps(), Sweeps(6, 6, 1), Sweeps(3, 3, 2, linearization="zero")], ids=["default", "blocks", "segments"]
)
def test_exact_sweeps_have_backprops_gradient(pooling, depths, sweeps):
    config = replace(TINY, pooling=pooling, default_paths="prefix", exit_rank=2)
    model, data = model_of(config).double(), batch_of()
    exact = gradients(BackpropObjective(model, depths=depths), *data)
    assert all(g.abs().max() > 1e-6 for g in exact if g is not None)
    assert furthest(gradients(LocalObjective(model, sweeps, depths=depths), *data), exact) < 1e-9


def test_fewer_iterations_are_not_backprop():
    """Five of each are enough, the first block being exact from the start (init="first")."""
    model, data = model_of().double(), batch_of()
    exact = gradients(BackpropObjective(model), *data)
    for sweeps in (Sweeps(4, 5, 1), Sweeps(5, 4, 1)):
        assert furthest(gradients(LocalObjective(model, sweeps), *data), exact) > 1e-6


@pytest.mark.parametrize("inference", [Tree(sigma=0.0), Tree(sigma=0.0, clean_inputs=False)], ids=["clean", "to the letter"])
def test_the_paper_s_tree_trains_every_block_and_says_its_losses(inference):
    model, (inputs, labels) = model_of().double(), batch_of()
    objective = LocalObjective(model, inference)
    output = objective(inputs, labels, step=0)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    nats = nn.functional.cross_entropy(model(inputs, (4,)), labels)
    torch.testing.assert_close(output.metrics["ce_1"], nats)


def test_a_few_steps_learn_at_every_depth():
    model, (inputs, labels) = model_of(replace(TINY, n_level=2)), batch_of(16, torch.float32)
    objective = LocalObjective(model, "sweeps", depths="octaves")
    optimizer = torch.optim.AdamW(objective.trained_parameters(), lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        objective(inputs, labels, step=step).loss.backward()
        optimizer.step()
    for depth in (1, 2, 3):
        assert torch.equal(model.predict(inputs, depth=depth), labels)


# ----------------------------------------------------------------------------------------------------------------- depth


@poolings
def test_every_depth_is_the_network_of_its_blocks(pooling):
    model, (inputs, _) = model_of(replace(TINY, pooling=pooling)), batch_of(dtype=torch.float32)
    seen = []
    for depth in range(1, 8):
        path = model.tree.path_for_depth(depth)
        state = model.embed(inputs)
        for n in path:
            state, _ = model.blocks[n - 1](state)
        expected = model.head(state)
        torch.testing.assert_close(model(inputs, path=path), expected)
        assert torch.equal(model.predict(inputs, depth=depth, batch_size=3), expected.argmax(-1))
        assert torch.equal(model.predict(inputs, path=path), expected.argmax(-1))
        seen.append(expected)
    assert all(not torch.allclose(a, b) for a, b in zip(seen, seen[1:]))
    assert torch.equal(model(inputs), model(inputs, tuple(range(1, 8))))


@torch.no_grad()
def test_the_last_patch_reaches_the_first_state_through_one_block():
    model, (inputs, _) = model_of(), batch_of(1, torch.float32)
    changed = inputs.clone()
    changed[..., 4:, 4:] = 1 - changed[..., 4:, 4:]
    states = [model.blocks[3](model.embed(x))[0][0, 0] for x in (inputs, changed)]
    assert (states[0] - states[1]).abs().max() > 1e-5


def test_predicting_leaves_the_model_in_training_and_drops_nothing():
    model, (inputs, _) = model_of(replace(TINY, dropout=0.5)), batch_of(dtype=torch.float32)
    expected = model.predict(inputs)
    model.train()
    assert torch.equal(model.predict(inputs), expected) and model.training and not expected.requires_grad


# -------------------------------------------------------------------------------------------------- what a model reads


def test_bytes_are_read_as_what_they_stand_for():
    model = model_of()
    raw = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(model(raw), model(raw.float() / 255))
    inputs, labels = model.prepare(raw, torch.tensor([0, -100, 4], dtype=torch.int32))
    assert inputs.dtype == torch.float32 and labels.dtype == torch.int64


def test_inputs_that_cannot_be_read_are_named():
    model, (inputs, labels) = model_of(), batch_of(2, torch.float32)
    for x, message in (
        (inputs[0], r"inputs of shape \(3, 8, 8\): must be images \[batch, 3, 8, 8\].*inputs\[None\]"),
        (inputs.permute(0, 2, 3, 1), r"inputs of shape \(2, 8, 8, 3\).*channels come first: inputs.permute\(0, 3, 1, 2\)"),
        (inputs[:, :1], r"inputs of shape \(2, 1, 8, 8\).*resize them, or make a model"),
        (inputs[:0], r"inputs of shape \(0, 3, 8, 8\)"),
        (inputs.long(), r"torch.int64.*of floating point, 0 to 1, or of uint8, 0 to 255: inputs.to\(torch.uint8\)"),
        (inputs > 0.5, r"torch.bool: must be of floating point, 0 to 1, or of uint8"),
        (255 * inputs, r"inputs from .* to 25\d.*pixels must be of 0 to 1; divide those of 0 to 255 by 255"),
        ((inputs - 0.5) / 0.2, r"leave normalising to the model"),
        (inputs * float("nan"), r"inputs from nan to nan"),
        ([[0.5]], r"inputs=\[\[0.5\]\]: must be a tensor"),
    ):
        for read in (model, model.predict, lambda x: model.prepare(x, labels), lambda x: LocalObjective(model)(x, labels)):
            with pytest.raises(ValueError, match=message):
                read(x)
    for wrong, message in (
        (None, "labels=None: this model needs the class of every image"),
        (labels[:1], r"labels of shape \(1,\) and torch.int64 .*\[2\]"),
        (labels.float(), "torch.float32"),
        (labels + 5, "labels from .*0 .. 4"),
    ):
        with pytest.raises(ValueError, match=message):
            model.prepare(inputs, wrong)
    for options, message in (
        (dict(depth=8), "depth=8: a model with n_level=3 runs 1 to 7 blocks"),
        (dict(path=(3, 4)), r"path=\[3, 4\]: the step 0 -> 3"),
        (dict(depth=1, path=(4,)), "are both given"),
        (dict(batch_size=0), "batch_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(inputs, **options)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(image_size=30), r"image_size=30 is not divisible by patch_size=4: choose patch_size from \[1, 2, 3, 5"),
        (dict(n_head=3), r"n_embd=128 is not divisible by n_head=3: choose n_head from \[1, 2, 4"),
        (dict(n_classes=1), "n_classes=1: must be at least 2"),
        (dict(n_channels=0), "n_channels=0: must be a whole number of at least 1"),
        (dict(n_level=11), "n_level=11.*at most 10"),
        (dict(pooling="max"), "pooling='max': allowed are mean, token"),
        (dict(pixel_mean=(0.5, 0.5)), r"pixel_mean=\(0.5, 0.5\): must be a number in .*n_channels=3"),
        (dict(pixel_mean=128), "pixel_mean=128"),
        (dict(pixel_mean="0.5"), "pixel_mean='0.5'"),
        (dict(pixel_mean=(0.5, None, 0.5)), "pixel_mean="),
        (dict(pixel_std=0.0), "pixel_std=0.0"),
        (dict(pixel_std=(0.2, "x", 0.2)), "pixel_std="),
        (dict(class_names=("a", "b")), "class_names=.*n_classes=10"),
        (dict(trained_paths=[[1, 4]]), "trained_paths: path=.*0 -> 1|trained_paths"),
        (dict(dropout=1.0), r"dropout=1.0: must be a number in \[0, 1\)"),
        (dict(qk_norm=1), "qk_norm=1"),
        (dict(exit_by="depth"), "exit_by='depth' with exit_rank=0: there is no exit adapter"),
        (dict(default_paths="x"), "default_paths='x'"),
    ],
)
def test_configurations_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        HBLLImageConfig(**values)


# --------------------------------------------------------------------------------------------------------- as a folder


@poolings
def test_what_was_saved_loads_bit_for_bit(tmp_path, pooling):
    names = ("cat", "dog", "emu", "fox", "gnu")
    config = replace(TINY, pooling=pooling, exit_rank=3, trained_paths="default", class_names=names, qk_norm=True)
    model, (inputs, _) = model_of(config), batch_of(dtype=torch.float32)
    model.save_pretrained(tmp_path / "m", data="animals", accuracy=87.5)
    loaded = HBLLForImageClassification.from_pretrained(tmp_path / "m")
    assert loaded.config == config and not loaded.training
    for depth in (1, 3, 7):
        path = model.tree.path_for_depth(depth)
        assert torch.equal(loaded(inputs, path), model(inputs, path))  # normalising too: nothing else is needed
    card, told = (tmp_path / "m" / CARD).read_text(), json.loads((tmp_path / "m" / CONFIG).read_text())
    for text in ("pipeline_tag: image-classification", "HBLLForImageClassification.from_pretrained", "depth=3", "animals",
                 "87.5", "Trained paths: the default path of every depth"):  # fmt: skip
        assert text in card
    assert told["model_type"] == "hbll-image-classifier" and told["class_names"] == list(names)
    half = HBLLForImageClassification.from_pretrained(tmp_path / "m", dtype="bfloat16")
    assert half(inputs).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_are_read_as_they_were_saved(tmp_path, dtype):
    model, (inputs, _) = model_of(replace(TINY, pixel_mean=(0.1, 0.2, 0.3))).to(dtype), batch_of(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = HBLLForImageClassification.from_pretrained(tmp_path)
    for given in (inputs, (255 * inputs).byte()):
        assert loaded(given).dtype == dtype and torch.equal(loaded(given), model(given))


def test_a_folder_is_read_by_its_own_class_and_whole(tmp_path):
    model_of().save_pretrained(tmp_path)
    (tmp_path / SUMS).unlink()
    with pytest.raises(ValueError, match="HBLLForImageClassification.*not HBLLForCausalLM; use that class"):
        HBLLForCausalLM.from_pretrained(tmp_path)
    told = json.loads((tmp_path / CONFIG).read_text())
    del told["pooling"]  # the default would fit the weights, and be another model
    (tmp_path / CONFIG).write_text(json.dumps(told))
    with pytest.raises(ValueError, match="lacks 'pooling'"):
        HBLLForImageClassification.from_pretrained(tmp_path)


def test_a_path_that_was_not_trained_warns():
    inputs, _ = batch_of(1, torch.float32)
    model = model_of(replace(TINY, trained_paths=((4,), (4, 6))))
    model.predict(inputs, depth=2)  # a warning would be an error here
    with pytest.warns(UserWarning, match=r"depth 3 \(path \[4, 6, 7\]\).*was not trained.*trained: 1 blocks \[4\], 2 blocks"):
        model.predict(inputs, depth=3)


def test_trained_paths_are_those_of_the_objective():
    model = model_of()
    for inference, depths, trained in (("tree", "none", "all"), ("sweeps", "octaves", "default"), ("sweeps", "none", None)):
        paths = LocalObjective(model, inference, depths=depths).trained_paths()
        config = replace(model.config, trained_paths=paths)
        assert config.is_trained((4, 6)) == (trained is not None) and config.is_trained(tuple(range(1, 8)))
