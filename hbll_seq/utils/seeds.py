"""Seeds as functions of their use, such as (run, step, node)."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def mix_seeds(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that neighbouring (seed, step, node) give unrelated streams."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:  # splitmix64 (Steele, Lea, Flood 2014)
        mixed = (mixed ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1


def fork_rng_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Inside it, torch's generators of the CPU and of the tensor's device can be seeded; afterwards they are as before."""
    return torch.random.fork_rng(devices=[tensor.device] if tensor.device.type == "cuda" else [])
