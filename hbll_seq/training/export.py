"""The results of a finished run: figures, the model in Hugging Face layout, and metrics.json."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.path_table import SPLITS
from hbll_seq.training.failures import RunFailed, remedy_for
from hbll_seq.training.plots import plot_perplexity_by_depth, plot_training_curve
from hbll_seq.training.run_folder import BY_DEPTH, CURVE, SUMMARY, exporting
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.training.trainer import Trainer
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
    shown = {name: _writable(value) for name, value in settings.notable().items()}
    if trainer.parts[1:]:
        shown["extended by"] = ", ".join(f"{steps:,} steps" for steps in trainer.parts[1:])
    try:
        with exporting(folder) as finish:
            plot_training_curve(rows, evaluations, folder / CURVE)
            plot_perplexity_by_depth({split: last[split] for split in SPLITS}, folder / BY_DEPTH)
            measured = {split: last[split] for split in SPLITS}
            model.save_pretrained(folder, data=_writable(settings.data), settings=shown, perplexity=measured,
                                  steps=trainer.done, tokens=trainer.tokens)
            finish(to_json(summary, indent=1) + "\n")
    except (OSError, ValueError) as error:
        raise RunFailed(f"the results could not be written to {folder}: {shorten(error, 250)}; the last checkpoint is kept: "
                        f"{remedy_for(error)}, then --resume") from None
    written = [name for name in (SUMMARY, CURVE, BY_DEPTH) if (folder / name).exists()]
    say(f"finished: {folder} holds the model, {', '.join(written)}")


def _writable(value: Any) -> Any:
    """The value for a UTF-8 file: bytes of a file's name that are no UTF-8 are written as escapes."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


def count_parameters(model: HBLLForCausalLM) -> int:
    """Of all depths together; :meth:`HBLLForCausalLM.n_parameters` counts what one path uses."""
    return sum(p.numel() for p in model.parameters())
