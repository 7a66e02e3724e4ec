"""Saving over a model: the whole old or the whole new one loads, whatever ends the save, and damage is found by its sums."""

import errno
import os
import shutil
import socket
import subprocess
import sys

import pytest
from helpers.file_calls import intercepted
from helpers.language_models import tiny_lm

from hbll_seq import HBLLClassifierConfig, HBLLForCausalLM, HBLLForSequenceClassification, Tokenizer
from hbll_seq.models.model_card import MARKER
from hbll_seq.models.model_files import (
    CARD_NAME,
    CONFIG_NAME,
    FILES,
    PATHS_NAME,
    REPLACED,
    SUMMED,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    find_latest_run,
    read_unchanged,
)
from hbll_seq.utils import atomic
from hbll_seq.utils.atomic import PINNED, atomic_folder, roll_back, whole_folder
from hbll_seq.utils.integrity import SUMS_NAME

TOKENIZER = Tokenizer.train([f"w{i} x{i * 7}" for i in range(900)], 330)


def seen(model):
    """All that a loaded model consists of."""
    card = model._card
    tensors = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    return model.config, tensors, model.tokenizer and model.tokenizer.fingerprint, card


def load(folder):
    return seen(HBLLForCausalLM.from_pretrained(folder))


def visible(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------- every point of a save

def old_with_tokenizer(folder):
    tiny_lm(0, TOKENIZER).save_pretrained(folder, note="old")


def old_without_sums(folder):
    tiny_lm(0).save_pretrained(folder, note="old")
    (folder / SUMS_NAME).unlink()
    (folder / "mine.txt").write_text("mine")


def old_with_readme_of_the_user(folder):
    tiny_lm(0).save_pretrained(folder, note="old")
    (folder / CARD_NAME).write_text("# Mine")


SCENES = {
    "a tokenizer goes": (old_with_tokenizer, lambda: tiny_lm(1, n_embd=8)),
    "a tokenizer comes": (old_without_sums, lambda: tiny_lm(1, TOKENIZER)),
    "the same shapes": (old_with_readme_of_the_user, lambda: tiny_lm(1)),
}


@pytest.fixture(params=SCENES.values(), ids=SCENES.keys())
def scene(request, tmp_path):
    """An old folder and a new model, and what they load as."""
    make, new = request.param
    make(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "copy" / "model")
    new().save_pretrained(tmp_path / "copy" / "model", note="new")
    return tmp_path / "model", new(), load(tmp_path / "model"), load(tmp_path / "copy" / "model")


def test_killed_at_any_point_the_old_or_the_new_model_loads(scene, tmp_path):
    """Every snapshot is what a kill at that point leaves; the next save needs no help."""
    folder, new, old_seen, new_seen = scene
    shots = tmp_path / "shots"
    shots.mkdir()

    def snapshot():
        shutil.copytree(folder, shots / f"{len(list(shots.iterdir())):03}" / folder.name)

    with intercepted(snapshot):
        new.save_pretrained(folder, note="new")
    snapshot()
    third, found = tiny_lm(2), []
    third_seen = seen(third)[:2]
    for shot in sorted(shots.iterdir()):
        found.append(load(shot / "model"))
        assert found[-1] in (old_seen, new_seen), shot.name
        third.save_pretrained(shot / "model", note="third")
        assert load(shot / "model")[:2] == third_seen
        assert not [path.name for path in (shot / "model").iterdir() if path.name.startswith(".")]
    assert len(found) > 40 and found == sorted(found, key=lambda each: each == new_seen)  # once new, it stays new
    assert found[0] == old_seen and found[-1] == new_seen


@pytest.mark.parametrize("for_ever", [False, True])
def test_failed_at_any_point_the_old_model_loads(scene, tmp_path, for_ever):
    folder, new, old_seen, new_seen = scene
    before, failures = visible(folder), 0
    for n in range(1, 1000):
        calls = []

        def fail():
            calls.append(None)
            if len(calls) == n or for_ever and len(calls) > n:
                raise OSError(errno.EIO, "Input/output error")

        target = tmp_path / str(n) / folder.name
        shutil.copytree(folder, target)
        failed = False
        try:
            with intercepted(fail):
                new.save_pretrained(target, note="new")
        except ValueError as error:
            failed = True
            assert len(str(error)) <= 500 and "Input/output error" in str(error)
        assert load(target) == (old_seen if failed else new_seen), n
        if failed and not for_ever:
            assert {name: data for name, data in visible_or_none(target).items() if data is not None} == before
        failures += failed
        if for_ever and n % 4 == 0:
            new.save_pretrained(target, note="new")
            assert load(target) == new_seen
        if len(calls) < n:
            break
    assert failures > 25 and n < 900


def visible_or_none(folder):
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    shots, target = [], tmp_path / "deep" / "model"

    def snapshot():
        if target.exists():
            shots.append(sorted(path.name for path in target.iterdir()))

    with intercepted(snapshot):
        tiny_lm().save_pretrained(target)
    assert shots and all(shot == sorted(set(FILES) - {TOKENIZER_NAME, PATHS_NAME}) for shot in shots)
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_file_systems_without_hard_links_or_locks(scene, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    folder, new, _, new_seen = scene
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(atomic, "fcntl", None)
    new.save_pretrained(folder, note="new")
    assert load(folder) == new_seen and not [p for p in folder.iterdir() if p.name.startswith(".")]


def kill_before_config(folder, model):
    """What a kill just before the last file is replaced leaves."""
    shot = folder.with_name("shot")
    with pytest.MonkeyPatch.context() as patch:
        replace = os.replace

        def replace_all_but_config(source, target):
            if target == folder / CONFIG_NAME:
                shutil.copytree(folder, shot, symlinks=True)
            replace(source, target)

        patch.setattr(os, "replace", replace_all_but_config)
        model.save_pretrained(folder)
    shutil.rmtree(folder)
    shot.rename(folder)


def end_before_config(folder):
    """The same, by a process that really ends."""
    code = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
from helpers.language_models import tiny_lm
replace = os.replace
os.replace = lambda a, b: os._exit(9) if Path(b).name == "config.json" else replace(a, b)
tiny_lm(1, n_embd=8).save_pretrained({str(folder)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 9


def test_a_killed_process_and_those_who_read_after_it(tmp_path, capfd):
    folder = tmp_path / "runs" / "model"
    tiny_lm(0).save_pretrained(folder)
    old = load(folder)
    (folder / "metrics.json").write_text("{}")
    end_before_config(folder)
    assert len([path for path in folder.iterdir() if path.name.startswith(".")]) == 2
    capfd.readouterr()
    assert load(folder) == old
    assert "did not end: this is the model from before it" in capfd.readouterr().err
    assert find_latest_run(tmp_path) == folder and whole_folder(folder) == folder / PINNED
    sums = subprocess.run(["sha256sum", "--check", SUMS_NAME], cwd=folder, capture_output=True, text=True)
    assert sums.returncode and "config.json: FAILED" in sums.stdout  # what other tools see does not pass either
    roll_back(folder, REPLACED)
    assert not (folder / PINNED).exists() and load(folder) == old
    assert not subprocess.run(["sha256sum", "--check", "--quiet", SUMS_NAME], cwd=folder, timeout=60).returncode


def test_a_readme_written_after_a_kill_stays(tmp_path):
    folder = tmp_path / "model"
    tiny_lm(0).save_pretrained(folder)
    kill_before_config(folder, tiny_lm(1, n_embd=8))
    (folder / CARD_NAME).write_text("# Mine")
    tiny_lm(2).save_pretrained(folder)
    assert (folder / CARD_NAME).read_text() == "# Mine" and load(folder)[:2] == seen(tiny_lm(2))[:2]


def test_what_a_living_save_writes_is_not_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "PATIENCE", 0.1)
    folder = tmp_path / "model"
    (tmp_path / ".model.0123abcd.tmp").mkdir()  # a dead one's
    (tmp_path / ".models.0123abcd.tmp").mkdir()  # of another folder
    with atomic_folder(folder, ("a",)) as aside:
        (aside / "a").write_text("first")
        with atomic_folder(folder, ("a",)) as other:
            (other / "a").write_text("second")
        assert (folder / "a").read_text() == "second" and aside.is_dir()
    assert (folder / "a").read_text() == "first"
    with atomic_folder(folder, ("a",)) as aside:
        with pytest.raises(ValueError, match="another process has been saving there"):
            with atomic_folder(folder, ("a",)):
                pass
        (aside / "a").write_text("third")
    assert visible(folder) == {"a": b"third"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".models.0123abcd.tmp", "model"]


def test_links_to_files_are_replaced_and_put_back(tmp_path):
    """A folder of the Hub's cache is one of links."""
    blobs, folder = tmp_path / "blobs", tmp_path / "model"
    tiny_lm(0).save_pretrained(blobs)
    old = load(blobs)
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(f"../blobs/{path.name}")
    assert load(folder) == old
    kill_before_config(folder, tiny_lm(1, n_embd=8))
    assert load(folder) == old
    tiny_lm(2).save_pretrained(folder)
    assert load(folder)[:2] == seen(tiny_lm(2))[:2] and load(blobs) == old


# ------------------------------------------------------------------------------------------------------- sums


@pytest.fixture
def saved(tmp_path):
    tiny_lm(0, TOKENIZER).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("name, at", [(WEIGHTS_NAME, -1), (WEIGHTS_NAME, -9), (WEIGHTS_NAME, 20), (TOKENIZER_NAME, 1000),
                                      (TOKENIZER_NAME, -1), (CONFIG_NAME, 40), (SUMS_NAME, 5), (SUMS_NAME, 64)])
def test_every_flipped_bit_is_found(saved, name, at):
    for bit in range(8):
        flip(saved / name, at, bit)
        with pytest.raises(ValueError, match=name if name != SUMS_NAME else "SHA256SUMS") as caught:
            HBLLForCausalLM.from_pretrained(saved)
        assert len(str(caught.value)) <= 500
        flip(saved / name, at, bit)
    load(saved)


def test_what_is_exchanged_is_found(saved, tmp_path):
    remedy = "is not the file that SHA256SUMS lists.*load an intact copy; if you changed it on purpose, delete SHA256SUMS"
    tiny_lm(0, n_head=2).save_pretrained(tmp_path / "heads")
    text = (tmp_path / "heads" / CONFIG_NAME).read_text()
    (tmp_path / "heads" / CONFIG_NAME).write_text(text.replace('"n_head": 2', '"n_head": 1'))
    with pytest.raises(ValueError, match=f"config.json {remedy}"):
        HBLLForCausalLM.from_pretrained(tmp_path / "heads")
    other = Tokenizer.train([f"w{i} x{i * 7}" for i in range(900)], 320)
    (saved / TOKENIZER_NAME).write_bytes(other.model_proto)
    with pytest.raises(ValueError, match=f"tokenizer.model {remedy}"):
        HBLLForCausalLM.from_pretrained(saved)
    tiny_lm(5, TOKENIZER).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS_NAME, saved)
    (saved / TOKENIZER_NAME).write_bytes(TOKENIZER.model_proto)
    with pytest.raises(ValueError, match=f"model.safetensors {remedy}"):
        HBLLForCausalLM.from_pretrained(saved)
    (saved / TOKENIZER_NAME).unlink()
    with pytest.raises(ValueError, match="SHA256SUMS lists tokenizer.model, which is missing; load an intact copy"):
        HBLLForCausalLM.from_pretrained(saved)


def test_what_is_not_checked_is_told_in_one_line(saved, tmp_path, capfd):
    load(saved)
    assert capfd.readouterr().err == ""
    (saved / CARD_NAME).write_text("edited")  # which sums leave out
    load(saved)
    assert capfd.readouterr().err == ""
    tiny_lm(0, vocab_size=2000).save_pretrained(saved)
    (saved / SUMS_NAME).unlink()
    load(saved)
    assert capfd.readouterr().err == f"hbll_seq: '{saved}' has no SHA256SUMS: its files are not checked for damage\n"
    small = Tokenizer.train([f"w{i} x{i * 7}" for i in range(900)], 320)
    small.save(saved / TOKENIZER_NAME)
    load(saved)
    err = capfd.readouterr().err
    assert err.count("\n") == 2 and "tokenizer.model has 320 pieces, the model 2000 tokens: is it the one" in err
    tiny_lm(0, vocab_size=1024).save_pretrained(tmp_path / "by hand")
    small.save(tmp_path / "by hand" / TOKENIZER_NAME)  # 320 of 1024: padding explains it
    load(tmp_path / "by hand")
    assert capfd.readouterr().err == f"hbll_seq: '{tmp_path / 'by hand'}': SHA256SUMS does not list tokenizer.model: not " \
                                     "checked for damage\n"  # fmt: skip


def test_cut_sums_are_found(saved):
    data = (saved / SUMS_NAME).read_bytes()
    for size in (0, 1, 64, len(data) - 3, len(data) - 1):
        (saved / SUMS_NAME).write_bytes(data[:size])
        with pytest.raises(ValueError, match=f"SHA256SUMS is (damaged|empty).*delete {SUMS_NAME}"):
            HBLLForCausalLM.from_pretrained(saved)


def test_sums_of_other_peoples_files_do_not_matter(saved):
    with open(saved / SUMS_NAME, "a") as file:
        file.write(f"{'0' * 64}  pytorch_model.bin\n")  # the Hub's download leaves it out
    load(saved)


def test_a_folder_that_is_written_to_meanwhile_is_read_again(saved):
    calls = []

    def read():
        calls.append(None)
        if len(calls) == 1:
            tiny_lm(1, TOKENIZER).save_pretrained(saved)
            raise ValueError("half of one, half of another")
        return load(saved)

    assert read_unchanged(saved, read)[:2] == seen(tiny_lm(1, TOKENIZER))[:2] and len(calls) == 2
    with pytest.raises(ValueError, match="is being written to all the time"):
        read_unchanged(saved, lambda: os.utime(saved / CONFIG_NAME, ns=(1, len(calls))) or calls.append(None))


def test_the_weights_are_hashed_once(saved, monkeypatch):
    from hbll_seq.models import model_files

    hashed, original = [], model_files.sha256
    monkeypatch.setattr(model_files, "sha256", lambda path: hashed.append(path.name) or original(path))
    assert load(saved)[3] is not None and hashed == [WEIGHTS_NAME]


# ------------------------------------------------------------------------------------------------- hostile files


@pytest.mark.parametrize("name", [*SUMMED, SUMS_NAME, CARD_NAME])
@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "socket", "folder", "sparse"])
def test_only_regular_files_of_bounded_size_are_read(saved, tmp_path, name, kind, monkeypatch):
    model = tiny_lm(3)
    path = saved / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to a device":
        (tmp_path / "link").symlink_to("/dev/zero")
        path.symlink_to(tmp_path / "link")
    elif kind == "socket":
        monkeypatch.chdir(saved)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    elif kind == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    if name == CARD_NAME:  # which a model does not need
        assert load(saved)[3] is None
        model.save_pretrained(saved)  # and which is the user's
        assert not (path.is_file() and kind != "sparse") and load(saved)[:2] == seen(model)[:2]
        return
    with pytest.raises(ValueError, match=name) as caught:
        HBLLForCausalLM.from_pretrained(saved)
    assert len(str(caught.value)) <= 500
    if kind != "sparse":
        with pytest.raises(ValueError, match=f"its {name} is .*Nothing was changed"):
            model.save_pretrained(saved)


def test_a_card_with_the_marker_is_written_anew(saved):
    assert MARKER in (saved / CARD_NAME).read_text()
    tiny_lm(0, TOKENIZER).save_pretrained(saved, data="other")
    assert "Data: other" in (saved / CARD_NAME).read_text()


def test_latest_run_passes_over_what_it_cannot_read(tmp_path):
    runs = tmp_path / "runs"
    for age, (name, text) in enumerate({"good": '{"loss": NaN}', "byte": "x", "list": "[]", "deep": "[" * 100_000}.items()):
        tiny_lm(0).save_pretrained(runs / name)
        (runs / name / "metrics.json").write_text(text)
        os.utime(runs / name / "metrics.json", ns=(10**18 + age, 10**18 + age))
    (runs / "loop").symlink_to(runs)
    (runs / "self").symlink_to(runs / "self")
    odd = {"pipe": os.mkfifo, "broken": lambda p: os.symlink("nowhere", p), "turn": lambda p: os.symlink(p, p)}
    for name, make in odd.items():
        tiny_lm(0).save_pretrained(runs / name)
        make(runs / name / "metrics.json")
    (runs / "closed").mkdir(mode=0)
    assert find_latest_run(runs) == runs / "good"


def test_classifiers_are_kept_whole_too(tmp_path):
    config = HBLLClassifierConfig(n_inputs=6, n_steps=3, n_classes=2, hidden_size=3)
    HBLLForSequenceClassification(config).save_pretrained(tmp_path / "m")
    flip(tmp_path / "m" / WEIGHTS_NAME, -2)
    with pytest.raises(ValueError, match="model.safetensors is not the file that SHA256SUMS lists"):
        HBLLForSequenceClassification.from_pretrained(tmp_path / "m")
