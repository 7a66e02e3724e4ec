"""Which depths were trained is written with the model; generating along another one is told, once."""

import dataclasses
import json
import warnings
from collections import Counter

import kill_and_resume as kr
import pytest
import torch
from helpers.language_models import TOKENIZER, model_of, small_lm

from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.models.generate import generate
from hbll_seq.models.hub import CONFIG_NAME
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.depth_mix import MIXES, sub_networks_of_step
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.tree.topology import DyadicTree

GREEDY = dict(temperature=0, max_new_tokens=2)


def trained(paths, **changes):
    return model_of(TOKENIZER, trained_paths=paths, **changes)


def heard(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    assert all(w.category is UserWarning and w.filename == __file__ for w in found)
    return [str(w.message) for w in found]


def test_an_untrained_depth_is_told_once_a_model_and_path():
    model = trained([[1, 2, 3, 4, 5, 6, 7]])
    (message,) = heard(lambda: model.generate("The city", depth=1, **GREEDY))
    assert "depth 1 (path [4])" in message and "trained: 7 blocks [1, 2, 3, 4, 5, 6, 7]" in message and "mix" in message
    assert not heard(lambda: model.generate("The city", depth=1, **GREEDY))
    assert not heard(lambda: model.generate("The city", **GREEDY))
    (message,) = heard(lambda: list(model.stream("The city", path=[4, 6], **GREEDY)))
    assert "path [4, 6]" in message
    other = trained(((1, 2, 3, 4, 5, 6, 7),))
    with pytest.warns(UserWarning, match="depth 1 "):
        generate("The city", 1, other, **GREEDY)


def test_what_was_trained_is_not_told():
    for paths, good, bad in [
        (None, [(4,), (4, 6), (2, 4, 6)], []),
        ("all", [(4,), (4, 6), (2, 4, 6)], []),
        ("default", [(4,), (4, 6), (4, 6, 7)], [(2, 4, 6)]),
        ([[4, 6]], [(4, 6)], [(4,), (4, 6, 7)]),
    ]:
        model = trained(paths)
        for path in good:
            assert not heard(lambda: model.generate("The city", path=path, **GREEDY)), (paths, path)
        for path in bad:
            assert heard(lambda: model.generate("The city", path=path, **GREEDY)), (paths, path)
    model = trained([[4, 6]])
    assert not heard(lambda: model(torch.tensor([[5]]), path=(4,)))


def test_default_paths_are_those_of_the_models_family():
    assert HBLLConfig(trained_paths="default", default_paths="prefix").is_trained((2, 4))
    assert not HBLLConfig(trained_paths="default", default_paths="prefix").is_trained((4, 6))


@pytest.mark.parametrize("paths", ["some", "", [], [[]], [[4, 7]], [4], [["4"]], [[True]], [[4.0]], 3, {}, {"4": 1}, "467",
                                   [[0]], [[4, 6]] * 3 + [None]], ids=str)  # fmt: skip
def test_what_names_no_paths_is_refused(paths):
    with pytest.raises(ValueError, match="trained_paths") as caught:
        HBLLConfig(trained_paths=paths)
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize("paths", [None, "all", "default", [[4], [4, 6, 7]]], ids=str)
def test_it_is_saved_loaded_and_on_the_card(paths, tmp_path):
    model = trained(paths)
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / CONFIG_NAME).read_text())["trained_paths"] == paths
    loaded = HBLLForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config and hash(loaded.config) == hash(model.config)
    card = (tmp_path / "model" / "README.md").read_text()
    words = {"all": "every dyadic path, 1 to 7 blocks", "default": "the default path of every depth, 1 to 7 blocks"}
    if paths is None:
        assert "Trained paths" not in card
    else:
        assert f"Trained paths: {words.get(str(paths), '1 blocks [4], 3 blocks [4, 6, 7]')}." in card


def test_older_folders_lack_it_and_load(tmp_path):
    model_of(TOKENIZER).save_pretrained(tmp_path)
    path = tmp_path / CONFIG_NAME
    values = json.loads(path.read_text())
    del values["trained_paths"]
    path.write_text(json.dumps(values))
    (tmp_path / "SHA256SUMS").unlink(missing_ok=True)
    assert HBLLForCausalLM.from_pretrained(tmp_path).config.trained_paths is None


@pytest.mark.parametrize("family", ["spine", "prefix"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_trains_what_it_says(mix, family):
    """Against the sub-networks of many steps: every exit is named, and nothing else is."""
    tree = DyadicTree(3, family)
    full = tree.path_for_depth(7)
    read = Counter(
        network.path[: network.path.index(n) + 1]
        for seed in range(400 if mix != "random" else 4000)
        for network in sub_networks_of_step(mix, 1.0, tree, full, seed)
        for n in network.exits
    )
    model = small_lm(default_paths=family)
    config = dataclasses.replace(model.config, trained_paths=BackpropObjective(model, depths=mix).trained_paths())
    assert {path for path in tree.paths() if config.is_trained(path)} == set(read)


def test_a_path_alone_and_the_tree():
    model = small_lm()
    assert BackpropObjective(model, path=(4, 6)).trained_paths() == ((4, 6),)
    assert LocalObjective(model, "sweeps").trained_paths() == (tuple(range(1, 8)),)
    assert LocalObjective(model).trained_paths() == "all"
    assert model.config.trained_paths is None  # the objective leaves the model alone


@pytest.mark.parametrize("options, expected", [
    (["--objective", "tree"], "all"),
    (["--objective", "backprop", "--path", "2"], [[2]]),
    (["--objective", "sweeps", "--depth-mix", "octaves"], "default"),
], ids=str)  # fmt: skip
def test_a_run_writes_what_it_trained(options, expected, lm_options, tmp_path):
    folder = tmp_path / "run"
    few = ["--max-steps", "1", "--eval-every", "0", "--sample-tokens", "2"]
    assert kr.load_script().main([*lm_options, *few, *options, "--output-dir", str(folder)]) == 0
    assert json.loads((folder / CONFIG_NAME).read_text())["trained_paths"] == expected
