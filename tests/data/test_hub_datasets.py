"""Datasets of the Hub: without network the answer is quick, and the cache is still asked."""

import datasets
import pytest
from huggingface_hub import constants

from hbll_seq.data import hub_datasets
from hbll_seq.data.hub_datasets import hub_answers, load_hub_dataset
from hbll_seq.data.mnist import load_mnist
from hbll_seq.data.sources import open_corpus


@pytest.fixture
def asked(monkeypatch):
    """Whether ``datasets`` was offline at each call; no call is answered, and nothing is tried again."""
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options, datasets.config.HF_HUB_OFFLINE))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch, asked, answers):
    monkeypatch.setattr(hub_datasets, "hub_answers", lambda: answers)
    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(ConnectionError):
        load_hub_dataset("me/data", "small", split="test")
    assert asked == [(("me/data", "small"), dict(split="test"), before or not answers)]
    assert datasets.config.HF_HUB_OFFLINE == before


def test_nobody_answers_at_a_closed_port(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not hub_answers()


def test_what_is_not_found_is_named(monkeypatch, asked):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="MNIST could not be had from 'no folder', which is no folder here.*four idx files"):
        load_mnist("no folder")
    with pytest.raises(ValueError, match="'me/data' is no file or folder here, and loading it from the .* Hub failed"):
        open_corpus("me/data", "train")
    assert [offline for *_, offline in asked] == [True, True]
