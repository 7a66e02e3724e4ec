"""The benchmark of faster generation runs, and its file holds what it prints."""

import json

import pytest
from helpers.language_models import TOKENIZER, model_of

import bench_speculative


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    model_of(TOKENIZER, default_paths="prefix").save_pretrained(path)
    return path


def test_a_small_run(folder, tmp_path, capsys):
    output = tmp_path / "bench.json"
    options = "--prompts 1 --prompt-tokens 5 --tokens 6 --drafts 2 --drafters 1 4 9 --in-order 4 6 --windows 2".split()
    result = bench_speculative.main(["--model", str(folder), *options, "--output", str(output)])
    stored = json.loads(output.read_text())
    assert stored["speculation"] == result["speculation"] and stored["side_by_side"] == result["side_by_side"]
    names = ["plain", "depth 1 drafts 2", "depth 4 drafts 2", "4 in order draft 2", "chosen depth", "text",
             "speculative=True"]  # fmt: skip
    assert [row["form"] for row in result["speculation"]] == names * 2
    assert [row["form"] for row in result["side_by_side"]] == [
        "depth 4", "depth 5", "depth 7", "4 in order",
    ]  # fmt: skip
    assert capsys.readouterr().out.count("ms a token") == 18


def test_mistakes_are_named(folder):
    with pytest.raises(ValueError, match="prompts=0"):
        bench_speculative.main(["--model", str(folder), "--prompts", "0"])
