"""The tokenizer loses nothing, is reproducible, and says what is wrong with its input."""

from __future__ import annotations

import copy
import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hbll_seq.data.pieces import MAX_LINE, split_lines
from hbll_seq.data.tokenizer import Tokenizer

HARD = [
    "",
    " ",
    "  leading",
    "trailing  ",
    "a  b   c",
    "\n",
    "\n\n\n",
    " \n \n",
    "\t\ta\tb",
    "a\r\nb\rc\n",
    "\x00",
    "a\x00b\x00",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 flag \U0001f1e9\U0001f1ea",
    "e\u0301 \u0301 \u0301\u0301",
    "\u2581",
    "a\u2581b \u2581\u2581 c\u2581",
    " \u2581 \u2581\n\u2581",
    "<unk>",
    "<s>",
    "</s>",
    "<0x41>",
    "<0x0A><0xE2>",
    "<|endoftext|>",
    "<|unknown|>",
    " <unk> <unk><unk>",
    "\ufffd",
    "\ufeffBOM",
    "\ufb01 \u2460 \u00bd \u00c5 \u212b",
    "\uffff\U0010ffff\U000e0001",
    "\x7f\x85\xa0\u2028\u2029\u3000",
    "\u6f22\u5b57 \u0627\u0644\u0639 \u05d0",
    "\u2047 \u2585",
]
# What the fuzz test draws from: the whole of Unicode rarely hits the strings that an implementation treats specially.
PARTS = [*HARD, *"abcXYZ019.,;<>/|_-", " ", "  ", "\n", "\t", "\u2581", " the", "unk", "<", ">", "0x41", "endoftext"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.default()


@pytest.fixture(scope="module")
def odd_tokenizer() -> Tokenizer:
    """Trained on the very texts that look like pieces, so that merges towards them exist."""
    return Tokenizer.train(
        ["<0x41> </s> <s> <unk> <|endoftext|>\u2581 \t\t  x\x00y 123\r\n"] * 20, 285, symbols=("\n", " <s>")
    )


def random_text(rng: random.Random) -> str:
    def part() -> str:
        if rng.random() < 0.6:
            return rng.choice(PARTS)
        while (
            0xD800
            <= (code := rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000)]))
            <= 0xDFFF
        ):
            pass
        return chr(code)

    return "".join(part() for _ in range(rng.randrange(1, 24)))


@pytest.mark.parametrize("text", HARD)
def test_hard_strings_survive(tokenizer: Tokenizer, odd_tokenizer: Tokenizer, text: str) -> None:
    for one in (tokenizer, odd_tokenizer):
        ids = one.encode(text)
        assert one.decode(ids) == text
        assert one.eos_id not in ids and all(0 <= i < one.vocab_size for i in ids)


def test_random_strings_survive(tokenizer: Tokenizer, odd_tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(5000):
        text = random_text(rng)
        for one in (tokenizer, odd_tokenizer):
            ids = one.encode(text)
            assert one.decode(ids) == text, repr(text)
            assert one.eos_id not in ids and 0 not in ids, repr(text)  # no special id comes from text


def test_every_character_survives(tokenizer: Tokenizer) -> None:
    """All of Unicode, some hundred characters at a time, without newlines between them."""
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 7)]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["\ud800", "fine \udfff not", "\udc80\n"])
def test_lone_surrogate_is_an_error(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate, U\+D"):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match="lone surrogate"):
        Tokenizer.train([text], 300)


def test_encode_takes_only_strings(tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match="bytes"):
        tokenizer.encode(b"abc")  # type: ignore[arg-type]


def test_lines_are_encoded_one_by_one(tokenizer: Tokenizer) -> None:
    text = " = Title = \n \n The city . \n" + "x" * (2 * MAX_LINE + 5) + "\nend"
    lines = list(split_lines(text))
    assert "".join(lines) == text
    assert [len(line) for line in lines[3:]] == [MAX_LINE, MAX_LINE, 6, 3]
    assert tokenizer.encode(text) == sum((tokenizer.encode(line) for line in lines), [])
    assert tokenizer.encode_batch(lines, num_threads=2) == [tokenizer.encode(line) for line in lines]


def test_default_tokenizer(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 4096
    assert len(tokenizer.encode(" \n")) == len(tokenizer.encode(" <unk>")) == len(tokenizer.encode("\n")) == 1
    sentence = " The history of the city is described in the first chapter of the book . \n"
    assert len(tokenizer.encode(sentence)) < len(sentence) / 3
    assert tokenizer.fingerprint == Tokenizer.default().fingerprint


def test_decode_drops_special_ids_and_repairs_cut_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("city")
    assert tokenizer.decode([tokenizer.eos_id, *ids, 0, tokenizer.eos_id]) == "city"
    assert tokenizer.decode(torch.tensor(ids)) == "city"
    emoji = tokenizer.encode("\U0001f600")
    assert tokenizer.decode(emoji[:-1]) == "\ufffd"
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"id {bad} .* 0 \.\. 4095"):
            tokenizer.decode([5, bad])


def test_training_is_reproducible_and_differs_with_text(tmp_path: Path) -> None:
    texts = [f"word{i % 17} and number {i * i}\n" for i in range(400)]
    one = Tokenizer.train(texts, 320)
    assert one.vocab_size == 320
    assert one.fingerprint == Tokenizer.train(iter(texts), 320).fingerprint
    assert one.fingerprint != Tokenizer.train(texts[:200], 320).fingerprint
    assert one.fingerprint != Tokenizer.train(texts, 320, max_lines=100).fingerprint
    assert (
        Tokenizer.train(texts, 320, max_lines=100).fingerprint == Tokenizer.train(texts, 320, max_lines=100).fingerprint
    )


def test_vocabulary_larger_than_text_names_the_largest() -> None:
    texts = ["the cat sat on the mat\n"] * 3
    with pytest.raises(
        ValueError, match="vocab_size 5000 is larger than the text supports; the largest possible value is"
    ) as info:
        Tokenizer.train(texts, 5000)
    largest = int(str(info.value).split("value is ")[1].split(":")[0])
    assert Tokenizer.train(texts, largest).vocab_size == largest
    with pytest.raises(ValueError, match=f"largest possible value is {largest}:"):
        Tokenizer.train(texts, largest + 1)


def test_vocabulary_too_small_names_the_smallest() -> None:
    with pytest.raises(ValueError, match="vocab_size 20 is too small .* smallest possible value is") as info:
        Tokenizer.train(["abc abd\n"] * 9, 20)
    smallest = int(str(info.value).split("value is ")[1].split(":")[0])
    assert Tokenizer.train(["abc abd\n"] * 9, smallest).vocab_size == smallest


@pytest.mark.parametrize("vocab_size", [0, -1, True, 3.5, "4096", 2**40])
def test_bad_vocabulary_sizes(vocab_size: object) -> None:
    with pytest.raises(ValueError, match=f"vocab_size.*{vocab_size}"):
        Tokenizer.train(["some text\n"], vocab_size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no text"),
        (["", ""], {}, "no text"),
        ("a string", {}, "texts is one string"),
        ([b"x"], {}, "holds a bytes"),
        (["a"], {"symbols": ["b", "b"]}, "symbols"),
        (["a"], {"symbols": [""]}, "symbols"),
        (["a"], {"symbols": ["\0"]}, "symbols"),
        (["a"], {"character_coverage": 0.1}, "character_coverage 0.1"),
        (["a"], {"max_lines": 0}, "max_lines=0"),
    ],
)
def test_bad_training_input(texts: list[str], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(texts, 300, **options)


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    tokenizer.save(path)
    assert Tokenizer.from_file(path).fingerprint == tokenizer.fingerprint
    assert copy.deepcopy(tokenizer).encode("a city") == tokenizer.encode("a city")
    assert [p.name for p in tmp_path.iterdir()] == ["t.model"]


def test_failed_save_leaves_the_old_file(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.model"
    path.write_text("old")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        tokenizer.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["t.model"] and path.read_text() == "old"


def test_unusable_models_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing.model.*No such file"):
        Tokenizer.from_file(tmp_path / "missing.model")
    proto = tokenizer.model_proto
    for name, content in {"text": b"not a model", "empty": b"", "half": proto[: len(proto) // 2]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*not a SentencePiece model"):
            Tokenizer.from_file(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"byte_fallback": False}, "0 byte pieces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes the text"),
        ({"add_dummy_prefix": True}, "changes the text"),
        ({"eos_id": -1}, "end-of-text id -1"),
    ],
)
def test_lossy_models_are_refused(options: dict, message: str) -> None:
    import io

    import sentencepiece

    lossless = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["some words and some words"] * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=275,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**lossless, **options},
    )
    with pytest.raises(ValueError, match=message):
        Tokenizer(model.getvalue())


# -- the script ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "tokenizers" / "train_tokenizer.py"
    spec = importlib.util.spec_from_file_location("train_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_trains(script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"a line with <x> and {i}\n" for i in range(200)), encoding="utf-8")
    out = tmp_path / "my.model"
    arguments = ["--data", str(text), "--vocab-size", "290", "--symbol", "<x>", "--output", str(out)]
    assert script.main(arguments) == 0
    tokenizer = Tokenizer.from_file(out)
    assert tokenizer.vocab_size == 290 and len(tokenizer.encode("<x>")) == 1
    assert "bytes per token" in capsys.readouterr().out
    assert script.main(arguments) == 1  # never replaces a tokenizer that a model may depend on
    assert "--force" in capsys.readouterr().err
    assert script.main([*arguments, "--force"]) == 0
    assert Tokenizer.from_file(out).fingerprint == tokenizer.fingerprint


def test_script_makes_the_shipped_tokenizer(script, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Holds for the pinned SentencePiece; the vocabulary, not the bytes, so that a new release may add fields."""
    out = tmp_path / "default.model"
    assert script.main(["--symbol", " <unk>", "--output", str(out)]) == 0
    assert Tokenizer.from_file(out)._bytes_of == tokenizer._bytes_of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{tmp}/none.txt"], "there is no data"),
        (["--data", "{tmp}/empty.txt"], "is empty"),
        (["--data", "{tmp}/latin.txt"], "not UTF-8.* offset 4"),
        (["--data", "{tmp}/short.txt", "--vocab-size", "9000"], "largest possible value"),
        (
            ["--data", "{tmp}/short.txt", "--output", "{tmp}/no/such/folder/t.model"],
            "--output must be a file in a folder",
        ),
        (["--data", "{tmp}/short.txt", "--output", ""], "path '' is empty"),
        (["--data", "{tmp}/short.txt", "--output", "{tmp}/" + "x" * 300], "too long for a file name"),
    ],
)
def test_script_reports_bad_input(
    script, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf " + b"\xe9 and so on\n" * 20)
    (tmp_path / "short.txt").write_bytes(b"a short text\n" * 30)
    before = sorted(tmp_path.rglob("*"))
    status = script.main(["--output", f"{tmp_path}/t.model", *(a.format(tmp=tmp_path) for a in arguments)])
    assert status == 1 and sorted(tmp_path.rglob("*")) == before
    import re

    assert re.search(message, capsys.readouterr().err)


def test_script_needs_an_output(script, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        script.main([])
    assert info.value.code == 2 and "--output" in capsys.readouterr().err


def test_script_survives_a_full_standard_output(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a short text\n" * 30)
    script = Path(__file__).parents[2] / "tokenizers" / "train_tokenizer.py"
    arguments = ["--data", str(tmp_path / "t.txt"), "--vocab-size", "270", "--output", str(tmp_path / "t.model")]
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, str(script), *arguments], stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert (run.returncode, run.stderr) == (0, b"")
    assert Tokenizer.from_file(tmp_path / "t.model").vocab_size == 270


def test_names_of_pieces(tokenizer):
    names = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    assert len(set(names)) == tokenizer.vocab_size and names[tokenizer.eos_id] == "<|endoftext|>"
    special = [i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)]
    assert [names[i] for i in special] == ["<|unknown|>", "<|endoftext|>"] and tokenizer.decode(special) == ""
    for wrong in (-1, tokenizer.vocab_size, True, 1.0, "a"):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.piece(wrong)
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.is_special(wrong)
