"""Depth as a dial: which path a word names, the table of a model's paths, and one path as a model of its own.

``model`` is an :class:`hbll_seq.HBLLForCausalLM` in all functions here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from hbll_seq.generation.decoding import Decoding
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.layers.base import Cell
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.models.path_table import SPLITS, PathReport, PathRow
from hbll_seq.models.save_checks import as_folder, refuse_taken
from hbll_seq.utils.reading import quote
from hbll_seq.utils.tensors import WithoutValues
from hbll_seq.utils.values import as_flag, as_whole, whole_or_none

Path = tuple[int, ...]
#: words that name a depth
WORDS = ("best", "fast")
#: ``depth="fast"`` is the path of fewest blocks whose stored perplexity is at most this times the best
FAST_WITHIN = 1.05
#: tokens of the prompt that is timed, and of the run before it
_PROMPT, _WARM = 8, 3


class AbsentBlock(Cell):
    """Stands for a block that the model does not hold (``config.blocks``), so that the others keep their numbers."""

    def __init__(self, n: int, held: Path):
        super().__init__()
        self.n, self.held = n, held

    def initial_state(self, start: Tensor | None = None) -> Any:
        """Raises ValueError: there is no such block."""
        raise ValueError(
            f"block {self.n} is not in this model, which holds those of the path {list(self.held)} alone (config.blocks): "
            "use the model that it was exported from"
        )

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Raises ValueError: there is no such block."""
        return self.initial_state()

    def extra_repr(self) -> str:
        """Its number, for ``print(model)``."""
        return f"{self.n}"


def path_of_depth(model: DepthHierarchy, depth: int) -> Path:
    """The path that a number of blocks names: the tree's default one; of a model that holds one path's blocks alone, that
    path for its own length.

    Raises:
        ValueError: there is no such depth, or the model does not hold its blocks.
    """
    held = model.config.blocks
    if held is not None and whole_or_none(depth) == len(held):
        return held
    path = model.tree.path_for_depth(depth)
    if held is not None and not set(path) <= set(held):
        depths = [len(p) for p in default_paths(model)]
        raise ValueError(
            f"depth={quote(depth)}: this model holds the blocks of the path {list(held)} alone (config.blocks); choose from "
            f"the depths {quote(depths)}, or use the model that it was exported from"
        )
    return path


def path_of_word(model: DepthHierarchy, word: str) -> Path:
    """The path that ``"best"`` or ``"fast"`` names.

    ``"best"`` is the trained path of the lowest stored validation perplexity (``model.path_table``), of equal ones that of
    the fewest blocks. ``"fast"`` is the trained path of the fewest blocks whose perplexity is at most ``FAST_WITHIN`` times
    that; where none is stored, the shallowest depth that was trained.

    Raises:
        ValueError: it is another word, or no perplexity of a trained path is stored for ``"best"``.
    """
    if word not in WORDS:
        n = len(model.config.full_path)
        raise ValueError(f"depth={quote(word)}: must be a whole number from 1 to {n}, 'best' or 'fast', of several prompts "
                         "also a list of these; leave it out for all blocks")
    stored = {} if model.path_table is None else model.path_table.perplexities()
    found = {path: value for path, value in stored.items() if model.config.is_trained(path) and _holds(model, path)}
    if found:
        limit = min(found.values()) * (FAST_WITHIN if word == "fast" else 1)
        return min((path for path, value in found.items() if value <= limit), key=lambda path: (len(path), found[path], path))
    if word == "best":
        raise ValueError(
            "depth='best': no validation perplexity is stored with this model (paths.json). Give a number, or store them by "
            "model.save_pretrained(folder, perplexity=evaluate_paths(model, windows)) and load that folder"
        )
    trained = model.config.trained_paths
    named = [path for path in trained if _holds(model, path)] if isinstance(trained, tuple) else []
    return min(named or default_paths(model), key=len)


def check_held(model: DepthHierarchy, path: Path) -> Path:
    """The path. Raises ValueError where the model does not hold its blocks."""
    if not _holds(model, path):
        raise ValueError(
            f"path={quote(list(path))}: this model holds the blocks of the path {list(model.config.blocks)} alone "
            "(config.blocks); leave the path out, or use the model that it was exported from"
        )
    return path


def _holds(model: DepthHierarchy, path: Path) -> bool:
    return set(path) <= set(model.config.full_path)


def default_paths(model: DepthHierarchy) -> list[Path]:
    """The paths that a report shows: every depth up to 7, then the powers of two minus one, and the full one; those whose
    blocks the model holds."""
    full = model.config.full_path
    depths = [k for k in range(1, len(full) + 1) if k <= 7 or k & (k + 1) == 0]
    paths = [model.tree.path_for_depth(k) for k in depths]
    return list(dict.fromkeys([*(path for path in paths if _holds(model, path)), full]))


def ms_per_token(model: DepthHierarchy, path: Path, n_tokens: int = 32) -> float:
    """Milliseconds that this machine needs now for a token of one text along ``path``, the reading of the prompt left out:
    the median, which an interruption moves little.

    Args:
        model: on the device that is to be measured.
        path: block numbers.
        n_tokens: how many are timed, after a short run that is not.
    """
    prompt = [token % model.config.vocab_size for token in range(_PROMPT)]
    for length in (_WARM, n_tokens + 1):
        decoding = Decoding(model, [prompt], path, SamplingParams(length, temperature=0))
        times = [time.perf_counter() for _ in decoding]  # each step waits for its token, on every device
    return 1000 * statistics.median(after - before for before, after in zip(times, times[1:]))


class DepthDial:
    """The methods of a :class:`hbll_seq.HBLLForCausalLM` that are about its paths."""

    def paths(self, n_tokens: int = 32, measure: bool = True) -> PathReport:
        """Depth as a table: ``print(model.paths())``; every default path, and those that were trained or measured.

        Args:
            n_tokens: how many tokens are timed along each path, after a short run that is not.
            measure: False leaves the times out.

        Returns:
            A list of :class:`hbll_seq.models.path_table.PathRow`: depth, path, stored validation and test perplexity,
            parameters used, and milliseconds a token, measured now on the model's device. Its text is a table.

        Raises:
            ValueError: an argument is out of range.
        """
        n_tokens, measure = as_whole("n_tokens", n_tokens, 1), as_flag("measure", measure)
        stored = {split: {} if self.path_table is None else self.path_table.perplexities(split) for split in SPLITS}
        named = self.config.trained_paths if isinstance(self.config.trained_paths, tuple) else ()
        listed = dict.fromkeys([*default_paths(self), *(path for paths in stored.values() for path in paths), *named])
        rows = []
        for path in sorted((path for path in listed if _holds(self, path)), key=lambda path: (len(path), path)):
            known = {split: stored[split].get(path) for split in SPLITS}
            rows.append(PathRow(
                len(path), path, self.config.is_trained(path), **known, n_parameters=self.n_parameters(path),
                ms_per_token=ms_per_token(self, path, n_tokens) if measure else None,
            ))  # fmt: skip
        return PathReport(rows)

    def export_path(
        self, path: int | str | Sequence[int], save_directory: str | PathLike[str], *, overwrite: bool = False,
        **metadata: Any,
    ) -> None:
        """Write a stand-alone model of one path's blocks, which loads like any other and gives the same logits.

        The tree, the block numbers and the exit adapters stay; the other blocks are left out (``config.blocks``). The path
        is then the full one, and shorter paths within it can be run too.

        Args:
            path: a depth or its word, as in :meth:`resolve_path`, or block numbers.
            save_directory: the folder.
            overwrite: replace a model that is there. A training run's folder is always refused.
            metadata: for the card, as in :meth:`save_pretrained`; stored perplexities of these blocks' paths go along.

        Raises:
            ValueError: as :meth:`resolve_path` and :meth:`save_pretrained`; or the folder holds a model or a run already.
        """
        is_depth = isinstance(path, str) or not hasattr(path, "__iter__")
        blocks = self.resolve_path(depth=path) if is_depth else self.resolve_path(path=path)
        refuse_taken(as_folder(save_directory), as_flag("overwrite", overwrite))
        trained = self.config.trained_paths
        if isinstance(trained, tuple):
            trained = tuple(each for each in trained if set(each) <= set(blocks)) or trained
        with WithoutValues(), torch.random.fork_rng(devices=[]):  # the values drawn here are all replaced
            alone = type(self)(replace(self.config, blocks=blocks, trained_paths=trained), tokenizer=self.tokenizer)
        names = set(alone.state_dict())
        alone.load_state_dict({name: value for name, value in self.state_dict().items() if name in names}, assign=True)
        if self.config.tie_embeddings:
            alone.head.projection.weight = alone.embed.weight
        if self.path_table is not None and "perplexity" not in metadata:
            metadata = {"perplexity": self.path_table.of_blocks(blocks) or None, **metadata}
        alone.save_pretrained(save_directory, **metadata)
