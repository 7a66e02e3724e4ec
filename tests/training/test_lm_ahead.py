"""train/lm.py --block-parallel 2 --ahead in real processes over gloo, beside plain loops of one process."""

import helpers.fake_ranks
import kill_and_resume as kr
import pytest
import torch
from forked import group
from helpers.ahead_work import simulated

from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.training import checkpoint as ck
from hbll_seq.training.checkpoint_contents import load_module
from hbll_seq.training.optimizer import make_optimizer
from hbll_seq.training.schedule import rate_of_step
from hbll_seq.utils.tensors import module_tensors

SCRIPT, STEPS = helpers.fake_ranks.__file__, 6
SHAPE = ["--n-level", "3", "--chunk-size", "4", "--forward", "1", "--backward", "0", "--linearization", "zero",
         "--block-parallel", "2", "--ahead", "--max-steps", str(STEPS), "--save-every", "2", "--keep-checkpoints", "9",
         "--eval-every", "4"]  # fmt: skip


def launch(n, options, **environment):
    environment = {**kr.environment_of_scripts(), "FAKE_FLOAT64": "1", "REAL": "1", **environment}
    return group(n, [SCRIPT, *options], environment, keeps_store=True)


def run(n, options):
    codes, said = launch(n, options)
    assert codes == [0] * n, said
    return "".join(said)


@pytest.fixture(scope="module")
def shape(lm_options):
    return [*lm_options, *SHAPE]


@pytest.fixture(scope="module")
def two(shape, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead") / "run"
    assert "each model's blocks on 2, each ahead of the next" in run(2, [*shape, "--output-dir", str(folder)])
    return folder


def model_at(folder, step):
    return dict(ck.load_checkpoint(folder / "checkpoints", step)[0]["model"])


def by_loops(folder):
    """The objective of a run, trained by plain loops from the run's first checkpoint."""
    settings = kr.load_script().resume_run({"output_dir": str(folder)}, None)[0]
    data = kr.load_run().data(settings)
    model = HBLLForCausalLM(settings.model_config(data.tokenizer.vocab_size)).double()
    objective = LocalObjective(model, settings.inference(), depths=settings.depths(), time=settings.time(),
                               seed=settings.seed, micro_batches=settings.grad_accum)  # fmt: skip
    load_module(objective, model_at(folder, 0), "the first checkpoint")
    optimizer = make_optimizer(objective, settings)

    def before_update(step):
        torch.nn.utils.clip_grad_norm_(objective.parameters(), settings.clip)
        for each in optimizer.param_groups:
            each["lr"] = rate_of_step(step, [STEPS], peak=settings.lr, warmup=settings.warmup_steps,
                                      floor=settings.min_lr_ratio)  # fmt: skip

    batch_of = lambda number: data.train.batch(number, settings.batch_size, settings.seed)
    losses, _ = simulated(
        objective, batch_of, settings.block_parallel, STEPS, micro_batches=settings.grad_accum, size=settings.chunk_size,
        optimizer=optimizer, before_update=before_update,
    )  # fmt: skip
    by_step = torch.tensor(losses).sum(1).unflatten(0, (STEPS, settings.grad_accum)).mean(1)
    return by_step.tolist(), module_tensors(objective)


def assert_equals_loops(folder):
    losses, expected = by_loops(folder)
    assert [row["loss"] for row in kr.lines(folder)] == pytest.approx(losses, rel=1e-6)  # reported in single precision
    found = model_at(folder, STEPS)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9)


def test_a_run_does_what_plain_loops_do(two):
    """Also behind the checkpoints of steps 2 and 4, which change nothing."""
    assert_equals_loops(two)


def test_micro_batches_with_dropout_do_what_plain_loops_do(shape, tmp_path):
    run(2, [*shape, "--grad-accum", "2", "--dropout", "0.1", "--output-dir", str(tmp_path / "run")])
    assert_equals_loops(tmp_path / "run")


def test_four_ranks_with_auxiliary_exits_and_their_blocks_do_what_plain_loops_do(shape, tmp_path):
    """As docs/parallel.md says it, with the default paths of this mix."""
    more = "--block-parallel 4 --chunk-size 2 --forward 4 --depth-mix prefixes".split()
    more += "--auxiliary-exits 1 --auxiliary-blocks 1".split()
    run(4, [*shape, *more, "--output-dir", str(tmp_path / "run")])
    assert_equals_loops(tmp_path / "run")
    folder = tmp_path / "run"
    assert ck.load_checkpoint(folder / "checkpoints", 4)[0]["ahead"].keys() == {"1", "2", "3"}
    run(2, ["--resume", "4", "--block-parallel", "2", "--output-dir", str(folder)])  # which makes its states anew
    rows = kr.lines(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)) and rows[-1]["loss"] < rows[0]["loss"]


def test_two_replicas_are_one_with_twice_the_rows(two, shape, tmp_path):
    run(4, [*shape, "--batch-size", "1", "--output-dir", str(tmp_path / "four")])
    assert kr.lines(two)[0]["tokens"] == kr.lines(tmp_path / "four")[0]["tokens"]
    for name, tensor in model_at(tmp_path / "four", STEPS).items():
        torch.testing.assert_close(tensor, model_at(two, STEPS)[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fault, code", [("1:2:stop", 143), ("1:5:kill", -9),
                                         pytest.param("0:5:kill", -9, marks=pytest.mark.slow)])  # fmt: skip
def test_a_run_that_goes_on_repeats_the_unbroken_one_bit_for_bit(two, shape, tmp_path, fault, code):
    """It was stopped where no checkpoint was due, or killed behind one; a rank that is killed ends both."""
    folder = tmp_path / "run"
    codes, said = launch(2, [*shape, "--output-dir", str(folder)], FAULT=fault)
    assert codes[int(fault[0])] == code and 0 not in codes, said
    assert ck.sound_checkpoints(folder / "checkpoints") == ([0, 2, 4] if code == -9 else [0, 2, 3])
    if code == -9:
        assert "".join(said).count("another process of this launch ended") == 1
    run(2, ["--resume", "--output-dir", str(folder)])
    assert kr.differences(two, folder) == []
    assert all(torch.equal(tensor, model_at(two, STEPS)[name]) for name, tensor in model_at(folder, STEPS).items())


def test_a_run_cannot_change_to_it(two):
    codes, said = launch(2, ["--resume", "4", "--no-ahead", "--output-dir", str(two)])
    assert codes == [2, 2] and "ahead=False (there True)" in "".join(said)
