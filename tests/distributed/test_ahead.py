"""Ranks that work ahead of each other: they do what plain loops in one process do, each on its own batch."""

import pytest
import torch
from helpers.ahead_work import (
    CASES,
    ROWS,
    STEPS,
    TOKENS,
    alone,
    batch,
    inference_of,
    model_of,
    objective_of,
    optimizer_of,
    run_on,
)

from hbll_seq.distributed.ranks import Ranks
from hbll_seq.objectives.local import LocalObjective

CLOSE = dict(rtol=1e-10, atol=1e-10)
_FOUND = {}


def found_by(n_ranks, tmp_path_factory):
    """One launch for all cases of so many ranks."""
    if n_ranks not in _FOUND:
        names = [name for name, case in CASES.items() if case[3] == n_ranks]
        more = ["learned", "refused"] if n_ranks == 2 else []
        _FOUND[n_ranks] = run_on(n_ranks, [*names, *more], tmp_path_factory.mktemp("ahead"))
    return _FOUND[n_ranks]


@pytest.mark.parametrize("name", CASES)
def test_ranks_do_what_plain_loops_do(name, tmp_path_factory):
    """Losses of every micro-batch, gradients of every step, and the parameters after six steps of AdamW."""
    by_rank = [found[name] for found in found_by(CASES[name][3], tmp_path_factory)]
    losses, gradients, parameters = alone(name)
    torch.testing.assert_close([list(each) for each in zip(*(found[0] for found in by_rank))], losses, **CLOSE)
    for step, expected in enumerate(gradients):
        theirs = [found[1][step] for found in by_rank]
        assert {name for each in theirs for name in each} == expected.keys()
        for each in theirs:  # a rank's blocks, and what all hold
            torch.testing.assert_close(each, {name: expected[name] for name in each}, **CLOSE)
    for found in by_rank:
        torch.testing.assert_close(found[2], {name: parameters[name] for name in found[2]}, **CLOSE)


def test_states_are_those_of_the_step_before(tmp_path_factory):
    """Where all work on one batch, the first step is the same, and those behind it are not."""
    last = found_by(2, tmp_path_factory)[1]["7 blocks"][0]
    model = model_of({})
    together, optimizer, losses = LocalObjective(model, inference_of(7, 4)), optimizer_of(model.parameters()), []
    for number in range(3):
        output = together(batch(number), step=number)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert last[0] == pytest.approx(losses[0], rel=1e-12)
    assert all(abs(ours - theirs) > 1e-4 for ours, theirs in zip(last[1:], losses[1:]))


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
def test_a_step_sends_one_state_forward_and_nothing_back(n_ranks, tmp_path_factory):
    """Whatever the number of blocks and the mix; no collective, beside the sums of gradients."""
    for rank, found in enumerate(found_by(n_ranks, tmp_path_factory)):
        for name in (name for name, case in CASES.items() if case[3] == n_ranks):
            state = 8 * ROWS * (TOKENS - 1) * 8
            assert set(found[name][3]) == {(1, state) if rank < n_ranks - 1 else (0, 0)}, name
            assert found[name][4] == 0


def test_the_mean_of_auxiliary_exits_does_not_depend_on_whose_draw_has_one(tmp_path_factory):
    """The two ranks' batches have draws of their own; block 4 has an auxiliary exit in some of them, in others the mix's."""
    name = "auxiliary exits in some steps"
    objective, _ = objective_of(name)
    taken = [4 not in objective.sub_networks(step)[0].exits for step in range(STEPS + 1)]
    assert {(False, False), (False, True), (True, False)} <= set(zip(taken, taken[1:]))  # of the last rank, of the first
    first, last = (found[name][5] for found in found_by(2, tmp_path_factory))
    assert set(last) == {0.0} and min(first) > 1.0
    assert first[0] == pytest.approx(float(objective(batch(1), step=1).metrics["ce_auxiliary"]), rel=1e-12)


def test_it_learns(tmp_path_factory):
    first, last = (found["learned"] for found in found_by(2, tmp_path_factory))
    assert set(first) == {0.0}  # the last rank alone knows them
    assert sum(last[-20:]) < 0.8 * sum(last[:20])


def test_what_would_be_wrong_without_a_word_is_refused(tmp_path_factory):
    for weights, shape, turn in (each["refused"] for each in found_by(2, tmp_path_factory)):
        assert weights.startswith("embedding or head differ between the ranks")
        assert "[3, 6]" in shape and "[3, 7]" in shape and "one shape" in shape
        assert "each call reads what was sent for the batch behind the last one" in turn and "placement.discard()" in turn


@pytest.mark.parametrize("shape, inference, options, named, remedy", [
    ({}, "sweeps:chunk_size=4", {}, "linearization='identity'", "linearization='zero'"),
    ({}, "sweeps:forward=1,backward=1,chunk_size=4,linearization=zero", {}, "backward=1", "backward=0"),
    ({}, "sweeps:forward=0,backward=0,chunk_size=4,linearization=zero", {}, "forward=0", "forward=1"),
    ({}, "sweeps:forward=6,backward=0,chunk_size=1,linearization=zero", {}, "chunk_size=1", "chunk_size=4"),
    ({}, "sweeps:forward=1,backward=0,chunk_size=4,linearization=zero,damping=0.5", {}, "damping=0.5", "damping=1"),
    ({}, "sweeps:forward=1,backward=0,chunk_size=4,linearization=zero,tolerance=0.1", {}, "tolerance=0.1", "tolerance=0"),
    ({"cell": "gru"}, "sweeps:forward=1,backward=0,chunk_size=4,linearization=zero", {}, "recurrent blocks", "without"),
    ({}, "tree", {}, "inference='tree'", "use 'sweeps'"),
    ({"default_paths": "prefix"}, inference_of(7, 3), {"depths": "octaves"}, "block 3", "chunk_size=4"),
    ({"default_paths": "prefix"}, inference_of(7, 4), {"depths": "ladder"}, "the path [4, 6]", "octaves"),
])  # fmt: skip
def test_what_cannot_work_ahead_is_refused(shape, inference, options, named, remedy):
    with pytest.raises(ValueError) as error:
        LocalObjective(model_of(shape), inference, ranks=Ranks(0, 2), ahead=True, **options)
    assert named in str(error.value) and remedy in str(error.value)


def test_where_a_rank_would_never_be_trained_is_refused():
    """Of 31 blocks on four ranks the first has blocks 1 to 8, and every path of the mix ends behind them."""
    model = model_of({"n_level": 5, "default_paths": "prefix"})
    with pytest.raises(ValueError, match="block 8, .*use 2 ranks, chunk_size=16"):
        LocalObjective(model, inference_of(31, 8), ranks=Ranks(3, 4), ahead=True, depths="octaves")
    LocalObjective(model, inference_of(31, 16), ranks=Ranks(1, 2), ahead=True, depths="octaves")


def test_one_rank_has_nobody_to_be_ahead_of():
    with pytest.raises(ValueError, match="ahead=True with one rank: .*leave ahead out"):
        LocalObjective(model_of({}), inference_of(7, 4), ahead=True)
