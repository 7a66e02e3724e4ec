"""Recurrent layers as blocks of a language model: one function in two forms, constant memory, any prompt, any mixture."""

import json

import pytest
import torch
from helpers.language_models import CONTEXT_LENGTH, check_cached_logits
from helpers.language_models import model_of as language_model_of
from helpers.path_cache import PathCache

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.generation.decoding import generate_ids
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.layers.attention import TransformerBlock
from hbll_seq.layers.cells import CELL_KINDS
from hbll_seq.layers.recurrent_block import RecurrentBlock
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import CELLS, HBLLConfig

MIXED = ("gru", "transformer", "elman", "mingru", "transformer", "gru", "mingru")
STACKS = [*CELL_KINDS, MIXED]
def model_of(cell, seed=0, tokenizer=None, **changes):
    return language_model_of(tokenizer, seed, cell=cell, **changes)


def tokens_of(batch, length, seed=0):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_the_kinds_are_the_cells():
    assert CELLS == ("transformer", *sorted(CELL_KINDS, key=CELLS.index)) and set(CELLS[1:]) == set(CELL_KINDS)


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_a_new_block_is_the_identity_and_then_residual(kind):
    block = RecurrentBlock(16, kind)
    x = torch.randn(2, 5, 16)
    assert torch.equal(block(x)[0], x)
    torch.nn.init.eye_(block.cell_out.weight)
    torch.testing.assert_close(block(x)[0], x + block.cell(block.norm_cell(x))[0])


@pytest.mark.parametrize("mlp_ratio", [0, 2])
@pytest.mark.parametrize("kind", CELL_KINDS)
@torch.no_grad()
def test_forward_and_step_are_one_function(kind, mlp_ratio):
    block = model_of(kind, mlp_ratio=mlp_ratio).blocks[0]
    assert any("mlp" in name for name, _ in block.named_parameters()) == (mlp_ratio > 0)
    x = torch.randn(3, 9, 16)
    start = torch.tensor([0, 2, 5])
    whole, _ = block(x, block.initial_state(start))
    state, outputs = block.initial_state(start), []
    for t in range(9):
        y, state = block.step(x[:, t], state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, dim=1), whole)
    for row, n in enumerate(start):  # left padding leaves no trace
        torch.testing.assert_close(whole[row, n:], block(x[row : row + 1, n:])[0][0])
    first, state = block(x[:, :4])
    torch.testing.assert_close(torch.cat((first, block(x[:, 4:], state)[0]), dim=1), block(x)[0])


@pytest.mark.parametrize("cell", STACKS, ids=str)
@pytest.mark.parametrize("path", [(4,), (4, 6, 7), (2, 4, 6), (1, 2, 3, 4, 5, 6, 7)], ids=str)
@torch.no_grad()
def test_cached_logits_equal_the_full_forward(cell, path):
    """Every position, from the prompt's end to more than twice context_length."""
    check_cached_logits(model_of(cell), tokens_of(2, 30), path)


@pytest.mark.parametrize("cell", STACKS, ids=str)
@torch.no_grad()
def test_a_token_moves_nothing_before_it(cell):
    model, ids = model_of(cell), tokens_of(1, 20)
    changed = ids.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 50
    for path in [(4,), (4, 6, 7), None]:
        before, after = model(ids, path=path).logits, model(changed, path=path).logits
        assert torch.equal(before[:, :11], after[:, :11])
        assert (before[:, 11:] - after[:, 11:]).abs().amax(-1).min() > 0


def memory_of(cache):
    """Numbers that a cache holds, in all."""
    entries = [tensor for entry in cache._entries.values() for tensor in (*(entry.state or ()), entry.pending)]
    return sum(t.numel() for t in entries if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("depth", [1, 3, 7])
@torch.no_grad()
def test_memory_does_not_grow_with_the_tokens(depth):
    model = model_of("gru")
    path = model.resolve_path(depth)
    cache, sizes = PathCache(model, [path]), {}
    for t in range(1, 1001):
        cache.append(torch.tensor([[t % 50]]))
        cache.advance(path)
        sizes[t] = memory_of(cache)
    assert sizes[10] == sizes[1000] == depth * 16
    attention = model_of("transformer")
    grown, sizes = PathCache(attention, [path]), []
    for t in range(2):
        grown.append(torch.tensor([[t]]))
        grown.advance(path)
        sizes.append(memory_of(grown))
    assert sizes[1] == 2 * sizes[0] > 0  # the measure sees a cache that grows


def test_prompts_of_any_length():
    model = model_of("gru", tokenizer=Tokenizer.default())
    prompt = "The history of the city. " * 20
    ids = model.tokenizer.encode(prompt)
    assert len(ids) > 5 * CONTEXT_LENGTH
    for truncate in (False, True):  # nothing is cut, whatever is asked
        text = model.generate(prompt, depth=3, max_new_tokens=4, temperature=0, truncate_prompt=truncate)
        path = model.resolve_path(3)
        new = [step[0] for step in generate_ids(model, [ids], path, SamplingParams(4, temperature=0), n_tokens=4096)]
        assert text == prompt + model.tokenizer.decode(new)
    with torch.no_grad():
        assert new[0] == model(torch.tensor([ids]), path=path).logits[0, -1, :4096].argmax()
    with pytest.raises(ValueError, match="more than the model's context of 12"):
        model_of(MIXED, tokenizer=Tokenizer.default()).generate(prompt)


def test_a_batch_of_prompts_is_each_of_them():
    model = model_of("gru", tokenizer=Tokenizer.default())
    prompts = ["The", "The history of the city and of its people", "In 1923"]
    together = model.generate(prompts, depth=3, max_new_tokens=6, temperature=0)
    assert together == [model.generate(p, depth=3, max_new_tokens=6, temperature=0) for p in prompts]


@pytest.mark.parametrize("cell", ["gru", MIXED], ids=str)
def test_saved_and_loaded(cell, tmp_path):
    model = model_of(cell)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["cell"] == (cell if cell == "gru" else list(cell))
    twin = HBLLForCausalLM.from_pretrained(tmp_path)
    assert twin.config == model.config
    ids = tokens_of(2, 9)
    for depth in (1, 3, 7):
        path = model.resolve_path(depth)
        assert torch.equal(twin(ids, path=path).logits, model(ids, path=path).logits)


def test_blocks_of_a_mixture_are_those_named():
    model = model_of(list(MIXED))
    assert model.config.cell == MIXED and hash(model.config) == hash(HBLLConfig(**model.config.to_dict()))
    assert [isinstance(block, TransformerBlock) for block in model.blocks] == [kind == "transformer" for kind in MIXED]
    assert HBLLConfig(n_level=1, cell="elman").cells == ("elman",)
    HBLLConfig(n_embd=15, n_head=2, cell="gru")  # n_head is attention's


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(cell="lstm"), "cell='lstm'.*transformer, gru, mingru, elman"),
        (dict(cell=("gru",) * 6), "names 6 blocks: n_level=3 has 7"),
        (dict(cell=("gru",) * 6 + ("lstm",)), "lstm.*allowed are"),
        (dict(cell=3), "cell=3.*allowed"),
        (dict(mlp_ratio=0), "mlp_ratio=0 with cell='transformer'.*recurrent"),
        (dict(cell=MIXED, mlp_ratio=0), "mlp_ratio=0"),
        (dict(cell="gru", mlp_ratio=-1), "mlp_ratio=-1.*at least 0"),
        (dict(cell=MIXED, n_embd=15, n_head=2), "n_embd=15"),
    ],
)
def test_bad_config(values, message):
    with pytest.raises(ValueError, match=message):
        HBLLConfig(**values)
