"""Settings of train/lm.py: wrong types and absurd sizes are refused by name, before anything is allocated."""

import dataclasses
import datetime
import os
import resource

import kill_and_resume as kr
import numpy as np
import pytest
import torch

from hbll_seq.models.config import HBLLConfig
from hbll_seq.training import settings as st
from hbll_seq.training.devices import check_memory
from hbll_seq.training.presets import resolve
from hbll_seq.utils.exhausted import disk_is_full, memory_is_full

lm = kr.load_script()
FIELDS = [field.name for field in dataclasses.fields(st.TrainingSettings)]
WRONG = [[], [[]], {}, {"a": 1}, (), object(), b"x", float("nan"), float("inf"), 10**400, -(10**400), "1e999", "9" * 5000, -1,
         "x" * 10_000, [10**400], [None], datetime.date(2024, 1, 1), np.array([1, 2]), torch.tensor(1), lambda: 0, 1j]


@pytest.mark.parametrize("name", FIELDS)
def test_a_wrong_value_of_any_setting(name):
    """Most are refused; what is taken is a text or number of the right type, which YAML can write."""
    texts = {field.name for field in dataclasses.fields(st.TrainingSettings) if "str" in str(field.type)}
    refused = 0
    for value in [None, True, *WRONG]:
        try:
            settings = resolve({"max_steps": 5}, {name: value})
        except ValueError as error:
            assert len(str(error)) <= 500 and "\n" not in str(error) and str(error), value
            refused += 1
        else:
            settings.to_yaml()
    assert refused >= (13 if name in texts else 20)


@pytest.mark.parametrize(
    "options",
    [f"--{name.replace('_', '-')} {value}" for name, value in [
        ("n_embd", 10**12), ("n_embd", 65536), ("n_level", 40), ("n_level", 10**9), ("n_head", 10**9),
        ("context_length", 10**15), ("context_length", 2**31 - 1), ("batch_size", 10**15), ("batch_size", 2**20),
        ("grad_accum", 10**15), ("grad_accum", 2**20),
        ("max_steps", 10**30), ("threads", 10**9), ("num_proc", 10**9), ("mlp_ratio", 10**9), ("exit_rank", 10**9),
        ("forward", 10**12), ("backward", 10**12), ("time_forward", 10**12), ("n_samples", 10**12), ("epochs", "1e300"),
        ("sample_tokens", 10**9), ("eval_batch_size", 10**12), ("seed", 10**30), ("lr", "1e300"), ("sigma", "1e300"),
        ("keep_checkpoints", 10**30), ("save_every", "9" * 400), ("warmup_steps", 10**30), ("path", "9" * 5000),
        ("path", "1," * 5000), ("cell", "gru," * 5000), ("data", "x/" * 1500), ("resume", "9" * 5000), ("resume", "9" * 30),
        ("resume", "-7"), ("no_such", 1),
    ]],
)  # fmt: skip
def test_absurd_sizes_end_with_one_line(lm_options, tmp_path, capsys, options):
    said = kr.fails([*lm_options, "--output-dir", str(tmp_path / "run"), *options.split(" ")], capsys)
    message = "".join(line for line in said.splitlines(True) if not line.startswith("data: "))  # if it got there
    assert len(message.strip()) <= 500 and message.count("\n") == 1, message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [["--" + "x" * 3000], ["--resume", "x" * 3000], ["--seed"], ["x " * 3000],
                                     ["--x\n"] * 99])  # fmt: skip
def test_a_wrong_option_is_told_with_its_remedy(capsys, options):
    message = kr.fails(["--preset", "debug", "--dry-run", *options], capsys, options[0][:20].strip()).strip()
    assert len(message) <= 500 and message.endswith("(see --help)") and "\n" not in message


@pytest.mark.parametrize("preset", ["", " ", "x" * 3000, "a\0b.yaml", "~nobody-of-that-name/x.yaml"])
def test_an_impossible_name_of_a_preset_is_told_as_one(capsys, preset):
    kr.fails(["--preset", preset, "--dry-run"], capsys, "error: preset: path ")


def test_numbers_of_numpy_are_numbers():
    settings = st.TrainingSettings(max_steps=np.int64(3), lr=np.float32(0.5), data=np.str_("bundled"))
    assert settings == st.TrainingSettings(max_steps=3, lr=0.5)
    assert type(settings.max_steps) is int and type(settings.data) is str
    assert "max_steps: 3\n" in settings.to_yaml()


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n",
        "n_embd: " + "[" * 5000,
        "{" * 5000,
        "n_embd: " + "9" * 5000,
        "n_embd: [1, 2]",
        "1: 2",
        "[1, 2]: 3",
        "? {a: 1}\n: 2",
        "null: 1",
        "x" * 30_000 + ": 1",
        "lr: 0.1\nlr: 0.2",
        "lr: !!python/object/apply:os.system ['true']",
        "lr: 2024-13-45",
        "lr: 2024-01-01",
        "max_steps: .inf",
        "data: \x01",
        "x" * 70_000,
        "",
        "~",
    ],
)
def test_hostile_presets(tmp_path, capsys, text):
    (tmp_path / "p.yaml").write_text(text)
    message = kr.fails(["--preset", str(tmp_path / "p.yaml"), "--dry-run"], capsys)
    assert len(message.strip()) <= 500 and message.count("\n") == 1, message


@pytest.mark.parametrize("kind", ["pipe", "folder", "binary", "loop"])
def test_a_preset_that_is_no_text(tmp_path, capsys, kind):
    path = tmp_path / "p.yaml"
    {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "binary": lambda: path.write_bytes(b"\xff\xfe\0"),
     "loop": lambda: path.symlink_to(path)}[kind]()  # fmt: skip
    kr.fails(["--preset", str(path), "--dry-run"], capsys, "p.yaml")


def test_a_model_larger_than_the_memory_is_refused_before_it_is_made():
    check_memory(HBLLConfig(n_level=3, n_embd=1024, n_head=16))
    for config in (HBLLConfig(n_embd=65536), HBLLConfig(n_level=10, n_embd=8192), HBLLConfig(vocab_size=2**24, n_embd=2**15)):
        with pytest.raises(ValueError, match="GiB of memory.*smaller --n-embd"):
            check_memory(config)


def test_a_rank_needs_memory_for_its_own_blocks_and_the_first_one_for_the_weights_of_all(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = HBLLConfig(vocab_size=64, n_level=3, n_embd=512, n_head=8)
    block = 12 * 512**2
    for needed, own, gathers in (
        (16 * 7 * block, None, True), (16 * 2 * block, [1, 2], False), ((16 * 2 + 4 * 5) * block, [1, 2], True),
    ):  # fmt: skip
        needed += 16 * 64 * 512
        monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": needed}.__getitem__)
        check_memory(config, own, gathers)
        monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": needed - 1}.__getitem__)
        with pytest.raises(ValueError, match="GiB of memory"):
            check_memory(config, own, gathers)


def test_what_kind_of_failure_an_error_is():
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise ValueError("cannot write") from error
    except ValueError as error:
        assert disk_is_full(error) and not memory_is_full(error)
    assert not disk_is_full(ValueError("a wrong value")) and not disk_is_full(PermissionError(13, "Permission denied"))
    assert memory_is_full(MemoryError()) and not memory_is_full(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert memory_is_full(caught.value)


@pytest.mark.parametrize("when", ["fresh", "resume"])
def test_a_full_disk_at_the_start_asks_for_room(stopped_run, lm_options, tmp_path, capsys, when):
    """A limit on the size of files stands in for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = ["--resume", "--output-dir", str(stopped_run)] if when == "resume" else \
        [*lm_options, "--output-dir", str(tmp_path / "new")]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        message = kr.fails(options, capsys, "make room", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "choose another" not in message and "File too large" in message
    if when == "resume":
        assert lm.main(options) == 0
