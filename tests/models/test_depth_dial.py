"""Depth as a dial: words, the stored table, the measured one, and a path as a model of its own."""

import json
import math
import os
import warnings
from dataclasses import replace

import kill_and_resume as kr
import numpy as np
import pytest
import torch
from helpers.language_models import TOKENIZER, model_of

from hbll_seq.data.tokens import TokenStream
from hbll_seq.data.windows import TokenWindows
from hbll_seq.evaluation.perplexity import default_paths, evaluate_paths
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.models.generate import generate
from hbll_seq.models.model_files import PATHS_NAME
from hbll_seq.models.path_table import PathTable
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.local import LocalObjective

GREEDY = dict(temperature=0, max_new_tokens=5)


def row(path, perplexity, **more):
    return {"path": path, "depth": len(path), "loss": math.log(perplexity), "perplexity": perplexity, **more}


ROWS = {
    "validation": [row([4], 104.0), row([4, 6], 103.9), row([4, 6, 7], 100.0), row(list(range(1, 8)), 99.0)],
    "test": [row([4], 90.0, name="depth 1", tokens=50, word_perplexity=300.0), row([4, 6, 7], 80.0)],
}


@pytest.fixture(scope="module")
def model():
    return model_of(TOKENIZER, trained_paths="default")


@pytest.fixture(scope="module")
def small_windows():
    return TokenWindows(TokenStream.from_text("The history of the city .\n" * 40, TOKENIZER), 12)


@pytest.fixture
def stored(model, tmp_path):
    """A folder with a table."""
    model.save_pretrained(tmp_path / "model", perplexity=ROWS)
    return tmp_path / "model"


def load(folder):
    return HBLLForCausalLM.from_pretrained(folder)


def with_table(splits, trained="default", **changes):
    model = model_of(TOKENIZER, trained_paths=trained, **changes)
    model.path_table = PathTable.of(splits, model.tree, model.n_parameters)
    return model


# ------------------------------------------------------------------------------------------------------------- words


def test_best_and_fast_are_chosen_by_what_is_stored(stored):
    model = load(stored)
    assert model.resolve_path("best") == tuple(range(1, 8))
    assert model.resolve_path("fast") == (4, 6)  # 103.9 is within 5% of 99; 104 is not
    for words, depth in (("best", 7), ("fast", 2)):
        expected = model.generate("The city", depth, **GREEDY)
        assert model.generate("The city", words, **GREEDY) == generate("The city", words, stored, **GREEDY) == expected
    assert model.generate(["A", "B"], ["best", "fast"], **GREEDY) == model.generate(["A", "B"], [7, 2], **GREEDY)


def test_of_equal_paths_the_shortest_and_of_untrained_ones_none():
    assert with_table([row([4, 6], 9.0), row([4], 9.0), row([4, 6, 7], 9.5)]).resolve_path("best") == (4,)
    model = with_table([row([4], 9.0), row([4, 6], 9.4), row([4, 6, 7], 12.0)], [[4, 6], [4, 6, 7]])
    assert model.resolve_path("best") == model.resolve_path("fast") == (4, 6)
    model = with_table([row([4], 9.0)], [[4, 6], [4, 6, 7]])
    assert model.resolve_path("fast") == (4, 6)
    with pytest.raises(ValueError, match="best"):
        model.resolve_path("best")


def test_without_a_table():
    for trained, expected in ((None, (4,)), ("all", (4,)), ("default", (4,)), ([[4, 6, 7], [2, 4]], (2, 4))):
        model = model_of(TOKENIZER, trained_paths=trained)
        assert model.resolve_path(depth="fast") == expected
        with pytest.raises(ValueError, match="depth='best': no validation perplexity is stored.*perplexity=evaluate_paths"):
            model.generate("A", "best")
    model = with_table({"test": [row([4, 6], 9.0)]})  # depths are not chosen by the test split
    with pytest.raises(ValueError, match="depth='best'"):
        model.resolve_path("best")
    with pytest.raises(ValueError, match="depth='bets': .* from 1 to 7, 'best' or 'fast'.*a list.*leave it out for all"):
        model.resolve_path("bets")
    with pytest.raises(ValueError, match="both given"):
        model.resolve_path("fast", [4])


# -------------------------------------------------------------------------------------------------------- the stored table


def test_the_table_is_saved_and_loaded(model, stored):
    again = load(stored)
    assert again.path_table == PathTable.of(ROWS, model.tree, model.n_parameters)
    assert again.path_table.perplexities()[4, 6] == 103.9
    assert again.path_table.perplexities("test") == {(4,): 90, (4, 6, 7): 80}
    values = json.loads((stored / PATHS_NAME).read_text())
    assert values["test"][0]["n_parameters"] == model.n_parameters((4,))
    assert "paths.json" in (stored / "SHA256SUMS").read_text()
    assert "Of the validation split:" in (stored / "README.md").read_text()


def test_rows_of_evaluate_paths_are_such_rows(model, small_windows, tmp_path):
    rows = evaluate_paths(model, small_windows, max_batches=1, batch_size=2)
    model.save_pretrained(tmp_path, perplexity=rows)  # those of the validation split
    assert load(tmp_path).path_table.perplexities() == {tuple(r["path"]): r["perplexity"] for r in rows}
    odd = [{**rows[0], "perplexity": math.inf}, {**rows[1], "loss": math.nan}, {**rows[2], "tokens": np.int64(3)}]
    model.save_pretrained(tmp_path, perplexity={"test": odd})
    assert load(tmp_path).path_table.perplexities("test") == {(4,): math.inf, (4, 6, 7): rows[2]["perplexity"]}


def test_it_is_kept_as_long_as_the_weights_are(stored, tmp_path):
    model = load(stored)
    model.save_pretrained(tmp_path / "again", data="more is known now")
    assert (tmp_path / "again" / PATHS_NAME).read_bytes() == (stored / PATHS_NAME).read_bytes()
    assert "Of the validation split:" in (tmp_path / "again" / "README.md").read_text()
    model.save_pretrained(tmp_path / "new", perplexity=[row([4], 5.0)])
    assert load(tmp_path / "new").path_table.perplexities() == {(4,): 5.0}
    with torch.no_grad():
        model.embed.weight[0, 0] += 1
    model.save_pretrained(stored)
    assert not (stored / PATHS_NAME).exists() and load(stored).path_table is None


@pytest.mark.parametrize("text, message", [
    ("", "paths.json"), ("{}", "an object of the splits validation and test"), ("[]", "an object of the splits"),
    ('{"train": []}', "split 'train': allowed are"),
    ('{"test": []}', "must be a list of rows"), ('{"test": [3]}', "list of rows"),
    ('{"test": [{"path": [4]}]}', "lacks depth"), ('{"test": [{"path": [4], "a": 1}]}', "unknown key 'a'"),
    (dict(path=[4, 7]), "4 -> 7"), (dict(path="4"), "path="), (dict(depth=2), "depth=2 of path.*must be 1"),
    (dict(depth=True), "depth=True"), (dict(loss=None), "loss=None: must be a number of at least 0"),
    (dict(loss=-1), "loss=-1"), (dict(perplexity=0.5), "perplexity=0.5: must be a number of at least 1, or null"),
    (dict(perplexity="9"), "perplexity='9'"), (dict(n_parameters=0), "n_parameters=0: must be a whole number above 0"),
    (dict(tokens=1.5), "tokens=1.5"), (dict(name=3), "name=3"), (dict(name="x" * 2000), "at most 1000 characters"),
], ids=str)  # fmt: skip
def test_another_file_is_refused(stored, text, message):
    (stored / "SHA256SUMS").unlink()
    if isinstance(text, dict):
        text = json.dumps({"validation": [{**row([4], 9.0), "n_parameters": 5, **text}]})
    (stored / PATHS_NAME).write_text(text)
    with pytest.raises(ValueError, match=f"(?s)paths.json.*{message}|{message}") as caught:
        load(stored)
    assert "paths.json" in str(caught.value) and len(str(caught.value)) <= 500


def test_a_path_twice_and_another_sum_are_refused(stored):
    text = (stored / PATHS_NAME).read_text()
    (stored / PATHS_NAME).write_text(text.replace("104.0", "90.0"))
    with pytest.raises(ValueError, match="paths.json is not the file that SHA256SUMS lists"):
        load(stored)
    (stored / "SHA256SUMS").unlink()
    one = json.dumps({**row([4], 9.0), "n_parameters": 5})
    (stored / PATHS_NAME).write_text(f'{{"test": [{one}, {one}]}}')
    with pytest.raises(ValueError, match=r"path=\[4\] is there twice"):
        load(stored)


@pytest.mark.parametrize("perplexity, message", [
    ({"valid": []}, "split 'valid'"), ({"test": [{"path": [4]}]}, "a row lacks loss"),
    ({"test": [row([4, 7], 3.0)]}, "4 -> 7"),
    ({"test": [row([4], 3.0, depth=2)]}, "depth=2"), ({"test": [row([4], 3.0)] * 2}, "twice"),
    ({"test": [row([4], 3.0, loss="low")]}, "loss='low'"), ({"test": []}, "must be a list of rows"),
], ids=str)  # fmt: skip
def test_what_is_no_table_is_not_saved(model, tmp_path, perplexity, message):
    with pytest.raises(ValueError, match=f"perplexity.*{message}.*Nothing was written"):
        model.save_pretrained(tmp_path / "x", perplexity=perplexity)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ the measured table


def test_the_table_of_paths(stored):
    model = load(stored)
    table = model.paths(n_tokens=2)
    assert [r.path for r in table] == list(default_paths(model).values()) and len(table) == 7
    assert [(r.validation, r.test) for r in table][:3] == [(104.0, 90.0), (103.9, None), (100.0, 80.0)]
    assert all(r.n_parameters == model.n_parameters(r.path) and r.ms_per_token > 0 and r.trained for r in table)
    lines = str(table).splitlines()
    assert lines[0].split() == ["depth", "validation", "test", "parameters", "ms/token", "path"] and len(lines) == 8
    assert lines[1].split()[:3] == ["1", "104.00", "90.00"] and lines[3].endswith("0-4-6-7-head")
    assert table[0].depth == 1 and json.loads(json.dumps(table.to_dicts()))[1]["path"] == [4, 6]


def test_columns_that_nothing_is_known_of_are_left_out():
    table = model_of(TOKENIZER, trained_paths=[[2, 4]]).paths(measure=False)
    assert [r.path for r in table][1:3] == [(2, 4), (4, 6)] and [r.trained for r in table].count(True) == 1
    assert str(table).splitlines()[0].split() == ["depth", "parameters", "path"]
    assert str(table).splitlines()[1].endswith("0-4-head (not trained)")


@pytest.mark.parametrize("options, message", [
    (dict(n_tokens=0), "n_tokens=0: must be a whole number of at least 1"), (dict(measure="no"), "measure='no'"),
])  # fmt: skip
def test_what_is_measured_is_checked(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.paths(**options)


# ------------------------------------------------------------------------------------------------------ a path of its own

VARIANTS = [dict(), dict(exit_rank=2), dict(exit_rank=2, exit_by="depth", default_paths="prefix"), dict(tie_embeddings=False),
            dict(cell=["gru", "transformer", "mingru", "transformer", "gru", "gru", "transformer"])]  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("path", [(4,), (4, 6, 7), (1, 2, 3, 4), (2, 4, 5, 6, 7)], ids=str)
@torch.no_grad()
def test_an_exported_path_gives_the_same_logits(path, changes, tmp_path):
    model, state = model_of(TOKENIZER, **changes), torch.get_rng_state()
    model.export_path(list(path), tmp_path / "alone")
    assert torch.equal(torch.get_rng_state(), state)  # writing a file changes no draw that comes later
    alone, ids = load(tmp_path / "alone"), torch.tensor([TOKENIZER.encode("The history of the city")])
    expected = model(ids, path=path).logits
    assert (alone(ids).logits - expected).abs().max() < 1e-6
    assert alone.resolve_path() == alone.resolve_path(len(path)) == path == alone.config.full_path
    assert alone.generate("The city", **GREEDY) == model.generate("The city", path=path, **GREEDY)
    assert sum(p.numel() for p in alone.parameters()) < sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "whole")
    sizes = [os.path.getsize(tmp_path / name / "model.safetensors") for name in ("alone", "whole")]
    per_block = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    assert sizes[1] - sizes[0] >= 4 * sum(n for k, n in enumerate(per_block, start=1) if k not in path)
    alone.save_pretrained(tmp_path / "again")  # it is a model like any other
    assert (load(tmp_path / "again")(ids).logits - expected).abs().max() < 1e-6
    assert (model(ids, path=path).logits == expected).all()


def test_depths_of_an_exported_path(tmp_path):
    model = with_table(ROWS)
    for name in (3, "fast", np.int64(3), [4, 6, 7]):
        model.export_path(name, tmp_path / "alone", overwrite=True, license="mit")
    alone = load(tmp_path / "alone")
    assert alone.config == replace(model.config, blocks=(4, 6, 7))
    assert alone.resolve_path(1) == (4,) and alone.generate("A", 2, **GREEDY) == model.generate("A", 2, **GREEDY)
    assert alone.path_table.perplexities() == {(4,): 104.0, (4, 6): 103.9, (4, 6, 7): 100.0}
    assert alone.resolve_path("best") == (4, 6, 7) and alone.resolve_path("fast") == (4,)
    assert [r.path for r in alone.paths(measure=False)] == list(default_paths(alone).values()) == [(4,), (4, 6), (4, 6, 7)]
    assert "license: mit" in (tmp_path / "alone" / "README.md").read_text()
    for options, message in (
        (dict(depth=5), r"depth=5.*the path \[4, 6, 7\] alone.*depths \[1, 2, 3\]"), (dict(depth=0), "depth=0"),
        (dict(depth=3.0), "depth=3.0"), (dict(path=[2, 4]), r"path=\[2, 4\].*\[4, 6, 7\] alone"),
    ):
        with pytest.raises(ValueError, match=message):
            alone.generate("A", **options)
        with pytest.raises(ValueError, match=message):
            alone.export_path(next(iter(options.values())), tmp_path / "x")
    with pytest.raises(ValueError, match="block 1 is not in this model"):
        alone.blocks[0](torch.zeros(1, 1, 16))


def test_what_was_trained_of_an_exported_path(tmp_path):
    model = model_of(TOKENIZER, trained_paths=[[4], [4, 6], [1, 2, 3, 4, 5, 6, 7]])
    model.export_path(3, tmp_path / "three")
    assert load(tmp_path / "three").config.trained_paths == ((4,), (4, 6))
    model.export_path([2, 4], tmp_path / "two")
    assert not load(tmp_path / "two").config.is_trained((2, 4))


@pytest.mark.parametrize("blocks", [[], [4, 7], "4", 4, [9], [[4]], {4}], ids=str)
def test_blocks_of_no_path_are_refused(blocks):
    with pytest.raises(ValueError, match="blocks: path=.*or null for all"):
        HBLLConfig(blocks=blocks)


def test_a_lost_block_is_told(tmp_path):
    """A config of fewer blocks than the weights, or of more, does not load."""
    model = model_of(TOKENIZER)
    model.export_path(3, tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    for blocks in (None, [4, 6], [2, 4, 6, 7]):
        config.write_text(json.dumps({**values, "blocks": blocks}))
        with pytest.raises(ValueError, match="blocks."):
            load(tmp_path)


def test_an_exported_path_can_be_trained_on(tmp_path):
    model = model_of(TOKENIZER)
    model.export_path(3, tmp_path)
    alone, ids = load(tmp_path).train(), torch.tensor([TOKENIZER.encode("The history")])
    BackpropObjective(alone)(ids).loss.backward()
    assert all(p.grad is not None for n in (4, 6, 7) for p in alone.blocks[n - 1].parameters())
    LocalObjective(alone, "sweeps")(ids).loss.backward()
    with pytest.raises(ValueError, match="block . is not in this model"):
        LocalObjective(alone)(ids)


# ------------------------------------------------------------------------------------------------- as a run leaves it


def test_a_run_stores_its_table_and_one_without_a_mix_warns(lm_options, tmp_path):
    folder = tmp_path / "run"
    few = ["--max-steps", "1", "--eval-every", "0", "--sample-tokens", "0", "--objective", "sweeps", "--depth-mix", "none"]
    assert kr.load_script().main([*lm_options, *few, "--output-dir", str(folder)]) == 0
    model = load(folder)
    full, metrics = model.resolve_path(), json.loads((folder / "metrics.json").read_text())
    assert model.path_table.perplexities("test") == {full: metrics["test"][0]["perplexity"]}
    assert model.resolve_path("best") == model.resolve_path("fast") == full
    with pytest.warns(UserWarning, match="depth 1 .*was not trained"):
        generate("The", depth=1, model=folder, **GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for depth in (None, "best", "fast", len(full)):
            generate("The", depth=depth, model=folder, **GREEDY)
