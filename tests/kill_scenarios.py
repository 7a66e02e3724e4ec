"""What tests/kill_points.py kills: training, resume, winding back, export, overwriting, saving, caches, lines."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import kill_and_resume as kr
import matplotlib.pyplot  # noqa: F401  workers are forked from a process that has everything imported
import torch
import torch._dynamo  # noqa: F401  an optimizer imports it
from kill_points import Run, Scenario
from kill_watch import Outcome, Worker
from safetensors.torch import save_file

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import load_tokenizer, load_tokens
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.training.checkpoint import list_checkpoints
from hbll_seq.training.json_lines import JsonLines
from hbll_seq.training.trainer import Trainer

PICTURE_END = b"IEND\xaeB`\x82"


# ---------------------------------------------------------------------------------------------------- comparing


def names(folder: Path) -> set[str]:
    """Everything in ``folder`` but files of locks, which may stay."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "lock" not in path.name}


def left_over(whole: Path, folder: Path) -> list[str]:
    """What a folder holds more, or less, than that of the unbroken operation."""
    expected, found = names(whole), names(folder)
    # a kill between the last checkpoint and the removal of an older one leaves that one: whole, and in nobody's way
    more = sorted(name for name in found - expected if "checkpoints/step-" not in name)
    return [f"left behind: {', '.join(more)}"] * bool(more) + \
        [f"missing: {', '.join(sorted(expected - found))}"] * bool(expected - found)


def other_run(whole: Path, folder: Path) -> list[str]:
    """How a finished run differs from the unbroken one, times left out."""
    found = left_over(whole, folder)
    try:
        if differences := kr.differences(whole, folder):
            found.append(f"another result: {'; '.join(differences[:4])}")
        for path in (whole / name for name in sorted(names(whole))):
            twin = folder / path.relative_to(whole)
            exact = path.suffix in (".safetensors", ".yaml", ".model") or path.name == "config.json"
            if exact and twin.exists() and twin.read_bytes() != path.read_bytes():
                found.append(f"another file: {twin.relative_to(folder)}")
            if path.suffix == ".png" and twin.exists() and not twin.read_bytes().endswith(PICTURE_END):
                found.append(f"broken picture: {twin.name}")
        json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError, KeyError) as error:
        found.append(f"unreadable: {error!r}")
    return found


# ---------------------------------------------------------------------------------------------------- runs


def lm(*options: str) -> int:
    """train/lm.py in this process: its exit code."""
    return kr.load_script().main(list(options))


def lm_killed_at(step: int, *options: str) -> int:
    """The same, killed while a step is done."""
    original = Trainer._step

    def patched(trainer):
        if trainer.done + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(trainer)

    Trainer._step = patched
    return lm(*options)


def recover_run(command: list[str], accepted: Path | None, run: Run, root: Path, whole: Path, _: Outcome,
                way: str) -> list[str]:
    """Go on with --resume or with the same command; where the one is refused the other must do."""
    folder, ways = root / "run", [["--resume", "--output-dir", "run"], command]
    saved = list_checkpoints(folder / "checkpoints")
    for options in ways if way == "resume" else ways[::-1]:
        ended = run(lm, *options)
        if ended.value == 0:
            break
        if ended.value != 2 or (way == "resume" and saved):
            return [f"no recovery: exit {ended.value}, {ended.last_line}"]
    else:
        return [f"no recovery: both refused, {ended.last_line}"]
    found = other_run(whole / "run", folder)
    return [] if accepted and not other_run(accepted / "run", folder) else found


# ---------------------------------------------------------------------------------------------------- models


def make_model(seed: int, n_embd: int, n_head: int, with_tokenizer: bool) -> HBLLForCausalLM:
    """A model of random weights."""
    torch.manual_seed(seed)
    config = HBLLConfig(vocab_size=4096, n_level=2, n_embd=n_embd, n_head=n_head, context_length=16)
    return HBLLForCausalLM(config, tokenizer=Tokenizer.default() if with_tokenizer else None)


def loaded() -> str:
    """Digest of the model in "model", or why it is refused."""
    try:
        model = HBLLForCausalLM.from_pretrained("model")
    except ValueError as error:
        return f"refused: {error}"
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return f"{digest.hexdigest()} {model.tokenizer.fingerprint if model.tokenizer else None}"


def save(*shape: Any) -> str:
    """Save over "model"; what is loaded then."""
    make_model(*shape).save_pretrained("model")
    return loaded()


def save_in_place(*shape: Any) -> str:
    """As a careless program does, without sums: what the harness must find."""
    model = make_model(*shape)
    Path("model/SHA256SUMS").unlink(missing_ok=True)
    Path("model/config.json").write_text(json.dumps({
        "model_type": model.config.model_type, "architectures": [type(model).__name__], "dtype": "float32",
        **model.config.to_dict(),
    }))
    save_file({name: tensor.contiguous() for name, tensor in model.named_parameters()}, "model/model.safetensors")
    return loaded()


def recover_save(old: str | None, act: Callable[[], str], run: Run, root: Path, whole: Path, expected: Outcome,
                 _: str) -> list[str]:
    """The old or the new model loads; the same save then works and leaves nothing else."""
    found, value = [], run(loaded).value
    if value not in (old, expected.value) and not (old is None and not (root / "model").exists()):
        found.append(value if str(value).startswith("refused") else "mixture: a model loads that was never saved")
    again = run(act)
    if again.value != expected.value:
        found.append(f"no recovery: {again.last_line}")
    return found + left_over(whole, root)


# ---------------------------------------------------------------------------------------------------- caches and lines


def build_cache(text: str) -> dict[str, Any]:
    """A tokenizer and the tokens of three splits, from the cache or to it."""
    tokenizer = load_tokenizer(text, 320, cache_dir="cache")
    streams = {split: load_tokens(text, split, tokenizer, cache_dir="cache", num_proc=1)
               for split in ("train", "validation", "test")}
    found = {split: [hashlib.sha256(stream.tokens.tobytes()).hexdigest(), stream.n_words, stream.n_bytes]
             for split, stream in streams.items()}
    return {"tokenizer": tokenizer.fingerprint, **found}


def recover_cache(text: str, run: Run, root: Path, whole: Path, expected: Outcome, _: str) -> list[str]:
    ended = run(build_cache, text)
    found = [] if ended.value == expected.value else [f"other tokens: {ended.last_line}"]
    return found + left_over(whole, root)


ROWS = [{"step": step, "loss": step / 7, "node_losses": [step / 3] * 4} for step in range(1, 11)]


def append_rows() -> list[dict]:
    """The rows of ROWS that are not in the file yet, as a resumed run adds them."""
    file = JsonLines("lines.jsonl")
    kept = len(file.rows())
    file.rewind(kept)
    for row in ROWS[kept:]:
        file.append(row)
    return file.rows()


def recover_lines(run: Run, root: Path, whole: Path, expected: Outcome, _: str) -> list[str]:
    before = run(lambda: JsonLines("lines.jsonl").rows()).value
    found = [] if before == ROWS[: len(before)] else [f"other rows: {before}"]
    again = run(append_rows).value
    return found + ["other rows: after going on"] * (again != ROWS) + left_over(whole, root)


# ---------------------------------------------------------------------------------------------------- all


def _template(folder: Path, *actions: Callable[[], Any]) -> Path:
    """A folder that workers have filled."""
    folder.mkdir(parents=True)
    for action in actions:
        ended = Worker(action, folder).wait()
        if ended.code not in (0, -signal.SIGKILL) or ended.value in (1, 2):
            raise RuntimeError(f"{folder.name} cannot be prepared: {ended.output}")
    return folder


def _runs(scratch: Path, text: str, wanted: Callable[[str], bool]) -> list[Scenario]:
    plain = ["--preset", "debug", "--data", text, "--cache-dir", str(scratch / "cache"), "--threads", "1", "--save-every",
             "2", "--eval-every", "4", "--sample-tokens", "0", "--eval-batches", "1", "--final-eval-batches", "1",
             "--output-dir", "run"]
    start, many = [*plain, "--max-steps", "6"], [*plain, "--max-steps", "6", "--keep-checkpoints", "9"]
    old, resume = [*plain, "--max-steps", "4", "--seed", "7"], ["--resume", "--output-dir", "run"]
    back, over = ["--resume", "2", "--output-dir", "run"], [*start, "--overwrite"]

    def without_end(folder: Path) -> None:
        shutil.copytree(templates / "whole" / "run", folder / "run")
        (folder / "run" / "metrics.json").unlink()

    def one_of_two(other: Outcome, _: Outcome) -> bool:
        return other.value in (0, 2)  # it had the folder, or it was refused

    templates, both = scratch / "templates", ("resume", "again")
    copy = lambda name: lambda folder: shutil.copytree(templates / name, folder, dirs_exist_ok=True)
    rows = [
        ("training", lambda _: None, start, start, 4.0, []),
        ("resume", copy("broken off"), resume, start, 2.5, [("broken off", partial(lm_killed_at, 6, *start))]),
        ("winding back", copy("many"), back, back, 3.0, [("many", partial(lm, *many))]),
        ("export", without_end, resume, start, 2.0, [("whole", partial(lm, *start))]),
        ("overwriting a run", copy("old"), over, over, 3.0, [("old", partial(lm, *old))]),
        ("two runs at once", lambda _: None, start, start, 2.0, []),
    ]
    found = []
    for name, prepare, act, command, weight, needed in rows:
        if wanted(name):
            for template, action in needed:
                _template(templates / template, action)
            accepted = templates / "old" if command is over else None
            found.append(Scenario(name, prepare, partial(lm, *act), partial(recover_run, command, accepted), ways=both,
                                  beside=one_of_two if name == "two runs at once" else None, weight=weight,
                                  equal="bit for bit"))
    return found


def _saves(scratch: Path, wanted: Callable[[str], bool]) -> list[Scenario]:
    rows = [  # the old model and the new one: seed, width, heads, whether with a tokenizer
        ("save into a new folder", None, (1, 8, 2, True), save, 1.5),
        ("save over another shape", (0, 16, 2, True), (1, 8, 2, True), save, 2.0),
        ("save over the same shapes", (0, 8, 1, True), (1, 8, 2, False), save, 2.0),  # heads change no shape
        ("save over one without a tokenizer", (0, 16, 2, False), (1, 8, 2, True), save, 1.5),
        ("broken save", (0, 8, 1, False), (1, 8, 2, False), save_in_place, 5.0),
    ]
    found = []
    for name, old, new, how, weight in rows:
        if not wanted(name):
            continue
        template, act = scratch / "templates" / name, partial(how, *new)
        _template(template, *([partial(save, *old)] if old else []))
        digest = Worker(loaded, template).wait().value if old else None
        found.append(Scenario(name, partial(shutil.copytree, template, dirs_exist_ok=True), act,
                              partial(recover_save, digest, act), weight=weight))
    return found


def scenarios(scratch: Path, parts: list[str]) -> list[Scenario]:
    """The scenarios whose names hold one of ``parts``; without parts all, but for "broken save", which is to be found."""
    def wanted(name: str) -> bool:
        return any(part in name for part in parts) if parts else "broken" not in name

    torch.set_num_threads(1)
    kr.load_script()
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randrange(2, 7))) for _ in range(60)]
    text = scratch / "text.txt"
    text.write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(120)), encoding="utf-8")
    nothing, cache = lambda _: None, partial(build_cache, str(text))
    others = [
        Scenario("cache", nothing, cache, partial(recover_cache, str(text)), weight=2.5),
        Scenario("cache, two at once", nothing, cache, partial(recover_cache, str(text)), weight=2.0,
                 beside=lambda other, expected: other.value == expected.value),
        Scenario("lines", nothing, append_rows, recover_lines, weight=2.0),
    ]
    return [*_runs(scratch, str(text), wanted), *_saves(scratch, wanted), *(s for s in others if wanted(s.name))]
