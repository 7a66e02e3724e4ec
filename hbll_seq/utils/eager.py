"""Objectives under ``torch.compile``: their steps run uncompiled, and compiled blocks inside of them run compiled.

Paths, seeds and inner gradients change from step to step. Traced, they would be frozen into a graph or fail in the tracer.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def eagerly(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, never traced by a ``torch.compile`` around it; blocks that are compiled themselves run compiled.

    ``torch.compiler.disable`` is put around it only once the compiler is loaded, because loading takes seconds.
    """
    disabled: Callable[..., Any] | None = None

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return method(*args, **kwargs)
            disabled = torch.compiler.disable(method)
        return disabled(*args, **kwargs)

    return call
