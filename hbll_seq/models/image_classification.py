"""A hierarchy of attention blocks that classifies images at any depth: the paper's vision model (docs/method.md 1.6).

Shapes: B batch, C channels, H x W pixels, T states of an image, D width of the stream, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hbll_seq.layers.patches import POOLINGS, FullAttentionBlock, PatchEmbedding, PoolingHead
from hbll_seq.layers.residual import MLPS, NORMS
from hbll_seq.models.config import HierarchyConfig, check_size
from hbll_seq.models.exits import EXIT_BY, ExitAdapters
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.models.hub import HubMixin
from hbll_seq.models.model_card import CardText
from hbll_seq.tree.topology import PATH_FAMILIES
from hbll_seq.utils.checks import as_classes, check_inputs, holds_whole_numbers
from hbll_seq.utils.console import warn_user
from hbll_seq.utils.modules import evaluation_mode
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_whole, check_choice, number_or_none

#: the largest value of each size: far beyond any sensible model.
BOUNDS = {
    "image_size": 1 << 12,
    "patch_size": 1 << 10,
    "n_channels": 1 << 10,
    "n_classes": 1 << 20,
    "n_level": 10,
    "n_embd": 1 << 16,
    "n_head": 1 << 16,
    "mlp_ratio": 1 << 10,
    "exit_rank": 1 << 16,
}
#: pixels outside of these are not in 0 .. 1, whatever a resampling filter adds at edges
LEAST, MOST = -0.5, 1.5


@dataclass(frozen=True)
class HBLLImageConfig(HierarchyConfig):
    """Shape of an image classifier.

    Attributes:
        image_size: H = W in pixels.
        patch_size: height and width of a patch in pixels; must divide ``image_size``.
        n_channels: C.
        n_classes: V.
        n_level, n_embd, mlp_ratio, norm, default_paths, exit_rank, exit_by, dropout, sigma, mlp, qk_norm, trained_paths: see
            :class:`HBLLConfig`.
        n_head: attention heads; must divide ``n_embd``.
        pooling: the head reads the ``"mean"`` of all states, or that of a learned class ``"token"`` before them.
        pixel_mean, pixel_std: of the pixels of 0 to 1, by which the embedding normalises them; one number, or one a channel.
        class_names: of the V classes, in the order of their numbers; None where they have none.

    Raises:
        ValueError: a value is out of range; the message says which, what is allowed and what to do.
    """

    model_type: ClassVar[str] = "hbll-image-classifier"

    image_size: int = 32
    patch_size: int = 4
    n_channels: int = 3
    n_classes: int = 10
    n_level: int = 3
    n_embd: int = 128
    n_head: int = 4
    mlp_ratio: int = 4
    norm: str = "rmsnorm"
    mlp: str = "gelu"
    qk_norm: bool = False
    pooling: str = "mean"
    pixel_mean: float | tuple[float, ...] = 0.5
    pixel_std: float | tuple[float, ...] = 0.25
    default_paths: str = "spine"
    exit_rank: int = 0
    exit_by: str = "jump"
    dropout: float = 0.0
    sigma: float = 0.005
    trained_paths: str | tuple[tuple[int, ...], ...] | None = field(default=None, metadata={"optional": True})
    class_names: tuple[str, ...] | None = field(default=None, metadata={"optional": True})

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.image_size // self.patch_size,) * 2

    def __post_init__(self):
        for name, high in BOUNDS.items():
            check_size(name, getattr(self, name), 0 if name == "exit_rank" else 1, high)
        if self.n_classes < 2:
            raise ValueError(f"n_classes={self.n_classes}: must be at least 2, or there is nothing to tell apart")
        for whole, part in (("image_size", "patch_size"), ("n_embd", "n_head")):
            size, of_part = getattr(self, whole), getattr(self, part)
            if size % of_part:
                divisors = [n for n in range(1, size + 1) if size % n == 0]
                raise ValueError(f"{whole}={size} is not divisible by {part}={of_part}: choose {part} from {quote(divisors)}")
        choices = {"norm": NORMS, "mlp": MLPS, "pooling": POOLINGS, "default_paths": PATH_FAMILIES, "exit_by": EXIT_BY}
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        self._check_exits()
        if not isinstance(self.qk_norm, bool):
            raise ValueError(f"qk_norm={quote(self.qk_norm)}: must be true or false")
        for name, low, high in (("dropout", 0.0, 1.0), ("sigma", 0.0, 1e6)):
            value = number_or_none(getattr(self, name))
            if value is None or not low <= value < high:
                raise ValueError(f"{name}={quote(getattr(self, name))}: must be a number in [{low:g}, {high:g})")
        self._check_pixels("pixel_mean", LEAST, MOST)
        self._check_pixels("pixel_std", 1e-4, 1e4)
        self._check_trained_paths()
        self._check_class_names()

    def _check_pixels(self, name: str, low: float, high: float) -> None:
        given = getattr(self, name)
        listed = given if isinstance(given, (list, tuple)) else [given] * self.n_channels
        values = [number_or_none(value) for value in listed]
        if len(values) != self.n_channels or not all(value is not None and low <= value <= high for value in values):
            raise ValueError(f"{name}={quote(given)}: must be a number in [{low:g}, {high:g}], or one for each of the "
                             f"n_channels={self.n_channels} channels")
        object.__setattr__(self, name, tuple(values))

    def _check_class_names(self) -> None:
        names = self.class_names
        if names is None:
            return
        is_list = isinstance(names, (list, tuple)) and len(names) == self.n_classes
        if not is_list or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names={quote(names)}: must be a text for each of the n_classes={self.n_classes} classes"
                             ", or null where they have no names")
        object.__setattr__(self, "class_names", tuple(names))


class HBLLForImageClassification(HubMixin, DepthHierarchy):
    """An image classifier whose ``2**n_level - 1`` attention blocks can be run along any dyadic path.

    Images are [B, C, H, W], of floating point with values of 0 to 1, or uint8 with 0 to 255, as files hold them. They are
    normalised inside.

    Args:
        config: shape of the model.
    """

    config_class = HBLLImageConfig

    def __init__(self, config: HBLLImageConfig):
        embed = PatchEmbedding(config.grid, config.patch_size, config.pixel_mean, config.pixel_std, config.n_embd,
                               config.pooling == "token")  # fmt: skip
        options = dict(mlp_ratio=config.mlp_ratio, norm=config.norm, dropout=config.dropout, mlp=config.mlp)
        blocks = [
            FullAttentionBlock(config.n_embd, config.n_head, qk_norm=config.qk_norm, **options) for _ in config.full_path
        ]
        head = PoolingHead(config.norm, config.n_embd, config.n_classes, config.pooling)
        super().__init__(blocks, head, embed, default_paths=config.default_paths, width=config.n_embd)
        self.exits: ExitAdapters | None = None
        if config.exit_rank:
            self.exits = ExitAdapters(self.tree, config.n_embd, config.exit_rank, config.exit_by)
        self.config = config

    def pixels(self, inputs: Tensor) -> Tensor:
        """Images as the embedding reads them: of the model's dtype, with values of 0 to 1.

        Raises:
            ValueError: they have another shape or dtype, are on another device, or hold other values (seen on a CPU alone).
        """
        check_inputs("inputs", inputs, self)
        config, shape = self.config, tuple(inputs.shape)
        wanted = (config.n_channels, config.image_size, config.image_size)
        if shape[1:] != wanted:
            remedy = "resize them, or make a model of another image_size or n_channels"
            if shape == wanted:
                remedy = "one image is a batch too: inputs[None]"
            elif len(shape) == 4 and (shape[3], *shape[1:3]) == wanted:
                remedy = "channels come first: inputs.permute(0, 3, 1, 2)"
            raise ValueError(f"inputs of shape {shape}: must be images [batch, {', '.join(map(str, wanted))}]; {remedy}")
        dtype = self.head.projection.weight.dtype
        if inputs.dtype == torch.uint8:
            return inputs.to(dtype) / 255
        if not inputs.is_floating_point():
            remedy = ": inputs.to(torch.uint8)" if holds_whole_numbers(inputs) else ""
            raise ValueError(f"inputs of {inputs.dtype}: must be of floating point, 0 to 1, or of uint8, 0 to 255{remedy}")
        if inputs.device.type == "cpu":
            low, high = inputs.aminmax()
            if not (LEAST <= low and high <= MOST):
                raise ValueError(
                    f"inputs from {float(low):.4g} to {float(high):.4g}: pixels must be of 0 to 1; divide those of 0 to "
                    "255 by 255, and leave normalising to the model (pixel_mean, pixel_std)"
                )
        return inputs.to(dtype)

    def prepare(self, inputs: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """What an objective reads: pixels [B, C, H, W] and the class of every image [B].

        Args:
            inputs: see :meth:`pixels`.
            labels: [B] of int64, in 0 .. V - 1, or -100 where an image is not to be scored.

        Raises:
            ValueError: there are no labels, or they or the inputs do not fit.
        """
        pixels = self.pixels(inputs)
        if labels is None:
            raise ValueError("labels=None: this model needs the class of every image to be scored on; pass them")
        return pixels, as_classes(labels, self.config.n_classes, pixels.shape[:1])

    def before_head(self, state: Tensor, path: Sequence[int]) -> Tensor:
        """See :meth:`DepthHierarchy.before_head`."""
        return state if self.exits is None else self.exits(state, path)

    def run(self, inputs: Tensor, path: Sequence[int] | None = None) -> Tensor:
        """See :meth:`DepthHierarchy.run`; inputs: see :meth:`pixels`."""
        return super().run(self.pixels(inputs), path)

    @torch.no_grad()
    def predict(
        self, inputs: Tensor, depth: int | None = None, path: Sequence[int] | None = None, batch_size: int = 256
    ) -> Tensor:
        """The most likely class of every image, [B] of int64, evaluated in batches without dropout. A path that the config
        says was not trained warns.

        Args:
            inputs: see :meth:`pixels`.
            depth, path: how many blocks, or which; all where both are None.
            batch_size: images at once.

        Raises:
            ValueError: the inputs cannot be read, there is no such path, or the batch size is below 1.
        """
        batch_size, path = as_whole("batch_size", batch_size, 1), self.resolve_path(depth, path)
        check_inputs("inputs", inputs, self)
        if not self.config.is_trained(path):
            warn_user(f"depth {len(path)} (path {quote(list(path))}) of this model was not trained; expect worse "
                      f"predictions; trained: {self.config.trained_depths}; choose one of these")  # fmt: skip
        with evaluation_mode(self):
            return torch.cat([self.run(batch, path).argmax(-1) for batch in inputs.split(batch_size)])

    def card_text(self) -> CardText:
        """See :meth:`HubMixin.card_text`."""
        config, n_parameters = self.config, sum(p.numel() for p in self.parameters())
        size = config.image_size
        about = (
            f"A classifier of images of {size} x {size} pixels with {n_parameters:,} parameters: patches of "
            f"{config.patch_size} x {config.patch_size} pixels,\na tree of {config.n_layer} attention blocks, and one head "
            f"for {config.n_classes} classes. One set of weights gives networks of 1 to {config.n_layer} blocks."
        )
        example = f"torch.rand(2, {config.n_channels}, {size}, {size})"
        usage = f"import torch\n\nprint(model.predict({example}, depth={min(3, config.n_layer)}))  # your own images, 0 to 1"
        return CardText("image-classification", "HBLL image classifier", about, usage)

    def extra_repr(self) -> str:
        """The configuration, for ``print(model)``."""
        return f"{self.config}"
