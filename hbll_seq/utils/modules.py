"""Modules as they are, and as they are evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def plain_module(module: nn.Module) -> nn.Module:
    """The module inside of what ``torch.compile`` makes of it; any other as it is."""
    return getattr(module, "_orig_mod", module)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No gradient and no dropout inside; training flags are put back as they were.

    Not ``inference_mode``: a tensor that a block caches in there could not be used in training afterwards.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
