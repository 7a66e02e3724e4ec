"""K and M that follow probes: raised where the gradient is poor, to exact and no further, and nothing else is touched."""

import copy
import math
from pathlib import Path

import pytest
import torch
from forked import pair
from helpers.language_models import small_lm
from kill_and_resume import environment_of_scripts

from hbll_seq.engine.iterations import Iterations
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.recurrent import RecurrentLM
from hbll_seq.objectives import control as ct
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.control import Adaptive, FidelityControl, cosine_of, exact_iterations
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import Sweeps
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective, RecurrentLocalObjective

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = torch.randint(17, (40, 2, 9), generator=GENERATOR)
LONG = torch.randint(17, (40, 2, 25), generator=GENERATOR)


def scaled_lm(scale, **changes):
    """Blocks whose branches are so much larger than those of a model that has hardly begun to learn."""
    model = small_lm(**changes)
    with torch.no_grad():
        for block in model.blocks:
            for name, p in block.named_parameters():
                if "out" in name or "proj" in name:
                    p.mul_(scale)
    return model


def recurrent_lm(memory=None):
    torch.manual_seed(0)
    return RecurrentLM(17, make_cell("gru", 5, 6, memory))


def course(objective, batches=BATCHES, steps=range(24), lr=1e-3):
    """Metrics of some training steps."""
    optimizer, found = torch.optim.SGD(objective.parameters(), lr=lr), []
    for step in steps:
        output = objective(batches[step], step=step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        found.append({name: float(value) for name, value in output.metrics.items()})
    return found


def numbers_of(rows):
    return [(row["forward"], row["backward"]) for row in rows]


def gradient(objective, tokens):
    objective.zero_grad()
    objective(tokens).loss.backward()
    return torch.cat([p.grad.flatten() for p in objective.parameters()])


# ------------------------------------------------------------------------------------------- where it is needed and not


@pytest.mark.parametrize("make, sweeps, batches, exact", [
    (lambda s: LocalObjective(scaled_lm(3), s), dict(chunk_size=2), BATCHES, (3, 3)),
    (lambda s: LocalObjective(scaled_lm(3), s), dict(chunk_size=1, init="input"), BATCHES, (6, 6)),
    (lambda s: LocalObjective(scaled_lm(3), s, depths="octaves"), dict(chunk_size=2), BATCHES, (3, 3)),
    (lambda s: RecurrentLocalObjective(recurrent_lm(30.0), s), dict(chunk_size=6), LONG, (3, 4)),
], ids=["segments", "single", "mix", "time"])  # fmt: skip
def test_a_hard_model_is_raised_to_exact_one_by_one_and_no_further(make, sweeps, batches, exact):
    objective = make(Sweeps(0, 0, **sweeps, control=Adaptive(1e-6, every=1)))
    numbers = numbers_of(course(objective, batches))
    n_steps = 24 if batches is LONG else 7
    assert numbers[0] == (0, 0) and numbers[-1] == exact == exact_iterations(sweeps["chunk_size"], n_steps, batches is LONG)
    assert all(sum(after) - sum(before) in (0, 1) for before, after in zip(numbers, numbers[1:]))
    if isinstance(objective, LocalObjective):
        reference = BackpropObjective(objective.model, depths=objective.depths)
    else:
        reference = RecurrentBackpropObjective(objective.model)
    torch.testing.assert_close(gradient(objective, batches[0]), gradient(reference, batches[0]), rtol=1e-3, atol=1e-5)


def test_an_easy_model_stays_at_the_start():
    rows = course(LocalObjective(scaled_lm(0.01), Sweeps(1, 1, 2, control=Adaptive(0.02, every=1))))
    assert set(numbers_of(rows)) == {(1, 1)} and min(row["cosine"] for row in rows) > 0.98


@pytest.mark.parametrize("most", [1, 2])
def test_it_is_not_raised_beyond_most(most):
    rows = course(LocalObjective(scaled_lm(3), Sweeps(0, 0, 2, control=Adaptive(1e-4, most, every=1))))
    assert numbers_of(rows)[-1] == (most, most)


def test_a_start_beyond_exact_is_left_alone():
    rows = course(LocalObjective(scaled_lm(3), Sweeps(9, 9, 2, control=Adaptive(1e-4, every=1))))
    assert set(numbers_of(rows)) == {(9, 9)} and rows[-1]["cosine"] == pytest.approx(1, abs=1e-5)


def test_what_became_easy_is_lowered_to_the_start_again():
    objective = LocalObjective(scaled_lm(3), Sweeps(1, 1, 2, control=Adaptive(0.01, every=1)))
    course(objective, steps=range(8))
    assert objective.control.chosen.tolist() > [1, 1]
    easy = scaled_lm(0.01).state_dict()
    objective.model.load_state_dict(easy)
    numbers = numbers_of(course(objective, steps=range(8, 30)))
    assert numbers[-1] == (1, 1)
    assert all(sum(before) - sum(after) in (0, 1) for before, after in zip(numbers, numbers[1:]))


def test_recurrent_blocks_are_compared_with_what_their_own_iterations_tend_to():
    sweeps = Sweeps(0, 0, 2, control=Adaptive(1e-3, every=1))
    objective = LocalObjective(scaled_lm(3, cell="gru"), sweeps, time="sweeps:forward=2")
    rows = course(objective)
    assert rows[0]["cosine"] < 0.999 and rows[-1]["cosine"] > rows[0]["cosine"]
    assert numbers_of(rows)[-1] > (0, 0)


# ----------------------------------------------------------------------------------------------- the rules, one by one


def control(start=(1, 1), **options):
    return FidelityControl(Adaptive(**options), Iterations(*start, 2))


def vector(error):
    """A gradient whose cosine with (1, 0) misses 1 by ``error``."""
    cosine = 1.0 - error
    return [torch.tensor([cosine, math.sqrt(1.0 - cosine * cosine)])]


EXACT = vector(0.0)


def probed(made, error, at=None):
    made.begin_step()
    made.probe(10, vector(error), EXACT, at or (lambda forward, backward: vector(0.0)))
    made.end_step(torch.tensor(0.5))
    return made.chosen.tolist()


@pytest.mark.parametrize("states, adjoints, chosen", [(0.3, 0.1, [2, 1]), (0.1, 0.3, [1, 2]), (0.2, 0.2, [2, 1])])
def test_the_side_that_alone_misses_more_is_raised(states, adjoints, chosen):
    asked = []

    def at(forward, backward):
        asked.append((forward, backward))
        return vector(states if forward == 1 else adjoints)

    assert probed(control(), 0.3, at) == chosen
    assert asked == [(1, 4), (4, 1)]  # of five segments four iterations make the states exact, and the adjoints


def test_an_exact_side_is_not_asked():
    def at(forward, backward):
        raise AssertionError("nothing is left to decide")

    assert probed(control((4, 1)), 0.3, at) == [4, 2]
    assert probed(control((1, 5)), 0.3, at) == [2, 5]
    assert probed(control((4, 5)), 0.3, at) == [4, 5]


def test_within_the_tolerance_nothing_changes_and_calm_is_counted_in_a_row():
    made = control()
    made.chosen.copy_(torch.tensor([2, 2]))
    for error in (0.019, 0.006, 0.004, 0.004, 0.006, 0.004, 0.004):
        assert probed(made, error) == [2, 2]
    assert probed(made, 0.004) == [1, 2]  # the third in a row; both could do without, K goes first


def test_nothing_is_lowered_that_would_soon_be_raised():
    def at(forward, backward):
        return vector(0.011 if forward == 2 else 0.015)

    made = control()
    made.chosen.copy_(torch.tensor([2, 2]))
    for _ in range(9):
        assert probed(made, 0.0, at) == [2, 2]


def test_what_is_not_finite_decides_nothing():
    made = control()
    made.begin_step()
    made.probe(10, [torch.tensor([math.nan, 1.0])], EXACT, None)
    assert made.chosen.tolist() == [1, 1] and float(made.metrics()["cosine"]) == 1.0


def test_cosines_of_gradients_with_gaps():
    one, none = [torch.ones(2), None, None], [None, None, torch.ones(2)]
    assert float(cosine_of(one, one)) == pytest.approx(1) and float(cosine_of(one, none)) == 0
    assert float(cosine_of([torch.zeros(2)], [torch.zeros(2)])) == 1 == float(cosine_of([None], [None]))
    assert float(cosine_of([torch.zeros(2)], [torch.ones(2)])) == 0


def test_probes_come_every_so_many_optimizer_steps_and_early_after_a_jump():
    def due(residuals, **options):
        made, found = FidelityControl(Adaptive(every=20, **options), Iterations(1, 1, 2), micro_batches=2), []
        for step, residual in enumerate(residuals):
            for _ in range(2):
                if made.begin_step():
                    found.append(step)
                    made.probe(10, EXACT, EXACT, None)
                made.end_step(torch.tensor(residual))
        return found

    assert due([0.1] * 50) == [0, 20, 40]
    assert due([0.1, 0.1, 0.3] + [0.1] * 30) == [0, 4, 24]  # not before a fifth of them is over
    assert due([0.1] * 7 + [0.3] * 30) == [0, 8, 28]  # and once: what is compared with is the new one
    assert due([0.1] * 7 + [0.19] * 30) == [0, 20]


# -------------------------------------------------------------------------------------------------- what it leaves alone


@pytest.mark.parametrize("sweeps, more", [
    (dict(forward=1, backward=1, chunk_size=2), dict(depths="octaves")),
    (dict(forward=1, backward=1, linearization="low_rank"), dict(depths="random")),
    pytest.param(dict(forward=2, backward=1), dict(recompute=True), marks=pytest.mark.slow),
], ids=["mix", "secants", "recomputed"])  # fmt: skip
def test_probes_change_nothing_but_k_and_m(sweeps, more):
    """With K and M held by ``most`` a run with probes is bit for bit the run without, dropout and learned maps included."""
    held = Adaptive(1e-6, most=max(sweeps["forward"], sweeps["backward"]), every=1)
    sweeps["forward"] = sweeps["backward"] = held.most
    plain, probed = (
        LocalObjective(scaled_lm(2, dropout=0.2), Sweeps(**sweeps, control=control), seed=3, **more)
        for control in (None, held)
    )
    torch.manual_seed(1)
    one, rng = course(plain, lr=0.1), torch.get_rng_state()
    torch.manual_seed(1)
    other = course(probed, lr=0.1)
    assert torch.equal(rng, torch.get_rng_state())
    assert [{k: row[k] for k in one[0]} for row in other] == one
    assert min(row["cosine"] for row in other) < 1 - 1e-5
    state = probed.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_over_time_probes_change_nothing_either():
    for linearization in ("zero", "shared_matrix"):
        plain, probed = (
            RecurrentLocalObjective(recurrent_lm(30.0), Sweeps(1, 1, 4, linearization, control=control))
            for control in (None, Adaptive(1e-6, most=1, every=1))
        )
        one, other = course(plain, LONG, lr=0.1), course(probed, LONG, lr=0.1)
        assert [{k: row[k] for k in one[0]} for row in other] == one and min(row["cosine"] for row in other) < 0.999
        for name, tensor in plain.state_dict().items():
            assert torch.equal(tensor, probed.state_dict()[name]), name


def test_a_probe_sees_the_dropout_of_its_step():
    """Exact sweeps with dropout everywhere: were anything drawn anew, the two gradients would differ."""
    objective = LocalObjective(scaled_lm(2, dropout=0.5), Sweeps(6, 6, control=Adaptive(every=1)), seed=5)
    objective.model.embed = torch.nn.Sequential(objective.model.embed, torch.nn.Dropout(0.5))
    assert all(row["cosine"] == pytest.approx(1, abs=1e-5) for row in course(objective))


def test_a_probe_leaves_no_gradients():
    objective = LocalObjective(scaled_lm(3), Sweeps(0, 0, control=Adaptive(every=1)))
    objective(BATCHES[0])
    assert all(p.grad is None for p in objective.parameters()) and objective.control.chosen.tolist() != [0, 0]


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_evaluation_takes_k_and_m_as_they_are_and_changes_nothing(how):
    objective = LocalObjective(scaled_lm(3), Sweeps(0, 0, 2, control=Adaptive(1e-4, every=1)))
    course(objective, steps=range(3))
    before = copy.deepcopy(objective.state_dict())
    with torch.set_grad_enabled(how == "eval"):
        rows = [objective.train(how != "eval")(BATCHES[step]).metrics for step in range(4)]
    assert {(float(row["forward"]), float(row["backward"])) for row in rows} == {tuple(before["control.iterations"].tolist())}
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())


def test_the_micro_batches_of_an_optimizer_step_have_the_same_k_and_m():
    objective = LocalObjective(scaled_lm(3), Sweeps(0, 0, 2, control=Adaptive(1e-4, every=2)), micro_batches=3)
    rows = [{k: float(v) for k, v in objective(BATCHES[i % 40], step=i).metrics.items()} for i in range(36)]
    steps = [rows[i : i + 3] for i in range(0, 36, 3)]
    for step in steps:
        assert len({(row["forward"], row["backward"], row["cosine"], tuple(row)) for row in step}) == 1
    sums = [step[0]["forward"] + step[0]["backward"] for step in steps]
    assert [after - before for before, after in zip(sums, sums[1:])] == [1, 0] * 5 + [1]  # probes in the steps 0, 2, ..


# ---------------------------------------------------------------------------------------------------- resumed, processes


@pytest.mark.parametrize("over", ["depth", "time"])
def test_a_resumed_run_repeats_the_unbroken_one(over):
    def make():
        if over == "time":
            return RecurrentLocalObjective(recurrent_lm(30.0), Sweeps(0, 0, 6, control=Adaptive(1e-5, every=2)))
        options = Sweeps(0, 0, linearization="low_rank", control=Adaptive(1e-3, every=2))
        return LocalObjective(scaled_lm(2, dropout=0.1), options, depths="few", seed=7, micro_batches=2)

    batches = LONG if over == "time" else BATCHES
    whole, first, second = make(), make(), make()
    expected = course(whole, batches, lr=1e-4)
    for cut in (6, 10):
        found = course(first, batches, range(0 if cut == 6 else 6, cut), lr=1e-4)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        found = course(second, batches, range(cut, 24), lr=1e-4)
        assert found == expected[cut:] and len(set(numbers_of(found))) > 1 and math.isfinite(found[-1]["ce"])
        assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in whole.state_dict().items())


PROCESS = r"""
import sys, torch
sys.path.insert(0, {tests!r} + "/objectives")
import test_control as tc
from hbll_seq.training.devices import leaving_processes
def work():
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    made = tc.control()
    said = [tc.probed(made, 0.0 if rank == 0 else 0.1)]  # alone the first one would see nothing to raise
    for step in range(2):  # and the first one no jump
        made.begin_step()
        made.end_step(torch.tensor(0.1 if step == 0 or rank == 0 else 0.5))
    said.append(made.counts.tolist())
    objective = tc.LocalObjective(tc.scaled_lm(3), tc.Sweeps(0, 0, 2, control=tc.Adaptive(0.01, every=1)), rank=rank)
    model = torch.nn.parallel.DistributedDataParallel(objective)
    for step in range(8):
        model(tc.BATCHES[2 * step + rank], step=step).loss.backward()
        said.append([*objective.control.chosen.tolist(), float(objective.control.figures[0])])
    sys.stderr.write(str(said))
with leaving_processes():
    work()
"""


def test_two_processes_decide_alike_by_the_mean_of_what_they_measure(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(tests=str(Path(__file__).resolve().parents[1])))
    codes, said = pair([str(script)], environment_of_scripts())
    assert codes == [0, 0], said
    first, second = (text.splitlines()[-1] for text in said)
    assert first == second and first.startswith("[[2, 1], [3, 3, 0, 1], ")


def test_probes_over_time_run_no_hook_of_a_parameter():
    model, calls = recurrent_lm(), []
    model.cell.weight_hh.register_hook(lambda g: calls.append(1))
    objective = RecurrentLocalObjective(model, Sweeps(0, 0, 3, control=Adaptive(1e-6, every=1)))
    objective(torch.randint(17, (2, 13))).loss.backward()
    assert len(calls) == 1


def test_what_a_control_has_measured_keeps_its_precision():
    objective = LocalObjective(scaled_lm(1.0), Sweeps(1, 1, 2, control="adaptive"))
    objective.control.figures[0] = 0.987654
    assert objective.bfloat16().control.figures.dtype == torch.float32
    assert objective.control.figures[0].item() == pytest.approx(0.987654, abs=1e-6)


# --------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("call, message", [
    (lambda: Sweeps(control="mgrit"), "control='mgrit': allowed are adaptive"),
    (lambda: Sweeps(control=3), "control=3: allowed are adaptive"),
    (lambda: LocalObjective(small_lm(), "sweeps:forward=3,control=adaptive(most=2)"), "most=2 of the control with forward=3"),
    (lambda: LocalObjective(small_lm(), "sweeps:control=adaptive(most=x)"), "most='x': must be a whole number"),
    (lambda: LocalObjective(small_lm(), "sweeps:control=adaptive(often=2)"), "adaptive has no option 'often'"),
    (lambda: LocalObjective(small_lm(), "sweeps:control=adapt"), "control='adapt': allowed are adaptive, with options"),
    (lambda: LocalObjective(small_lm(), "sweeps", time="sweeps:control=adaptive"), "inside of blocks: nothing is measured"),
    (lambda: LocalObjective(small_lm(), "v_cycles:control=adaptive"), "v_cycles has no option 'control'"),
])  # fmt: skip
def test_what_it_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_constants_leave_room_between_raising_and_lowering():
    assert ct.CALM < ct.LOWERED < 1 < ct.JUMP
