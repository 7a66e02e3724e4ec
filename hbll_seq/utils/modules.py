"""Plain modules, evaluation mode, and buffers that keep their precision."""

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


class KeepsPrecision(nn.Module):
    """A module that moves as modules do, but whose own buffers never turn to half precision, which sums cannot stand."""

    def _apply(self, fn, *args, **kwargs):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, *args, **kwargs)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, before[name].to(buffer.device))
        return self
