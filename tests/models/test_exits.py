"""Exit adapters: every way to read a state out takes the same adapter, and the right one."""

import pytest
import torch
from helpers.path_cache import decode_one_token, prefill

from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.models.exits import EXIT_BY
from hbll_seq.objectives.local import LocalObjective


@pytest.mark.parametrize("by", EXIT_BY)
@pytest.mark.parametrize("path", [(4,), (4, 6), (2, 4, 6, 7), (1, 2, 3, 4)])
def test_each_length_of_the_heads_jump_or_of_the_path_reads_in_its_own_way(path, by):
    """Run, cached generation and score agree, and only the readout of the path's own jump, or depth, matters."""
    torch.manual_seed(0)
    config = HBLLConfig(vocab_size=23, n_embd=16, n_head=2, context_length=16, exit_rank=2, exit_by=by)
    model = HBLLForCausalLM(config).eval()
    tokens = torch.randint(23, (2, 12))
    plain = model.run(tokens, path)
    with torch.no_grad():
        model.exits.up.normal_()
    logits = model.run(tokens, path)
    assert (logits - plain).abs().max() > 1e-2
    before, cache = prefill(model, tokens[:, :-1], path)
    torch.testing.assert_close(before, logits[:, -2], atol=1e-4, rtol=0)
    torch.testing.assert_close(decode_one_token(model, tokens[:, -1], path, cache), logits[:, -1], atol=1e-4, rtol=0)
    x, y = model.prepare(tokens)
    state = model.embed(x)
    for n in path:
        (state,) = model.calls.apply((n,), (state,))
    by_hand = 2 * torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), y.flatten(), reduction="sum")
    torch.testing.assert_close(model.score(state, y, path), by_hand)
    own = {(4,): 2, (4, 6): 1, (2, 4, 6, 7): 0, (1, 2, 3, 4): 2}[path] if by == "jump" else len(path) - 1
    with torch.no_grad():
        model.exits.up[[row for row in range(len(model.exits.up)) if row != own]] = 7.0
    torch.testing.assert_close(model.run(tokens, path), logits)


@pytest.mark.parametrize("by", EXIT_BY)
def test_the_tree_reads_its_right_spine_out_as_the_plain_network_does(by):
    torch.manual_seed(0)
    config = HBLLConfig(vocab_size=23, n_embd=16, n_head=2, context_length=16, exit_rank=2, exit_by=by, sigma=0.0)
    model = HBLLForCausalLM(config).double()
    with torch.no_grad():
        for p in (*model.blocks.parameters(), *model.exits.parameters()):
            p.add_(0.2 * torch.randn_like(p))
    tokens = torch.randint(23, (2, 12))
    metrics = LocalObjective(model, "tree")(tokens).metrics
    for depth in (1, 2, 3):
        loss = model(tokens, labels=tokens, path=model.tree.right_spine[:depth]).loss
        assert metrics[f"ce_{depth}"].item() == pytest.approx(loss.item(), rel=1e-9)


def test_a_readout_by_depth_without_a_rank_would_do_nothing_and_is_refused():
    with pytest.raises(ValueError, match="exit_by='depth' with exit_rank=0.*such as 16"):
        HBLLConfig(exit_by="depth")
    with pytest.raises(ValueError, match="exit_by='width': allowed are jump, depth"):
        HBLLConfig(exit_by="width", exit_rank=2)
