"""The plain network: shapes, causality, paths, the two forms of a block, the configuration."""

import pytest
import torch

from hbll_seq.layers.attention import TransformerBlock
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig


def model_of(**changes):
    torch.manual_seed(0)
    values = dict(vocab_size=17, n_embd=16, n_head=2, context_length=12)
    model = HBLLForCausalLM(HBLLConfig(**{**values, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_causality_at_every_path(norm):
    model = model_of(norm=norm)
    tokens = torch.randint(17, (1, 12))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 17
    for path in model.tree.paths():
        difference = (model(tokens, path=path).logits - model(changed, path=path).logits).abs().amax((0, 2))
        assert difference[:6].max() < 1e-5, path
        assert difference[6] > 1e-3, path


@pytest.mark.parametrize("length", [1, 2, 12, 13, 63])
def test_step_is_forward(length):
    """One token at a time, in chunks and at once; beyond the window (12) too."""
    torch.manual_seed(0)
    block = TransformerBlock(16, 2, window=12)
    torch.nn.init.normal_(block.attention_out.weight, std=0.3)
    torch.nn.init.normal_(block.mlp_out.weight, std=0.3)
    x = torch.randn(3, length, 16)
    whole, _ = block(x)
    state, steps = block.initial_state(), []
    for t in range(length):
        y, state = block.step(x[:, t], state)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, 1), whole, atol=1e-5, rtol=0)
    state, chunks = block.initial_state(), []
    for chunk in x.split(5, dim=1):
        y, state = block(chunk, state)
        chunks.append(y)
    torch.testing.assert_close(torch.cat(chunks, 1), whole, atol=1e-5, rtol=0)
    assert state.keys.shape[2] <= 11


def test_attention_against_the_written_out_sum():
    """The fused kernel against softmax(q k / sqrt(d)) v over the window, position by position."""
    torch.manual_seed(0)
    block = TransformerBlock(8, 1, window=4).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    attended, _ = block._attend(x, block.initial_state())
    q, k, v = block.qkv(x)[0].chunk(3, dim=-1)
    frequency = 10000.0 ** (-torch.arange(4) / 4)

    def turn(vector, position):
        pairs = torch.complex(vector[:4], vector[4:])
        turned = pairs * torch.polar(torch.ones(4).double(), (position * frequency).double())
        return torch.cat((turned.real, turned.imag))

    for t in range(9):
        seen = range(max(0, t - 3), t + 1)
        scores = torch.stack([turn(q[t], t) @ turn(k[s], s) for s in seen]) / 8**0.5
        expected = sum(weight * v[s] for weight, s in zip(scores.softmax(0), seen))
        torch.testing.assert_close(attended[0, t], expected, atol=1e-6, rtol=0)


def test_left_padding_changes_nothing():
    model = model_of(context_length=64)
    block = model.blocks[0]
    x = torch.randn(1, 6, 16)
    alone, _ = block(x)
    padded = torch.cat((torch.randn(1, 4, 16), x), dim=1)
    y, state = block(padded, block.initial_state(start=torch.tensor([4])))
    torch.testing.assert_close(y[:, 4:], alone, atol=1e-5, rtol=0)
    assert torch.isfinite(y).all()
    extra = torch.randn(1, 16)
    _, plain_state = block(x)
    torch.testing.assert_close(block.step(extra, state)[0], block.step(extra, plain_state)[0], atol=1e-5, rtol=0)


def test_loss_follows_the_shifted_labels_convention():
    model = model_of()
    tokens = torch.randint(17, (2, 9))
    output = model(tokens, labels=tokens)
    by_hand = -output.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
    torch.testing.assert_close(output.loss, by_hand)
    masked = tokens.clone()
    masked[:, :5] = -100
    by_hand = -output.logits[:, 4:-1].log_softmax(-1).gather(-1, tokens[:, 5:, None]).mean()
    torch.testing.assert_close(model(tokens, labels=masked).loss, by_hand)
    assert model(tokens).loss is None


def test_a_new_model_predicts_nearly_uniformly_at_every_depth():
    torch.manual_seed(0)
    model = HBLLForCausalLM(HBLLConfig(vocab_size=17, n_embd=16, n_head=2))
    tokens = torch.randint(17, (4, 64))
    losses = [model(tokens, labels=tokens, path=path).loss for path in model.tree.paths()]
    assert max(abs(loss.item() - 2.833) for loss in losses) < 0.2


def test_embedding_has_unit_scale_and_head_is_tied():
    tied, untied = model_of(), model_of(tie_embeddings=False)
    z0 = tied.embed(torch.arange(17)[None])
    torch.testing.assert_close(z0.square().mean(-1), torch.ones(1, 17), atol=1e-4, rtol=0)
    assert tied.head.projection.weight is tied.embed.weight
    assert untied.head.projection.weight is not untied.embed.weight
    assert untied.n_parameters() - tied.n_parameters() == 17 * 16
    assert tied.n_parameters() == sum(p.numel() for p in tied.parameters())
    assert tied.n_parameters((4,)) < tied.n_parameters((4, 6)) < tied.n_parameters()


def test_resolve_path():
    model = model_of()
    assert model.resolve_path() == (1, 2, 3, 4, 5, 6, 7)
    assert model.resolve_path(depth=2) == model.resolve_path(path=[4, 6]) == (4, 6)
    for bad in (dict(depth=0), dict(depth=8), dict(depth="x"), dict(path=[2, 6]), dict(depth=1, path=[4])):
        with pytest.raises(ValueError):
            model.resolve_path(**bad)


def test_bad_tokens_are_named():
    model = model_of()
    with pytest.raises(ValueError, match="0 to 17.*0 .. 16"):
        model(torch.tensor([[0, 17]]))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        model(torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="float"):
        model(torch.randn(1, 4))
    with pytest.raises(ValueError, match="labels"):
        model(torch.tensor([[0, 1]]), labels=torch.tensor([[0, 1, 2]]))


def test_config_round_trip_and_unknown_key():
    config = HBLLConfig(n_embd=64, sigma=0.0)
    assert HBLLConfig.from_dict(config.to_dict()) == config
    assert config.n_layer == 7
    assert HBLLConfig.from_dict({**config.to_dict(), "model_type": "hbll", "architectures": ["x"]}) == config
    with pytest.raises(ValueError, match="'n_heads'.*n_head"):
        HBLLConfig.from_dict({**config.to_dict(), "n_heads": 4})
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        HBLLConfig.from_dict({"model_type": "gpt2"})


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(context_length=0), "context_length=0.*at least 1"),
        (dict(n_embd=100, n_head=3), r"n_embd=100 is not divisible by n_head=3.*\[1, 2, 5, 10, 25, 50\]"),
        (dict(n_embd=15, n_head=2), "n_embd=15.*choose an even n_embd"),
        (dict(n_embd=6, n_head=2), "odd width 3"),
        (dict(n_level=0), "n_level=0"),
        (dict(n_level=11), "n_level=11"),
        (dict(vocab_size=1), "vocab_size=1"),
        (dict(vocab_size=12.5), "vocab_size=12.5"),
        (dict(cell="lstm"), "cell='lstm'.*transformer"),
        (dict(norm="batch"), "norm='batch'.*rmsnorm"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(sigma=-0.1), "sigma=-0.1"),
        (dict(sigma=float("nan")), "sigma=nan"),
        (dict(tie_embeddings=1), "tie_embeddings=1"),
    ],
)
def test_bad_config(values, message):
    with pytest.raises(ValueError, match=message):
        HBLLConfig(**values)
