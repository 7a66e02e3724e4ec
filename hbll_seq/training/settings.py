"""Settings of a training run: one flat frozen dataclass, from which the command line and the preset files are checked.

A value is looked up in three layers, the later one wins: the defaults below, a preset (a YAML file of some of these
keys), the command line. ``resume`` says whether a resumed run may change a setting: "fixed" no, "free" yes, because no
weight depends on it, "resolved": what came of it is compared (``resuming.check_identity``).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hbll_seq.chains.layer import TimeOptions
from hbll_seq.chains.time import TIME_LINEARIZATIONS
from hbll_seq.engine.linearization.low_rank import SECANT_RANK
from hbll_seq.engine.solve import INITS
from hbll_seq.models.config import CELLS
from hbll_seq.models.exits import READOUTS
from hbll_seq.objectives.base import GRAPHS
from hbll_seq.objectives.depth_mix import DEFAULT_MIX, MIX_WEIGHTS, MIXES, OF_PREFIXES
from hbll_seq.training.option_values import PRECISIONS, check_range, coerce, expand_path
from hbll_seq.tree.topology import PATH_FAMILIES
from hbll_seq.utils.reading import possible_name, quote, read_yaml, shorten

DEFAULT_PRESET = "small"
#: settings that may name a file or folder
PATHS = ("data", "tokenizer", "cache_dir", "output_dir")
_NO_FILES = {"data": ("bundled", "wikitext-2", "wikitext-103"), "tokenizer": ("default", "train")}
#: names of settings that older versions did not have, so that their checkpoints lack them
LATER = frozenset({
    "carry_state", "cell", "corrections", "default_paths", "free_energy", "graphs", "init", "linearization", "mix",
    "mix_weight", "readout_by", "readout_rank", "sweeps", "time_chunk", "time_corrections", "time_linearization",
    "time_sweeps",
})  # fmt: skip
#: of what would otherwise end in an endless loop or the machine's whole memory
_MOST_ROUNDS, _MOST_WINDOWS, _WIDEST = 10_000, 2**20, 2**16


def _option(default: Any, group: str, help: str, *, low: float | None = None, high: float | None = None,
            below: float | None = None, choices: tuple[str, ...] | None = None, resume: str = "fixed") -> Any:
    metadata = {"group": group, "help": help, "low": low, "high": high, "below": below, "choices": choices,
                "resume": resume}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides how a language model is trained; see each option's ``help``.

    Raises:
        ValueError: a value has the wrong type or is out of range; the message names it, what is allowed, the remedy.
    """

    data: str = _option("bundled", "data", "training text: bundled (WikiText-2), wikitext-2, wikitext-103, a .txt / "
                        ".jsonl (also .gz, .xz, .zst) / .parquet file or folder, or a Hub id 'owner/name' or "
                        "'owner/name:config'",
                        resume="resolved")
    column: str = _option("text", "data", "column (or JSON key) that holds the text", resume="resolved")
    tokenizer: str = _option("default", "data", "default (bundled, 4,096 pieces), train (train one on the data and "
                             "cache it), or the path of a SentencePiece .model file", resume="resolved")
    vocab_size: int | None = _option(None, "data", "number of pieces for --tokenizer train", low=2, resume="resolved")
    cache_dir: str | None = _option(None, "data", "folder for tokenised text and trained "
                                    "tokenizers (default: ~/.cache/hbll_seq)", resume="free")
    num_proc: int | None = _option(None, "data", "CPU threads that tokenise (default: all cores)", low=1, high=1024,
                                  resume="free")

    n_level: int = _option(3, "model", "levels D of the tree: the full path has 2^D - 1 blocks", low=1, high=10)
    cell: str = _option("transformer", "model", f"kind of block: {', '.join(CELLS)}; or one for each block, as in "
                        "gru,transformer,gru")
    n_embd: int = _option(128, "model", "width of the stream", low=1, high=_WIDEST)
    n_head: int = _option(4, "model", "attention heads; must divide n_embd", low=1, high=_WIDEST)
    block_size: int = _option(128, "model", "context in tokens", low=1)
    mlp_ratio: int = _option(4, "model", "hidden width of a block's MLP in units of n_embd; 0: none, for recurrent blocks",
                             low=0, high=64)
    norm: str = _option("rmsnorm", "model", "normalisation", choices=("rmsnorm", "layernorm"))
    dropout: float = _option(0.0, "model", "dropout on residual branches", low=0, below=1)
    tie_embeddings: bool = _option(True, "model", "share the embedding's and the head's matrix")
    readout_rank: int | None = _option(None, "model", "rank of the corrections of a state before the head (default: 16 with "
                                       "--mix octaves, all or few, else 0)", low=0, high=_WIDEST)
    readout_by: str = _option("jump", "model", "what has a correction of its own: jump, each length of the head's jump, or "
                              "depth, each number of blocks", choices=READOUTS)
    default_paths: str = _option("auto", "model", "which blocks a depth runs: spine, the paper's, or prefix, which leaves "
                                 "the full path as late as it can; auto: prefix with --mix octaves, all or few, else spine",
                                 choices=("auto", *PATH_FAMILIES))

    objective: str = _option("sweeps", "objective", "sweeps: local losses from messages composed along the path; tree: the "
                             "paper's local losses on the binary tree; backprop: the baseline",
                             choices=("sweeps", "tree", "backprop"))
    path: str = _option("full", "objective", "blocks that sweeps or backprop train: full, or numbers such as 4,6,7")
    mix: str = _option("auto", "objective", "further paths that sweeps or backprop train in each step, so that every depth "
                       f"is useful; auto: {DEFAULT_MIX} for sweeps on the full path, else none", choices=("auto", *MIXES))
    mix_weight: float | None = _option(None, "objective", "weight of the mix's losses beside the main path's 1 (default: "
                                       f"{MIX_WEIGHTS} by mix, else 1)", low=0)
    sweeps: int = _option(3, "objective", "K, parallel forward sweeps", low=0, high=_MOST_ROUNDS)
    corrections: int = _option(4, "objective", "M, parallel corrections of the backward messages", low=0, high=_MOST_ROUNDS)
    linearization: str = _option("auto", "objective", "stands for the blocks' Jacobians between sweeps; secant is learned "
                                 "on the way; auto: secant for Transformer blocks without a mix, else identity",
                                 choices=("auto", "identity", "zero", "secant"))
    init: str = _option("first", "objective", "first estimate of the states: the embedding, the first block's output, or the "
                        "tree's", choices=INITS)
    time_sweeps: int = _option(TimeOptions().sweeps, "objective", "recurrent blocks: sweeps over time before the "
                               "differentiated call", low=0, high=_MOST_ROUNDS)
    time_corrections: int = _option(TimeOptions().corrections, "objective", "recurrent blocks: corrections of the messages "
                                    "back in time", low=0, high=_MOST_ROUNDS)
    time_linearization: str = _option(TimeOptions().linearization, "objective", "recurrent blocks: stands for the cells' "
                                      "Jacobians", choices=TIME_LINEARIZATIONS)
    time_chunk: int = _option(TimeOptions().chunk, "objective", "recurrent blocks: tokens that a sweep or correction takes "
                              "one after the other", low=1)
    carry_state: bool = _option(False, "objective", "recurrent blocks start a window from their states after the one before; "
                                "each row of a batch then reads its own stretch of the text, window after window")
    graphs: str = _option("kept", "objective", "kept, or recomputed: less memory for more work", choices=GRAPHS)
    sigma: float = _option(0.005, "objective", "tree: noise scale of the sampled states", low=0)
    state_weight: float = _option(0.1, "objective", "tree: weight of the losses on hidden states", low=0)
    n_samples: int = _option(1, "objective", "tree: Monte-Carlo samples a step", low=1, high=_MOST_ROUNDS)
    free_energy: bool = _option(False, "objective", "tree: also log the free energy F (Eq. 10) and its parts per level; "
                                "costs one more evaluation of every block", resume="free")

    max_steps: int | None = _option(None, "optimisation", "optimizer steps (or give --epochs)", low=1)
    epochs: float | None = _option(None, "optimisation", "passes over the training text (or give --max-steps)", low=0)
    batch_size: int = _option(8, "optimisation", "windows in a micro batch of one process", low=1, high=_MOST_WINDOWS)
    grad_accum: int = _option(1, "optimisation", "micro batches an optimizer step", low=1, high=_MOST_WINDOWS)
    lr: float = _option(2e-3, "optimisation", "peak learning rate of AdamW", low=0)
    min_lr_ratio: float = _option(0.1, "optimisation", "the cosine ends at this fraction of --lr", low=0, high=1)
    warmup_steps: int = _option(50, "optimisation", "steps of linear warm-up (at most half of the run)", low=0)
    weight_decay: float = _option(0.01, "optimisation", "AdamW weight decay, on matrices only", low=0)
    beta1: float = _option(0.9, "optimisation", "AdamW decay of the first moment", low=0, below=1)
    beta2: float = _option(0.95, "optimisation", "AdamW decay of the second moment", low=0, below=1)
    clip: float = _option(1.0, "optimisation", "largest norm of the gradient; 0 does not clip", low=0)
    seed: int = _option(0, "optimisation", "seed of weights, data order and noise", low=0, below=2**31)
    precision: str = _option("auto", "optimisation", "auto (bfloat16 on a CUDA GPU, else float32), float32 or "
                             "bfloat16; float16 is refused", resume="resolved")

    output_dir: str = _option("runs/lm", "run", "folder of the run", resume="free")
    log_every: int = _option(10, "run", "steps between two lines of metrics.jsonl", low=1, resume="free")
    eval_every: int = _option(500, "run", "steps between two evaluations; 0: only at the end", low=0, resume="free")
    eval_batches: int | None = _option(20, "run", "batches of an evaluation during the run; none: the whole split",
                                       low=1, resume="free")
    final_eval_batches: int | None = _option(None, "run", "batches of the evaluation at the end; none: the whole split",
                                             low=1, resume="free")
    eval_batch_size: int = _option(16, "run", "windows in a batch of an evaluation", low=1, high=_WIDEST, resume="free")
    sample_prompt: str = _option("The history of the city", "run", "prompt of the text sampled at every evaluation",
                                 resume="free")
    sample_tokens: int = _option(40, "run", "tokens sampled at every evaluation; 0: none", low=0, high=100_000, resume="free")
    save_every: int = _option(500, "run", "steps between two checkpoints; 0: only at the end", low=0, resume="free")
    keep_checkpoints: int = _option(2, "run", "newest checkpoints that are kept", low=1, resume="free")
    threads: int | None = _option(None, "run", "CPU threads of each process; none: the cores divided by the processes",
                                  low=1, high=1024, resume="free")
    log_with: str | None = _option(None, "run", "further trackers, comma-separated, any that Accelerate knows: "
                                   "tensorboard, wandb, ... (metrics.jsonl is always written)", resume="free")

    def __post_init__(self):
        hints = _hints()
        for field in dataclasses.fields(self):
            value = coerce(field.name, getattr(self, field.name), hints[field.name])
            if field.name in PATHS and value is not None:
                value = expand_path(field.name, value)
            object.__setattr__(self, field.name, value)
            check_range(field, value)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={quote(self.precision)}: allowed are {', '.join(PRECISIONS)}")
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError(f"max_steps={self.max_steps} and epochs={self.epochs}: give one of the two")
        if self.max_steps is None and not self.epochs:
            raise ValueError("how long to train is not set: give --max-steps (or --epochs above 0)")
        if self.state_weight == 0:
            raise ValueError("state_weight=0.0: must be above 0, or most blocks would not be trained")
        if self.lr == 0:
            raise ValueError("lr=0.0: must be above 0, or nothing is trained")
        if (self.tokenizer == "train") != (self.vocab_size is not None):
            raise ValueError(f"tokenizer={quote(self.tokenizer)} with vocab_size={self.vocab_size}: --vocab-size goes "
                             "with --tokenizer train and only with it; any other tokenizer has its own size")
        if self.objective == "tree" and self.path != "full":
            raise ValueError(f"path={quote(self.path)} with objective='tree': the tree trains all paths; leave --path out, "
                             "or choose --objective sweeps or backprop")
        if self.objective == "tree" and self.mix not in ("auto", "none"):
            raise ValueError(f"mix={self.mix!r} with objective='tree': the tree trains all paths; leave --mix out, or "
                             "choose --objective sweeps or backprop")
        if self.path != "full" and self.mix not in ("auto", "none"):
            raise ValueError(f"mix={self.mix!r} with path={quote(self.path)}: a mix adds paths to the full one; leave one "
                             "out")
        if self.mix_weight == 0:
            raise ValueError("mix_weight=0.0: must be above 0; --mix none trains one path alone")
        if self.free_energy and self.objective != "tree":
            raise ValueError(f"free_energy=True with objective={self.objective!r}: only the tree has a variational "
                             "posterior; leave it out, or use --objective tree")
        _ = self.path_blocks
        if self.carry_state and set(self.cell.split(",")) == {"transformer"}:
            raise ValueError(f"carry_state=True with cell={quote(self.cell)}: only recurrent blocks have a state to carry; "
                             "leave it out, or choose a recurrent --cell")
        if self.carry_state and self.objective == "tree":
            raise ValueError("carry_state=True with objective='tree': its jumps read no path whose state could be carried; "
                             "leave it out, or use --objective sweeps or backprop")
        # What a checkpoint or model card says must not change its meaning with a later version's defaults.
        if self.mix == "auto":
            object.__setattr__(self, "mix", DEFAULT_MIX if self.objective == "sweeps" and self.path == "full" else "none")
        if self.mix_weight is None:
            object.__setattr__(self, "mix_weight", MIX_WEIGHTS.get(self.mix, 1.0))
        if self.readout_rank is None:
            object.__setattr__(self, "readout_rank", 16 if self.mix in OF_PREFIXES else 0)
        if self.linearization == "auto":
            alone = self.objective == "sweeps" and self.mix == "none" and set(self.cell.split(",")) == {"transformer"}
            object.__setattr__(self, "linearization", "secant" if alone and self.n_embd >= SECANT_RANK else "identity")
        if self.default_paths == "auto":
            object.__setattr__(self, "default_paths", "prefix" if self.mix in OF_PREFIXES else "spine")

    @property
    def path_blocks(self) -> tuple[int, ...] | None:
        """``path`` as block numbers, None for the full path."""
        if self.path == "full":
            return None
        try:
            return tuple(int(block) for block in self.path.split(","))
        except ValueError:
            raise ValueError(f"path={quote(self.path)}: must be 'full' or block numbers such as 4,6,7") from None

    @property
    def block_cells(self) -> str | tuple[str, ...]:
        """``cell`` as the model's configuration takes it: one kind, or one for each block."""
        return block_cells(self.cell)

    def to_yaml(self) -> str:
        """The settings as YAML that ``--preset`` can read back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


FREE_ON_RESUME = frozenset(f.name for f in dataclasses.fields(TrainingSettings) if f.metadata["resume"] == "free")


def names_file(name: str, value: str | None) -> bool:
    """Whether the value of a setting of ``PATHS`` is the name of a file or folder that exists."""
    return value is not None and value not in _NO_FILES.get(name, ()) and os.path.exists(value)


def block_cells(cell: str) -> str | tuple[str, ...]:
    """``"gru"`` or ``"gru,transformer,gru"`` as the model's configuration takes it."""
    return tuple(cell.split(",")) if "," in cell else cell


def _hints() -> dict[str, Any]:
    return typing.get_type_hints(TrainingSettings)


# ---------------------------------------------------------------------------------------------------- layers


def read_preset(name: str, folder: Path) -> dict[str, Any]:
    """The keys of a preset: the file ``name`` itself, or ``folder/name.yaml``.

    Raises:
        ValueError: no such preset, not a YAML mapping, or an unknown key.
    """
    try:
        path = possible_name(name)
    except ValueError as error:
        raise ValueError(f"preset: {error}") from None
    path = path if name.endswith((".yaml", ".yml")) else folder / f"{path}.yaml"
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ValueError(f"preset {quote(name)} does not exist: choose one of {known}, or give the path of a .yaml "
                         "file") from None
    except OSError as error:
        raise ValueError(f"preset {quote(name)} cannot be read ({shorten(error.strerror)}): choose another") from None
    except ValueError as error:
        raise ValueError(f"preset {error}; write lines of 'key: value'") from None
    where = f"preset {quote(str(path))}"
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold lines of 'key: value'")
    check_keys(values, where)
    return values


def check_keys(values: dict[str, Any], where: str) -> None:
    """Raises ValueError for the first key that is no setting, with the nearest known one."""
    known = [field.name for field in dataclasses.fields(TrainingSettings)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(shorten(key, 40), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it; train/lm.py --help lists what there is"
            raise ValueError(f"unknown key {quote(key)} in {where}: {hint}")


def resolve(*layers: dict[str, Any]) -> TrainingSettings:
    """Settings from layers of values, the later one wins.

    ``max_steps`` and ``epochs`` say the same thing, so a layer that sets one unsets the other of the layers before,
    and ``tokenizer`` unsets the ``vocab_size`` that belonged to a tokenizer trained before. What was resolved for another
    objective, path or mix (a run's settings.yaml, read as a preset, has it written out) is resolved again.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        changed = [key for key in _DEPENDENT if key in layer and layer[key] != merged.get(key, layer[key])]
        for key in (key for name in changed for key in _DEPENDENT[name]):
            merged.pop(key, None)
        for key, rival in (("max_steps", "epochs"), ("epochs", "max_steps"), ("tokenizer", "vocab_size")):
            if layer.get(key) is not None:
                merged.pop(rival, None)
        merged.update(layer)
    return TrainingSettings(**merged)


_OF_MIX = ("mix_weight", "readout_rank", "readout_by", "default_paths", "linearization")
_DEPENDENT = {"objective": ("mix", *_OF_MIX), "path": ("mix", *_OF_MIX), "mix": _OF_MIX,
              "cell": ("linearization",)}


def as_meant(stored: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings with what the version that wrote them had no name for, or left at "auto"."""
    if "default_paths" in stored:
        return stored
    mixed = stored.get("objective") == "sweeps" and stored.get("path", "full") == "full"
    mix = stored.get("mix", "none")
    return {**stored, "mix": mix if mix != "auto" else "sandwich" if mixed else "none",
            "readout_rank": 0, "default_paths": "spine"}  # fmt: skip


def differences(settings: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the fixed settings that differ from those of ``other``, which an older version may have stored."""
    names = [field.name for field in dataclasses.fields(TrainingSettings) if field.metadata["resume"] == "fixed"]
    return [name for name in names if name in other and settings.get(name) != other[name]]
