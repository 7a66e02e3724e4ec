"""train/lm.py with recurrent blocks: states carried across windows, saved, resumed, the same on any arrangement of rows."""

import dataclasses
import json
import os
import signal

import kill_and_resume as kr
import pytest
import torch
from forked import pair
from safetensors.torch import load_file, save_file

from hbll_seq.evaluation.perplexity import evaluate_paths
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.training import checkpoint as ck
from hbll_seq.training.objective import make_objective
from hbll_seq.training.presets import PRESETS, read_preset, resolve
from hbll_seq.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("blank_figures")

lm = kr.load_script()
GRU = ["--cell", "gru", "--carry-state", "--max-steps", "24", "--time-chunk-size", "4"]


@pytest.fixture(scope="module")
def options(lm_options):
    return [*lm_options, *GRU]


@pytest.fixture(scope="module")
def unbroken(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid") / "run"
    assert lm.main([*options, "--output-dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("objective", ["sweeps", "backprop"])
def test_a_broken_run_resumed_is_the_unbroken_run(options, unbroken, tmp_path, monkeypatch, objective):
    if objective == "backprop":
        options, unbroken = [*options, "--objective", "backprop"], tmp_path / "unbroken"
        assert lm.main([*options, "--output-dir", str(unbroken)]) == 0
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kr.at_step(patch, 13, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert lm.main([*options, "--output-dir", str(folder)]) == 143
    carried = load_file(folder / "checkpoints" / "step-00000013" / "carried.safetensors")
    assert carried["0|1,2,3"].shape == (2, 16) and all(t.abs().max() > 0 for t in carried.values())
    assert set(carried) == {"0|1", "0|1,2", "0|1,2,3"} | ({"0|2"} if objective == "sweeps" else set())
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0
    assert kr.differences(unbroken, folder) == []


def test_a_killed_run_resumed_is_the_unbroken_run(options, unbroken, tmp_path):
    folder = tmp_path / "run"
    kr.kill_at(8, options, folder)
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0
    assert kr.differences(unbroken, folder) == []


@pytest.fixture
def saved_at_10(options, tmp_path):
    folder = tmp_path / "saved"
    assert lm.main([*options, "--save-every", "10", "--keep-checkpoints", "9", "--output-dir", str(folder)]) == 0
    return folder


def test_the_comparison_sees_a_state_that_was_lost(saved_at_10, unbroken, monkeypatch):
    assert kr.differences(unbroken, saved_at_10) == []
    monkeypatch.setattr(Trainer, "_own_states", lambda self, tensors: [{}])
    assert lm.main(["--resume", "10", "--output-dir", str(saved_at_10)]) == 0
    assert "metrics.jsonl, step 11" in kr.differences(unbroken, saved_at_10)


def test_a_state_of_another_batch_is_refused(saved_at_10, capsys):
    path = saved_at_10 / "checkpoints" / "step-00000010"
    file, document = path / "carried.safetensors", path / "state.json"
    save_file({name: t[:1].contiguous() for name, t in load_file(file).items()}, file)
    state = json.loads(document.read_text())
    state["files"][file.name] = ck.digest(file)
    kr.write_state(path, state)
    kr.fails(["--resume", "10", "--output-dir", str(saved_at_10)], capsys, "carried state", "(1, 16)", "(2, 16)")


def test_rows_read_their_own_stretch_and_keep_their_own_state(options, tmp_path, monkeypatch):
    """Micro batches too: three of two rows are one batch of six."""
    seen, original = [], LocalObjective.forward

    def spy(self, inputs, labels=None, step=0, states=None):
        output = original(self, inputs, labels, step, states)
        seen.append((inputs, states, output.states))
        return output

    monkeypatch.setattr(LocalObjective, "forward", spy)
    several = [*options, "--grad-accum", "3", "--batch-size", "2", "--max-steps", "4", "--output-dir", str(tmp_path / "a")]
    assert lm.main(several) == 0
    calls, seen[:] = list(seen), []
    assert lm.main([*options, "--batch-size", "6", "--max-steps", "4", "--output-dir", str(tmp_path / "b")]) == 0
    for step, (inputs, states, _) in enumerate(seen):
        micro = calls[3 * step : 3 * step + 3]
        assert torch.equal(torch.cat([call[0] for call in micro]), inputs)
        assert all(bool(call[1]) == bool(states) == (step > 0) for call in micro)
        for prefix, state in states.items():
            torch.testing.assert_close(torch.cat([call[1][prefix] for call in micro]), state, rtol=1e-4, atol=1e-5)
        if step:
            for m in range(3):
                assert all(torch.equal(calls[3 * step + m][1][p], s) for p, s in calls[3 * step - 3 + m][2].items())
            ends, starts = seen[step - 1][0][:, -1], inputs[:, 0]
            assert (ends == starts).sum() >= 5  # one row at most passes the end of the text
    for one, other in zip(kr.lines(tmp_path / "a"), kr.lines(tmp_path / "b"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_two_processes_equal_one_and_resume(options, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*options, "--max-steps", "6", "--save-every", "3", "--keep-checkpoints", "9", "--eval-every", "0"]
    assert lm.main([*options, "--batch-size", "4", "--output-dir", str(one)]) == 0

    def launch(*arguments):
        codes, said = pair([str(kr.SCRIPT), *arguments], kr.environment_of_scripts())
        assert codes == [0, 0], said

    launch(*options, "--batch-size", "2", "--output-dir", str(two))
    for row, expected in zip(kr.lines(two), kr.lines(one), strict=True):
        assert [row[k] for k in ("loss", "ce", "grad_norm")] == pytest.approx(
            [expected[k] for k in ("loss", "ce", "grad_norm")], rel=1e-4
        )
    states = [load_file(run / "checkpoints" / "step-00000003" / "carried.safetensors") for run in (one, two)]
    assert states[0].keys() == states[1].keys()
    for name, state in states[0].items():  # all rows, in the same order
        torch.testing.assert_close(states[1][name], state, rtol=1e-3, atol=1e-4)
    losses, model = kr.losses_of(two), (two / "model.safetensors").read_bytes()
    launch("--resume", "3", "--output-dir", str(two))
    assert kr.losses_of(two) == losses and (two / "model.safetensors").read_bytes() == model


def test_the_trained_model_is_saved_loaded_and_generates(unbroken):
    model = HBLLForCausalLM.from_pretrained(unbroken)
    assert model.config.cell == "gru" and not model.config.has_attention
    for depth in (1, 2, 3):
        texts = [model.generate("the tree " * 40, depth=depth, max_new_tokens=8, seed=1) for _ in range(2)]
        assert texts[0] == texts[1] and texts[0].startswith("the tree " * 40)
    evaluated = json.loads((unbroken / "metrics.json").read_text())["test"]
    assert [row["depth"] for row in evaluated] == [1, 2, 3]
    settings = resolve(json.loads((unbroken / "metrics.json").read_text())["settings"])
    again = evaluate_paths(model, lm.data(settings).test, batch_size=settings.eval_batch_size,
                           max_batches=settings.final_eval_batches, carry_state=True)
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in evaluated], rel=1e-6)


def test_options_and_their_errors(lm_options, tmp_path, capsys):
    assert lm.main(["--preset", "gru-small", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "cell: gru" in shown and "carry_state: true" in shown
    mixed = ["--cell", "gru, transformer,mingru", "--carry-state", "--max-steps", "2"]
    assert lm.main([*lm_options, *mixed, "--output-dir", str(tmp_path / "mixed")]) == 0
    assert HBLLForCausalLM.from_pretrained(tmp_path / "mixed").config.cell == ("gru", "transformer", "mingru")
    for given, fragments in [
        (["--cell", "lstm"], ["cell='lstm'", "mingru"]),
        (["--cell", "gru,gru"], ["names 2 blocks", "has 3"]),
        (["--carry-state"], ["carry_state=True with cell='transformer'", "--cell"]),
        (["--cell", "gru", "--carry-state", "--objective", "tree"], ["carry_state=True with objective='tree'"]),
        (["--mlp-ratio", "0"], ["mlp_ratio=0"]),
        (["--cell", "gru", "--time-chunk-size", "0"], ["time_chunk_size=0"]),
        (["--cell", "gru", "--time-linearization", "identity"], ["time_linearization='identity'", "diagonal"]),
    ]:
        kr.fails([*lm_options, *given, "--output-dir", str(tmp_path / "no")], capsys, *fragments)


@pytest.mark.parametrize("preset", ["mingru-small", "hybrid-small"])
def test_presets_of_mingru_have_backprops_gradient_through_depth_and_time(preset):
    settings = resolve(read_preset(preset, PRESETS), {"n_embd": 16, "context_length": 24}).resolved()
    torch.manual_seed(0)
    model = HBLLForCausalLM(settings.model_config(vocab_size=32)).double()
    windows = torch.randint(32, (2, 25))
    ours, exact = (make_objective(dataclasses.replace(settings, objective=name), model, 0) for name in ("sweeps", "backprop"))
    losses = [objective(windows, step=1).loss for objective in (ours, exact)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    for got, wanted in zip(*(torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses)):
        assert (got is None) == (wanted is None)
        assert wanted is None or torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)
