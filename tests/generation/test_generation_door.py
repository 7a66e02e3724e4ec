"""What generation accepts of Python and NumPy, what it refuses, and where its stream may go."""

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.language_models import TOKENIZER, model_of

from hbll_seq.generation.decoding import generate_ids
from hbll_seq.generation.sampler import Sampler
from hbll_seq.generation.sampling import SamplingOptions, SamplingParams
from hbll_seq.models.generate import generate
from hbll_seq.tree.topology import DyadicTree

GREEDY = dict(temperature=0, max_new_tokens=3)


@pytest.fixture(scope="module")
def model():
    return model_of(TOKENIZER)


@pytest.mark.parametrize(
    "options, equal",
    [
        (dict(depth=np.int64(3)), dict(depth=3)),
        (dict(depth=np.uint8(3)), dict(depth=3)),
        (dict(path=np.array([4, 6, 7])), dict(path=[4, 6, 7])),
        (dict(path=(np.int32(4), 6)), dict(path=[4, 6])),
        (dict(path=(n for n in (4, 6))), dict(path=[4, 6])),
        (dict(max_new_tokens=np.int16(2)), dict(max_new_tokens=2)),
        (dict(temperature=np.float32(0.5), seed=np.int64(3)), dict(temperature=0.5, seed=3)),
        (dict(temperature=Fraction(1, 2), seed=3), dict(temperature=0.5, seed=3)),
        (dict(temperature=10**20, seed=3), dict(temperature=1e20, seed=3)),
        (dict(temperature=1.0, top_k=np.int64(5), top_p=np.float64(0.5), seed=3),
         dict(temperature=1.0, top_k=5, top_p=0.5, seed=3)),
        (dict(temperature=1.0, top_k=10**30, top_p=0.5, seed=3), dict(temperature=1.0, top_p=0.5, seed=3)),
        (dict(stream=np.True_), {}),
        (dict(truncate_prompt=np.False_), {}),
    ],
    ids=lambda options: str(options).partition(" at 0x")[0],
)  # fmt: skip
def test_numbers_of_numpy_are_numbers(model, options, equal):
    first, second = (model.generate("The city", **{**GREEDY, **values}) for values in (options, equal))
    assert first == second


def a_million():
    return list(itertools.islice(itertools.cycle([4, 6]), 10**6))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=10**400), "temperature=.*at least 0"),
        (dict(temperature=True), "temperature=True"),
        (dict(temperature=1j), "temperature=1j"),
        (dict(temperature=torch.tensor(0.5)), "temperature=tensor"),
        (dict(top_p=10**400), "top_p="),
        (dict(top_p=math.nan), "top_p=nan"),
        (dict(top_k=np.int64(0)), "top_k=.*at least 1"),
        (dict(top_k=True), "top_k=True"),
        (dict(stream=torch.tensor(True)), "stream=tensor.*True or False"),
        (dict(stream="yes"), "stream='yes'.*True or False"),
        (dict(stream=1), "stream=1"),
        (dict(stream=None), "stream=None"),
        (dict(truncate_prompt="no"), "truncate_prompt='no'.*True or False"),
        (dict(truncate_prompt=0), "truncate_prompt=0"),
        (dict(depth=True), "depth=True.*1 to 7"),
        (dict(depth=1.0), "depth=1.0.*1 to 7"),
        (dict(depth=10**5000), "depth=<whole number of .* bits>.*1 to 7"),
        (dict(depth=torch.tensor(3)), "depth=tensor"),
        (dict(path="467"), "path='467'.*1 to 7"),
        (dict(path=b"\x04\x06"), "path=b'.*1 to 7"),
        (dict(path={4, 6, 7}), "path={4, 6, 7}.*1 to 7"),
        (dict(path={4: 1}), "path={4: 1}.*1 to 7"),
        (dict(path=[True]), r"path=\[True\].*1 to 7"),
        (dict(path=[4.0]), r"path=\[4.0\].*1 to 7"),
        (dict(path=[10**5000]), "path=.*1 to 7"),
        (dict(path=a_million()), "path=.*4 comes after 6"),
        (dict(path=itertools.count(1)), "path=.*is none of the block numbers 1 to 7"),
        (dict(path=4), "path=4.*1 to 7"),
        (dict(max_new_tokens=True), "max_new_tokens=True"),
        (dict(max_new_tokens=math.inf), "max_new_tokens=inf"),
        (dict(seed=-1), "seed=-1.*whole number"),
        (dict(seed=2**63), "seed=.*whole number"),
        (dict(seed=1.0), "seed=1.0.*whole number"),
        (dict(prompt=[]), r"prompt=\[\].*non-empty"),
        (dict(prompt=b"The city"), "prompt=b'The city'.*text"),
        (dict(prompt=("a", b"b")), "prompt=.*text"),
        (dict(prompt=iter(["a"])), "prompt=.*text"),
        (dict(prompt=["a"] * 10**6 + [1]), "prompt=.*text"),
        (dict(prompt="a\udc80b"), "U\\+DC80"),
        (dict(prompt="word " * 100_000), "tokens.*context"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_what_is_no_such_value_is_named_in_one_short_line(model, capsys, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        model.generate(**{"prompt": "The city", **GREEDY, **options})
    text = str(caught.value)
    assert len(text) <= 500 and "\n" not in text
    assert capsys.readouterr().out == ""
    if "stream" not in options and isinstance(options.get("prompt", ""), str):
        with pytest.raises(ValueError, match=message):
            model.stream(**{"prompt": "The city", **GREEDY, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_tokens=3), "unknown option 'max_tokens': did you mean max_new_tokens\\? .* are max_new_tokens, temp"),
        (dict(dept=3), "'dept': did you mean depth"),
        (dict(truncate=True), "'truncate': did you mean truncate_prompt"),
        (dict(zzz=3), "unknown option 'zzz': The sampling options are"),
        (dict(sampling=SamplingParams(), top_k=3), "sampling and top_k are both given: put it into SamplingParams"),
        (dict(sampling=dict(top_k=3)), "sampling={'top_k': 3}: must be a SamplingParams"),
    ],
    ids=str,
)
def test_options_of_no_such_name_or_twice(model, options, message):
    for door in (model.generate, model.stream, lambda *given, **more: generate(*given, model=model, **more)):
        with pytest.raises(ValueError, match=message):
            door("The city", **options)
    with pytest.raises(ValueError, match=message):  # before a model is read
        generate("The city", model="no/such-model", **options)


def test_one_object_or_its_fields_for_short(model):
    options = dict(max_new_tokens=5, temperature=1.5, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1, stop=None, n=1,
                   seed=3)
    by_object = model.generate("The city", sampling=SamplingParams(**options))
    assert by_object == model.generate("The city", **options) != "The city"
    assert by_object == generate("The city", model=model, sampling=SamplingParams(**options))
    assert by_object == "The city" + "".join(model.stream("The city", sampling=SamplingParams(**options)))
    assert {f.name for f in dataclasses.fields(SamplingParams)} == set(SamplingOptions.__annotations__) == set(options)


@pytest.mark.parametrize("options, message", [
    (dict(max_new_tokens=0), "max_new_tokens=0: must be a whole number of at least 1$"),
    (dict(seed=-1), "seed=-1: must be a whole number of at least 0 and at most 9223372036854775807, or None$"),
    (dict(temperature=-1), r"temperature=-1: must be a number of at least 0 \(0 is greedy\)$"),
    (dict(temperature=math.inf), r"temperature=inf: must be a number of at least 0 \(0 is greedy\)$"),
    (dict(top_k=0), "top_k=0: must be a whole number of at least 1, or None to keep every token$"),
    (dict(top_p=0), "top_p=0: must be a number above 0 and at most 1, or None to keep every token$"),
    (dict(min_p=1.5), "min_p=1.5: must be a number above 0 and at most 1, or None to keep every token$"),
    (dict(repetition_penalty=0), r"repetition_penalty=0: must be a number above 0 \(1 changes nothing\)$"),
    (dict(n=0), "n=0: must be a whole number of at least 1$"),
    (dict(n=True), "n=True: must be a whole number"),
    (dict(stop=""), "stop='': must be a text of at least one character, a list of them, or None$"),
    (dict(stop=["a", ""]), r"stop=\['a', ''\]: must be a text of"),
    (dict(stop=3), "stop=3: must be a text of"),
    (dict(stop=b"a"), "stop=b'a': must be a text of"),
])  # fmt: skip
def test_sampling_options_check_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_a_tuple_of_prompts_is_a_list(model):
    assert model.generate(("a", "b"), **GREEDY) == model.generate(["a", "b"], **GREEDY)


def test_nothing_is_allocated_ahead_of_the_tokens(model):
    pieces = model.stream("The city", temperature=1.0, seed=0, max_new_tokens=10**12)
    assert len("".join(itertools.islice(pieces, 3))) >= 3
    assert len(next(generate_ids(model, [[5]], (4,), SamplingParams(10**30, temperature=0)))) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prompts=[]), r"prompts=\[\]"),
        (dict(prompts=[[]]), r"prompts=\[\[\]\]"),
        (dict(prompts=[[1], []]), "non-empty lists"),
        (dict(prompts=[5]), r"prompts=\[5\]"),
        (dict(prompts=[[1.0]]), r"prompts hold \[1.0\]: token ids must be whole numbers from 0 to"),
        (dict(prompts=torch.tensor([5])), r"prompts=tensor\(\[5\]\)"),
        (dict(prompts=torch.tensor([[1.5]])), r"prompts hold \[1.5\]"),
        (dict(prompts=[[-1]]), "whole numbers from 0 to"),
        (dict(prompts=[[10**9]]), "whole numbers from 0 to"),
        (dict(prompts=["ab"]), "whole numbers from 0 to"),
        (dict(path=(4, 7)), "4 -> 7"),
        (dict(sampling=5), "sampling=5: must be a SamplingParams"),
    ],
    ids=str,
)
def test_ids_are_checked_at_the_call(model, changes, message):
    with pytest.raises(ValueError, match=message):
        generate_ids(model, **{**dict(prompts=[[5]], path=(4,), sampling=SamplingParams(1)), **changes})


@torch.no_grad()
@pytest.mark.parametrize("ids", [np.array([[5, 6]]), torch.tensor([[5, 6]]), [torch.tensor([5, 6])]], ids=str)
def test_ids_may_be_numpys_or_torchs(model, ids):
    first, second = (list(generate_ids(model, ids, (4,), SamplingParams(3, temperature=0))) for ids in (ids, [[5, 6]]))
    assert first == second


@pytest.mark.parametrize("values", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]], ids=str)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_broken_logits_are_refused(values, temperature):
    with pytest.raises(ValueError, match="logits hold NaN or inf.*load sound ones"):
        Sampler(SamplingParams(temperature=temperature), [[1], [1]]).draw(torch.tensor([[0.0, 1.0], values]))


@pytest.mark.parametrize("logits", [torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 0), torch.zeros(1, 3).long()])
def test_logits_of_another_shape_are_refused(logits):
    with pytest.raises(ValueError, match="logits of shape"):
        Sampler(SamplingParams(), [[1]]).draw(logits)


def test_some_tokens_may_be_impossible():
    assert Sampler(SamplingParams(), [[1]]).draw(torch.tensor([[-math.inf, 2.0, -math.inf]])).tolist() == [1]


@pytest.mark.parametrize("bad", ["3", 3.0, True, None, -3, [3], np.float64(3)])
def test_a_tree_takes_whole_numbers_alone(bad):
    tree = DyadicTree(3)
    with pytest.raises(ValueError, match="depth="):
        tree.path_for_depth(bad)
    assert tree.validate_path(np.array([4, 6])) == (4, 6)
    assert all(type(n) is int for n in tree.validate_path(np.array([4, 6])))


def test_a_long_path_is_refused_shortly_in_a_deep_tree():
    with pytest.raises(ValueError, match="1 -> 1000") as caught:
        DyadicTree(10).validate_path([*range(1, 2), 1000, *range(1001, 1023)])
    assert len(str(caught.value)) <= 500


# -------------------------------------------------------------------------------------------------- where the stream goes

SCRIPT = """
import sys
from helpers.language_models import TOKENIZER, model_of
model = model_of(TOKENIZER)
text = model.generate("Caf\\u00e9 \\u65e5\\u672c", stream=True, temperature=0, max_new_tokens=4)
silent = model.generate("Caf\\u00e9 \\u65e5\\u672c", temperature=0, max_new_tokens=4)
print("the text is whole" if text == silent else "the text differs", file=sys.stderr)
sys.stderr.flush()
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_stdout_that_takes_nothing_ends_no_generation(tmp_path):
    """A pipe that nobody reads, a full disk, and an encoding that lacks some of the characters; as processes of their own."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "wb") as full, open(tmp_path / "out", "wb") as file:
        runs = [
            subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, stdout=out, stderr=subprocess.PIPE)
            for out in (write, full, file)
        ]
        os.close(write)
        errors = [run.communicate(timeout=120)[1].decode() for run in runs]
    assert all("the text is whole" in error and "Traceback" not in error.partition("the text")[0] for error in errors), errors
    assert runs[0].returncode == runs[2].returncode == 0
    assert "Caf\u00e9 \\u65e5\\u672c".encode("cp1252") in (tmp_path / "out").read_bytes()


def test_a_terminal_is_not_steered(model, monkeypatch):
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        text = model.generate("The \x1b[31mcity", stream=True, **GREEDY)
    shown = ""
    while not shown.endswith("\n"):  # a terminal hands out what has come so far
        shown += os.read(master, 4096).decode()
    os.close(master)
    assert text.startswith("The \x1b[31mcity")
    assert "\x1b" not in shown and "\\x1b[31mcity" in shown


def test_without_a_stdout_the_text_is_returned(model, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert generate("The city", model=model, stream=True, **GREEDY).startswith("The city")
