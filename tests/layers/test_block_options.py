"""Grouped-query attention, SwiGLU and QK-norm: one function in two forms, backprop in the limit, wrong values named."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.language_models import check_cached_logits, model_of, small_lm
from helpers.path_cache import PathCache

from hbll_seq.generation.runner import Runner
from hbll_seq.layers.attention import TransformerBlock, attention, rotate, rotation
from hbll_seq.layers.recurrent_block import RecurrentBlock
from hbll_seq.layers.residual import hidden_width
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import Sweeps, Tree
from hbll_seq.training.devices import check_memory
from hbll_seq.training.settings import TrainingSettings

OPTIONS = {
    "one pair of keys and values": dict(n_head=4, n_kv_head=1),
    "two groups": dict(n_head=4, n_kv_head=2),
    "swiglu": dict(mlp="swiglu"),
    "qk-norm": dict(qk_norm=True),
    "all": dict(n_head=4, n_kv_head=2, mlp="swiglu", qk_norm=True),
    "all, mixed cells": dict(cell=("gru", "transformer", "mingru", "transformer", "elman", "transformer", "gru"), n_head=4,
                             n_kv_head=2, mlp="swiglu", qk_norm=True),
    "a GRU with swiglu": dict(cell="gru", mlp="swiglu"),
}  # fmt: skip
BLOCKS = {name: options for name, options in OPTIONS.items() if "cell" not in options}
options_of_all = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
options_of_blocks = pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)


def block_of(options, window=12):
    torch.manual_seed(0)
    block = TransformerBlock(16, window=window, **{"n_head": 2, **options})
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(0.3 * torch.randn_like(p) + (p.dim() == 1))
    return block


def ids_of(batch, length):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------ one function


@options_of_blocks
@pytest.mark.parametrize("length", [1, 5, 12, 13, 40])
@torch.no_grad()
def test_step_is_forward(options, length):
    """One token at a time, in chunks and at once; beyond the window (12) too, and with rows of different padding."""
    block, x = block_of(options), torch.randn(3, length, 16)
    for start in (None, torch.tensor([0, 2, 4])):
        whole, _ = block(x, block.initial_state(start))
        state, steps = block.initial_state(start), []
        for t in range(length):
            y, state = block.step(x[:, t], state)
            steps.append(y)
        torch.testing.assert_close(torch.stack(steps, 1), whole, atol=1e-5, rtol=0)
        state, chunks = block.initial_state(start), []
        for chunk in x.split(5, dim=1):
            y, state = block(chunk, state)
            chunks.append(y)
        torch.testing.assert_close(torch.cat(chunks, 1), whole, atol=1e-5, rtol=0)
        assert state.keys.shape == state.values.shape == (3, block.n_kv_head, min(length, 11), 16 // block.n_head)


@options_of_blocks
@torch.no_grad()
def test_padding_changes_nothing_and_the_window_ends(options):
    block, x = block_of(options, window=4), torch.randn(1, 9, 16)
    alone, _ = block(x)
    padded, _ = block(torch.cat((torch.randn(1, 3, 16), x), dim=1), block.initial_state(torch.tensor([3])))
    torch.testing.assert_close(padded[:, 3:], alone, atol=1e-5, rtol=0)
    changed = x.clone()
    changed[:, 2] += 1
    moved = (block(changed)[0] - alone).abs().amax((0, 2))
    assert moved[:2].max() == 0 and moved[2:6].min() > 1e-4 and moved[6:].max() < 1e-6


@options_of_all
@pytest.mark.parametrize("path", [(4,), (2, 4, 6), (1, 2, 3, 4, 5, 6, 7)], ids=str)
@torch.no_grad()
def test_cached_logits_equal_the_full_forward(options, path):
    check_cached_logits(model_of(**options), ids_of(2, 30), path)


@options_of_all
@torch.no_grad()
def test_a_runner_reads_the_same(options):
    """Its buffers and prepared weights; with padding, past the window, and after tokens were taken back."""
    model, ids = model_of(**options), ids_of(2, 24)
    for path in [(4,), (1, 2, 3, 4, 5, 6, 7)]:
        full = model(ids, path=path).logits
        runner = Runner(model, path, torch.tensor([3, 3]))
        found = [runner.prefill(torch.cat((ids[:, :3], ids[:, :5]), dim=1))]
        found += [runner.step(ids[:, t]) for t in range(5, 14)]
        runner.step(ids[:, 0])
        runner.truncate(runner.length - 1)
        found += runner.read(ids[:, 14:17]).unbind(1)
        found += [runner.step(ids[:, t]) for t in range(17, 24)]
        torch.testing.assert_close(torch.stack(found, dim=1), full[:, 4:], atol=1e-4, rtol=0)


@options_of_all
@torch.no_grad()
def test_a_token_moves_nothing_before_it(options):
    model, ids = model_of(**options), ids_of(1, 20)
    changed = ids.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 50
    for path in [(4,), (4, 6, 7), None]:
        difference = (model(ids, path=path).logits - model(changed, path=path).logits).abs().amax((0, 2))
        assert difference[:11].max() < 1e-5 and difference[11:].min() > 1e-4


@torch.no_grad()
def test_the_cache_of_a_group_is_smaller():
    sizes = {}
    for n_kv_head in (4, 2, 1):
        model = model_of(n_head=4, n_kv_head=n_kv_head)
        cache = PathCache(model, [(4,)])
        cache.append(ids_of(1, 8))
        cache.advance((4,))
        sizes[n_kv_head] = sum(t.numel() for t in cache._entries[(4,)].state[:2])
    assert sizes == {4: 2 * 8 * 16, 2: 8 * 16, 1: 8 * 16 // 2}


# ------------------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("n_kv_head", [1, 2, 3, 6])
@pytest.mark.parametrize("n_new, masked", [(1, False), (1, True), (7, False), (7, True)])
def test_a_group_reads_the_keys_of_its_head(n_kv_head, n_new, masked):
    """Against the sum written out head by head."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, n_new, 4), torch.randn(2, n_kv_head, 7, 4), torch.randn(2, n_kv_head, 7, 4)
    mask = (torch.rand(2, 1, n_new, 7) < 0.6) | (torch.arange(7) == 0) if masked else None
    found = attention(q, k, v, mask)
    for h in range(6):
        g = h * n_kv_head // 6
        scores = q[:, h] @ k[:, g].mT / 2
        if masked:
            scores = scores.masked_fill(~mask[:, 0], -torch.inf)
        torch.testing.assert_close(found[:, h], scores.softmax(-1) @ v[:, g])


def test_a_block_whose_groups_agree_is_one_without_groups():
    """Repeated rows of keys and values in a plain block give the grouped one."""
    grouped, plain = block_of(dict(n_head=4, n_kv_head=2)), block_of(dict(n_head=4))
    q, k, v = grouped.qkv.weight.split((16, 8, 8))
    repeated = [x.unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1) for x in (k, v)]
    plain.load_state_dict({**grouped.state_dict(), "qkv.weight": torch.cat((q, *repeated))})
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(grouped(x)[0], plain(x)[0])


def test_swiglu_and_qk_norm_are_their_equations():
    block, x = block_of(dict(mlp="swiglu")), torch.randn(2, 5, 16)
    gate, value = block.mlp_in.weight.split(block.mlp_out.in_features)
    attended = x + block.attention_out(block._attend(block.norm_attention(x), block.initial_state())[0])
    normed = block.norm_mlp(attended)
    expected = attended + (F.silu(normed @ gate.T) * (normed @ value.T)) @ block.mlp_out.weight.T
    torch.testing.assert_close(block(x)[0], expected)

    block = block_of(dict(qk_norm=True, n_head=1))
    q, k, v = block.qkv(x)[:, None].chunk(3, dim=-1)
    unit = [y / y.square().mean(-1, keepdim=True).sqrt() for y in (q, k)]
    turn, scales = rotation(torch.arange(5), 16, 1e4), (block.norm_q.weight, block.norm_k.weight)
    turned = [rotate(y * scale, *turn) for y, scale in zip(unit, scales)]
    expected = F.scaled_dot_product_attention(*turned, v, is_causal=True)[:, 0]
    found = block._attend(x, block.initial_state())[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_scores_do_not_grow_with_the_projection_under_qk_norm():
    block, x = block_of(dict(qk_norm=True)), torch.randn(2, 5, 16)
    q, k, _ = block._heads(x)
    with torch.no_grad():
        block.qkv.weight[:32] *= 100
    for before, after in zip((q, k), block._heads(x)):
        torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)


def test_swiglu_has_as_many_parameters():
    for make in (lambda **o: TransformerBlock(96, 4, window=8, **o), lambda **o: RecurrentBlock(96, "gru", **o)):
        count = {mlp: sum(p.numel() for p in make(mlp=mlp).parameters()) for mlp in ("gelu", "swiglu")}
        assert count["gelu"] == count["swiglu"]  # 4 * 96 * 2 / 3 is a multiple of 8
    assert hidden_width("swiglu", 128, 4) == 344 and hidden_width("swiglu", 384, 4) == 1024
    assert hidden_width("gelu", 5, 3) == 15 and hidden_width("swiglu", 5, 3) == 16


def test_a_new_block_is_the_identity_whatever_its_options():
    x = torch.randn(2, 5, 16)
    for options in BLOCKS.values():
        assert torch.equal(TransformerBlock(16, window=12, **{"n_head": 2, **options})(x)[0], x)
    assert torch.equal(RecurrentBlock(16, "gru", mlp="swiglu")(x)[0], x)


# ------------------------------------------------------------------------------------------------ training


def gradients(objective, tokens):
    objective.model.zero_grad()
    output = objective(tokens)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in objective.model.named_parameters() if p.grad is not None}


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@options_of_all
def test_sweeps_are_backprop_in_the_limit_and_not_before(options):
    model = small_lm(**options).double()
    tokens = ids_of(2, 9) % 17
    exact, reference = gradients(BackpropObjective(model), tokens)
    time = dict(time=Sweeps(8, 8, 1)) if model.config.has_recurrence else {}
    output, found = gradients(LocalObjective(model, Sweeps(6, 6), **time), tokens)
    assert len(found) == len(list(model.parameters())) and min(g.abs().max() for g in found.values()) > 0
    assert difference(found, reference) < 1e-9 and abs(output.loss - exact.loss) < 1e-12
    for fewer in (Sweeps(4, 6), Sweeps(6, 5)):
        assert difference(gradients(LocalObjective(model, fewer, **time), tokens)[1], reference) > 1e-9


@options_of_all
def test_the_tree_trains_every_parameter(options):
    model = small_lm(**options).double()
    tokens = ids_of(2, 9) % 17
    time = dict(time=Sweeps(8, 8, 1)) if model.config.has_recurrence else {}
    output, found = gradients(LocalObjective(model, Tree(sigma=0.0), **time), tokens)
    assert len(found) == len(list(model.parameters())) and min(g.abs().max() for g in found.values()) > 0
    for depth in (1, 2, 3):
        loss = model(tokens, labels=tokens, path=model.tree.path_for_depth(depth)).loss
        torch.testing.assert_close(output.metrics[f"ce_{depth}"], loss.detach(), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------ configuration


@options_of_all
def test_saved_loaded_and_counted(options, tmp_path):
    model, ids = model_of(**options), ids_of(2, 9)
    model.save_pretrained(tmp_path)
    twin = HBLLForCausalLM.from_pretrained(tmp_path)
    assert twin.config == model.config
    assert model.n_parameters() == sum(p.numel() for p in model.parameters())
    assert model.n_parameters((4,)) < model.n_parameters((4, 6)) < model.n_parameters()
    for path in [(4,), (4, 6), None]:
        assert torch.equal(twin(ids, path=path).logits, model(ids, path=path).logits)
    card = (tmp_path / "README.md").read_text()
    for name, value in options.items():
        assert f"| {name} | {value if name != 'cell' else ''}" in card


def test_a_config_without_the_options_is_one_of_an_older_version(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    (tmp_path / "SHA256SUMS").unlink()
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in ("n_kv_head", "mlp", "qk_norm")}))
    twin = HBLLForCausalLM.from_pretrained(tmp_path)
    assert (twin.config.n_kv_head, twin.config.mlp, twin.config.qk_norm) == (None, "gelu", False)
    assert torch.equal(twin(ids_of(1, 9)).logits, model(ids_of(1, 9)).logits)


def test_the_settings_reach_the_blocks():
    settings = TrainingSettings(max_steps=1, n_head=4, n_kv_head=2, mlp="swiglu", qk_norm=True)
    block = HBLLForCausalLM(settings.model_config(64)).blocks[0]
    assert (block.n_kv_head, block.mlp, block.qk_norm) == (2, "swiglu", True)
    usual = HBLLForCausalLM(TrainingSettings(max_steps=1).model_config(64)).blocks[0]
    assert (usual.n_kv_head, usual.mlp, usual.qk_norm) == (4, "gelu", False)


def test_the_memory_that_is_asked_for_knows_of_groups(monkeypatch):
    shape = dict(n_embd=1024, n_head=16, mlp_ratio=1)
    counts = []
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    for n_kv_head in (None, 16, 4):
        config = HBLLConfig(**shape, n_kv_head=n_kv_head)
        with pytest.raises(ValueError, match="parameters or more") as caught:
            check_memory(config)
        counts.append(int(re.search(r"([\d,]+) parameters", str(caught.value))[1].replace(",", "")))
        assert 0.99 < counts[-1] / sum(p.numel() for p in HBLLForCausalLM(config).parameters()) <= 1
    assert counts[0] == counts[1] > counts[2]


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(n_kv_head=3), r"n_kv_head=3 does not divide n_head=4: choose one of \[1, 2, 4\]"),
        (dict(n_kv_head=8), "n_kv_head=8"),
        (dict(n_kv_head=0), "n_kv_head=0"),
        (dict(n_kv_head=-2), "n_kv_head=-2"),
        (dict(n_kv_head=True), "n_kv_head=True"),
        (dict(n_kv_head=2.0), "n_kv_head=2.0"),
        (dict(n_kv_head="2"), "n_kv_head='2'"),
        (dict(mlp="relu"), "mlp='relu': allowed are gelu, swiglu"),
        (dict(mlp=None), "mlp=None: allowed"),
        (dict(qk_norm=1), "qk_norm=1: must be true or false"),
        (dict(n_kv_head=2, cell="gru"), "n_kv_head=2 with cell='gru': there is no attention; leave n_kv_head out"),
        (dict(qk_norm=True, cell="gru"), "qk_norm=True with cell='gru'"),
        (dict(mlp="swiglu", cell="gru", mlp_ratio=0), "mlp='swiglu' with mlp_ratio=0: there is no MLP"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        HBLLConfig(**values)
    assert len(str(caught.value)) <= 500
    if "cell" not in values and "qk_norm" not in values:
        with pytest.raises(ValueError, match=message):
            TransformerBlock(16, 4, window=8, **values)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_a_transformer_block_can_do_without_an_mlp(mlp):
    block = TransformerBlock(16, 2, window=8, mlp_ratio=0, mlp=mlp).eval()
    x = torch.randn(2, 5, 16)
    assert torch.equal(block(x)[0], x)  # as every new block
    torch.nn.init.normal_(block.attention_out.weight)
    with torch.no_grad():
        decoder = block.decoder()
        y = torch.cat([decoder.read(x[:, :2]), *(decoder.step(x[:, t])[:, None] for t in range(2, 5))], dim=1)
        torch.testing.assert_close(y, block(x)[0])
    assert not torch.equal(y, x) and not any("mlp" in name for name, _ in block.named_parameters())


def test_normalised_queries_and_keys_are_right_under_autocast():
    """torch warns where input and scale are of two dtypes, and a warning is an error here."""
    block, x = TransformerBlock(16, 2, window=8, qk_norm=True), torch.randn(2, 5, 16)
    torch.nn.init.normal_(block.attention_out.weight)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = block(x)
    torch.testing.assert_close(y, block(x)[0], atol=0.1, rtol=0.05)
