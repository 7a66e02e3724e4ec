"""The preset wikitext-103 at its real shape for a few steps: from files in the Hub's layout to a saved model that writes.

    python train/experiments/rehearse.py                 # ten minutes or so on two cores, 6 GiB of memory
    python train/experiments/rehearse.py --quick         # a minute: a model of another shape, for the tests

It writes the bundled text in the layout of Salesforce/wikitext (rows of one line, several files of training rows) and then
runs ``train/lm.py`` on it as on the real one: a tokenizer of 16,384 pieces is trained, the text is tokenised, steps are made
in bfloat16 by each objective, the model is evaluated, saved, loaded and asked for a text. Of each run the seconds and the
peak memory of its process are stored.

The figures of a GPU (``train/results/wikitext-103-h100.json``) give the hours of the whole run, on one GPU and, where the
reduction of gradients costs nothing, on eight.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch

from comparisons.program import as_program
from hbll_seq.data.sources import SPLITS, open_corpus
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.atomic import atomic_write

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "train" / "results"
NAME = "wikitext-103-raw-v1"
#: files of training rows, as on the Hub
FILES = {"train": 2, "validation": 1, "test": 1}
#: words of the training split, end of line counted as one, and pieces a word of the bundled text by its 16,384 pieces
WORDS, PIECES_A_WORD, EPOCHS = 103_227_021, 1.17, 10
QUICK = ["--n-embd", "32", "--n-head", "2", "--context-length", "32", "--vocab-size", "400"]
PROMPT = "The history of the city"


def write_rows(folder: Path, n_rows: int | None = None, n_others: int = 100) -> dict[str, int]:
    """The bundled text as parquet files in the Hub's layout.

    Args:
        folder: gets a folder of the data set's name.
        n_rows: of training (None: all).
        n_others: of validation and test, which are read to their ends when the run is over.

    Returns:
        Rows by split.
    """
    counts = {}
    for split in SPLITS:
        lines = [line for line in open_corpus("bundled", split).segments() if line is not None]
        lines = lines[: n_rows if split == "train" else n_others]
        rows = ["" if not line.strip() else line for line in lines]
        size = -(-len(rows) // FILES[split])
        for k in range(FILES[split]):
            path = folder / NAME / f"{split}-{k:05d}-of-{FILES[split]:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.table({"text": rows[k * size : (k + 1) * size]}), path)
        counts[split] = len(rows)
    return counts


def run(command: list[str], log: Path) -> tuple[float, float]:
    """Seconds and peak memory in GiB of a process.

    Raises:
        RuntimeError: it failed; the message has the end of what it printed.
    """
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{command[1]} ended with {child.returncode}: {log.read_text(encoding='utf-8')[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / (1 << 20 if platform.system() == "Linux" else 1 << 30)


def rehearse(objective: str, folder: Path, args: argparse.Namespace) -> dict:
    """One run of ``train/lm.py``, and what it left."""
    output = folder / objective
    command = [sys.executable, str(ROOT / "train" / "lm.py"), "--preset", "wikitext-103", "--objective", objective,
               "--data", str(folder / NAME), "--cache-dir", str(folder / "cache"), "--output-dir", str(output),
               "--precision", "bfloat16", "--max-steps", str(args.steps), "--warmup-steps", "1", "--log-every", "1",
               "--eval-batches", "1", "--eval-batch-size", "1", "--threads", str(args.threads)]  # fmt: skip
    command += QUICK * args.quick
    seconds, memory = run(command, folder / f"{objective}.log")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    model = HBLLForCausalLM.from_pretrained(output)
    trained = [depth for depth in (1, 3, model.tree.n_nodes) if model.config.is_trained(model.resolve_path(depth))]
    texts = [model.generate(PROMPT, depth=depth, max_new_tokens=5, seed=0) for depth in trained]
    assert texts and all(text.startswith(PROMPT) and len(text) > len(PROMPT) for text in texts)
    ends = [0.0, *(line["seconds"] for line in lines)]
    return {
        "seconds": round(seconds, 1),
        "seconds_a_step": [round(after - before, 2) for before, after in zip(ends, ends[1:])],
        "peak_memory_gib": round(memory, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
        "nats_a_token": [round(line["ce"], 4) for line in lines],
        "weights_mib": round((output / "model.safetensors").stat().st_size / (1 << 20), 1),
    }


def hours(tokens_per_s: float, gpus: int = 1) -> float:
    """Of the preset's epochs, at this speed of one GPU."""
    return WORDS * PIECES_A_WORD * EPOCHS / tokens_per_s / gpus / 3600


def main(argv: Sequence[str] | None = None) -> dict:
    """Rehearses every objective, prints and stores the figures, and returns them."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--objectives", nargs="+", default=["tree", "sweeps", "backprop"], help="(default: tree sweeps backprop)")
    add("--steps", type=int, default=3, help="of training (default: 3)")
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--quick", action="store_true", help="a small model and little text: shows that the parts fit together")
    add("--output", type=Path, help="JSON file of results (default: train/results/rehearse[-quick].json)")
    args = parser.parse_args(argv)
    for name in ("steps", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least 1")
    output = args.output or RESULTS / f"rehearse{'-quick' * args.quick}.json"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder, 400 if args.quick else None, 20 if args.quick else 100)
        runs = {objective: rehearse(objective, folder, args) for objective in args.objectives}
    found = {"setting": {"preset": "wikitext-103", "quick": args.quick, "steps": args.steps, "threads": args.threads,
                         "precision": "bfloat16", "torch": torch.__version__, "rows": rows}, "objectives": runs}  # fmt: skip
    atomic_write(output, json.dumps(found, indent=1) + "\n")
    for objective, row in runs.items():
        print(f"{objective}: {row['seconds']:.0f} s in all, steps of {row['seconds_a_step']} s, "
              f"peak {row['peak_memory_gib']} GiB")  # fmt: skip
    stored = RESULTS / "wikitext-103-h100.json"
    for objective, row in json.loads(stored.read_text(encoding="utf-8"))["objectives"].items():
        one, eight = (hours(row["tokens_per_s"], gpus) for gpus in (1, 8))
        print(f"{objective} on an H100: {EPOCHS} epochs in {one:.1f} hours, on eight {eight:.1f} or more")
    return found


if __name__ == "__main__":
    as_program(main)
