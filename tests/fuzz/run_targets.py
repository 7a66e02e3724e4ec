"""train/lm.py in this process: its options, presets, and folders of runs that were stopped or have ended."""

from __future__ import annotations

import dataclasses
import decimal
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import yaml

from hbll_seq.training.settings import TrainingSettings
from hbll_seq.utils.integrity import SUMS_NAME
from hbll_seq.utils.reading import read_json

from . import documents, files
from .oracle import Case, Violation
from .program import Ran, run_program
from .reference import STEPS, Reference, kr, reseal

#: words of a command line. None is as an identifier of the Hub looks.
_WORDS = (
    "", " ", "0", "1", "2", "-1", "3.5", "1e3", "1e-4", "1e999", "nan", "inf", "-inf", "none", "None", "null", "true",
    "False", "yes", "auto", "full",
    "9007199254740993", "1" + "0" * 400, "1" + "0" * 5000, "0x10", "1_000", "\u0662", "\u00bd", "x", "x" * 5000, "\udcff",
    "a\0b", "a\nb", "\u001b[2J",
    "gru", "gru,transformer,gru", "gru,,gru", "4,6,7", "2,3", "3,2", "[2, 3]", "1,2,3,", "elman", "layernorm", "bfloat16",
    "fp16", "float64", "tree",
    "backprop", "sweeps", "octaves", "sandwich", "all", "few", "secant", "low_rank", "identity", "zero",
    "recomputed", "prefix", "depth",
    "--", "-", "--help=1",
    "debug", "nowhere.yaml", "train", "~", "~no-such-user/x", "/dev/zero", "/dev/full", "pipe", "folder", "loop", "dangling",
    "a/b/c/d", "\u5b57",
)  # fmt: skip
_OUTPUTS = ("mine", "mine/x", "run", "folder", "pipe", "loop", "dangling", "file", "file/x", "a/b/c", "~/y",
            "~no-such-user/x", "", " ", "x" * 300,
            "a\0b", "\udcff", "/proc/x", "/dev/null/x", ".", "a\nb", "link")  # fmt: skip
#: options whose valid values may cost more than an input may, or break the training down as they say.
_ONLY_DRY = frozenset({"n_level", "n_embd", "n_head", "max_steps", "epochs", "batch_size", "grad_accum", "n_samples",
                       "sample_tokens", "context_length",
                       "threads", "num_proc", "eval_batch_size", "mlp_ratio", "exit_rank", "forward", "backward",
                       "time_forward", "warmup_steps", "time_backward", "vocab_size", "output_dir", "tracker", "trackers",
                       "data", "log_with"})
_MAY_FAIL = frozenset({"lr", "min_lr_ratio", "weight_decay", "clip", "beta1", "beta2", "sigma", "state_weight",
                       "depth_mix_weight", "precision", "dropout"})


_SWITCHES = frozenset(field.name for field in dataclasses.fields(TrainingSettings) if isinstance(field.default, bool))
_AS_RESOLVED = frozenset({"path", "cell", "precision"})


def targets(reference: Reference) -> dict:
    """The targets over these unharmed runs."""
    made = Runs(reference)
    return {"cli": made.dry, "cli-run": made.start, "presets": made.preset, "run-folder": made.resume}


class Runs:
    """Makes cases of the program."""

    def __init__(self, reference: Reference):
        self.reference, self.main = reference, kr.load_script().main
        self.fields = sorted(field.name for field in dataclasses.fields(TrainingSettings))
        self.preset_text = _settings(run_program(self.main, ["--preset", "debug", "--dry-run"]))

    # -- options

    def dry(self, rng: random.Random, folder: Path) -> Case:
        """Options with hostile words, which are resolved and shown alone."""
        _enter(folder)
        pairs = {name: rng.choice(_WORDS) for name in rng.sample(self.fields, rng.choice((1, 1, 2, 3)))}
        extra = rng.choice(_EXTRA) if rng.random() < 0.2 else []
        argv = ["--preset", "debug", "--dry-run", *_flags(pairs), *extra]
        names = (*_named(pairs), *(_shown(word.strip("-").split("=")[0]) for word in extra if word.strip("-")))
        return Case(" ".join(argv)[:600], lambda: run_program(self.main, argv),
                    lambda ran: self._resolved(ran, folder, pairs), names)

    def preset(self, rng: random.Random, folder: Path) -> Case:
        """A preset file, harmed as a document, as bytes or as a place."""
        _enter(folder)
        path, choice = folder / "preset.yaml", rng.random()
        path.write_text(self.preset_text)
        names = ("preset", *self.fields)
        if choice < 0.15:
            what, names = files.harm_place(path, rng), ("preset",)
        elif choice < 0.4:
            data, what = files.harm_bytes(path.read_bytes(), rng,
                                          (self.reference.root / "model" / "config.json").read_bytes())
            path.write_bytes(data)
        else:
            text, what = documents.harm_yaml(self.preset_text, rng)
            path.write_bytes(documents.to_bytes(text, rng))
        argv = ["--preset", str(path), "--dry-run"]
        return Case(what, lambda: run_program(self.main, argv), lambda ran: self._resolved(ran, folder, {}), names)

    def _resolved(self, ran: Ran, folder: Path, pairs: dict[str, str]) -> str:
        """The settings shown are those that were given, and resolve to themselves."""
        text = _settings(ran)
        shown = yaml.safe_load(text)
        for name, word in pairs.items():
            if name in shown and name not in _AS_RESOLVED and not isinstance(shown[name], bool) and not _means(word,
                                                                                                               shown[name]):
                raise Violation("changed result", f"--{name} {word[:60]!r} is resolved to {shown[name]!r}")
        (folder / "again.yaml").write_text(text, encoding="utf-8")
        again = _settings(run_program(self.main, ["--preset", str(folder / "again.yaml"), "--dry-run"]))
        if again != text:
            raise Violation("changed result", "the settings shown resolve to others when they are read as a preset")
        return "equal" if text == self.preset_text else "accepted"

    # -- runs

    def start(self, rng: random.Random, folder: Path) -> Case:
        """A whole run of one step, with hostile words for options that leave it small, and hostile output folders."""
        _enter(folder)
        self._furnish(folder)
        names = rng.sample(sorted(set(self.fields) - _ONLY_DRY), rng.choice((0, 1, 1, 2)))
        pairs = {name: rng.choice(_WORDS) for name in names}
        output = rng.choice(_OUTPUTS) if rng.random() < 0.5 else "new"
        argv = [*self.reference.options(cache_dir=folder / "cache", max_steps=1), *_flags(pairs), "--output-dir", output]
        argv += ["--overwrite"] * (rng.random() < 0.3)
        before = _contents(folder / "mine")

        def call() -> Ran:
            try:
                return run_program(self.main, argv, may_fail=bool(_MAY_FAIL & set(pairs)))
            finally:
                if (now := _contents(folder / "mine")) != before and any(now.get(name) != data for name,
                                                                         data in before.items()):
                    raise Violation("lost files", "of the user's own folder")

        def judge(ran: Ran) -> str:
            found = [path for path in folder.rglob("metrics.json") if path.parent.name != "mine" and path.is_file()]
            if not found or not all(json.loads(path.read_bytes())["step"] for path in found):
                raise Violation("changed result", "exit code 0 without a metrics.json")
            return "accepted"

        return Case(" ".join([*_flags(pairs), "--output-dir", output])[:500], call, judge, (*_named(pairs), "output"))

    def _furnish(self, folder: Path) -> None:
        mine = folder / "mine"
        mine.mkdir()
        for name in ("config.json", "tokenizer.model", "metrics.json", "notes.txt", "model.safetensors", "README.md"):
            (mine / name).write_text("mine")
        (folder / "file").write_text("words")
        (folder / "link").symlink_to("mine")
        shutil.copytree(self.reference.root / "whole", folder / "run", symlinks=True)
        shutil.copytree(self.reference.root / "cache", folder / "cache", symlinks=True)

    def resume(self, rng: random.Random, folder: Path) -> Case:
        """A run's folder with one harmed file, taken up again."""
        _enter(folder)
        kind = rng.choice(("stopped", "stopped", "stopped", "whole", "trained"))
        source = "stopped" if kind == "stopped" else "whole"
        run = Path(shutil.copytree(self.reference.root / source, folder / "run", symlinks=True))
        if kind == "trained":  # killed before the end of its export
            (run / "metrics.json").unlink()
        victim = self._victim(run, kind, rng)
        what = _harm(victim, rng)
        seal = self._seal(victim, rng)
        argv = ["--resume", "--output-dir", str(run)]
        loose = seal in ("anew", "away")

        def judge(ran: Ran) -> str:
            return "accepted" if loose else self._as_unbroken(run, victim, kind)

        return Case(f"{kind}, {victim.relative_to(run)}, sums {seal}: {what}",
                    lambda: run_program(self.main, argv, may_fail=loose),
                    judge,
                    (victim.name, run.name, *(self.fields if victim.name == "state.json" else ())))  # fmt: skip

    def _victim(self, run: Path, kind: str, rng: random.Random) -> Path:
        if kind == "whole":
            return run / rng.choice(("metrics.json", "metrics.json", "metrics.jsonl", "settings.yaml"))
        if kind == "trained":
            return run / rng.choice(("evaluations.jsonl", "evaluations.jsonl", "metrics.jsonl"))
        step = run / "checkpoints" / "step-00000002"
        others = sorted(path for path in run.rglob("*") if not path.is_dir() or path.name.startswith("step"))
        return rng.choice((step / "state.json", step / "state.json", step / "state.json", run / "metrics.jsonl",
                           run / "metrics.jsonl",
                           step / "model.safetensors", step, rng.choice(others)))  # fmt: skip

    def _seal(self, victim: Path, rng: random.Random) -> str:
        """What becomes of the sums beside the harmed file; "left" where there are none, or the harm would make it run on."""
        sums, seal = victim.parent / SUMS_NAME, rng.choice(("left", "left", "anew", "away"))
        if seal == "left" or victim == sums or not sums.is_file() or not victim.is_file() or _costly(victim):
            return "left"
        if seal == "anew":
            return "anew" if reseal(victim.parent) else "left"
        sums.unlink()
        return "away"

    def _as_unbroken(self, run: Path, victim: Path, kind: str) -> str:
        """The run ended as the unbroken one, and has every line that was whole."""
        whole = self.reference.root / "whole"
        if (run / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes():
            raise Violation("changed result", "other weights than the unbroken run's")
        try:
            says = read_json(run / "metrics.json")["step"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Violation("changed result",
                            f"it counts as finished by a metrics.json that says nothing: {str(error)[:200]}") from None
        if says != STEPS:
            raise Violation("changed result", f"it counts as finished after {says} steps")
        damaged = victim.name == "metrics.jsonl"
        if damaged and kind == "whole":  # it was not read: nothing is left to do
            return "equal"
        expected, found = _rows(whole / "metrics.jsonl"), _rows(run / "metrics.jsonl")
        before = STEPS if kind == "trained" else 2  # the steps whose lines were there
        for step, row in expected.items():
            if found.get(step) != row and not (damaged and step <= before):
                raise Violation("changed result", f"metrics.jsonl, step {step}: {found.get(step)} instead of {row}")
        return "equal"


_EXTRA = (["--nope"], ["x"], ["--seed"], ["--preset", ""], ["--preset", "nowhere"], ["--preset", "x" * 5000],
          ["--preset", "a\0b.yaml"], ["--preset", "/dev/zero"],
          ["--preset", "folder/x.yaml"], ["--resume", "x"], ["--max-step", "3"], ["--resume", "--overwrite"],
          ["--resume", "3"], ["--dry-run=1"], ["-x"],
          ["--" + "x" * 3000], ["--preset", "pipe"], ["--preset", "../debug"],
          ["--tie-embeddings", "--no-tie-embeddings"])  # fmt: skip


def _settings(ran: Ran) -> str:
    return "".join(line for line in ran.out.splitlines(keepends=True) if not line.startswith("# preset "))


def _flags(pairs: dict[str, str]) -> list[str]:
    """The pairs on the command line; a switch has no word, or now and then one that belongs to nothing."""
    argv = []
    for name, word in pairs.items():
        switch = name in _SWITCHES
        argv.append("--" + "no-" * (switch and len(word) % 2) + name.replace("_", "-"))
        argv += [word] * (not switch or len(word) > 15)
    return argv


def _named(pairs: dict[str, str]) -> tuple[str, ...]:
    """What a message about them may name."""
    return tuple(_shown(part) for part in (*pairs, *_flags(pairs)) if part)


def _shown(word: str) -> str:
    """The start of a word as a message quotes it."""
    return repr(word)[1:-1][:50]


def _means(word: str, value: Any) -> bool:
    """Whether a resolved value is what the word says."""
    if value is None:
        return word.strip().lower() in ("none", "null")
    if isinstance(value, str):
        return value == word or os.path.expanduser(word) == value
    try:
        number = decimal.Decimal(word.strip())
        return number == value if isinstance(value, int) else float(number) == value
    except decimal.InvalidOperation:
        return False


def _enter(folder: Path) -> None:
    """Things of several kinds in a working directory of its own, which is the home too."""
    os.chdir(folder)
    os.environ["HOME"] = str(folder)
    (folder / "folder").mkdir()
    (folder / "folder" / "notes.txt").write_text("mine")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _harm(victim: Path, rng: random.Random) -> str:
    """Harm a file by what its name says it is, or a folder."""
    if victim.is_dir() or rng.random() < 0.15:
        return files.harm_place(victim, rng)
    data, kind = victim.read_bytes(), victim.suffix
    if kind not in (".json", ".jsonl", ".yaml") or rng.random() < 0.3:
        harmed, what = files.harm_bytes(data, rng, b'{"step": 1}\n')
    elif kind == ".jsonl":
        lines = data.splitlines(keepends=True) or [b"{}\n"]
        at = rng.randrange(len(lines))
        text, what = documents.harm_json(json.loads(lines[at]), rng)
        harmed, what = b"".join([*lines[:at], documents.to_bytes(text, rng) + b"\n",
                                 *lines[at + 1 :]]), f"line {at + 1}: {what}"
    else:
        harm = documents.harm_yaml if kind == ".yaml" else documents.harm_json
        text, what = harm(data.decode() if kind == ".yaml" else json.loads(data), rng)
        harmed = documents.to_bytes(text, rng)
    victim.write_bytes(harmed)
    return what


def _costly(path: Path) -> bool:
    """Whether a harmed state may rightly ask for a long or large run."""
    if path.suffix != ".json":
        return False
    try:
        settings = json.loads(path.read_bytes())["settings"]
        return any(isinstance(value, (int, float)) and not value < 1000 for value in settings.values())
    except Exception:
        return False


def _rows(path: Path) -> dict[int, dict]:
    """Step -> line, times left out."""
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return {row["step"]: {key: value for key, value in row.items() if key not in kr.TIMES} for row in rows}
