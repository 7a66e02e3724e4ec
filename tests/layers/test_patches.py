"""Blocks in which every patch sees every other one, and the embedding of patches: what they read and what they refuse."""

import pytest
import torch
from torch import nn

from hbll_seq.layers.attention import TransformerBlock
from hbll_seq.layers.patches import FullAttentionBlock, PatchEmbedding, PoolingHead


def filled(block):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(0.3 * torch.randn_like(p) + (p.dim() == 1))
    return block.double()


def change_of_the_last(block):
    """By how much each of six states changes with the last one that the block reads."""
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, -1] += 1
    return (block(changed)[0] - block(x)[0]).abs().amax((0, 2))


@torch.no_grad()
def test_a_full_block_sees_what_comes_later_and_a_causal_one_does_not():
    assert (change_of_the_last(filled(FullAttentionBlock(16, 2))) > 1e-4).all()
    causal = change_of_the_last(filled(TransformerBlock(16, 2, window=12)))
    assert (causal[:-1] == 0).all() and causal[-1] > 1e-4


@pytest.mark.parametrize("options", [{}, dict(mlp="swiglu", qk_norm=True, norm="layernorm")], ids=["usual", "others"])
@torch.no_grad()
def test_it_is_attention_written_out(options):
    """No position plays a part: states in another order give outputs in that order."""
    block, x = filled(FullAttentionBlock(16, 2, **options)), torch.randn(3, 7, 16, dtype=torch.float64)
    q, k, v = block.qkv(block.norm_attention(x)).view(3, 7, 6, 8).transpose(1, 2).split(2, dim=1)
    if options:
        q, k = block.norm_q(q), block.norm_k(k)
    weights = (q @ k.mT / 8**0.5).softmax(-1)
    mixed = x + block.attention_out((weights @ v).transpose(1, 2).flatten(2))
    hidden = block.mlp_in(block.norm_mlp(mixed))
    gate, value = hidden.chunk(2, dim=-1)
    hidden = nn.functional.silu(gate) * value if options else nn.functional.gelu(hidden, approximate="tanh")
    expected = mixed + block.mlp_out(hidden)
    torch.testing.assert_close(block(x)[0], expected)
    torch.testing.assert_close(block.leave(x, *block.enter(x, torch.arange(7)), None), expected)
    order = torch.randperm(7)
    torch.testing.assert_close(block(x[:, order])[0], expected[:, order])


def test_there_is_no_state_to_carry_on_from():
    block, x = FullAttentionBlock(16, 2), torch.randn(1, 4, 16)
    causal = TransformerBlock(16, 2, window=12)
    _, state = causal(x)
    for attempt in (block.initial_state, block.decoder, lambda: block.step(x[:, 0], None), lambda: block(x, state)):
        with pytest.raises(ValueError, match="reads all states at once: it has no state to begin with"):
            attempt()


@pytest.mark.parametrize("has_token", [False, True])
@torch.no_grad()
def test_a_patch_is_its_own_pixels_normalised(has_token):
    embed = PatchEmbedding((2, 3), 4, (0.5, 0.25), (0.5, 2.0), 16, has_token).double()
    pixels = torch.rand(2, 2, 8, 12, dtype=torch.float64)
    states = embed(pixels)
    assert states.shape == (2, 6 + has_token, 16)
    patch = torch.stack(((pixels[0, 0, 4:, 4:8] - 0.5) / 0.5, (pixels[0, 1, 4:, 4:8] - 0.25) / 2))  # in the second row
    expected = embed.projection.weight @ patch.flatten() + embed.projection.bias + embed.positions[4]
    torch.testing.assert_close(states[0, 4 + has_token], expected)
    if has_token:
        assert torch.equal(states[:, 0], embed.token.expand(2, 16))


@torch.no_grad()
def test_the_head_reads_the_mean_or_the_token():
    state = torch.randn(2, 5, 16)
    for pooling, pooled in (("mean", lambda norm: norm(state).mean(1)), ("token", lambda norm: norm(state[:, 0]))):
        head = PoolingHead("rmsnorm", 16, 3, pooling)
        assert torch.equal(head(state), torch.zeros(2, 3))  # every class is as likely before training
        filled(head).float()
        torch.testing.assert_close(head(state), head.projection(pooled(head.norm)))
