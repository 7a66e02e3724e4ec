"""A checkpoint that ranks have written, each its part: read as one, refused when parts do not fit, whole or not there."""

import itertools
import json
import os
import shutil

import forked
import helpers.fake_ranks
import kill_and_resume as kr
import pytest
import torch
from safetensors.torch import load_file, save_file

from hbll_seq.training import checkpoint as ck
from hbll_seq.training.checkpoint_parts import by_group, file_name, is_checked_by
from hbll_seq.utils.integrity import digest, read_sums

STEP, N = 4, 3
WHOLE = {"model": {name: torch.full((2,), float(number)) for number, name in enumerate("abcdef")},
         "optimizer": {f"{name}|step": torch.tensor(float(STEP)) for name in "abcdef"}}  # fmt: skip


def part_of(tensors, part, n_parts):
    return dict(list(tensors.items())[part - 1 :: n_parts])


def saved_in_parts(folder, n_parts=N, groups=None):
    """What the ranks of a run do one after the other."""
    aside, files = ck.start(folder, STEP), {}
    for part in range(1, n_parts + 1):
        own = {group: part_of(tensors, part, n_parts) for group, tensors in (groups or WHOLE).items()}
        files.update(ck.write_groups(aside, own, part, n_parts))
    return ck.finish(aside, STEP, files, {"settings": {}}, keep=2)


def assert_whole(groups):
    assert groups.keys() == WHOLE.keys()
    for group, tensors in WHOLE.items():
        assert groups[group].keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in groups[group].items())


@pytest.mark.parametrize("n_parts", [1, 2, 7, 11])
def test_parts_are_read_as_one(tmp_path, n_parts):
    """Also where a rank has nothing of a group."""
    path = saved_in_parts(tmp_path, n_parts)
    assert_whole(ck.load_checkpoint(tmp_path, STEP)[0])
    expected = {file_name(group, part, n_parts) for group in WHOLE for part in range(1, n_parts + 1)}
    assert set(os.listdir(path)) == {"state.json", "SHA256SUMS", *expected} and len(expected) == 2 * n_parts
    assert read_sums(path / "SHA256SUMS").keys() == {"state.json", *expected}


def test_ranks_check_the_files_between_them():
    """Each the part that it has written, and nothing is left out whoever reads."""
    for n_parts, n_processes in itertools.product(range(1, 10), repeat=2):
        names = [file_name("model", part, n_parts) for part in range(1, n_parts + 1)]
        checked = [{name for name in names if is_checked_by(name, p, n_processes)} for p in range(n_processes)]
        assert set().union(*checked) == set(names)
        if n_parts == n_processes > 1:
            assert checked == [{name} for name in names]
    assert all(is_checked_by("model.safetensors", p, 5) for p in range(5))


def test_a_rank_reads_the_values_of_its_own_part_alone(tmp_path, monkeypatch):
    """Damage elsewhere is for the others to find; a size is seen by all."""
    path, read = saved_in_parts(tmp_path), []
    monkeypatch.setattr(ck, "sha256", lambda file, sha256=ck.sha256: read.append(file.name) or sha256(file))
    assert_whole(ck.load_checkpoint(tmp_path, STEP, (1, N))[0])
    assert sorted(read) == ["model_2_of_3.safetensors", "optimizer_2_of_3.safetensors"]
    file = path / "model_3_of_3.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    ck.load_checkpoint(tmp_path, STEP, (1, N))
    for turn in ((2, N), (0, 1), (0, 2), (5, 6)):
        with pytest.raises(ck.CheckpointError, match="model_3_of_3.safetensors was changed after it was saved"):
            ck.load_checkpoint(tmp_path, STEP, turn)
    file.write_bytes(content + b" ")
    with pytest.raises(ck.CheckpointError, match="model_3_of_3.safetensors has .* bytes instead of"):
        ck.load_checkpoint(tmp_path, STEP, (1, N))


def test_the_newest_sound_one_is_looked_for_from_the_newest_on(tmp_path, monkeypatch):
    for step in (1, 2, 3, 4):
        ck.save_checkpoint(tmp_path, step, WHOLE, {"settings": {}}, keep=9)
    (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"")
    read, load = [], ck._load
    monkeypatch.setattr(ck, "_load", lambda path, step: read.append(step) or load(path, step))
    assert ck.newest_sound(tmp_path, 4) == 2 and read == [3, 2]
    assert ck.newest_sound(tmp_path, 1) is None


def test_one_part_is_the_file_of_one_process(tmp_path):
    ck.save_checkpoint(tmp_path / "one", STEP, WHOLE, {"settings": {}})
    saved_in_parts(tmp_path / "parts", 1)
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / kind).rglob("*.*")} for kind in ("one", "parts"))
    assert one == other and one.keys() > {"model.safetensors", "optimizer.safetensors"}


def test_a_thousand_ranks_are_listed(tmp_path):
    """More than that no setting takes; the sums alone are 200 kB."""
    names = [file_name(group, part, 1023) for group in ("model", "optimizer") for part in range(1, 1024)]
    (tmp_path / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {name}\n" for name in names))
    assert read_sums(tmp_path / "SHA256SUMS").keys() == set(names)
    assert by_group({name: {name: 0} for name in names})["model"].keys() == set(names[:1023])


# --------------------------------------------------------------------------------------------- parts that do not fit


@pytest.fixture
def own(tmp_path):
    """A checkpoint in parts to harm, and a function that makes its list and sums fit what it holds."""
    path = saved_in_parts(tmp_path)

    def fit():
        state = json.loads((path / "state.json").read_text())
        found = {file.name: {**digest(file), "tensors": len(load_file(file))} for file in sorted(path.glob("*.safetensors"))}
        kr.write_state(path, {**state, "files": found})

    return path, fit


def refused(path, match):
    with pytest.raises(ck.CheckpointError, match=f"step-00000004 is damaged: {match}") as caught:
        ck.load_checkpoint(path.parent, STEP)
    assert len(str(caught.value)) <= 500 and ck.sound_checkpoints(path.parent) == []


@pytest.mark.parametrize("group, part", list(itertools.product(WHOLE, range(1, N + 1))))
def test_a_part_that_is_missing_is_named(own, group, part):
    path, fit = own
    name = file_name(group, part, N)
    (path / name).unlink()
    refused(path, f"{name} cannot be read")
    fit()
    refused(path, f"{name} is missing")


def test_parts_of_each_other_are_found_by_their_sums_and_are_else_the_same(own):
    """Which rank wrote what does not matter: the names of the tensors count."""
    path, fit = own
    one, other, between = path / "model_1_of_3.safetensors", path / "model_2_of_3.safetensors", path / "x"
    for source, target in ((one, between), (other, one), (between, other)):
        source.rename(target)
    refused(path, "model_1_of_3.safetensors was changed after it was saved")
    fit()
    assert_whole(ck.load_checkpoint(path.parent, STEP)[0])


def test_a_part_in_place_of_another(own):
    path, fit = own
    shutil.copy(path / "model_1_of_3.safetensors", path / "model_2_of_3.safetensors")
    fit()
    refused(path, "model_1_of_3.safetensors and model_2_of_3.safetensors both hold 'a'")


def test_a_tensor_that_two_parts_hold(own):
    path, fit = own
    file = path / "optimizer_3_of_3.safetensors"
    save_file({**load_file(file), "b|step": torch.tensor(0.0)}, file)
    fit()
    refused(path, "optimizer_2_of_3.safetensors and optimizer_3_of_3.safetensors both hold 'b|step'".replace("|", r"\|"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "model_1_of_2.safetensors",
                                  "carried_2_of_2.safetensors", "model_1_of_1.safetensors", "model_4_of_3.safetensors",
                                  "model_01_of_3.safetensors", "model_0_of_3.safetensors", "model_1_of_03.safetensors",
                                  "carried_2_of_3.safetensors", "model_1_of_99999.safetensors"])  # fmt: skip
def test_a_file_that_is_no_part_of_these(own, name):
    path, fit = own
    save_file({"more": torch.zeros(1)}, path / name)
    refused(path, f"'{name}' lies in it and state.json does not list it")
    fit()
    refused(path, "(.*lie in it, which are of different numbers of parts|.* is the name of no part|.*_1_of_3.* is missing)$")


def test_every_byte_of_every_part_is_covered(own):
    path, _ = own
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            refused(path, f"{file.name} was changed after it was saved")
        file.write_bytes(content)
    assert_whole(ck.load_checkpoint(path.parent, STEP)[0])


# ------------------------------------------------------------------------------------------------- in real processes

OPTIONS = ["--n-level", "2", "--chunk-size", "1", "--max-steps", "4", "--save-every", "2", "--keep-checkpoints", "9",
           "--eval-every", "0"]  # fmt: skip


def launch(n, lm_options, tmp_path, *options, **environment):
    """A run whose folder is ``run``, seen from the current one; codes, and what was said."""
    environment = {**kr.environment_of_scripts(), "FAKE_FLOAT64": "1", "TMPDIR": str(tmp_path), **environment}
    options = [*lm_options, *OPTIONS, "--output-dir", "run", *options]
    codes, said = forked.group(n, [helpers.fake_ranks.__file__, *options], environment, keeps_store=True)
    return codes, "".join(said)


def test_no_rank_gets_what_others_hold_to_save_it(lm_options, tmp_path, monkeypatch):
    """Nothing is put together before an evaluation, and each file holds what its rank alone has, the first also the rest."""
    monkeypatch.chdir(tmp_path)
    codes, said = launch(3, lm_options, tmp_path, "--block-parallel", "3", NO_GATHER="1", FAULT="1:2:stop")
    assert codes == [143] * 3, said
    assert ck.sound_checkpoints(tmp_path / "run" / "checkpoints") == [0, 2, 3]
    path = tmp_path / "run" / "checkpoints" / "step-00000003"
    for group, part in itertools.product(("model", "optimizer"), range(3)):
        names = load_file(path / file_name(group, part + 1, 3)).keys()
        blocks = {name.split(".")[2] if ".blocks." in name else None for name in names}
        assert blocks == {str(part)} | ({None} if part == 0 else set()), (group, part)


@pytest.mark.parametrize("fault, words", [
    ("1:1:full", "File too large"),
    ("0:1:full", "File too large"),
    ("1:1:nan-behind", "refusing to save step 2: model tensor"),
    ("1:1:elsewhere", "rank 1 does not see .aside-2, which the first process has made there: ranks on several machines need"),
    ("1:1:elsewhere.aside-2", "the first process does not see model_2_of_2.safetensors, which another rank has written"),
])  # fmt: skip
@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_that_cannot_save_stops_all(lm_options, tmp_path, monkeypatch, n, fault, words):
    """With one message, and what was saved before stands; nothing of the new checkpoint is left."""
    monkeypatch.chdir(tmp_path)
    codes, said = launch(n, lm_options, tmp_path, "--block-parallel", "2", FAULT=fault)
    assert codes == [1] * n, said
    assert said.count("the checkpoint of step 2 could not be saved in run/checkpoints") == 1 and words in said
    assert said.count("older ones are kept") == 1 and "Traceback" not in said
    assert_only_the_first_is_left(tmp_path / "run" / "checkpoints")


def assert_only_the_first_is_left(checkpoints):
    assert os.listdir(checkpoints) == ["step-00000000"] and ck.sound_checkpoints(checkpoints) == [0]


@pytest.mark.parametrize("process", [0, 1])
def test_a_rank_that_dies_while_it_saves_ends_all(lm_options, tmp_path, monkeypatch, process):
    """The first one clears away what is half written, or if it is itself dead the next run does."""
    monkeypatch.chdir(tmp_path)
    codes, said = launch(2, lm_options, tmp_path, "--block-parallel", "2", FAULT=f"{process}:1:dies-saving")
    assert codes[process] == -9 and codes[1 - process] == 1, said
    assert said.count("another process of this launch ended") == 1 and "Traceback" not in said, said
    if process == 0:
        assert ck.list_checkpoints("run/checkpoints") == [0] and os.path.isdir("run/checkpoints/.aside-2")
        ck.sweep("run/checkpoints")
    assert_only_the_first_is_left("run/checkpoints")
