"""How many bytes autograd keeps for backward passes: what limits the batch, counted exactly and on any device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Kept:
    """A tensor that autograd keeps; it dies with the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedTensors:
    """Counts, while it is entered, the bytes that operations keep for their backward passes: now and at the peak.

    A storage kept by several operations counts once; those of the `known` tensors (parameters: they are there anyway) do
    not count. What gradient checkpointing computes again is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self.bytes_now = self.peak_bytes = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._keepers: dict[int, int] = {}  # of each storage
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer in self._known:
            return tensor
        self._keepers[pointer] = self._keepers.get(pointer, 0) + 1
        if self._keepers[pointer] == 1:
            self.bytes_now += size
            self.peak_bytes = max(self.peak_bytes, self.bytes_now)
        kept = _Kept(tensor)
        weakref.finalize(kept, self._release, pointer, size).atexit = False
        return kept

    @staticmethod
    def _unpack(kept: Any) -> Tensor:
        tensor: Tensor = kept.tensor if isinstance(kept, _Kept) else kept
        return tensor

    def _release(self, pointer: int, size: int) -> None:
        self._keepers[pointer] -= 1
        if not self._keepers[pointer]:
            del self._keepers[pointer]
            self.bytes_now -= size
