"""Our tokenizer in transformers: the same ids for every text, the same text for all ids."""

import random

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [hf]")

from helpers.language_models import TOKENIZER, model_of  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import hbll_seq.integrations.transformers as ours  # noqa: E402
from hbll_seq.data.tokenizer import Tokenizer  # noqa: E402

TEXTS = [
    "",
    " ",
    "  two  blanks  ",
    "\n",
    "a\nb\r\nc\r d \n\n",
    "\t\x00\x01\x1b[31m\x7f\x85",
    "<|endoftext|>",
    "a<|endoftext|> <|unknown|> <unk> <0x41> </s>",
    "\u2581 is no blank\u2581",
    "e\u0301 \ufb01 \u00c5 \u212b \u0130",  # what a normalisation would change
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u4e2d\u6587 \u0627\u0644\u0639",
    "\ufeff\ufffd\uffff\U0010ffff",
    " .  ,  ' s  n't @-@ @,@ = Title = \n",  # what clean_up_tokenization_spaces would change
    "x" * 3000,
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")
    model_of(TOKENIZER).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_and_texts_are_ours(tokenizer, text):
    ids = TOKENIZER.encode(text)
    assert tokenizer(text)["input_ids"] == tokenizer.encode(text) == ids
    assert tokenizer(text, add_special_tokens=True)["attention_mask"] == [1] * len(ids)
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == text == TOKENIZER.decode(ids)
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text


def test_random_texts_and_ids(tokenizer):
    rng = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for _ in range(300):
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))
        assert tokenizer(text)["input_ids"] == TOKENIZER.encode(text) and tokenizer.decode(TOKENIZER.encode(text)) == text
        ids = [rng.randrange(4096) for _ in range(30)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == TOKENIZER.decode(ids)


def test_special_tokens(tokenizer):
    end, (a, b) = TOKENIZER.eos_id, TOKENIZER.encode("a b")
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|endoftext|>", end, end)
    assert tokenizer.bos_token is None and len(tokenizer) == tokenizer.vocab_size == 4096 == len(tokenizer.get_vocab())
    assert tokenizer.decode([a, end, b]) == "a<|endoftext|> b" and tokenizer.decode(end) == "<|endoftext|>"
    assert tokenizer.decode([a, end, b], skip_special_tokens=True) == TOKENIZER.decode([a, end, b]) == "a b"


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["The history", "A"], return_tensors="pt", padding=True)
    assert batch["attention_mask"].tolist()[1] == [0] * (batch["input_ids"].shape[1] - 1) + [1]
    assert batch["input_ids"].dtype == torch.int64 and set(batch) == {"input_ids", "attention_mask"}
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["The history", "A"]


def test_saving_keeps_it(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert Tokenizer.from_file(tmp_path / "tokenizer.model").fingerprint == TOKENIZER.fingerprint
    again = ours.HBLLTokenizer.from_pretrained(tmp_path)
    assert again.encode("a <|endoftext|>\n") == TOKENIZER.encode("a <|endoftext|>\n") and again.padding_side == "left"


def test_what_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer("\ud800")
    with pytest.raises(ValueError, match="token '<new>' cannot be added: the model knows 4096 tokens"):
        tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="id 4096 is outside the vocabulary"):
        tokenizer.decode([4096])
    with pytest.raises(ValueError, match="no token 'no such piece'"):
        tokenizer.convert_tokens_to_ids(["no such piece"])
    model_of().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs tokenizer.model"):
        AutoTokenizer.from_pretrained(tmp_path)
