"""The folder of a run: what no run has written is never touched, older folders are recognised, a broken one is made whole."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import kill_and_resume as kr
import pytest

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.models.model_files import REPLACED
from hbll_seq.training import checkpoint as ck
from hbll_seq.training.run_folder import prepare_folder
from hbll_seq.training.run_lock import LOCK
from hbll_seq.training.run_record import RECORD, RESULTS, RunRecord, foreign_files, is_finished, read_record
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.utils.atomic import PINNED

pytestmark = pytest.mark.usefixtures("blank_figures")

lm = kr.load_script()
QUICK = ["--max-steps", "4", "--eval-every", "0", "--sample-tokens", "0", "--save-every", "2"]
#: train/lm.py in a process of its own, after other lines.
SCRIPT = """\
import os, signal, sys
sys.path.insert(0, {tests!r})
import kill_and_resume as kr
script, of_run = kr.load_script(), kr.load_run()
{lines}
sys.exit(script.main(sys.argv[1:]))
"""


def run_with(lines: str, options: list[str], folder: Path) -> int:
    """The exit code of train/lm.py with ``lines`` before."""
    script = folder.with_name("script.py")
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1]), lines=lines))
    return kr.start([*options, "--output-dir", str(folder)], script=script, stdout=-3, stderr=-3).wait(120)


def everything(folder: Path) -> dict[str, bytes | None]:
    """What lies below a folder: name -> content."""
    regular = {path: path.is_file() and not path.is_symlink() for path in folder.rglob("*")}
    return {str(path.relative_to(folder)): path.read_bytes() if file else None for path, file in regular.items()}


@pytest.fixture
def quick(lm_options):
    """A run of four steps."""
    return [*lm_options, *QUICK]


@pytest.fixture(scope="module")
def short_run(lm_options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "run"
    assert lm.main([*lm_options, *QUICK, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def finished(short_run, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(short_run, tmp_path / "run"))


@pytest.fixture
def older(finished):
    """The same as an older version left it: no record, and nothing that came later in its checkpoints."""
    (finished / RECORD).unlink()
    (finished / "SHA256SUMS").unlink(missing_ok=True)
    for path in finished.glob("checkpoints/*/state.json"):
        state = json.loads(path.read_text())
        for name in ("locations", "preset_sha256", "validation", "test", "sha256"):
            state.pop(name, None)
        path.write_text(json.dumps(state, indent=1) + "\n")
        kr.as_of_old(path.parent)
    return finished


# -------------------------------------------------------------------------------- what is not a run's


def test_a_project_folder_is_refused_and_left_as_it_was(quick, tmp_path, capsys):
    project = tmp_path / "proj"
    project.mkdir()
    Tokenizer.default().save(project / "tokenizer.model")
    (project / "config.json").write_text('{"mine": 1}')
    (project / "metrics.json").write_text("[1, 2]")
    before = everything(project)
    options = [*quick, "--tokenizer", str(project / "tokenizer.model"), "--output-dir", str(project)]
    for more in ([], ["--overwrite"]):
        fragments = ("not the folder of a run", "config.json", "metrics.json", "tokenizer.model", "another --output-dir")
        kr.fails([*options, *more], capsys, *fragments)
        assert everything(project) == before


@pytest.mark.parametrize(
    "name", ["settings.yaml", "metrics.jsonl", "evaluations.jsonl", "training_curve.png", "model.safetensors", "run.json",
             "SHA256SUMS", "checkpoints/step-00000007/x", "checkpoints"],
)  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_every_name_that_a_run_writes_is_looked_at(quick, tmp_path, capsys, name, more):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("n_embd: 32\n")
    before = everything(tmp_path)
    shown = path.parent.name if name.endswith("x") else name
    kr.fails([*quick, *more, "--output-dir", str(tmp_path / "run")], capsys, "Nothing was changed", shown)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("kind", ["link to nothing", "pipe", "folder"])
def test_a_name_that_is_no_file_is_refused_too(quick, tmp_path, capsys, kind):
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "metrics.json"
    {"link to nothing": lambda: path.symlink_to("nowhere"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    kr.fails([*quick, "--output-dir", str(folder)], capsys, "metrics.json")
    assert os.path.lexists(path)


@pytest.mark.parametrize("kind", ["pipe", "file", "link to nothing", "link to a device"])
@pytest.mark.parametrize("more", [["--resume"], ["--overwrite"]])
def test_what_lies_where_a_checkpoint_will_is_told_before_the_run(finished, quick, capsys, kind, more):
    path = finished / "checkpoints" / "step-00000004"
    shutil.rmtree(path)
    (finished / "metrics.json").unlink()
    {"pipe": lambda: os.mkfifo(path), "file": lambda: path.write_text("mine"),
     "link to nothing": lambda: path.symlink_to("nowhere"), "link to a device": lambda: path.symlink_to("/dev/full")}[kind]()
    before = everything(finished)
    options = more if "--resume" in more else [*quick, *more]
    kr.fails([*options, "--output-dir", str(finished)], capsys, "checkpoints/step-00000004", "Nothing was changed; move")
    assert everything(finished) == before


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("state", [{}, {"exporting": True}, {"older": True}])
def test_a_pipe_in_a_results_place_is_not_waited_for(tmp_path, name, state):
    os.mkfifo(tmp_path / name)
    assert foreign_files(tmp_path, RunRecord(**state)) == [name]


def test_files_that_a_run_does_not_touch_are_no_hindrance(quick, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    own = {"notes.txt": "a", "README.md": "# my project", "checkpoints/best.pt": "b", ".old-notes": "c", "run.json.bak": "d"}
    for name, text in own.items():
        (folder / name).write_text(text)
    assert lm.main([*quick, "--output-dir", str(folder)]) == 0 and is_finished(folder)
    assert lm.main([*quick, "--overwrite", "--output-dir", str(folder)]) == 0
    assert lm.main(["--resume", "2", "--output-dir", str(folder)]) == 0 and is_finished(folder)
    assert {name: (folder / name).read_text() for name in own} == own


@pytest.mark.parametrize("options", [["--overwrite"], ["--resume", "2"]])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "training_curve.png"])
def test_a_result_that_was_changed_stays(finished, quick, capsys, options, name):
    (finished / name).write_bytes((finished / name).read_bytes() + b" ")
    before = everything(finished)
    given = quick if "--overwrite" in options else []
    kr.fails([*given, *options, "--output-dir", str(finished)], capsys, name, "has not written, or what was changed", "move")
    assert everything(finished) == before


def test_a_file_that_came_while_the_run_trained_stays(quick, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    kr.at_step(monkeypatch, 3, lambda: (folder / "config.json").write_text("{}"))
    message = kr.fails([*quick, "--output-dir", str(folder)], capsys, "config.json", "--resume", code=1)
    assert "make room" not in message  # an error keeps its kind
    assert (folder / "config.json").read_text() == "{}" and not (folder / "model.safetensors").exists()
    monkeypatch.undo()
    (folder / "config.json").rename(folder / "mine.json")
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0 and is_finished(folder)


@pytest.mark.parametrize("setting, name", [("tokenizer", "tokenizer.model"), ("data", "metrics.jsonl")])
def test_a_run_does_not_remove_what_it_reads(finished, quick, capsys, setting, name):
    before = everything(finished)
    options = [f"--{setting}", str(finished / name), "--overwrite", "--output-dir", str(finished)]
    kr.fails([*quick, *options], capsys, f"{setting}=", name, "copy it")
    assert everything(finished) == before


@pytest.mark.parametrize("output", ["", "runs/a"])
def test_a_run_does_not_become_its_own_text(quick, tmp_path, capsys, output):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a tree of blocks\n" * 400)
    options = ["--data", str(tmp_path / "text"), "--output-dir", str(tmp_path / "text" / output)]
    kr.fails([*quick, *options], capsys, "lies in the folder of the text")
    assert os.listdir(tmp_path / "text") == ["a.txt"]


def test_a_damaged_record_is_told(finished, quick, capsys):
    (finished / RECORD).write_text("{")
    before = everything(finished)
    kr.fails([*quick, "--overwrite", "--output-dir", str(finished)], capsys, "run.json", "move it away")
    assert everything(finished) == before
    (finished / RECORD).unlink()  # as it was told: the results are then known by what they hold
    assert lm.main([*quick, "--overwrite", "--output-dir", str(finished)]) == 0


# -------------------------------------------------------------------------------- folders of older versions


@pytest.mark.parametrize("options", [["--overwrite"], ["--resume", "2"]])
def test_the_folder_of_an_older_version_is_recognised(older, quick, capsys, options):
    kr.fails([*quick, "--output-dir", str(older)], capsys, "holds a finished run")
    given = quick if "--overwrite" in options else []
    assert lm.main([*given, *options, "--output-dir", str(older)]) == 0
    assert "written by an older version" in capsys.readouterr().err and is_finished(older)
    assert read_record(older).files.keys() == set(os.listdir(older)) & set(RESULTS)


def test_the_finished_run_of_an_older_version_is_finished(older, capsys):
    before = everything(older)
    assert lm.main(["--resume", "--output-dir", str(older)]) == 0
    assert "nothing is left to do" in capsys.readouterr().err and everything(older) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors", "training_curve.png"])
def test_what_no_run_wrote_is_told_apart_in_an_older_folder(older, quick, capsys, name):
    (older / "metrics.json").unlink()
    (older / name).write_text('{"model_type": "bert"}')
    kr.fails([*quick, "--overwrite", "--output-dir", str(older)], capsys, name)
    assert (older / name).read_text() == '{"model_type": "bert"}'


def test_checkpoints_alone_are_a_run(older):
    for path in older.iterdir():
        if path.is_file():
            path.unlink()
    assert lm.main(["--resume", "2", "--output-dir", str(older)]) == 0 and is_finished(older)


# -------------------------------------------------------------------------------- finished or not


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\0" * 4096])
def test_a_damaged_summary_is_no_finished_run(finished, capsys, content):
    model = (finished / "model.safetensors").read_bytes()
    (finished / "metrics.json").write_bytes(content)
    assert lm.main(["--resume", "--output-dir", str(finished)]) == 0
    said = capsys.readouterr().err
    assert "metrics.json is damaged: kept as metrics.json.damaged-1" in said
    assert not re.search(r"removed.*metrics\.json\b", said)
    assert (finished / "metrics.json.damaged-1").read_bytes() == content
    assert is_finished(finished) and (finished / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize("name", ["metrics.json", "model.safetensors", "config.json", "tokenizer.model"])
def test_a_missing_result_is_made_again(finished, name):
    before = everything(finished)
    (finished / name).unlink()
    assert not is_finished(finished) and lm.main(["--resume", "--output-dir", str(finished)]) == 0
    after = everything(finished)
    assert is_finished(finished) and after.keys() == before.keys()
    if name == "metrics.json":  # which names the folder, and this is a copy
        before[name], after[name] = ({**json.loads(text[name]), "settings": 0} for text in (before, after))
    assert after[name] == before[name]


def test_a_card_that_was_edited_after_a_killed_export_stays(finished):
    """The export pins the version before it, README.md included, and a killed one leaves it so."""
    (finished / PINNED).mkdir()
    for name in REPLACED:
        os.link(finished / name, finished / PINNED / name)
    (finished / "metrics.json").unlink()
    (finished / "README.md").unlink()
    (finished / "README.md").write_text("# my notes on this run")
    assert lm.main(["--resume", "--output-dir", str(finished)]) == 0 and is_finished(finished)
    assert (finished / "README.md").read_text() == "# my notes on this run" and not (finished / PINNED).exists()


def test_results_are_made_again_without_the_history(finished):
    for name in ("metrics.json", "metrics.jsonl", "evaluations.jsonl"):
        (finished / name).unlink()
    assert lm.main(["--resume", "--output-dir", str(finished)]) == 0
    summary = json.loads((finished / "metrics.json").read_text())
    assert summary["loss"] is None and summary["tokens"] == 4 * 2 * 16 and summary["test"]


@pytest.mark.parametrize("harm", [
    {"validation": None}, {"validation": [3]}, {"validation": [{"name": "depth 1"}]}, {"test": {}}, {"test": None},
    {"samples": 7}, {"validation": [{"name": [], "depth": 1, "loss": 1.0, "perplexity": 2.0}]}, {"step": 4.0},
    {"test": "a table"},
])  # fmt: skip
def test_an_evaluation_that_no_run_wrote_is_made_again(finished, capsys, harm):
    before = json.loads((finished / "metrics.json").read_text())
    (finished / "metrics.json").unlink()
    path = finished / "evaluations.jsonl"
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, **harm}) + "\n")
    assert lm.main(["--resume", "--output-dir", str(finished)]) == 0
    assert "evaluations.jsonl holds 1 damaged line, missing from now on" in capsys.readouterr().err
    after = json.loads((finished / "metrics.json").read_text())
    assert after["test"] == before["test"] and json.loads(path.read_text()) == row


def test_lines_of_steps_that_no_run_wrote_are_kept_aside(finished, capsys):
    (finished / "metrics.json").unlink()
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    harmed = [{**rows[0], "ce": "low"}, {**rows[1], "lr": [1]}, {**rows[2], "loss": 10**400}, {"step": 4, "loss": 2.5}]
    (finished / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in harmed))
    assert lm.main(["--resume", "--output-dir", str(finished)]) == 0
    message = capsys.readouterr().err
    assert "metrics.jsonl holds 3 damaged lines" in message and "not drawn" not in message
    assert json.loads((finished / "metrics.json").read_text())["loss"] == 2.5


def test_a_last_evaluation_without_the_test_split_is_made_again(finished):
    (finished / "metrics.json").unlink()
    path = finished / "evaluations.jsonl"
    row = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in row.items() if name != "test"}) + "\n")
    assert lm.main(["--resume", "--output-dir", str(finished)]) == 0
    assert json.loads((finished / "metrics.json").read_text())["test"] == row["test"]


@pytest.mark.parametrize(
    "point", ["model.safetensors", *(pytest.param(name, marks=pytest.mark.slow) for name in
                                     ("training_curve.png", "config.json", "metrics.json"))],
)  # fmt: skip
def test_an_export_that_was_killed_is_made_again(quick, tmp_path, short_run, point):
    """Killed after the call that puts one of the results in place."""
    folder = tmp_path / "run"
    assert run_with(f"""
replace = os.replace
def killing(source, target, **more):
    replace(source, target, **more)
    if os.path.exists({str(folder / point)!r}):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = killing
""", quick, folder) == -signal.SIGKILL
    assert (folder / point).exists() and (folder / "metrics.json").exists() == (point == "metrics.json")
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0
    assert kr.differences(short_run, folder) == [] and is_finished(folder)
    assert not list(folder.rglob(".aside-*"))


@pytest.mark.parametrize("resumed_step", [None, 2])
def test_a_preparation_broken_off_leaves_no_checkpoint_without_its_lines(finished, monkeypatch, resumed_step):
    """Broken off at any removal, what is left is the older run, with fewer checkpoints or none."""

    def until(number, original):
        def patched(*arguments, **more):
            counted.append(number)
            if len(counted) > number:
                raise KeyboardInterrupt
            return original(*arguments, **more)

        return patched

    ended, replace, unlink, before = False, os.replace, Path.unlink, ck.list_checkpoints(finished / "checkpoints")
    for number in range(40):
        folder, counted = Path(shutil.copytree(finished, finished.with_name(f"at-{number}"))), []
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", until(number, replace))
            patch.setattr(Path, "unlink", until(number, unlink))
            try:
                prepare_folder(folder, TrainingSettings(max_steps=4).to_yaml(), resumed_step)
                ended = True
            except KeyboardInterrupt:
                pass
        steps = ck.list_checkpoints(folder / "checkpoints")
        assert steps == before[: len(steps)]
        assert not steps or kr.steps_of(folder)[: steps[-1]] == list(range(1, steps[-1] + 1))
        assert read_record(folder) is not None
        if ended:
            break
    assert ended and number > 8


# -------------------------------------------------------------------------------- a kill before the first checkpoint


def test_a_run_killed_before_its_first_checkpoint_left_an_empty_folder(quick, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run_with("of_run.describe = lambda *arguments: os._exit(9)", quick, folder) == 9
    assert set(os.listdir(folder)) == {LOCK, RECORD, "settings.yaml"}
    kr.fails(["--resume", "--output-dir", str(folder)], capsys, "nothing to resume", "without --resume")
    assert lm.main([*quick, "--output-dir", str(folder)]) == 0  # no --overwrite is asked for
    assert is_finished(folder) and not (folder / LOCK).exists()


def test_a_run_killed_before_it_wrote_anything_left_an_empty_folder(quick, tmp_path):
    folder = tmp_path / "run"
    assert run_with("of_run.prepare_folder = lambda *arguments, **more: os._exit(9)", quick, folder) == 9
    assert os.listdir(folder) == [LOCK]
    assert lm.main([*quick, "--output-dir", str(folder)]) == 0 and is_finished(folder)


def test_a_failed_start_leaves_no_folder(quick, tmp_path, capsys):
    kr.fails([*quick, "--data", "no.txt", "--output-dir", str(tmp_path / "a" / "b")], capsys, "no.txt")
    assert os.listdir(tmp_path) == []
