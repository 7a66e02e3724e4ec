"""Sequences on ranks: what they find between them is what one process finds, and none of them sees more than its part."""

import re
from pathlib import Path

import forked
import kill_and_resume as kr
import pytest
import torch
from helpers.spread_time_work import (
    CASES,
    LEARNED,
    LINEARIZATIONS,
    LONG,
    LONG_SIZE,
    WIDTH,
    beside,
    costs,
    objective_of,
    run_on,
    steps,
)

from hbll_seq.chains.time_tree import RecurrentTree
from hbll_seq.distributed.ranks import Ranks
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.recurrent import RecurrentLM
from hbll_seq.objectives.options import Sweeps, TimeTree, TreeGuess
from hbll_seq.objectives.recurrent import RecurrentLocalObjective

CLOSE = dict(rtol=1e-10, atol=1e-10)
_FOUND, _ALONE = {}, {}


def found_by(n_ranks, tmp_path_factory):
    """One launch for all cases."""
    if n_ranks not in _FOUND:
        _FOUND[n_ranks] = run_on(n_ranks, tmp_path_factory.mktemp("time"))
    return _FOUND[n_ranks]


def alone(name):
    if name not in _ALONE:
        _ALONE[name] = steps(name)
    return _ALONE[name]


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_find_what_one_process_finds(name, n_ranks, tmp_path_factory):
    by_rank = [found["steps"][name] for found in found_by(n_ranks, tmp_path_factory)]
    expected, (parameters, buffers), measured = alone(name)
    close = dict(rtol=1e-3, atol=1e-4) if name == LEARNED else CLOSE
    for step, (loss, node_losses, metrics, state, gradients, by_state) in enumerate(expected):
        theirs = [found[0][step] for found in by_rank]
        torch.testing.assert_close(sum(each[0] for each in theirs), loss, **close)
        torch.testing.assert_close(sum(each[1] for each in theirs), node_losses, **close)
        summed = {metric: sum(each[2][metric] for each in theirs) for metric in theirs[0][2]}
        torch.testing.assert_close(summed, metrics, **close)
        torch.testing.assert_close(sum(each[5] for each in theirs), by_state, **close)
        for each in theirs:
            torch.testing.assert_close(each[3], state, **close)
            torch.testing.assert_close(each[4], gradients, **close)
    for _, (own_parameters, own_buffers), (_, own_state) in by_rank:
        torch.testing.assert_close(own_parameters, parameters, **close)
        torch.testing.assert_close(own_state, measured[1], **close)
        assert all(torch.equal(own_buffers[key], by_rank[0][1][1][key]) for key in buffers)  # bit for bit
    torch.testing.assert_close(sum(found[2][0] for found in by_rank), measured[0], **close)


def test_two_replicas_of_two_ranks_average_their_gradients(tmp_path_factory):
    first, second = beside(0), beside(1)
    expected = {name: (first[name] + second[name]) / 2 for name in first}
    for found in found_by(4, tmp_path_factory):
        torch.testing.assert_close(found["beside"], expected, **CLOSE)


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_matrices_are_learned_from_all_ranks(n_ranks, tmp_path_factory):
    _, (_, expected), _ = alone(LEARNED)
    for found in found_by(n_ranks, tmp_path_factory):
        _, (_, buffers), _ = found["steps"][LEARNED]
        assert int(buffers["secants.n_steps"]) == 3
        for name, buffer in buffers.items():
            scale = expected[name].abs().max()
            torch.testing.assert_close(buffer, expected[name], rtol=0, atol=1e-3 * float(scale))


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("linearization", LINEARIZATIONS)
def test_no_rank_makes_tensors_of_a_whole_sequence(linearization, n_ranks, tmp_path_factory):
    largest, total, calls, _ = costs(linearization)
    per_step = 2 * WIDTH
    assert largest >= 3 * LONG * per_step  # in one process: the gates of all steps
    for found in found_by(n_ranks, tmp_path_factory):
        own_largest, own_total, own_calls, _ = found["costs"][linearization, LONG]
        assert own_largest <= largest / n_ranks
        assert own_calls <= calls / n_ranks + 2 * LONG_SIZE
        assert own_total <= (1 / n_ranks + 0.1) * total  # the ends of all segments are composed on every rank


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_collectives_of_a_step_do_not_depend_on_the_length(n_ranks, tmp_path_factory):
    # K and M passes, and the last state; the diagonal composes once more and tells what is upstream, matrices tell that too
    # and learn forwards and back
    expected = {"zero": 2 + 2 + 1, "diagonal": 2 + 2 + 1 + 2, "shared_matrix": 2 + 2 + 1 + 1 + 2}
    for found in found_by(n_ranks, tmp_path_factory):
        for (linearization, _), (*_, traffic) in found["costs"].items():
            assert traffic["collectives"] == expected[linearization] and traffic["messages"] == 0


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_fewer_segments_than_ranks_are_refused_on_every_rank(n_ranks, tmp_path_factory):
    said = {found["refused"] for found in found_by(n_ranks, tmp_path_factory)}
    size = {2: 3, 4: 1}[n_ranks]
    assert len(said) == 1 and f"4 steps with chunk_size=4 on {n_ranks} ranks: 1 segment," in said.pop()
    fits = objective_of("from zero", Ranks(0, n_ranks))
    with pytest.raises(ValueError, match=f"a chunk_size of at most {size}, or fewer ranks"):
        fits(torch.zeros(2, 5, dtype=torch.int64))


def test_shares_that_do_not_fit_a_sequence_are_refused():
    """The message is of steps, and other sequences or ranks are its remedy."""
    objective = lambda shares: RecurrentLocalObjective(
        RecurrentLM(11, make_cell("gru", 5, WIDTH)), "sweeps:chunk_size=4", ranks=Ranks(0, 2, shares=shares)
    )
    with pytest.raises(ValueError, match=r"sequences of 12 steps .* 3 segments, and shares=\(1, 3\) are 4") as error:
        objective((1, 3))._span(12)
    assert "block" not in str(error.value) and "sequences of 13 to 16 steps" in str(error.value)
    assert objective((1, 3))._span(13).stop == objective((1, 3))._span(16).stop == 4
    assert objective(None)._span(12).stop == 4


def test_what_needs_the_whole_sequence_is_refused():
    model, ranks = RecurrentLM(11, make_cell("gru", 5, WIDTH)), Ranks(0, 2)
    tree = RecurrentTree("gru", 5, WIDTH, 2)
    for inference, said in (
        (TimeTree(tree), "2 ranks with inference='tree': .*use 'sweeps', or one rank"),
        (Sweeps(init=TreeGuess(tree)), r"2 ranks with init=TreeGuess\(..\): .*or one rank"),
        (Sweeps(control="adaptive"), "2 ranks with a control: .*use fixed sweeps"),
    ):
        with pytest.raises(ValueError, match=said):
            RecurrentLocalObjective(model, inference, ranks=ranks)


def test_the_page_s_example_trains_the_same_model_on_two_processes(tmp_path):
    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (code,) = [block for block in found if "make_ranks" in block]
    script, models = tmp_path / "script.py", {}
    saves = f"torch.save(model.state_dict(), f'{tmp_path}/{{n_ranks}}-{{ranks.rank}}.pt')\n"
    script.write_text(code + saves, encoding="utf-8")
    for n in (1, 2):
        codes, said = forked.group(n, [str(script)], kr.environment_of_scripts())
        assert codes == [0] * n, "\n".join(said)
        models[n] = [torch.load(tmp_path / f"{n}-{rank}.pt", weights_only=True) for rank in range(n)]
    torch.testing.assert_close(models[2][0], models[1][0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(models[2][1], models[2][0], rtol=0, atol=0)
