"""A heat map of token losses as HTML: a row for each depth, a column for each token. It needs no script and no file."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator

from hbll_seq.evaluation.token_losses import TokenLosses
from hbll_seq.utils.console import printable

#: nats at which the darkest colour is reached: a token that was thought less likely than one in 3,000
MOST = 8.0
#: colours from 0 nats to ``MOST``
_COLOURS = ((255, 250, 235), (253, 212, 158), (244, 136, 100), (193, 60, 105), (95, 26, 105))
#: widths of a line of tokens and of a cell's number, in characters
_LINE, _NUMBER = 108, 5
CSS = """
.heat { overflow-x: auto; line-height: 1.25; }
.heat table { border-collapse: collapse; margin: 0 0 14px; width: auto; font-size: 13px; }
.heat table, .heat tr, .heat th, .heat td { border: 0 !important; }
.heat th, .heat td { padding: 2px 5px; text-align: center; white-space: pre; min-width: 2.6em; }
.heat th { font-weight: 600; padding-bottom: 4px; }
.heat th.row { text-align: right; font-weight: 400; min-width: 9.5em; opacity: .8; }
.heat td { font-size: 10.5px; font-variant-numeric: tabular-nums; }
.heat .word { border-left: 2px solid var(--body-background-fill, white) !important; }
.heat .scale { display: inline-block; width: 160px; height: 11px; margin: 0 6px; vertical-align: -1px; }
.heat p { margin: 0 0 12px; font-size: 13px; }
.heat .words td { font-size: 13px; text-align: right; padding: 2px 9px; }
.heat .words td:first-child { text-align: left; font-weight: 600; }
"""


def heat_map(losses: TokenLosses) -> str:
    """The losses as HTML, styled by ``CSS``: what of the text is hard at which depth, and below, which words need depth."""
    means = losses.nats.mean(1).tolist()
    rows = losses.nats.tolist()
    parts = [f'<p>How surprised each depth is by each token, in nats: 0 <span class="scale" style="background: '
             f'{_gradient()}"></span> {MOST:g} and more. Behind each depth its mean.</p>']
    for start, end in _lines(losses.tokens):
        heads = "".join(f"<th{_word(losses.tokens[i])}>{_shown(losses.tokens[i])}</th>" for i in range(start, end))
        lines = [f'<tr><th class="row"></th>{heads}</tr>']
        for name, mean, row in zip(losses.names, means, rows):
            cells = "".join(_cell(name, losses.tokens[i], row[i]) for i in range(start, end))
            lines.append(f'<tr><th class="row">{html.escape(name)} &nbsp;{mean:.2f}</th>{cells}</tr>')
        parts.append(f"<table>{''.join(lines)}</table>")
    return f'<div class="heat">{"".join(parts)}{_words(losses)}</div>'


def words_that_need_depth(losses: TokenLosses, n: int = 8) -> list[tuple[str, list[float]]]:
    """The ``n`` words whose loss falls most from the first path to the last, with their losses along all; most first."""
    gains = [((nats[0] - nats[-1]).item(), word, nats.tolist()) for word, nats in losses.words()]
    best = sorted((each for each in gains if each[0] > 0), key=lambda each: -each[0])
    return [(word, nats) for _, word, nats in best[:n]]


def _words(losses: TokenLosses) -> str:
    found = words_that_need_depth(losses) if len(losses.paths) > 1 else []
    if not found:
        return ""
    head = "".join(f'<th>{html.escape(name.removeprefix("depth "))}</th>' for name in losses.names)
    rows = "".join(f"<tr><td>{_shown(word)}</td>{''.join(_cell(name, word, x) for name, x in zip(losses.names, nats))}</tr>"
                   for word, nats in found)
    return ("<p>Words that need depth: their nats, by number of blocks.</p>"
            f'<table class="words"><tr><th></th>{head}</tr>{rows}</table>')


def _lines(tokens: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Where each line of the map begins and ends among the tokens. A line of the text takes one, or as many as it needs, each
    about as long as the others."""
    widths = [max(len(token), _NUMBER) + 1 for token in tokens]
    breaks = [i + 1 for i, token in enumerate(tokens) if "\n" in token or i + 1 == len(tokens)]
    for start, end in zip([0, *breaks], breaks):
        total = sum(widths[start:end])
        n_lines, line, passed = math.ceil(total / _LINE), 1, 0
        for i in range(start, end):
            passed += widths[i]
            if passed * n_lines >= total * line:
                yield start, i + 1
                start, line = i + 1, passed * n_lines // total + 1


def _cell(name: str, token: str, nats: float) -> str:
    red, green, blue = _colour(nats)
    ink = "#222" if 0.3 * red + 0.6 * green + 0.1 * blue > 140 else "#fff"
    title = f"{name}, {_shown(token)}: {nats:.2f} nats, probability {math.exp(-nats):.3g}"
    return (f'<td{_word(token)} style="background: rgb({red}, {green}, {blue}); color: {ink}" title="{html.escape(title)}">'
            f"{nats:.1f}</td>")


def _colour(nats: float) -> tuple[int, ...]:
    place = min(max(nats / MOST, 0.0), 1.0) * (len(_COLOURS) - 1)
    low = min(int(place), len(_COLOURS) - 2)
    return tuple(round(a + (b - a) * (place - low)) for a, b in zip(_COLOURS[low], _COLOURS[low + 1]))


def _gradient() -> str:
    return f"linear-gradient(90deg, {', '.join(f'rgb{colour}' for colour in _COLOURS)})"


def _word(token: str) -> str:
    return ' class="word"' if not token[:1].isalnum() else ""


def _shown(token: str) -> str:
    """A token as a person reads it: the end of a line as a sign, other control characters as escapes."""
    return html.escape(printable(token.replace("\n", "\u23ce").strip(" ") or "\u2423"))
