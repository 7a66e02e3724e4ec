"""How many bytes of tensors are alive at once: all tensors that operations of torch take or give, views counted once."""

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside it ``most`` is the largest number of bytes that were alive together; meta tensors have none."""

    def __init__(self):
        super().__init__()
        self.most, self._seen = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                memory = tensor.untyped_storage()
                self._seen.setdefault(memory._cdata, (StorageWeakRef(memory), memory.nbytes()))
        self.most = max(self.most, self.alive())
        return result

    def alive(self):
        """Bytes of what was seen and is not yet freed."""
        self._seen = {key: entry for key, entry in self._seen.items() if not entry[0].expired()}
        return sum(n_bytes for _, n_bytes in self._seen.values())
