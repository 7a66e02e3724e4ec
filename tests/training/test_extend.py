"""train/lm.py --extend: a finished run goes on; until the new end its results stay as they are, whatever happens."""

import json
import os
import shutil
import signal

import kill_and_resume as kr
import pytest
import torch

from hbll_seq import HBLLForCausalLM
from hbll_seq.training import checkpoint as ck
from hbll_seq.training.run_record import RESULTS, finished_step, is_finished
from hbll_seq.training.schedule import learning_rate, rate_of_step

pytestmark = pytest.mark.usefixtures("blank_figures")

lm, lm_run = kr.load_script(), kr.load_run()


@pytest.fixture(scope="module")
def short_run(lm_options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "run"
    options = ["--max-steps", "4", "--eval-every", "0", "--sample-tokens", "0", "--save-every", "3", "--lr", "0.01"]
    assert lm.main([*lm_options, *options, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def extended(short_run, tmp_path_factory):
    """By 30 steps, unbroken."""
    folder = tmp_path_factory.mktemp("extended") / "run"
    shutil.copytree(short_run, folder)
    assert lm.main(["--extend", "30", "--save-every", "10", "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(short_run, tmp_path):
    return shutil.copytree(short_run, tmp_path / "run")


def results(folder):
    return {name: (folder / name).read_bytes() for name in RESULTS}


def extend_until(folder, step, monkeypatch, action=lambda: os.kill(os.getpid(), signal.SIGTERM)):
    with monkeypatch.context() as patch:
        kr.at_step(patch, step, action)
        return lm.main(["--extend", "30", "--save-every", "10", "--output-dir", str(folder)])


def test_the_schedule_warms_up_again_from_the_floor_and_ends_there():
    keywords = dict(peak=2.0, warmup=5, floor=0.1)
    first = [learning_rate(step, total=20, **keywords) for step in range(20)]
    rates = [rate_of_step(step, [20, 100, 40], **keywords) for step in range(160)]
    assert rates[:20] == first and rates[19] == pytest.approx(0.2)
    assert 0.2 < rates[20] < rates[24] == max(rates[20:120]) == pytest.approx(2.0)
    assert rates[25:120] == sorted(rates[25:120], reverse=True) and rates[119] == pytest.approx(0.2)
    assert max(rates[120:]) == pytest.approx(2.0) and rates[159] == pytest.approx(0.2)
    assert rate_of_step(1, [1, 1], **keywords) > 0 and rate_of_step(3, [3, 2], peak=2.0, warmup=5, floor=0.9) >= 1.8


def test_an_extended_run_is_one_run(short_run, extended):
    assert kr.steps_of(extended) == list(range(1, 35)) and kr.lines(extended)[:4] == kr.lines(short_run)
    rows = kr.lines(extended)
    assert rows[4]["lr"] > rows[3]["lr"] == pytest.approx(0.001) and rows[-1]["lr"] == pytest.approx(0.001)
    evaluations = [json.loads(line) for line in (extended / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in evaluations if "test" in row] == [4, 34]
    summary = json.loads((extended / "metrics.json").read_text())
    assert summary["step"] == finished_step(extended) == 34 and summary["extended"] == [30]
    assert summary["tokens"] == 34 * 2 * 16 and "extended by | 30 steps" in (extended / "README.md").read_text()
    before, after = (HBLLForCausalLM.from_pretrained(path).embed.weight for path in (short_run, extended))
    assert not torch.equal(before, after)


def test_the_finished_run_stays_whole_until_the_new_end_and_a_stopped_extension_goes_on(folder, extended, monkeypatch):
    before = results(folder)
    assert extend_until(folder, 17, monkeypatch) == 143
    assert results(folder) == before and is_finished(folder) and HBLLForCausalLM.from_pretrained(folder)
    assert ck.list_checkpoints(folder / "checkpoints") == [10, 17]
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0 and kr.differences(extended, folder) == []
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0  # nothing is left to do
    assert json.loads((folder / "metrics.json").read_text())["step"] == 34


def test_an_extension_that_was_killed_before_its_first_checkpoint_is_given_again(folder, extended, monkeypatch):
    class Killed(BaseException):
        pass

    def killed():
        raise Killed

    before = results(folder)
    with pytest.raises(Killed):
        extend_until(folder, 7, monkeypatch, killed)
    assert results(folder) == before and finished_step(folder) == 4 and kr.steps_of(folder) == [1, 2, 3, 4, 5, 6]
    assert lm.main(["--extend", "30", "--save-every", "10", "--output-dir", str(folder)]) == 0
    assert kr.differences(extended, folder) == []


@pytest.mark.parametrize("where", ["plot_training_curve", "count_parameters", "to_json"])
def test_an_export_that_was_killed_is_made_again(folder, extended, monkeypatch, where):
    from hbll_seq.training import export

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(export, where, killed)
        with pytest.raises(Killed):
            lm.main(["--extend", "30", "--save-every", "10", "--output-dir", str(folder)])
    assert HBLLForCausalLM.from_pretrained(folder)
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0 and kr.differences(extended, folder) == []
    assert finished_step(folder) == 34


def test_a_run_is_extended_again_and_wound_back_into_an_extension(extended, tmp_path):
    folder = shutil.copytree(extended, tmp_path / "run")
    assert lm.main(["--extend", "4", "--keep-checkpoints", "9", "--output-dir", str(folder)]) == 0
    assert json.loads((folder / "metrics.json").read_text())["extended"] == [30, 4] and len(kr.lines(folder)) == 38
    assert lm.main(["--resume", "34", "--output-dir", str(folder)]) == 0  # the end of the first extension, and no further
    assert kr.differences(extended, folder) == []


def test_what_cannot_be_extended_is_told(folder, stopped_run, tmp_path, monkeypatch, capsys):
    kr.fails(["--extend", "9", "--output-dir", str(stopped_run)], capsys, "no finished run", "--resume")
    for more in ([], ["--dry-run"]):
        said = kr.fails(["--extend", "9", "--output-dir", str(tmp_path / "none"), *more], capsys, "nothing to extend",
                        "none' holds no run", "finished run by --output-dir", "without --extend")
        assert "resume" not in said
    kr.fails(["--extend", "0", "--output-dir", str(folder)], capsys, "extend=0", "at least 1")
    kr.fails(["--extend", "9", "--overwrite", "--output-dir", str(folder)], capsys, "--overwrite exclude each other")
    kr.fails(["--extend", "9", "--resume", "3", "--output-dir", str(folder)], capsys, "--resume 3 exclude each other")
    kr.fails(["--extend", "9", "--lr", "1", "--output-dir", str(folder)], capsys, "lr=1.0 (there 0.01)")
    assert extend_until(folder, 8, monkeypatch) == 143
    kr.fails(["--extend", "30", "--output-dir", str(folder)], capsys, "is being extended (saved at step 8)", "--resume")


def test_more_steps_of_a_run_that_has_its_own_are_by_extend(folder, stopped_run, capsys):
    said = kr.fails(["--resume", "--max-steps", "9", "--output-dir", str(folder)], capsys, "max_steps=9 (there 4)",
                    "more steps by --extend N, in place of --resume, or start")  # fmt: skip
    assert "once" not in said
    kr.fails(["--resume", "--max-steps", "99", "--output-dir", str(stopped_run)], capsys,
             "more steps by --extend N, in place of --resume, once the run is finished")  # fmt: skip
    kr.fails(["--max-steps", "9", "--output-dir", str(folder)], capsys, "holds a finished run", "more steps by --extend N")
    for other in (["--max-steps", "2"], ["--max-steps", "9", "--lr", "1"]):
        assert "--extend" not in kr.fails(["--resume", *other, "--output-dir", str(folder)], capsys, "other settings")


@pytest.mark.parametrize("extended", [3, [0], ["x"], [True]])
def test_a_damaged_list_of_extensions_is_told(folder, capsys, extended):
    (folder / "metrics.json").unlink()
    checkpoint = folder / "checkpoints" / "step-00000004"
    kr.write_state(checkpoint, {**json.loads((checkpoint / "state.json").read_text()), "extended": extended})
    kr.fails(["--resume", "--output-dir", str(folder)], capsys, "damaged: extended")
