"""Tables of a comparison on images, beside the paper's figures where the images are CIFAR's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from comparisons import paper
from comparisons.report import Runs, report_depth, rows_by_depth

#: three classes of each, by which the images are known to be CIFAR's
_KNOWN = {"CIFAR-10": (10, {"airplane", "frog", "truck"}), "CIFAR-100": (100, {"apple", "pickup_truck", "worm"})}


def paper_of(classes: Sequence[str]) -> str | None:
    """Which of the paper's data sets has these classes; None for others."""
    return next((name for name, (n, some) in _KNOWN.items() if len(classes) == n and some <= set(classes)), None)


def report_images(runs: Runs, setting: Mapping) -> str:
    """The figures by depth, what they cost, and the paper's.

    Args:
        runs: see ``report.py``.
        setting: of the file of results.
    """
    what = [setting["paper"] or f"{setting['n_classes']} classes", f"{setting['train_images']:,} images",
            f"{setting['epochs']} epochs of {setting['batch_size']} images a step",
            f"patches of {setting['patch_size']} pixels, width {setting['n_embd']}",
            "shifted and mirrored" if setting["augment"] else "as they are"]  # fmt: skip
    if setting["missing"]:
        what.append(f"{setting['missing']:.0%} of the patches missing")
    if setting["wrong_labels"]:
        what.append(f"{setting['wrong_labels']:.0%} of the training labels wrong")
    lines = ["; ".join(what), report_depth(runs, "accuracy")]
    if any("top5" in row for of_method in runs.values() for run in of_method for row in run["test"]):
        lines += ["", "test top-5 accuracy", *rows_by_depth(runs, "top5")]
    return "\n".join([*lines, *_papers(setting)])


def _papers(setting: Mapping) -> list[str]:
    """The paper's figures for this data, a line each."""
    name, missing, wrong = setting["paper"], setting["missing"], setting["wrong_labels"]
    if name is None:
        return []
    figure = "accuracy" if name == "CIFAR-10" else "top-5 accuracy"
    by_depth = [f"{depth}: {ours:.2f} / {tree:.2f}" for depth, (ours, tree) in paper.IMAGES[name].items()]
    told = [f"paper, all images, {paper.EPOCHS['images']} epochs, {figure} by blocks, backprop / hierarchy: "
            f"{', '.join(by_depth)}"]  # fmt: skip
    if name == "CIFAR-10":
        table = {**{f"{share:.0%} missing": pair for share, pair in paper.MISSING.items() if missing},
                 **{f"{share:.0%} wrong": pair for share, pair in paper.WRONG.items() if wrong}}  # fmt: skip
        told += [f"paper, {what}: {ours:.2f} / {tree:.2f}" for what, (ours, tree) in table.items()]
    return ["", *told]
