"""train/lm.py --resume: what a run reads is known by what it holds, wherever it lies; its state is read with suspicion."""

import copy
import json
import os
import random
import shutil
from pathlib import Path

import kill_and_resume as kr
import pytest

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.training import checkpoint as ck
from hbll_seq.training.resuming import resume_run
from hbll_seq.training.run_record import is_finished

pytestmark = pytest.mark.usefixtures("blank_figures")

lm = kr.load_script()
QUICK = ["--max-steps", "4", "--eval-every", "0", "--sample-tokens", "0", "--save-every", "2", "--threads", "1"]
LAST = ("checkpoints", "step-00000004", "state.json")


@pytest.fixture
def project(lm_options, tmp_path, monkeypatch):
    """A folder with a text, a tokenizer, a preset and a run of these under relative names, made from within it."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(lm_options[lm_options.index("--data") + 1], folder / "text.txt")
    Tokenizer.default().save(folder / "own.model")
    shutil.copy(lm.PRESETS / "debug.yaml", folder / "own.yaml")
    monkeypatch.chdir(folder)
    options = ["--preset", "own.yaml", "--data", "text.txt", "--tokenizer", "own.model", "--cache-dir", "cache", *QUICK]
    assert lm.main([*options, "--output-dir", "run"]) == 0
    return folder


def go_on(folder: Path, *more: str) -> int:
    """Resume the run from step 2."""
    return lm.main(["--resume", "2", "--output-dir", str(folder), *more])


def last_state(folder: Path) -> dict:
    return json.loads(folder.joinpath(*LAST).read_text())


def test_resume_from_another_folder(project, tmp_path, monkeypatch):
    before = (project / "run" / "model.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("another text of the same name\n" * 500)
    assert go_on(project / "run") == 0 and (project / "run" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "cache").exists()  # the cache is the run's too
    state = last_state(project / "run")
    assert state["settings"]["data"] == "text.txt" and state["locations"]["data"] == str(project / "text.txt")
    assert str(project) not in (project / "run" / "README.md").read_text()  # where it lies is nobody's business


def test_resume_of_moved_text_and_tokenizer(project, tmp_path, capsys):
    before = (project / "run" / "model.safetensors").read_bytes()
    (project / "text.txt").rename(tmp_path / "moved.txt")
    (project / "own.model").rename(tmp_path / "moved.model")
    (project / "cache").rename(tmp_path / "cache")  # a cache that is gone is made again
    options = ["--data", str(tmp_path / "moved.txt"), "--tokenizer", str(tmp_path / "moved.model")]
    resume = ["--resume", "2", "--output-dir", str(project / "run")]
    kr.fails(resume, capsys, "cannot resume: data=", str(project / "text.txt"), "no longer there", "by --data")
    kr.fails([*resume, *options[:2]], capsys, "cannot resume: tokenizer=", str(project / "own.model"), "by --tokenizer")
    assert go_on(project / "run", *options) == 0 and (project / "run" / "model.safetensors").read_bytes() == before
    state = last_state(project / "run")
    assert state["settings"]["data"] == state["locations"]["data"] == str(tmp_path / "moved.txt")
    (project / "run" / "metrics.json").unlink()
    assert lm.main(["--resume", "--output-dir", str(project / "run")]) == 0  # the new names are known from now on


def test_the_same_text_in_a_folder(project, tmp_path):
    (tmp_path / "texts").mkdir()
    (project / "text.txt").rename(tmp_path / "texts" / "text.txt")
    assert go_on(project / "run", "--data", str(tmp_path / "texts")) == 0


def test_a_project_that_was_moved_and_renamed(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("run").rename("renamed")
    assert go_on(Path("renamed")) == 0 and is_finished(Path("renamed"))


def test_wikitext_whose_folder_moved(lm_options, tmp_path, monkeypatch):
    config = tmp_path / "a" / "wikitext-2-raw-v1"
    config.mkdir(parents=True)
    text = Path(lm_options[lm_options.index("--data") + 1]).read_text()
    for split in ("train", "validation", "test"):
        (config / f"{split}.txt").write_text(f" = {split} = \n{text}\n")
    monkeypatch.setenv("HBLL_DATA", str(tmp_path / "a"))
    options = ["--preset", "debug", "--data", "wikitext-2", "--cache-dir", str(tmp_path / "cache"), *QUICK]
    assert lm.main([*options, "--output-dir", str(tmp_path / "run")]) == 0
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.setenv("HBLL_DATA", str(tmp_path / "b"))
    assert go_on(tmp_path / "run") == 0


def test_another_text_is_refused_and_both_are_named(project, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("another text\n" * 2000)
    before = (project / "run" / "metrics.jsonl").read_bytes()
    options = ["--resume", "2", "--output-dir", str(project / "run")]
    fragments = ("cannot resume: data is", str(tmp_path / "other.txt"), str(project / "text.txt"), "same text")
    kr.fails([*options, "--data", str(tmp_path / "other.txt")], capsys, *fragments)
    with open(project / "text.txt", "a") as file:
        file.write("one line more\n")
    kr.fails(options, capsys, "cannot resume: ", str(project / "text.txt"), "same text")
    assert (project / "run" / "metrics.jsonl").read_bytes() == before


def test_another_tokenizer_is_refused_and_both_are_named(project, tmp_path, capsys):
    texts = [line for line in (project / "text.txt").read_text().splitlines(True)]
    Tokenizer.train(texts, 300).save(tmp_path / "other.model")
    for given in (["--tokenizer", str(tmp_path / "other.model")], ["--tokenizer", "train", "--vocab-size", "300"]):
        options = ["--resume", "2", "--output-dir", str(project / "run"), *given]
        kr.fails(options, capsys, "cannot resume: tokenizer is", str(project / "own.model"), "same tokenizer")
    assert go_on(project / "run", "--tokenizer", "default") == 0  # the same bytes


def test_another_validation_text_is_refused(lm_options, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    text = Path(lm_options[lm_options.index("--data") + 1]).read_text()
    for split in ("train", "validation", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text(text)
    options = ["--preset", "debug", "--data", str(tmp_path / "text"), "--cache-dir", str(tmp_path / "cache"), *QUICK]
    assert lm.main([*options, "--output-dir", str(tmp_path / "run")]) == 0
    (tmp_path / "text" / "validation.txt").write_text(text * 2)
    kr.fails(["--resume", "2", "--output-dir", str(tmp_path / "run")], capsys, "validation is", "validation split included")


def test_a_preset_is_known_by_what_it_says(project, tmp_path, capsys, monkeypatch):
    text = (project / "own.yaml").read_text()
    (tmp_path / "renamed.yaml").write_text("# the same\n" + text)
    assert go_on(project / "run", "--preset", str(tmp_path / "renamed.yaml")) == 0
    (project / "own.yaml").write_text(text.replace("n_head: 2", "n_head: 4"))
    options = ["--resume", "2", "--output-dir", "run"]
    kr.fails([*options, "--preset", "own.yaml"], capsys, "preset='own.yaml' does not say", "leave --preset out")
    (project / "own.yaml").unlink()
    assert go_on(project / "run") == 0  # the settings are in the checkpoint


# -------------------------------------------------------------------------------- names


def test_a_home_is_expanded_in_every_path(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project))
    options = ["--preset", "~/own.yaml", "--data", "~/text.txt", "--tokenizer", "~/own.model", "--cache-dir", "~/cache"]
    assert lm.main([*options, *QUICK, "--output-dir", "~/at home"]) == 0
    assert is_finished(project / "at home") and not (project / "~").exists()
    assert lm.main(["--resume", "2", "--output-dir", "~/at home"]) == 0


@pytest.mark.parametrize("option", ["--data", "--tokenizer", "--cache-dir", "--output-dir", "--preset"])
@pytest.mark.parametrize("value", ["", " ", "a\0b", "x" * 300, "x" * 300 + ".yaml", "~nobody-here/x", "d/" * 3000])
def test_names_that_no_file_can_bear(lm_options, tmp_path, monkeypatch, capsys, option, value):
    monkeypatch.chdir(tmp_path)
    message = kr.fails([*lm_options, option, value], capsys)
    assert len(message.strip()) <= 500 and message.count("\n") == 1 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("option", ["--data", "--tokenizer", "--cache-dir"])
def test_names_that_are_not_utf8(project, option, tmp_path):
    name = os.fsdecode(b"caf\xe9\xff")
    given = {"--data": project / f"{name}.txt", "--tokenizer": project / f"{name}.model", "--cache-dir": tmp_path / name}
    shutil.copy(project / "text.txt", given["--data"])
    shutil.copy(project / "own.model", given["--tokenizer"])
    options = ["--preset", "own.yaml", "--data", "text.txt", "--cache-dir", "cache", "--output-dir", str(tmp_path / "other")]
    folder = tmp_path / "other"
    assert lm.main([*options, *QUICK, option, str(given[option])]) == 0 and is_finished(folder)
    settings = lm.resolve(lm.read_preset(str(folder / "settings.yaml"), folder)).resolved()
    assert lm.resume_run({"output_dir": str(folder)}, None)[0] == settings
    assert go_on(folder) == 0 and is_finished(folder)
    (folder / "README.md").read_text(encoding="utf-8")


def test_an_output_folder_that_is_not_utf8_is_refused_at_the_start(lm_options, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9\xff")
    kr.fails([*lm_options, "--output-dir", str(folder)], capsys, "output_dir=", "is not UTF-8", "another --output-dir")
    assert os.listdir(tmp_path) == []


# -------------------------------------------------------------------------------- a state that was changed


VALUES = [None, True, -1, 0, 7, 10**30, 1.5, 1e308, "", "x", "\ud800", "1e999", [], [1], {}, {"a": []}, "x" * 100_000]


def mutations(state: dict):
    """The state with each key removed, replaced by every value, and an unknown key beside it; its settings likewise."""
    for where in ("", "settings"):
        for name in [*(state[where] if where else state.keys() - {"format", "files"}), "unknown"]:
            for value in ["removed", *VALUES]:
                changed = copy.deepcopy(state)
                target = changed[where] if where else changed
                if value == "removed":
                    target.pop(name, None)
                else:
                    target[name] = value
                yield f"{where}.{name}={value!r:.20}", changed


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_mutated_state_is_refused_or_harmless(project, count):
    """Reading a checkpoint: a ValueError of a single line, or settings that hold."""
    path, outcomes = (project / "run").joinpath(*LAST), {True: 0, False: 0}
    state = json.loads(path.read_text())
    settings, cases = resume_run({"output_dir": "run"}, None)[0], list(mutations(state))
    cases = random.Random(0).sample(cases, min(count, len(cases)))
    for name, changed in cases:
        path.write_text(json.dumps(changed))
        try:
            found, preset, _ = resume_run({"output_dir": "run"}, None)
        except ValueError as error:
            assert len(str(error)) <= 500 and "\n" not in str(error), name
            outcomes[False] += 1
        else:
            assert type(found) is type(settings) and isinstance(preset, str), name
            outcomes[True] += 1
    assert outcomes[False] > 0.7 * len(cases), outcomes


def test_a_mutated_state_never_ends_in_a_traceback(project, capsys):
    """Whole resumes."""
    path = (project / "run").joinpath(*LAST)
    state, whole = json.loads(path.read_text()), project / "run"
    rng = random.Random(0)
    cases = [(name, changed) for name, changed in mutations(state) if not name.startswith("settings")]
    for name, changed in rng.sample(cases, 8):
        folder = Path(shutil.copytree(whole, project / "copy"))
        kr.write_state(folder.joinpath(*LAST).parent, changed)
        (folder / "metrics.json").unlink()
        capsys.readouterr()
        code, message = lm.main(["--resume", "--output-dir", str(folder)]), capsys.readouterr().err
        assert code in (0, 2), (name, message)
        assert code == 0 or max(len(line) for line in message.splitlines()) <= 500, name
        shutil.rmtree(folder)


def test_a_damaged_state_names_the_older_checkpoint(project, capsys):
    path = (project / "run").joinpath(*LAST)
    (project / "run" / "metrics.json").unlink()
    state = json.loads(path.read_text())
    del state["settings"]["lr"]
    kr.write_state(path.parent, state)
    kr.fails(["--resume", "--output-dir", "run"], capsys, "step 4", "lack lr", "--resume 2")
    assert go_on(project / "run") == 0 and ck.list_checkpoints(project / "run" / "checkpoints")[-1] == 4
