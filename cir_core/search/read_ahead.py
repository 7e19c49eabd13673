"""Reading the next blocks of a gallery while one is searched."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from cir_core.schema import CirError

T = TypeVar("T")
_END = object()


def read_ahead(blocks: Iterable[T], num_blocks: int = 1) -> Iterator[T]:
    """Yield `blocks` in order while a thread prepares the next `num_blocks` of them.

    At most num_blocks + 1 blocks are in memory: the one that was yielded last and those ahead. An error of the iterable is
    raised where its block would have come. Closing this generator closes the iterable when its present block is done.
    Raises CirError for fewer than one block.
    """
    if num_blocks < 1:
        raise CirError(f"read_ahead: num_blocks must be at least 1, not {num_blocks}")
    iterator = iter(blocks)
    context = copy_context()

    def following() -> object:
        return next(iterator, _END)

    waiting: deque[Future[object]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="cir-read-ahead") as pool:
        try:
            for _ in range(num_blocks):
                waiting.append(pool.submit(context.run, following))
            while (block := waiting.popleft().result()) is not _END:
                waiting.append(pool.submit(context.run, following))
                yield block  # type: ignore[misc]
        finally:
            for future in waiting:
                future.cancel()
            if close := getattr(iterator, "close", None):
                pool.submit(context.run, close)
