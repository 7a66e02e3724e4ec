"""Which blocks a rank holds, and a model without the others."""

import copy

import pytest
import torch
from torch import nn

from hbll_seq.distributed.blocks import (
    RemoteBlock,
    blocks_of_rank,
    keep_own,
    kind_of,
    largest_chunk,
    numbers_kept,
    whole_tensors,
)
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.utils.tensors import module_tensors


@pytest.mark.parametrize("length", range(1, 18))
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7])
def test_ranks_share_a_path_by_whole_segments(length, chunk):
    segments = [list(range(length))[first : first + chunk] for first in range(0, length, chunk)]
    for n_ranks in range(1, len(segments) + 1):
        owned = [list(blocks_of_rank(length, chunk, rank, n_ranks)) for rank in range(n_ranks)]
        assert sum(owned, []) == list(range(length)) and all(owned)
        counts = [sum(segment[0] in own for segment in segments) for own in owned]
        assert all(set(s) <= set(own) or not set(s) & set(own) for s in segments for own in owned)
        assert max(counts) - min(counts) <= 1
    with pytest.raises(ValueError, match=f"block_parallel={len(segments) + 1} with chunk_size={chunk}"):
        blocks_of_rank(length, chunk, 0, len(segments) + 1)


def test_the_remedy_works():
    with pytest.raises(ValueError, match="7 blocks make 2 segments of at most 4, .* at most 2, a larger --n-level, or a "
                       "--block-parallel of at most 2$"):  # fmt: skip
        blocks_of_rank(7, 4, 0, 4)
    with pytest.raises(ValueError, match="3 blocks make 1 segment of at most 4, .*, or no --block-parallel$"):
        blocks_of_rank(3, 4, 0, 2)
    assert [blocks_of_rank(7, 2, r, 4) for r in range(4)] == [range(0, 2), range(2, 4), range(4, 6), range(6, 7)]
    assert largest_chunk(31, 8) == 4 and largest_chunk(7, 7) == 1
    with pytest.raises(ValueError) as error:
        blocks_of_rank(3, 1, 0, 4)
    assert "--chunk-size" not in str(error.value)


def test_shares_that_are_not_equal():
    assert [blocks_of_rank(31, 8, r, 2, (1, 3)) for r in range(2)] == [range(0, 8), range(8, 31)]
    assert [blocks_of_rank(7, 2, r, 3, (1, 2, 1)) for r in range(3)] == [range(0, 2), range(2, 6), range(6, 7)]
    for shares in ((1, 2), (1, 2, 2), (0, 3, 1), (1, 1, 1, 1)):
        with pytest.raises(ValueError, match=f"block_shares='{','.join(map(str, shares))}' with block_parallel=3: must be 3"):
            blocks_of_rank(7, 2, 0, 3, shares)


def test_a_rank_keeps_its_own_blocks_and_their_numbers():
    torch.manual_seed(0)
    config = HBLLConfig(vocab_size=16, n_level=3, n_embd=8, n_head=2, context_length=4)
    whole = HBLLForCausalLM(config)
    parts = [copy.deepcopy(whole) for _ in range(2)]
    for rank, part in enumerate(parts):
        keep_own(part, range(1, 8), blocks_of_rank(7, 2, rank, 2))
    names = [{name for name in part.state_dict() if name.startswith("blocks.")} for part in parts]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {name for name in whole.state_dict() if name.startswith("blocks.")}
    for part in parts:
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in part.state_dict().items())
    assert {name.split(".")[1] for name in names[0]} == set("0123")
    with pytest.raises(ValueError, match="block 5 is held by another rank of this run"):
        parts[0](torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="block 1 is held by another rank"):
        parts[1](torch.zeros(1, 4, dtype=torch.int64))


def test_a_model_made_with_a_ranks_blocks_is_the_whole_one_without_the_others():
    config = HBLLConfig(vocab_size=16, n_level=3, n_embd=8, n_head=2, context_length=4, cell=("gru", *["transformer"] * 6))
    torch.manual_seed(0)
    whole, drawn = HBLLForCausalLM(config), torch.get_rng_state()
    for kept in ([1], [2, 3, 7], [], range(1, 8)):
        torch.manual_seed(0)
        part = HBLLForCausalLM(config, own=kept)
        assert torch.equal(torch.get_rng_state(), drawn)
        names = {name for name in whole.state_dict() if not name.startswith("blocks.") or int(name[7]) + 1 in kept}
        assert part.state_dict().keys() == names
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in part.state_dict().items())
        told, expected = whole_tensors(part), module_tensors(whole)
        assert {n: (t.shape, t.dtype) for n, t in told.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
        assert all(tensor.is_meta for tensor in told.values())
        assert [kind_of(block) for block in part.blocks] == [type(block) for block in whole.blocks]
    owned = blocks_of_rank(7, 1, 0, 2)
    with pytest.raises(ValueError, match=r"block 2 is to be kept .* own=\[1, 2, 3\]"):
        keep_own(HBLLForCausalLM(config, own=[1, 3, 4]), range(1, 8), owned)
    part = HBLLForCausalLM(config, own=[1, 2, 3, 4])
    keep_own(part, range(1, 8), owned)
    assert [n for n in range(1, 8) if not isinstance(part.blocks[n - 1], RemoteBlock)] == [1, 2, 3]
    assert kind_of(part.blocks[3]) is kind_of(part.blocks[6]) is type(whole.blocks[6])


def test_blocks_beside_the_path_stay_with_the_first_rank():
    assert numbers_kept(7, (4, 6, 7), range(0, 2)) == [1, 2, 3, 4, 5, 6]
    assert numbers_kept(7, (4, 6, 7), range(2, 3)) == [7]
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(7))
    keep_own(model, (4, 6, 7), range(2, 3))
    assert [isinstance(block, RemoteBlock) for block in model.blocks] == [True] * 6 + [False]
    assert len(list(model.parameters())) == 2
