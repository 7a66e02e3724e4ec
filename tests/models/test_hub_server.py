"""push_to_hub and from_pretrained by id, through huggingface_hub itself, against a stand-in of the Hub on this machine."""

import json

import pytest
import torch
from helpers.hub_server import TOKEN, standing_in
from helpers.language_models import TOKENIZER, model_of
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from hbll_seq.models import hub
from hbll_seq.models.causal_lm import HBLLForCausalLM


@pytest.fixture
def server(monkeypatch, tmp_path):
    with standing_in() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        disable_progress_bars()
        yield server
        enable_progress_bars()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_there_and_back(server):
    model, other = model_of(TOKENIZER), model_of(TOKENIZER, seed=1)
    address = model.push_to_hub("me/small", token=TOKEN, data="some text")
    repository = server.repositories["me/small"]
    assert address == f"{server.endpoint}/me/small/commit/{repository.branches['main']}" and not repository.private
    loaded = HBLLForCausalLM.from_pretrained("me/small")
    assert same(loaded, model) and loaded.config == model.config
    assert loaded.tokenizer.fingerprint == TOKENIZER.fingerprint
    first = repository.branches["main"]
    other.push_to_hub("me/small", token=TOKEN)  # one more commit
    assert same(HBLLForCausalLM.from_pretrained("me/small"), other)
    assert same(HBLLForCausalLM.from_pretrained("me/small", revision=first), model)
    assert len(repository.commits) == 3


def test_what_is_pushed(server):
    model_of(TOKENIZER).push_to_hub("me/small", token=TOKEN, data="some text")
    _, files = server.repositories["me/small"].files("main")
    assert set(files) == {*hub.FILES, hub.POINTER_NAME}
    card = files["README.md"].decode()
    assert 'HBLLForCausalLM.from_pretrained("me/small")' in card and "Data: some text" in card
    assert 'AutoModelForCausalLM.from_pretrained("me/small", depth=3)' in card
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForCausalLM"].startswith("modeling_hbll.")


def test_from_the_cache_once_the_hub_is_gone(server, monkeypatch):
    model = model_of(TOKENIZER)
    model.push_to_hub("me/small", token=TOKEN)
    HBLLForCausalLM.from_pretrained("me/small")
    asked = len(server.asked)
    assert same(HBLLForCausalLM.from_pretrained("me/small", local_files_only=True), model)
    assert len(server.asked) == asked
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert same(HBLLForCausalLM.from_pretrained("me/small"), model)


def test_private_repositories_and_other_branches(server):
    model, other = model_of(TOKENIZER), model_of(TOKENIZER, seed=1)
    model.push_to_hub("me/secret", token=TOKEN, private=True)
    assert server.repositories["me/secret"].private
    with pytest.raises(ValueError, match="no such model could be read from the Hub"):
        HBLLForCausalLM.from_pretrained("me/secret", token=False)
    repository = server.repositories["me/secret"]
    repository.branches["dev"] = repository.branches["main"]
    other.push_to_hub("me/secret", token=TOKEN, revision="dev")
    assert same(HBLLForCausalLM.from_pretrained("me/secret", token=TOKEN), model)
    assert same(HBLLForCausalLM.from_pretrained("me/secret", token=TOKEN, revision="dev"), other)


def test_a_subfolder_is_all_that_is_fetched(server):
    model = model_of(TOKENIZER)
    model.push_to_hub("me/small", token=TOKEN)
    repository = server.repositories["me/small"]
    _, files = repository.files("main")
    repository.commit("main", {**{f"runs/last/{name}": data for name, data in files.items()}, "config.json": b"{}"})
    asked = len(server.asked)
    assert same(HBLLForCausalLM.from_pretrained("me/small", subfolder="runs/last"), model)
    fetched = {path.partition("/resolve/")[2].split("/", 1)[1] for _, path in server.asked[asked:] if "/resolve/" in path}
    assert fetched == {f"runs/last/{name}" for name in hub.FILES}
    with pytest.raises(ValueError, match="'me/small' has no folder 'first'"):
        HBLLForCausalLM.from_pretrained("me/small", subfolder="first")


def test_refusals_are_explained(server):
    with pytest.raises(ValueError, match="the Hub did not take 'me/small'.*hf auth login"):
        model_of(TOKENIZER).push_to_hub("me/small", token="hf_wrong")
    assert not server.repositories
    with pytest.raises(ValueError, match="no folder 'me/nothing' here, and no such model could be read from the Hub"):
        HBLLForCausalLM.from_pretrained("me/nothing")
    model_of(TOKENIZER).push_to_hub("me/small", token=TOKEN)
    with pytest.raises(ValueError, match="no such model could be read from the Hub .RevisionNotFound"):
        HBLLForCausalLM.from_pretrained("me/small", revision="v2")
    repository = server.repositories["me/small"]
    _, files = repository.files("main")
    repository.commit("main", {**files, "model.safetensors": files["model.safetensors"][:-1] + b"\xff"})
    with pytest.raises(ValueError, match="model.safetensors is not the file that SHA256SUMS lists"):
        HBLLForCausalLM.from_pretrained("me/small")
