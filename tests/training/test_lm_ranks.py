"""train/lm.py --block-parallel in real processes over gloo: what stands around the objective, with one that sends nothing.

The same run as one process, its files, going on with another number of ranks, and what happens when a rank fails.
"""

import json
import shutil

import forked
import helpers.fake_ranks
import kill_and_resume as kr
import pytest
import torch
from safetensors.torch import load_file, save_file

from hbll_seq.training import checkpoint as ck
from hbll_seq.training.initial_model import read_initial_model
from hbll_seq.utils.integrity import digest

SCRIPT, STEPS = helpers.fake_ranks.__file__, 6
#: seven blocks in segments of one: up to seven ranks
SHAPE = ["--n-level", "3", "--chunk-size", "1", "--max-steps", str(STEPS), "--save-every", "2", "--keep-checkpoints", "9",
         "--eval-every", "4"]  # fmt: skip


def run(n, options, **environment):
    """The script in ``n`` processes; what they said."""
    codes, said = launch(n, options, **environment)
    assert codes == [0] * n, said
    return "".join(said)


def launch(n, options, **environment):
    environment = {**kr.environment_of_scripts(), "FAKE_FLOAT64": "1", **environment}
    return forked.group(n, [SCRIPT, *options], environment, keeps_store=True)


def parallel(n_ranks):
    return ["--block-parallel", str(n_ranks)]


@pytest.fixture(scope="module")
def shape(lm_options):
    return [*lm_options, *SHAPE]


@pytest.fixture(scope="module")
def one(shape, tmp_path_factory):
    """The run in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    run(1, [*shape, "--output-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def two(shape, tmp_path_factory):
    """The same with blocks on two ranks."""
    folder = tmp_path_factory.mktemp("two") / "run"
    said = run(2, [*shape, *parallel(2), "--output-dir", str(folder)])
    assert "on 2 x cpu, each model's blocks on 2" in said
    return folder


def tensors(folder, step=STEPS):
    groups, _ = ck.load_checkpoint(folder / "checkpoints", step)
    return {f"{group}|{name}": tensor for group, entries in groups.items() for name, tensor in entries.items()}


def assert_equal(found, wanted):
    """Two runs' tensors, bit for bit."""
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def assert_close(folder, expected, tolerance=1e-10):
    """Metrics, evaluations and all tensors of two runs; what metrics report is rounded to single precision."""
    for row, wanted in zip(kr.lines(folder), kr.lines(expected), strict=True):
        assert row.keys() == wanted.keys()
        for name in row.keys() - set(kr.TIMES):
            assert row[name] == pytest.approx(wanted[name], rel=3e-7, abs=1e-9), (row["step"], name)
    found, wanted = tensors(folder), tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype and tensor.shape == wanted[name].shape
        assert torch.allclose(tensor, wanted[name], rtol=tolerance, atol=tolerance), name
    models = [load_file(each / "model.safetensors") for each in (folder, expected)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.allclose(models[0][name], models[1][name], rtol=tolerance, atol=tolerance) for name in models[0])
    texts = [(each / "evaluations.jsonl").read_text().splitlines() for each in (folder, expected)]
    for row, other in zip(*(map(json.loads, lines) for lines in texts), strict=True):
        assert [r["loss"] for r in row["validation"]] == pytest.approx([r["loss"] for r in other["validation"]], rel=1e-9)
        assert [s["text"] for s in row["samples"]] == [s["text"] for s in other["samples"]]


def test_two_ranks_equal_one_process(one, two):
    assert_close(two, one)
    state = json.loads((two / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["num_processes"] == 2 and state["settings"]["block_parallel"] == 2
    assert_equal(tensors(two, 0), tensors(one, 0))  # bit for bit, where nothing has been added up yet
    assert json.loads((two / "metrics.json").read_text())["n_parameters"] == sum(
        tensor.numel() for tensor in load_file(one / "model.safetensors").values())


@pytest.mark.slow
def test_seven_ranks_equal_one_process(one, shape, tmp_path):
    run(7, [*shape, *parallel(7), "--output-dir", str(tmp_path / "run")])
    assert_close(tmp_path / "run", one)


@pytest.mark.slow
def test_two_replicas_of_two_ranks_equal_two_processes(shape, tmp_path):
    """Accumulated, on the same windows and noise; carried states of recurrent blocks are among what checkpoints hold."""
    options = [*shape, "--grad-accum", "2", "--cell", "gru,transformer,gru,transformer,gru,gru,transformer", "--carry-state"]
    run(2, [*options, "--output-dir", str(tmp_path / "two")])
    run(4, [*options, *parallel(2), "--output-dir", str(tmp_path / "four")])
    assert_close(tmp_path / "four", tmp_path / "two")
    carried = [name for name in tensors(tmp_path / "four") if name.startswith("carried")]
    assert len(carried) == 2 * 4 and tensors(tmp_path / "four")[carried[0]].shape == (4, 16)
    run(4, ["--resume", "2", "--output-dir", str(tmp_path / "four")])
    assert_close(tmp_path / "four", tmp_path / "two")
    # half the ranks: each replica's rows are read by one process
    run(2, ["--resume", "4", *parallel(1), "--output-dir", str(tmp_path / "four")])
    assert_close(tmp_path / "four", tmp_path / "two")


def test_blocks_beside_a_path_are_kept_and_not_trained(shape, tmp_path):
    options = [*shape, "--path", "4,6,7"]
    run(1, [*options, "--output-dir", str(tmp_path / "one")])
    run(2, [*options, *parallel(2), "--output-dir", str(tmp_path / "two")])
    assert_close(tmp_path / "two", tmp_path / "one")


def test_ranks_start_from_a_model_bit_for_bit(one, shape, tmp_path):
    folder = tmp_path / "run"
    options = [*shape, *parallel(2), "--max-steps", "1", "--eval-every", "0", "--init-from", str(one)]
    run(2, [*options, "--output-dir", str(folder)])
    found, wanted = tensors(folder, 0), load_file(one / "model.safetensors")
    assert found.keys() == {f"model|model.{name}" for name in wanted}
    assert all(torch.equal(found[f"model|model.{name}"], tensor) for name, tensor in wanted.items())
    record = json.loads((folder / "checkpoints" / "step-00000001" / "state.json").read_text())["initial_model"]
    assert record["sha256"] == read_initial_model(str(one)).fingerprint


def test_resumed_on_as_many_ranks_bit_for_bit(two, shape, tmp_path):
    folder = tmp_path / "run"
    codes, said = launch(2, [*shape, *parallel(2), "--output-dir", str(folder)], FAULT="1:3:stop")
    assert codes == [143, 143] and "".join(said).count("stopped after step 4, saved") == 1
    run(2, ["--resume", "--output-dir", str(folder)])
    assert kr.differences(two, folder) == []
    assert_equal(tensors(folder), tensors(two))


def test_unequal_shares_and_other_ones_at_a_resume(one, shape, tmp_path):
    options = [*parallel(2), "--output-dir", str(tmp_path / "run")]
    codes, said = launch(2, [*shape, *options, "--block-shares", "2,5"], FAULT="1:3:stop")
    assert codes == [143, 143], said
    run(2, ["--resume", *options, "--block-shares", "6,1"])
    assert_close(tmp_path / "run", one)
    run(1, ["--resume", "4", *parallel(1), "--output-dir", str(tmp_path / "run")])  # shares go with their number of ranks
    assert_close(tmp_path / "run", one)


@pytest.mark.parametrize("n", [1, 4])
def test_killed_and_resumed_on_another_number_of_ranks(one, two, shape, tmp_path, n):
    folder = tmp_path / "run"
    launch(2, [*shape, *parallel(2), "--output-dir", str(folder)], FAULT="1:5:kill")
    assert_equal(tensors(folder, 4), tensors(two, 4))
    said = run(n, ["--resume", *parallel(n), "--output-dir", str(folder)])
    assert f"num_processes is {n} and was '2'" in said or f"num_processes is {n} and was 2" in said
    assert_close(folder, one)


def test_a_run_of_one_process_goes_on_on_ranks(one, tmp_path):
    """And what they save is read by one process again."""
    folder = tmp_path / "run"
    shutil.copytree(one, folder)
    run(2, ["--resume", "4", *parallel(2), "--output-dir", str(folder)])
    assert_close(folder, one)
    assert files(folder, 4) == {"model.safetensors", "optimizer.safetensors"}
    assert files(folder, 6) == {f"{group}_{part}_of_2.safetensors" for group in ("model", "optimizer") for part in (1, 2)}


def files(folder, step):
    return {path.name for path in (folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")}


def test_another_number_of_replicas_is_refused(two):
    before = (two / "metrics.jsonl").read_bytes()
    codes, said = launch(2, ["--resume", "4", *parallel(1), "--output-dir", str(two)])
    assert codes == [2, 2] and "2 models are trained side by side, and were 1; launch 1 processes" in "".join(said)
    codes, said = launch(4, ["--resume", "4", "--output-dir", str(two)])
    assert codes == [2] * 4 and "launch 2 processes with --block-parallel 2" in "".join(said)
    codes, said = launch(1, ["--resume", "4", "--output-dir", str(two)])
    assert codes == [2] and "block_parallel=2 with 1 process: " in "".join(said)
    assert (two / "metrics.jsonl").read_bytes() == before and ck.list_checkpoints(two / "checkpoints") == [0, 2, 4, 6]


# ------------------------------------------------------------------------------------------------- with real losses


@pytest.mark.parametrize("options", [
    "--grad-accum 2",
    *[pytest.param(options, marks=pytest.mark.slow) for options in (  # the objective's own tests have their like
        "",
        "--forward 6 --backward 0 --linearization zero --auxiliary-exits 0.7",
        "--forward 1 --backward 1", "--depth-mix none --forward 2 --backward 1 --linearization zero",
        "--cell gru,transformer,gru,transformer,gru,gru,transformer --carry-state --depth-mix none",
        "--recompute --dropout 0.1 --exit-by depth",
    )],
])  # fmt: skip
def test_local_losses_on_ranks_equal_those_of_one_process(shape, tmp_path, options):
    options = [*shape, *options.split()]
    for n in (1, 2, 4):
        run(n, [*options, *parallel(n), "--output-dir", str(tmp_path / str(n))], REAL="1")
    assert_close(tmp_path / "2", tmp_path / "1")
    assert_close(tmp_path / "4", tmp_path / "1")


def test_the_script_itself_in_single_precision(shape, tmp_path):
    for n in (1, 2):
        options = [*shape, "--max-steps", "20", *parallel(n), "--output-dir", str(tmp_path / str(n))]
        codes, said = forked.group(n, [str(kr.SCRIPT), *options], kr.environment_of_scripts())
        assert codes == [0] * n, said
    rows = [kr.lines(tmp_path / n) for n in "12"]
    assert len(rows[0]) == 20
    for one, two in zip(*rows, strict=True):
        for name in ("loss", "ce", "ce_mix", "node_losses"):
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (one["step"], name)
        # torch adds up the squares of the embedding's gradient in single precision, ranks in double
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    models = [load_file(tmp_path / n / "model.safetensors") for n in "12"]
    assert all(torch.allclose(models[0][name], models[1][name], rtol=1e-3, atol=1e-3) for name in models[0])


def test_local_losses_of_two_replicas_on_two_ranks(shape, tmp_path):
    """And then as two plain processes: DistributedDataParallel's reduction and ours are one."""
    run(2, [*shape, "--output-dir", str(tmp_path / "two")], REAL="1")
    run(4, [*shape, *parallel(2), "--output-dir", str(tmp_path / "four")], REAL="1")
    assert_close(tmp_path / "four", tmp_path / "two")
    run(2, ["--resume", "2", *parallel(1), "--output-dir", str(tmp_path / "four")], REAL="1")
    assert_close(tmp_path / "four", tmp_path / "two")


# ------------------------------------------------------------------------------------------------------ a rank fails


@pytest.mark.parametrize("process, real", [(0, ""), (1, "1"), pytest.param(2, "", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind, words", [
    ("kill", "another process of this launch ended"), ("raise", "something is wrong on this rank"), ("nan", "loss=nan"),
])  # fmt: skip
def test_what_fails_on_one_rank_ends_all(shape, tmp_path, process, real, kind, words):
    """At once, with one message; the last checkpoint is whole."""
    folder = tmp_path / "run"
    codes, said = launch(3, [*shape, *parallel(3), "--output-dir", str(folder)], FAULT=f"{process}:5:{kind}", REAL=real)
    assert codes[process] == {"kill": -9, "raise": 2, "nan": 1}[kind]
    assert all(code not in (0, None) for code in codes), said
    assert "".join(said).count("error: ") == 1 and "".join(said).count(words) == 1 and "Traceback" not in "".join(said), said
    assert ck.sound_checkpoints(folder / "checkpoints") == [0, 2, 4]


def test_a_rank_that_hangs_is_waited_for_as_long_as_is_said(shape, tmp_path):
    """The other one ends, and by that the one that hangs."""
    options = [*shape, *parallel(2), "--rank-timeout", "4", "--output-dir", str(tmp_path / "run")]
    codes, said = launch(2, options, FAULT="1:5:hang")
    assert codes == [1, 1] and "".join(said).count("or did not answer for 4 seconds") == 1, said
    assert ck.sound_checkpoints(tmp_path / "run" / "checkpoints") == [0, 2, 4]


def test_a_checkpoint_that_does_not_fit_one_rank_changes_nothing(two, tmp_path):
    """What is wrong with a block's optimizer is seen by its rank alone."""
    folder = tmp_path / "run"
    shutil.copytree(two, folder)
    file = folder / "checkpoints" / "step-00000002" / "optimizer_2_of_2.safetensors"
    states = load_file(file)
    name = next(name for name in states if name.startswith("model.blocks.6.") and name.endswith("exp_avg"))
    save_file({**states, name: states[name][:1].contiguous()}, file)
    state = json.loads((file.parent / "state.json").read_text())
    state["files"][file.name] = {**digest(file), "tensors": len(states)}
    kr.write_state(file.parent, state)
    before = (folder / "metrics.jsonl").read_bytes()
    codes, said = launch(2, ["--resume", "2", "--output-dir", str(folder)])
    assert codes == [2, 2] and "".join(said).count("fits no parameter") == 1
    assert (folder / "metrics.jsonl").read_bytes() == before and 6 in ck.list_checkpoints(folder / "checkpoints")


@pytest.mark.parametrize("part", [1, 2])
def test_damage_that_one_rank_finds_is_told_once(two, tmp_path, part):
    folder = tmp_path / "run"
    shutil.copytree(two, folder)
    file = folder / "checkpoints" / "step-00000006" / f"model_{part}_of_2.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (folder / "metrics.json").unlink()  # as if the run had not been finished
    codes, said = launch(2, ["--resume", "--output-dir", str(folder)])
    assert codes == [2, 2] and "".join(said).count(f"{file.name} was changed after it was saved") == 1, said
    assert "go on from it with --resume 4" in "".join(said)


def test_ranks_that_see_different_checkpoints_stop(two, tmp_path, monkeypatch):
    """As two machines do, one of which has an older list of the folder."""
    folder = tmp_path / "run"
    shutil.copytree(two, folder)
    (folder / "metrics.json").unlink()
    codes, said = launch(2, ["--resume", "--output-dir", str(folder)], FAULT="1:4:stale")
    assert codes == [2, 2] and "".join(said).count("see different checkpoints") == 1, said
    assert ck.list_checkpoints(folder / "checkpoints") == [0, 2, 4, 6]
