"""Command lines: a parser that names the option which was meant, and tells in one line what is wrong."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable

from hbll_seq.utils.reading import quote, shorten


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ValueErrors of one line, which say where the help is and what may have been meant.

    Options are written out: an abbreviation would change its meaning with the next option that begins alike. Descriptions
    and epilogs are shown as they are written.
    """

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def parse_args(self, args=None, namespace=None):
        """As argparse, but that an unknown option is named with the nearest known one. Raises ValueError."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            option = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
            self.error(f"unrecognized arguments: {shorten(' '.join(unknown), 300)}{self._meant(option)}")
        return found

    def error(self, message: str):
        """Raises ValueError with the message, and where the help is."""
        raise ValueError(f"{shorten(message, 400)} (see {self.prog} --help)")

    def _check_value(self, action, value):
        if action.choices is not None and isinstance(value, str) and value not in action.choices:
            allowed = ", ".join(map(str, action.choices))
            hint = did_you_mean(value, map(str, action.choices))
            raise argparse.ArgumentError(action, f"{quote(value)} is none of {allowed}{hint}")
        super()._check_value(action, value)

    def _meant(self, option: str) -> str:
        """What is said of an option that there is not."""
        known = (name for name in self._option_string_actions if name.startswith("--"))
        return did_you_mean(option.replace("_", "-"), known)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the nearest known word; nothing where none is near."""
    near = difflib.get_close_matches(word[:100], list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
