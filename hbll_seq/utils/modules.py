"""Plain modules and evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


def plain_module(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped; any other module as it is."""
    return getattr(module, "_orig_mod", module)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """No gradient and no dropout inside; training flags are put back as they were.

    ``modules`` is ``list(model.modules())``, for who enters often: walking the model takes longer than the rest.

    It does not use ``inference_mode``: training could not use a tensor that a block cached in there.
    """
    training = [module for module in (model.modules() if modules is None else modules) if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
