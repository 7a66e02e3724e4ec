"""The optimizer of a training run."""

from __future__ import annotations

import torch
from torch import nn

from hbll_seq.training.settings import TrainingSettings

#: for which torch 2.5 has a fused AdamW
_FUSED_DEVICES = ("cpu", "cuda")


def make_optimizer(module: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW over the trained parameters of ``module``, with weight decay on matrices (embedding included) only.

    It is torch's fused one where there is one for their device: it goes through memory once (docs/lab-log.md has its times).

    Args:
        module: frozen parameters are left out.
        settings: ``lr``, ``weight_decay``, ``beta1`` and ``beta2`` are read.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    is_fused = all(p.device.type in _FUSED_DEVICES for p in parameters)
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=betas, fused=is_fused)
