"""Float32 matrix products of a CPU by oneDNN, where those are float32 in full. On an AMD processor with AVX-512 they take
less than half the time of MKL's, which torch asks by itself (train/experiments/bench_heads.py).

torch asks oneDNN for a float32 product only where it may be rounded to bfloat16. oneDNN rounds where the processor has
a unit for such products (AMX); elsewhere it has nothing to gain and computes in float32. Whether it does is tested here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

#: largest difference from a float64 product of 256 terms of size 1 that is float32's; bfloat16's is a thousand times larger.
_FLOAT32_ERROR = 1e-4


@contextlib.contextmanager
def fast_products(like: Tensor) -> Iterator[None]:
    """Products of float32 matrices inside run as fast as this processor allows, as exact as before.

    For a few large products. Torch's attention, which makes many small ones, is several times slower inside.

    Args:
        like: one of the matrices. On a GPU, of another dtype, and under autocast nothing changes.
    """
    settings = _settings() if like.device.type == "cpu" and like.dtype == torch.float32 else None
    before = None if settings is None or torch.is_autocast_enabled("cpu") else settings.fp32_precision
    # What someone asked for stays; so does what another thread set in here, which will be put back there.
    if before in (None, "bf16", "tf32") or not _is_exact():
        yield
        return
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _settings() -> object | None:
    """torch's settings of oneDNN's products; None where this torch has none (before 2.9)."""
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    return settings if hasattr(settings, "fp32_precision") and torch.backends.mkldnn.is_available() else None


@functools.cache
def _is_exact() -> bool:
    """Whether oneDNN, free to round, does not."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False  # nothing to gain
    settings = _settings()
    # numbers that no bfloat16 holds, without a draw from the random state of the caller
    numbers = torch.arange(256 * 256, dtype=torch.float64, device="cpu").view(256, 256)
    a, b = numbers.sin().float(), numbers.cos().float()
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        product = a @ b
    finally:
        settings.fp32_precision = before
    return (product - a.double() @ b.double()).abs().max().item() < _FLOAT32_ERROR
