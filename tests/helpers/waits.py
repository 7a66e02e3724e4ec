"""What a step would make a GPU wait for, found on the meta device: it takes the library's ways for devices other than a CPU.

A CUDA graph cannot hold a copy from the CPU. Some such copies wait, and break a capture; others do not, and a replay would
read memory that is gone.
"""

import contextlib
import traceback

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: functions that make a tensor of Python's numbers, on the CPU first
_FROM_NUMBERS = {torch.tensor, torch.as_tensor, Tensor.new_tensor}


def on_device(given):
    return any(isinstance(x, Tensor) and x.device.type == "meta" for x in tree_leaves(given))


class _Functions(TorchFunctionMode):
    """Copies that no dispatcher sees: of Python's numbers, and of lists as indices."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        copies = func in _FROM_NUMBERS and on_device(output)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and on_device(args[0]):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            copies = any(isinstance(part, list) or getattr(part, "dtype", None) == torch.bool for part in parts)
        if copies:
            self.found.append(f"{func.__name__} at {where()}")
        return output


class _Operations(TorchDispatchMode):
    """Operations on tensors of both devices; numbers without dimensions are passed to a kernel by value."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        every = (args, kwargs, output)
        if on_device(every) and any(isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() for x in tree_leaves(every)):
            self.found.append(f"{func} at {where()}")
        return output


def where():
    frames = [f for f in traceback.extract_stack() if "/hbll_seq/" in f.filename]
    return f"{frames[-1].filename.rpartition('/hbll_seq/')[2]}:{frames[-1].lineno}" if frames else "no line of the library"


@contextlib.contextmanager
def waits(monkeypatch):
    """A list that gets what copies between the devices inside; ``.item()`` and its kin raise on the meta device."""
    known = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": device != "meta" and known(device))
    found = []
    with _Operations(found), _Functions(found):
        yield found
