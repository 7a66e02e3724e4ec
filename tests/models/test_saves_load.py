"""What save_pretrained writes loads again as equal tensors; what could not is refused before anything is written."""

import copy
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

from hbll_seq import HBLLClassifierConfig, HBLLConfig, HBLLForCausalLM, HBLLForSequenceClassification
from hbll_seq.models import hub
from hbll_seq.models.model_files import SUMS_NAME, WEIGHTS_NAME


def model_of(**changes):
    values = dict(vocab_size=40, n_level=2, n_embd=8, n_head=2, context_length=8)
    torch.manual_seed(0)
    model = HBLLForCausalLM(HBLLConfig(**{**values, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    return model.eval()


def made_on_meta(model):
    with torch.device("meta"):
        other = HBLLForCausalLM(model.config)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    return other


def with_(change, **config):
    model = model_of(**config)
    return change(model) or model


def compiled_block(model):
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")


def resized(model):
    model.embed = nn.Embedding(50, 8)
    model.head.projection.weight = model.embed.weight


def resized_alone(model):
    model.embed = nn.Embedding(50, 8)


def tied_by_hand(model):
    model.head.projection.weight = model.embed.weight


def tied_by_memory(model):
    model.head.projection.weight = nn.Parameter(model.embed.weight.detach())


def shared_blocks(model):
    model.blocks[1] = model.blocks[0]


def added_parameter(model):
    model.scale = nn.Parameter(torch.ones(3))


def added_buffer(model):
    model.blocks[0].register_buffer("seen", torch.zeros(2))


def one_of_another_dtype(model):
    model.blocks[1].to(torch.bfloat16)


def complex_weight(model):
    model.blocks[0].qkv.weight = nn.Parameter(model.blocks[0].qkv.weight.detach().to(torch.complex64))


def eighth(model):
    return model.to(torch.float8_e4m3fn)


def sparse(model):
    model.blocks[0].qkv.weight = nn.Parameter(model.blocks[0].qkv.weight.detach().to_sparse(), requires_grad=False)


def lost_module(model):
    model.blocks[2].mlp_out = nn.Identity()


def weight_norm(model):
    parametrizations.weight_norm(model.blocks[0].qkv)


def untied_by_copy(model):
    model.head.projection.weight = nn.Parameter(model.embed.weight.detach().clone())


def on_meta(model):
    return model.to("meta")


def wider_bias(model):
    model.head.norm = nn.LayerNorm(8)


REFUSED = {
    "made on meta": (made_on_meta, {}, "'head.projection.weight' is not tied to 'embed.weight'.*"
                                       "model.head.projection.weight = model.embed.weight"),
    "untied": (untied_by_copy, {}, "not tied to 'embed.weight'"),
    "untied, one memory": (tied_by_memory, {}, "not tied to 'embed.weight'"),
    "tied by hand": (tied_by_hand, dict(tie_embeddings=False), "'head.projection.weight' shares its memory with 'embed"),
    "one memory": (tied_by_memory, dict(tie_embeddings=False), "'head.projection.weight' shares its memory"),
    "compiled": (compiled_block, {}, "_orig_mod.*block.compile"),
    "resized": (resized, {}, r"'embed.weight' has shape \[50, 8\], but a model of this config has \[40, 8\].*vocab_size"),
    "resized and untied": (resized_alone, {}, r"'embed.weight' has shape \[50, 8\].*vocab_size"),
    "shared blocks": (shared_blocks, {}, "'blocks.1.*shares its memory with 'blocks.0.*copy.deepcopy"),
    "parameter": (added_parameter, {}, "it has 'scale', which a model of this config does not have"),
    "buffer": (added_buffer, {}, "it has 'blocks.0.seen'"),
    "dtype": (one_of_another_dtype, {}, r"is torch.bfloat16, but others are torch.float32.*model.to\(dtype\)"),
    "complex": (complex_weight, {}, "is torch.complex64, but must be like torch.float32"),
    "eighth": (eighth, {}, "is torch.float8_e4m3fn, but must be like torch.float32"),
    "sparse": (sparse, {}, "layout torch.sparse_coo, not a plain tensor"),
    "lost": (lost_module, {}, "it lacks 'blocks.2.mlp_out.weight'"),
    "weight norm": (weight_norm, {}, "parametrizations.*remove_parametrizations"),
    "meta": (on_meta, {}, "is on the meta device and has no values"),
    "another norm": (wider_bias, {}, "it has 'head.norm.bias'"),
}  # fmt: skip


@pytest.mark.parametrize("change, config, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_would_not_load_is_not_saved(tmp_path, change, config, message):
    model = with_(change, **config)
    with pytest.raises(ValueError, match=f"would not load again: .*{message}.*Nothing was written") as caught:
        model.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir()) and len(str(caught.value)) <= 500


def test_the_remedies_work(tmp_path):
    model = made_on_meta(model_of())
    model.head.projection.weight = model.embed.weight
    block = torch.compile(model.blocks[0], backend="eager")
    model.blocks[0] = block
    model.blocks[0] = model.blocks[0]._orig_mod
    model.blocks[1].compile(backend="eager")
    model.blocks[2] = copy.deepcopy(model.blocks[1])
    parametrizations.weight_norm(model.blocks[0].qkv)
    torch.nn.utils.parametrize.remove_parametrizations(model.blocks[0].qkv, "weight")
    assert_loads_equal(model, tmp_path / "m")


def assert_loads_equal(model, folder):
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    mine, its = model.state_dict(), loaded.state_dict()
    assert list(mine) == list(its)
    for name in mine:
        assert mine[name].dtype == its[name].dtype and torch.equal(mine[name].cpu(), its[name]), name
    return loaded


def transposed(model):
    for p in model.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()


def views_of_one_buffer(model):
    """As optimisers lay parameters out."""
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.data = part.view(p.shape)


def overlapping_views(model):
    flat = torch.randn(8 * 24 + 1)
    model.blocks[0].qkv.weight.data, model.blocks[1].qkv.weight.data = flat[:-1].view(24, 8), flat[1:].view(24, 8)


class Marked(torch.Tensor):
    """A subclass that changes nothing."""


def subclass_of_tensor(model):
    model.blocks[0].qkv.weight = nn.Parameter(model.blocks[0].qkv.weight.detach().as_subclass(Marked))


def frozen(model):
    model.blocks[0].requires_grad_(False)


def expanded(model):
    model.blocks[1].qkv.weight.data = torch.randn(1, 8).expand(24, 8)


def with_gradients(model):
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def persistent_hook(model):
    model.register_forward_hook(lambda *_: None)


CHANGES = [transposed, views_of_one_buffer, overlapping_views, subclass_of_tensor, frozen, expanded, with_gradients,
           persistent_hook]  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_saved_loads_as_equal_tensors(tmp_path, seed):
    rng = random.Random(seed)
    cells = ["transformer", "gru", ("mingru", "transformer", "elman")]
    config = dict(cell=rng.choice(cells), tie_embeddings=rng.random() < 0.5, exit_rank=rng.choice([0, 2]))
    model = model_of(**config, norm=rng.choice(["rmsnorm", "layernorm"]))
    for change in rng.sample(CHANGES, 3):
        if config["cell"] == "transformer" or change in (transposed, frozen, with_gradients):
            change(model)
    if rng.random() < 0.5:
        model.to(rng.choice([torch.bfloat16, torch.float16, torch.float64]))
    loaded = assert_loads_equal(model, tmp_path / "m")
    assert (loaded.head.projection.weight is loaded.embed.weight) == config["tie_embeddings"]
    assert_loads_equal(loaded, tmp_path / "m")


@pytest.mark.parametrize("change", CHANGES)
def test_odd_layouts_are_saved(tmp_path, change):
    assert_loads_equal(with_(change), tmp_path / "m")


def test_subclasses_of_the_model_are_saved(tmp_path):
    class More(HBLLForCausalLM):
        def __init__(self, config, tokenizer=None):
            super().__init__(config, tokenizer)
            self.extra = nn.Linear(8, 2)

    assert_loads_equal(More(model_of().config), tmp_path / "m")

    class Odd(HBLLForCausalLM):
        def __init__(self, config, size):
            super().__init__(config)

    with pytest.raises(ValueError, match=r"Odd cannot be saved: Odd\(config\), by which it is loaded again, fails.*defaults"):
        Odd(model_of().config, 3).save_pretrained(tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_classifiers_are_checked_too(tmp_path):
    model = HBLLForSequenceClassification(HBLLClassifierConfig(n_inputs=6, n_steps=3, n_classes=2, hidden_size=3))
    assert_loads_equal(model, tmp_path / "m")
    model.head = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"'head.weight' has shape \[4, 3\].*\[2, 3\]"):
        model.save_pretrained(tmp_path / "m")


@pytest.mark.parametrize("dtype, message", [
    (torch.bfloat16, "is torch.bfloat16, but others are torch.float32: all must have one dtype; use the config"),
    (torch.float64, "others are"), (torch.float8_e5m2, "F8_E5M2, but must be like"), (torch.bool, "torch.bool, but must be"),
])  # fmt: skip
def test_one_tensor_of_another_dtype_is_not_loaded(tmp_path, dtype, message):
    model_of().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / SUMS_NAME).unlink()
    weights = load_file(tmp_path / "m" / WEIGHTS_NAME)
    weights["blocks.1.qkv.weight"] = weights["blocks.1.qkv.weight"].to(dtype)
    save_file(weights, tmp_path / "m" / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=message):
        HBLLForCausalLM.from_pretrained(tmp_path / "m")


def test_a_long_list_of_trained_paths_loads_and_one_that_would_not_is_not_written(tmp_path, monkeypatch):
    model = model_of(n_level=5, trained_paths=[list(range(1, 32))] * 3500)
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").stat().st_size > 1 << 20
    assert HBLLForCausalLM.from_pretrained(tmp_path / "model").config == model.config
    monkeypatch.setattr(hub, "MAX_CONFIG", 1 << 20)
    with pytest.raises(ValueError, match="fewer trained_paths.*Nothing was written"):
        model.save_pretrained(tmp_path / "larger")
    assert not (tmp_path / "larger").exists()
