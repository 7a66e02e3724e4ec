"""What a checkpoint holds of a module and its optimizer: taken out of them, compared with them and put back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hbll_seq.training.checkpoint import CheckpointError
from hbll_seq.utils.reading import quote
from hbll_seq.utils.tensors import module_tensors

#: what AdamW keeps of each parameter.
ADAM_STATES = {"step", "exp_avg", "exp_avg_sq"}


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], where: str = "checkpoint") -> None:
    """Copy ``tensors`` into ``module``; names, shapes and types must be exactly the module's.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape or type; ``module`` is unchanged.
    """
    targets = module_tensors(module)
    check_module(targets, tensors, where)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def check_module(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str = "checkpoint") -> None:
    """Raises CheckpointError unless ``tensors`` have exactly the names, shapes and types of ``targets``."""
    remedy = "it belongs to a model of another configuration"
    for problem, names in (("lacks", set(targets) - set(tensors)), ("holds unexpected", set(tensors) - set(targets))):
        if names:
            raise CheckpointError(f"{where} {problem} tensor {quote(min(names))} ({len(names)} in all): {remedy}")
    for name, target in targets.items():
        found = tensors[name]
        if found.shape != target.shape or found.dtype != target.dtype:
            raise CheckpointError(
                f"{where}: {name!r} is {found.dtype} of shape {tuple(found.shape)}, expected {target.dtype} of shape "
                f"{tuple(target.shape)}: {remedy}"
            )


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter name>|<state name>`` -> tensor."""
    tensors = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}|{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors` for an optimizer over the same parameters.

    Raises:
        CheckpointError: as :func:`check_optimizer`; ``optimizer`` is unchanged.
    """
    check_optimizer(optimizer, module, tensors)
    parameters = dict(module.named_parameters())
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    # PyTorch keeps step counts on the CPU unless the optimizer is fused or capturable
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("|", 1)
        parameter = parameters[name]
        device = parameter.device if tensor.ndim or on_device else "cpu"
        state.setdefault(parameter, {})[key] = tensor.to(device, copy=True)
    optimizer.state.clear()
    optimizer.state.update(state)


def check_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError where a state belongs to no parameter that ``optimizer`` trains, has another shape or type than
    its parameter, or a parameter has some of AdamW's states and not all."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in module.named_parameters() if id(p) in trained}
    remedy = "it belongs to a model of another configuration"
    found: dict[str, set[str]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("|")
        parameter = parameters.get(name)
        count = key == "step"
        if parameter is None or key not in ADAM_STATES or tensor.shape != (() if count else parameter.shape):
            raise CheckpointError(f"optimizer state {quote(full_name)} of shape {tuple(tensor.shape)} fits no parameter: "
                                  f"{remedy}")
        if not tensor.is_floating_point() if count else tensor.dtype != parameter.dtype:
            raise CheckpointError(f"optimizer state {quote(full_name)} is {tensor.dtype}, its parameter {parameter.dtype}: "
                                  f"{remedy}")
        found.setdefault(name, set()).add(key)
    for name, keys in found.items():
        if missing := ADAM_STATES - keys:
            raise CheckpointError(f"optimizer state {min(missing)!r} of parameter {quote(name)} is missing: {remedy}")
