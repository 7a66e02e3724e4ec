"""A rank of a run makes and reads its own blocks: never more of the model at once, and bit for bit what one process has."""

import gc

import pytest
import torch
from helpers.live_bytes import LiveBytes

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.distributed.ranks import ALONE, Ranks
from hbll_seq.training.language_model_run import untrained
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.training.share import Share
from hbll_seq.utils.tensors import module_tensors

SHAPE = dict(max_steps=4, n_level=3, n_embd=32, n_head=2, context_length=8, chunk_size=1, batch_size=2, seed=5)


def settings_of(n_ranks, **changes):
    return TrainingSettings(block_parallel=n_ranks, **{**SHAPE, **changes}).resolved()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["tree node level block the a of in reads writes state path . " * 3] * 50, 300)


def started(tokenizer, ranks=ALONE, initial=None, **changes):
    """What a process of a run holds when it starts."""
    settings = settings_of(ranks.n_ranks, **changes)
    _, objective = untrained(settings, tokenizer, ranks, {}, initial)
    return Share(objective, ranks, settings.chunk_size)


def n_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def largest_block(share):
    """Bytes of the largest block of a whole model."""
    return max(n_bytes(block.parameters()) for block in share.model.blocks)


@pytest.fixture(scope="module")
def one(tokenizer):
    """The start of one process."""
    return started(tokenizer)


@pytest.mark.parametrize("n_ranks", [2, 7])
def test_a_rank_never_holds_more_than_its_own_blocks_and_one(one, tokenizer, n_ranks):
    gc.disable()  # what a circle of objects keeps is held too
    try:
        for rank in range(n_ranks):
            with LiveBytes() as live:
                share = started(tokenizer, Ranks(rank, n_ranks))
                kept = n_bytes(share.objective.parameters())
            assert kept < n_bytes(one.objective.parameters()) - largest_block(one)
            assert live.alive() == kept < live.most <= kept + 1.1 * largest_block(one), (rank, live.most, kept)
            del share
    finally:
        gc.enable()


@pytest.mark.parametrize("changes", [
    {}, {"cell": "gru,transformer,mingru,transformer,elman,gru,transformer"}, {"exit_rank": 4, "tie_embeddings": False},
    {"path": "2,4,6,7", "depth_mix": "none"}, {"dropout": 0.1, "norm": "layernorm", "auxiliary_exits": 0.5},
])  # fmt: skip
@pytest.mark.parametrize("n_ranks", [2, 3])
def test_the_start_is_that_of_one_process_bit_for_bit(tokenizer, n_ranks, changes):
    whole = started(tokenizer, **changes)
    expected, drawn = module_tensors(whole.objective), torch.get_rng_state()
    found = {}
    for rank in range(n_ranks):
        share = started(tokenizer, Ranks(rank, n_ranks), **changes)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert share.n_parameters == whole.n_parameters
        tensors = module_tensors(share.objective)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
        trained = [name for name, p in share.objective.named_parameters() if p.requires_grad]
        assert trained == [n for n, p in whole.objective.named_parameters() if p.requires_grad and n in tensors]
        found.update(tensors)
    assert found.keys() == expected.keys()
