"""How many bytes of tensors are alive, at their most: what torch.cuda.max_memory_allocated says, for any device. Memory
that an operation takes and gives back inside itself is not seen."""
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counting(TorchDispatchMode):
    """`with Counting() as count:` … then `count.peak`, in bytes, of all tensors made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}                                      # address of a storage → its bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.see(x.untyped_storage())
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)                                    # one Python object a storage, as long as it lives
        if key not in self.known and storage.device.type != "meta":
            self.known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.known.pop(key)
