"""Perplexity by path against the plain forward, and the conventions of WikiText."""

import math

import pytest
import torch

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import TokenStream
from hbll_seq.data.windows import TokenWindows
from hbll_seq.evaluation.perplexity import default_paths, evaluate_paths, format_table
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig

TEXT = "The river runs to the sea .\n It was built in 1923 by the town of Ashford , and it was lost .\n" * 4


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    tokenizer = Tokenizer.default()
    model = HBLLForCausalLM(HBLLConfig(n_embd=16, n_head=2, context_length=24, exit_rank=2, exit_by="depth"), tokenizer)
    with torch.no_grad():
        for p in (*model.blocks.parameters(), *model.exits.parameters()):
            p.add_(0.2 * torch.randn_like(p))
    return model, TokenWindows(TokenStream.from_text(TEXT, tokenizer), 24)


def test_every_path_agrees_with_the_plain_forward(setting):
    model, windows = setting
    rows = evaluate_paths(model, windows, {str(p): p for p in model.tree.paths()}, batch_size=2)
    assert [tuple(row["path"]) for row in rows] == list(model.tree.paths())
    tokens = torch.tensor(windows.stream.tokens.astype("int64"))
    for row in rows:
        nats = count = 0
        for first in range(0, len(tokens) - 1, 24):  # window by window, every token after the first predicted once
            window = tokens[None, first : first + 25]
            n = window.shape[1] - 1
            nats += model(window, labels=window, path=row["path"]).loss.item() * n
            count += n
        assert count == row["tokens"] == len(tokens) - 1
        assert row["loss"] == pytest.approx(nats / count, abs=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)


def test_word_perplexity_spreads_all_nats_over_words_and_line_ends(setting):
    model, windows = setting
    (row,) = evaluate_paths(model, windows, {"full": model.resolve_path()})
    n_words = len(TEXT.split()) + TEXT.count("\n")
    assert row["word_perplexity"] == pytest.approx(math.exp(row["loss"] * row["tokens"] / n_words), rel=1e-6)


def test_evaluation_leaves_the_model_as_it_was(setting):
    model, windows = setting
    model.train()
    evaluate_paths(model, windows, max_batches=1)
    assert model.training and all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="dyadic"):
        evaluate_paths(model, windows, {"bad": (2, 6)})
    with pytest.raises(ValueError, match="max_batches"):
        evaluate_paths(model, windows, max_batches=0)


def test_default_paths_and_table(setting):
    model, windows = setting
    paths = default_paths(model)
    assert list(paths.values()) == [model.tree.path_for_depth(k) for k in range(1, 8)]
    table = format_table(evaluate_paths(model, windows, max_batches=1)).splitlines()
    assert len(table) == 8 and table[1].endswith("0-4-head") and table[3].endswith("0-4-6-7-head")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_carried_states_make_stretches_of_windows(batch_size):
    torch.manual_seed(0)
    tokenizer = Tokenizer.default()
    model = HBLLForCausalLM(HBLLConfig(n_level=2, n_embd=16, context_length=8, cell="gru"), tokenizer)
    with torch.no_grad():
        for p in model.blocks.parameters():
            p.add_(0.3 * torch.randn_like(p))
    windows = TokenWindows(TokenStream.from_text(TEXT, tokenizer), 8)
    tokens = torch.tensor(windows.stream.tokens.astype("int64"))
    n_full = (len(tokens) - 1) // 8
    length = n_full // batch_size * 8
    starts = [row * length for row in range(batch_size)] + [len(tokens) - 1]
    paths = {"one": (2,), "two": (2, 3), "all": (1, 2, 3)}
    rows = evaluate_paths(model, windows, paths, batch_size=batch_size, carry_state=True)
    for row in rows:
        nats = 0.0
        for first, after in zip(starts, starts[1:]):  # the last stretch holds what was left over
            text = tokens[None, first : after + 1]
            nats += model(text, labels=text, path=row["path"]).loss.item() * (after - first)
        assert row["tokens"] == len(tokens) - 1 and row["loss"] == pytest.approx(nats / row["tokens"], abs=1e-5)
    afresh = evaluate_paths(model, windows, paths, batch_size=batch_size)
    assert all(abs(a["loss"] - b["loss"]) > 1e-4 and a["tokens"] == b["tokens"] for a, b in zip(rows, afresh))
    few = [evaluate_paths(model, windows, paths, batch_size=2, max_batches=2, carry_state=c)[0] for c in (True, False)]
    assert few[0]["tokens"] == few[1]["tokens"] == 32


def test_only_recurrent_models_carry(setting):
    with pytest.raises(ValueError, match="carry_state=True with cell='transformer'"):
        evaluate_paths(*setting, carry_state=True)
