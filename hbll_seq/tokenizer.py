"""Text to token ids and back without loss: SentencePiece BPE with byte fallback and identity normalisation.

SentencePiece: Kudo and Richardson 2018 (arXiv 1808.06226); byte-pair encoding: Sennrich et al. 2016 (arXiv 1508.07909).

A text is encoded line by line (a line keeps its "\\n"; one of more than MAX_LINE characters is cut there), so that
`encode(whole)` equals the lines' ids joined and a corpus of any size can be tokenised as a stream.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path

import sentencepiece

from .atomic import atomic_write

DEFAULT_MODEL = "wikitext-2-bpe-4k.model"
MAX_LINE = 1 << 16  # characters
BLANK = "\u2581"  # SentencePiece writes a blank so; a text that holds this character itself needs the detour below
UNK_PIECE, EOS_PIECE = "<|unknown|>", "<|endoftext|>"  # names no text is likely to hold; text never encodes to them
_SURROGATE = re.compile("[\ud800-\udfff]")
# One specimen of everything a lossy tokenizer changes: outer and double blanks, a ligature, a tab, CRLF, an emoji.
_PROBE = "  a  \ufb01\t\r\n \U0001f600 e\u0301 "


def split_lines(text: str) -> Iterator[str]:
    """Cuts a text after every newline, and a longer line every MAX_LINE characters; ''.join gives the text back."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start, start + MAX_LINE)
        end = start + MAX_LINE if newline < 0 else newline + 1
        yield text[start:end]
        start = end


class Tokenizer:
    """A SentencePiece model that loses nothing: `decode(encode(s)) == s` for every valid Unicode string.

    Raises ValueError when the bytes are no SentencePiece model, or one that is not lossless (no byte fallback, another
    normalisation than identity, a dummy prefix) or that has no end-of-text piece.
    """

    def __init__(self, model_proto: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_proto)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError("not a SentencePiece model; make one with tokenizers/train_tokenizer.py") from error
        self.model_proto = bytes(model_proto)
        self.fingerprint: str = hashlib.sha256(self.model_proto).hexdigest()
        self.vocab_size: int = self._processor.GetPieceSize()
        self.eos_id: int = self._processor.eos_id()
        self._bytes_of: list[bytes] = [self._piece_bytes(i) for i in range(self.vocab_size)]
        byte_ids = {self._bytes_of[i][0]: i for i in range(self.vocab_size) if self._processor.IsByte(i)}
        if self.eos_id < 0 or len(byte_ids) != 256:
            raise ValueError(
                f"the tokenizer has {len(byte_ids)} byte pieces (256 are needed) and end-of-text id {self.eos_id} "
                "(must be >= 0); make one with tokenizers/train_tokenizer.py"
            )
        self._blank_ids = [byte_ids[b] for b in BLANK.encode()]
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ValueError(
                "the tokenizer changes the text (another normalisation than identity, or a dummy prefix); "
                "make a lossless one with tokenizers/train_tokenizer.py"
            )

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return type(self), (self.model_proto,)  # so that a model that carries its tokenizer can be deep-copied

    def _piece_bytes(self, i: int) -> bytes:
        """What an id stands for in the text; nothing for the special ids."""
        if self._processor.IsControl(i) or self._processor.IsUnknown(i):
            return b""
        piece = self._processor.IdToPiece(i)
        return bytes([int(piece[3:5], 16)]) if self._processor.IsByte(i) else piece.replace(BLANK, " ").encode()

    # -- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a .model file. Raises ValueError when it is missing or no usable model, naming the file."""
        try:
            proto = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read tokenizer {str(path)!r}: {error.strerror}; give a .model file") from error
        try:
            return cls(proto)
        except ValueError as error:
            raise ValueError(f"tokenizer {str(path)!r}: {error}") from error

    @classmethod
    def default(cls) -> Tokenizer:
        """The shipped tokenizer: 4096 pieces, trained on WikiText-2's training split."""
        return cls((resources.files("hbll_seq") / "assets" / DEFAULT_MODEL).read_bytes())

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        symbols: Sequence[str] = ("\n", " \n"),
        character_coverage: float = 0.9995,
        max_lines: int = 500_000,
        seed: int = 0,
    ) -> Tokenizer:
        """Learns a BPE vocabulary of exactly `vocab_size` pieces. The same arguments give the same bytes.

        texts: any pieces of text, read once; at most `max_lines` of their lines are held (a uniform sample by `seed`).
        symbols: strings within a line that always are one piece (WikiText ends its lines with a blank and a newline).
        character_coverage: share of the text's characters that get a piece; the others fall back to bytes.
        Raises ValueError when the texts are empty, hold a lone surrogate, or support no vocabulary of that size.
        """
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size!r}; it must be a whole number of at least a few hundred")
        if vocab_size >= 1 << 31:
            raise ValueError(f"vocab_size {vocab_size} is larger than any text supports; it must be below 2**31")
        if len(set(symbols)) != len(symbols) or any(not s or "\0" in s or _SURROGATE.search(s) for s in symbols):
            raise ValueError(f"symbols {list(symbols)!r} must be distinct, not empty and valid Unicode without NUL")
        if isinstance(texts, str):
            raise ValueError("texts is one string; give an iterable of strings, such as [text]")
        if not 0.9 <= character_coverage <= 1 or max_lines < 1:
            raise ValueError(f"character_coverage {character_coverage} must be in [0.9, 1], max_lines {max_lines} >= 1")
        lines = _sample_lines(texts, max_lines, seed)
        if not any(lines):
            raise ValueError("there is no text to train a tokenizer on; give texts that are not empty")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                character_coverage=character_coverage,
                user_defined_symbols=[symbol.replace(" ", BLANK) for symbol in symbols],
                unk_id=0,
                eos_id=1,
                bos_id=-1,
                pad_id=-1,
                unk_piece=UNK_PIECE,
                eos_piece=EOS_PIECE,
                max_sentence_length=8 * MAX_LINE,
                num_threads=4,  # stored in the model: a machine's own number would change the fingerprint
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(_explain_training_error(str(error), vocab_size)) from error
        return cls(model.getvalue())

    # -- using it -----------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special ids are added. Raises ValueError at a lone surrogate, TypeError for no string."""
        if not isinstance(text, str):
            raise TypeError(f"encode takes a str, not {type(text).__name__}")
        return [i for ids in self.encode_batch(list(split_lines(text)), num_threads=1) for i in ids]

    def encode_batch(self, lines: list[str], num_threads: int = 1) -> list[list[int]]:
        """Ids of every line (as `split_lines` cuts them), computed by that many native threads."""
        for line in lines:
            if not line.isascii() and (bad := _SURROGATE.search(line)):
                raise ValueError(
                    f"the text holds a lone surrogate, U+{ord(bad.group()):04X}, at character {bad.start()} of "
                    f"{line[:40]!r}; it is not valid Unicode: repair it or drop it, e.g. "
                    "text.encode('utf-8', 'ignore').decode()"
                )
        encoded = self._processor.Encode(lines, out_type=int, num_threads=num_threads)
        for index, line in enumerate(lines):
            # SentencePiece would read U+2581 as a blank: its three bytes are emitted instead.
            if BLANK in line:
                first, *others = self._processor.Encode(line.split(BLANK), out_type=int, num_threads=1)
                encoded[index] = first + [i for ids in others for i in self._blank_ids + ids]
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids (any 1-D sequence, tensors included). Special ids are dropped; bytes that are not UTF-8, such
        as a character cut in two, become U+FFFD. Raises ValueError for an id outside the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary; ids are 0 .. {self.vocab_size - 1}")
        return b"".join([self._bytes_of[i] for i in ids]).decode("utf-8", errors="replace")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the .model file atomically (aside, fsync, rename)."""
        atomic_write(path, self.model_proto)


def _sample_lines(texts: Iterable[str], max_lines: int, seed: int) -> list[str]:
    """A uniform sample of the texts' lines in bounded memory (reservoir sampling, Vitter's algorithm R)."""
    rng, lines, n_seen = random.Random(seed), [], 0
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts holds a {type(text).__name__}; every item must be a str")
        if bad := _SURROGATE.search(text):
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
    if found := re.search(r"value <= (\d+)", message):
        return (
            f"vocab_size {vocab_size} is larger than the text supports; the largest possible value is "
            f"{found.group(1)}: lower vocab_size or give more text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small for 256 bytes and the text's characters; the smallest possible "
            f"value is {found.group(1)}: raise vocab_size or lower character_coverage"
        )
    return f"SentencePiece cannot train with vocab_size {vocab_size}: {message}"
