"""Settings of a training run: one flat frozen dataclass, from which the command line and the preset files are checked.

What an objective can be told is said in its options objects (:mod:`hbll_seq.objectives.options`), once: the settings take
default, range, words and help from there, and :meth:`TrainingSettings.inference`, ``depths`` and ``time`` make the objects.

Settings hold what was asked for. Some may be left open ("auto" or none); :meth:`TrainingSettings.resolved` gives settings in
which all are decided. A checkpoint holds both, so that it keeps its meaning when a later version decides otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass
from typing import Any

import yaml

from hbll_seq.distributed.ranks import PATIENCE
from hbll_seq.engine.linearization.base import Diagonal
from hbll_seq.engine.linearization.low_rank import DEFAULT_RANK
from hbll_seq.layers.residual import MLPS, NORMS
from hbll_seq.models.config import CELLS, HBLLConfig
from hbll_seq.models.exits import EXIT_BY
from hbll_seq.objectives.axes import AXES
from hbll_seq.objectives.control import CONTROLS, Adaptive
from hbll_seq.objectives.depth_mix import DEFAULT_MIX, MIX_WEIGHTS, MIXES, OF_PREFIXES, ON_PREFIXES
from hbll_seq.objectives.options import DepthMix, Sweeps, Tree
from hbll_seq.training.graph_settings import check_cuda_graph
from hbll_seq.training.option_values import PATHS, PRECISIONS, check_range, coerce, expand_path, numbers
from hbll_seq.training.parallel_settings import check_block_parallel
from hbll_seq.training.setting_fields import option_of as _of
from hbll_seq.training.setting_fields import setting
from hbll_seq.tree.topology import PATH_FAMILIES
from hbll_seq.utils.reading import quote

#: settings that may be left open, and what says so
LEFT_OPEN = {
    "depth_mix": "auto",
    "depth_mix_weight": None,
    "exit_rank": None,
    "default_paths": "auto",
    "linearization": "auto",
    "forward": None,
    "backward": None,
    "chunk_size": None,
}
#: of what would otherwise end in an endless loop or the machine's whole memory
_MOST_ROUNDS, _MOST_WINDOWS, _WIDEST, _MOST_BLOCKS = 10_000, 2**20, 2**16, 2**10 - 1
MOST_THREADS = 1024
#: rank of the exit adapters where a mix of prefixes wants some; the names of these mixes, and of those with such paths
_EXIT_RANK = 16
_OF_PREFIXES, _ON_PREFIXES = (f"{', '.join(names[:-1])} or {names[-1]}" for names in (OF_PREFIXES, ON_PREFIXES))
#: over depth; the blocks of these models do not tell the diagonal of their Jacobian
_LINEARIZATIONS = tuple(kind.name for kind in AXES["depth"].linearizations if kind is not Diagonal)

_data, _model, _objective, _optimisation = (
    functools.partial(setting, group) for group in ("data", "model", "objective", "optimisation")
)
_run = functools.partial(setting, "run", resume="free")
_start = functools.partial(setting, "start")


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides how a language model is trained, as it was asked for; see each option's ``help``.

    Raises:
        ValueError: a value has the wrong type or is out of range; the message names it, what is allowed, the remedy.
    """

    data: str = _data("bundled", "training text: bundled (WikiText-2), wikitext-2, wikitext-103, a .txt / .jsonl (also .gz, "
                      ".xz, .zst) / .parquet file or folder, or a Hub id 'owner/name' or 'owner/name:config'",
                      resume="resolved")
    column: str = _data("text", "column (or JSON key) that holds the text", resume="resolved")
    tokenizer: str = _data("default", "default (bundled, 4,096 pieces), train (train one on the data and cache it), "
                           "model (that of --init-from), or the path of a SentencePiece .model file", resume="resolved")
    vocab_size: int | None = _data(None, "number of pieces for --tokenizer train", low=2, resume="resolved")
    cache_dir: str | None = _data(None, "folder for tokenised text and trained tokenizers (default: ~/.cache/hbll_seq)",
                                  resume="free")
    num_proc: int | None = _data(None, "CPU threads that tokenise (default: all cores)", low=1, high=1024, resume="free")

    init_from: str | None = _start(None, "model to train on from: a folder, a Hub id or bundled; shape and tokenizer are "
                                   "then the model's; train on with --lr 3e-4, say, since a preset's rate may ruin what it "
                                   "has learned (default: none)", resume="resolved")

    n_level: int = _model(3, "levels D of the tree: the full path has 2^D - 1 blocks", low=1, high=10)
    cell: str = _model("transformer", f"kind of block: {', '.join(CELLS)}; or one for each block, as in gru,transformer,gru")
    n_embd: int = _model(128, "width of the stream", low=1, high=_WIDEST)
    n_head: int = _model(4, "attention heads; must divide n_embd", low=1, high=_WIDEST)
    n_kv_head: int | None = _model(None, "heads of keys and values, a divisor of n_head, for a smaller cache; none: n_head",
                                   low=1, high=_WIDEST)
    qk_norm: bool = _model(False, "attention normalises its queries and keys")
    context_length: int = _model(128, "tokens of a training window; also how far attention looks back", low=1)
    mlp_ratio: int = _model(4, "hidden width of a block's MLP in units of n_embd; 0: none, for recurrent blocks", low=0,
                            high=64)
    mlp: str = _model("gelu", "MLP of a block: gelu, or swiglu with two thirds of the hidden width, for as many parameters",
                      choices=MLPS)
    norm: str = _model("rmsnorm", "normalisation", choices=tuple(NORMS))
    dropout: float = _model(0.0, "dropout on residual branches", low=0, below=1)
    tie_embeddings: bool = _model(True, "share the embedding's and the head's matrix")
    exit_rank: int | None = _model(None, "rank of the exit adapters, corrections of a state before the head; 0: none "
                                   f"(default: {_EXIT_RANK} with --depth-mix {_OF_PREFIXES}, else 0)", low=0, high=_WIDEST)
    exit_by: str = _model("jump", "what has an exit adapter of its own: jump, each length of the head's jump, or depth, each "
                          "number of blocks", choices=EXIT_BY)
    default_paths: str = _model("auto", "which blocks a depth runs: spine, the paper's, or prefix, which leaves the full "
                                f"path as late as it can; auto: prefix with --depth-mix {_ON_PREFIXES}, else spine",
                                choices=("auto", *PATH_FAMILIES))

    objective: str = _objective("sweeps", "sweeps: local losses from adjoints composed along the path; tree: the paper's "
                                "local losses on the binary tree; backprop: the baseline",
                                choices=("sweeps", "tree", "backprop"))
    path: str = _objective("full", "blocks that sweeps or backprop train: full, or numbers such as 4,6,7")
    depth_mix: str = _of(DepthMix, "name", default="auto", choices=("auto", *MIXES),
                         help="further paths that sweeps or backprop train in each step, so that every depth is useful; "
                         f"auto: {DEFAULT_MIX} for sweeps on the full path, else none")
    depth_mix_weight: float | None = _of(DepthMix, "weight", remedy="; --depth-mix none trains one path alone",
                                         help="weight of the mix's losses beside the main path's 1 (default: "
                                         f"{', '.join(f'{mix} {w:g}' for mix, w in MIX_WEIGHTS.items())}, others 1)")
    forward: int | None = _of(Sweeps, "forward", "depth", high=_MOST_ROUNDS, help="sweeps: K, parallel forward iterations "
                              "(default: as many as are exact; beside --backward 3)")
    backward: int | None = _of(Sweeps, "backward", "depth", high=_MOST_ROUNDS, help="sweeps: M, parallel iterations of the "
                               "adjoints (default: as many as are exact; beside --forward 4)")
    chunk_size: int | None = _of(Sweeps, "chunk_size", "depth", default=None, help="sweeps: blocks that an iteration takes "
                                 "one after the other (default: 4; beside --forward or --backward 1)")
    linearization: str = _of(Sweeps, "linearization", "depth", default="auto", choices=("auto", *_LINEARIZATIONS),
                             help="sweeps: approximates the blocks' Jacobians between iterations; auto: low_rank, learned on "
                             "the way, for a Transformer's --forward or --backward without a depth mix, else identity")
    init: str = _of(Sweeps, "init", "depth", help="sweeps: first estimate of the states: input, the embedding; first, "
                    "the first block's output; tree, the tree's")
    control: str = _of(Sweeps, "control", "depth", default="none", choices=("none", *CONTROLS), help="sweeps: none: K and M "
                       "stay as they are; adaptive: they follow what comparisons with the exact gradient say")
    control_tolerance: float = _of(Adaptive, "tolerance")
    control_most: int | None = _of(Adaptive, "most", high=_MOST_ROUNDS)
    control_every: int = _of(Adaptive, "every")
    auxiliary_exits: float = _of(Sweeps, "auxiliary_exits", "depth")
    auxiliary_blocks: int = _of(Sweeps, "auxiliary_blocks", "depth")
    time_forward: int = _of(Sweeps, "forward", "layer", high=_MOST_ROUNDS)
    time_backward: int = _of(Sweeps, "backward", "layer", high=_MOST_ROUNDS)
    time_chunk_size: int = _of(Sweeps, "chunk_size", "layer")
    time_linearization: str = _of(Sweeps, "linearization", "layer")
    carry_state: bool = _objective(False, "recurrent blocks start a window from their states after the one before; each row "
                                   "of a batch then reads its own stretch of the text, window after window")
    recompute: bool = _objective(False, "activation checkpointing: less memory for more work")
    ahead: bool = _objective(False, "each rank of --block-parallel works on a later batch than the next one, on states that "
                             "are a step old, so that none waits for another: for segments alone")
    sigma: float = _of(Tree, "sigma", default=HBLLConfig.sigma)
    state_weight: float = _of(Tree, "state_weight")
    n_samples: int = _of(Tree, "n_samples", high=_MOST_ROUNDS)
    free_energy: bool = _of(Tree, "free_energy", resume="free")

    max_steps: int | None = _optimisation(None, "optimizer steps (or give --epochs)", low=1)
    epochs: float | None = _optimisation(None, "passes over the training text (or give --max-steps)", low=0)
    batch_size: int = _optimisation(8, "windows in a micro batch of one process", low=1, high=_MOST_WINDOWS)
    grad_accum: int = _optimisation(1, "micro batches an optimizer step", low=1, high=_MOST_WINDOWS)
    lr: float = _optimisation(2e-3, "peak learning rate of AdamW", above=0, remedy="; without it nothing is trained")
    min_lr_ratio: float = _optimisation(0.1, "the cosine ends at this fraction of --lr", low=0, high=1)
    warmup_steps: int = _optimisation(50, "steps of linear warm-up (at most half of the run)", low=0)
    weight_decay: float = _optimisation(0.01, "AdamW weight decay, on matrices only", low=0)
    beta1: float = _optimisation(0.9, "AdamW decay of the first moment", low=0, below=1)
    beta2: float = _optimisation(0.95, "AdamW decay of the second moment", low=0, below=1)
    clip: float = _optimisation(1.0, "largest norm of the gradient; 0 does not clip", low=0)
    seed: int = _optimisation(0, "seed of weights, data order and noise", low=0, below=2**31)
    precision: str = _optimisation("auto", "auto (bfloat16 on a CUDA GPU, else float32), float32 or bfloat16; float16 is "
                                   "refused", resume="resolved", choices=PRECISIONS)

    output_dir: str = _run("runs/lm", "folder of the run")
    log_every: int = _run(10, "steps between two lines of metrics.jsonl", low=1)
    eval_every: int = _run(500, "steps between two evaluations; 0: only at the end", low=0)
    eval_batches: int | None = _run(20, "batches of an evaluation during the run; none: the whole split", low=1)
    final_eval_batches: int | None = _run(None, "batches of the evaluation at the end; none: the whole split", low=1)
    eval_batch_size: int = _run(16, "windows in a batch of an evaluation", low=1, high=_WIDEST)
    sample_prompt: str | None = _run(None, "prompt of the text sampled at every evaluation (default: the beginning of the "
                                     "validation text)")
    sample_tokens: int = _run(40, "tokens sampled at every evaluation; 0: none", low=0, high=100_000)
    save_every: int = _run(500, "steps between two checkpoints; 0: only at the end", low=0)
    keep_checkpoints: int = _run(2, "newest checkpoints that are kept", low=1)
    threads: int | None = _run(None, "CPU threads of each process; none: OMP_NUM_THREADS (but not the 1 that launchers "
                               "set), else the cores divided by the processes", low=1, high=MOST_THREADS)
    block_parallel: int = _run(1, "ranks that hold the blocks of one model between them; processes of the launch = this x "
                               "data-parallel replicas", low=1, high=_MOST_BLOCKS)
    block_shares: str | None = _run(None, "segments of --chunk-size blocks that each rank of --block-parallel holds, such as "
                                    "1,3; none: as equal as they go")
    rank_timeout: float = _run(PATIENCE.total_seconds(), "seconds that ranks of --block-parallel wait in a step for one that "
                               "does not answer; one that died is noticed at once", above=0, high=86_400)
    cuda_graph: bool = _run(False, "replay forward and backward of a step as CUDA graphs, one for each draw of the depth "
                            "mix; for small models on a GPU, whose steps wait for Python")
    log_with: str | None = _run(None, "further trackers, comma-separated, any that Accelerate knows: tensorboard, wandb, ... "
                                "(metrics.jsonl is always written)")

    def __post_init__(self):
        hints = typing.get_type_hints(TrainingSettings)
        for field in dataclasses.fields(self):
            value = coerce(field.name, getattr(self, field.name), hints[field.name])
            if field.name in PATHS and value is not None:
                value = expand_path(field.name, value)
            object.__setattr__(self, field.name, value)
            check_range(field, value)
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError(f"max_steps={self.max_steps} and epochs={self.epochs}: give one of the two")
        if self.max_steps is None and not self.epochs:
            raise ValueError("how long to train is not set: give --max-steps (or --epochs above 0)")
        if (self.tokenizer == "train") != (self.vocab_size is not None):
            raise ValueError(f"tokenizer={quote(self.tokenizer)} with vocab_size={self.vocab_size}: --vocab-size goes "
                             "with --tokenizer train and only with it; any other tokenizer has its own size")
        if self.tokenizer == "model" and self.init_from is None:
            raise ValueError("tokenizer='model' is that of the model of --init-from: give one, or leave --tokenizer out")
        self._check_objective()

    def _check_objective(self) -> None:
        """Raises ValueError for settings that the objective, the path or the blocks cannot have."""
        remedy, mixed = "choose --objective sweeps or backprop", self.depth_mix not in ("auto", "none")
        if self.objective == "tree" and self.path != "full":
            raise ValueError(f"path={quote(self.path)} with objective='tree': the tree trains all paths; leave --path out, "
                             f"or {remedy}")
        if self.objective == "tree" and mixed:
            raise ValueError(f"depth_mix={self.depth_mix!r} with objective='tree': the tree trains all paths; leave "
                             f"--depth-mix out, or {remedy}")
        if self.path != "full" and mixed:
            raise ValueError(f"depth_mix={self.depth_mix!r} with path={quote(self.path)}: a mix adds paths to the full one; "
                             "leave one out")
        if self.free_energy and self.objective != "tree":
            raise ValueError(f"free_energy=True with objective={self.objective!r}: only the tree has a variational "
                             "posterior; leave it out, or use --objective tree")
        if self.control != "none" and self.objective != "sweeps":
            raise ValueError(f"control={self.control!r} with objective={self.objective!r}: only sweeps have iterations to "
                             "control; leave it out, or use --objective sweeps")
        _ = self.path_blocks
        if self.carry_state and not self.has_recurrence:
            raise ValueError(f"carry_state=True with cell={quote(self.cell)}: only recurrent blocks have a state to carry; "
                             "leave it out, or choose a recurrent --cell")
        if self.carry_state and self.objective == "tree":
            raise ValueError("carry_state=True with objective='tree': its jumps read no path whose state could be carried; "
                             "leave it out, or use --objective sweeps or backprop")
        if self.block_parallel > 1 or self.ahead or self.block_shares is not None:
            check_block_parallel(self, self._decided())
        if self.cuda_graph:
            check_cuda_graph(self, self._decided())

    # ------------------------------------------------------------------------------------ what was left open

    def resolved(self) -> TrainingSettings:
        """The same with nothing left open; of such settings, themselves."""
        return dataclasses.replace(self, **self._decided())

    def _decided(self) -> dict[str, Any]:
        """What becomes of the settings that were left open."""
        mix = self.depth_mix
        if mix == "auto":
            mix = DEFAULT_MIX if self.objective == "sweeps" and self.path == "full" else "none"
        alone = self.objective == "sweeps" and mix == "none" and not self.has_recurrence
        iterates = self.forward is not None or self.backward is not None
        learns = alone and iterates and self.n_embd >= DEFAULT_RANK
        linearization = self.linearization if self.linearization != "auto" else "low_rank" if learns else "identity"
        asked = Sweeps(self.forward, self.backward, self.chunk_size, linearization, control=self.control_object())
        sweeps = asked.resolved("depth", len(self.path_blocks or range(1, 2**self.n_level)))
        decided = {
            "depth_mix": mix,
            "depth_mix_weight": DepthMix(mix, self.depth_mix_weight).total_weight,
            "exit_rank": _EXIT_RANK if mix in OF_PREFIXES else 0,
            "default_paths": "prefix" if mix in ON_PREFIXES else "spine",
            "linearization": linearization,
            "forward": sweeps.forward,
            "backward": sweeps.backward,
            "chunk_size": sweeps.chunk_size,
        }
        return {name: decided[name] for name in self.left_open()}

    def left_open(self) -> dict[str, Any]:
        """What :meth:`resolved` decides: names and how they say that they are open."""
        return {name: value for name, value in LEFT_OPEN.items() if getattr(self, name) == value}

    # ------------------------------------------------------------------------------------ as objects

    def inference(self) -> Sweeps | Tree:
        """How the local losses find states and adjoints. Not for backpropagation, which is told nothing."""
        return self.resolved()._made(Tree) if self.objective == "tree" else self.resolved()._made(Sweeps, "depth")

    def time(self) -> Sweeps:
        """How recurrent blocks are evaluated along time."""
        return self._made(Sweeps, "layer")

    def depths(self) -> DepthMix:
        """Which further paths are trained."""
        return self.resolved()._made(DepthMix)

    def _made(self, kind: type, axis: str | None = None) -> Any:
        fields = [f for f in dataclasses.fields(self) if f.metadata["of"] and f.metadata["of"][:2] == (kind, axis)]
        values = {field.metadata["of"][2]: getattr(self, field.name) for field in fields}
        return kind(**{**values, "control": self.control_object()} if "control" in values else values)

    def control_object(self) -> Adaptive | None:
        """What K and M of sweeps follow, None where they are fixed."""
        return None if self.control == "none" else self._made(Adaptive)

    def model_config(self, vocab_size: int) -> HBLLConfig:
        """The model that is trained. Raises ValueError for a shape that cannot be."""
        names = [field.name for field in dataclasses.fields(self) if field.metadata["group"] == "model"]
        values = {name: getattr(self.resolved(), name) for name in (*names, "sigma")}
        return HBLLConfig(**{**values, "vocab_size": vocab_size, "cell": block_cells(self.cell)})

    @property
    def path_blocks(self) -> tuple[int, ...] | None:
        """``path`` as block numbers, None for the full path."""
        return numbers("path", None if self.path == "full" else self.path, "'full' or block numbers such as 4,6,7")

    @property
    def shares(self) -> tuple[int, ...] | None:
        """``block_shares`` as numbers, None where they are equal."""
        return numbers("block_shares", self.block_shares, "numbers such as 1,3, one for each rank, or none")

    @property
    def has_recurrence(self) -> bool:
        """Whether a block is recurrent."""
        return set(self.cell.split(",")) != {"transformer"}

    # ------------------------------------------------------------------------------------ in words

    def to_yaml(self, asked: dict[str, Any] | None = None) -> str:
        """The settings as YAML that ``--preset`` can read back.

        Args:
            asked: what was left open, of settings that are resolved: it is written, with what came of it as a comment.
        """
        asked, lines, group = asked or {}, [], None
        for field in dataclasses.fields(self):
            if field.metadata["group"] != group:
                group = field.metadata["group"]
                lines.append(f"# {group}\n" if not lines else f"\n# {group}\n")
            value = getattr(self, field.name)
            line = yaml.safe_dump({field.name: asked.get(field.name, value)}, allow_unicode=True, width=1_000_000)
            lines.append(f"{line.rstrip()}  # {value}\n" if field.name in asked else line)
        return "".join(lines)


FREE_ON_RESUME = frozenset(f.name for f in dataclasses.fields(TrainingSettings) if f.metadata["resume"] == "free")


def block_cells(cell: str) -> str | tuple[str, ...]:
    """``"gru"`` or ``"gru,transformer,gru"`` as the model's configuration takes it."""
    return tuple(cell.split(",")) if "," in cell else cell
