"""Checks of the tensors that models and objectives are given, before torch broadcasts them or fails far from the cause.

Values are checked on a CPU only, since on a GPU the check would wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hbll_seq.utils.reading import quote

#: the label of a position that is not to be scored, as in torch and transformers.
IGNORE_INDEX = -100


def check_inputs(name: str, inputs: object, module: nn.Module) -> None:
    """Raises ValueError unless ``inputs`` is a tensor of one row or more, on the device of the module's parameters."""
    if not isinstance(inputs, Tensor):
        raise ValueError(f"{name}={quote(inputs)}: must be a tensor; make one with torch.as_tensor")
    if inputs.dim() < 1 or not inputs.numel():
        raise ValueError(f"{name} of shape {tuple(inputs.shape)}: must hold a row of a step or more; leave empty batches out")
    check_device(name, inputs, module)


def check_device(name: str, tensor: Tensor, module: nn.Module) -> None:
    """Raises ValueError unless ``tensor`` is where the module's parameters are (a module may have none)."""
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.device != tensor.device:
        raise ValueError(f"{name} on {tensor.device} with a model on {parameter.device}: move one, as by {name}.to(device)")


def as_token_ids(name: str, ids: object, vocab_size: int, module: nn.Module, *, empty: bool = False) -> Tensor:
    """Token ids [B, T] of any whole-number dtype as int64.

    Args:
        name: of the argument, for messages.
        ids: what was given.
        vocab_size: V; ids are in 0 .. V - 1.
        module: what they are for.
        empty: whether there may be no rows.

    Raises:
        ValueError: another shape or dtype, another device, or an id that is out of range.
    """
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name}={quote(ids)}: must be a tensor [batch, T] of token ids; make one with torch.as_tensor")
    if ids.dim() != 2 or not holds_whole_numbers(ids) or not ids.shape[1] or not (empty or len(ids)):
        raise ValueError(
            f"{name} of shape {tuple(ids.shape)} and {ids.dtype}: must be [batch, T] token ids of int64, neither of them 0"
        )
    check_device(name, ids, module)
    ids = ids.long()
    if ids.device.type == "cpu" and ids.numel():
        low, high = ids.aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"token ids from {int(low)} to {int(high)}: must be in 0 .. {vocab_size - 1} "
                "(vocab_size - 1); use the tokenizer that the model was trained with"
            )
    return ids


def as_classes(labels: object, n_classes: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Class numbers of any whole-number dtype as int64.

    Raises:
        ValueError: another shape or dtype, or a class that is neither in 0 .. ``n_classes`` - 1 nor ``IGNORE_INDEX``.
    """
    if not isinstance(labels, Tensor) or not holds_whole_numbers(labels) or labels.shape != shape:
        given = f"of shape {tuple(labels.shape)} and {labels.dtype}" if isinstance(labels, Tensor) else quote(labels)
        raise ValueError(f"labels {given} do not fit: they must be class numbers {list(shape)} of torch.int64")
    labels = labels.long()
    if labels.device.type == "cpu" and labels.numel():
        wrong = ((labels < 0) | (labels >= n_classes)) & (labels != IGNORE_INDEX)
        if wrong.any():
            low, high = labels[labels != IGNORE_INDEX].aminmax()
            raise ValueError(
                f"labels from {int(low)} to {int(high)}: must be in 0 .. {n_classes - 1}, or {IGNORE_INDEX} where there is "
                "none; number the classes from 0, or make a model of larger n_classes (vocab_size)"
            )
    return labels


def shifted_labels(inputs: Tensor, labels: Tensor | None, vocab_size: int) -> Tensor:
    """Labels of token windows [B, T + 1], which are the windows themselves where none are given.

    Raises:
        ValueError: the shapes do not agree, there is no token to predict, or a label is out of range.
    """
    shape = tuple(getattr(labels, "shape", inputs.shape))
    if inputs.shape[1] < 2 or shape != tuple(inputs.shape):
        raise ValueError(
            f"inputs {tuple(inputs.shape)} with labels {shape}: both must be [batch, T + 1] with T of "
            "at least 1; the model shifts them itself"
        )
    return inputs if labels is None else as_classes(labels, vocab_size, inputs.shape)


def check_state(name: str, state: object, shape: tuple[int, ...], like: Tensor, *, values: bool = True) -> None:
    """Raises ValueError unless ``state`` is a tensor of this shape, with the dtype and on the device of ``like``; under
    autocast of any floating dtype.

    Args:
        name: of the state, for messages.
        state: what was given.
        shape: what it must have: torch would broadcast another one in silence.
        like: a parameter of the model.
        values: also refuse NaN and infinity.
    """
    if not isinstance(state, Tensor):
        raise ValueError(f"{name}={quote(state)}: must be a tensor of shape {shape}")
    if tuple(state.shape) != shape:
        raise ValueError(f"{name} of shape {tuple(state.shape)}: must be of shape {shape}, a row for every row of the inputs")
    if state.device != like.device:
        raise ValueError(f"{name} on {state.device} with a model on {like.device}: move it there")
    same = state.dtype == like.dtype or state.is_floating_point() and torch.is_autocast_enabled(like.device.type)
    if not same:
        raise ValueError(f"{name} of {state.dtype} with a model of {like.dtype}: convert it, as by state.to({like.dtype})")
    if values and state.device.type == "cpu" and not torch.isfinite(state).all():
        raise ValueError(f"{name} holds NaN or infinity: the step that made it broke down; start from None")


def holds_whole_numbers(tensor: Tensor) -> bool:
    """Whether its dtype is one of whole numbers; a bool is none."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
