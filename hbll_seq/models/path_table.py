"""What is known of each path of a model: the file ``paths.json`` of its folder, and the table that people read.

The file holds what ``evaluation.evaluate_paths`` measured, by split, and how many parameters each path uses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hbll_seq.tree.topology import DyadicTree, path_text
from hbll_seq.utils.reading import parse_json, quote
from hbll_seq.utils.tables import table
from hbll_seq.utils.values import number_or_none, whole_or_none

#: the splits that perplexities are stored of; depths are chosen by the first.
SPLITS = ("validation", "test")
#: what each row of the file holds: numbers, but for ``name`` and ``path``; the last three may be missing.
_NEEDED, _OPTIONAL = ("path", "depth", "loss", "perplexity", "n_parameters"), (
    "name", "word_perplexity", "bits_per_byte", "tokens",
)  # fmt: skip
_WHOLE = ("depth", "n_parameters", "tokens")
MAX_ROWS, MAX_NAME = 100_000, 1_000

Path = tuple[int, ...]


@dataclass(frozen=True)
class PathTable:
    """Perplexities of a model's paths, as they were measured on its present weights.

    Attributes:
        splits: of ``SPLITS`` those that were measured -> rows with the keys ``path``, ``depth``, ``loss`` (nats per token),
            ``perplexity`` (per token; None where it is too large for a number), ``n_parameters`` (that the path uses), and
            maybe ``name``, ``word_perplexity``, ``bits_per_byte`` and ``tokens`` (scored).
    """

    splits: dict[str, tuple[dict[str, Any], ...]]

    @classmethod
    def of(cls, perplexity: Any, tree: DyadicTree, n_parameters: Callable[[Path], int]) -> PathTable:
        """The table of what was measured.

        Args:
            perplexity: split -> rows as ``evaluate_paths`` makes them; or rows alone, which are those of the first split. A
                row without a finite loss is left out.
            tree: of the model.
            n_parameters: how many parameters a path uses.

        Raises:
            ValueError: a split or a row is not such.
        """
        splits = perplexity if isinstance(perplexity, Mapping) else {SPLITS[0]: perplexity}
        if not splits:
            raise ValueError(f"perplexity={quote(perplexity)}: must have rows of {' or '.join(SPLITS)}")
        finite = {}
        for name, rows in splits.items():
            plain = [_plain(row, tree, n_parameters) for row in _checked_split(name, rows)]
            finite[name] = tuple(_checked_rows(name, [row for row in plain if row["loss"] is not None], tree))
        return cls({name: rows for name, rows in finite.items() if rows})

    @classmethod
    def read(cls, text: str | bytes, tree: DyadicTree) -> PathTable:
        """Inverse of :meth:`text`, strict. Raises ValueError for anything else."""
        values = parse_json(text)
        if not isinstance(values, dict) or not values:
            raise ValueError(f"it must hold an object of the splits {' and '.join(SPLITS)}, not {quote(values)}")
        return cls({name: tuple(_checked_rows(name, _checked_split(name, rows), tree)) for name, rows in values.items()})

    def text(self) -> str:
        """The file."""
        rows = {name: [json.dumps(row) for row in rows] for name, rows in self.splits.items()}  # a row is a line
        parts = [f'"{name}": [\n  ' + ",\n  ".join(lines) + "\n ]" for name, lines in rows.items()]
        return "{\n " + ",\n ".join(parts) + "\n}\n"

    def perplexities(self, split: str = SPLITS[0]) -> dict[Path, float]:
        """Path -> perplexity per token, of one split; none where it was not measured."""
        rows = self.splits.get(split, ())
        return {tuple(row["path"]): math.inf if row["perplexity"] is None else row["perplexity"] for row in rows}

    def of_blocks(self, blocks: Path) -> dict[str, list[dict[str, Any]]]:
        """The rows whose paths these blocks hold, by split."""
        found = {name: [row for row in rows if set(row["path"]) <= set(blocks)] for name, rows in self.splits.items()}
        return {name: rows for name, rows in found.items() if rows}


@dataclass(frozen=True)
class PathRow:
    """A path of a model and what is known of it.

    Attributes:
        depth: its number of blocks.
        path: their numbers.
        trained: whether it was trained, or nobody has said.
        validation, test: stored perplexity per token; None where none is stored.
        n_parameters: that it uses, embedding and head included.
        ms_per_token: measured milliseconds for a token of one text; None where it was not measured.
    """

    depth: int
    path: Path
    trained: bool
    validation: float | None
    test: float | None
    n_parameters: int
    ms_per_token: float | None = None


class PathReport(Sequence):
    """The rows of ``model.paths()``; as text a table, by :meth:`to_dicts` plain values for JSON."""

    def __init__(self, rows: Sequence[PathRow]):
        self.rows = tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PathRow:
        return self.rows[index]

    def __iter__(self) -> Iterator[PathRow]:
        return iter(self.rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """A dictionary for each row, of the fields of :class:`PathRow`."""
        return [{**asdict(row), "path": list(row.path)} for row in self.rows]

    def __str__(self) -> str:
        columns = ["depth", "validation", "test", "parameters", "ms/token", "path"]
        lines = [[
            str(row.depth), _number(row.validation, 2), _number(row.test, 2), f"{row.n_parameters:,}",
            _number(row.ms_per_token, 2), path_text(row.path) + " (not trained)" * (not row.trained),
        ] for row in self.rows]  # fmt: skip
        shown = [k for k, name in enumerate(columns) if name in ("depth", "parameters", "path") or any(r[k] for r in lines)]
        head, *rows = ([line[k] for k in shown] for line in (columns, *lines))
        return table(head, rows, [">"] * (len(shown) - 1) + ["<"]).removesuffix("\n")

    def __repr__(self) -> str:
        return f"PathReport of {len(self)} paths\n{self}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}" if value < 1e6 else f"{value:.1e}"


def _checked_split(name: Any, rows: Any) -> Sequence[dict]:
    if name not in SPLITS:
        raise ValueError(f"split {quote(name)}: allowed are {', '.join(SPLITS)}")
    if not isinstance(rows, (list, tuple)) or not 0 < len(rows) <= MAX_ROWS or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{name}={quote(rows)}: must be a list of rows, as evaluate_paths makes them")
    return rows


def _plain(row: dict, tree: DyadicTree, n_parameters: Callable[[Path], int]) -> dict[str, Any]:
    """The keys of a row of ``evaluate_paths`` that are stored, as plain values."""
    if missing := [key for key in ("path", "loss", "perplexity") if key not in row]:
        raise ValueError(f"a row lacks {missing[0]}: give rows as evaluate_paths makes them")
    path = tree.validate_path(row["path"])
    plain = {"path": path, "depth": len(path), "n_parameters": n_parameters(path)}
    for key in ("name", "depth", "loss", "perplexity", "word_perplexity", "bits_per_byte", "tokens"):
        if key in row:
            value, whole = row[key], whole_or_none(row[key])
            plain[key] = value if key == "name" else whole if key in _WHOLE and whole is not None else _finite(value)
    return plain


def _finite(value: Any) -> Any:
    """A number as a float, None for one that is not finite; anything else as it is, for the check that follows."""
    number = number_or_none(value)
    is_nan = isinstance(value, float) and math.isnan(value)
    return None if is_nan or number == math.inf else value if number is None else number


def _checked_rows(split: str, rows: Sequence[dict], tree: DyadicTree) -> Iterator[dict[str, Any]]:
    """Every row, its path a tuple. Raises ValueError for one that was not written here."""
    seen: set[Path] = set()
    for row in rows:
        if unknown := [key for key in row if key not in _NEEDED + _OPTIONAL]:
            raise ValueError(f"{split}: unknown key {quote(unknown[0])}; a row has {', '.join(_NEEDED + _OPTIONAL)}")
        if missing := [key for key in _NEEDED if key not in row]:
            raise ValueError(f"{split}: a row lacks {missing[0]}")
        path = tree.validate_path(row["path"])
        if path in seen:
            raise ValueError(f"{split}: path={quote(list(path))} is there twice; remove one")
        seen.add(path)
        for key, value in row.items():
            _check_value(f"{split}: path={quote(list(path))}", key, value)
        if row["depth"] != len(path):
            raise ValueError(f"{split}: depth={quote(row['depth'])} of path={quote(list(path))}: must be {len(path)}")
        yield {**row, "path": path}


def _check_value(where: str, key: str, value: Any) -> None:
    if key == "path":
        return
    if key == "name":
        good, allowed = isinstance(value, str) and len(value) <= MAX_NAME, f"a text of at most {MAX_NAME} characters"
    elif key in _WHOLE:
        good, allowed = (whole_or_none(value) or 0) > 0, "a whole number above 0"
    else:
        low = 0 if key in ("loss", "bits_per_byte") else 1
        too_large = value is None and key != "loss"
        good = too_large or (number_or_none(value) is not None and value >= low)
        allowed = f"a number of at least {low}" + ", or null where it is too large for one" * (key != "loss")
    if not good:
        raise ValueError(f"{where}: {key}={quote(value)}: must be {allowed}")
