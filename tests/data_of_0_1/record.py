"""Made the data in this folder with version 0.1 of hbll_seq; later versions cannot run it, and need not.

In a checkout of version 0.1: ``PYTHONPATH=.:tests OMP_NUM_THREADS=1 python record.py FOLDER``.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import kill_and_resume as kr
import pytest
import torch
import yaml

from hbll_seq import HBLLForCausalLM, Tokenizer
from hbll_seq.generation import generate_ids

COMMON = ["--preset", "debug", "--data", "text.txt", "--tokenizer", "tiny.model", "--cache-dir", "cache", "--threads", "1",
          "--n-embd", "8", "--block-size", "8", "--max-steps", "160", "--batch-size", "16", "--lr", "0.05",
          "--save-every", "80", "--log-every", "10", "--keep-checkpoints", "1", "--mlp-ratio", "1",
          "--eval-every", "80", "--sample-tokens", "3", "--final-eval-batches", "2"]
RUNS = {
    "octaves": ["--mix", "octaves", "--readout-rank", "2", "--readout-by", "depth", "--dropout", "0.1", "--sweeps", "1",
                "--corrections", "1"],
    "secant": ["--mix", "none", "--linearization", "secant", "--graphs", "recomputed"],
    "gru": ["--cell", "gru", "--carry-state", "--time-chunk", "4", "--time-sweeps", "2", "--time-corrections", "2",
            "--mlp-ratio", "0", "--mix", "spine", "--mix-weight", "2"],
}
STOPPED = 147
FIGURES = ("step", "loss", "ce", "grad_norm")
KEPT = ("settings.yaml", "run.json", "metrics.jsonl", "evaluations.jsonl", "checkpoints")


def write_text():
    rng = random.Random(0)
    text = "".join(f"the {rng.choice(['tree', 'node'])} reads a path of blocks .\n" for _ in range(220))
    Path("text.txt").write_text(text, encoding="utf-8")
    Tokenizer.train([text], 284).save("tiny.model")


def greedy(model, path, prompt):
    ids = generate_ids(model, [prompt], path, max_new_tokens=12, temperature=0.0)
    return [step[0] for step in ids]


def main():
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    write_text()
    lm, expected = kr.load_script(), {"torch": torch.__version__, "runs": {}}
    prompt = Tokenizer.from_file("tiny.model").encode("the tree reads")
    for name, options in RUNS.items():
        assert lm.main([*COMMON, *options, "--output-dir", f"unbroken/{name}"]) == 0
        with pytest.MonkeyPatch.context() as patch:
            kr.at_step(patch, STOPPED, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert lm.main([*COMMON, *options, "--output-dir", name]) == 143
        for stray in {path.name for path in Path(name).iterdir()} - set(KEPT):
            print("removed", name, stray)
            (Path(name) / stray).unlink()
        (checkpoint,) = Path(name, "checkpoints").iterdir()
        state = json.loads((checkpoint / "state.json").read_text())
        state["locations"] = {}  # where the text lay on that machine
        kr.write_state(checkpoint, json.dumps(state))
        model = HBLLForCausalLM.from_pretrained(f"unbroken/{name}")
        paths = [model.tree.path_for_depth(depth) for depth in range(1, model.config.n_layer + 1)]
        expected["runs"][name] = {
            "options": [*COMMON, *options],
            "metrics": [{key: row[key] for key in FIGURES} for row in kr.lines(Path("unbroken", name))],
            "test": [row["loss"] for row in json.loads(Path("unbroken", name, "metrics.json").read_text())["test"]],
            "prompt": prompt,
            "greedy": {",".join(map(str, path)): greedy(model, path, prompt) for path in paths},
        }
        if name == "octaves":
            rows = json.loads(Path("unbroken", name, "metrics.json").read_text())["test"]
            settings = yaml.safe_load(Path(name, "settings.yaml").read_text())
            model.save_pretrained("model", data="text.txt", settings=settings, perplexity=rows, steps=160)
    Path("expected.json").write_text(json.dumps(expected, indent=None) + "\n")
    shutil.rmtree("unbroken")
    shutil.rmtree("cache")


if __name__ == "__main__":
    main()
