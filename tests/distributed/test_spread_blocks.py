"""Blocks on ranks: what they find between them is what one process finds."""

import pytest
import torch
from helpers.spread_work import CASES, FROZEN, frozen, run_on, steps

from hbll_seq.distributed.placement import RankPlacement
from hbll_seq.distributed.ranks import Ranks
from hbll_seq.engine.calls import Calls
from hbll_seq.engine.chain import CallChain
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.local import LocalObjective

CLOSE = dict(rtol=1e-10, atol=1e-12)
_FOUND = {}


def found_by(n_ranks, tmp_path_factory):
    """One launch for all cases."""
    if n_ranks not in _FOUND:
        two_segments = ("exact", "mix, exact", "recurrent, exact", "auxiliary exits in some steps")
        names = [name for name in CASES if n_ranks == 2 or name not in two_segments]
        _FOUND[n_ranks] = run_on(n_ranks, names, tmp_path_factory.mktemp("spread"))
    return _FOUND[n_ranks]


def summed(tensors):
    """By name, over the ranks."""
    names = {name for each in tensors for name in each}
    return {name: sum(each[name] for each in tensors if name in each) for name in names}


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_find_what_one_process_finds(name, n_ranks, tmp_path_factory):
    by_rank = [found.get(name) for found in found_by(n_ranks, tmp_path_factory)]
    if by_rank[0] is None:
        pytest.skip("its segments are fewer than the ranks")
    alone, _ = steps(name)
    for step, (loss, node_losses, metrics, gradients, states) in enumerate(alone[:-1]):
        theirs = [found[step] for found, _ in by_rank]
        torch.testing.assert_close(sum(each[0] for each in theirs), loss, **CLOSE)
        torch.testing.assert_close(sum(each[1] for each in theirs), node_losses, **CLOSE)
        torch.testing.assert_close(summed([each[2] for each in theirs]), metrics, **CLOSE)
        torch.testing.assert_close(summed([each[3] for each in theirs]), gradients, **CLOSE)
        torch.testing.assert_close(summed([each[4] for each in theirs]), states, **CLOSE)
        assert all(len({*each[4]} & {*other[4]}) == 0 for each in theirs for other in theirs if each is not other)
    torch.testing.assert_close(sum(found[-1][0] for found, _ in by_rank), alone[-1][0], **CLOSE)


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_blocks_lie_on_one_rank_each(n_ranks, tmp_path_factory):
    by_rank = [found["K = M = 1"][0][0][3] for found in found_by(n_ranks, tmp_path_factory)]
    blocks = [{name.split(".")[1] for name in each if name.startswith("blocks.")} for each in by_rank]
    assert sorted(number for each in blocks for number in each) == [str(n) for n in range(7)]


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_what_is_sent_does_not_grow_with_the_blocks(n_ranks, tmp_path_factory):
    """Four segments of 2, 4 and 8 blocks. Below exact one collective for the first estimate, one for each of the K + 1
    passes, one for the first adjoints, and one for each of the M iterations; exact, one message from rank to rank each
    way. Two steps, and an
    evaluation, which has no adjoints."""
    found = found_by(n_ranks, tmp_path_factory)
    for kind, per_step, without in (("deep", 1 + 2 + 1 + 1, 1 + 2), ("deep, exact", 0, 0)):
        by_rank = [[each[f"{kind}: {n}"][1] for n in (7, 15, 31)] for each in found]
        for rank, traffic in enumerate(by_rank):
            assert traffic[0] == traffic[1] == traffic[2]
            assert traffic[0]["collectives"] == 2 * per_step + without
            assert traffic[0]["asked"] == 1  # whether all have the same, before the first step
            forward, back = 0 < n_ranks - 1 - rank, rank > 0
            assert traffic[0]["messages"] == (3 * forward + 2 * back if kind == "deep, exact" else 0)


@pytest.mark.parametrize("name", FROZEN)
def test_a_rank_may_have_nothing_to_train(name, tmp_path_factory):
    by_rank = [each[name] for each in found_by(2, tmp_path_factory)]
    torch.testing.assert_close(summed(by_rank), frozen(name), **CLOSE)


def test_what_would_be_wrong_without_a_word_is_refused(tmp_path_factory):
    for batches, rows, labels, seeds, weights, shared, foreign in (each["refused"] for each in found_by(2, tmp_path_factory)):
        assert batches.startswith("the ranks of a model are given different batches ([2, 7] of torch.int64, [3, 7] of")
        assert "different batches" in rows and "different batches" in labels
        assert "different seeds" in seeds and "as rank the number of their replica" in seeds
        assert weights.startswith("embedding or head differ between the ranks")
        assert "is also one of another part of the model" in shared and "use one rank" in shared
        assert "another rank holds that block" in foreign


class Normed(torch.nn.Sequential):
    """A head that keeps running statistics of what it reads."""

    def __init__(self, tracks=True):
        super().__init__(torch.nn.BatchNorm1d(4, track_running_stats=tracks), torch.nn.Linear(4, 2))


def test_a_head_that_keeps_statistics_is_refused():
    """The first rank, whose head is saved, scores no exit of the others."""
    blocks = lambda: [torch.nn.BatchNorm1d(4) for _ in range(3)]
    with pytest.raises(ValueError, match=r"2 ranks with head.0=BatchNorm1d object: .*track_running_stats=False, .* one rank"):
        LocalObjective(DepthHierarchy(blocks(), Normed()), "sweeps:chunk_size=2", ranks=Ranks(0, 2))
    LocalObjective(DepthHierarchy(blocks(), Normed()), "sweeps:chunk_size=2")
    LocalObjective(DepthHierarchy(blocks(), Normed(tracks=False)), "sweeps:chunk_size=2", ranks=Ranks(0, 2))
    LocalObjective(DepthHierarchy(blocks(), torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(4)), "sweeps:chunk_size=2",
                   ranks=Ranks(0, 2))  # every rank embeds all inputs


class Narrowing(Calls):
    def apply(self, indices, states):
        return [state.bfloat16() for state in states]


def test_a_block_that_changes_the_dtype_is_refused():
    """Who receives its state would read other bytes."""
    chain = CallChain(Narrowing(), [0, 1], placement=RankPlacement(Ranks(n_ranks=2)))
    with pytest.raises(ValueError, match="makes torch.bfloat16 of torch.float32: .* or use one rank"):
        chain.apply(slice(0, 1), torch.ones(1, 3))
