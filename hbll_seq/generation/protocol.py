"""What a model must have to generate. This floor knows no model; :class:`hbll_seq.HBLLForCausalLM` is one that fits.

Shapes: B rows of a batch, T tokens, C width of the states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn


class CausalLMConfig(Protocol):
    """What generation reads of a model's configuration."""

    #: V; token ids are in 0 .. V - 1.
    vocab_size: int
    #: how many tokens attention looks back; a longer prompt is refused or cut.
    context_length: int
    #: which paths were trained: "all", "default" (that of every depth), a tuple of paths, or None where nobody knows.
    trained_paths: str | tuple[tuple[int, ...], ...] | None

    @property
    def has_attention(self) -> bool:
        """Whether a block looks back over tokens; a model without such a block reads prompts of any length."""

    @property
    def trained_depths(self) -> str:
        """``trained_paths`` in words."""

    def is_trained(self, path: tuple[int, ...]) -> bool:
        """Whether ``path`` was trained; a text along another path comes with a warning."""


class CausalLM(Protocol):
    """A causal language model whose blocks can be run along several paths. It is a ``torch.nn.Module``.

    Attributes:
        config: see :class:`CausalLMConfig`.
        embed: token ids [B, T] -> states [B, T, C]; it has a ``weight``, on the device that the ids go to.
        blocks: block n of a path is ``blocks[n - 1]``, a :class:`hbll_seq.layers.base.Cell`.
    """

    config: CausalLMConfig
    embed: nn.Module
    blocks: nn.ModuleList

    def resolve_path(self, depth: int | str | None = None, path: Sequence[int] | None = None) -> tuple[int, ...]:
        """The block numbers that a depth (a number, or a word of the model's) or a path names. Raises ValueError for what
        is not possible."""

    def read_out(self, state: Tensor, path: Sequence[int]) -> Tensor:
        """States [..., C] after the blocks ``path`` -> logits [..., V]."""
