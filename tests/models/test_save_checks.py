"""A save never replaces what is another's: a run's folder, or by an export any model."""

import pytest
from helpers.language_models import TOKENIZER, model_of

from hbll_seq import HBLLForCausalLM


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
