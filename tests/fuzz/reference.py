"""The unharmed inputs, and what the library makes of them. They are written once, in a process of their own.

That process trains: what autograd starts does not survive in the workers, which are forked from this one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from hbll_seq import HBLLClassifierConfig, HBLLConfig, HBLLForCausalLM, HBLLForSequenceClassification, Tokenizer, load_tokens
from hbll_seq.data.tokens import load_tokenizer
from hbll_seq.utils.integrity import SUMS_NAME, format_sums, read_sums

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import kill_and_resume as kr  # noqa: E402

WORDS = ("tree", "node", "level", "block", "the", "a", "of", "in", "reads", "writes", "state", "path", ".")
SPLITS = ("train", "validation", "test")
STEPS = 4
PROMPT = "the tree reads a"


@dataclass
class Reference:
    """Where the unharmed inputs lie. Workers copy what they harm."""

    root: Path

    @cached_property
    def language_model(self) -> HBLLForCausalLM:
        """The model of the folder ``model``."""
        return HBLLForCausalLM.from_pretrained(self.root / "model")

    @cached_property
    def sequence_classifier(self) -> HBLLForSequenceClassification:
        """The model of the folder ``classifier``."""
        return HBLLForSequenceClassification.from_pretrained(self.root / "classifier")

    @cached_property
    def words(self) -> Tokenizer:
        """The tokenizer of all models and texts."""
        return Tokenizer.from_file(self.root / "tokenizer.model")

    @cached_property
    def tokens(self) -> dict[str, list[int]]:
        """Ids of the three splits of text.txt."""
        return {split: load_tokens(str(self.root / "text.txt"), split, self.words,
                                   cache_dir=self.root / "cache").tokens.tolist()
                for split in SPLITS}  # fmt: skip

    @cached_property
    def cached_tokenizer(self) -> bytes:
        """What was trained on text.txt and cached."""
        return load_tokenizer(str(self.root / "text.txt"), 300, cache_dir=self.root / "cache").model_proto

    def options(self, **changed: object) -> list[str]:
        """Options of a run that takes a fraction of a second."""
        values = {"preset": "debug", "data": self.root / "text.txt", "tokenizer": self.root / "tokenizer.model",
                  "cache_dir": self.root / "cache", "threads": 1, "max_steps": STEPS, "n_embd": 8, "context_length": 8,
                  "eval_every": 0, "sample_tokens": 0, "save_every": 2, "final_eval_batches": 1, **changed}  # fmt: skip
        return [part for name, value in values.items() for part in ("--" + name.replace("_", "-"), str(value))]

    def load(self) -> Reference:
        """Read all of it now, before workers are forked."""
        with torch.no_grad():
            self.language_model(torch.tensor([[1, 2, 3]]))
        self.sequence_classifier, self.words, self.tokens, self.cached_tokenizer  # noqa: B018
        kr.load_script()
        import matplotlib.pyplot  # noqa: F401
        import pyarrow.parquet  # noqa: F401

        return self


def make(root: Path) -> Reference:
    """Write the unharmed inputs below ``root`` and load them. Raises RuntimeError where that fails."""
    process = multiprocessing.get_context("fork").Process(target=_write, args=(root,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the unharmed inputs could not be made (exit code {process.exitcode})")
    return Reference(root).load()


def words_of(n_lines: int, seed: int, width: int = 8) -> str:
    """Lines of words."""
    rng = random.Random(seed)
    return "".join(" ".join(rng.choice(WORDS) for _ in range(width)) + "\n" for _ in range(n_lines))


def reseal(folder: Path) -> bool:
    """Write the sums of a folder anew, for the files that they name and that are there; False where it has none.
    Where that cannot be, they are taken away."""
    path = folder / SUMS_NAME
    if not path.is_file():
        return False
    try:
        names = [name for name in read_sums(path) if (folder / name).is_file()]
        if any((folder / name).stat().st_size > 1 << 28 for name in names):
            raise ValueError("a sparse file, whose sum would take longer than an input may")
        path.write_text(format_sums(folder, names))
    except (OSError, ValueError):  # or a pipe or device took a file's place
        path.unlink()
    return True


# ---------------------------------------------------------------------------------------------------- making them


def _write(root: Path) -> None:
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(root / "log", "w")
    (root / "text.txt").write_text(words_of(120, 0))
    tokenizer = Tokenizer.train([(root / "text.txt").read_text()], 300)
    tokenizer.save(root / "tokenizer.model")
    Tokenizer.train([words_of(200, 1, 30) + "abcdefghijklmn" * 9], 310).save(root / "other.model")
    for name, seed in (("model", 0), ("other", 1)):
        torch.manual_seed(seed)
        config = HBLLConfig(vocab_size=tokenizer.vocab_size, n_level=2, n_embd=8, n_head=2, context_length=16)
        model = HBLLForCausalLM(config, tokenizer)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(root / name, data="words")
    for name, seed in (("classifier", 0), ("other-classifier", 1)):
        torch.manual_seed(seed)
        config = HBLLClassifierConfig(n_inputs=12, n_steps=4, n_classes=3, hidden_size=4, permutation_seed=seed)
        HBLLForSequenceClassification(config).save_pretrained(root / name)
    _write_data(root)
    reference = Reference(root)
    load_tokenizer(str(root / "text.txt"), 300, cache_dir=root / "cache")
    for split in SPLITS:
        load_tokens(str(root / "text.txt"), split, tokenizer, cache_dir=root / "cache")
    shutil.copytree(root / "cache", root / "tokens", symlinks=True)
    _write_runs(reference)
    sys.stdout.flush()


def _write_data(root: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = words_of(60, 2).splitlines()
    rows = [{"text": line, "n": index} for index, line in enumerate(lines)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.table({"text": lines, "n": list(range(len(lines)))}), root / "rows.parquet")


def _write_runs(reference: Reference) -> None:
    import pytest

    main = kr.load_script().main
    if main([*reference.options(), "--output-dir", str(reference.root / "whole")]) != 0:
        raise RuntimeError("the unbroken run failed")
    with pytest.MonkeyPatch.context() as patch:
        kr.at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        if main([*reference.options(save_every=1), "--output-dir", str(reference.root / "stopped")]) != 143:
            raise RuntimeError("the run did not stop")
