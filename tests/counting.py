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
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                opaque = x.layout is torch._mkldnn           # a matrix in oneDNN's layout has no storage to look at
                self.see(x if opaque else x.untyped_storage(), x.numel() * x.element_size() if opaque else None)
        return result

    def see(self, holder: torch.UntypedStorage | torch.Tensor, size: int | None) -> None:
        key = id(holder)                                     # one Python object a storage, as long as it lives
        size = holder.nbytes() if size is None else size
        if key not in self.known:
            self.known[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(holder, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.known.pop(key)
