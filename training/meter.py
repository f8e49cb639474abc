"""Counting what an operation on the meta device would take: bytes alive, their peak, FLOPs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):
    """Bytes of the storages made within and still alive (``live``), the most there ever were (``peak``), and FLOPs.

    Args:
        resident: tensors that were there before; they, and views of them, are not counted, but what is freed of them
            is taken off: a layer cast from fp8 and back has another storage afterwards.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._known: dict[int, Any] = {}
        for storage in {id(s): s for s in (t.untyped_storage() for t in resident)}.values():
            self._watch(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor):
                self._add(made.untyped_storage())
        self.peak = max(self.peak, self.live)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._known:
            self._watch(storage)
            self.live += storage.nbytes()

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)


@contextmanager
def device_attention() -> Iterator[None]:
    """Within: attention as a CUDA device computes it, scores unstored; the meta device's own is two matrix products.

    A function is replaced, because a mode (``TorchFunctionMode``) does not reach what a checkpoint computes again.
    """

    def attention(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, is_causal: bool = False, **kwargs: Any
    ) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]

    stock = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock
