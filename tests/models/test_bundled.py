"""The model in the package: it loads strictly, it is the one that its card describes, and it answers without a name."""

import json
from importlib import resources
from pathlib import Path

import pytest
import torch

import hbll_seq
from hbll_seq import HBLLForCausalLM, TokenWindows, evaluate_paths, load_tokens

FOLDER = Path(str(resources.files("hbll_seq") / "assets" / "bundled"))
EXPECTED = json.loads((Path(__file__).parent / "bundled_expected.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def model():
    return HBLLForCausalLM.from_pretrained("bundled")


def test_it_is_the_model_that_was_bundled(model):
    windows = TokenWindows(load_tokens("bundled", "test", model.tokenizer), model.config.context_length)
    rows = evaluate_paths(model, windows, batch_size=4, max_batches=1)
    assert {str(row["depth"]) for row in rows} == set(EXPECTED["losses"])
    for row in rows:
        assert row["loss"] == pytest.approx(EXPECTED["losses"][str(row["depth"])], abs=1e-4)
    for depth, text in EXPECTED["text"].items():
        assert model.generate("The history of the city", depth=int(depth), temperature=0, max_new_tokens=12) == text


def test_what_would_be_written_today_is_what_is_there(tmp_path):
    HBLLForCausalLM.from_pretrained("bundled", dtype="bfloat16").save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in FOLDER.iterdir()}
    for name in ("config.json", "model.safetensors", "tokenizer.model", "paths.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_it_is_small_and_every_depth_pays(model):
    assert (FOLDER / "model.safetensors").stat().st_size <= 4_200_000
    card = (FOLDER / "README.md").read_text("utf-8")
    assert "python train/lm.py --preset bundled" in card
    for split in ("validation", "test"):
        perplexities = list(model.path_table.perplexities(split).values())
        assert len(perplexities) == 7 and perplexities == sorted(perplexities, reverse=True)
        assert perplexities[-1] <= 70
    assert model.resolve_path("best") == (1, 2, 3, 4, 5, 6, 7)


def test_without_a_model_it_answers_and_says_so(capsys, model):
    options = dict(depth=3, max_new_tokens=8, seed=0)
    text = hbll_seq.generate("The history of", **options)
    assert "bundled model" in capsys.readouterr().err
    assert text == hbll_seq.generate("The history of", model="bundled", **options)
    assert capsys.readouterr().err == ""
    assert text == model.generate("The history of", **options) and text.startswith("The history of")


def test_stored_in_half_precision_and_run_in_single():
    for dtype, expected in ((None, torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = HBLLForCausalLM.from_pretrained("bundled", **({"dtype": dtype} if dtype else {}))
        assert {p.dtype for p in model.parameters()} == {expected}
    assert json.loads((FOLDER / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"


def test_a_folder_of_that_name_is_not_guessed_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bundled").mkdir()
    with pytest.raises(ValueError, match=r"\./bundled"):
        hbll_seq.generate("a", model="bundled")
    with pytest.raises(ValueError, match="no config.json"):
        hbll_seq.generate("a", model="./bundled")
    assert hbll_seq.generate("a", max_new_tokens=1)  # nobody has named one
    with pytest.raises(ValueError, match="leave it out"):
        HBLLForCausalLM.from_pretrained("bundled", revision="main")


def test_a_model_object_of_another_kind_is_named():
    with pytest.raises(ValueError, match="model=Linear object"):
        hbll_seq.generate("The city", model=torch.nn.Linear(1, 1))
