"""Odd values at the door of a model: config.json, headers of weights, arguments, metadata. ValueErrors of one short line."""

import json
import resource
import struct

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from hbll_seq import (
    BackpropObjective,
    DepthHierarchy,
    HBLLClassifierConfig,
    HBLLConfig,
    HBLLForCausalLM,
    HBLLForSequenceClassification,
    LocalObjective,
    RecurrentLM,
    RecurrentModel,
    Sweeps,
    make_cell,
)
from hbll_seq.models.config import BOUNDS
from hbll_seq.models.model_files import CARD_NAME, CONFIG_NAME, SUMS_NAME, WEIGHTS_NAME
from hbll_seq.models.sequence_classification import MAX_SIZE
from hbll_seq.tree.topology import DyadicTree

#: a device that this machine lacks
ABSENT = "xpu" if torch.cuda.is_available() else "cuda"


def model_of(**changes):
    values = dict(vocab_size=40, n_level=2, n_embd=8, n_head=2, context_length=8)
    return HBLLForCausalLM(HBLLConfig(**{**values, **changes})).eval()


def classifier():
    return HBLLForSequenceClassification(HBLLClassifierConfig(n_inputs=6, n_steps=3, n_classes=2, hidden_size=3))


@pytest.fixture(scope="module", params=["language model", "classifier"])
def folder(request, tmp_path_factory):
    """A folder without sums, the class of its model, and its config."""
    model = model_of() if request.param == "language model" else classifier()
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    (path / SUMS_NAME).unlink()
    return path, type(model), json.loads((path / CONFIG_NAME).read_text())


def refused(folder, cls, text):
    """The message that loading ends with; None where the text is no other model's."""
    (folder / CONFIG_NAME).write_text(text)
    try:
        cls.from_pretrained(folder)
    except ValueError as error:
        message = str(error)
        assert len(message) <= 500 and "\n" not in message, message
        return message


ODD = ["[]", "{}", "true", "false", "null", '"3"', '""', "1e400", "-1e400", "NaN", "Infinity", "-1", "0", "1", "3", "0.5",
       "1e300", "16000000", "60000000", "1000000000", str(2**31), str(2**63), str(2**64), "1" + "0" * 400, "1" * 5000,
       "[" * 2000 + "]" * 2000,
       '"' + "x" * 10**5 + '"', '["gru", 3]', "[null, null, null]", '{"a": {"a": {}}}', json.dumps(["gru"] * 10**5),
       '"\\u0000"', '"\\ud800"', json.dumps(["transformer"] * 3)]  # fmt: skip


def test_every_key_with_every_odd_value_is_refused_or_loads(folder):
    """Without taking memory for it: this process grows by less than 200 MB."""
    path, cls, config = folder
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    known = set(cls.config_class.__dataclass_fields__)
    refusals = 0
    for key in config:
        for value in ODD:
            text = json.dumps({**config, key: "VALUE"}).replace('"VALUE"', value)
            message = refused(path, cls, text)
            refusals += message is not None
            if value in ("[]", "{}", "NaN", "1e400", '"3"') and key in known:
                assert message is not None and CONFIG_NAME in message, (key, value)
    assert refusals > 20 * len(known)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    twice = json.dumps(config)[:-1] + ', "cell": "gru"}'
    for text in ("[" * 100_000, '{"a":' * 50_000, "", "null", "3", '"x"', twice, "\ufeff{}",
                 json.dumps({f"k{i}": i for i in range(10**4)}), json.dumps({"k" * 10**5: 1}), " " * (1 << 21)):
        assert refused(path, cls, text)
    assert refused(path, cls, json.dumps(config)) is None


@pytest.mark.parametrize("value", [np.array([[1, 2]]), np.array(["jump", "depth"]), torch.tensor([1, 2]), ["jump"], 1, None])
def test_choices_are_words(value):
    """An array compares with a word to an array, which has no truth value."""
    for name in ("norm", "default_paths", "exit_by", "cell"):
        with pytest.raises(ValueError, match=f"{name}=.* ?allowed are "):
            HBLLConfig(**{name: value})
    model = model_of()
    makers = {"cell": lambda v: HBLLClassifierConfig(cell=v), "inference": lambda v: LocalObjective(model, v),
              "family": lambda v: DyadicTree(2, v)}
    if value is not None:  # which stands for a default here
        makers |= {"linearization": lambda v: Sweeps(linearization=v), "init": lambda v: Sweeps(init=v),
                   "depths": lambda v: LocalObjective(model, "sweeps", depths=v),
                   "time": lambda v: LocalObjective(model, time=v)}
    for name, make in makers.items():
        with pytest.raises(ValueError, match=f"{name}=.*allowed are "):
            make(value)


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_of_the_language_model(name):
    with pytest.raises(ValueError, match=f"{name}=.*at most {BOUNDS[name]}"):
        HBLLConfig(**{name: BOUNDS[name] + 1})
    for value in (10**5000, True, 1.0, "8", None, [], float("nan")):
        with pytest.raises(ValueError, match=name) as caught:
            HBLLConfig(**{name: value})
        assert len(str(caught.value)) <= 500


@pytest.mark.parametrize("name", ["n_inputs", "n_steps", "n_classes", "hidden_size", "permutation_seed"])
def test_bounds_of_the_classifier(name):
    for value in (10**12, 10**5000) if name != "permutation_seed" else (10**5000, 2**64):
        with pytest.raises(ValueError, match=f"{name}=.*must be a whole number") as caught:
            HBLLClassifierConfig(**{name: value})
        assert len(str(caught.value)) <= 500
    assert HBLLClassifierConfig(n_inputs=MAX_SIZE).n_inputs == MAX_SIZE


@pytest.mark.parametrize("changes", [
    dict(sigma=1e7), dict(sigma=10**400), dict(rope_base=1e300), dict(rope_base=float("inf")), dict(dropout=float("nan")),
    dict(cell=["gru"] * 10**6), dict(cell=7), dict(cell=(["gru"],)), dict(norm=[]), dict(exit_by={}),
    dict(tie_embeddings="x" * 1000), dict(n_head=3),
], ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_odd_values_of_a_config(changes):
    with pytest.raises(ValueError, match=next(iter(changes))) as caught:
        HBLLConfig(**changes)
    assert len(str(caught.value)) <= 500


def test_from_dict_takes_dictionaries():
    for values in ([], None, "x", 3):
        with pytest.raises(ValueError, match="must be a dictionary"):
            HBLLConfig.from_dict(values)
    with pytest.raises(ValueError, match="unknown config key 7"):
        HBLLConfig.from_dict({7: 1})


@pytest.mark.parametrize("header", [
    struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 99_000_000) + b"{}", struct.pack("<Q", 0), b"\xff" * 64,
    struct.pack("<Q", 100_000) + b"[" * 100_000, struct.pack("<Q", 2) + b"{}", b"1234567",
    (lambda h: struct.pack("<Q", len(h)) + h)(b'{"embed.weight":{"dtype":"F32","shape":[1e9],"data_offsets":[0,4]}}'),
    (lambda h: struct.pack("<Q", len(h)) + h)(b'{"embed.weight":{"dtype":"F32","shape":[40,8],"data_offsets":[0,1280]}}'),
    (lambda h: struct.pack("<Q", len(h)) + h)(b'{"' + b"n" * 10_000 + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
], ids=range(10))  # fmt: skip
def test_odd_headers_of_weights(tmp_path, header):
    model_of().save_pretrained(tmp_path)
    (tmp_path / SUMS_NAME).unlink()
    (tmp_path / WEIGHTS_NAME).write_bytes(header)
    with pytest.raises(ValueError, match=WEIGHTS_NAME) as caught:
        HBLLForCausalLM.from_pretrained(tmp_path)
    assert len(str(caught.value)) <= 500


# ------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("name", ["", "  ", "x" * 300, "a/" + "b" * 256, "a\0b", None, 3, [], 1.5])
def test_odd_names_to_save_to(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        model_of().save_pretrained(name)
    assert len(str(caught.value)) <= 500 and not list(tmp_path.iterdir())


def test_the_home_and_bytes_are_names_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model_of().save_pretrained("~/one")
    model_of().save_pretrained(b"two")
    model_of().save_pretrained(tmp_path / ("long" * 60))
    assert sorted(path.name[:5] for path in tmp_path.iterdir()) == ["longl", "one", "two"]
    for name in ("~/one", b"two", tmp_path / ("long" * 60)):
        assert isinstance(HBLLForCausalLM.from_pretrained(name), HBLLForCausalLM)


@pytest.mark.parametrize("options, message", [
    (dict(torch_dtype=torch.bfloat16), r"does not know torch_dtype: known are revision, subfolder.*its name is dtype="),
    (dict(device_map="auto"), "device_map: name one device by device="),
    (dict(trust_remote_code=True), "trust_remote_code: leave it out"),
    (dict(force_download=True), "does not know force_download"),
    (dict(devise="cpu"), "does not know devise: known are.*leave it out"),
    (dict(device="gpu0"), "device='gpu0'.*choose one that this machine has"),
    (dict(device=ABSENT), f"device='{ABSENT}'"),
    (dict(device=torch.device(ABSENT)), f"device='{ABSENT}'"),
    (dict(device=7.5), "device=7.5"), (dict(device=None), "device=None"), (dict(device="x" * 10**5), "device='xxx"),
    (dict(dtype="float8"), "dtype='float8': allowed are 'float32', 'bfloat16', 'float16', 'float64'.*'auto'"),
    (dict(dtype=torch.int8), "dtype=torch.int8: allowed"), (dict(dtype=None), "dtype=None"), (dict(dtype=3), "dtype=3"),
    (dict(subfolder=3), "subfolder=3: must be"), (dict(subfolder="no"), "m' has no folder 'no': leave subfolder out"),
    (dict(subfolder="../m"), "subfolder='../m': must be the name of a folder inside"), (dict(subfolder="/tmp"), "subfolder="),
    (dict(subfolder="*"), "subfolder="), (dict(subfolder="a\0b"), "subfolder="),
    (dict(revision=3), "revision=3: must be the name of a branch"), (dict(revision=b"v1"), "revision="),
    (dict(token=3.5), "token=float: must be a token, True"), (dict(token=["s3cret"]), "token=list: must be"),
    (dict(cache_dir=3), "cache_dir=3"), (dict(local_files_only="yes"), "local_files_only='yes': must be True or False"),
])  # fmt: skip
def test_odd_arguments_of_from_pretrained(tmp_path, options, message):
    model_of().save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=message) as caught:
        HBLLForCausalLM.from_pretrained(tmp_path / "m", **options)
    assert len(str(caught.value)) <= 500 and "s3cret" not in str(caught.value)


@pytest.mark.parametrize("source", [None, 3, "a\0b", "x" * 10**5, [], "x" * 300, "~nobody-of-this-name/x"],
                         ids=range(7))
def test_odd_names_to_load_from(source):
    with pytest.raises(ValueError) as caught:
        HBLLForCausalLM.from_pretrained(source)
    assert len(str(caught.value)) <= 500


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def test_without_network_the_hub_is_named(no_network):
    with pytest.raises(ValueError, match="the Hub did not take 'me/small': .*(network|offline mode)") as caught:
        model_of().push_to_hub("me/small", token="t")
    assert "hf auth login" not in str(caught.value) and ".." not in str(caught.value)
    with pytest.raises(ValueError, match="no such model could be read from the Hub"):
        HBLLForCausalLM.from_pretrained("me/small", token="t")


@pytest.mark.parametrize("arguments, message", [
    (dict(repo_id=""), "repo_id=''"), (dict(repo_id=None), "repo_id=None"), (dict(repo_id=3), "repo_id=3"),
    (dict(repo_id="a/b/c"), "Repo id"), (dict(repo_id="x" * 10**5), "repo_id='xxx"), (dict(repo_id="a b/c"), "repo_id="),
    (dict(repo_id="me/x", private="yes"), "private='yes'"), (dict(repo_id="me/x", revision=3), "revision=3"),
    (dict(repo_id="me/x", commit_message=None), "commit_message=None"),
    (dict(repo_id="me/x", license=3), "license=3: must be"),
    (dict(repo_id="me/x", token=b"s3cret"), "token=bytes"), (dict(repo_id="me/x", token="s3\ncret"), "the Hub did not take"),
])  # fmt: skip
def test_odd_arguments_of_push_to_hub(no_network, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        model_of().push_to_hub(**arguments)
    assert len(str(caught.value)) <= 500 and "s3cret" not in str(caught.value)


class Odd:
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize("metadata", [
    dict(license=3), dict(license="x" * 10**6), dict(language={"a": 1}), dict(datasets=[1]), dict(model_name=["a"]),
    dict(settings=3), dict(settings=[1]), dict(perplexity={"a": 1}), dict(perplexity=[3]), dict(license=float("nan")),
])  # fmt: skip
def test_metadata_that_a_card_cannot_take(tmp_path, metadata):
    with pytest.raises(ValueError, match=next(iter(metadata))) as caught:
        model_of().save_pretrained(tmp_path / "m", **metadata)
    assert len(str(caught.value)) <= 500 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [
    float("nan"), 10**5000, Odd(), "x" * 10**6, "\ud800", b"\xff", {"a": {1, 2}}, "a\r\nb|c\n---\n", ["y"] * 10**5,
    torch.zeros(3), lambda: 0, "\0",
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_odd_metadata_is_written_in_bounds(tmp_path, value):
    rows = [{"name": value, "path": value, "loss": value, 3: value}]
    model_of().save_pretrained(tmp_path / "m", data=value, settings={"a": value, 3: value}, perplexity=rows, other=value)
    card = (tmp_path / "m" / CARD_NAME).read_bytes().decode("utf-8")
    assert len(card) < 200_000 and "\r" not in card and "## Configuration" in card
    assert HBLLForCausalLM.from_pretrained(tmp_path / "m")._card == card


class Widening(torch.nn.Module):
    def forward(self, x):
        return torch.cat((x, x), dim=-1)


@pytest.mark.parametrize(
    "blocks, made",
    [
        ([torch.nn.Linear(4, 5)], r"block 1 \(Linear\) makes shape \(2, 5\) of states of shape \(2, 4\)"),
        ([torch.nn.Identity(), Widening(), torch.nn.Identity()], r"block 2 \(Widening\) makes shape \(2, 8\)"),
        ([torch.nn.GRU(4, 4)], r"block 1 \(GRU\) makes a tuple .*one that also returns a state is a Cell"),
    ],
    ids=str,
)
def test_a_block_that_changes_the_shape_is_named(blocks, made):
    model = DepthHierarchy(blocks, torch.nn.Linear(4, 3), torch.nn.Identity())
    x, y = torch.randn(2, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=made):
        model(x)
    with pytest.raises(ValueError, match=made):
        BackpropObjective(model)(x, y)
    with pytest.raises(ValueError, match=made):
        LocalObjective(model)(x, y)


def test_what_is_no_module_is_named():
    block, head = torch.nn.Identity(), torch.nn.Linear(4, 3)
    for blocks, message in (([torch.tanh], "block 1 is .*tanh.*torch.nn.Module"), (block, "blocks=Identity object"),
                            ([block, None, block], "block 2 is None")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            DepthHierarchy(blocks, head)
    with pytest.raises(ValueError, match="head=None: must be a torch.nn.Module"):
        DepthHierarchy([block], None)
    with pytest.raises(ValueError, match="embed=.*tanh.*: must be a torch.nn.Module"):
        DepthHierarchy([block], head, torch.tanh)


NO_CELLS = [torch.nn.GRUCell(3, 4), "gru", None, lambda s, x: s]


@pytest.mark.parametrize("cell", NO_CELLS, ids=lambda value: type(value).__name__)
def test_what_is_no_recurrent_cell_is_named(cell):
    message = f"cell={type(cell).__name__} object: must be a RecurrentCell, such as make_cell"
    with pytest.raises(ValueError, match=message):
        RecurrentLM(10, cell)
    with pytest.raises(ValueError, match=message):
        RecurrentModel(cell, torch.nn.Linear(4, 10))
    with pytest.raises(ValueError, match="vocab_size=0"):
        RecurrentLM(0, make_cell("gru", 3, 4))
