"""Texts without blanks give a tokenizer too: the blank always has a piece. What older versions learnt stays as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hbll_seq.data.pieces import MAX_LINE
from hbll_seq.data.tokenizer import Tokenizer

_RNG = random.Random(0)
WITHOUT_BLANKS = {
    "Chinese": (["".join(chr(0x4E00 + _RNG.randrange(50)) for _ in range(30)) for _ in range(200)], 350),
    "DNA, a line": (["".join(_RNG.choices("ACGT", k=60)) + "\n" for _ in range(200)], 300),
    "DNA, one long line": (["".join(_RNG.choices("ACGT", k=3 * MAX_LINE))], 300),
    "one word a line": ([f"word{i % 17}\n" for i in range(200)], 288),
    "only newlines": (["\n" * 50], 261),
    "only emoji": (["\U0001f600\U0001f601" * 20], 265),
    "only control characters": (["\x01\x02\x03\x1b\x7f" * 20], 266),
    "only tabs": (["\t" * 50], 262),
    "only NUL": (["\0" * 50], 261),
    "only U+2585": (["\u2585" * 50], 261),
    "U+2585 in every line": (["a\u2585b c\n"] * 30, 266),
    "U+2581 for blanks": (["a\u2581b\n"] * 30, 264),
    "one character, often": (["a" * 5000], 263),
    "one character": (["a"], 262),
    "carriage returns": (["abc\rabd\r"] * 30, 266),
    "blanks too rare to be covered": (["abcdefgh\n"] * 3000 + ["a b\n"], 270),
}


@pytest.mark.parametrize("name", WITHOUT_BLANKS)
def test_the_blank_always_has_a_piece(name: str) -> None:
    texts, vocab_size = WITHOUT_BLANKS[name]
    tokenizer = Tokenizer.train(texts, vocab_size)
    assert tokenizer.vocab_size == vocab_size and len(tokenizer.encode(" ")) == 1
    assert tokenizer.fingerprint == Tokenizer.train(texts, vocab_size).fingerprint
    for text in ("".join(texts)[:2000], " a  b \u2581 \u2585\0\n", " a\tb\r\n\U0001f600 <unk>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("texts", [["abc\n"] * 9, ["\n"], ["a"], ["\u6f22\u5b57"] * 9, ["abcabdabe\n" * 999 + "a b\n"]])
def test_messages_about_the_size_hold_without_blanks(texts: list[str]) -> None:
    for size, wording in ((20, "smallest"), (9000, "largest")):
        with pytest.raises(ValueError, match=f"{wording} possible value is") as info:
            Tokenizer.train(texts, size)
        named = int(str(info.value).split("value is ")[1].split(":")[0])
        assert Tokenizer.train(texts, named).vocab_size == named


@pytest.mark.parametrize("texts", [torch.tensor(2), np.array("text"), 3, None, str, "text"])
def test_what_cannot_be_gone_through_is_no_texts(texts: object) -> None:
    with pytest.raises(ValueError, match="texts is .*; give an iterable of strings"):
        Tokenizer.train(texts, 300)


def test_a_text_with_blanks_gives_the_vocabulary_it_always_gave() -> None:
    """Nothing is demanded of SentencePiece that older versions did not: the bytes, and with them the fingerprint, stay."""
    for texts, symbols in ((["some words and some words\n"] * 9, ("\n", " \n")), (["ACGTAACC"] * 9, (" ",))):
        proto = Tokenizer.train(texts, 272 if " \n" in symbols else 265, symbols=symbols).model_proto
        field = b"\xa2\x02"  # number 36 of the trainer's specification, required_chars
        assert field + b"\x03\xe2\x96\x81" not in proto
    assert field + b"\x03\xe2\x96\x81" in Tokenizer.train(["ACGTAACC"] * 9, 265).model_proto
