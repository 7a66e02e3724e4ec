"""Text to token ids and back without loss: SentencePiece BPE with byte fallback and identity normalisation.

SentencePiece: Kudo and Richardson 2018 (arXiv 1808.06226); byte-pair encoding: Sennrich et al. 2016 (arXiv 1508.07909).

A text is encoded line by line (a line keeps its "\\n"; one of more than MAX_LINE characters is cut there), so that
`encode(whole)` equals the lines' ids joined and a corpus of any size can be tokenised as a stream.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from importlib import resources
from numbers import Integral
from pathlib import Path

import sentencepiece

from hbll_seq.data.pieces import BLANK, SURROGATE, split_lines
from hbll_seq.data.tokenizer_training import train_model
from hbll_seq.utils.atomic import atomic_write
from hbll_seq.utils.reading import possible_name, quote, read_bytes, shorten
from hbll_seq.utils.values import as_whole, whole_or_none

DEFAULT_MODEL = "wikitext-2-bpe-4k.model"
MAX_MODEL = 1 << 26  # bytes of a model file
# Examples of what a lossy tokenizer changes: outer and double blanks, a ligature, a tab, CRLF, an emoji.
_PROBE = "  a  \ufb01\t\r\n \U0001f600 e\u0301 "


class Tokenizer:
    """A SentencePiece model that loses nothing: `decode(encode(s)) == s` for every valid Unicode string.

    Raises ValueError when the argument is no bytes or those of no SentencePiece model, or of one that is not lossless (no
    byte fallback, another normalisation than identity, a dummy prefix) or that has no end-of-text piece.
    """

    def __init__(self, model_proto: bytes) -> None:
        if not isinstance(model_proto, (bytes, bytearray, memoryview)):
            raise ValueError(
                f"model_proto is {quote(model_proto)}; it must be the bytes of a model file (from_file takes its name)"
            )
        model_proto = bytes(model_proto)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_proto)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError("not a SentencePiece model; make one with tokenizers/train_tokenizer.py") from error
        self.model_proto = model_proto
        self.fingerprint: str = hashlib.sha256(self.model_proto).hexdigest()
        self.vocab_size: int = self._processor.GetPieceSize()
        self.eos_id: int = self._processor.eos_id()
        try:
            self._bytes_of: list[bytes] = [self._piece_bytes(i) for i in range(self.vocab_size)]
        except ValueError as error:  # a piece that is not UTF-8, or no number where a byte should be
            raise ValueError(f"the model is damaged ({shorten(error)}); take an intact copy of it") from error
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
        file = _file_name(path)
        try:
            proto = read_bytes(file, MAX_MODEL)
        except OSError as error:
            raise ValueError(
                f"cannot read tokenizer {quote(str(path))}: {shorten(error.strerror)}; give a .model file"
            ) from error
        except ValueError as error:
            raise ValueError(f"cannot read tokenizer: {error}; give a .model file") from error
        try:
            return cls(proto)
        except ValueError as error:
            raise ValueError(f"tokenizer {quote(str(path))}: {error}") from error

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
        character_coverage: share of the text's characters that get a piece; the others fall back to bytes. The blank always
        gets one, also where the text holds none.
        Raises ValueError when the texts are empty, hold a lone surrogate, or support no vocabulary of that size, and for
        arguments of another type or outside their range.
        """
        return cls(train_model(texts, vocab_size, symbols, character_coverage, max_lines, seed))

    # -- using it -----------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special ids are added. Raises ValueError at a lone surrogate, TypeError for no string."""
        if not isinstance(text, str):
            raise TypeError(f"encode takes a str, not {type(text).__name__}")
        return [i for ids in self.encode_batch(list(split_lines(text)), num_threads=1) for i in ids]

    def encode_batch(self, lines: list[str], num_threads: int = 1) -> list[list[int]]:
        """Ids of every line (as `split_lines` cuts them), computed by that many native threads.

        Raises ValueError for what is no list of strings, or at a lone surrogate.
        """
        if not isinstance(lines, (list, tuple)):
            raise ValueError(f"lines is {quote(lines)}; it must be a list of str")
        lines, num_threads = list(lines), as_whole("num_threads", num_threads, 1)
        for line in lines:
            if not isinstance(line, str):
                raise ValueError(f"lines holds {quote(line)}; every item must be a str")
            if not line.isascii() and (bad := SURROGATE.search(line)):
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
        """Text of the ids (any 1-D sequence of whole numbers, tensors included). Special ids are dropped; bytes that are
        not UTF-8, such as a character cut in two, become U+FFFD.

        Raises ValueError for anything else, and for an id outside the vocabulary.
        """
        ids = _id_list(ids)
        for i in ids:
            if type(i) is not int and (isinstance(i, bool) or not isinstance(i, Integral)):
                raise ValueError(f"id {quote(i)} is no whole number; ids are 0 .. {self.vocab_size - 1}")
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {quote(i)} is outside the vocabulary; ids are 0 .. {self.vocab_size - 1}")
        return b"".join([self._bytes_of[i] for i in ids]).decode("utf-8", errors="replace")

    def bytes_of(self, i: int) -> bytes:
        """What an id adds to the UTF-8 bytes of a text: a character may need several ids, a special id adds nothing.

        Raises ValueError as :meth:`piece`.
        """
        self.piece(i)
        return self._bytes_of[i]

    def piece(self, i: int) -> str:
        """The name of a piece, unlike that of any other; of a special id such as ``<|endoftext|>``.

        Raises ValueError for an id outside the vocabulary.
        """
        if whole_or_none(i) is None or not 0 <= i < self.vocab_size:
            raise ValueError(f"id {quote(i)} is outside the vocabulary; ids are 0 .. {self.vocab_size - 1}")
        return self._processor.IdToPiece(int(i))

    def is_special(self, i: int) -> bool:
        """Whether an id stands for no text: end of text, or the id of what is unknown. Raises ValueError as :meth:`piece`."""
        self.piece(i)
        return self._processor.IsControl(int(i)) or self._processor.IsUnknown(int(i))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the .model file atomically (aside, fsync, rename).

        Raises ValueError when no file could have that name, OSError when it cannot be written; an older file stays.
        """
        atomic_write(_file_name(path), self.model_proto)


def _id_list(ids: Iterable[int]) -> list[int]:
    if isinstance(ids, (str, bytes, Mapping, Set)):
        raise ValueError(f"ids is {quote(ids)}; give a 1-D sequence of whole numbers")
    try:
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    except (TypeError, ValueError, RuntimeError) as error:  # no sequence; a tensor without values ("meta")
        raise ValueError(f"ids is {quote(ids)}; give a 1-D sequence of whole numbers") from error
    if not isinstance(ids, list):
        raise ValueError(f"ids is {quote(ids)}, without a dimension; give a 1-D sequence of whole numbers")
    return ids


def _file_name(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"path is {quote(path)}; it must be the name of a file")
    return possible_name(path)
