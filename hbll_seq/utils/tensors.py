"""What checkpoints and saved models share: which tensors of a module are stored, and whether they are sound.

A saved model must load again, and its file must hold exactly the tensors of its configuration. Both are checked against a
model of that configuration on the meta device, which holds no values and takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hbll_seq.utils.reading import quote, shorten

#: the dtypes of a model's weights; a file's are all of one of them.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: functions of torch that fill a tensor
_FILLS = frozenset(
    "normal_ uniform_ trunc_normal_ kaiming_normal_ kaiming_uniform_ xavier_normal_ xavier_uniform_ orthogonal_ "
    "zero_ zeros_ ones_ fill_ constant_".split()
)


class WithoutValues(TorchFunctionMode):
    """Inside it, new parameters are not filled, because a caller replaces their values anyway.

    Drawing the values takes most of the time of making a model. On the meta device a random fill would even load more of
    torch's Python modules, which takes a second.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensor = args[0] if args else (kwargs or {}).get("tensor")
        if isinstance(tensor, nn.Parameter) and getattr(func, "__name__", None) in _FILLS:
            return tensor
        return func(*args, **(kwargs or {}))


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The module that ``make`` makes, without values and without the memory for them."""
    with torch.device("meta"), WithoutValues(), torch.random.fork_rng(devices=[]):
        return make()


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, the module's own; tied ones once, under their first name."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or infinity, None when there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


def check_finite(tensors: Mapping[str, Tensor], source: str, remedy: str) -> None:
    """Raises ValueError where a weight of ``source`` holds NaN or infinity."""
    name = first_not_finite(tensors)
    if name is not None:
        tensor = tensors[name]
        count = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise ValueError(f"{source}: weight {name!r} has {count} of {tensor.numel()} values NaN or infinite; {remedy}")


def _name(name: str) -> str:
    return shorten(repr(name[:100]), 60)


def listing(names: list[str], limit: int = 4) -> str:
    """Names for a message, the first of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(_name(name) for name in names[:limit]) + more


# ------------------------------------------------------------------------------------------------- before saving


def tensors_to_save(module: nn.Module, fresh: nn.Module) -> dict[str, Tensor]:
    """What a file of ``module`` holds: :func:`module_tensors`, each contiguous and with memory of its own.

    Args:
        module: the model.
        fresh: what its file will be loaded into, made :func:`on_meta`.

    Raises:
        ValueError: the file could not be loaded, or not as this model: other names, shapes, dtypes or ties.
    """
    _check_names(set(module.state_dict()), set(fresh.state_dict()))
    if bare := [name for name, tensor in module.state_dict().items() if tensor.device.type == "meta"]:
        raise ValueError(f"weight {_name(bare[0])} is on the meta device and has no values; load or initialise them first")
    wanted = fresh.state_dict()
    for name, tensor in module.state_dict().items():
        if tensor.shape != wanted[name].shape:  # before the ties: what was resized cannot be tied
            raise ValueError(
                f"weight {_name(name)} has shape {quote(list(tensor.shape))}, but a model of this config has "
                f"{quote(list(wanted[name].shape))}; make a model of a config that fits (vocab_size for a resized "
                "embedding) and copy the weights into it"
            )
    _check_ties(module, fresh)
    expected = module_tensors(fresh)
    tensors = {name: _plain(name, tensor) for name, tensor in module_tensors(module).items()}
    _check_dtypes("", {name: tensor.dtype for name, tensor in tensors.items()}, expected, "make them one by model.to(dtype)")
    return {name: own_memory(tensor) for name, tensor in tensors.items()}


def _check_names(found: set[str], expected: set[str]) -> None:
    """Raises ValueError, with a remedy for what makes names differ most often."""
    odd = sorted(found - expected)
    if not odd and not (missing := sorted(expected - found)):
        return
    if any("_orig_mod" in name for name in odd):
        remedy = "compile in place with block.compile(), or put the plain block back: model.blocks[0] = compiled._orig_mod"
    elif any("parametrizations." in name or name.endswith(("_g", "_v", "_orig")) for name in odd):
        remedy = "remove the parametrization first: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
    else:
        remedy = "only what the class makes from its config is loaded again: put that back as it was"
    what = f"has {listing(odd)}, which a model of this config does not have" if odd else f"lacks {listing(missing)}"
    raise ValueError(f"it {what}; {remedy}")


def _check_ties(module: nn.Module, fresh: nn.Module) -> None:
    """Raises ValueError unless the same names stand for the same tensors in both."""
    found, expected = _first_names(module), _first_names(fresh)
    for name, first in expected.items():
        if first != name and found[name] != first:
            raise ValueError(
                f"weight {_name(name)} is not tied to {_name(first)}, as it is in a model of this config; tie "
                f"it: model.{name} = model.{first}"
            )
    memory: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        has_memory = tensor.layout == torch.strided and tensor.numel() > 0
        first = memory.setdefault(tensor.data_ptr(), found[name]) if has_memory else found[name]
        if first != expected[name]:
            raise ValueError(
                f"weight {_name(name)} shares its memory with {_name(first)}, but in a model of this config they are two; "
                "give it a copy of its own, as copy.deepcopy makes of a module, or use a config that ties them"
            )


def _first_names(module: nn.Module) -> dict[str, str]:
    """Name -> the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in module.state_dict(keep_vars=True).items()}


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A dense tensor without gradient and without a subclass's ways."""
    if tensor.layout != torch.strided or hasattr(tensor, "__tensor_flatten__") or tensor.is_quantized:
        raise ValueError(
            f"weight {_name(name)} is a {type(tensor).__name__} of layout {tensor.layout}, not a plain tensor; "
            "make it dense and whole first"
        )
    return tensor.detach().as_subclass(Tensor)


def own_memory(tensor: Tensor) -> Tensor:
    """Contiguous, and sharing its memory with no other tensor, which a file of weights cannot express."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() else tensor.clone()


def _check_dtypes(start: str, found: Mapping[str, torch.dtype | str], expected: Mapping[str, Tensor], remedy: str) -> None:
    """Raises ValueError unless all floating tensors have one dtype, of ``FLOATS``, and the others the expected one."""
    floating = None
    for name, dtype in found.items():
        own = expected[name].dtype
        if dtype not in FLOATS if own.is_floating_point else dtype != own:
            raise ValueError(f"{start}weight {_name(name)} is {dtype}, but must be like {own}; {remedy}")
        if own.is_floating_point and dtype != (floating := floating or dtype):
            raise ValueError(
                f"{start}weight {_name(name)} is {dtype}, but others are {floating}: all must have one dtype; {remedy}"
            )


# ------------------------------------------------------------------------------------------------ before loading


def check_found(
    source: str, shapes: Mapping[str, list[int]], dtypes: Mapping[str, torch.dtype | str], expected: Mapping[str, Tensor]
) -> None:
    """Compare what the file ``source`` says that it holds with what a model needs.

    Raises:
        ValueError: other names, shapes or dtypes.
    """
    remedy = "use the config.json that was saved with these weights, or load an intact copy"
    if missing := [name for name in expected if name not in shapes]:
        raise ValueError(f"{source} lacks {listing(missing)} of {len(expected)} weights; {remedy}")
    if unexpected := [name for name in shapes if name not in expected]:
        raise ValueError(f"{source} holds {listing(unexpected)}, which this configuration does not have; {remedy}")
    for name, own in expected.items():
        if list(shapes[name]) != list(own.shape):
            raise ValueError(
                f"{source}: weight {_name(name)} has shape {quote(list(shapes[name]))}, config.json asks for "
                f"{quote(list(own.shape))}; {remedy}"
            )
    _check_dtypes(f"{source}: ", dtypes, expected, remedy)
