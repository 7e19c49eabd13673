"""From what a user writes (a file, a folder, a glob, a brace range, or several) to a list of shards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from cir_core import files
from cir_core.schema import CirError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_SUFFIXES = (".tar", ".parquet")
_MAX_RANGE = 10_000_000


def list_shards(uri: str | Sequence[str], *, suffixes: Sequence[str] = _SUFFIXES) -> list[str]:
    """Return the URIs of shards, each once; what is given first comes first.

    uri: a .tar or .parquet file; a folder (all of them in it, sorted by name, subfolders left out); a glob
    with `*`, `?` or `[...]`, none of which matches "/"; a range as in `{00000..00099}.tar`, both ends
    included. Or a list of these. suffixes: what the names end in, for other files than shards. Raises CirError
    if any of them finds nothing, or if a shard of a range is missing.
    """
    given = [uri] if isinstance(uri, str) else list(uri)
    if not given:
        raise CirError("no shards given; expected files, folders, globs or ranges such as {00000..00099}.tar")
    found = [shard for one in given for shard in _expand(one, tuple(suffixes))]
    return list(dict.fromkeys(found))


def shard_versions(shards: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (shard, size in bytes, time of its last change in ns) of existing shards, in the order given.

    One listing per folder. Names and sizes alone do not tell shards apart: tars are padded to whole blocks, so two splits
    of a data set may well agree in both.
    """
    listings = {
        folder: {file.name: (file.size_bytes, file.modified_ns) for file in files.list_files(folder, recursive=False)}
        for folder in {_folder(shard) for shard in shards}
    }
    names = [shard[: len(shard) - len(files.query_of(shard))].rpartition("/")[2] for shard in shards]
    return [(shard, *listings[_folder(shard)][name]) for shard, name in zip(shards, names, strict=True)]


def _expand(uri: str, suffixes: tuple[str, ...]) -> list[str]:
    if _RANGE.search(uri):
        return _expand_range(uri)
    if any(mark in files.redact(uri) for mark in "*?[") and not files.exists(uri):
        return _expand_glob(uri, suffixes)
    if files.is_folder(uri):
        found = [file.uri for file in files.list_files(uri, recursive=False) if file.name.endswith(suffixes)]
        if not found:
            raise CirError(f"{files.redact(uri)}: no {_wanted(suffixes)} file in this folder")
        return found
    if not files.redact(uri).endswith(suffixes):
        raise CirError(f"{files.redact(uri)}: expected a folder or a name that ends in {' or '.join(suffixes)}")
    if not files.exists(uri):
        raise CirError(f"{files.redact(uri)}: no such file; check the path")
    return [uri]


def _expand_range(uri: str) -> list[str]:
    names = [uri]
    while any(_RANGE.search(name) for name in names):
        names = [expanded for name in names for expanded in _first_range(name)]
    if files.redact(uri).startswith(("http://", "https://")):
        return names  # a web server lists no folder to check against
    present = {folder: _names_in(folder) for folder in {_folder(name) for name in names}}
    missing = [name for name in names if files.redact(name).rpartition("/")[2] not in present[_folder(name)]]
    if missing:
        shown = ", ".join(files.redact(name) for name in missing[:3])
        raise CirError(f"{files.redact(uri)}: {len(missing)} of {len(names)} shards are missing: {shown} ...")
    return names


def _wanted(suffixes: Sequence[str]) -> str:
    return " or ".join(f"*{suffix}" for suffix in suffixes)


def _first_range(name: str) -> list[str]:
    match = _RANGE.search(name)
    if match is None:
        return [name]
    low, high = match.groups()
    if not int(low) <= int(high) < int(low) + _MAX_RANGE:
        raise CirError(f"{files.redact(name)}: the range {match.group()} is empty or too long")
    head, tail = name[: match.start()], name[match.end() :]
    return [f"{head}{number:0{len(low)}d}{tail}" for number in range(int(low), int(high) + 1)]


def _folder(uri: str) -> str:
    """Return the folder of a URI, its query string kept."""
    clean = uri if files.is_local(uri) else uri[: len(uri) - len(files.query_of(uri))]
    folder, slash, _ = clean.rpartition("/")
    if not slash:
        return "."
    return (folder or "/") + files.query_of(uri)


def _names_in(folder: str) -> set[str]:
    return {file.name for file in files.list_files(folder, recursive=False)}


def _expand_glob(uri: str, suffixes: tuple[str, ...]) -> list[str]:
    query = files.query_of(uri)
    segments = uri[: len(uri) - len(query)].split("/")
    fixed = next(index for index, segment in enumerate(segments) if any(mark in segment for mark in "*?["))
    folder = "/".join(segments[:fixed]) or ("/" if fixed else ".")
    pattern = segments[fixed:]
    found = [
        file.uri
        for file in files.list_files(folder + query, recursive=len(pattern) > 1)
        if file.name.endswith(suffixes) and _matches(file.name.split("/"), pattern)
    ]
    if not found:
        raise CirError(f"{files.redact(uri)}: no {_wanted(suffixes)} file matches")
    return found


def _matches(names: list[str], pattern: list[str]) -> bool:
    return len(names) == len(pattern) and all(map(fnmatchcase, names, pattern))
