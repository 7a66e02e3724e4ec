"""Sequence models trained without backpropagation through depth or time, and run at the depth you choose.

What is public is imported when it is first asked for: ``import hbll_seq`` and ``hbll-seq --help`` take no time, where torch
takes seconds. Type checkers and editors read ``__init__.pyi``, which a test compares with the table below.
"""

import importlib

__version__ = "0.4.0"

#: module -> what it holds of the public names
_PUBLIC = {
    "chains.time_tree": ("RecurrentTree",),
    "data.tokenizer": ("Tokenizer",),
    "data.tokens": ("TokenStream", "load_tokens"),
    "data.windows": ("TokenWindows",),
    "engine.linearization.base": ("Diagonal", "Identity", "Zero"),
    "engine.linearization.low_rank": ("LowRank",),
    "engine.linearization.shared_matrix": ("SharedMatrix",),
    "evaluation.perplexity": ("evaluate_paths",),
    "generation.sampling": ("SamplingParams",),
    "generation.speculative": ("Speculation",),
    "layers.cells": ("make_cell",),
    "models.causal_lm": ("HBLLForCausalLM",),
    "models.config": ("HBLLConfig",),
    "models.generate": ("generate",),
    "models.hierarchy": ("DepthHierarchy",),
    "models.image_classification": ("HBLLForImageClassification", "HBLLImageConfig"),
    "models.recurrent": ("RecurrentLM", "RecurrentModel"),
    "models.sequence_classification": ("HBLLClassifierConfig", "HBLLForSequenceClassification"),
    "objectives.backprop": ("BackpropObjective",),
    "objectives.base": ("ObjectiveOutput",),
    "objectives.control": ("Adaptive",),
    "objectives.local": ("LocalObjective",),
    "objectives.options": ("DepthMix", "Sweeps", "TimeTree", "Tree", "TreeGuess", "VCycles"),
    "objectives.recurrent": ("RecurrentBackpropObjective", "RecurrentLocalObjective", "RecurrentOutput"),
    "tree.topology": ("DyadicTree",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _PUBLIC.items() for name in names}
#: the folders, which were attributes when all was imported at once
_FOLDERS = {module.partition(".")[0] for module in _PUBLIC} | {"layers", "training", "utils"}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    """A public name, or one of the package's folders."""
    if name in _MODULE_OF:
        globals()[name] = value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value
    if name in _FOLDERS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
