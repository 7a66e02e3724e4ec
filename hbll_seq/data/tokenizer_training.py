"""Learning a SentencePiece vocabulary from text."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable, Sequence
from numbers import Real

import sentencepiece

from hbll_seq.data.pieces import BLANK, EOS_PIECE, MAX_LINE, MAX_VOCABULARY, SURROGATE, UNK_PIECE, split_lines
from hbll_seq.utils.reading import quote, shorten
from hbll_seq.utils.values import as_whole

_TOO_LARGE = re.compile(r"value <= (\d+)")
_UNTRAINABLE = {0x0: None, 0x2585: None}  # SentencePiece drops NUL, and every line that holds U+2585


def train_model(
    texts: Iterable[str], vocab_size: int, symbols: Sequence[str], character_coverage: float, max_lines: int, seed: int
) -> bytes:
    """A model file's bytes; arguments and errors: see `Tokenizer.train`."""
    vocab_size = as_whole("vocab_size", vocab_size, 1, MAX_VOCABULARY)
    max_lines, seed = as_whole("max_lines", max_lines, 1), as_whole("seed", seed, -(1 << 63))
    if not isinstance(symbols, (list, tuple)) or not all(isinstance(symbol, str) for symbol in symbols):
        raise ValueError(f"symbols is {quote(symbols)}; give a list of strings")
    if len(set(symbols)) != len(symbols) or any(not s or "\0" in s or SURROGATE.search(s) for s in symbols):
        raise ValueError(f"symbols {quote(symbols)} must be distinct, not empty and valid Unicode without NUL")
    if isinstance(texts, str) or not _can_be_iterated(texts):
        kind = "one string" if isinstance(texts, str) else quote(texts)
        raise ValueError(f"texts is {kind}; give an iterable of strings, such as [text]")
    if not isinstance(character_coverage, Real) or not 0.9 <= character_coverage <= 1:
        raise ValueError(f"character_coverage {quote(character_coverage)} must be a number in [0.9, 1]")
    lines = _sample_lines(texts, max_lines, seed)
    if not any(lines):
        raise ValueError("there is no text to train a tokenizer on; give texts that are not empty")
    options = dict(
        vocab_size=vocab_size,
        character_coverage=float(character_coverage),
        user_defined_symbols=[symbol.replace(" ", BLANK) for symbol in symbols],
    )
    try:
        return _train_with_blank(lines, options)
    except RuntimeError as error:
        raise ValueError(_explain_training_error(str(error), vocab_size)) from error


def _can_be_iterated(texts: object) -> bool:
    try:
        iter(texts)
    except TypeError:  # also of a tensor or array of no dimension, which has the method
        return False
    return True


def _train_with_blank(lines: list[str], options: dict) -> bytes:
    """A model that has a piece for the blank: without one, every blank would become three bytes, and another character.

    A model of text with blanks usually learns one by itself. The piece must be demanded where blanks are too rare, or where
    there are none (Chinese, DNA, one word a line); SentencePiece then needs a line that holds a blank.
    """
    is_symbol = BLANK in options["user_defined_symbols"]
    if is_symbol or any(" " in line for line in lines):
        try:
            model = _train(lines, **options)
            if sentencepiece.SentencePieceProcessor(model_proto=model).PieceToId(BLANK):  # the unknown piece is 0
                return model
        except RuntimeError as error:
            if _TOO_LARGE.search(str(error)):
                raise
    trainable = [*(line.translate(_UNTRAINABLE) for line in lines), " "]
    return _train(trainable, **options, required_chars="" if is_symbol else BLANK)


def _train(lines: Iterable[str], **options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        unk_piece=UNK_PIECE,
        eos_piece=EOS_PIECE,
        max_sentence_length=8 * MAX_LINE,
        num_threads=4,  # stored in the model: a machine's own number would change the fingerprint
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def _sample_lines(texts: Iterable[str], max_lines: int, seed: int) -> list[str]:
    """A uniform sample of the texts' lines in bounded memory (reservoir sampling, Vitter's algorithm R)."""
    rng, lines, n_seen = random.Random(seed), [], 0
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts holds a {type(text).__name__}, {quote(text)}; every item must be a str")
        if bad := SURROGATE.search(text):
            raise ValueError(f"the text holds a lone surrogate, U+{ord(bad.group()):04X}; it is not valid Unicode")
        for line in split_lines(text):
            n_seen += 1
            slot = len(lines) if len(lines) < max_lines else rng.randrange(n_seen)
            if slot == len(lines):
                lines.append(line.replace(BLANK, " "))
            elif slot < max_lines:
                lines[slot] = line.replace(BLANK, " ")
    return lines


def _explain_training_error(message: str, vocab_size: int) -> str:
    if found := _TOO_LARGE.search(message):
        return (
            f"vocab_size {vocab_size} is larger than the text supports; the largest possible value is "
            f"{found.group(1)}: lower vocab_size or give more text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small for 256 bytes and the text's characters; the smallest possible "
            f"value is {found.group(1)}: raise vocab_size or lower character_coverage"
        )
    return f"SentencePiece cannot train with vocab_size {vocab_size}: {shorten(message)}; give another text or vocab_size"
