"""Names of pieces, limits and the cutting of a text into lines: shared by a tokenizer and its training."""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_LINE = 1 << 16  # characters

BLANK = "\u2581"  # SentencePiece writes a blank so; a text that holds this character itself needs the detour below

UNK_PIECE = "<|unknown|>"

EOS_PIECE = "<|endoftext|>"  # names no text is likely to hold; text never encodes to them

SURROGATE = re.compile("[\ud800-\udfff]")

MAX_VOCABULARY = (1 << 31) - 1  # ids are 32 bits wide


def split_lines(text: str) -> Iterator[str]:
    """Cuts a text after every newline, and a longer line every MAX_LINE characters; ''.join gives the text back."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start, start + MAX_LINE)
        end = start + MAX_LINE if newline < 0 else newline + 1
        yield text[start:end]
        start = end
