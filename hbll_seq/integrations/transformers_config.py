"""The configuration of our language model as transformers knows one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from hbll_seq.models.config import HBLLConfig
from hbll_seq.tree.topology import DyadicTree
from hbll_seq.utils.reading import quote


class HBLLTransformersConfig(PreTrainedConfig):
    """The fields of :class:`hbll_seq.HBLLConfig`, and along which path the model runs.

    What transformers reads of the number and kinds of layers is that of the path: its caches have one layer for each block
    that is run.

    Args:
        depth: number of blocks to run; None, with ``path=None`` too, for all.
        path: block numbers to run, such as ``[4, 6, 7]``, instead of ``depth``.
        values: the fields of HBLLConfig, and what transformers has for every model.

    Raises:
        ValueError: a field of HBLLConfig is unknown or out of range.
    """

    model_type = HBLLConfig.model_type
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "context_length",
        "sliding_window": "context_length",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, depth: int | None = None, path: list[int] | None = None, **values: Any):
        values = HBLLConfig.migrated({self.attribute_map.get(name, name): value for name, value in values.items()})
        names = [field.name for field in fields(HBLLConfig)]
        own = HBLLConfig.from_dict({name: values.pop(name) for name in names if name in values})
        for name, value in own.to_dict().items():
            setattr(self, name, value)
        self.depth, self.path = depth, path
        self.use_cache = values.pop("use_cache", True)
        self.eos_token_id = values.pop("eos_token_id", None)
        # generation in batches needs one; our models are never trained on padding, so that any token will do
        self.pad_token_id = values.pop("pad_token_id", self.eos_token_id)
        super().__init__(**values)

    @property
    def hbll(self) -> HBLLConfig:
        """The same as hbll_seq's own configuration. Raises ValueError where a field was set to what it cannot be."""
        return HBLLConfig.from_dict({field.name: getattr(self, field.name) for field in fields(HBLLConfig)})

    @property
    def run_path(self) -> tuple[int, ...]:
        """The block numbers that ``depth`` or ``path`` names. Raises ValueError where that is not possible."""
        if self.depth is not None and self.path is not None:
            raise ValueError(f"depth={quote(self.depth)} and path={quote(self.path)} are both given: choose one of them")
        tree = DyadicTree(self.n_level, self.default_paths)
        if self.path is not None:
            return tree.validate_path(self.path)
        return tree.path_for_depth(tree.n_nodes if self.depth is None else self.depth)

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks on the path."""
        return len(self.run_path)

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def layer_types(self) -> list[str]:
        """What transformers' caches keep for each block on the path: keys and values of a window, or one state."""
        cells = self.hbll.cells
        attention = "sliding_attention" if self.context_length > 1 else "full_attention"
        return [attention if cells[n - 1] == "transformer" else "linear_attention" for n in self.run_path]
