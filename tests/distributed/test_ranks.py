"""Where a process stands in a launch that spreads blocks over ranks: real processes over gloo."""

import pytest
from helpers.ranks_work import run_on

from hbll_seq.distributed.ranks import ALONE, Ranks, make_ranks


def test_a_process_alone_has_the_whole_model():
    with pytest.raises(ValueError, match=r"shares=\(4,\) with block_parallel=1: .* leave shares out"):
        make_ranks(1, shares=(4,))
    assert make_ranks(1) == ALONE == Ranks(0, 1, 0, 1, None, None, None, None)
    with pytest.raises(ValueError, match="block_parallel=2 with 1 process: .*--num_processes 2"):
        make_ranks(2)


def test_four_processes_are_two_replicas_of_two_ranks(tmp_path):
    """Neighbours hold one model: the groups of processes 0, 1 and 2, 3 sum to 1 and 5, those of 0, 2 and 1, 3 to 2 and 4."""
    assert run_on(4, "standing", tmp_path, 2) == [
        (0, 2, 0, 2, 1.0, 2.0, 6.0, 1.0),
        (1, 2, 0, 2, 1.0, 4.0, 6.0, 1.0),
        (0, 2, 1, 2, 5.0, 2.0, 6.0, 5.0),
        (1, 2, 1, 2, 5.0, 4.0, 6.0, 5.0),
    ]


def test_one_replica_of_two_ranks_and_two_of_one(tmp_path):
    assert run_on(2, "standing", tmp_path, 2) == [(rank, 2, 0, 1, 1.0, None, 1.0, 1.0) for rank in range(2)]
    assert run_on(2, "standing", tmp_path, 1) == [(0, 1, replica, 2, *[None] * 4) for replica in range(2)]


def test_a_rank_that_does_not_answer_is_not_waited_for_for_ever(tmp_path):
    assert run_on(2, "waiting", tmp_path) == [True, None]


def test_processes_that_do_not_divide_are_refused(tmp_path):
    for message in run_on(2, "refused", tmp_path, 3):
        assert message.startswith("block_parallel=3 with 2 processes: ") and "--num_processes 3" in message


@pytest.mark.parametrize("part", ["blocks.2.", "embed."])
def test_replicas_that_begin_with_other_weights_are_refused(tmp_path, part):
    """On every process, also on a rank that has none of these blocks: nobody would make them alike, as
    DistributedDataParallel does."""
    for message in run_on(4, "unlike", tmp_path, part):
        assert message is not None and "replicas of a model begin with different weights" in message
    assert run_on(4, "unlike", tmp_path, "nothing") == [None] * 4
