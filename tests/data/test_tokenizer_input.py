"""What is no text, no ids, no name and no model is refused by a ValueError that names it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hbll_seq.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.default()



@pytest.mark.parametrize(
    "ids",
    [None, 3, "abc", "", b"abc", [1.0], [True], [[1]], ["1"], [None], {1: 2}, {1}, torch.tensor(3), torch.tensor([1.0]),
     torch.tensor([True]), torch.tensor([[1]]), torch.empty(3, dtype=torch.long, device="meta"), np.array(3), np.array([1.5]),
     np.array([[1]]), np.array([1], dtype=bool), [10**400], [-1], [4096], [np.float32(1)], object()],
)  # fmt: skip
def test_decode_takes_whole_numbers_only(tokenizer: Tokenizer, ids: object) -> None:
    with pytest.raises(ValueError) as error:
        tokenizer.decode(ids)
    message = str(error.value)
    assert len(message) <= 500 and "\n" not in message and ("whole number" in message or "outside the vocabulary" in message)


def test_decode_takes_any_sequence_of_whole_numbers(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a city")
    kinds = [tuple(ids), iter(ids), np.array(ids), np.array(ids, np.uint16), torch.tensor(ids), torch.tensor(ids).int(),
             [np.int64(i) for i in ids], np.array(ids, dtype=object), range(ids[0], ids[0])]  # fmt: skip
    assert [tokenizer.decode(kind) for kind in kinds] == ["a city"] * (len(kinds) - 1) + [""]


@pytest.mark.parametrize("lines", [None, "text", [1], [None], [b"x"], 3])
def test_encode_batch_takes_a_list_of_strings(tokenizer: Tokenizer, lines: object) -> None:
    with pytest.raises(ValueError, match="lines"):
        tokenizer.encode_batch(lines)
    with pytest.raises(ValueError, match="num_threads=0"):
        tokenizer.encode_batch(["x"], num_threads=0)


@pytest.mark.parametrize("proto", [None, "model", 3, 10**12, [1, 2], Path("t.model")])
def test_a_model_is_bytes(proto: object) -> None:
    with pytest.raises(ValueError, match="model_proto is .*from_file takes its name"):
        Tokenizer(proto)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": None}, "texts is None"),
        ({"texts": 3}, "texts is 3"),
        ({"symbols": None}, "symbols is None"),
        ({"symbols": "ab"}, "symbols is 'ab'"),
        ({"symbols": [1]}, r"symbols is \[1\]"),
        ({"character_coverage": "1"}, "character_coverage '1'"),
        ({"character_coverage": None}, "character_coverage None"),
        ({"character_coverage": float("nan")}, "character_coverage nan"),
        ({"max_lines": 2.5}, r"max_lines=2\.5"),
        ({"max_lines": None}, "max_lines=None"),
        ({"seed": "x"}, "seed='x'"),
    ],
)
def test_types_of_training_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(**{"texts": ["a b\n"], "vocab_size": 262, **options})


@pytest.mark.parametrize(
    ("path", "message"),
    [("", "is empty"), ("x" * 300, "too long"), ("a\0b", "NUL"), (None, "path is None"), (3, "path is 3")],
)
def test_impossible_names(tokenizer: Tokenizer, path: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.save(path)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_file(path)


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(3 << 30)
    kinds = {"pipe": "a pipe", "link": "a pipe", "sparse": "may have at most", ".": "a folder", "/dev/zero": "a device"}
    for name, message in kinds.items():
        with pytest.raises(ValueError, match=f"cannot read tokenizer.*{message}.*give a .model file"):
            Tokenizer.from_file(tmp_path / name)


FLIPPED = r"""
import random, resource
from hbll_seq.data.tokenizer import Tokenizer
texts = ["abc \u00e9t\u00e9 \u6f22\u5b57 <x> \U0001f600 z\n", "some words and some other words \n"]
proto = Tokenizer.train(texts * 30, 310, symbols=("\n", " \n", "<x>")).model_proto
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
rng, refused = random.Random(0), 0
for _ in range(300):
    damaged = bytearray(proto)
    damaged[rng.randrange(len(proto))] ^= 1 << rng.randrange(8)
    try:
        tokenizer = Tokenizer(bytes(damaged))
    except ValueError as error:
        assert len(str(error)) < 400 and type(error) is ValueError, error
        refused += 1
        continue
    for text in (*texts, "".join(map(chr, range(0x400))), "".join(p.decode("utf-8", "ignore") for p in tokenizer._bytes_of)):
        assert tokenizer.decode(tokenizer.encode(text)) == text, text
print(refused)
"""


def test_flipped_bits_of_a_model_are_refused_or_harmless() -> None:
    """In a process of its own, which native code could end."""
    run = subprocess.run([sys.executable, "-c", FLIPPED], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert 100 < int(run.stdout) < 290
