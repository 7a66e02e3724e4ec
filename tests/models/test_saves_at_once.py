"""Saves of one folder at the same time: each waits for the others, and the last model is whole."""

import math
import os
import threading
from pathlib import Path

import pytest
from helpers.file_calls import CALLS, intercepted
from helpers.language_models import tiny_lm

from hbll_seq import HBLLForCausalLM
from hbll_seq.models.model_files import FILES
from hbll_seq.utils import atomic

NAMES = sorted([*FILES[:2], *FILES[3:5]])
#: how a save sees whether the folder is there
LOOKS = [(os.path, "lexists"), (Path, "is_dir")]


def seen(model):
    return model.config, {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def load(folder):
    return seen(HBLLForCausalLM.from_pretrained(folder))


def test_two_saves_at_once_wait_for_each_other(tmp_path, monkeypatch):
    """Into a folder that is there, and one that is not: the last model is whole, and nothing is left over. However slow the
    disk is, none gives up waiting."""
    monkeypatch.setattr(atomic, "PATIENCE", math.inf)
    for folder in (tmp_path / "new", tmp_path / "new"):
        errors, models = [], [tiny_lm(seed, n_embd=4 + 4 * (seed % 2)) for seed in range(6)]

        def save(model):
            try:
                model.save_pretrained(folder)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=save, args=(model,), daemon=True) for model in models]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not errors
        assert load(folder) in [seen(model) for model in models]
        assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["new", *NAMES])


@pytest.mark.parametrize("is_there", [True, False])
def test_another_save_at_any_point_is_whole_or_has_to_wait(tmp_path, monkeypatch, is_there):
    """A whole save between any two looks and file operations of another one: it is done, or refused as it does not wait here.
    The one around it is done in any case."""
    monkeypatch.setattr(atomic, "PATIENCE", 0.0)
    other, around = tiny_lm(1), tiny_lm(2, n_embd=8)
    done = []
    for n in range(1, 1000):
        folder, calls = tmp_path / str(n) / "model", []
        if is_there:
            tiny_lm(0).save_pretrained(folder)

        def save_the_other():
            calls.append(None)
            if len(calls) != n:
                return
            try:
                other.save_pretrained(folder)
            except ValueError as error:
                assert "another process has been saving there" in str(error)
                done.append(False)
            else:
                assert load(folder) == seen(other)
                done.append(True)

        with intercepted(save_the_other, CALLS + LOOKS):
            around.save_pretrained(folder)
        if len(calls) < n:
            break
        assert load(folder) == seen(around), n
        assert sorted(path.name for path in folder.parent.rglob("*")) == sorted(["model", *NAMES]), n
    assert len(done) > 20 and {True, False} == set(done)
