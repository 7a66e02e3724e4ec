"""The loss of each token by path is the model's own, and words are made of tokens."""

import pytest
import torch
from helpers.language_models import TOKENIZER, model_of

from hbll_seq.evaluation.text import evaluate_text
from hbll_seq.evaluation.token_losses import TokenLosses, token_losses

TEXT = "The river , 1916\nand ö"


@pytest.mark.parametrize("cell", ["transformer", "gru"])
@torch.no_grad()
def test_they_are_the_models_own(cell):
    model = model_of(TOKENIZER, cell=cell, context_length=8).train()
    paths = {"full": (1, 2, 3, 4, 5, 6, 7), "one": (4,), "three": (2, 4, 6)}
    found = token_losses(model, TEXT * 3, paths)
    assert model.training and found.names == tuple(paths) and found.paths == tuple(paths.values())
    ids = TOKENIZER.encode(TEXT * 3)
    assert len(ids) > 16 and found.nats.shape == (3, len(ids))  # longer than the window
    model.eval()
    for nats, path in zip(found.nats, found.paths):
        logits = model(torch.tensor([[TOKENIZER.eos_id, *ids]]), path=path).logits[0, :-1]
        expected = -logits.log_softmax(-1)[range(len(ids)), ids]
        torch.testing.assert_close(nats, expected, atol=1e-5, rtol=1e-5)


def test_with_the_end_of_the_text_their_mean_is_that_of_evaluate_text():
    model = model_of(TOKENIZER, context_length=64)
    found, rows = token_losses(model, TEXT), evaluate_text(model, TEXT)
    ids = torch.tensor([[TOKENIZER.eos_id, *TOKENIZER.encode(TEXT)]])
    for nats, row in zip(found.nats, rows):
        assert row["name"] in found.names
        end = -model(ids, path=row["path"]).logits[0, -1].log_softmax(-1)[TOKENIZER.eos_id].item()
        assert (nats.sum().item() + end) / (len(nats) + 1) == pytest.approx(row["loss"], rel=1e-5)


def test_tokens_are_the_text_and_may_be_cut():
    model = model_of(TOKENIZER)
    found = token_losses(model, "The river , 1916\nand more")
    assert "".join(found.tokens) == "The river , 1916\nand more" and len(found.names) == 7
    cut = token_losses(model, "The river , 1916\nand more", max_tokens=3)
    assert cut.tokens == found.tokens[:3]
    torch.testing.assert_close(cut.nats, found.nats[:, :3])


def test_words_are_sums_of_tokens():
    tokens = ("T", "he", " river", " ,", " 19", "16", "\n", "and", " ", "'s", "x")
    nats = torch.arange(22.0).reshape(2, 11)
    words = TokenLosses(tokens, ((4,), (4, 6)), ("a", "b"), nats).words()
    assert [word for word, _ in words] == ["The", "river", ",", "1916", "and", "'sx"]
    assert words[0][1].tolist() == [1, 23] and words[3][1].tolist() == [9, 31] and words[4][1].tolist() == [7, 18]


def test_what_cannot_be_evaluated_is_told():
    with pytest.raises(ValueError, match="text=''.*give some text"):
        token_losses(model_of(TOKENIZER), "")
    with pytest.raises(ValueError, match="no tokenizer.*load a folder"):
        token_losses(model_of(), "x")
    with pytest.raises(ValueError, match=r"\[2, 6\]|2, 6"):
        token_losses(model_of(TOKENIZER), "x", {"bad": (2, 6)})
