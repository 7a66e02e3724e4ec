"""A save never replaces what is another's: a run's folder, or by an export any model."""

import pytest
import torch
from helpers.language_models import TOKENIZER, model_of

from hbll_seq import HBLLForCausalLM
from hbll_seq.models.hub import FILES


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_replaces_a_model_only_where_that_is_asked_for(tmp_path):
    model, folder = model_of(TOKENIZER), tmp_path / "taken"
    model.save_pretrained(folder)
    before = contents(folder)
    with pytest.raises(ValueError, match="taken' already holds a model.*another folder.*overwrite=True"):
        model.export_path(3, folder)
    with pytest.raises(ValueError, match="overwrite='yes'"):
        model.export_path(3, folder, overwrite="yes")
    assert contents(folder) == before
    model.export_path(3, folder, overwrite=True)
    assert HBLLForCausalLM.from_pretrained(folder).config.blocks == (4, 6, 7)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("other files are in nobody's way")
    model.export_path(3, tmp_path / "notes")


@pytest.mark.parametrize("mark", ["run.json", "checkpoints", "metrics.json"])
def test_an_export_never_replaces_a_run(tmp_path, mark):
    model = model_of(TOKENIZER)
    model.save_pretrained(tmp_path)
    (tmp_path / mark).mkdir() if mark == "checkpoints" else (tmp_path / mark).write_text("{}")
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=f"training run .{mark}.*another folder"):
            model.export_path(3, tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_save_replaces_a_model_but_no_run(tmp_path):
    model_of(seed=0).save_pretrained(tmp_path)
    model_of(seed=1).save_pretrained(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="training run .run.json.*Nothing was written.*another folder"):
        model_of(seed=2).save_pretrained(tmp_path)
    assert contents(tmp_path) == before


KEPT = [("bfloat16", "float32"), ("bfloat16", "float64"), ("float16", "float32"), ("float16", "float64"),
        ("float32", "float64"), ("float32", "float32")]  # fmt: skip
LOST = [("float32", "bfloat16"), ("float64", "float32"), ("bfloat16", "float16"), ("float16", "bfloat16")]


def saved_with_table(folder, dtype):
    model = model_of(TOKENIZER).to(getattr(torch, dtype))
    rows = [{"path": [4], "loss": 2.0, "perplexity": 7.4}]
    model.save_pretrained(folder, perplexity={"validation": rows}, note="of these weights")


@pytest.mark.parametrize("stored, loaded", [*KEPT, *LOST], ids=str)
def test_table_and_card_go_along_where_the_values_are_the_same(tmp_path, stored, loaded):
    saved_with_table(tmp_path / "a", stored)
    HBLLForCausalLM.from_pretrained(tmp_path / "a", dtype=loaded).save_pretrained(tmp_path / "b")
    again = HBLLForCausalLM.from_pretrained(tmp_path / "b")
    assert {p.dtype for p in again.parameters()} == {getattr(torch, loaded)}
    same = (stored, loaded) in KEPT
    assert (again.path_table is not None) == same
    assert ("of these weights" in (tmp_path / "b" / "README.md").read_text()) == same
    assert {path.name for path in (tmp_path / "b").iterdir()} == set(FILES) - (set() if same else {"paths.json"})


def test_they_stay_behind_where_a_value_changed_or_was_rounded_before(tmp_path):
    saved_with_table(tmp_path / "a", "bfloat16")
    model = HBLLForCausalLM.from_pretrained(tmp_path / "a", dtype="float32")
    with torch.no_grad():
        model.head.norm.weight[0] += 1e-6
    model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / "paths.json").exists()
    with torch.no_grad():
        model.head.norm.weight[0] = 0.5  # a bfloat16 too, but another one
    model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / "paths.json").exists()
    saved_with_table(tmp_path / "c", "float32")
    HBLLForCausalLM.from_pretrained(tmp_path / "c", dtype="bfloat16").float().save_pretrained(tmp_path / "d")
    assert not (tmp_path / "d" / "paths.json").exists()


def test_the_bundled_model_takes_its_table_along(tmp_path):
    bundled = HBLLForCausalLM.from_pretrained("bundled")
    bundled.save_pretrained(tmp_path)
    again = HBLLForCausalLM.from_pretrained(tmp_path)
    assert again.path_table == bundled.path_table and again.resolve_path("best") == bundled.resolve_path("best")
    assert again._card == bundled._card or "51.6" in again._card
