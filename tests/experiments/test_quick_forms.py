"""Short runs of the benchmarks have a file of their own: the stored results of the full runs stay as they are."""

import importlib
import json

import pytest
from helpers.language_models import TOKENIZER, model_of

from comparisons import program

NAMES = ["bench_depth", "bench_generation", "bench_heads", "bench_speculative", "bench_parallel", "bench_rnn",
         "bench_sequence"]  # fmt: skip
#: shorter still than the short form
TINY = {
    "bench_depth": "--blocks 1 --n-embd 8 --n-head 2 --context-length 4 --vocab-size 20",
    "bench_generation": "--widths 32 --new-tokens 2 --prompt-tokens 2 --vocab-size 20",
    "bench_heads": "--context-length 4 --batch-size 1",
    "bench_speculative": "--prompts 1 --tokens 2 --prompt-tokens 5 --temperatures 0 --drafters 1 --in-order 4 --windows 1",
}
every = pytest.mark.parametrize("name", NAMES)


@every
def test_a_short_run_is_named_so_and_its_defaults_can_be_overruled(name):
    script = importlib.import_module(name)
    full, quick = script.parse([]), script.parse(["--quick"])
    assert full.output == program.RESULTS / f"{name}.json" and full.output.is_file()  # what must not be written over
    assert quick.output == program.RESULTS / f"{name}-quick.json"
    given = {k: v for k, v in script.QUICK.items() if k != "methods"}  # those become objects
    assert given.items() <= vars(quick).items() and not given.items() <= vars(full).items()
    assert script.parse(["--quick", "--output", "mine.json"]).output.name == "mine.json"
    option = "prompts" if "prompts" in given else "repeats"
    assert getattr(script.parse(["--quick", f"--{option}", "4"]), option) == 4 != given[option]
    assert f"python train/experiments/{name}.py --quick  " in script.__doc__


@pytest.mark.parametrize("name", TINY)
def test_a_short_run_leaves_the_stored_file_alone(name, tmp_path, monkeypatch, capsys):
    if name == "bench_generation":
        pytest.importorskip("transformers")
    argv = ["--quick", *TINY[name].split()]
    if name == "bench_speculative":
        model_of(TOKENIZER, default_paths="prefix").save_pretrained(tmp_path / "model")
        argv += ["--model", str(tmp_path / "model")]
    results = tmp_path / "results"
    results.mkdir()
    (results / f"{name}.json").write_text("the full run's")
    (results / f"{name}.png").write_text("and its figure")
    monkeypatch.setattr(program, "RESULTS", results)
    importlib.import_module(name).main(argv)
    assert (results / f"{name}.json").read_text() == "the full run's"
    assert (results / f"{name}.png").read_text() == "and its figure"
    stored = json.loads((results / f"{name}-quick.json").read_text())
    assert "quick" not in stored["setting"] and stored["setting"].keys() >= {"torch"}
