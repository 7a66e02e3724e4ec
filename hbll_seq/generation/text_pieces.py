"""Token ids to text as they come, cut before a stop string, and what is handed back of it."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.utils.console import ForgivingStream, printable


class Alternative(NamedTuple):
    """A token that could have come: ``token`` is its id, ``text`` what it stands for, ``logprob`` its log-probability."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Generation:
    """One text that was drawn, and how.

    Attributes:
        prompt: as it was given.
        text: the new text, without the prompt; it ends before a stop string.
        tokens: the ids that were drawn, those of the stop string included, that of the end of the text not.
        logprobs: of each token the natural logarithm of its probability under the model's own distribution along the path:
            temperature 1, nothing left out.
        alternatives: at each token the most probable ones, the most probable first; as many as were asked for.
        reason: why it ended: ``"eos"`` (end of text), ``"stop"`` (a stop string) or ``"length"`` (``max_new_tokens``).
        path: the blocks that were run.
        sample: number among the samples of its prompt, from 0.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    alternatives: tuple[tuple[Alternative, ...], ...]
    reason: str
    path: tuple[int, ...]
    sample: int = 0


class TextPieces:
    """Turns token ids into text as they come. What may still change is held back: bytes that are no whole character yet,
    and text that may become a stop string.

    Args:
        tokenizer: decodes the ids.
        stop: texts before which the text ends; None for none. It ends before the one that is complete first, of several
            that end at the same character before the longest.

    Attributes:
        stopped: whether the text has come to hold a stop string; nothing more comes then.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] | None = None):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop or (), False
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")  # holds the bytes of one that is not whole yet
        self._may_stop = ""  # the beginning of a stop string, perhaps

    def push(self, token: int) -> str:
        """Text that ``token`` makes certain; may be empty."""
        return self._certain(self._characters.decode(self.tokenizer.bytes_of(token)), at_end=False)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for bytes that never became a character."""
        return self._certain(self._characters.decode(b"", final=True), at_end=True)

    def _certain(self, text: str, at_end: bool) -> str:
        if self.stopped:
            return ""
        text, self._may_stop = self._may_stop + text, ""
        if found := [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]:
            self.stopped = True
            return text[: min(found)[1]]
        if at_end or not self.stop:
            return text
        longest = min(len(text), max(map(len, self.stop)) - 1)
        n_held = next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)
        keep = len(text) - n_held
        self._may_stop = text[keep:]
        return text[:keep]


def stdout_writer() -> Callable[[str], None]:
    """A function that writes text to stdout at once. It never raises: the text is also returned. On a terminal it shows
    control characters as escapes, since they could steer it."""
    out = ForgivingStream(sys.stdout)
    shown = printable if out.isatty() else str

    def write(text: str) -> None:
        out.write(shown(text))
        out.flush()

    return write
