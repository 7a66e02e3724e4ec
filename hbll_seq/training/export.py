"""The results of a finished run: figures, the model in Hugging Face layout, and metrics.json."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.path_table import SPLITS
from hbll_seq.training.failures import RunFailed, remedy_for
from hbll_seq.training.plots import plot_perplexity_by_depth, plot_training_curve
from hbll_seq.training.run_folder import exporting
from hbll_seq.training.run_record import BY_DEPTH, CURVE, PICTURES, SUMMARY, TRADEOFF, TREE
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.training.settings_read import notable
from hbll_seq.training.trainer import Trainer
from hbll_seq.training.tree_plots import exit_weights, losses_of_nodes, plot_tradeoff, plot_tree, time_paths
from hbll_seq.utils.console import say
from hbll_seq.utils.reading import shorten, to_json


def export(model: HBLLForCausalLM, settings: TrainingSettings, trainer: Trainer, evaluations: list[dict]) -> None:
    """Write the run's results; metrics.json, which marks it finished, comes last.

    Args:
        model: as it was trained.
        settings: of the run, resolved.
        trainer: that has come to the end.
        evaluations: lines of evaluations.jsonl; the last one is that of the end.

    Raises:
        RunFailed: they cannot be written.
    """
    folder, last, rows = trainer.folder, evaluations[-1], trainer.metrics.rows()
    summary = {
        "step": trainer.done,
        "extended": trainer.parts[1:],
        "tokens": trainer.tokens,
        "seconds": trainer.seconds,
        "loss": rows[-1].get("loss") if rows else None,
        "n_parameters": count_parameters(model),
        "validation": last["validation"],
        "test": last["test"],
        "samples": last["samples"],
        "settings": asdict(settings),
    }
    shown = {name: _writable(value) for name, value in notable(settings).items()}
    if trainer.parts[1:]:
        shown["extended by"] = ", ".join(f"{steps:,} steps" for steps in trainer.parts[1:])
    try:
        with exporting(folder) as finish:
            _draw(model, settings, rows, evaluations, folder)
            card = dict(data=_writable(settings.data), settings=shown, steps=trainer.done, tokens=trainer.tokens,
                        perplexity={split: last[split] for split in SPLITS},
                        pictures=[name for name in PICTURES if (folder / name).exists()])
            model.write_into(folder, card)
            finish(to_json(summary, indent=1) + "\n")
    except (OSError, ValueError) as error:
        raise RunFailed(f"the results could not be written to {folder}: {shorten(error, 250)}; the last checkpoint is kept: "
                        f"{remedy_for(error)}, then --resume") from None
    written = [name for name in (SUMMARY, *PICTURES) if (folder / name).exists()]
    say(f"finished: {folder} holds the model, {', '.join(written)}")


def _draw(
    model: HBLLForCausalLM, settings: TrainingSettings, rows: list[dict], evaluations: list[dict], folder: Path
) -> None:
    """The run's figures. Raises OSError where one cannot be written."""
    last = evaluations[-1]
    plot_training_curve(rows, evaluations, folder / CURVE)
    plot_perplexity_by_depth({split: last[split] for split in ("validation", "test")}, folder / BY_DEPTH)
    plot_tradeoff(last["test"], time_paths(model, {row["name"]: row["path"] for row in last["test"]}), folder / TRADEOFF)
    of_tree, sweeps = settings.objective == "tree", settings.inference() if settings.objective == "sweeps" else None
    weights = [1.0] * model.tree.n_nodes if of_tree else exit_weights(settings.depths(), model.tree, sweeps)
    if losses := losses_of_nodes(rows, weights):  # backprop has none, a path alone those of its blocks
        plot_tree(model.tree, losses, settings.objective, folder / TREE)


def _writable(value: Any) -> Any:
    """The value for a UTF-8 file: bytes of a file's name that are no UTF-8 are written as escapes."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


def count_parameters(model: HBLLForCausalLM) -> int:
    """Of all depths together; :meth:`HBLLForCausalLM.n_parameters` counts what one path uses."""
    return sum(p.numel() for p in model.parameters())
