"""A path with its last blocks side by side: against plain arithmetic."""

import pytest
import torch
from helpers.language_models import TOKENIZER, model_of

from hbll_seq.generation.side_by_side import SideBySideRunner

KINDS = {
    "attention": {}, "gru": dict(cell="gru"), "mixed": dict(cell=["transformer"] * 4 + ["gru", "transformer", "mingru"]),
    "grouped": dict(n_kv_head=1), "layernorm": dict(norm="layernorm"),
}  # fmt: skip


def double(**changes):
    return model_of(**changes).double()


def tokens_of(batch, length):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(length))


def obvious(model, tokens, path, in_order):
    """Logits of whole sequences, by the formula."""
    state = model.embed(tokens)
    for n in path[:in_order]:
        state = model.blocks[n - 1](state)[0]
    total = state + sum(model.blocks[n - 1](state)[0] - state for n in path[in_order:])
    return model.read_out(total, path)


@pytest.mark.parametrize("path,in_order", [((1, 2, 3, 4, 5, 6, 7), k) for k in (0, 4, 5)] + [((2, 4, 6), 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_the_formula(kind, path, in_order):
    """Prompt, several tokens, single tokens, tokens taken back; past the window of 12."""
    model, tokens = double(**KINDS[kind]), tokens_of(2, 30)
    expected = obvious(model, tokens, path, in_order)
    runner = SideBySideRunner(model, path, in_order)
    assert (runner.prefill(tokens[:, :5]) - expected[:, 4]).abs().max() < 1e-9
    assert (runner.read(tokens[:, 5:9]) - expected[:, 5:9]).abs().max() < 1e-9
    for t in range(9, 20):
        assert (runner.step(tokens[:, t]) - expected[:, t]).abs().max() < 1e-9
    runner.read(tokens_of(2, 4))
    runner.truncate(18)
    assert runner.length == 18
    for t in range(18, 30):
        assert (runner.step(tokens[:, t]) - expected[:, t]).abs().max() < 1e-9


@torch.no_grad()
def test_padding_and_rows():
    model, path = double(), (1, 2, 3, 4, 5, 6, 7)
    tokens = tokens_of(2, 16)
    alone = obvious(model, tokens[1:, 3:], path, 4)
    runner = SideBySideRunner(model, path, 4, torch.tensor([0, 3]))
    assert (runner.prefill(tokens[:, :7])[1] - alone[0, 3]).abs().max() < 1e-5  # angles are float32
    assert (runner.step(tokens[:, 7])[1] - alone[0, 4]).abs().max() < 1e-5
    runner.keep([1])
    for t in range(8, 16):
        assert (runner.step(tokens[1:, t])[0] - alone[0, t - 3]).abs().max() < 1e-5


def test_text_with_blocks_in_order():
    model = model_of(TOKENIZER, default_paths="prefix").double()
    options = dict(temperature=0, max_new_tokens=20)
    texts = [model.generate("The city", depth=7, in_order=k, **options) for k in (0, 4)]
    assert len({*texts, model.generate("The city", depth=7, **options)}) == 3
    assert "The city" + "".join(model.stream("The city", in_order=4, **options)) == texts[1]
    assert model.generate(["The city", "A"], in_order=4, **options)[0] == texts[1]
