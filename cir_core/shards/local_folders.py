"""What a listing of a local folder does not tell: links that lead nowhere or in circles, pipes, names that are not text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cir_core import files
from cir_core.schema import CirError


def odd_entries(uri: str, *, recursive: bool = True) -> list[tuple[str, str]]:
    """Return (path below the folder, what it is) of every entry that is neither a file nor a folder, sorted.

    Nothing for a store or for what is no folder. Raises CirError for a name that is not UTF-8, which no id can hold, for a
    link to a folder above itself, which a listing would follow for ever, and for a folder that may not be read.
    """
    if not files.is_local(uri):
        return []
    root = files.local_path(uri)
    return sorted(_walk(root, recursive=recursive)) if root.is_dir() else []


def _walk(root: Path, *, recursive: bool) -> Iterator[tuple[str, str]]:
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset([_identity(root.stat())]))]
    while waiting:
        below, above = waiting.pop()
        for entry in _entries(root / below):
            name = f"{below}{entry.name}"
            try:
                name.encode()
            except UnicodeEncodeError:
                shown = os.fsencode(name).decode("utf-8", "replace")
                raise CirError(f"{root}/{shown}: the name is not UTF-8, which ids must be; rename it") from None
            if _is_folder(entry):
                identity = _identity(entry.stat())
                if identity in above:
                    raise CirError(f"{root}/{name}: a link to a folder above it, a circle without end; remove the link")
                if recursive:
                    waiting.append((f"{name}/", above | {identity}))
            elif entry.is_symlink() and not Path(entry).exists():
                yield name, "a link that leads nowhere"
            elif not entry.is_file():
                yield name, "a pipe, a socket or a device"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except PermissionError as error:
        raise CirError(f"{folder}: access refused ({error.strerror}); check the permissions") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
