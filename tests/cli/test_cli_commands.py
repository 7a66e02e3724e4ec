"""What the commands say, against the library."""

import json
import math

import pytest
from helpers.language_models import TOKENIZER, model_of

from hbll_seq.cli.options import add_fields
from hbll_seq.cli.tree_picture import draw_levels, draw_paths
from hbll_seq.evaluation.perplexity import evaluate_paths
from hbll_seq.evaluation.text import evaluate_text, split_windows
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.model_card import _table
from hbll_seq.tree.topology import DyadicTree, path_text
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.options import option
from hbll_seq.utils.tables import MOST_PER_WORD

LM = ("--model", "runs/lm")
TEXT = "The river runs to the sea .\n It was built in 1923 \u4e2d by the town of Ashford .\n"


@pytest.fixture(scope="module")
def model(lm):
    return HBLLForCausalLM.from_pretrained(lm)


# ------------------------------------------------------------------------------------------------------------ generate


def test_generate_writes_what_the_library_writes(cli, model):
    given = ("--max-new-tokens", 6, "--seed", 3, "--temperature", "0.5", "--top-p", "0.9")
    options = dict(max_new_tokens=6, seed=3, temperature=0.5, top_p=0.9)
    assert cli("generate", "The river", *LM, *given, "--depth", 3) == model.generate("The river", 3, **options) + "\n"
    assert cli("generate", "The river", *LM, *given, "--depth", "all") == model.generate("The river", **options) + "\n"
    text = model.generate("The river", path=[4, 6], **options)
    assert cli("generate", "-", *LM, *given, "--path", "4,6", stdin="The river\n") == text + "\n"
    assert cli("generate", *LM, *given, "--path", "4,6", stdin="The river") == text + "\n"
    told = cli.json("generate", "The river", *LM, *given, "--path", "4,6")
    assert told["path"] == [4, 6] and told["texts"][0]["text"] == text and told["sampling"]["top_p"] == 0.9
    assert "The river" + told["texts"][0]["continuation"] == text


def test_the_faster_ways(cli, model):
    argv = ("generate", "The", *LM, "--seed", 1, "--max-new-tokens", 8)
    plain, options = cli(*argv, "--no-speculative"), dict(seed=1, max_new_tokens=8)
    assert plain == model.generate("The", speculative=False, **options) + "\n"
    assert cli(*argv, "--speculative") == model.generate("The", speculative=True, **options) + "\n"
    assert cli(*argv, "--in-order", 2) == model.generate("The", in_order=2, **options) + "\n" != plain
    assert cli.json(*argv, "--in-order", 2)["texts"][0]["text"] == model.generate("The", in_order=2, **options)
    assert "in_order=99" in cli(*argv, "--in-order", 99, code=2)


def test_several_texts_and_what_ends_them(cli, model):
    options = dict(n=3, stop=("e", " of"), seed=1, max_new_tokens=5, min_p=0.001, repetition_penalty=1.2)
    argv = ("generate", "The", *LM, "--n", 3, "--stop", "e", "--stop", " of", "--seed", 1, "--max-new-tokens", 5, "--min-p",
            "0.001", "--repetition-penalty", "1.2")  # fmt: skip
    texts = model.generate("The", **options)
    assert cli(*argv) == "---\n".join(f"{text}\n" for text in texts)
    told = cli.json(*argv)["texts"]
    details = model.generate_detailed("The", **options)
    assert [row["text"] for row in told] == texts and [row["ended_by"] for row in told] == [d.reason for d in details]
    assert "stop" in {row["ended_by"] for row in told} and "tokens" not in told[0]


def test_logprobs_of_every_token(cli, model):
    argv = ("generate", "The", *LM, "--seed", 1, "--max-new-tokens", 4)
    (detail,) = model.generate_detailed("The", seed=1, max_new_tokens=4, alternatives=2)
    for k, n in (((), 0), ((2,), 2)):
        tokens = cli.json(*argv, "--logprobs", *k)["texts"][0]["tokens"]
        assert [row["logprob"] for row in tokens] == list(detail.logprobs)
        assert [row["token"] for row in tokens] == list(detail.tokens)
        assert [len(row["alternatives"]) for row in tokens] == [n] * 4
    assert tokens[0]["alternatives"][0] == detail.alternatives[0][0]._asdict()


def test_a_prompt_of_stdin_loses_one_line_end_alone(cli, model):
    options = dict(max_new_tokens=3, seed=0)
    written = cli("generate", "-", *LM, "--max-new-tokens", 3, "--seed", 0, stdin="a \n\r\n")
    assert written == model.generate("a \n", **options) + "\n"


def test_a_long_prompt_is_cut_if_asked(cli):
    argv = ("generate", "the city of " * 40, *LM, "--max-new-tokens", 1)
    assert "truncate_prompt" in cli(*argv, code=2)
    assert cli(*argv, "--truncate-prompt").startswith("the city")


def test_every_sampling_option_is_a_field():
    from dataclasses import dataclass

    @dataclass
    class Options:
        count: int = option(3, "how 5% many", low=1, high=1 << 40)
        share: float | None = option(None, "a part", above=0, high=1)
        stop: str | tuple[str, ...] | None = option(None, "ends the text")
        fast: bool = option(False, "hurries")
        kind: str = option("a", "which", choices=("a", "b"))
        hidden: int = 4

    parser = Parser(prog="p")
    assert add_fields(parser, Options) == ["count", "share", "stop", "fast", "kind"]
    assert vars(parser.parse_args([])) == {}
    words = ["--count", "4", "--share", "0.5", "--stop", "x", "--stop", "y", "--fast", "--kind", "b"]
    assert vars(parser.parse_args(words)) == {"count": 4, "share": 0.5, "stop": ["x", "y"], "fast": True, "kind": "b"}
    text = " ".join(parser.format_help().split())
    assert "how 5% many (at least 1; default: 3)" in text and "a part (above 0 and at most 1)" in text
    with pytest.raises(ValueError, match="--share: 'half' is not a number"):
        parser.parse_args(["--share", "half"])
    assert set(add_fields(Parser(prog="p"), SamplingParams)) == set(SamplingParams.__dataclass_fields__)


# ---------------------------------------------------------------------------------------------------------------- eval


def test_eval_tells_what_the_library_measures(cli, model, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    rows = evaluate_text(model, TEXT)
    told = cli.json("eval", tmp_path / "t.txt", *LM)
    assert told["rows"] == rows and told["bytes"] == len(TEXT.encode())
    assert [row["depth"] for row in rows] == list(range(1, 8))
    assert cli.json("eval", "-", *LM, stdin=TEXT)["rows"] == rows
    lines = cli("eval", *LM, stdin=TEXT).splitlines()
    assert len(lines) == 9 and lines[1].split()[:2] == ["depth", "nats/token"] and lines[-1].endswith("0-1-2-3-4-5-6-7-head")
    assert f"{rows[2]['bits_per_byte']:.4f}" in lines[4]
    some = cli.json("eval", *LM, "--depth", "1,3", "--path", "4,6,7", stdin=TEXT)["rows"]
    assert [row["path"] for row in some] == [[4], [1, 2, 4], [4, 6, 7]]


def test_eval_of_a_split_by_name(cli, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HBLL_CACHE", str(tmp_path / "cache"))
    told = cli.json("eval", *LM, "--data", "bundled", "--split", "validation", "--max-batches", 1, "--depth", "1")
    windows = split_windows(model, "bundled", "validation")
    assert told["rows"] == evaluate_paths(model, windows, {"depth 1": (4,)}, max_batches=1)
    assert told["text"] == "bundled validation" and told["words"] == 217_646


def test_a_part_of_a_text_is_told_as_a_part(cli, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT * 40, encoding="utf-8")
    argv = (tmp_path / "t.txt", "--depth", "1,3", "--batch-size", 1, "--max-batches", 2)
    told = cli.json("eval", *argv, *LM)
    n_all, n_read = told["tokens"] - 1, told["tokens_read"]
    assert n_read == told["rows"][0]["tokens"] < n_all
    part = f"the first {n_read:,} of {n_all:,} tokens"
    head = cli("eval", *argv, *LM).splitlines()[0]
    assert head.endswith(f"t.txt: {part}; in all {told['words']:,} words, {told['bytes']:,} bytes")
    assert f"t.txt: {n_all:,} tokens, {told['words']:,} words" in cli("eval", *argv[:-2], *LM)
    compared = cli("compare", "runs/lm", "runs/lm", "--no-time", "--text", *argv).splitlines()
    assert compared[0].endswith(f"t.txt: {part}")
    small = tmp_path / "small"
    model_of(TOKENIZER, n_level=2, trained_paths="all", context_length=8).save_pretrained(small)
    assert f"runs/lm: {part}; {small}: the first 16 of " in cli("compare", "runs/lm", small, "--no-time", "--text", *argv)


def test_a_perplexity_per_word_that_says_nothing_is_a_dash_everywhere(cli, model):
    rows = evaluate_text(model, TEXT)  # random weights
    assert all(row["word_perplexity"] > MOST_PER_WORD for row in cli.json("eval", *LM, stdin=TEXT)["rows"])
    for argv, column in ((("eval", *LM), 3), (("compare", "runs/lm", "--no-time", "--text", "-"), 4)):
        assert [line.split()[column] for line in cli(*argv, stdin=TEXT).splitlines()[2:]] == ["-"] * 7
    assert "| - |" in _table(rows) and f"{rows[0]['word_perplexity']:.2f}" not in _table(rows)
    assert "812.50" in _table([{**rows[0], "word_perplexity": 812.5}])


def test_rows_are_named_by_what_was_asked_for(cli, tmp_path):
    model_of(TOKENIZER, default_paths="prefix", trained_paths="default").save_pretrained(tmp_path / "some")
    argv = ("--depth", "3", "--path", "4,6,7")
    for before in (("eval", "--model", tmp_path / "some"), ("compare", tmp_path / "some", "--no-time", "--text", "-")):
        lines = cli(*before, *argv, stdin=TEXT).splitlines()[2:]
        at = int(before[0] == "compare")
        assert [line.split()[at] for line in lines] == ["3", "4,6,7"]
        assert lines[0].endswith("0-1-2-4-head") and lines[1].endswith("0-4-6-7-head (not trained)")


def test_an_untrained_path_is_told_before_it_is_measured(cli, tmp_path):
    model_of(TOKENIZER, default_paths="prefix", trained_paths="default").save_pretrained(tmp_path / "some")
    cli("eval", "--model", tmp_path / "some", "--path", "4,6,7", stdin=TEXT)
    told = "hbll-seq: path 4,6,7 (0-4-6-7-head) was not trained; expect worse figures; trained: the default path of every "
    assert cli.told.startswith(told) and cli.told.count("\n") == 1
    cli("compare", tmp_path / "some", "--no-time", "--text", "-", "--path", "4,6,7", "--json", stdin=TEXT)
    assert cli.told.startswith(told) and cli.told.count("\n") == 1
    cli("eval", "--model", tmp_path / "some", "--depth", "3", stdin=TEXT)
    assert cli.told == ""


def test_a_table_whose_column_of_text_has_another_name(cli, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HBLL_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "test.jsonl"
    rows.write_text("".join(json.dumps({"body": line}) + "\n" for line in TEXT.splitlines() * 30), encoding="utf-8")
    argv = ("--data", rows, "--split", "test", "--depth", "1", "--max-batches", 1)
    for command in (("eval", *LM), ("compare", "runs/lm", "--no-time")):
        said = cli(*command, *argv, code=2)
        assert "has no column 'text'; its columns are 'body': name the one that holds the text by --column" in said
        told = cli.json(*command, *argv, "--column", "body")
        windows = split_windows(model, str(rows), "test", column="body")
        assert told["rows"][0]["loss"] == evaluate_paths(model, windows, {"depth 1": (4,)}, max_batches=1)[0]["loss"]


def test_bits_per_byte_and_words_spread_all_nats(model):
    (row,) = evaluate_text(model, TEXT, {"full": model.resolve_path()})
    nats = row["loss"] * row["tokens"]
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()))
    assert row["word_perplexity"] == pytest.approx(math.exp(nats / (len(TEXT.split()) + TEXT.count("\n"))))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate_text(model, "")


# ------------------------------------------------------------------------------------------------------------- compare


def test_compare_on_a_text(cli, model, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    told = cli.json("compare", "runs/lm", "runs/lm", "--text", tmp_path / "t.txt", "--depth", "1,7")
    assert [(row["model"], row["depth"]) for row in told["rows"]] == [("runs/lm", 1), ("runs/lm", 7)] * 2
    assert told["rows"][0]["parameters"] == model.n_parameters((4,)) < told["rows"][1]["parameters"]
    assert all(row["ms_per_token"] > 0 for row in told["rows"])
    assert told["rows"][0]["loss"] == evaluate_text(model, TEXT)[0]["loss"]
    lines = cli("compare", "runs/lm", "--text", "-", "--no-time", stdin=TEXT).splitlines()
    assert len(lines) == 9 and lines[-1].startswith("runs/lm")


def test_compare_leaves_out_the_depths_that_a_model_lacks(cli, tmp_path, capsys):
    model_of(TOKENIZER, n_level=2, trained_paths="all").save_pretrained(tmp_path / "small")
    argv = ("compare", "runs/lm", tmp_path / "small", "--text", "-", "--json", "--no-time", "--depth", "1,7")
    rows = json.loads(cli(*argv, stdin=TEXT))["rows"]
    assert [row["depth"] for row in rows] == [1, 7, 1]
    argv = ("compare", tmp_path / "small", "--text", "-", "--depth", 7)
    assert "depth=7: a model with n_level=2" in cli(*argv, stdin=TEXT, code=2)


def test_compare_on_a_prompt(cli, model):
    argv = ("compare", "runs/lm", "--prompt", "The", "--depth", "1,3", "--max-new-tokens", 4, "--seed", 0)
    texts = [model.generate("The", depth, max_new_tokens=4, seed=0) for depth in (1, 3)]
    assert [row["text"] for row in cli.json(*argv)["texts"]] == texts
    written = cli(*argv)
    assert all(text in written for text in texts) and "=== runs/lm, depth 3 (0-1-2-4-head)" in written


# ------------------------------------------------------------------------------------------------------- paths, export


@pytest.fixture(scope="module")
def measured(model, lm):
    """The same model, with the perplexities of its depths beside it."""
    model.save_pretrained(lm.parent / "measured", perplexity={"validation": evaluate_text(model, TEXT)})
    return HBLLForCausalLM.from_pretrained(lm.parent / "measured")


def test_paths_is_the_models_table(cli, measured):
    assert cli("paths", "runs/measured", "--no-time") == f"{measured.paths(measure=False)}\n"
    rows = cli.json("paths", "runs/measured", "--timed-tokens", 2)["rows"]
    assert measured.path_table.splits["validation"][0]["bits_per_byte"] == evaluate_text(measured, TEXT)[0]["bits_per_byte"]
    assert [row["validation"] for row in rows] == [row["perplexity"] for row in evaluate_text(measured, TEXT)]
    assert all(row["ms_per_token"] > 0 for row in rows)


def test_depths_that_have_a_name(cli, measured):
    best = min(evaluate_text(measured, TEXT), key=lambda row: row["perplexity"])
    assert cli.json("generate", "The", "--model", "runs/measured", "--depth", "best")["path"] == best["path"]
    fast = measured.resolve_path("fast")
    written = cli("generate", "The", "--model", "runs/measured", "--depth", "fast", "--seed", 0, "--max-new-tokens", 4)
    assert written == measured.generate("The", "fast", seed=0, max_new_tokens=4) + "\n"
    assert cli.told == f"hbll-seq: depth fast is depth {len(fast)} ({path_text(fast)})\n"
    rows = cli.json("eval", "--model", "runs/measured", "--depth", "best,fast", stdin=TEXT)["rows"]
    assert [row["name"] for row in rows] == ["depth best", "depth fast"] and rows[0]["path"] == best["path"]
    assert "no validation perplexity is stored" in cli("generate", "The", *LM, "--depth", "best", code=2)


def test_an_exported_path_writes_the_same_text(cli, model, tmp_path):
    small = tmp_path / "small"
    assert cli("export", "runs/lm", small, "--depth", 3) == ""
    argv = ("generate", "The", "--seed", 0, "--max-new-tokens", 5, "--model")
    assert cli(*argv, small) == cli(*argv, "runs/lm", "--depth", 3)
    told = cli.json("info", small)
    assert told["parameters"] == model.n_parameters((1, 2, 4)) and told["blocks"] == 3 and told["dyadic_paths"] is None
    assert "3, those of the path 1,2,4 of a larger model" in cli("info", small)
    assert "0---1---2-------4---------------8" in cli("info", small)
    assert "already holds a model" in cli("export", "runs/lm", small, "--depth", 2, code=2)
    assert cli.json("info", small)["blocks"] == 3
    cli("export", "runs/lm", small, "--depth", 2, "--overwrite")
    assert cli.json("info", small)["blocks"] == 2
    (small / "checkpoints").mkdir()
    assert "never replaced" in cli("export", "runs/lm", small, "--depth", 1, "--overwrite", code=2)


# ---------------------------------------------------------------------------------------------------------------- info


def test_info_tells_sizes_files_and_the_tree(cli, model, lm):
    told = cli.json("info", "runs/lm")
    assert told["parameters"] == sum(p.numel() for p in model.parameters()) and told["dyadic_paths"] == 25
    assert told["files"]["model.safetensors"] == (lm / "model.safetensors").stat().st_size
    assert told["config"] == json.loads(json.dumps(model.config.to_dict()))
    assert told["trained_paths"].startswith("every dyadic")
    assert told["depths"][2] == {"depth": 3, "path": [1, 2, 4], "parameters": model.n_parameters((1, 2, 4)), "trained": True}
    shown = cli("info", "runs/lm")
    assert "every dyadic path" in shown and "0---1---2-------4---------------8" in shown and "* not trained" not in shown


def test_the_tree_in_plain_characters():
    tree = DyadicTree(2)
    assert draw_levels(tree).splitlines() == ["level 0              2", "level 1          1       3"]
    assert draw_paths(tree, [("depth 2", (1, 2))]) == "depth 2      0---1---2-------4\n"
    wide = DyadicTree(6)
    assert draw_levels(wide) == "" and draw_paths(wide, [("depth 1", (32,))]) == "depth 1  0-32-64\n"


def test_the_newest_run_is_named(cli, lm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "there is no finished run" in cli("info", "latest", code=2)


# --------------------------------------------------------------------------------------------------------------- train


def test_train_is_the_training_run(cli, monkeypatch):
    settings = cli("train", "--preset", "debug", "--lr", "0.01", "--dry-run")
    assert settings.startswith("# preset debug") and "\nlr: 0.01\n" in settings
    shown = cli("train", "--help")
    assert shown.startswith("usage: hbll-seq train [--preset NAME]") and "--max-steps" in shown
    assert "did you mean --lr?" in cli("train", "--learning-rate", "0.1", code=2)
    monkeypatch.setattr("hbll_seq.training.language_model.main", lambda argv: 143)
    assert cli("train", code=143) == ""  # stopped by a signal and saved


# ---------------------------------------------------------------------------------------------------------------- push


def test_push_uploads_and_tells_the_address(cli, monkeypatch):
    calls = []
    monkeypatch.setattr(HBLLForCausalLM, "push_to_hub", lambda *a, **options: calls.append((a[1:], options)) or "https://x/y")
    assert cli("push", "runs/lm", "me/m", "--private", "--license", "mit", "--language", "en") == "https://x/y\n"
    assert calls == [(("me/m",), {"private": True, "revision": None, "create_pr": False, "commit_message": "Upload model",
                                  "license": "mit", "language": ["en"]})]  # fmt: skip


def test_a_hub_that_refuses_is_a_failure(cli, monkeypatch):
    from huggingface_hub import HfApi

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    assert "the Hub did not take 'me/m': no network" in cli("push", "runs/lm", "me/m", code=1)
    assert "repo_id='a/b/c'" in cli("push", "runs/lm", "a/b/c", code=2)
