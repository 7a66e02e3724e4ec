"""The one place where a language model's shape is written down and checked, and what all models' configurations share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from hbll_seq.layers.attention import check_kv_heads
from hbll_seq.layers.cells import CELL_KINDS
from hbll_seq.layers.residual import MLPS, NORMS
from hbll_seq.models.exits import EXIT_BY
from hbll_seq.tree.topology import PATH_FAMILIES, DyadicTree
from hbll_seq.utils import migration
from hbll_seq.utils.reading import quote, shorten
from hbll_seq.utils.values import check_choice

#: keys that transformers and the Hub write into a config.json; they carry no shape and are dropped on reading.
FOREIGN_KEYS = frozenset(
    {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "auto_map"}
    | {"use_cache", "depth", "path"}  # of the wrapper for transformers: how it runs
    | {"bos_token_id", "eos_token_id", "pad_token_id"}
)

#: kinds of blocks: attention, and the recurrent cells.
CELLS = ("transformer", *CELL_KINDS)
#: the largest value of each size: far beyond any sensible model, and small enough for every product of them.
BOUNDS = {
    "vocab_size": 1 << 24,
    "n_level": 10,
    "n_embd": 1 << 16,
    "n_head": 1 << 16,
    "context_length": 1 << 24,
    "mlp_ratio": 1 << 10,
    "exit_rank": 1 << 16,
}
#: what ``trained_paths`` may say in a word
TRAINED = ("all", "default")

T = TypeVar("T", bound="ModelConfig")


class ModelConfig:
    """What the configuration of any model can do: a frozen dataclass whose fields are plain JSON values, read strictly.

    Attributes:
        model_type: what config.json calls this kind of model.
    """

    model_type: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def migrated(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A config.json of an older version by today's keys. Raises ValueError where it holds an old key beside a new one."""
        return values

    @classmethod
    def from_dict(cls: type[T], values: dict[str, Any]) -> T:
        """Inverse of :meth:`to_dict`; an unknown key is an error, transformers' own keys are dropped, old keys are known.

        Raises:
            ValueError: a key is unknown or a value out of range.
        """
        if not isinstance(values, dict):
            raise ValueError(f"config={quote(values)}: must be a dictionary of config keys")
        values = cls.migrated(values)
        model_type = values.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"model_type={quote(model_type)}: {cls.__name__} is for {cls.model_type!r} alone; load it with the class "
                "that wrote it"
            )
        known = [field.name for field in fields(cls)]
        unknown = [key for key in values if key not in known and key not in FOREIGN_KEYS]
        if unknown:
            names = ", ".join(shorten(quote(key), 40) for key in unknown[:3]) + " and more" * (len(unknown) > 3)
            raise ValueError(
                f"unknown config key {names}: known are {', '.join(known)}; "
                "remove it, or use the hbll_seq version that wrote the file"
            )
        return cls(**{name: values[name] for name in known if name in values})


def check_size(name: str, value: object, low: int, high: int) -> None:
    """Raises ValueError unless the value is a whole number of ``low`` .. ``high``."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        meaning = "; 0 leaves it out" if low == 0 else ""
        limit = "" if isinstance(value, int) and value < low else f" and at most {high}"
        raise ValueError(f"{name}={quote(value)}: must be a whole number of at least {low}{limit}{meaning}")


class HierarchyConfig(ModelConfig):
    """What the configurations of hierarchies over depth share: a tree of blocks, and which of its paths were trained.

    Attributes:
        n_level, default_paths, exit_rank, exit_by, trained_paths: see :class:`HBLLConfig`.
    """

    n_level: int
    default_paths: str
    exit_rank: int
    exit_by: str
    trained_paths: str | tuple[tuple[int, ...], ...] | None

    @property
    def n_layer(self) -> int:
        """Number of blocks of the tree, ``2**n_level - 1``."""
        return 2**self.n_level - 1

    @property
    def full_path(self) -> tuple[int, ...]:
        """The numbers of all blocks that the model holds."""
        return tuple(range(1, self.n_layer + 1))

    def _check_exits(self) -> None:
        if self.exit_by != "jump" and not self.exit_rank:
            raise ValueError(f"exit_by={self.exit_by!r} with exit_rank=0: there is no exit adapter; give an exit_rank, "
                             "such as 16, or leave exit_by out")

    def _check_trained_paths(self) -> None:
        paths = self.trained_paths
        if paths is None or isinstance(paths, str) and paths in TRAINED:
            return
        if not isinstance(paths, (list, tuple)) or not paths:
            raise ValueError(f"trained_paths={quote(paths)}: must be {' or '.join(map(repr, TRAINED))}, a non-empty list of "
                             "paths, or null where nobody knows")
        tree = DyadicTree(self.n_level, self.default_paths)
        try:
            object.__setattr__(self, "trained_paths", tuple(tree.validate_path(path) for path in paths))
        except ValueError as error:
            raise ValueError(f"trained_paths: {error}") from None

    def is_trained(self, path: tuple[int, ...]) -> bool:
        """Whether ``path`` is one of ``trained_paths``, or nobody has said which were."""
        if self.trained_paths == "default":
            return path == DyadicTree(self.n_level, self.default_paths).path_for_depth(len(path))
        return self.trained_paths in (None, "all") or path in self.trained_paths

    @property
    def trained_depths(self) -> str:
        """``trained_paths`` in words, for people; empty where nobody has said."""
        paths = self.trained_paths
        if paths is None:
            return ""
        if isinstance(paths, str):
            which = "every dyadic path" if paths == "all" else "the default path of every depth"
            return f"{which}, 1 to {len(self.full_path)} blocks"
        named = [f"{len(path)} blocks" + f" {list(path)}" * (len(path) < 8) for path in sorted(paths, key=len)]
        return ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")


@dataclass(frozen=True)
class HBLLConfig(HierarchyConfig):
    """Shape and noise scale of a hierarchical language model.

    Attributes:
        vocab_size: number of tokens V.
        n_level: levels D of the binary tree; the full path has ``2**n_level - 1`` blocks.
        n_embd: width C of the stream that the blocks read and write.
        n_head: attention heads; must divide ``n_embd`` into heads of even width (rotary positions turn pairs).
        context_length: training context T in tokens; attention looks at most this many tokens back, at any length.
        cell: kind of block, one of ``CELLS``; or a tuple (list) of them, one for each of the ``n_layer`` blocks.
        mlp_ratio: hidden width of a block's MLP, in units of ``n_embd``; 0 leaves it out, where all blocks are recurrent.
        norm: ``"rmsnorm"`` or ``"layernorm"``, applied before attention, MLP and head.
        rope_base: base of the rotary positions' wavelengths.
        default_paths: which path a depth names, one of ``PATH_FAMILIES``; see :meth:`DyadicTree.path_for_depth`.
        exit_rank: rank of the exit adapters, corrections of a state before the head; 0 for none. See
            :class:`hbll_seq.models.exits.ExitAdapters`.
        exit_by: ``"jump"`` has an adapter for each length of the head's jump, ``"depth"`` for each number of blocks.
        dropout: probability of dropping a unit of a residual branch during training.
        tie_embeddings: the head's projection is the embedding matrix.
        sigma: noise scale of the sampled states (docs/method.md 1.1; the paper's LM runs use 0.005).
        n_kv_head: heads of keys and values, a divisor of ``n_head``; groups of the others share them. None: as many as
            ``n_head``. The cache of a token has ``2 * n_kv_head * n_embd / n_head`` numbers a block.
        mlp: ``"gelu"`` or ``"swiglu"``; the latter has a hidden width of two thirds, for as many parameters, see
            :func:`hbll_seq.layers.residual.hidden_width`.
        qk_norm: attention normalises its queries and keys, which keeps scores from growing at high learning rates.
        trained_paths: which paths were trained: ``"all"`` dyadic ones, ``"default"`` (that of every depth), or a list of
            paths, each a list of block numbers; None where nobody has said. Generating along another path warns.
        blocks: the path whose blocks alone the model holds, as ``export_path`` writes it; None where it holds all. Blocks
            keep their numbers, and this path is then the full one.

    Raises:
        ValueError: a value is out of range; the message says which, what is allowed and what to do.
    """

    model_type: ClassVar[str] = "hbll"

    vocab_size: int = 4096
    n_level: int = 3
    n_embd: int = 128
    n_head: int = 4
    context_length: int = 128
    cell: str | tuple[str, ...] = "transformer"
    mlp_ratio: int = 4
    norm: str = "rmsnorm"
    rope_base: float = 10000.0
    default_paths: str = "spine"
    exit_rank: int = 0
    exit_by: str = "jump"
    dropout: float = 0.0
    tie_embeddings: bool = True
    sigma: float = 0.005
    # older files lack these
    n_kv_head: int | None = field(default=None, metadata={"optional": True})
    mlp: str = field(default="gelu", metadata={"optional": True})
    qk_norm: bool = field(default=False, metadata={"optional": True})
    trained_paths: str | tuple[tuple[int, ...], ...] | None = field(default=None, metadata={"optional": True})
    blocks: tuple[int, ...] | None = field(default=None, metadata={"optional": True})

    @classmethod
    def migrated(cls, values: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`ModelConfig.migrated`."""
        return migration.config(values)

    @property
    def full_path(self) -> tuple[int, ...]:
        """See :attr:`HierarchyConfig.full_path`."""
        return self.blocks or super().full_path

    @property
    def cells(self) -> tuple[str, ...]:
        """Kind of each block, ``n_layer`` of them."""
        return (self.cell,) * self.n_layer if isinstance(self.cell, str) else self.cell

    @property
    def has_attention(self) -> bool:
        """Whether a block looks back over tokens, at most ``context_length`` of them."""
        return "transformer" in self.cells

    @property
    def has_recurrence(self) -> bool:
        """Whether a block has a state that can be carried from one stretch of text into the next."""
        return any(kind != "transformer" for kind in self.cells)

    def __post_init__(self):
        for name, high in BOUNDS.items():
            check_size(name, getattr(self, name), 0 if name in ("exit_rank", "mlp_ratio") else 1, high)
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size={self.vocab_size}: must be at least 2, or there is nothing to predict")
        self._check_cells()
        self._check_heads()
        choices = {"norm": NORMS, "mlp": MLPS, "default_paths": PATH_FAMILIES, "exit_by": EXIT_BY}
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        self._check_exits()
        for name, low, high in (("dropout", 0.0, 1.0), ("sigma", 0.0, 1e6), ("rope_base", 1.0, 1e12)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
                raise ValueError(f"{name}={quote(value)}: must be a number in [{low:g}, {high:g})")
        for name in ("tie_embeddings", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={quote(getattr(self, name))}: must be true or false")
        if self.mlp != "gelu" and self.mlp_ratio == 0:
            raise ValueError(f"mlp={self.mlp!r} with mlp_ratio=0: there is no MLP; give an mlp_ratio, such as 4, or leave "
                             "mlp out")
        self._check_trained_paths()
        if self.blocks is not None:
            try:
                object.__setattr__(self, "blocks", DyadicTree(self.n_level).validate_path(self.blocks))
            except ValueError as error:
                raise ValueError(f"blocks: {error}; or null for all") from None

    def _check_cells(self) -> None:
        if isinstance(self.cell, list):  # as JSON and YAML give it
            object.__setattr__(self, "cell", tuple(self.cell))
        names = (self.cell,) if isinstance(self.cell, str) else self.cell
        if not isinstance(names, tuple) or not all(isinstance(kind, str) and kind in CELLS for kind in names):
            raise ValueError(f"cell={quote(self.cell)}: allowed are {', '.join(CELLS)}, or one of them for each block")
        if len(self.cells) != self.n_layer:
            raise ValueError(f"cell={quote(self.cell)} names {len(self.cells)} blocks: n_level={self.n_level} has "
                             f"{self.n_layer}; name as many, or one kind for all")
        if self.has_attention and self.mlp_ratio == 0:
            raise ValueError(f"mlp_ratio=0 with cell={quote(self.cell)}: only recurrent blocks can do without an MLP; give "
                             "at least 1, or recurrent cells alone")

    def _check_heads(self) -> None:
        if not self.has_attention:
            for name, usual in (("n_kv_head", None), ("qk_norm", False)):
                if (value := getattr(self, name)) != usual:
                    raise ValueError(f"{name}={quote(value)} with cell={quote(self.cell)}: there is no attention; leave "
                                     f"{name} out, or make a block a transformer")
            return
        if self.n_embd % self.n_head:
            divisors = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0 and (self.n_embd // h) % 2 == 0]
            remedy = f"choose n_head from {quote(divisors)}" if divisors else "choose an even n_embd"
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: {remedy}")
        if (self.n_embd // self.n_head) % 2:
            raise ValueError(
                f"n_embd={self.n_embd} with n_head={self.n_head} gives heads of odd width {self.n_embd // self.n_head}, "
                "which rotary positions cannot turn in pairs: choose n_embd / n_head even"
            )
        check_kv_heads(self.n_head, self.n_kv_head)
