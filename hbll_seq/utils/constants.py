"""Numbers that Python knows, as tensors on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def constants(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor [n], made by fills.

    A copy from the CPU makes a GPU wait, and a CUDA graph that holds one reads memory that is gone when it is replayed.
    """
    return torch.cat([torch.full((1,), value, dtype=dtype, device=device) for value in values])
