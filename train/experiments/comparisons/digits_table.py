"""One table of all stored files of ``seqmnist.py``: every N and cell, beside the figures that the paper prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from comparisons.paper import DIGITS_OVER_TIME, EPOCHS
from comparisons.report import join_paired, paired
from comparisons.results import Comparison, Results, StoredMethod, stored_setting
from comparisons.statistics import told


class File(NamedTuple):
    """A file of results: its name, its setting, and a method's name -> its runs at its learning rate, one a seed."""

    name: str
    setting: Mapping[str, Any]
    runs: Mapping[str, Sequence[dict]]

    @property
    def task(self) -> tuple[bool, str, int]:
        """Whether the pixels are permuted, the cell, and N."""
        return self.setting["permutation_seed"] is not None, self.setting["cell"], self.setting["n_steps"]


def error_rate(run: dict) -> float:
    """What decides between learning rates, in percent of the validation images; 0 where none were held out, and so the first
    rate is taken."""
    return 100.0 - run["validation"]["deployed"] if "validation" in run else 0.0


def stored_files(folder: Path) -> list[File]:
    """All files of results of sequential and permuted MNIST, in the order of task, cell and N; short trials are left out.

    Raises:
        ValueError: there is none.
    """
    paths = [path for name in ("smnist-*.json", "psmnist-*.json") for path in folder.glob(name) if "-quick" not in path.stem]
    if not paths:
        raise ValueError(f"{folder} holds no file [p]smnist-N-CELL.json: make one without --table, or name another folder")
    return sorted(map(_read, paths), key=lambda file: (file.task, file.name))


def _read(path: Path) -> File:
    """A file with the runs of each method at the rate that the method's first seed found best. A name whose defaults have
    changed since stands for what it did last."""
    results = Results(path, stored_setting(path), "time")
    comparison = Comparison(results, None, error_rate)
    methods = [StoredMethod(*which) for which in {run["method"]: run["description"] for run in results.runs}.items()]
    first_seeds = {StoredMethod(run["method"], run["description"]): run["seed"] for run in reversed(results.runs)}
    seeds = sorted({run["seed"] for run in results.runs})
    rate = lambda method: comparison.stored_rate(method, first_seeds[method])
    return File(path.stem, results.setting, comparison.at_rates(methods, rate, seeds) if methods else {})


def report_digits(files: Sequence[File]) -> str:
    """The table, by seeds the differences from BPTT, and which cells of the paper's table no file holds.

    Args:
        files: see :func:`stored_files`.
    """
    columns = ("task", "cell", "N", "hidden", "images", "epochs", "lr", "seeds", "deployed", "tree", "f_D", "paper")
    lines = [f"test accuracy in %, mean and standard deviation over seeds; the paper: hidden 2048, "
             f"{EPOCHS['digits over time']} epochs of 60,000 images, its deployed cell / tree, or BPTT",
             _line(*columns, "method")]  # fmt: skip
    for file in files:
        lines += _rows(file)
    lines += ["", *_differences(files), _missing(files)]
    return "\n".join(lines)


#: of all columns but the last, the method's name
WIDTHS = (7, 6, 3, 6, 6, 6, 6, 5, 13, 13, 13, 11)


def _line(*cells: object) -> str:
    return "  ".join([*(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS)), str(cells[-1])])


def _rows(file: File) -> Iterator[str]:
    (permuted, cell, n), setting = file.task, file.setting
    epochs = setting["steps"] // max(1, setting["train_images"] // setting["batch_size"])
    network = f"{'p' * permuted}sMNIST", cell, n, setting["hidden_size"], setting["train_images"], epochs
    for name, runs in file.runs.items():
        figures = (told([run["test"][read] for run in runs if read in run["test"]]) for read in ("deployed", "tree", "top"))
        yield _line(*network, f"{runs[0]['lr']:.2g}", len(runs), *figures, _printed(file.task, name), name)


def _printed(task: tuple[bool, str, int], name: str) -> str:
    """The paper's figures of the method's kind: of its tree two, of BPTT one."""
    permuted, cell, n = task
    deployed, tree, bptt = DIGITS_OVER_TIME.get((cell, permuted), {}).get(n, (None, None, None))
    kind = name.partition(":")[0]
    if bptt is None or kind not in ("tree", "bptt"):
        return "-"
    return f"{bptt:.1f}" if kind == "bptt" else f"{deployed:.1f} / {tree:.1f}"


def _differences(files: Sequence[File]) -> Iterator[str]:
    def difference(run: dict, reference: dict) -> float:
        return run["test"]["deployed"] - reference["test"]["deployed"]

    yield "deployed minus BPTT in points, at equal steps:"
    for file in files:
        reference = file.runs.get("bptt", ())
        parts = ((name, paired(runs, reference, difference)) for name, runs in file.runs.items() if name != "bptt")
        yield f"  {file.name}: " + join_paired(parts, "+.2f", "no run of both")


def _missing(files: Sequence[File]) -> str:
    held = {file.task for file in files}
    found = []
    for (cell, permuted), rows in DIGITS_OVER_TIME.items():
        if absent := [str(n) for n in rows if (permuted, cell, n) not in held]:
            found.append(f"{'p' * permuted}sMNIST {cell} N = {', '.join(absent)}")
    return "of the paper's table no file holds: " + ("; ".join(found) or "nothing is missing")
